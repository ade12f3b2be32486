"""How rewards are called: in turn on the main thread, in threads, in processes of their own, or awaited together; in time.

A call that takes longer than it may, and one that runs when the run is to stop, is waited for no longer: a thread cannot be
ended, so it is left behind, and a process is ended.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

from pgjax.run import stop

_POLL = 0.1  # seconds between looks at a signal
Future = concurrent.futures.Future


class TooSlow(Exception):
    """A reward did not answer in time."""


def is_async(function: Any) -> bool:
    """Say whether a call gives a coroutine: an ``async def``, or an object whose ``__call__`` is one.

    Example:
      >>> is_async(asyncio.sleep), is_async(print)
      (True, False)
    """
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class Outcome(NamedTuple):
    """What became of a call."""

    value: Any
    error: BaseException | None = None


class Caller:
    """Call rewards, each with its own arguments, and give what each returned or raised.

    Args:
      timeout: seconds that a call may take; None: as long as it likes.
      workers: how many calls run at a time; 0: one after the other, on the main thread where there is no timeout.
      processes: the workers are processes in place of threads, for rewards that compute in Python.

    Example:
      >>> def double(x):
      ...     return 2 * x
      >>> [outcome.value for outcome in Caller(workers=2)([(double, {"x": 1}), (double, {"x": 2})])]
      [2, 4]
    """

    def __init__(self, timeout: float | None = None, workers: int = 0, processes: bool = False) -> None:
        self.timeout, self.workers, self.processes = timeout, workers, processes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pool: tuple[concurrent.futures.ProcessPoolExecutor, list[Any]] | None = None

    def __call__(self, jobs: Sequence[tuple[Callable[..., Any], dict[str, Any]]]) -> list[Outcome]:
        """Call all jobs.

        Args:
          jobs: functions, each with its arguments.

        Returns:
          What each returned, or the exception that it raised: `TooSlow` where it took too long.

        Raises:
          GivenUp: the run is to stop, and something did not answer in the seconds that are left.
        """
        # coroutines first: they go on while the others compute
        awaited = {i: self._await(*job) for i, job in enumerate(jobs) if is_async(job[0])}
        inline = self.workers == 0 and self.timeout is None
        queue = [i for i in range(len(jobs)) if i not in awaited]
        results: dict[int, Outcome] = {}
        running: dict[int, tuple[Future[Any], float]] = {i: (future, time.monotonic()) for i, future in awaited.items()}
        try:
            if inline:
                for i in queue:
                    results[i] = _here(*jobs[i])
                queue = []
            while queue or running:
                while queue and sum(i not in awaited for i in running) < max(self.workers, 1):
                    i = queue.pop(0)
                    running[i] = self._submit(*jobs[i]), time.monotonic()
                concurrent.futures.wait(
                    [future for future, _ in running.values()], _POLL, concurrent.futures.FIRST_COMPLETED
                )
                for i, (future, begun) in list(running.items()):
                    if future.done():
                        results[i] = _outcome(future)
                    elif self.timeout is not None and time.monotonic() - begun > self.timeout:
                        results[i] = Outcome(None, TooSlow())
                        self._abandon(future)
                    else:
                        continue
                    del running[i]
                if running and stop.overdue():
                    raise stop.GivenUp()
        except BaseException:
            for future, _ in running.values():
                self._abandon(future)
            raise
        return [results[i] for i in range(len(jobs))]

    def _submit(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Future[Any]:
        if self.processes:
            return self._workers().submit(_call, function, arguments)
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # nobody can cancel what a thread does

        def run() -> None:
            try:
                future.set_result(function(**arguments))
            except BaseException as error:
                future.set_exception(error)

        # a daemon: an answer that never comes does not keep the run from ending
        threading.Thread(target=run, daemon=True, name="reward").start()
        return future

    def _await(self, function: Callable[..., Coroutine[Any, Any, Any]], arguments: dict[str, Any]) -> Future[Any]:
        """Begin a coroutine on the loop of a thread that stays: clients of services keep connections that belong to a loop."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True, name="async rewards").start()

        async def run() -> Any:
            return await function(**arguments)

        return asyncio.run_coroutine_threadsafe(run(), self._loop)

    def _workers(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._pool is None:
            before = {child.pid for child in multiprocessing.active_children()}
            # spawned: a copy of a process that runs JAX may hang
            pool = concurrent.futures.ProcessPoolExecutor(
                max(self.workers, 1), multiprocessing.get_context("spawn"), _ignore_signals
            )
            pool.submit(int).result()  # starts them
            self._pool = pool, [child for child in multiprocessing.active_children() if child.pid not in before]
        return self._pool[0]

    def _abandon(self, future: Future[Any]) -> None:
        """Wait no longer; processes are ended, and other ones are started for the next call."""
        future.cancel()
        if self.processes and self._pool is not None:
            pool, children = self._pool
            self._pool = None
            for child in children:
                child.kill()
            pool.shutdown(wait=False, cancel_futures=True)


def _outcome(future: Future[Any]) -> Outcome:
    if future.cancelled():
        return Outcome(None, asyncio.CancelledError())
    error = future.exception()
    return Outcome(future.result()) if error is None else Outcome(None, error)


def _here(function: Callable[..., Any], arguments: dict[str, Any]) -> Outcome:
    """Call on this thread, which a signal breaks off in time."""
    try:
        with stop.breakable():
            return Outcome(function(**arguments))
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        if isinstance(error, stop.GivenUp):
            raise
        return Outcome(None, error)


def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    return function(**arguments)


def _ignore_signals() -> None:
    for number in stop.SIGNALS:  # they reach the whole group, and the run ends its workers itself
        signal.signal(number, signal.SIG_IGN)
