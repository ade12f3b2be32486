"""How a run hears that it is to stop: SIGINT, SIGTERM and SIGUSR1, which SLURM sends before it kills, noted and acted on in time.

A signal is noted; the loop looks it up after each step. Work that may take long looks it up too, between its batches, and gives
up: `check`. Code of the user's that cannot look is given `GRACE` seconds to return, and is broken off then: `breakable`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from pgjax.parallel import processes

GRACE = (
    5.0  # seconds from a signal until a reward that runs is given up: the state is saved in those that are left of 10
)
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class GivenUp(Exception):
    """Work was given up in the middle because the run is to stop.

    >>> GivenUp()
    GivenUp('stopped in the middle of a reward or an evaluation')
    """

    def __init__(self) -> None:
        super().__init__("stopped in the middle of a reward or an evaluation")


class _Break(BaseException):
    """Raised by the handler in the user's code, which may catch every Exception."""


class _Heard:
    """What the handlers know; there is one set of handlers a process."""

    listening = False
    asked_at: float | None = None  # when the first signal came, by the monotonic clock
    breakable = False  # the main thread runs code that may be broken off


_HEARD = _Heard()


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Note the first SIGINT, SIGTERM or SIGUSR1 for the caller to look up; a second SIGINT raises KeyboardInterrupt.

    Inside another one it listens with that one. Outside the main thread, where Python takes no handlers, it hears nothing.

    >>> with stop_signals() as stop_requested:
    ...     stop_requested()
    False
    """
    if _HEARD.listening or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    old = {number: signal.signal(number, _handle) for number in SIGNALS}
    _HEARD.listening, _HEARD.asked_at, _HEARD.breakable = True, None, False
    try:
        yield asked
    finally:
        _HEARD.listening, _HEARD.asked_at = False, None
        for number, handler in old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that Python did not set


def asked() -> bool:
    """Say whether this process was told to stop.

    >>> asked()
    False
    """
    return _HEARD.asked_at is not None


def overdue() -> bool:
    """Say whether it was told so more than `GRACE` seconds ago.

    >>> overdue()
    False
    """
    return _HEARD.asked_at is not None and time.monotonic() - _HEARD.asked_at >= GRACE


def check() -> None:
    """Give up where any process was told to stop; all processes call this alike, between batches of work that takes long.

    Raises:
        GivenUp: on all processes.

    >>> check()
    """
    if processes.any_process(asked()):
        raise processes.raised_on_all(GivenUp())


def unless_stopped(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do work whose result can wait for the run to go on, such as an evaluation after an update.

    Args:
        work: may give up.

    Returns:
        Its result; nothing where it gave up.

    >>> unless_stopped(lambda: {"eval/scores": 0.5})
    {'eval/scores': 0.5}
    """
    try:
        return work()
    except (GivenUp, processes.FailedElsewhere) as error:
        if not is_given_up(error):
            raise
        return {}


def is_given_up(error: BaseException) -> bool:
    """Say whether work was given up, here or on another of several processes.

    >>> is_given_up(GivenUp()), is_given_up(ValueError("GivenUp"))
    (True, False)
    """
    elsewhere = isinstance(error, processes.FailedElsewhere) and GivenUp.__name__ in str(error)
    return elsewhere or isinstance(error, GivenUp)


@contextlib.contextmanager
def breakable() -> Iterator[None]:
    """Break off what runs inside, on the main thread, `GRACE` seconds after a signal.

    Raises:
        GivenUp: it was broken off.

    >>> with breakable():
    ...     pass
    """
    if not _HEARD.listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    if asked():
        _alarm()
    _HEARD.breakable = True
    try:
        yield
    except _Break:
        raise GivenUp() from None
    finally:
        _HEARD.breakable = False


def _handle(number: int, frame: FrameType | None) -> None:
    if _HEARD.asked_at is None:
        _HEARD.asked_at = time.monotonic()
        print(
            "stopping: this step is finished, or given up where a reward takes long, and the state is saved first "
            "(Ctrl-C again stops at once, without saving)",
            flush=True,
        )
        if _HEARD.breakable:
            _alarm()
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    if _HEARD.breakable and overdue():
        raise _Break


def _alarm() -> None:
    """Send the main thread another signal when the grace is over, for its handler to break off what runs then."""
    assert _HEARD.asked_at is not None
    main, at = threading.main_thread().ident, _HEARD.asked_at

    def send() -> None:
        if _HEARD.breakable and _HEARD.asked_at == at and main is not None:
            signal.pthread_kill(main, signal.SIGTERM)

    timer = threading.Timer(max(0.0, at + GRACE - time.monotonic()) + 0.01, send)
    timer.daemon = True
    timer.start()
