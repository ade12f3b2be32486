"""Snapshots that two processes write: what is wrong on one is said on both, and one process can read them."""

from pgjax.checkpoint import Checkpoints
from pgjax.digest import digest
from tests.pair import finish, free_port, start
from tests.snapshots_process import state_of


def test_two_processes_save_restore_and_stop_as_one(tmp_path):
    folder, address = tmp_path / "checkpoints", f"localhost:{free_port()}"
    pair = [start(["-m", "tests.snapshots_process", str(process), address, str(folder)]) for process in (0, 1)]
    for code, said, errors in finish(pair, seconds=120):
        # what gloo prints comes from several threads, so that a line of it may be broken anywhere
        said = said.replace(str(folder), "FOLDER").splitlines()
        said = [line for line in said if line and not line.startswith(("[Gloo]", "stopping"))]
        lines = [line for line in said if "peer ranks" not in line]
        assert code == 0, errors
        assert lines == [
            "restored True True 1",
            "bad: the checkpoint of step 2 True",
            "last good True 1 [1]",
            "interrupted after 4 4",
            "failed: True 6",
            "step 8 could not be saved in FOLDER (process 1: File too large); step 6 is kept and can be restored",
            "step 7 could not be saved in FOLDER (process 1: File too large); step 6 is kept and can be restored",
            "done",
        ]
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2.damaged", "4", "6"]
    with Checkpoints(folder, made_from={"seed": 0}) as checkpoints:  # in one process
        restored, extra = checkpoints.restore(state_of(None, 0))
    expected = {**state_of(None, 1), "n": restored["n"]}
    assert digest(restored) == digest(expected) and int(restored["n"]) == extra["step"] == 6
