"""Prompts on their way to the model: encoded, padded, and dealt out in batches found by step number."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pgjax.core.checks import check_whole
from pgjax.core.errors import UserError

if TYPE_CHECKING:
    import grain

_UINT32 = 2**32


def batches(
    rows: Sequence[Any], batch_size: int, *, seed: int, group_size: int = 1, own: Sequence[int] | None = None
) -> "grain.MapDataset[list[Any]]":
    """Deal rows out in batches for ever, in a new order each epoch; the step number is the only state.

    Epoch e is a permutation of the rows drawn from (seed, e), and the epochs follow each other without a gap,
    so a batch may hold the end of one and the start of the next, and no row is dropped. The batches are the same, whatever
    the number of processes; each is dealt its own part of them alone.

    Args:
      rows: anything that can be indexed.
      batch_size: places of a batch, B; may be larger than the number of rows, which then come more than once.
      seed: chooses the orders, 0 <= seed < 2^32.
      group_size: so many adjacent places of a batch get the same row; divides B.
      own: the places, in 0 to B - 1, that this process is dealt, as `batch_rows.rows_to_feed` lists them; None is all.

    Returns:
      A grain dataset: ``ds[step]`` is the list of that step's rows, one for each own place.

    Raises:
      ValueError: no rows, a batch size that isn't a positive integer, one that the group size doesn't divide, an own place
        outside the batch, or a seed out of range.

    Example:
      >>> ds = batches(["a", "b", "c", "d"], 2, seed=0)
      >>> sorted(ds[0] + ds[1]), ds[1000] == ds[1000]
      (['a', 'b', 'c', 'd'], True)
      >>> batches(["a", "b", "c", "d"], 2, seed=0, own=[1])[0] == ds[0][1:]
      True
    """
    if len(rows) == 0:
        raise UserError("there are no rows to make batches of")
    check_whole("batch_size", batch_size, 1)
    check_whole("group_size", group_size, 1)
    if batch_size % group_size:
        raise UserError(f"a batch of {batch_size} does not divide into groups of {group_size}")
    places = range(batch_size) if own is None else list(own)
    outside = [place for place in places if not 0 <= place < batch_size]
    if outside:
        raise UserError(f"place {outside[0]} is not in a batch of {batch_size}, whose places are 0 to {batch_size - 1}")
    if not 0 <= seed < _UINT32:
        raise UserError(f"seed is {seed}: it must be in [0, 2^32)")
    import grain  # here, because importing it takes a second that `import pgjax` should not

    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    steps = grain.MapDataset.range(len(order) // batch_size)

    def dealt(step: int) -> list[Any]:
        asked = [(step * batch_size + place) // group_size for place in places]
        found = {
            index: order[index] for index in dict.fromkeys(asked)
        }  # once a group: an index takes a few ms of few rows
        return [found[index] for index in asked]

    return steps.map(dealt)


def split_rows(rows: Sequence[Any], held_out: int, seed: int) -> tuple[list[Any], list[Any]]:
    """Split rows at random into training and held-out ones, each in file order.

    Args:
      rows: all rows.
      held_out: how many to hold out, 0 <= held_out < len(rows).
      seed: chooses which.

    Returns:
      The training rows and the held-out rows.

    Raises:
      ValueError: held_out out of range.

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
