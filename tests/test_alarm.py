"""The thread that looks out for failures elsewhere ends before Python does."""

import atexit
import os

from pgjax.parallel.failures import Alarm


class Coordinator:
    """One at which nobody has failed yet."""

    def key_value_set(self, key, value, allow_overwrite):
        """Take it, and forget it."""

    def key_value_dir_get(self, folder):
        """Answer what jax's client answers."""
        return []


def test_the_thread_has_left_the_client_before_python_ends(monkeypatch):
    # The bugs: Python's end meets it inside the client, whose C++ cannot be unwound, and the process aborts, after all went
    # well or after an error in plain words; a process that failed is left to jax, which waits for the others and aborts too.
    at_the_end = []
    monkeypatch.setattr(atexit, "register", at_the_end.append)
    alarm = Alarm(Coordinator(), 0, 2)
    (leave,) = at_the_end
    alarm.ring("ValueError: no step 2")
    leave()
    assert alarm._done_looking.is_set() and alarm._thread.is_alive()  # to end this process, if that takes too long
    alarm._over += 1  # all of them failed, and went on
    alarm._thread.join(5)
    assert not alarm._thread.is_alive()


def test_a_process_that_failed_ends_for_sure(monkeypatch):
    ended = []
    monkeypatch.setattr(atexit, "register", lambda work: None)
    monkeypatch.setattr("pgjax.parallel.failures._SECONDS", 0.0)
    monkeypatch.setattr("pgjax.parallel.failures._POLL", 0.1)
    alarm = Alarm(Coordinator(), 1, 2)

    def end(code):
        ended.append(code)
        alarm._over += 1  # here the thread ends by itself

    monkeypatch.setattr(os, "_exit", end)
    alarm.ring("ValueError: no step 2")
    alarm._leave()
    alarm._thread.join(10)
    assert ended == [1]
