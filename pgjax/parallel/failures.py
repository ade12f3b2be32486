"""How a failure of one process reaches the others, which wait for it in an exchange meanwhile and would hear of nothing.

A process that fails writes that down at jax's coordinator, and a thread of each process reads there once a second. Where all fail
within some seconds they fail alike, and can still do things together; else that thread ends its process with the error's words.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import threading
import time
from typing import Any

import jax

_SECONDS = 10.0  # that the others have to fail as well
_POLL = 1.0  # seconds from one look to the next
# What an exchange says whose other end has gone.
_GONE = ("Connection reset", "Connection closed", "Connection refused", "Socket closed")
_FOLDER = "pgjax/failed"  # at the coordinator: /NUMBER OF THE FAILURE/PROCESS


def watch() -> Alarm | None:
    """Look out for failures of the other processes from now on.

    Returns:
      What tells them of one here; None where jax has not joined any.

    Example:
      >>> watch() is None
      True
    """
    from jax._src.distributed import global_state  # there is no public way to the coordinator

    if global_state.client is None:
        return None
    return _alarm(global_state.client, global_state.process_id, global_state.num_processes)


def failed_alike(error: Exception) -> bool:
    """Tell the other processes of a failure here, and see whether all of them fail.

    Args:
      error: what was raised here.

    Returns:
      True where all fail within ten seconds, or where there is one process. Otherwise False, and every process ends a few
      seconds later, with this error's words, whatever it waits for.

    Example:
      >>> failed_alike(ValueError("no such prompt"))
      True
    """
    alarm = watch()
    return alarm is None or alarm.failed_alike(_words(error))


def tell(error: BaseException) -> None:
    """Tell the other processes that this one is about to end, and why.

    Args:
      error: what was raised here; this process says so itself.

    Example:
      >>> tell(ValueError("no such prompt"))
    """
    alarm = watch()
    if alarm is not None:
        if gone(error) and alarm.explained():  # this only follows from a failure whose words the alarm is about to say
            time.sleep(2 * _SECONDS)
        alarm.said = True
        alarm.ring(_words(error))


def sound(error: BaseException) -> None:
    """Tell all processes, this one too, to end within seconds with an error's words, where one alone has met it.

    Args:
      error: what was raised here.

    Example:
      >>> sound(ValueError("no such prompt"))
    """
    alarm = watch()
    if alarm is not None:
        alarm.sound(_words(error))


def gone(error: BaseException) -> bool:
    """Say whether an exchange failed because its other end has gone; jax raises that as one kind of error or another.

    Args:
      error: what was raised here.

    Returns:
      True where jax, or its gloo, says that a connection broke; not where a reward's own code says so.

    Example:
      >>> gone(ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"))
      True
      >>> gone(OSError("the judge at localhost: Connection refused"))
      False
    """
    said = str(error)
    of_jax = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in said
    return of_jax and any(sign in said for sign in _GONE)


class Alarm:
    """The failures of a run's processes, by number: those that all had are over, the next one is looked out for."""

    def __init__(self, client: Any, process: int, processes: int) -> None:
        self.said = False  # this process tells of its failure itself
        self._explained = -1  # the failure that another process, or `sound` here, gave the words of
        self._client = client
        self._process, self._processes = process, processes  # jax itself says neither once it has shut down
        self._over = 0
        self._rung = -1, 0.0  # the failure that this process told of last: its number, and when it did so first
        self._seen = -1, 0.0  # the failure seen last: its number, and when
        self._leaving, self._done_looking = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        atexit.register(self._leave)

    def ring(self, words: str) -> None:
        """Write down that this process fails."""
        if self._rung[0] != self._over:
            self._rung = self._over, time.monotonic()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator has gone
            self._client.key_value_set(f"{_FOLDER}/{self._over}/{self._process}", words, allow_overwrite=True)

    def sound(self, words: str) -> None:
        """Write down that this process fails, though its main thread does not know it."""
        self._explained = self._over
        self.ring(words)

    def explained(self) -> bool:
        """Say whether this process is about to be ended with words that are not its main thread's."""
        return self._explained == self._over

    def failed_alike(self, words: str) -> bool:
        """Write down that this process fails, and wait a little for all others to do so."""
        if self._late():  # it is their end that broke something here: this process ends as well
            threading.Event().wait()
        end = time.monotonic() + _SECONDS
        self.ring(words)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while time.monotonic() < end:
                if len(self._failed()) == self._processes:
                    self._over += 1
                    return True
                time.sleep(0.05)
        return False

    def _failed(self) -> list[tuple[str, str]]:
        return sorted(self._client.key_value_dir_get(f"{_FOLDER}/{self._over}/"))

    def _late(self) -> bool:
        number, at = self._seen
        return number == self._over and time.monotonic() > at + _SECONDS - 2 * _POLL

    def _leave(self) -> None:
        """Stop looking out: a thread that Python's end meets inside the coordinator's client aborts the process."""
        self._leaving.set()
        self._done_looking.wait(2 * _POLL)

    def _watch(self) -> None:
        self._look_out()
        self._done_looking.set()
        # Where this process has failed it is this thread that ends it, before jax gives up waiting for the others; where the
        # coordinator is, when they have ended.
        patience = _SECONDS + (6 if self._process == 0 else 3) * _POLL
        while self._rung[0] == self._over:
            if time.monotonic() > self._rung[1] + patience:
                os._exit(1)
            time.sleep(_POLL / 10)

    def _look_out(self) -> None:
        while not self._leaving.wait(_POLL):
            number = self._over
            try:
                failed = self._failed()
            except jax.errors.JaxRuntimeError:  # the coordinator has gone
                return
            if not failed:
                continue
            self._seen = number, time.monotonic()
            if any(key.rpartition("/")[2] != str(self._process) for key, _ in failed):
                self._explained = number
            if not self._leaving.wait(_SECONDS + 2 * _POLL) and number == self._over:
                self._end(*failed[0])

    def _end(self, key: str, words: str) -> None:
        """End this process for sure: its main thread may wait for ever."""
        if not self.said:
            print(f"error: process {key.rpartition('/')[2]} failed, so all stop: {words}", file=sys.stderr, flush=True)
        if self._process == 0:  # the coordinator is here, and the others may not have looked yet
            time.sleep(3 * _POLL)
        os._exit(1)


@functools.cache
def _alarm(client: Any, process: int, processes: int) -> Alarm:
    return Alarm(client, process, processes)


def _words(error: BaseException) -> str:
    what = "another process has gone; " if gone(error) else ""
    return f"{what}{type(error).__name__}: {error}"
