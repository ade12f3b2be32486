"""One owner a run folder: living ones are told from those that are gone, on this machine and on another."""

import json
import os
import socket
import subprocess
import sys
import threading

import jax.numpy as jnp
import pytest

from pgjax.core.errors import UserError
from pgjax.run import logs, owner, session
from pgjax.run.owner import owned


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(owner, "BEAT", 0.05)


def leave(folder, **fields):
    """Leave the file of an owner."""
    (folder / owner.FILE).write_text(json.dumps({**owner._me(), "since": "noon", **fields}))


def test_a_living_process_is_named_and_not_disturbed(tmp_path):
    with owned(tmp_path):
        there = json.loads((tmp_path / owner.FILE).read_text())
        with (
            pytest.raises(UserError, match=f"in use: process {os.getpid()} on host {socket.gethostname()}"),
            owned(tmp_path),
        ):
            pytest.fail("it was opened")
        assert json.loads((tmp_path / owner.FILE).read_text())["id"] == there["id"]
    assert list(tmp_path.iterdir()) == []
    with owned(tmp_path):
        pass


def test_another_process_is_refused_in_one_line(tmp_path):
    code = (
        "import sys, pathlib; from pgjax.run.owner import owned\nwith owned(pathlib.Path(sys.argv[1])): print('mine')"
    )
    with owned(tmp_path):
        found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert found.returncode == 1 and f"process {os.getpid()} on host" in found.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "gone", [{"pid": 2**22 + 1}, {"process_started": "1"}], ids=["no such process", "its number again"]
)
def test_an_owner_of_this_machine_that_is_gone_is_replaced(tmp_path, gone):
    leave(tmp_path, **gone)
    with owned(tmp_path):
        assert json.loads((tmp_path / owner.FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("elsewhere", [{"host": "elsewhere"}, {"boot": "another room"}], ids=["host", "container"])
def test_an_owner_elsewhere_is_known_by_its_beat(tmp_path, elsewhere, capsys):
    leave(tmp_path, **elsewhere)
    done = threading.Event()

    def beat():
        number = 0
        while not done.wait(0.02):
            number += 1
            leave(tmp_path, **elsewhere, id="its", beat=number)

    living = threading.Thread(target=beat)
    living.start()
    try:
        with pytest.raises(UserError, match="in use"), owned(tmp_path):
            pytest.fail("it was opened")
    finally:
        done.set()
        living.join()
    with owned(tmp_path):  # it is silent now
        assert json.loads((tmp_path / owner.FILE).read_text())["host"] == socket.gethostname()
    assert "waiting for a sign of life" in capsys.readouterr().err


def test_a_damaged_file_is_no_owner(tmp_path):
    (tmp_path / owner.FILE).write_text("{")
    with owned(tmp_path):
        assert json.loads((tmp_path / owner.FILE).read_text())["pid"] == os.getpid()


def test_a_faster_process_keeps_what_it_has_taken(tmp_path):
    leave(tmp_path, id="gone")
    gone = json.loads((tmp_path / owner.FILE).read_text())
    leave(tmp_path, id="faster")
    owner._take_away(tmp_path / owner.FILE, gone)
    assert json.loads((tmp_path / owner.FILE).read_text())["id"] == "faster"


def test_the_owner_beats_and_ends_where_the_folder_was_taken_over(tmp_path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    with owned(tmp_path):
        beats = set()
        for _ in range(100):
            beats.add(json.loads((tmp_path / owner.FILE).read_text())["beat"])
            if len(beats) > 2:
                break
            threading.Event().wait(0.05)
        assert len(beats) > 2
        part = tmp_path / "other"
        part.write_text(json.dumps({**owner._me(), "id": "other"}))
        os.replace(part, tmp_path / owner.FILE)
        assert ended.wait(5)
    assert json.loads((tmp_path / owner.FILE).read_text())["id"] == "other", "it is not ours to remove"


def test_a_second_session_changes_nothing_in_a_run_under_way(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "plot_curves", lambda folder: None)

    def begin(**options):
        state = {"w": jnp.zeros(2)}
        return session.open_session(tmp_path / "run", state, **{"config": {"seed": 0}, "steps": 3, **options})

    with begin() as run:
        run.report(1, {"loss": 1.0})
        before = (tmp_path / "run" / logs.CONFIG).read_text()
        for options in ({"resume": True}, {"resume": True, "config": {"seed": 1}}):
            with pytest.raises(UserError, match=f"process {os.getpid()} on host"), begin(**options):
                pytest.fail("it was opened")
        with pytest.raises(UserError), begin():
            pytest.fail("it was opened")
        run.report(2, {"loss": 1.0})
        assert (tmp_path / "run" / logs.CONFIG).read_text() == before
    assert [row["step"] for row in logs.read_metrics(tmp_path / "run")] == [1, 2]
    with begin(resume=True):
        pass
