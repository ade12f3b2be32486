"""How a script ends when something is wrong: one line for what the user can mend, and how to go on after a stop."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from pgjax.core.errors import UserError
from pgjax.parallel import processes
from pgjax.run import loop, stop
from pgjax.run.checkpoint.checkpoints import SaveFailed

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}  # a folder that takes no file


@contextlib.contextmanager
def plain_errors(go_on: str = "the same command with --resume goes on") -> Iterator[None]:
    """Turn errors that name their own mend into one line, and a stop into the way to go on; anything else is a traceback.

    An error that one of several processes met alone ends it at once, so that jax ends the others too.

    Args:
      go_on: how the user goes on after a stop.

    Raises:
      SystemExit: with the line.

    Example:
      >>> with plain_errors():
      ...     raise UserError("steps must be at least 1, got 0")
      Traceback (most recent call last):
      SystemExit: error: steps must be at least 1, got 0
    """
    with _no_notes_of_orbax():
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            line = _line(error, go_on)
            if not processes.is_raised_on_all(error):
                _end(error, line, go_on)
            if line is None:
                raise
            error.__traceback__ = error.__context__ = error.__cause__ = None
            gc.collect()  # what orbax had begun hangs on those, and would report its own failures later
            sys.exit(line)


def _line(error: BaseException, go_on: str) -> str | None:
    """Give the one line that is printed in place of a traceback; None where the traceback is printed."""
    match error:
        case loop.Interrupted() | stop.GivenUp():
            return f"{error}: {go_on}"
        case KeyboardInterrupt():
            return f"stopped; once a step was saved, {go_on} from the last checkpoint"
        case UserError():
            return None if error.keeps_traceback() else f"error: {error}"
        case processes.FailedElsewhere():
            return f"error: {error}"
        case SaveFailed():
            return f"error: {error}: make room; then {go_on}"
        case OSError() if error.errno in CLOSED:
            return f"error: {error}"
        case OSError() if error.errno in FULL:
            return f"error: {error}: make room; then {go_on}, from the last checkpoint"
    return None


def _end(error: BaseException, line: str | None, go_on: str) -> None:
    """End this process, one of several: on a usual way out jax would wait for the others, which wait for this one."""
    if line is None:
        traceback.print_exception(error)
        line = f"error: {type(error).__name__}: {error}"
    number, count = jax.process_index(), jax.process_count()
    print(f"{line}\non process {number} of {count}, so all end; {go_on}, from the last checkpoint", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if number == 0:  # jax ends the others as soon as the coordinator is gone: let them tell of their own errors first
        time.sleep(2)
    os._exit(1)


@contextlib.contextmanager
def _no_notes_of_orbax() -> Iterator[None]:
    """Keep orbax's notes on its own internals off the terminal: what fails comes as an exception anyway.

    Where one file cannot be written, those of the other arrays fail too, or find their event loop gone; each reports that.
    """

    def of_others(record: logging.LogRecord) -> bool:
        # Where several gathered tasks failed the traceback alone names orbax; a write of tensorstore, which has none, its format.
        words = record.pathname + logging.Formatter().format(record)
        return not any(name in words for name in ("orbax", "OCDBT"))

    report = sys.unraisablehook

    def report_others(raised: Any) -> None:
        if str(raised.exc_value) != "Event loop is closed":
            report(raised)

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(of_others)
    sys.unraisablehook = report_others
    try:
        yield
    finally:
        sys.unraisablehook = report
        for logger in loggers:
            logger.removeFilter(of_others)
