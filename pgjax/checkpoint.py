"""Save and restore training state with orbax; no other file sees orbax."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

Tree = Any


class _Leaf(NamedTuple):
    """What is stored of one array: its shape and its dtype (of the raw bits, for a typed PRNG key)."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def _name(path: tuple[Any, ...]) -> str:
    """Name a leaf by the keys on the way to it, as orbax does on disk ("params.embed.tokens")."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored_form(leaf: Any) -> _Leaf:
    """Give the shape and dtype under which a leaf is stored: a typed key is stored as its raw bits."""
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return _Leaf(tuple(leaf.shape), np.dtype(leaf.dtype))


def _leaves(tree: Tree) -> dict[str, _Leaf]:
    """List the arrays of a tree by name."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise ValueError(
                f"a checkpoint holds arrays only, but {_name(path)} is a {type(leaf).__name__}: "
                "pass plain numbers in extra"
            )
        found[_name(path)] = _stored_form(leaf)
    return found


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    return None if isinstance(leaf, np.ndarray) else leaf.sharding


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """Say where a leaf goes on restore: its own sharding, or the first local device when it has none."""
    sharding = _sharding(leaf)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _recommit(like: Any, restored: jax.Array) -> jax.Array:
    """Free a restored array from its device where `like` was free too.

    orbax commits all it restores to a device. A key or a counter that was free before would then refuse to
    enter one program with parameters that are spread over a mesh. A leaf without a sharding is free as well.
    """
    if like.committed if isinstance(like, jax.Array) else _sharding(like) is not None:
        return restored
    if _is_key(like):
        bits = jnp.array(np.asarray(jax.random.key_data(restored)))
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(restored))
    return jnp.array(np.asarray(restored))


def _differences(wanted: Mapping[str, _Leaf], stored: Mapping[str, _Leaf]) -> list[str]:
    """Say of each leaf how the tree on disk differs from the one asked for."""
    lines = [f"{name} is not in the checkpoint" for name in wanted if name not in stored]
    lines += [f"{name} is in the checkpoint only" for name in stored if name not in wanted]
    for name, want in wanted.items():
        have = stored.get(name, want)
        if have != want:
            lines.append(f"{name} is {have.dtype}{list(have.shape)}, expected {want.dtype}{list(want.shape)}")
    return lines


def _quiet() -> None:
    """Keep orbax's notes on its own internals off the user's terminal; errors still show."""
    logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """Keep the last few training states of a run in a folder.

    A checkpoint is a tree of arrays (`state`: parameters, optimizer state, typed keys, in any sharding) and a
    JSON object (`extra`: the step, the place in the data, the KL coefficient). It appears under its final
    name only when it is whole, so a killed save leaves the one before it as the latest.

    Args:
        folder: where the checkpoints lie, one folder a step; made if it is not there.
        keep: how many of the latest checkpoints stay on disk.

    Raises:
        ValueError: `keep` is below 1.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp
        >>> from pgjax.checkpoint import Checkpoints
        >>> state = {"w": jnp.arange(3.0), "key": jax.random.key(0)}
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        ...     _ = checkpoints.save(10, state, {"kl_coef": 0.05})
        ...     restored, extra = checkpoints.restore(state)
        >>> restored["w"], extra
        (Array([0., 1., 2.], dtype=float32), {'kl_coef': 0.05})
    """

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
        _quiet()
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        # handlers by name: without them a new manager cannot read the tree of a checkpoint it did not write
        handlers = {"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def save(self, step: int, state: Tree, extra: Mapping[str, Any]) -> bool:
        """Save a state in the background.

        The state is safe when this returns: its buffers may be donated to the next update at once. Disk errors
        surface in the next `save`, `wait` or `close`.

        Args:
            step: the number of finished training steps; above every step saved before.
            state: a tree of arrays.
            extra: a JSON object (tuples come back as lists).

        Returns:
            True; False when this step is saved already, in which case nothing is done.

        Raises:
            ValueError: a later step is saved already, a leaf is not an array, or `extra` holds NaN or inf.
        """
        latest = self.latest()
        if latest == step:
            return False
        if latest is not None and latest > step:
            raise ValueError(f"{self.folder} holds step {latest} already, so step {step} cannot be saved in it")
        if isinstance(state, jax.Array):
            raise ValueError("state must be a tree of arrays, such as a dict, not one array")
        _leaves(state)
        extra = json.loads(json.dumps(dict(extra), allow_nan=False))
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra))
        return bool(self._manager.save(step, args=args, force=True))

    def steps(self) -> list[int]:
        """List the steps whose checkpoints are on disk or on their way there, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Give the latest saved step, None when there is none."""
        return self._manager.latest_step()

    def restore(self, state_like: Tree, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
        """Restore a state, bit for bit, onto the shardings asked for.

        Args:
            state_like: a tree of arrays or of `jax.ShapeDtypeStruct`: the structure, shapes, dtypes and
                shardings wanted. A leaf without a sharding comes back uncommitted, on the default device.
            step: which checkpoint; None for the latest.

        Returns:
            The state and the `extra` that was saved with it.

        Raises:
            ValueError: there is no such checkpoint, it cannot be read, or it holds another tree, other shapes or
                other dtypes; the folder, the step and the array concerned are named.
        """
        self.wait()
        step = self._existing(step)
        self._check_tree(step, _leaves(state_like))
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(_target, state_like)), extra=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:  # orbax raises plain Exception when it meets a truncated file
            raise self._unreadable(step, error) from error
        return jax.tree.map(_recommit, state_like, restored["state"]), restored["extra"]

    def wait(self) -> None:
        """Wait until every save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until every save is on disk, and let go of the folder."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise ValueError(f"{self.folder} holds no checkpoint")
        if step is not None and step not in steps:
            raise ValueError(f"{self.folder} holds no checkpoint of step {step}, only of steps {steps}")
        return steps[-1] if step is None else step

    def _check_tree(self, step: int, wanted: Mapping[str, _Leaf]) -> None:
        """Refuse another tree before orbax does: it would cast another dtype in silence."""
        try:
            metadata = self._manager.item_metadata(step)["state"]
            stored = {
                leaf.name: _Leaf(tuple(leaf.shape), np.dtype(leaf.dtype))
                for leaf in jax.tree.leaves(metadata.tree)
                if isinstance(leaf, ocp.metadata.ArrayMetadata)
            }
        except Exception as error:  # a damaged index surfaces as KeyError, AttributeError, JSON errors and more
            raise self._unreadable(step, error) from error
        lines = _differences(wanted, stored)
        if lines:
            shown = "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
            raise ValueError(f"the checkpoint of step {step} in {self.folder} is of another state: {shown}")

    def _unreadable(self, step: int, error: Exception) -> ValueError:
        """Name the damaged checkpoint, the array whose reading failed, and what the user can do."""
        text = str(error)
        found = re.search(r"""'path': '([^/']+)/'|"([^"/]+)/\.zarray\"""", text)
        leaf = f" at {found.group(1) or found.group(2)}" if found else ""
        others = [other for other in self.steps() if other != step]
        mend = f"; delete {self.folder / str(step)} to go on from step {others[-1]}" if others else ""
        reason = text.split("\n")[0][:200]
        return ValueError(f"the checkpoint of step {step} in {self.folder} is damaged{leaf}{mend} ({reason})")
