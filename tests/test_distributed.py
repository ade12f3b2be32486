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
from tests.compiling import xla_flags
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
        "apart": "not all processes see .*apart: name an --output on a disk that they share",
    }.items():
        kinds, texts = zip(*(mine[name] for mine in found), strict=True)
        assert set(kinds) == {"ValueError"}
        assert texts[0] == texts[1] and re.search(words, texts[0]), texts


def test_all_write_where_the_first_one_does(found, folder):
    assert [mine["shared"] for mine in found] == [f"{folder}/of0/run"] * 2
    assert not any((folder / name).is_file() for name in ("of0", "of1")) and not list((folder / "of0").iterdir())


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


ALONE = """
import sys
import jax
from experiments.cli import plain_errors
from experiments.devices import put
from pgjax import distributed, loop, sharding
from pgjax.checkpoint import Checkpoints

def step(state, i, work):
    if i in (2, 4) and jax.process_index() == failing:
        raise ValueError(f"no step {i}")
    if i == 2:
        distributed.gather(i)  # the other waits here
    return {"x": state["x"] + 1}, {"x": state["x"]}, None

def prepare(state, i):
    if both and i == 1:
        raise KeyError("on both")

def run():
    state = {"x": put(sharding.make_mesh(data=-1), 0.0)}
    return loop.run(state, steps=5, save_every=2, prepare=prepare, step=step, check=lambda done, metrics: None,
                    report=lambda done, metrics, samples: None, checkpoints=checkpoints)

failing, both = int(sys.argv[4]), True
with plain_errors():
    distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    with Checkpoints(sys.argv[3]) as checkpoints:
        try:
            run()
        except KeyError as error:
            print(error, checkpoints.steps(), flush=True)
    both = False
    with Checkpoints(sys.argv[3] + "-alone") as checkpoints:
        run()
"""


@pytest.mark.parametrize("failing", [0, 1])
def test_a_step_that_fails_on_one_process_alone_ends_both_with_its_words(tmp_path, failing):
    address = f"localhost:{pair.free_port()}"
    processes = [pair.start(["-c", ALONE, address, str(i), str(tmp_path / "run"), str(failing)]) for i in range(2)]
    ended = pair.finish(processes, seconds=200)
    for process, (code, printed, errors) in enumerate(ended):
        assert code == 1 and "'on both' [1]" in printed.splitlines()  # first: what all raise is saved by all
        alone = f"error: process {failing} failed, so all stop: ValueError: no step 2"
        # The one that fails says its own error, if it finds the time.
        told = [alone, "error: no step 2"] if process == failing else [alone]
        assert errors.splitlines()[0] in told and "Traceback" not in errors, ended
    assert [path.name for path in (tmp_path / "run-alone").iterdir() if path.name.isdecimal()] == ["2"]


GONE = """
import os, sys
from experiments.cli import plain_errors
from pgjax import distributed
with plain_errors():
    distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    if sys.argv[2] == "1":
        os._exit(7)
    distributed.gather("still here")
"""


def test_a_process_that_vanishes_is_told_in_a_line_and_without_a_hang():
    address = f"localhost:{pair.free_port()}"
    processes = [pair.start(["-c", GONE, address, str(i)]) for i in range(2)]
    (code, _, errors), (gone, _, _) = pair.finish(processes, seconds=120)
    assert gone == 7 and code == 1 and "Traceback" not in errors
    assert errors.startswith("error: another process has gone (") and "--resume goes on, from the last" in errors, (
        errors
    )


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


def test_processes_with_other_devices_or_settings_are_told_so():
    """Settings on which numbers depend: other random bits trained on in silence."""
    for differing, words in (
        ({"XLA_FLAGS": xla_flags(1)}, "equally many devices, but there are 2 on process 0, 1 on process 1"),
        ({"JAX_ENABLE_X64": "1"}, "jax_enable_x64 is False on process 0, True on process 1"),
        ({"JAX_THREEFRY_PARTITIONABLE": "0"}, "jax_threefry_partitionable is True on process 0, False on process 1"),
    ):
        given = [f"localhost:{pair.free_port()}", "2"]
        processes = [
            pair.start(["-c", JOIN, *given, str(i), "60"], variables=differing if i else None) for i in range(2)
        ]
        told = [said.splitlines()[-1] for _, said, _ in pair.finish(processes, seconds=120)]
        assert told[0] == told[1] and words in told[0], told


def of_slurm(host, port, process, processes):
    """The variables that `srun` sets for a task, as far as jax reads them; the first host of the list is process 0's."""
    return {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": host, "SLURM_NTASKS": str(processes), "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process), "JAX_COORDINATOR_PORT": str(port),
    }  # fmt: skip


JOIN_SLURM = """
import sys, time
from pgjax import distributed
begin = time.monotonic()
try:
    distributed.initialize(timeout=float(sys.argv[1]))
except ValueError as error:
    print(error)
    sys.exit(1 if time.monotonic() - begin < float(sys.argv[1]) + 5 else 2)
print(distributed.gather(distributed.jax.process_index()))
"""


def join_slurm(*variables, timeout=60):
    """Let the tasks of a SLURM job join: exit code and last line of each; 2 where it took longer than it should."""
    tasks = [pair.start(["-c", JOIN_SLURM, str(timeout)], variables=one) for one in variables]
    return [(code, *printed.splitlines()[-1:]) for code, printed, _ in pair.finish(tasks, seconds=300)]


def test_tasks_of_slurm_find_each_other():
    port = pair.free_port()
    assert join_slurm(*(of_slurm("localhost", port, i, 2) for i in range(2))) == [(0, "[0, 1]")] * 2


def test_a_task_of_slurm_that_never_comes_is_named_on_all_that_are_there():
    port = pair.free_port()
    first, second = join_slurm(*(of_slurm("localhost", port, i, 3) for i in range(2)), timeout=12)
    assert first == second and first[0] == 1
    assert first[1].startswith(
        f"2 of 3 processes came to the coordinator localhost:{port} within 12 s; these did not: 2;"
    )
    assert first[1].endswith("JAX_COORDINATOR_ADDRESS, names another address)") and "SLURM" in first[1]


@pytest.mark.parametrize("host", ["no-such-host.invalid", "127.0.0.1"])
def test_a_first_host_of_slurm_that_is_not_there_is_named(host):
    """No such name, and a host where nobody listens."""
    port = pair.free_port()
    ((code, told),) = join_slurm(of_slurm(f"{host},b", port, 1, 2), timeout=2)
    assert code == 1
    assert told.startswith(f"process 1 of 2 could not reach the coordinator {host}:{port} within 2 s (")


def meet_at(process, port, processes=2, timeout=1.0):
    """What a process of a run is told at the coordinator's port; nothing of jax is touched."""
    try:
        meeting.meet(f"localhost:{port}", processes, process, timeout)
    except ValueError as error:
        return str(error)
    return ""


def test_an_unreachable_coordinator_is_a_message_and_no_hang():
    begin, port = time.monotonic(), pair.free_port()
    assert "process 1 of 2 could not reach the coordinator localhost" in meet_at(1, port)
    assert "1 of 2 processes came to the coordinator" in meet_at(0, port)
    assert "process 3 of 4 could not reach the coordinator" in meet_at(3, port, processes=4)
    assert time.monotonic() - begin < 9


def meet_all(*given, timeout=60):
    """What processes that say these (process, processes) are told, once the first of them listens."""
    told, port = {}, pair.free_port()

    def one(i, process, processes):
        told[i] = meet_at(process, port, processes, timeout)

    threads = [threading.Thread(target=one, args=(i, *each)) for i, each in enumerate(given)]
    threads[0].start()
    knock(port).close()
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert len(told) == len(given)
    return [told[i] for i in range(len(given))]


def test_numbers_that_cannot_be_meant_are_told_to_all():
    """A second process 0 on the first one's host, and processes whose number lies beyond their count."""
    begin = time.monotonic()
    assert meet_all((0, 2), (0, 2)) == ["two processes have the number 0: each needs its own"] * 2
    words = (
        "the processes disagree about how many they are (process 0 says 2, process 1 says 1): give all the same number"
    )
    assert meet_all((0, 2), (1, 1)) == [words] * 2
    assert meet_all((0, 2), (2, 2)) == ["process 2 of 2: there is at least 1, and they are counted from 0"] * 2
    assert (
        meet_all((0, 3), (1, 3), (-1, 3)) == ["process -1 of 3: there is at least 1, and they are counted from 0"] * 3
    )
    assert meet_all((0, 2), (1, 2)) == ["", ""]
    assert time.monotonic() - begin < 50  # nobody waited for long
    with socket.socket() as other:  # no coordinator of ours
        other.bind(("", 0))
        assert "cannot be used here" in meet_at(0, other.getsockname()[1])


def knock(port):
    """Connect as soon as somebody listens: a thread that was started need not have come that far."""
    for _ in range(500):
        try:
            return socket.create_connection(("localhost", port), timeout=5)
        except ConnectionRefusedError:
            time.sleep(0.02)
    raise AssertionError("nobody came to listen")


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
    threads += [
        threading.Thread(target=lambda i=i: told.update({i: meet_at(1, port, processes=3, timeout=20)})) for i in (1, 2)
    ]
    threads[0].start()
    with knock(port) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\n")
        for thread in threads[1:]:
            thread.start()
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
