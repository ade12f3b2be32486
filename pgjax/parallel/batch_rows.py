"""The rows of a batch that each of several processes puts on its devices, and those that it judges.

A process feeds the rows that its own devices hold; where tensor spans processes, they all feed the same rows. It judges a part of
them, so that each row is judged once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pgjax.core.errors import UserError
from pgjax.parallel.sharding import RULES, batch_sharding, check_batch, place


def processes_of_parts(mesh: Mesh | None) -> list[list[int]]:
    """List the processes that hold each of the data x fsdp equal parts of a batch on a device.

    Args:
      mesh: with any of the axes data, fsdp and tensor; None: one device of this process.

    Returns:
      The numbers of the processes, rising, of each part.

    Example:
      >>> from pgjax.parallel.sharding import make_mesh
      >>> processes_of_parts(make_mesh(data=-1))[0], processes_of_parts(None)
      ([0], [[0]])
    """
    if mesh is None:
        return [[jax.process_index()]]
    axes = [mesh.axis_names.index(axis) for axis in RULES["batch"] if axis in mesh.axis_names]
    parts = np.moveaxis(mesh.devices, axes, range(len(axes)))
    count = int(np.prod(parts.shape[: len(axes)]))
    return [sorted({device.process_index for device in part}) for part in parts.reshape(count, -1)]


def rows_to_feed(mesh: Mesh | None, rows: int) -> list[int]:
    """List the rows of a batch that this process feeds: those that its devices hold.

    Args:
      mesh: or None for one device.
      rows: of the whole batch, B.

    Returns:
      Their numbers in the batch, rising.

    Raises:
      UserError: data x fsdp does not divide the rows.

    Example:
      >>> rows_to_feed(None, 3)
      [0, 1, 2]
    """
    return [row for begin, end, _ in _spans_here(mesh, rows) for row in range(begin, end)]


def rows_to_judge(mesh: Mesh | None, rows: int, group_size: int = 1) -> list[int]:
    """List the rows of a batch that this process judges, a part of those it feeds. Every row is judged by one process.

    Args:
      mesh: or None for one device.
      rows: of the whole batch, B.
      group_size: so many adjacent rows have one prompt, and are judged by one process; divides B.

    Returns:
      Their numbers in the batch, rising; there may be none where many processes hold few rows.

    Raises:
      UserError: data x fsdp does not divide the rows, or a group lies with several processes.

    Example:
      >>> rows_to_judge(None, 3)
      [0, 1, 2]
    """
    judged: list[int] = []
    spans = _spans_here(mesh, rows)
    if any(edge % group_size for begin, end, _ in spans for edge in (begin, end)):
        spans = _merged(spans)
    for begin, end, processes in spans:
        if begin % group_size or end % group_size:
            raise UserError(
                f"a group of {group_size} completions of a prompt would be judged by several processes: this one holds the rows "
                f"{begin} to {end - 1} of {rows}; make the batch a multiple of {group_size} for each process"
            )
        rank, count, groups = processes.index(jax.process_index()), len(processes), (end - begin) // group_size
        judged += range(begin + rank * groups // count * group_size, begin + (rank + 1) * groups // count * group_size)
    return judged


def feed(mesh: Mesh | None, tree: Any) -> Any:
    """Put a batch on the devices, its rows over data and fsdp, each process those that it feeds.

    Args:
      mesh: None: on the default device.
      tree: of host arrays [b, ...] with the rows of `rows_to_feed`, in their order.

    Returns:
      The same tree of arrays [B, ...] on the devices.

    Example:
      >>> feed(None, np.arange(2)).tolist()
      [0, 1]
    """
    sharding = batch_sharding(mesh)
    if sharding is None:
        return place(tree, None)
    parts = processes_of_parts(mesh)
    here = _parts_here(parts)

    def spread(x: Any) -> jax.Array:
        size = len(x) // len(here)

        def piece(index: Any) -> Any:
            begin = here.index((index[0].start or 0) // size) * size
            return x[begin : begin + size]

        return jax.make_array_from_callback((size * len(parts), *x.shape[1:]), sharding, piece)

    return jax.tree.map(spread, tree)


def local_rows(x: jax.Array, rows: Sequence[int]) -> np.ndarray:
    """Bring rows of an array to the host from the devices of this process; nothing goes between processes.

    Args:
      x: [B, ...].
      rows: their numbers; this process feeds them.

    Returns:
      [rows, ...], in the order asked for.

    Example:
      >>> import jax.numpy as jnp
      >>> local_rows(jnp.arange(4) * 10, [1, 3]).tolist()
      [10, 30]
    """
    if x.is_fully_addressable:
        return jax.device_get(x)[list(rows)]
    pieces = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    held = {begin + k: row for begin, piece in jax.device_get(pieces).items() for k, row in enumerate(piece)}
    return np.array([held[row] for row in rows], x.dtype).reshape(len(rows), *x.shape[1:])


def _spans_here(mesh: Mesh | None, rows: int) -> list[tuple[int, int, list[int]]]:
    """Where each part that this process holds begins and ends in a batch, and all processes that hold it."""
    check_batch(mesh, rows, "the batch")
    parts = processes_of_parts(mesh)
    size = rows // len(parts)
    return [(part * size, (part + 1) * size, parts[part]) for part in _parts_here(parts)]


def _merged(spans: list[tuple[int, int, list[int]]]) -> list[tuple[int, int, list[int]]]:
    """Join spans that follow each other and lie with the same processes."""
    joined: list[tuple[int, int, list[int]]] = []
    for begin, end, processes in spans:
        if joined and joined[-1][1:] == (begin, processes):
            begin = joined.pop()[0]
        joined.append((begin, end, processes))
    return joined


def _parts_here(parts: Sequence[Sequence[int]]) -> list[int]:
    return [part for part, processes in enumerate(parts) if jax.process_index() in processes]
