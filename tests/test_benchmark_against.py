"""Two builds side by side: each from its own checkout, in turn, with the seconds and the memory that it really took."""

import json
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest

from benchmarks import against, iteration, learner, rollout, side
from benchmarks.worker import ROOT

# Stand in for a checkout: its work takes so many seconds and holds so many bytes, and it says so in a file when it works.
PACKAGE = """
from types import SimpleNamespace
def load(model):
    return SimpleNamespace(arch=SimpleNamespace(vocab_size=9)), None, None
"""
BENCHMARK = """
import time
from pathlib import Path
from types import SimpleNamespace
def Config(peer):
    return SimpleNamespace(batch_size=2, prompt_length=3)
def contenders(*_):
    held = bytearray({size})
    def run():
        with Path({log!r}).open("a") as log:
            log.write({name!r})
        time.sleep({seconds})
    return {{"pgjax all": run}}
"""
SCRIPT = """
import sys
from pathlib import Path
assert sys.argv[1:] == ["--model", "tiny", "--steps", "2", "--eval-samples", "1", "--output", sys.argv[-1]]
held = bytearray({size})
Path({log!r}).open("a").write({name!r})
"""


def checkout(folder, log, *, seconds, size):
    for package in ("pgjax", "benchmarks/peers", "experiments"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()  # else this repository's package, on the path too, would be taken
    words = {"log": str(log), "name": folder.name[0], "seconds": seconds, "size": size}
    (folder / "benchmarks/__init__.py").touch()
    (folder / "pgjax/__init__.py").write_text(PACKAGE)
    for name in ("iteration", "learner", "rollout"):
        (folder / f"benchmarks/{name}.py").write_text(BENCHMARK.format(**words))
    shutil.copy(ROOT / "benchmarks/peers/protocol.py", folder / "benchmarks/peers")
    (folder / "experiments/ppo.py").write_text(SCRIPT.format(**words))
    return folder


@pytest.fixture
def builds(tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setattr(against, "ROOT", checkout(tmp_path / "new", log, seconds=0.05, size=50_000_000))
    return log, checkout(tmp_path / "old", log, seconds=0.2, size=300_000_000)


@pytest.mark.campaign
def test_two_builds_work_in_turn_and_are_set_side_by_side(builds, tmp_path, capsys):
    log, old = builds
    config = against.Config(old, parts=("rollout", "script"), model="tiny", repeats=2, json=tmp_path / "report.json")
    report = against.main(config)
    assert log.read_text() == "no" * 6  # a warm-up and two rounds, of both parts
    work, script = report["rows"]
    assert (work["part"], script["part"]) == ("rollout", "script")
    assert 0.05 <= work["this"]["seconds"] < work["other"]["seconds"] >= 0.2
    assert work["ratio"] == work["this"]["seconds"] / work["other"]["seconds"] < 0.9
    for row in report["rows"]:
        assert 240e6 < row["other"]["peak_bytes"] - row["this"]["peak_bytes"] < 260e6 and row["peak_ratio"] < 1
    assert json.loads(config.json.read_text())["rows"] == report["rows"]
    assert "rollout" in capsys.readouterr().out


def test_a_build_that_fails_is_an_error_with_what_it_printed(builds):
    _, old = builds
    (old / "benchmarks/rollout.py").write_text("raise ImportError('no such name')")
    (old / "experiments/ppo.py").write_text("raise SystemExit('no such flag')")
    for part, words in (("rollout", "no such name"), ("script", "no such flag")):
        with pytest.raises(RuntimeError, match=words):
            against.main(against.Config(old, parts=(part,), model="tiny", repeats=1))


def test_what_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no checkout of pgjax"):
        against.main(against.Config(tmp_path))


@pytest.mark.parametrize("part", ["PPO", "RLOO", "rollout", "learner"])
def test_this_builds_benchmarks_have_what_a_side_asks_of_them(monkeypatch, part):
    lm = SimpleNamespace(arch=SimpleNamespace(vocab_size=9))
    monkeypatch.setattr(side.pg, "load", lambda model: (lm, {}, None))
    run = lambda: None
    for module, name, found in (
        (iteration, "contender", run),
        (learner, "contender", run),
        (learner, "make_batch", {}),
        (rollout, "contenders", {"pgjax all": run}),
    ):
        monkeypatch.setattr(module, name, mock.create_autospec(getattr(module, name), return_value=found))
    assert side.contender(part, "tiny") is run
    if part in ("PPO", "RLOO"):
        assert iteration.contender.call_args.args[-1] in iteration.VERSUS
