"""What a script opens and closes: a new run, one that goes on, and what is left behind when something fails."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ppo
from pgjax.learning import flags
from pgjax.run import logs, session
from pgjax.run.checkpoint.checkpoints import BadCheckpoint, Checkpoints
from pgjax.run.clock import DeviceClock
from pgjax.run.session import RunFlags, open_session, session_options


@pytest.fixture
def drawn(monkeypatch):
    """The folders whose curves were drawn."""
    folders = []
    monkeypatch.setattr(session, "plot_curves", folders.append)
    return folders


def begin(folder, *, start=0.0, **options):
    return open_session(folder, {"w": jnp.full(2, start)}, **{"config": {"seed": 0}, "steps": 3, **options})


def save(run, step):
    run.checkpoints.save(step, {"w": jnp.full(2, float(step))}, {"step": step})


def test_a_run_goes_on_from_its_snapshot_and_logs_no_step_twice(tmp_path, drawn):
    with begin(tmp_path / "run") as run:
        assert run.start == 0 and float(run.state["w"][0]) == 0
        for step in (1, 2, 3):
            run.report(step, {"loss": float(step)})
        save(run, 2)
    with begin(tmp_path / "run", resume=True) as run:
        assert run.start == 2 and np.asarray(run.state["w"]).tolist() == [2.0, 2.0]
        run.report(3, {"loss": 0.5})
    assert [(row["step"], row["loss"]) for row in logs.read_metrics(tmp_path / "run")] == [(1, 1.0), (2, 2.0), (3, 0.5)]
    assert drawn == [tmp_path / "run"] * 2


def test_a_run_that_fails_is_drawn_and_its_snapshots_are_whole(tmp_path, drawn):
    with pytest.raises(RuntimeError, match="in the middle"), begin(tmp_path / "run") as run:
        run.writer.write(0, {"loss": 1.0})
        save(run, 1)  # in the background
        raise RuntimeError("in the middle")
    assert drawn == [tmp_path / "run"] and logs.read_metrics(tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [1]


def test_what_does_not_fit_the_run_is_refused_and_its_config_stays(tmp_path, drawn):
    with begin(tmp_path / "run", data="rows 1") as run:
        save(run, 2)
    before = (tmp_path / "run" / "config.json").read_text()
    refused = {
        "is not empty": {},
        "seed: 0 in the run, 1 now": {"config": {"seed": 1}, "resume": True},
        "steps=1 lies below the 2 steps": {"steps": 1, "resume": True},
    }
    for words, options in refused.items():
        with pytest.raises(ValueError, match=words), begin(tmp_path / "run", data="rows 1", **options):
            pytest.fail("it was opened")
    with pytest.raises(BadCheckpoint, match="data: 'rows 1' there, 'rows 2' here"):  # noqa: SIM117
        with begin(tmp_path / "run", data="rows 2", resume=True):
            pytest.fail("it was opened")
    assert (tmp_path / "run" / "config.json").read_text() == before and len(drawn) == 1


def test_last_good_resumes_by_itself(tmp_path, drawn):
    with begin(tmp_path / "run") as run:
        save(run, 1)
    with begin(tmp_path / "run", resume_from="last-good") as run:
        assert run.start == 1


def test_fields_on_which_nothing_depends_may_change(tmp_path, drawn):
    with begin(tmp_path / "run", **session_options(RunFlags(keep=2))) as run:
        save(run, 1)
    other = RunFlags(keep=3, keep_best=True, resume=True, mesh="data=1", output=tmp_path)
    with begin(tmp_path / "run", **session_options(other)) as run:
        assert run.start == 1 and json.loads((tmp_path / "run" / "config.json").read_text())["keep"] == 3
    with pytest.raises(ValueError, match="dtype: None in the run, 'bfloat16' now"):  # noqa: SIM117
        with begin(tmp_path / "run", **session_options(RunFlags(dtype="bfloat16", resume=True))):
            pytest.fail("it was opened")


def test_work_is_timed_from_when_the_device_was_free(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("pgjax.run.clock.time.perf_counter", lambda: now[0])
    clock = DeviceClock()
    first, second = clock.queued(), clock.queued()  # both at 0
    now[0] = 3.0
    assert first() == 3.0
    now[0] = 5.0
    assert second() == 2.0  # it began when the first one ended
    now[0] = 9.0
    clock.free()
    third = clock.queued()
    now[0] = 10.0
    assert third() == 1.0  # the pause is not its own
    jax.block_until_ready(jnp.zeros(()))


def test_another_number_of_steps_says_where_the_learning_rate_leaves_its_course(tmp_path, drawn, capsys):
    def started(**fields):
        config = ppo.Config(output=tmp_path / "run", decay=True, learning_rate=1.0, warmup_updates=0, **fields)
        flags.tell_schedule(config, 1)
        return config

    with begin(tmp_path / "run", **session_options(started(steps=4))):
        pass
    assert capsys.readouterr().out == ""
    started(steps=4, resume=True)
    started(steps=8)
    assert capsys.readouterr().out == ""
    started(steps=8, resume=True)
    told = capsys.readouterr().out
    assert "steps=8 in place of 4" in told and "of step 4 is 0.625, and was 0.25; --steps 4 keeps its course" in told
