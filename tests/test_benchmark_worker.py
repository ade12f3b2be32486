"""Peers in processes of their own: who serves, what a run says, and how one ends that cannot go on."""

import dataclasses
import subprocess
import sys

import pytest

import pgjax as pg
from benchmarks import worker
from benchmarks.worker import Need, Peer, Worker

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
ARCH = pg.Architecture(
    family="llama", vocab_size=64, width=16, depth=2, heads=2, kv_heads=1, head_dim=8, mlp_width=32, max_positions=64,
    activation="silu", norm="rms", norm_eps=1e-5, rope=pg.Rope(theta=1e6), gated_mlp=True, qkv_bias=False,
    out_bias=False, mlp_bias=False, qk_norm=False, tied=True,
)  # fmt: skip
TRL = Peer("TRL PPO", "nothing", (Need("trl", below="1.13"), Need("torch")))


@pytest.fixture
def program(tmp_path):
    def write(text):
        path = tmp_path / f"peer{len(list(tmp_path.iterdir()))}.py"
        path.write_text(f"import sys\nsys.path.insert(0, {str(worker.ROOT)!r})\n{text}")
        return [sys.executable, str(path)]

    return write


@pytest.fixture
def python(tmp_path):
    """Make an interpreter that says of itself what a test wants."""

    def write(name, says):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho '{says}'\n")
        path.chmod(0o755)
        return str(path)

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
            self.who, self.command, self.setup = who, command, setup

        def close(self):
            ended.append(self.who)

    monkeypatch.setattr(worker, "Worker", Fake)
    peers = [Peer("a", "benchmarks.peers.a", ()), Peer("b", "benchmarks.peers.b", ()), Peer("c", "", ())]
    with worker.workers(peers, {"a": "python-a", "b": "python-b"}, {"a": {"x": 1}, "c": {}}) as running:
        assert list(running) == ["a"] and running["a"].setup == {"x": 1} and not ended
        assert running["a"].command == ["python-a", "-m", "benchmarks.peers.a"]
    assert ended == ["a"]


def test_interpreters_are_asked_in_order_and_the_first_with_the_wanted_versions_serves(python):
    new = python("new", '{"python": "3.12.1", "trl": "1.16.0", "torch": "2.13.0"}')
    bare = python("bare", '{"python": "3.11.1", "trl": "1.12.0"}')
    old = python("old", '{"python": "3.11.2", "trl": "1.12.1", "torch": "2.8.0+cpu"}')
    older = python("older", '{"python": "3.11.3", "trl": "0.29.0", "torch": "2.8.0"}')
    assert worker.choose([TRL], [new, bare, old, older], ARCH, wanted=True) == ({"TRL PPO": old}, None)
    assert worker.choose([TRL], [older, old], ARCH, wanted=True)[0] == {"TRL PPO": older}


def test_a_peer_that_no_interpreter_has_is_named_with_what_each_has_instead(python):
    new = python("new", '{"python": "3.12.1", "trl": "1.16.0", "torch": "2.13.0"}')
    bare = python("bare", '{"python": "3.11.1"}')
    found, absent = worker.choose([TRL], [new, bare], ARCH, wanted=True)
    assert found == {} and absent == (
        "TRL PPO missing: needs trl < 1.13, torch; Python 3.12.1 has trl 1.16.0, torch 2.13.0; "
        "Python 3.11.1 has trl not installed, torch not installed (--peer-pythons names others)"
    )
    assert str(new) not in absent  # a report says nothing of where this machine keeps its files
    assert worker.choose([TRL], [new], ARCH, wanted=False) == ({}, "peers left out: --no-peer")


def test_without_a_list_this_interpreter_is_asked():
    import numpy

    assert worker.installed(sys.executable, ("numpy", "no-such-package"))["numpy"] == numpy.__version__
    assert worker.choose([Peer("numpy", "", (Need("numpy"),))], (), ARCH, wanted=True)[0] == {"numpy": sys.executable}


def test_an_interpreter_that_does_not_run_is_the_users_to_mend(tmp_path):
    with pytest.raises(ValueError, match="nowhere/python does not run"):
        worker.installed(str(tmp_path / "nowhere" / "python"), ("trl",))


@pytest.mark.parametrize(
    ("version", "met"), [("1.12.9", True), ("1.13.0", False), ("1.9.0", True), ("2.0", False), ("0.9rc1", True)]
)
def test_versions_are_compared_as_numbers(version, met):
    assert Need("trl", below="1.13").met_by({"trl": version}) is met
    assert Need("trl", at_least="1.13").met_by({"trl": version}) is not met


def test_a_model_that_tunix_does_not_have_is_left_out_and_said_so(python):
    peer = Peer("Tunix", "benchmarks.peers.tunix", (), worker.beyond_tunix)
    serves = python("serves", '{"python": "3.11.0"}')
    assert worker.choose([peer], [serves], ARCH, wanted=True) == ({"Tunix": serves}, None)
    scaled = pg.Rope(theta=1e6, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32)
    for change, why in (
        ({"family": "qwen3"}, "family qwen3"),
        ({"rope": scaled}, "rope"),
        ({"mlp_bias": True}, "biases"),
    ):
        found, absent = worker.choose([peer], [serves], dataclasses.replace(ARCH, **change), wanted=True)
        assert found == {} and absent.startswith("Tunix left out: ") and why in absent
