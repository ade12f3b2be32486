"""The host loop: late metrics, checkpoints, and ways out that lose nothing."""

import concurrent.futures
import os
import signal

import jax
import jax.numpy as jnp
import pytest

from pgjax.run import loop, stop
from pgjax.run.checkpoint.checkpoints import Checkpoints


def run(
    folder,
    *,
    steps=5,
    start=0,
    save_every=2,
    on_prepare=lambda i: None,
    on_step=lambda i: None,
    on_report=lambda done: None,
    on_check=lambda done: None,
    log=None,
):
    log = [] if log is None else log

    def prepare(state, i):
        on_prepare(i)
        log.append(f"prepare {i}")

    def step(state, i, work):
        on_step(i)
        log.append(f"step {i}")
        x = state["x"]
        return {"x": x + 1}, {"x": x, "many": [x, x + 2]}, [i]

    def check(done, metrics):
        on_check(done)

    def report(done, metrics, samples):
        log.append(f"report {done}")
        assert 0 < metrics.pop("timing/iteration") < 60
        assert metrics == {"x": done - 1.0, "many": float(done)} and samples == [done - 1]
        on_report(done)

    with Checkpoints(folder) as checkpoints:
        state = {"x": jnp.float32(start)}
        state = loop.run(
            state,
            steps=steps,
            start=start,
            prepare=prepare,
            step=step,
            check=check,
            report=report,
            checkpoints=checkpoints,
            save_every=save_every,
        )
        return float(state["x"])


def saved(folder):
    with Checkpoints(folder) as checkpoints:
        state, extra = checkpoints.restore({"x": jnp.float32(0)})
        return float(state["x"]), extra["step"]


def test_metrics_come_one_step_late_and_before_the_next_update(tmp_path):
    log: list[str] = []
    run(tmp_path, steps=3, save_every=100, log=log)
    assert log == [
        "prepare 0",
        "step 0",
        "prepare 1",
        "report 1",
        "step 1",
        "prepare 2",
        "report 2",
        "step 2",
        "report 3",
    ]
    assert saved(tmp_path) == (3.0, 3)


def test_a_step_that_fails_saves_the_state_before_it(tmp_path):
    def fail(i):
        if i == 3:
            raise RuntimeError("the reward is down")

    with pytest.raises(RuntimeError, match="the reward is down"):
        run(tmp_path, save_every=100, on_step=fail)
    assert saved(tmp_path) == (3.0, 3)


def test_work_that_fails_before_a_step_saves_all_steps_before_it(tmp_path):
    # The bug: the state holds step 3 already, and was saved as that after step 2, so that a run that went on did it twice.
    def fail(i):
        if i == 3:
            raise KeyError("no such prompt")

    with pytest.raises(KeyError, match="no such prompt"):
        run(tmp_path, save_every=100, on_prepare=fail)
    assert saved(tmp_path) == (3.0, 3)


def test_a_step_that_fails_its_check_does_not_count_and_nothing_follows_it(tmp_path):
    log: list[str] = []

    def fail(done):
        if done == 2:
            raise FloatingPointError("not finite")

    with pytest.raises(FloatingPointError):
        run(tmp_path, save_every=100, on_check=fail, log=log)
    assert log[-2:] == ["step 1", "prepare 2"]
    assert saved(tmp_path)[1] == 1


def test_a_report_that_fails_leaves_a_state_under_its_own_number(tmp_path):
    def fail(done):
        if done == 2:
            raise OSError("no space left")

    with pytest.raises(OSError):
        run(tmp_path, save_every=100, on_report=fail)
    assert saved(tmp_path) == (2.0, 2)


def test_an_update_that_gave_its_buffers_away_does_not_hide_its_error(tmp_path):
    taken = jax.jit(lambda tree: tree["x"] + 1, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        state = {"x": jnp.zeros(4)}

        def step(state, i, work):
            taken(state)
            raise MemoryError("out of memory in the update")

        with pytest.raises(MemoryError):
            loop.run(
                state,
                steps=2,
                prepare=lambda s, i: None,
                step=step,
                check=print,
                report=print,
                checkpoints=checkpoints,
                save_every=1,
            )
        assert checkpoints.latest() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_says_so(tmp_path, number, capsys):
    def interrupt(i):
        if i == 1:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(loop.Interrupted, match="stopped after step 2") as stopped:
        run(tmp_path, save_every=100, on_step=interrupt)
    assert stopped.value.step == 2 and saved(tmp_path) == (2.0, 2)
    assert "saved first" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    assert run(tmp_path, start=2) == 5.0


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), stop.stop_signals() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_in_the_last_step_stops_before_what_follows(tmp_path):
    def interrupt(i):
        if i == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(loop.Interrupted):
        run(tmp_path, on_step=interrupt)
    assert saved(tmp_path) == (5.0, 5)


def test_it_runs_outside_the_main_thread(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, tmp_path).result() == 5.0


def test_a_handler_that_python_did_not_set_is_no_obstacle(monkeypatch):
    # jax.distributed sets one of its own for SIGTERM; Python then gives None for it, and does not take None back.
    handlers = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.append(handler))
    with stop.stop_signals():
        pass
    assert handlers[3:] == [signal.SIG_DFL] * 3


def test_what_is_saved_holds_the_step(tmp_path):
    run(tmp_path, steps=3)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore({"x": jnp.float32(0)})[1] == {"step": 3}
