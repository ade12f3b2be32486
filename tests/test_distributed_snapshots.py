"""Snapshots that two processes write: what is wrong on one is said on both, and one process can read them."""

from pgjax.run.checkpoint.checkpoints import Checkpoints
from pgjax.run.checkpoint.digest import digest
from tests.pair import finish, free_port, start
from tests.two_processes_snapshots import state_of


def test_two_processes_save_restore_and_stop_as_one(tmp_path):
    folder, address = tmp_path / "checkpoints", f"localhost:{free_port()}"
    pair = [start(["-m", "tests.two_processes_snapshots", str(process), address, str(folder)]) for process in (0, 1)]
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


FULL = """
import os, sys
import jax
from pgjax.run.exits import plain_errors
from pgjax import alarm, distributed, sharding, unanimous
from pgjax.run.checkpoint.checkpoints import Checkpoints
from tests.two_processes_snapshots import state_of

unanimous._PATIENCE, alarm._SECONDS = 2, 3
make_folder = os.mkdir

def full(path, *arguments, **options):
    if "orbax-checkpoint-tmp" in str(path):
        raise OSError(28, "No space left on device", str(path))
    make_folder(path, *arguments, **options)

with plain_errors():
    distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    mesh = sharding.make_mesh(data=2, fsdp=2)
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(sys.argv[3])
        checkpoints.save(1, state_of(mesh, 1), {})
        checkpoints.wait()
        if sys.argv[2] == "0":
            os.mkdir = full
        checkpoints.save(2, state_of(mesh, 2), {})
        checkpoints.wait()
"""


def test_where_the_first_process_can_make_no_folder_the_others_do_not_wait(tmp_path):
    # The bug: orbax lets the first process skip to the end of a save, where the others never come, for twenty minutes.
    address = f"localhost:{free_port()}"
    pair = [start(["-c", FULL, address, str(process), str(tmp_path / "checkpoints")]) for process in (0, 1)]
    words = "error: process 0 failed, so all stop: OSError: a snapshot could not be saved (No space left on device"
    for code, _, errors in finish(pair, seconds=120):
        assert code == 1 and errors.startswith(words) and len(errors.splitlines()) == 1, errors
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [1]
