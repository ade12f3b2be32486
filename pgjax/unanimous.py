"""A save that all processes bring to the disk, or that counts on none of them.

Where one process cannot write its part, orbax leaves the others waiting for it for twenty minutes. Here it comes to where they
all meet after writing, and says so; then the save fails on all of them, for the same reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

_WRITTEN = "async_write_complete"  # orbax's name of the place where all meet after writing
_FOLDER = "pgjax/unsaved"  # at jax's coordinator: /THE SAVE/PROCESS


def parts() -> tuple[dict[str, Any], ocp.AsyncOptions | None]:
    """Make what an `ocp.CheckpointManager` needs so that its saves are unanimous.

    Returns:
      The handlers of "state" (a tree of arrays) and "extra" (a JSON object), and the options of asynchronous saves; with one
      process those of orbax.

    Example:
      >>> handlers, options = parts()
      >>> sorted(handlers), options
      (['extra', 'state'], None)
    """
    handlers = {"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}
    if jax.process_count() == 1:
        return handlers, None
    failures: list[str] = []  # of this process, to write its part of the save under way
    noting = {name: _noting(handler, failures) for name, handler in handlers.items()}
    return noting, ocp.AsyncOptions(barrier_sync_fn=_meeting(failures))


def reason(error: BaseException) -> str:
    """Find the operating system's own words in an error, or else take its first line.

    Example:
      >>> reason(OSError(28, "No space left on device")), reason(ValueError("no"))
      ('No space left on device', 'no')
    """
    text = str(error) or type(error).__name__
    found = re.search(r": ([^:\[\]\n]+) \[os_error_code=", text)
    return found.group(1) if found else re.sub(r"^\[Errno \d+\] ", "", text.split("\n")[0])[:200]


class _Noted:
    """A write under way that, if it fails, is noted and ends all the same."""

    def __init__(self, future: Any, failures: list[str]) -> None:
        self._future, self._failures = future, failures

    def result(self, timeout: float | None = None) -> None:
        try:
            self._future.result(timeout=timeout)
        except Exception as error:  # whatever the file system or tensorstore raises
            _note(error, self._failures)


def _noting(handler: Any, failures: list[str]) -> Any:
    """Let a handler note what fails. Its own method is replaced: the manager takes no handler of another class."""
    begin = handler.async_save

    async def async_save(*args: Any, **kwargs: Any) -> list[_Noted]:
        try:
            return [_Noted(future, failures) for future in await begin(*args, **kwargs) or ()]
        except Exception as error:  # as above
            _note(error, failures)
            return []

    handler.async_save = async_save
    return handler


def _note(error: Exception, failures: list[str]) -> None:
    failures.append(reason(error))
    error.__traceback__ = error.__context__ = error.__cause__ = None  # the writers of the other arrays hang on those


def _meeting(failures: list[str]) -> Callable[..., None]:
    """Make the barrier of a save: after writing, each process also says whether it could."""
    from jax._src.distributed import global_state  # there is no public way to the coordinator

    client: Any = global_state.client
    wait, process = ocp.multihost.get_barrier_sync_fn(), jax.process_index()

    def meet(*, key: str, timeout_ms: int) -> None:
        if _WRITTEN not in key:
            return wait(key=key, timeout_ms=timeout_ms)
        place = f"{_FOLDER}/{key}/"
        if failures:
            client.key_value_set(f"{place}{process}", failures[0])
            failures.clear()
        wait(key=key, timeout_ms=timeout_ms)
        for where, why in sorted(client.key_value_dir_get(place))[:1]:
            raise OSError(f"process {where.rpartition('/')[2]}: {why}")

    return meet
