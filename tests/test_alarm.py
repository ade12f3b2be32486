"""The thread that looks out for failures elsewhere ends before Python does."""

import atexit

from pgjax.alarm import Alarm


class Coordinator:
    """One at which nobody has failed."""

    def key_value_dir_get(self, folder):
        """Answer what jax's client answers."""
        return []


def test_the_thread_is_gone_before_python_ends(monkeypatch):
    # The bug: Python's end meets it inside the client, whose C++ cannot be unwound: the process aborts after all went well.
    at_the_end = []
    monkeypatch.setattr(atexit, "register", at_the_end.append)
    alarm = Alarm(Coordinator(), 0, 2)
    assert alarm._thread.is_alive()
    for call in at_the_end:
        call()
    assert not alarm._thread.is_alive()
