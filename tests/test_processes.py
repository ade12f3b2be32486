"""How processes of a run join, and what they do where there is one: by flags, the environment or SLURM."""

import datetime
import decimal
import json
import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from pgjax.core.errors import UserError
from pgjax.parallel import processes
from pgjax.parallel.encoding import decode, encode, plain
from pgjax.run import devices
from pgjax.run.exits import plain_errors
from tests import pair


class ManyWords(UserError):
    """One whose constructor does not take its text."""

    def __init__(self, *, row: int, column: str) -> None:
        super().__init__(f"row {row} has no {column}")


@pytest.mark.parametrize("error", [ManyWords(row=3, column="prompt"), UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")])
@pytest.mark.parametrize("rule", [processes.on_process_0, processes.all_or_none, processes.gather_results])
def test_with_one_process_an_error_passes_through_untouched(rule, error):
    # The bug: `on_process_0` made a bare ValueError of any subclass, and its traceback was lost.
    def fail():
        raise error

    with pytest.raises(type(error)) as raised:
        rule(fail)
    assert raised.value is error and raised.traceback[-1].name == "fail"
    assert not getattr(error, "__notes__", [])


def test_a_subclass_of_user_error_is_one_line_in_a_script_and_another_value_error_is_not():
    def script(error):
        with plain_errors():
            raise error

    with pytest.raises(SystemExit, match="error: row 3 has no prompt"):
        script(ManyWords(row=3, column="prompt"))
    with pytest.raises(ValueError, match="no such axis"):
        script(ValueError("no such axis"))


class Picture:
    """One whose text holds its address."""


def test_what_a_row_holds_becomes_plain_json():
    day = datetime.datetime(2026, 1, 2, 3, 4, 5)
    row = {
        "day": day, "date": day.date(), "time": day.time(), "took": datetime.timedelta(seconds=3),
        "price": decimal.Decimal("1.50"),
        "raw": b"\xff", "tags": {"b", "a"}, "pairs": ((1, 2.5), None), 3: True, "path": pathlib.Path("a/b"), "picture": Picture(),
        "array": np.float32([0.5, np.nan]), "one": np.int64(7), "at": np.datetime64("2026-01-02T03:04:05.123456789"),
        "ats": np.array(["2026-01-02"], "M8[ns]"), "bad": [float("inf"), float("nan"), np.float32(1)],
    }  # fmt: skip
    assert json.loads(json.dumps(plain(row, finite=True), allow_nan=False)) == {
        "day": "2026-01-02T03:04:05", "date": "2026-01-02", "time": "03:04:05", "took": "0:00:03", "price": "1.50",
        "raw": "/w==", "tags": ["a", "b"], "pairs": [[1, 2.5], None], "3": True, "path": "a/b",
        "picture": "<tests.test_processes.Picture object>",
        "array": [0.5, None], "one": 7, "at": "2026-01-02T03:04:05.123456789",
        "ats": ["2026-01-02T00:00:00.000000000"], "bad": [None, None, 1.0],
    }  # fmt: skip
    assert plain(float("inf")) == float("inf")


def test_what_processes_exchange_comes_back_exactly():
    floats = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    floats[:3] = np.nan, np.inf, -0.0
    for x in (floats, floats.astype(np.float64), np.zeros((0, 3), bool), np.array([2**62], np.int64), np.float32(0.1)):
        found = decode(encode({"x": x}))["x"]
        assert np.asarray(found, x.dtype).tobytes() == x.tobytes() and np.shape(found) == x.shape
        assert not isinstance(x, np.ndarray) or found.dtype == x.dtype
    assert decode(encode(("a", None, True, 0.1, {"b": (1, "ü")}))) == [
        "a",
        None,
        True,
        0.1,
        {"b": [1, "ü"]},
    ]
    with pytest.raises(TypeError, match="not a set"):
        encode({1, 2})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"coordinator": "somewhere", "num_processes": 2, "process_id": 1}, "host:port"),
        ({"coordinator": "localhost:8476", "num_processes": 2, "process_id": 2}, "process 2 of 2"),
        ({"coordinator": "localhost:8476", "num_processes": 0, "process_id": 0}, "at least 1"),
        ({"coordinator": "localhost:8476"}, "number of processes"),
        ({}, "coordinator"),
        ({"init_timeout": 0.0}, "seconds"),
    ],
)
def test_flags_that_cannot_be_meant(given, words):
    with pytest.raises(UserError, match=words):
        devices.start(devices.Flags(distributed=True, **given))


def test_flags_for_several_processes_need_the_flag_that_says_so():
    for name, value in {"coordinator": "localhost:1", "num_processes": 2, "process_id": 0}.items():
        with pytest.raises(UserError, match=f"{name}={value} .*distributed=True"):
            devices.start(devices.Flags(**{name: value}))


def test_the_environment_fills_in_what_flags_leave_out(monkeypatch):
    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *values, **options: given.append((values, options)))
    for name, value in {"COORDINATOR_ADDRESS": "10.0.0.1:8476", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    processes.initialize(process=1, timeout=5)
    values, options = given[0]
    assert values == ("10.0.0.1:8476", 4, 1) and options["initialization_timeout"] == 5
    assert options["heartbeat_timeout_seconds"] == options["shutdown_timeout_seconds"] == 60  # all end within a minute
    monkeypatch.setenv("JAX_NUM_PROCESSES", "four")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES='four'"):
        processes.initialize(timeout=5)


def test_processes_with_other_numbers_of_devices_are_told_so(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *values, **options: None)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(process_index=i) for i in (0, 0, 1)])
    with pytest.raises(UserError, match="equally many devices, but there are 2 on process 0, 1 on process 1"):
        processes.initialize("localhost:8476", 2, 0)


JOIN = """
import sys
from pgjax.parallel import processes
from pgjax.parallel.encoding import decode, encode
try:
    processes.initialize()
except processes.UserError as error:
    print(processes.jax.process_index(), error)
"""


def test_tasks_of_slurm_find_each_other_and_are_told_of_other_settings():
    """jax reads where they are; random bits that differ would be trained on in silence."""
    port = pair.free_port()
    slurm = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "JAX_COORDINATOR_PORT": str(port),
    }  # fmt: skip
    other = {"JAX_ENABLE_X64": "1", "JAX_THREEFRY_PARTITIONABLE": "0"}
    tasks = [
        pair.start(
            ["-c", JOIN], variables=slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} | (other if i else {})
        )
        for i in range(2)
    ]
    words = (
        "the installation: not the same on all processes (jax_enable_x64 is False on process 0, True on process 1; "
        "jax_threefry_partitionable is True on process 0, False on process 1); give all the same"
    )
    for i, (code, printed, errors) in enumerate(pair.finish(tasks, seconds=200)):
        assert code == 0 and printed.splitlines()[-1] == f"{i} {words}", errors
