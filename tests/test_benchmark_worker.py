"""Peers in processes of their own: what a run says, and how one ends that cannot go on."""

import contextlib
import functools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import timing, worker
from benchmarks.interpreters import Peer
from benchmarks.worker import Worker
from pgjax.run.peaks import Peaks

SERVES = """
import time
from benchmarks.peers.protocol import Parent
parent = Parent()
print("a library's banner")  # must not be taken for an answer
parent.ready("numpy")
def run(times):
    print("a library's progress")
    time.sleep(0.2)
    return {"product": parent.setup["factor"] * times}
parent.serve(run)
"""


@pytest.fixture
def program(tmp_path):
    def write(text):
        path = tmp_path / f"peer{len(list(tmp_path.iterdir()))}.py"
        path.write_text(f"import sys\nsys.path.insert(0, {str(worker.ROOT)!r})\n{text}")
        return [sys.executable, str(path)]

    return write


def test_a_peer_answers_with_its_own_clocks_and_results(program):
    serving = Worker("a peer", program(SERVES), {"factor": 3})
    samples = [serving.run(times=times) for times in (2, 5)]
    assert [sample.result for sample in samples] == [{"product": 6}, {"product": 15}]
    assert all(sample.wall >= 0.2 > sample.cpu >= 0 for sample in samples)  # it slept: no CPU time
    assert set(serving.versions) == {"python", "numpy"}
    serving.close()
    assert serving._process.returncode == 0


@pytest.mark.parametrize("text", ["raise SystemExit('no such weights')", "print('half a line'); 1 / 0"])
def test_a_peer_that_dies_while_it_sets_up_is_an_error_with_what_it_printed(program, text):
    with pytest.raises(RuntimeError, match=r"(?s)a peer ended with status 1; .*(no such weights|ZeroDivisionError)"):
        Worker("a peer", program(f"from benchmarks.peers.protocol import Parent\nParent()\n{text}"), {})


def test_a_peer_that_dies_in_a_run_is_an_error_with_what_it_printed(program):
    text = SERVES.replace("time.sleep(0.2)", "raise MemoryError('out of memory')")
    serving = Worker("a peer", program(text), {"factor": 3})
    with pytest.raises(RuntimeError, match=r"(?s)a peer ended with status 1; it printed:.*out of memory"):
        serving.run(times=1)
    serving.close()


def test_a_peer_that_was_killed_is_an_error_at_the_next_run(program):
    serving = Worker("a peer", program(SERVES), {"factor": 3})
    serving._process.kill()
    serving._process.wait()
    with pytest.raises(RuntimeError, match="a peer ended with status -9"):
        serving.run(times=1)
    serving.close()


@pytest.mark.parametrize("answer", ["Segmentation fault", "[1, 2]", '{"version": "1"}'])
def test_a_peer_that_answers_something_else_is_an_error_with_its_answer_and_ends(program, answer):
    text = f"import sys\nsys.stdin.readline()\nprint({answer!r}, 'x' * 0, flush=True)\nsys.stdin.readline()"
    with pytest.raises(timing.PeerError, match=r"a peer answered .*; it printed nothing") as refused:
        Worker("a peer", program(text), {})
    assert answer in str(refused.value)


def test_a_peer_that_failed_once_is_not_asked_again(program):
    text = SERVES.replace("parent.serve(run)", "parent.next(), parent._tell({'cpu': 1}), parent.serve(run)")
    serving = Worker("a peer", program(text), {"factor": 3})
    for _ in range(2):
        with pytest.raises(timing.PeerError, match=r"a peer answered '\{\"cpu\": 1\}'"):
            serving.run(times=1)
    serving.close()


CRASHES = """#!/bin/sh
[ "$1" = -c ] && echo '{"python": "3.11.0", "trl": "1.12.0"}' && exit
read setup; echo '{"versions": {"python": "3.11.0"}}'
case "$setup" in *float32*)
    read ask; echo '{"wall": 1.0, "cpu": 1.0}'; read ask; echo Traceback >&2; echo "MemoryError: [gpu]" >&2; exit 1;;
esac
while read ask; do echo '{"wall": 1.0, "cpu": 1.0}'; done
"""


def test_a_peer_that_crashes_costs_its_own_rows_of_that_dtype_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "python").write_text(CRASHES)
    (tmp_path / "python").chmod(0o755)
    peaks = Peaks(1.0, 1.0, 1.0)
    monkeypatch.setattr(timing, "measured_peaks", lambda dtype: peaks)
    monkeypatch.setattr(worker, "model_folder", lambda *_: contextlib.nullcontext("folder"))
    config = worker.Beside(repeats=2, peer_pythons=(str(tmp_path / "python"),), json=tmp_path / "report.json")

    def runs(dtype, peers):
        one = {"pgjax first": timing.timed(dict), "pgjax all": timing.timed(dict)}
        return one | {
            f"{who} {part}": functools.partial(peers[who].run, n=1) for who in peers for part in ("first", "all")
        }

    report = worker.compare(
        config, ("float32", "bfloat16"), [Peer("a", "a", ()), Peer("b", "b", ())], SimpleNamespace(arch=None), {},
        setups=lambda folder, dtype: {"a": {"dtype": dtype}, "b": {}}, runs=runs,
        measure=lambda dtype, who, peaks, times: {
            name: x for part in ("first", "all") for name, x in timing.figures(times[f"{who} {part}"], 1).items()
        },
    )  # fmt: skip
    assert [(row["who"], row["dtype"]) for row in report["rows"]] == [
        ("pgjax", "float32"), ("b", "float32"), ("pgjax", "bfloat16"), ("a", "bfloat16"), ("b", "bfloat16")
    ]  # fmt: skip
    assert report["peer"] == "left out in float32: a ended with status 1; it printed: MemoryError: [gpu]"
    assert set(report["rows"][0]["times_as_fast_as"]) == {"b"} and set(report["peers"]) == {"a", "b"}
    assert "Traceback\nMemoryError" in capsys.readouterr().err
    timing.show("comparison", report, timing.SPEED)
    assert report["peer"] in " ".join(capsys.readouterr().out.split())
    json.dumps(report)


def test_a_peer_ends_when_its_parent_is_gone(program):
    child = subprocess.Popen(
        program(SERVES),
        stderr=subprocess.DEVNULL,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=worker.ROOT,
    )
    child.stdin.write('{"factor": 1}\n')
    child.stdin.flush()
    assert '"ready": true' in child.stdout.readline()
    child.stdin.close()
    assert child.wait(timeout=20) == 0
    child.stdout.close()


def test_workers_start_where_there_is_an_interpreter_and_a_set_up_and_all_end(monkeypatch):
    ended = []

    class Fake:
        def __init__(self, who, command, setup):
            if who == "d":
                raise timing.PeerError("d ended with status 1; it printed nothing")
            self.who, self.command, self.setup, self.failure = who, command, setup, None

        def close(self):
            ended.append(self.who)

    monkeypatch.setattr(worker, "Worker", Fake)
    peers = [
        Peer("a", "benchmarks.peers.a", ()),
        Peer("b", "benchmarks.peers.b", ()),
        Peer("c", "", ()),
        Peer("d", "", ()),
    ]
    pythons, failures = {"a": "python-a", "b": "python-b", "d": "python-d"}, {}
    with worker.workers(peers, pythons, {"a": {"x": 1}, "c": {}, "d": {}}, failures) as running:
        assert list(running) == ["a"] and running["a"].setup == {"x": 1} and not ended
        assert running["a"].command == ["python-a", "-m", "benchmarks.peers.a"]
        running["a"].failure = "answered 'x'; it printed nothing"
    assert ended == ["a"] and failures == {
        "a": "a answered 'x'; it printed nothing",
        "d": "d ended with status 1; it printed nothing",
    }
