"""The thread that looks out for failures elsewhere ends before Python does."""

import atexit

from pgjax.alarm import Alarm


class Coordinator:
    """One at which nobody has failed yet."""

    def key_value_set(self, key, value, allow_overwrite):
        """Take it, and forget it."""

    def key_value_dir_get(self, folder):
        """Answer what jax's client answers."""
        return []


def test_the_thread_is_gone_before_python_ends_unless_it_is_to_end_it(monkeypatch):
    # The bugs: Python's end meets it inside the client, whose C++ cannot be unwound, and the process aborts after all went
    # well; a process that failed is left to jax, which waits for the others and aborts too.
    at_the_end = []
    monkeypatch.setattr(atexit, "register", at_the_end.append)
    alarm = Alarm(Coordinator(), 0, 2)
    (leave,) = at_the_end
    alarm.ring("ValueError: no step 2")
    leave()
    assert alarm._thread.is_alive()
    alarm._over += 1  # all of them failed, and went on
    leave()
    assert not alarm._thread.is_alive()
