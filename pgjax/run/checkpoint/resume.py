"""How a run goes on after it was stopped: from which state, and only with what that state was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from pgjax.parallel.encoding import plain
from pgjax.parallel.processes import print_once
from pgjax.run.checkpoint.checkpoints import Checkpoints
from pgjax.run.checkpoint.digest import digest

From = Literal["last-good"] | None


def frozen_model(params: Any) -> str | None:
    """Name a model that stays as it is by a fingerprint of every bit of it, wherever it lies.

    Args:
      params: its parameters, in any sharding; None: there is no such model.

    Returns:
      One line, kept in each snapshot in place of a copy; None without a model.

    Example:
      >>> frozen_model({"w": jax.numpy.zeros(2)})
      'digest ...'
    """
    return None if params is None else f"digest {digest(params)}"


def rows_digest(rows: Any) -> str:
    """Fingerprint the rows that a run learns from, or is judged by, in their order: a step's number is its place among them.

    Args:
      rows: whatever users' rows hold, as `encoding.plain` writes it; the order of a row's columns is nothing of it.

    Returns:
      16 hexadecimal digits, the same in every process and every run.

    Example:
      >>> rows_digest([{"prompt": "a"}]) == rows_digest([{"prompt": "b"}])
      False
    """
    try:
        text = json.dumps(rows, default=plain, sort_keys=True)
    except TypeError:  # keys that are no texts
        text = json.dumps(plain(rows), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_checkpoints(
    folder: Path,
    config: Mapping[str, Any],
    may_change: Collection[str],
    *,
    keep: int = 2,
    keep_best: bool = False,
    **made_from: Any,
) -> Checkpoints:
    """Open the snapshots of a run; each holds the config and what else the run is made from, and goes with no other.

    Args:
      folder: of the run.
      config: its fields.
      may_change: those of them that may differ when a run goes on.
      keep: how many of the latest snapshots stay.
      keep_best: whether the one with the best score stays too.
      made_from: frozen models and data, each in a line that names it.

    Returns:
      The snapshots, in `checkpoints` under the folder.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with open_checkpoints(Path(folder), {"seed": 0}, (), reference="a model (digest 1f)") as checkpoints:
      ...         checkpoints.steps()
      []
    """
    fields = {name: value for name, value in config.items() if name not in may_change}
    record = json.loads(json.dumps({"config": fields, **made_from}, default=str))
    return Checkpoints(folder / "checkpoints", keep=keep, keep_best=keep_best, made_from=record)


def last_step(folder: Path) -> int:
    """Read the step of a run's last snapshot off the names in its folder; 0 where there is none.

    Example:
      >>> last_step(Path("no-such-run"))
      0
    """
    return max((int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()), default=0)


def go_on(checkpoints: Checkpoints, state: Any, *, resume: bool, resume_from: From = None) -> tuple[Any, int]:
    """Go on from a run's last state, where one is asked for and there is one; else start from the state given.

    The state given is freed before the saved one is read: there is never room for two.

    Args:
      checkpoints: of the run.
      state: to start from; its arrays say what is read, and onto which devices.
      resume: whether to go on.
      resume_from: "last-good" leaves out, and names, newer snapshots that are damaged or of another run.

    Returns:
      The state, and the number of steps that are done.

    Raises:
      BadCheckpoint: the last snapshot cannot be used, or with "last-good" none can.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
      ...     _ = checkpoints.save(3, {"w": jnp.ones(2)}, {"step": 3})
      ...     go_on(checkpoints, {"w": jnp.zeros(2)}, resume=True)
      going on after step 3
      ({'w': Array([1., 1.], dtype=float32)}, 3)
    """
    if not resume:
        return state, 0
    checkpoints.wait()
    if checkpoints.latest() is None:
        print_once(f"{checkpoints.folder} holds no snapshot: the run starts from the beginning")
        return state, 0
    like = _freed(state)
    if resume_from is None:
        state, extra = checkpoints.restore(like)
    else:
        state, extra, left_out = checkpoints.restore_last_good(like)
        for line in left_out:
            print_once(f"left out: {line}")
    print_once(f"going on after step {extra['step']}")
    return state, extra["step"]


def to_best(checkpoints: Checkpoints, state: Any) -> tuple[Any, int | None]:
    """Exchange a state for the snapshot with the best score; the state given is freed first.

    Args:
      checkpoints: of a run that keeps the best.
      state: of the run.

    Returns:
      That state and its step; the one given and None where no snapshot has a score.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep_best=True) as checkpoints:
      ...     _ = checkpoints.save(3, {"w": jnp.ones(2)}, {"step": 3}, score=0.5)
      ...     to_best(checkpoints, {"w": jnp.zeros(2)})
      ({'w': Array([1., 1.], dtype=float32)}, 3)
    """
    checkpoints.wait()
    best = checkpoints.best()
    return (state, None) if best is None else (checkpoints.restore(_freed(state), best)[0], best)


def _freed(state: Any) -> Any:
    """Give a state's arrays back to the devices; what is left of it says how to restore one like it."""
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if leaf.committed else None),
        state,
    )
    jax.tree.map(lambda leaf: leaf.delete(), state)
    return like
