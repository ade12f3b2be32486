"""Trackers beside a run's own files: what they are told, and that nothing they do ends a run."""

import json
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from pgjax.core.errors import MissingPackageError
from pgjax.run import checks, logs, trackers
from pgjax.run.session import RunFlags, open_session, session_options

FAKE = '''
"""A tracker with the calls of the real ones, which notes down what it is asked."""
calls = []

def Settings(**options):
    return options

class Run:
    def log(self, metrics, step=None):
        if step == 2:
            raise ConnectionError("no network")
        calls.append((step, metrics))

    def finish(self):
        calls.append("finish")

def init(**options):
    calls.append(options)
    return Run()
'''


@pytest.fixture(params=["wandb", "trackio"])
def fake(request, tmp_path, monkeypatch):
    """The name of a tracker, with a module of that name in front of an installed one; gives the name and its calls."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / f"{request.param}.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    for name in [name for name in sys.modules if name.partition(".")[0] == request.param]:
        monkeypatch.delitem(sys.modules, name)
    yield request.param, __import__(request.param).calls
    sys.modules.pop(request.param, None)


def begin(folder, name, **options):
    config = {"seed": 0, "output": folder}
    return open_session(folder, {"w": jnp.zeros(2)}, config=config, steps=4, track=[name], track_project="p", **options)


def test_a_run_that_goes_on_is_appended_to_under_the_same_names_and_a_network_failure_does_not_end_it(
    tmp_path, fake, capsys
):
    name, calls = fake
    with begin(tmp_path / "run", name) as run:
        for step in (0, 1, 2, 3):
            run.report(step, {"objective/scores": step / 2, "loss": float("nan")})
        run.checkpoints.save(3, {"w": jnp.ones(2)}, {"step": 3})
    said = capsys.readouterr().out
    assert said.count("ConnectionError: no network") == 1 and f"{name} failed 1 times" in said
    with begin(tmp_path / "run", name, resume=True) as run:
        run.writer.write(4, {"eval/scores": 0.5})
    first, again = [call for call in calls if isinstance(call, dict)]
    known = "id" if name == "wandb" else "name"
    assert first[known] == again[known] and first[known].startswith("run-") and first["project"] == "p"
    assert first["resume"] == again["resume"] == "allow"
    assert first["config"] == {"seed": 0, "output": str(tmp_path / "run")}
    logged = [call for call in calls if isinstance(call, tuple)]
    assert logged == [(step, {"objective/scores": step / 2}) for step in (0, 1, 3)] + [(4, {"eval/scores": 0.5})]
    assert calls.count("finish") == 2
    assert [row["step"] for row in logs.read_metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]  # the run's own have all


def test_a_tracker_that_cannot_be_opened_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise RuntimeError("no key")

    monkeypatch.setitem(trackers.OPEN, "wandb", refuse)
    with begin(tmp_path / "run", "wandb") as run:
        run.report(1, {"loss": 1.0})
    assert "wandb failed, the run goes on without it: RuntimeError: no key" in capsys.readouterr().out
    assert len(logs.read_metrics(tmp_path / "run")) == 1


def test_other_processes_track_nothing(tmp_path, fake, monkeypatch):
    name, calls = fake
    monkeypatch.setattr("pgjax.parallel.processes.is_process_0", lambda: False)
    with begin(tmp_path / "run", name) as run:
        run.report(1, {"loss": 1.0})
    assert calls == []


def test_a_missing_package_is_refused_by_name_before_anything_else(monkeypatch, tmp_path):
    # A folder `wandb`, as that package leaves in the working directory, can be imported but is not the package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingPackageError, match=r"needs wandb: pip install 'pgjax\[trackers\]'"):
        trackers.check_trackers(["wandb"])


def test_what_a_run_tracks_may_change_when_it_goes_on(tmp_path):
    with open_session(tmp_path / "run", {"w": jnp.zeros(2)}, steps=3, **session_options(RunFlags())) as run:
        run.checkpoints.save(1, {"w": jnp.zeros(2)}, {"step": 1})
    other = session_options(RunFlags(track_project="other", resume=True))
    with open_session(tmp_path / "run", {"w": jnp.zeros(2)}, steps=3, **other) as run:
        assert run.start == 1


def test_two_runs_in_folders_of_one_name_are_two(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place / "run 1").mkdir(parents=True)
    first, second = (trackers.run_id(tmp_path / place / "run 1") for place in ("a", "b"))
    assert first != second and first.startswith("run-1-")
    (tmp_path / "a" / "run 1" / trackers.FILE).write_text("{")
    assert trackers.run_id(tmp_path / "a" / "run 1") != first


def test_wandb_offline_holds_every_step_of_a_run_that_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    offline(tmp_path, "wandb")
    found = {}
    for path in sorted(tmp_path.glob("run/wandb/offline-run-*/*.wandb")):
        raw, at = path.read_bytes(), 7  # after a header of the file: checksum (4), length (2), kind (1), the record
        while at < len(raw):
            length = int.from_bytes(raw[at + 4 : at + 6], "little")
            record = Record.FromString(raw[at + 7 : at + 7 + length])
            at += 7 + length
            if record.history.item:
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                found[items["_step"]] = items["objective/scores"]
    assert found == {1: 0.5, 2: 1.0, 3: 1.5}


def test_trackio_on_this_machine_holds_every_step_of_a_run_that_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    for module in [module for name, module in sys.modules.items() if name.startswith("trackio")]:
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    assert tmp_path / "trackio" == utils.TRACKIO_DIR
    offline(tmp_path, "trackio")
    (run,) = SQLiteStorage.get_runs("p")
    rows = SQLiteStorage.get_logs("p", run)
    assert [(row["step"], row["objective/scores"]) for row in rows] == [(1, 0.5), (2, 1.0), (3, 1.5)]


def offline(tmp_path, name):
    """Track three steps, the last of them after the run has gone on."""
    for start in (0, 2):
        with begin(tmp_path / "run", name, resume=start > 0) as run:
            assert run.start == start
            for step in (1, 2) if start == 0 else (3,):
                run.report(step, {"objective/scores": step / 2})
            if start == 0:
                run.checkpoints.save(2, {"w": jnp.ones(2)}, {"step": 2})
        assert run.writer.also.failures == {}


def test_a_script_refuses_it_before_it_reads_anything(monkeypatch):
    from experiments.sft import Config

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None))
    with pytest.raises(MissingPackageError, match="needs trackio"):
        checks.check_run(Config(model="nowhere", data="nowhere", track=("trackio",)))
