"""One of two processes that save and restore together; `tests/test_distributed_snapshots.py` starts both."""

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.parallel import processes, sharding
from pgjax.run import loop
from pgjax.run.checkpoint.checkpoints import BadCheckpoint, Checkpoints, SaveFailed
from pgjax.run.checkpoint.digest import digest


def state_of(mesh: jax.sharding.Mesh | None, number: int) -> dict[str, Any]:
    """An array over the mesh, and what each process holds whole: a key, a counter, a number."""
    w = np.random.default_rng(number).standard_normal((64, 32)).astype(np.float32)
    if mesh is not None:
        w = sharding.place(w, jax.NamedSharding(mesh, jax.P("data", "fsdp")))
    return {"w": jnp.asarray(w), "key": jax.random.key(number), "kl_coef": jnp.float32(number), "n": jnp.int32(number)}


def main(process: int, address: str, folder: Path) -> None:
    """Save, damage one process's file, go on from the last good, and be stopped in four ways; write down what each step found."""
    processes.initialize(address, 2, process)
    mesh = sharding.make_mesh(data=2, fsdp=2)
    found: dict[str, Any] = {}
    with jax.set_mesh(mesh), Checkpoints(folder, made_from={"seed": 0}, keep_best=True) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, state_of(mesh, number), {"step": number}, score=-number)
        restored, _ = checkpoints.restore(state_of(mesh, 0))
        like = state_of(mesh, 2)
        placed = all(jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding == y.sharding, restored, like)))
        found["restored"] = [digest(restored) == digest(like), placed, checkpoints.best()]

        processes.on_process_0(lambda: damage(folder / "2" / "state" / "ocdbt.process_1" / "d"))
        try:
            checkpoints.restore(state_of(mesh, 0))
        except BadCheckpoint as bad:
            found["bad"] = str(bad)
        restored, _, left_out = checkpoints.restore_last_good(state_of(mesh, 0))
        found["last good"] = [digest(restored) == digest(state_of(mesh, 1)), len(left_out), checkpoints.steps()]

        full_at = -1

        def step(state: Any, i: int, work: None) -> tuple[Any, dict[str, Any], None]:
            if process == 1 and i == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return {**state, "n": state["n"] + 1}, {"n": state["n"]}, None

        def report(done: int, metrics: dict[str, float], samples: None) -> None:
            if process == 0 and done == full_at:
                raise OSError(28, "No space left on device")

        def run(state: Any, start: int, save_every: int = 100) -> None:
            loop.run(
                state, start=start, steps=9, prepare=lambda state, i: None, step=step, check=lambda done, metrics: None,
                report=report, checkpoints=checkpoints, save_every=save_every,
            )  # fmt: skip

        def stopped(state: Any, start: int, save_every: int = 100) -> list[Any]:
            try:
                run(state, start, save_every)
            except (loop.Interrupted, OSError, processes.FailedElsewhere, SaveFailed) as error:
                return [type(error).__name__, str(error), processes.is_raised_on_all(error), checkpoints.latest()]
            return []

        found["signal to process 1"] = stopped(restored, 1)
        full_at = 6
        found["report of process 0"] = stopped(checkpoints.restore(state_of(mesh, 0))[0], 4)
        full_at, state = -1, checkpoints.restore(state_of(mesh, 0))[0]
        with full_disk(100) if process == 1 else contextlib.nullcontext():
            found["disk of process 1"] = stopped(state, 6, save_every=1)
        if process == 0:
            (folder / "7.unfinished").touch()  # no folder can be made there
        found["folder of process 0"] = stopped(checkpoints.restore(state_of(mesh, 0))[0], 6, save_every=1)
    (folder.parent / f"found{process}.json").write_text(json.dumps(found))


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let no file grow beyond `room` bytes: writing more fails as it does on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def damage(folder: Path) -> None:
    """Cut the largest of a process's files in half."""
    file = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
