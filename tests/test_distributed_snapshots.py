"""Snapshots that two processes write: what is wrong on one is told on both, and one process can read them."""

import json

from pgjax.run.checkpoint.checkpoints import Checkpoints
from pgjax.run.checkpoint.digest import digest
from tests.pair import finish, free_port, start
from tests.two_processes_snapshots import state_of


def test_two_processes_save_restore_and_stop_as_one(tmp_path):
    folder, address = tmp_path / "checkpoints", f"localhost:{free_port()}"
    pair = [start(["-m", "tests.two_processes_snapshots", str(process), address, str(folder)]) for process in (0, 1)]
    for code, _, errors in finish(pair, seconds=200):
        assert code == 0, errors
    both = [json.loads((tmp_path / f"found{process}.json").read_text()) for process in (0, 1)]
    for found in both:
        assert found["restored"] == [True, True, 1]
        assert found["bad"].startswith("the checkpoint of step 2") and "is damaged at w" in found["bad"]
        assert found["last good"] == [True, 1, [1]]
        assert found["signal to process 1"] == ["Interrupted", "stopped after step 4; its state is saved", True, 4]
        assert "No space left" in found["report of process 0"][1] and found["report of process 0"][2:] == [True, 6]
        # what one process could not write is no snapshot for any
        for name, why in (
            ("disk of process 1", "process 1: File too large"),
            ("folder of process 0", "process 0: Not a directory"),
        ):
            kind, words, *rest = found[name]
            assert kind == "SaveFailed" and rest == [True, 6]
            assert words.startswith(f"step 7 could not be saved in {folder} ({why}")
            assert words.endswith("step 6 is kept and can be restored")
    assert [found["report of process 0"][0] for found in both] == ["OSError", "FailedElsewhere"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["1", "2.damaged", "4", "6"]
    with Checkpoints(folder, made_from={"seed": 0}) as checkpoints:  # in one process
        restored, extra = checkpoints.restore(state_of(None, 0))
    expected = {**state_of(None, 1), "n": restored["n"]}
    assert digest(restored) == digest(expected) and int(restored["n"]) == extra["step"] == 6
