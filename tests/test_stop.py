"""A run that is to stop hears it in time: between batches, in a reward that takes long, and its state is saved."""

import contextlib
import os
import signal
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.parallel import processes
from pgjax.rollout.calling import Caller
from pgjax.rollout.scoring import score
from pgjax.rollout.task import Task
from pgjax.run import exits, loop, stop
from pgjax.run.checkpoint.checkpoints import Checkpoints


@pytest.fixture
def soon(monkeypatch):
    """Send this process a signal in a moment, with a short grace."""
    monkeypatch.setattr(stop, "GRACE", 0.2)
    timers = []

    def send(number=signal.SIGTERM, after=0.1):
        timers.append(threading.Timer(after, os.kill, (os.getpid(), number)))
        timers[-1].start()

    yield send
    for timer in timers:
        timer.cancel()


def slow(prompts, completions):
    """It looks at nothing, and catches all that it can."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            time.sleep(20)
    return [0.0] * len(prompts)


async def never(prompts, completions):
    import asyncio

    await asyncio.sleep(20)


CALLERS = {
    "inline": (slow, {}),
    "threads": (slow, {"workers": 2}),
    "timed": (slow, {"timeout": 60}),
    "async": (never, {}),
}


@pytest.mark.parametrize("name", CALLERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_slow_reward_is_given_up_soon_after_a_signal(soon, name, number):
    reward, options = CALLERS[name]
    begun = time.monotonic()
    with stop.stop_signals(), pytest.raises(stop.GivenUp):
        soon(number)
        score([reward], None, ["p"], ["c"], caller=Caller(**options))
    assert time.monotonic() - begun < 5


def test_a_reward_that_answers_in_the_grace_is_taken(soon):
    def short(prompts, completions):
        time.sleep(0.3)
        return [1.0]

    with stop.stop_signals() as asked:
        soon(after=0.15)
        assert score([short], None, ["p"], ["c"])[0].tolist() == [1.0]
        assert asked()
        time.sleep(0.2)  # the alarm of the grace comes to nothing
        with pytest.raises(stop.GivenUp):
            stop.check()


def test_a_second_ctrl_c_ends_a_reward_at_once(soon):
    with pytest.raises(KeyboardInterrupt), stop.stop_signals():
        soon(signal.SIGINT)
        soon(signal.SIGINT, after=0.2)
        stop.GRACE = 60.0
        score([slow], None, ["p"], ["c"])


def test_an_evaluation_stops_between_its_batches(monkeypatch):
    judged = []

    class Slow(Task):
        def rollouts(self, *args):
            for number in range(40):
                yield [], 1, number

        def judge(self, prompts, rollout, *, vote):
            judged.append(rollout)
            if rollout == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            return type("Judged", (), {"scores": np.zeros(1), "ended": np.ones(1), "parts": {}, "votes": None})

    task = Slow(*[None] * (len(Task._fields) - len(Task._field_defaults)))
    with stop.stop_signals():
        assert stop.unless_stopped(lambda: task.evaluate(None, [], 1, 1, None)) == {}
    assert judged == [0, 1, 2]


def test_a_step_that_gives_up_does_not_count_and_the_one_before_it_is_saved(tmp_path):
    def step(state, i, work):
        if i == 3:
            raise stop.GivenUp
        return {"x": state["x"] + 1}, {}, None

    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(loop.Interrupted, match="stopped after step 3; its state is saved"):
            loop.run(
                {"x": jnp.float32(0)}, steps=5, prepare=lambda state, i: None, step=step, check=lambda *_: None,
                report=lambda *_: None, checkpoints=checkpoints, save_every=100,
            )  # fmt: skip
        assert float(checkpoints.restore({"x": jnp.float32(0)})[0]["x"]) == 3


def test_what_another_process_gave_up_is_given_up_here_too():
    def elsewhere():
        raise processes.FailedElsewhere(f"process 1 failed, so all stop: GivenUp: {stop.GivenUp()}")

    def broken():
        raise processes.FailedElsewhere("process 1 failed, so all stop: RewardError: ...")

    assert stop.unless_stopped(elsewhere) == {}
    with pytest.raises(processes.FailedElsewhere):
        stop.unless_stopped(broken)


def test_before_the_first_step_a_stop_is_one_line_too():
    with pytest.raises(SystemExit, match="stopped in the middle of a reward or an evaluation: the same command"):  # noqa: SIM117
        with exits.plain_errors():
            raise stop.GivenUp


def test_signals_are_heard_once_and_given_back():
    before = [signal.getsignal(number) for number in stop.SIGNALS]
    with stop.stop_signals() as outer:
        with stop.stop_signals() as inner:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert inner()
        assert outer() and stop.asked(), "the inner one does not forget for the outer one"
    assert not stop.asked() and [signal.getsignal(number) for number in stop.SIGNALS] == before
