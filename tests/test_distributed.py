"""Two processes against one: the same run, the same errors on both, and no waiting for what never comes."""

import json
import re
import socket
import threading
import time

import jax
import numpy as np
import pytest

import pgjax as pg
from experiments import devices
from pgjax import distributed, logs, meeting
from pgjax.models.classifier import with_padding_token
from pgjax.models.reward_model import from_causal_lm
from tests import pair
from tests.pair import script
from tests.tiny_model import save_tiny_model

CLOCKED = ("timing/", "perf/")  # what no two runs share


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    save_tiny_model(folder / "model")
    lm, params, tokenizer = pg.load(folder / "model")
    pg.save_reward_model(
        folder / "judge", *with_padding_token(*from_causal_lm(lm, params, jax.random.key(1)), tokenizer)
    )
    lines = [json.dumps({"prompt": f"say {word}"}) + "\n" for word in ("a", "bcd", "ef", "ghij")]
    (folder / "prompts.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What both processes found and left behind."""
    port = pair.free_port()
    processes = [pair.start(["-m", "tests.pair", str(i), str(port), str(folder)]) for i in range(2)]
    for code, _, errors in pair.finish(processes):
        assert code == 0, errors[-3000:]
    return [json.loads((folder / f"found{i}.json").read_text()) for i in range(2)]


@pytest.fixture(scope="module")
def single(folder):
    """The same run in this process, on four devices, an iteration longer: the folder."""
    run(pair.make_config(folder, "one", steps=4))
    return folder / "one"


def run(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "machine_peaks", lambda dtype: pair.perf.Peaks(1e9, 1e9, 1e9))
        return script.main(config)


def same_metrics(ours, theirs, tolerance):
    """Assert that two lists of rows agree in all but the clock's figures."""
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            if not name.startswith(CLOCKED):
                np.testing.assert_allclose(mine[name], other[name], rtol=tolerance, atol=1e-6, err_msg=name)


def trained(folder):
    return [row for row in logs.read_metrics(folder) if "objective/scores" in row]


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one(found, single, folder):
    assert found[0]["figures"] == found[1]["figures"]
    same_metrics(trained(folder / "two"), trained(single)[:3], 1e-5)
    before = [next(row for row in logs.read_metrics(x) if "eval/scores" in row) for x in (folder / "two", single)]
    same_metrics(before[:1], before[1:], 1e-5)
    ours, theirs = samples(folder / "two"), [row for row in samples(single) if row["step"] <= 3]
    assert len(ours) == 3 * 8
    assert [(row["prompt"], row["completion"]) for row in ours] == [(x["prompt"], x["completion"]) for x in theirs]


def test_each_process_judges_its_own_rows(found):
    assert found[0]["calls"] == found[1]["calls"] == [4] * 5  # of 8: an evaluation, three iterations, an evaluation
    assert [x["own"] for x in found] == [[0, 4], [4, 8]]


def test_one_process_goes_on_where_two_stopped(found, single, folder):
    """The snapshot and the folder of two processes are those of one."""
    run(pair.make_config(folder, "two", steps=4, resume=True))
    same_metrics(trained(folder / "two"), trained(single), 1e-5)


def test_a_mesh_gives_the_numbers_of_one_device(single, folder):
    run(pair.make_config(folder, "alone", mesh=None))
    same_metrics(trained(folder / "alone"), trained(single)[:3], 1e-5)
    ours, theirs = samples(folder / "alone"), [row for row in samples(single) if row["step"] <= 3]
    assert [row["completion"] for row in ours] == [row["completion"] for row in theirs]


def test_values_are_exchanged_in_order(found):
    for mine in found:
        assert mine["gathered"] == [{"process": 0, "text": ""}, {"process": 1, "text": "x" * 3000}]
        assert mine["any"] == [True, False]
        assert mine["first"] == "by 0"


def test_both_refuse_with_the_same_words(found):
    for name, words in {
        "odd": "7 rows does not divide by 2 processes",
        "differ": "seed is 0 on process 0, 1 on process 1",
        "steps": "the command: not the same on all processes .steps is 3 on process 0, 4 on process 1",
        "prompts": "the rows of tests.pair:own_rows: not the same on all processes",
        "unfit": "data=3.* needs 3 devices, but there are 4",
        "uneven": "6 rows do not divide",
    }.items():
        kinds, texts = zip(*(mine[name] for mine in found), strict=True)
        assert set(kinds) == {"ValueError"}
        assert texts[0] == texts[1] and re.search(words, texts[0]), texts


def test_a_failure_of_one_stops_both(found):
    assert found[0]["refused"] == ["IndexError", "list index out of range"]
    assert found[1]["refused"] == [
        "FailedElsewhere",
        "process 0 failed, so all stop: IndexError: list index out of range",
    ]
    assert found[1]["broken"][0] == "RewardError"
    assert found[0]["broken"][0] == "FailedElsewhere" and "process 1 failed" in found[0]["broken"][1]
    for mine in found:
        assert "no such judge" in mine["broken"][1]


def test_a_signal_to_one_stops_both_after_the_same_step(found, folder):
    assert found[0]["stopped"] == found[1]["stopped"] == ["Interrupted", "stopped after step 2; its state is saved"]
    assert (folder / "stopped" / "checkpoints" / "2").is_dir()
    assert [row["step"] for row in trained(folder / "stopped")] == [1, 2]


JOIN = """
import sys, time
from pgjax import distributed
begin = time.monotonic()
try:
    distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), timeout=float(sys.argv[4]))
except ValueError as error:
    print(error)
    sys.exit(0 if time.monotonic() - begin < float(sys.argv[4]) + 5 else 2)
sys.exit(3)
"""


def join(*rows):
    """Let processes try to join, each with its address, count, number and time; what they are told."""
    processes = [pair.start(["-c", JOIN, *map(str, row)]) for row in rows]
    ended = pair.finish(processes, seconds=120)
    assert [code for code, _, _ in ended] == [0] * len(rows), ended
    return [printed.strip() for _, printed, _ in ended]


def test_processes_that_disagree_about_their_number_are_told_so():
    address = f"localhost:{pair.free_port()}"
    first, second = join((address, 2, 0, 60), (address, 3, 1, 60))
    assert first == second and "process 0 says 2, process 1 says 3" in first


def meet_at(process, port, processes=2, timeout=2.0):
    """What a process of a run is told at the coordinator's port; nothing of jax is touched."""
    try:
        meeting.meet(f"localhost:{port}", processes, process, timeout)
    except ValueError as error:
        return str(error)
    return ""


def test_an_unreachable_coordinator_is_a_message_and_no_hang():
    begin, port = time.monotonic(), pair.free_port()
    assert "process 1 could not reach the coordinator localhost" in meet_at(1, port)
    assert "did not reach the coordinator" in meet_at(0, port)
    assert "process 3 could not reach the coordinator" in meet_at(3, port, processes=4)
    assert time.monotonic() - begin < 12


def test_processes_meet_whatever_else_knocks():
    """A scanner at the port, a late coordinator, and two that claim one number."""
    port = pair.free_port()
    told: dict[int, str] = {}
    threads = [threading.Thread(target=lambda: told.update({1: meet_at(1, port, timeout=20)}))]
    threads[0].start()
    time.sleep(0.5)
    threads.append(threading.Thread(target=lambda: told.update({0: meet_at(0, port, timeout=20)})))
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert told == {0: "", 1: ""}

    told, port = {}, pair.free_port()
    threads = [threading.Thread(target=lambda: told.update({0: meet_at(0, port, processes=3, timeout=20)}))]
    threads += [threading.Thread(target=lambda i=i: told.update({i: meet_at(1, port, processes=3)})) for i in (1, 2)]
    for thread in threads:
        thread.start()
    with socket.create_connection(("localhost", port), timeout=5) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\n")
        for thread in threads:
            thread.join(30)
    assert all("two processes have the number 1" in text for text in told.values()) and len(told) == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"coordinator": "somewhere", "num_processes": 2, "process_id": 1}, "host:port"),
        ({"coordinator": "localhost:99999", "num_processes": 2, "process_id": 1}, "host:port"),
        ({"coordinator": "localhost:8476", "num_processes": 2, "process_id": 2}, "process 2 of 2"),
        ({"coordinator": "localhost:8476", "num_processes": 0, "process_id": 0}, "at least 1"),
        ({"coordinator": "localhost:8476"}, "number of processes"),
        ({}, "coordinator"),
        ({"init_timeout": 0.0}, "seconds"),
    ],
)
def test_flags_that_cannot_be_meant(given, words):
    with pytest.raises(ValueError, match=words):
        devices.start(devices.Flags(distributed=True, **given))


def test_flags_for_several_processes_need_the_flag_that_says_so():
    for name, value in {"coordinator": "localhost:1", "num_processes": 2, "process_id": 0}.items():
        with pytest.raises(ValueError, match=f"{name} .*--distributed"):
            devices.start(devices.Flags(**{name: value}))


def test_the_environment_fills_in_what_flags_leave_out(monkeypatch):
    asked = []
    monkeypatch.setattr(distributed, "meet", lambda *given: asked.append(given))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **options: asked.append(given))
    for name, value in {"COORDINATOR_ADDRESS": "10.0.0.1:8476", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    distributed.initialize(process=1, timeout=5)
    assert asked == [("10.0.0.1:8476", 4, 1, 5), ("10.0.0.1:8476", 4, 1)]
    monkeypatch.setenv("JAX_NUM_PROCESSES", "four")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES='four'"):
        distributed.initialize(timeout=5)
