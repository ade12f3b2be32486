"""Batches of rows by step number, and the split into training and held-out rows."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pgjax.core.checks import check_whole
from pgjax.core.errors import UserError
from pgjax.run.packages import of_scripts

if TYPE_CHECKING:
    import grain

_UINT32 = 2**32


def batches(
    rows: Sequence[Any], batch_size: int, *, seed: int, group_size: int = 1, places: Sequence[int] | None = None
) -> "grain.MapDataset[list[Any]]":
    """Make an endless data set of batches, in a new order each epoch; the step number is the only state.

    Epoch e is a permutation of the rows drawn from (seed, e). Epochs follow each other without a gap: a batch may hold the
    end of one and the start of the next, and no row is dropped. The batches do not depend on the number of processes; each
    process gets its own rows of them.

    Args:
      rows: anything that can be indexed.
      batch_size: rows of a batch, B; may be larger than the number of rows given, which then come more than once.
      seed: chooses the orders, 0 <= seed < 2^32.
      group_size: so many adjacent rows of a batch are the same row; divides B.
      places: the indices, in 0 to B - 1, of the batch's rows that this process gets, as `batch_rows.rows_to_feed` lists them;
        None: all.

    Returns:
      A grain dataset: ``ds[step]`` is the list of that step's rows, one for each index in ``places``.

    Raises:
      UserError: no rows, a batch size that isn't a positive integer, one that the group size doesn't divide, an index outside the
        batch, or a seed out of range.

    Example:
      >>> ds = batches(["a", "b", "c", "d"], 2, seed=0)
      >>> sorted(ds[0] + ds[1]), ds[1000] == ds[1000]
      (['a', 'b', 'c', 'd'], True)
      >>> batches(["a", "b", "c", "d"], 2, seed=0, places=[1])[0] == ds[0][1:]
      True
    """
    if len(rows) == 0:
        raise UserError("there are no rows to make batches of")
    check_whole("batch_size", batch_size, 1)
    check_whole("group_size", group_size, 1)
    if batch_size % group_size:
        raise UserError(f"a batch of {batch_size} does not divide into groups of {group_size}")
    places = range(batch_size) if places is None else list(places)
    outside = [place for place in places if not 0 <= place < batch_size]
    if outside:
        raise UserError(f"row {outside[0]} is not in a batch of {batch_size}, whose rows are 0 to {batch_size - 1}")
    if not 0 <= seed < _UINT32:
        raise UserError(f"seed is {seed}: it must be in [0, 2^32)")
    grain = of_scripts("grain")  # here, because importing it takes a second that `import pgjax` should not

    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    steps = grain.MapDataset.range(len(order) // batch_size)

    def dealt(step: int) -> list[Any]:
        wanted = [(step * batch_size + place) // group_size for place in places]
        found = {index: order[index] for index in dict.fromkeys(wanted)}  # once a group: an index takes milliseconds
        return [found[index] for index in wanted]

    return steps.map(dealt)


def steps_of(epochs: float, rows: int, batch_size: int) -> int:
    """Count the updates of some passes over the rows: rounded up, so that no row is left out, and at least 1.

    Args:
      epochs: passes; need not be whole.
      rows: how many there are.
      batch_size: rows of an update.

    Returns:
      ceil(epochs * rows / batch_size).

    Example:
      >>> steps_of(2, 96, 8), steps_of(1, 9, 8), steps_of(0.1, 30, 3), steps_of(0.01, 8, 8)
      (24, 2, 1, 1)
    """
    return max(1, math.ceil(round(epochs * rows / batch_size, 9)))  # 0.1 * 30 is 3.0000000000000004


def split_rows(rows: Sequence[Any], held_out: int, seed: int) -> tuple[list[Any], list[Any]]:
    """Split rows at random into training and held-out ones, each in file order.

    Args:
      rows: all rows.
      held_out: how many to hold out, 0 <= held_out < len(rows).
      seed: chooses which.

    Returns:
      The training rows and the held-out rows.

    Raises:
      UserError: held_out out of range.

    Example:
      >>> train, held_out = split_rows(list("abcde"), 2, seed=0)
      >>> len(train), len(held_out), sorted(train + held_out)
      (3, 2, ['a', 'b', 'c', 'd', 'e'])
    """
    if not 0 <= held_out < len(rows):
        raise UserError(f"can't hold out {held_out} of {len(rows)} rows: at least one must be left to train on")
    chosen = set(np.random.default_rng(seed).permutation(len(rows))[:held_out].tolist())
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [rows[index] for index in sorted(chosen)]
