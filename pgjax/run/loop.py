"""The one host loop: steps, late metrics, checkpoints, and a way out that loses nothing."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from pgjax.core.errors import NotFiniteError
from pgjax.parallel import processes
from pgjax.run import stop
from pgjax.run.checkpoint.checkpoints import Checkpoints, SaveFailed

Report = Callable[[int, dict[str, float], Any], None]


class Interrupted(Exception):
    """A run was asked to stop (Ctrl-C, SIGTERM, SIGUSR1), and its state is saved.

    >>> Interrupted(7).step
    7
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}; its state is saved")
        self.step = step


def run(
    state: Any,
    *,
    steps: int,
    prepare: Callable[[Any, int], Any],
    step: Callable[[Any, int, Any], tuple[Any, Mapping[str, Any], Any]],
    check: Callable[[int, dict[str, float]], None],
    report: Report,
    checkpoints: Checkpoints,
    save_every: int,
    start: int = 0,
    score: Callable[[Mapping[str, float]], float | None] = lambda metrics: None,
) -> Any:
    """Train from step `start` to `steps`, one step after the other.

    Each round first calls `prepare(state, i)`, which puts work on the device that needs no answer; while the device does
    that, the metrics of the step before are fetched, checked and reported; then `step(state, i, work)` does the rest. So
    the device never waits for a metric, and a metric that stops the run does so before the next update.

    Any exception of `prepare`, `step`, `check` or `report` ends the run after the state is saved, under the number of
    steps that passed `check`. SIGINT, SIGTERM and SIGUSR1 let the step at hand finish, save and raise `Interrupted`; so does
    a step that gives up on them (`stop.GivenUp`), which does not count. A second SIGINT stops at once. A save that failed in
    the background ends the run as well, one step later at most.

    Several processes call this alike. What `check` or `report` raises on one of them, a signal that reaches one, and a
    save that fails on one stop them all after the same step. So does what `prepare` or `step` raise together
    (`processes.is_raised_on_all`); after any other error nothing more is saved, since the others may be at another place.

    Args:
        state: a tree of arrays; `step` may donate the one that it is given, once nothing can fail any more.
        steps: the number of steps of the whole run.
        prepare: (state, i) -> work.
        step: (state, i, work) -> (state, metrics, samples). Metrics are device scalars, lists of them (averaged),
            numbers, or functions without arguments that are called when the step's work has ended (stopwatches). Beside
            them comes "timing/iteration", the seconds since the end of the step before, saving and reporting included.
        check: (steps done, metrics) -> None; raises where the step must not count, as for a loss that is not finite.
        report: (steps done, metrics, samples) -> None; shows and writes what was measured.
        checkpoints: where states are saved, under the number of steps done.
        save_every: steps between checkpoints; the last step is always saved.
        start: steps that are done already.
        score: (metrics of the last step) -> how good the state is that is saved after it; None where they do not say.

    Returns:
        The state after the last step.

    Raises:
        Interrupted: after a signal, with the state saved.
        SaveFailed: where a state could not be saved.

    >>> import tempfile, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
    ...     state = run({"x": jnp.zeros(())}, steps=3, prepare=lambda state, i: None, checkpoints=checkpoints, save_every=2,
    ...                 step=lambda state, i, work: ({"x": state["x"] + 1}, {"x": state["x"]}, None),
    ...                 check=lambda done, metrics: None,
    ...                 report=lambda done, metrics, samples: print(done, metrics["x"]))
    ...     checkpoints.steps()
    1 0.0
    2 1.0
    3 2.0
    [2, 3]
    """
    pending: tuple[int, Mapping[str, Any], Any] | None = None
    done = start
    latest_score: float | None = None

    def settle() -> None:
        if pending is None:
            return
        number, metrics, samples = _fetched(*pending)

        def tell() -> None:
            nonlocal pending, done, latest_score
            check(number, metrics)
            pending, done, latest_score = None, number, score(metrics)
            report(number, metrics, samples)

        processes.all_or_none(tell)

    def prepared(i: int) -> Any:
        try:
            return prepare(state, i)
        except Exception as error:
            if processes.is_raised_on_all(error):
                settle()  # the state holds the step before already, so it counts, if its metrics let it
            raise

    with stop.stop_signals() as stop_requested:
        now = time.perf_counter()
        for i in range(start, steps):
            try:
                work = prepared(i)
                settle()
                checkpoints.poll()  # here, where `done` is the number of steps that the state has made
                state, metrics, samples = step(state, i, work)
                now, began = time.perf_counter(), now
                pending = i + 1, {**metrics, "timing/iteration": now - began}, samples
                stopping = processes.any_process(stop_requested())
                if stopping or (i + 1) % save_every == 0 or i + 1 == steps:
                    settle()
                    checkpoints.save(done, state, {"step": done}, score=latest_score)
                    if jax.default_backend() == "cpu":  # the copy that is written lies in the memory of the next update
                        checkpoints.wait()
                        _give_memory_back()
            except Exception as error:
                if processes.is_raised_on_all(error):
                    _rescue(checkpoints, done, state)
                if stop.is_given_up(error):
                    raise processes.raised_on_all(Interrupted(checkpoints.latest() or 0)) from None
                raise
            if stopping:
                checkpoints.wait()
                raise processes.raised_on_all(Interrupted(i + 1))
    checkpoints.wait()
    return state


def check_finite(done: int, metrics: Mapping[str, float]) -> None:
    """Stop a run whose update was left out because its loss or gradient was not finite; a `check` of `run`.

    Args:
        done: steps done, this one included.
        metrics: with "train/healthy" and "train/grad_norm" of `train.apply_gradient`.

    Raises:
        FloatingPointError: naming the step and the gradient's norm.

    >>> check_finite(3, {"train/healthy": 1.0, "train/grad_norm": 0.5})
    """
    if not metrics["train/healthy"]:
        raise NotFiniteError(
            f"loss or gradient is not finite in step {done} (gradient norm {metrics['train/grad_norm']}): its bad "
            "update was left out and the state before it is saved; start anew with a lower learning rate"
        )


def _fetched(done: int, metrics: Mapping[str, Any], samples: Any) -> tuple[int, dict[str, float], Any]:
    numbers = jax.device_get({name: value for name, value in metrics.items() if not callable(value)})
    watches = {name: value() for name, value in metrics.items() if callable(value)}
    return done, {name: float(np.mean(value)) for name, value in (numbers | watches).items()}, samples


def _give_memory_back() -> None:
    """Let glibc return what it keeps of freed memory: after a snapshot that is most of a copy of the state."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _rescue(checkpoints: Checkpoints, done: int, state: Any) -> None:
    """Save what can be saved; an update that failed halfway has given its buffers away already.

    A save that fails prints one line, so that the error that ended the run stays visible.
    """
    alive = all(not leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array))
    latest = checkpoints.latest()
    try:
        if alive and (latest is None or latest < done):
            checkpoints.save(done, state, {"step": done})
        checkpoints.wait()
    except SaveFailed as failed:
        processes.print_once(failed)
