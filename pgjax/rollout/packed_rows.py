"""Sequences of a batch packed into rows of one length, by an index map: what is computed there comes back to [N, W] by a gather.

A packed row holds groups, one after the other; a group is a prompt and behind it some of its completions, each of which sees the
prompt and itself. Only the forward pass is packed. Losses, advantages and masks stay in the frame of the batch.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.core.errors import UserError
from pgjax.data.padding import bucket_length
from pgjax.models.causal_lm import CausalLM
from pgjax.models.shared_prompts import same_prompts
from pgjax.parallel.sharding import constrain, constrain_batch

LONGEST = 512  # tokens of a row, unless a sequence is longer: attention costs by the square
EVEN = 0.9  # the share of a batch's columns that are tokens, from which on its sequences count as equally long


class PackedRows(NamedTuple):
    """Where the tokens of N sequences stand in S steps of R rows of L columns; of S, the first `steps` are used."""

    steps: Any  # [] int32
    source: Any  # [S, R, L] int32, the entry of the flattened batch [N * T]; -1 on padding
    segment_ids: Any  # [S, R, L] int32, the group's number in its row, from 1; 0 on padding
    branch_ids: Any  # [S, R, L] int32, 0 on a prompt, and the completion's number in its group from 1
    before: Any  # [S, R, L] int32, the column of the state that predicts the sampled token number k of the row
    sampled: Any  # [S, R, L] int32, the entry of that token in the flattened batch, at k + 1; -1 elsewhere
    step: Any  # [N] int32, where a sequence's sampled tokens stand
    row: Any  # [N] int32
    first: Any  # [N] int32, the place of the first of them in `sampled`
    lengths: Any  # [N] int32, how many there are


@functools.partial(jax.jit, static_argnames="window")
def sequence_lengths(attention_mask: jax.Array, mask: jax.Array, *, window: int) -> jax.Array:
    """Count each sequence's tokens: [2, N] int32, of prompts and of completions, on every device whole.

    Args:
        attention_mask: [N, T] of a rollout.
        mask: [N, T], True where a token was sampled.
        window: as of `read_packed`.

    Example:
        >>> mask = jnp.array([[False, False, True, True], [False, False, True, False]])
        >>> sequence_lengths(mask | jnp.array([[False, True, False, False]]), mask, window=3).tolist()
        [[1, 1], [2, 1]]
    """
    prompts = attention_mask[:, : attention_mask.shape[1] - window + 1]
    return constrain(jnp.stack([prompts.sum(1, dtype=jnp.int32), mask.sum(1, dtype=jnp.int32)]))


def pack_rows(
    prompt_lengths: np.ndarray, lengths: np.ndarray, *, columns: int, prompt_columns: int, group_size: int, pack_tokens: int,
    parts: int = 1,
) -> PackedRows:  # fmt: skip
    """Plan the rows of a batch on the host, in a shape that other lengths seldom change.

    Args:
        prompt_lengths: [N] tokens of each prompt, which ends in column prompt_columns.
        lengths: [N] sampled tokens, which stand behind it.
        columns: T of the batch.
        prompt_columns: P of them.
        group_size: so many adjacent sequences have one prompt; those in the same row share it.
        pack_tokens: of the rows that a device computes at once.
        parts: devices that share the rows of a step.

    Returns:
        NumPy arrays. L is 512, or the bucket of the longest sequence, and pack_tokens at most; where lengths hardly vary, what
        a group takes.

    Raises:
        UserError: a sequence of the batch may be longer than pack_tokens.

    Example:
        >>> rows = pack_rows(np.array([2, 2]), np.array([3, 1]), columns=5, prompt_columns=2, group_size=2, pack_tokens=8)
        >>> rows.source[: rows.steps].tolist(), rows.branch_ids[: rows.steps].tolist()
        ([[[0, 1, 2, 3, 4, 7, -1, -1]]], [[[0, 0, 1, 1, 1, 2, 0, 0]]])
        >>> rows.before[: rows.steps].tolist()
        [[[1, 2, 3, 1, 0, 0, 0, 0]]]
    """
    if columns > pack_tokens:
        raise UserError(f"pack_tokens={pack_tokens} holds no row of {columns} tokens: make it at least {columns}")
    length = _row_length(prompt_lengths, lengths, group_size, pack_tokens)
    filled = _assigned(prompt_lengths.tolist(), lengths.tolist(), group_size, length)
    together = pack_tokens // length * parts
    count = -(-len(lengths) // together)
    shape = count * together, length
    source, sampled = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    segment_ids, branch_ids, before = (np.zeros(shape, np.int32) for _ in range(3))
    row_of, first = np.zeros(len(lengths), np.int32), np.zeros(len(lengths), np.int32)
    for row, groups in enumerate(filled):
        column = drawn = 0
        for segment, (group, members) in enumerate(groups.items(), start=1):
            leader, known = group * group_size, int(prompt_lengths[group * group_size])
            begin = leader * columns + prompt_columns
            source[row, column : column + known] = np.arange(begin - known, begin)
            segment_ids[row, column : column + known] = segment
            column += known
            last = column - 1
            for branch, member in enumerate(members, start=1):
                new = int(lengths[member])
                here = slice(column, column + new)
                entries = member * columns + prompt_columns + np.arange(new)
                source[row, here], segment_ids[row, here], branch_ids[row, here] = entries, segment, branch
                before[row, drawn : drawn + new] = [last, *range(column, column + new - 1)][:new]
                sampled[row, drawn + 1 : drawn + 1 + new] = entries
                row_of[member], first[member] = row, drawn + 1
                column, drawn = column + new, drawn + new
    steps = np.int32(-(-len(filled) // together))
    by_step = lambda x: x.reshape(count, together, length)
    of_rows = by_step(source), by_step(segment_ids), by_step(branch_ids), by_step(before), by_step(sampled)
    return PackedRows(steps, *of_rows, row_of // together, row_of % together, first, lengths.astype(np.int32))


def _row_length(prompt_lengths: np.ndarray, lengths: np.ndarray, group_size: int, pack_tokens: int) -> int:
    """Choose L: where lengths vary, what wastes little at the ends of rows; where they do not, what one group fills."""
    real = prompt_lengths[::group_size].sum() + lengths.sum()
    group = int(prompt_lengths.max() + group_size * lengths.max())
    longest = bucket_length(int((prompt_lengths + lengths).max()))
    widest = min(max(longest, LONGEST), pack_tokens)
    return min(group, widest) if real * group_size >= EVEN * len(lengths) * group else widest


def _assigned(
    prompts: Sequence[int], lengths: Sequence[int], group_size: int, length: int
) -> list[dict[int, list[int]]]:
    """Fill rows by best fit, groups together as far as they fit: each row's groups, and of each the sequences in it."""
    rows: list[dict[int, list[int]]] = []
    rooms: list[tuple[int, int]] = []  # (free columns, row), sorted

    def put(group: int, members: Sequence[int], needed: int) -> None:
        found = bisect.bisect_left(rooms, (needed, -1))
        room, row = rooms.pop(found) if found < len(rooms) else (length, len(rows))
        if row == len(rows):
            rows.append({})
        rows[row][group] = [*rows[row].get(group, []), *members]
        bisect.insort(rooms, (room - needed, row))

    groups = []
    for leader in range(0, len(lengths), group_size):
        members = sorted(range(leader, leader + group_size), key=lambda i: -lengths[i])
        groups.append((prompts[leader] + sum(lengths[i] for i in members), leader // group_size, members))
    for needed, group, members in sorted(groups, key=lambda x: (-x[0], x[1])):
        if needed <= length:
            put(group, members, needed)
            continue
        # Too long for one row: as many as fit share a prompt, the longest first.
        left = members
        while left:
            taken, room = [], length - prompts[group * group_size]
            for i in left:
                if lengths[i] <= room:
                    taken.append(i)
                    room -= lengths[i]
            put(group, taken, length - room)
            left = [i for i in left if i not in taken]
    return rows


def step_of(rows: PackedRows, number: jax.Array) -> PackedRows:
    """Take the rows of one step; `steps` becomes its number."""
    of_steps = {
        name: getattr(rows, name)[number] for name in ("source", "segment_ids", "branch_ids", "before", "sampled")
    }
    return rows._replace(steps=number, **of_steps)


def members(rows: PackedRows) -> jax.Array:
    """Say which sequences stand in the rows of a step (`step_of`): [N] bool."""
    return rows.step == rows.steps


def read_packed(
    read: Callable[[jax.Array, jax.Array, jax.Array], Any], lm: CausalLM, params: Any, unembedding: jax.Array,
    tokens: jax.Array, attention_mask: jax.Array, rows: PackedRows, *, window: int, group_size: int,
) -> Any:  # fmt: skip
    """Run a model over the packed rows of one step, and bring what is read off them back to the batch.

    Args:
        read: (states [R, L, D], unembedding, tokens [R, L]) -> a tree of [R, L] in the token frame: entry k is about
            tokens[:, k], and of the state k - 1.
        lm: the model's functions.
        params: its parameters.
        unembedding: [V, D].
        tokens: [N, T] of the batch.
        attention_mask: [N, T].
        rows: of `step_of`.
        window: W, the last entries of the frame; the first of them is the prompt's last token.
        group_size: as of `pack_rows`.

    Returns:
        The tree, of [N, W]: 0 where nothing was sampled, and in sequences of other steps; NaN where a prompt is not its group's.
    """
    flat = tokens.reshape(-1)
    taken = lambda entry: constrain_batch(jnp.where(entry < 0, 0, flat[jnp.maximum(entry, 0)]))
    segments = constrain_batch((rows.source >= 0, rows.segment_ids))
    hidden = lm.hidden(params, taken(rows.source), *segments, branch_ids=constrain_batch(rows.branch_ids))
    states = jnp.take_along_axis(hidden, rows.before[:, :, None], axis=1, mode="clip")
    found = read(constrain(states, "batch"), unembedding, taken(rows.sampled))
    column = jnp.arange(window, dtype=jnp.int32)[None] - 1
    here = members(rows)[:, None] & (column >= 0) & (column < rows.lengths[:, None])
    place = jnp.where(here, rows.row[:, None] * rows.source.shape[1] + rows.first[:, None] + column, 0)
    alike = same_prompts(tokens, attention_mask, tokens.shape[1] - window + 1, group_size)
    fill = jnp.where(alike, 0.0, jnp.nan)[:, None]

    def back(x: jax.Array) -> jax.Array:
        x = jnp.where(here, x.reshape(-1)[place], 0)
        return constrain_batch(x + fill.astype(x.dtype))

    return jax.tree.map(back, found)


def read_all_packed(
    read: Callable[[jax.Array, jax.Array, jax.Array], Any], lm: CausalLM, params: Any, unembedding: jax.Array,
    tokens: jax.Array, attention_mask: jax.Array, rows: PackedRows, *, window: int, group_size: int,
) -> Any:  # fmt: skip
    """Read off the packed rows of all steps, one step at a time, as many as are used; the arguments are those of `read_packed`.

    Returns:
        The tree, of [N, W]: 0 where nothing was sampled.
    """
    arguments = read, lm, params, unembedding, tokens, attention_mask
    of_step = functools.partial(read_packed, *arguments, window=window, group_size=group_size)

    def one(number: jax.Array, found: Any) -> Any:
        now = step_of(rows, number)
        return jax.tree.map(lambda x, y: jnp.where(members(now)[:, None], y, x), found, of_step(now))

    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_step, step_of(rows, rows.steps)))
    return constrain_batch(jax.lax.fori_loop(0, rows.steps, one, constrain_batch(blank)))
