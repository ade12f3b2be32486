"""A save that all processes bring to the disk, or that counts on none of them.

Where one process cannot write its part, orbax leaves the others waiting for it for twenty minutes. Here it comes to where they
all meet after writing, and says so; then the save fails on all of them, for the same reason.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pgjax.parallel import failures as alarm

_WRITTEN = "async_write_complete"  # orbax's name of the place where all meet after writing
_PATIENCE = 20  # seconds that a process whose save has failed gives the others to come to where a save ends
_FOLDER = "pgjax/unsaved"  # at jax's coordinator: /THE SAVE/PROCESS


def made_unanimous(handlers: Mapping[str, Any], wait: Callable[..., None]) -> Callable[..., None]:
    """Let orbax's handlers note what fails, and make the barrier at which the processes tell each other.

    Args:
      handlers: of what a snapshot holds; their own `async_save` is replaced, as the manager takes none of another class.
      wait: orbax's barrier, (key, timeout_ms) -> None.

    Returns:
      A barrier that also raises an OSError on all processes where one could not write.
    """
    failures: list[str] = []  # of this process, to write its part of the save under way
    for handler in handlers.values():
        handler.async_save = _noting(handler.async_save, failures)
    return _meeting(failures, wait)


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


def _noting(begin: Callable[..., Any], failures: list[str]) -> Callable[..., Any]:
    async def async_save(*args: Any, **kwargs: Any) -> list[_Noted]:
        try:
            return [_Noted(future, failures) for future in await begin(*args, **kwargs) or ()]
        except Exception as error:  # as above
            _note(error, failures)
            return []

    return async_save


def _note(error: Exception, failures: list[str]) -> None:
    failures.append(reason(error))
    error.__traceback__ = error.__context__ = error.__cause__ = None  # the writers of the other arrays hang on those


def _meeting(failures: list[str], wait: Callable[..., None]) -> Callable[..., None]:
    from jax._src.distributed import global_state  # there is no public way to the coordinator

    client: Any = global_state.client
    process = global_state.process_id

    def meet(*, key: str, timeout_ms: int) -> None:
        if _WRITTEN not in key:
            # orbax comes here by a `finally`, where process 0 could make no folder, say, or rename none
            failed = sys.exc_info()[1]
            if failed is None:
                return wait(key=key, timeout_ms=timeout_ms)
            try:
                return wait(key=key, timeout_ms=min(timeout_ms, 1000 * _PATIENCE))
            except jax.errors.JaxRuntimeError:  # the others wait for a step of the save that will never come
                alarm.sound(OSError(f"a snapshot could not be saved ({reason(failed)}); older ones are kept"))
                raise
        place = f"{_FOLDER}/{key}/"
        if failures:
            client.key_value_set(f"{place}{process}", failures[0])
            failures.clear()
        wait(key=key, timeout_ms=timeout_ms)
        for where, why in sorted(client.key_value_dir_get(place))[:1]:
            raise OSError(f"process {where.rpartition('/')[2]}: {why}")

    return meet
