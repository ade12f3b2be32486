"""How a script ends when something is wrong: one line for what the user can mend, and how to go on after a stop."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator

import jax

from pgjax.core.errors import UserError
from pgjax.parallel import failures, processes
from pgjax.run import loop
from pgjax.run.checkpoint.checkpoints import SaveFailed

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}  # a folder that takes no file


@contextlib.contextmanager
def plain_errors(go_on: str = "the same command with --resume goes on") -> Iterator[None]:
    """Turn errors that name their own mend into one line, and a stop into the way to go on; anything else is a traceback.

    Example:
      >>> with plain_errors():
      ...     raise UserError("steps must be at least 1, got 0")
      Traceback (most recent call last):
      SystemExit: error: steps must be at least 1, got 0
    """
    try:
        try:
            yield
        except BaseException as error:
            processes.leave_soon(error)
            if isinstance(error, Exception) and jax.distributed.is_initialized() and failures.gone(error):
                said = str(error).splitlines()[0]
                sys.exit(f"error: another process has gone ({said}): {go_on}, from the last checkpoint")
            raise
    except loop.Interrupted as stopped:
        sys.exit(f"{stopped}: {go_on}")
    except KeyboardInterrupt:
        sys.exit(f"stopped; once a step was saved, {go_on} from the last checkpoint")
    except UserError as error:
        if error.keeps_traceback():
            raise
        sys.exit(f"error: {error}")
    except processes.FailedElsewhere as error:
        sys.exit(f"error: {error}")
    except SaveFailed as failed:
        sys.exit(f"error: {failed}: make room; then {go_on}")
    except OSError as error:
        if error.errno in CLOSED:
            sys.exit(f"error: {error}")
        if error.errno not in FULL:
            raise
        sys.exit(f"error: {error}: make room; then {go_on}, from the last checkpoint")
