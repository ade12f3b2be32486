"""Sample many rows through fewer lanes: where a row ends, its lane takes the next prompt, all in one compiled program."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pgjax.models.causal_lm import CausalLM
from pgjax.models.shared_prompts import firsts, repeated
from pgjax.parallel.sharding import constrain, constrain_batch
from pgjax.rollout.draws import draw_tokens, ends

REFILL = 4  # a part of the lanes is refilled at once: larger ones wait longer, smaller ones are more programs to run


class _Rows(NamedTuple):
    """What the lanes hold of the rows in them; p parts of the mesh with L lanes each."""

    row: jax.Array  # [p, L] which of the part's rows a lane samples
    drawn: jax.Array  # [p, L] tokens drawn for it
    token: jax.Array  # [p, L] the last one
    alive: jax.Array  # [p, L] whether more are to come
    length: jax.Array  # [p, L] of its prompt
    state: jax.Array | None  # [p, L] of its stop strings
    seen: jax.Array  # [p, L, S] the slots that hold its keys and values


class _Lanes(NamedTuple):
    """The loop's state, with S = P + N slots of the cache as a ring."""

    slot: jax.Array  # [] the slot that all lanes write next
    taken: jax.Array  # [p] rows of each part that have been taken
    held: _Rows
    cache: Any  # of all lanes, [p * L, heads, S, hd] a leaf
    # [p, R, N] each: tokens, -1 where none was drawn; log-probabilities; with a value head values and entropies
    written: tuple[jax.Array, ...]


def generate_in_lanes(
    lm: CausalLM, params: Any, prompts: jax.Array, prompt_mask: jax.Array, key: jax.Array, options: dict[str, Any],
    eos: jax.Array, stop_table: jax.Array | None, *, max_new_tokens: int, lanes: int, parts: int, group_size: int,
    value_head: Any, min_new_tokens: int = 0,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Draw completions of all rows; the tokens are those of a loop over all rows at once.

    All lanes write the same slot of their caches at a step, as they would with one row each. The slots are a ring of P + N: a new
    row's prompt is written into the P slots before the present one, so that its keys are overwritten only after N tokens.

    Args:
        lm: the model's functions.
        params: its parameters.
        prompts: [B, P] int32, padded on the left.
        prompt_mask: [B, P] bool.
        key: a typed key.
        options: as of `draws.draw_tokens`.
        eos: as of `draws.ends`.
        stop_table: likewise.
        max_new_tokens: N, the longest completion.
        lanes: rows in the loop at once, a multiple of parts * group_size, at most B.
        parts: of the mesh over which the rows are split; each samples its own rows.
        group_size: adjacent rows with one prompt, which is read once.
        value_head: as of `draws.draw_tokens`.
        min_new_tokens: as of `sample`.

    Returns:
        [B, N] each: the tokens, -1 after a row's end; their log-probabilities; with a value head their values and entropies.
    """
    batch, before = prompts.shape
    rows, width, slots = batch // parts, lanes // parts, before + max_new_tokens
    refill = group_size * max(1, width // (REFILL * group_size))
    prompts, prompt_mask = (x.reshape(parts, rows, before) for x in (prompts, prompt_mask))
    _check_cache(lm, lanes, slots)
    weights = lm.decode_params(params)
    unembedding = lm.unembedding(weights).astype(lm.dtype)
    flat = lambda x: constrain_batch(x.reshape(-1, *x.shape[2:]))
    parted = lambda x: constrain_batch(x.reshape(parts, -1, *x.shape[1:]))

    by_part = lambda x: constrain(x.reshape(parts, -1, *x.shape[1:]), "batch", None, "heads")
    flat_heads = lambda x: constrain(x.reshape(-1, *x.shape[2:]), "batch", "heads")

    def chosen(
        hidden: jax.Array, row: jax.Array, length: jax.Array, drawn: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Draw for rows [p, k] of so many tokens, and so many drawn: the tokens, and all that is written of them."""
        numbers = row + rows * jnp.arange(parts, dtype=jnp.int32)[:, None]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, flat(numbers))
        token, logprob, more = draw_tokens(
            lm.arch, unembedding, hidden, keys, flat(length + drawn), options, value_head,
            (flat(drawn < min_new_tokens), eos) if min_new_tokens else None,
        )  # fmt: skip
        token, *others = (parted(x) for x in (token, logprob, *more))
        return token, (token, *others)

    def advance(lane: _Lanes) -> _Lanes:
        held = lane.held
        seen = held.seen | (jnp.arange(slots) == lane.slot)[None, None]
        inputs = flat(held.token), flat(held.length + held.drawn - 1), lane.slot, flat(seen)
        hidden, cache = lm.decode(weights, *inputs, lane.cache)
        token, found = chosen(hidden, held.row, held.length, held.drawn)
        over, state = ends(token, held.state, eos, stop_table)
        alive = held.alive & ~over & (held.drawn + 1 < max_new_tokens)
        return _Lanes(
            (lane.slot + 1) % slots, lane.taken,
            held._replace(drawn=held.drawn + 1, token=token, alive=alive, state=state, seen=seen), cache,
            _write(lane.written, jnp.where(held.alive, held.row, rows), held.drawn, found),
        )  # fmt: skip

    def wanted(lane: _Lanes) -> jax.Array:
        """Which parts have enough free lanes for the next rows, [p]."""
        return (lane.taken < rows) & (width - lane.held.alive.sum(1) >= refill)

    def refilled(lane: _Lanes) -> _Lanes:
        row = jnp.minimum(lane.taken, rows - refill)[:, None] + jnp.arange(refill, dtype=jnp.int32)[None]
        valid = wanted(lane)[:, None] & (row >= lane.taken[:, None])
        free = jnp.argsort(lane.held.alive, axis=1, stable=True)[:, :refill]
        to = jnp.where(valid, free, width)  # beyond the lanes: nothing is written
        prompt, mask = (jax.vmap(jnp.take, (0, 0, None))(x, row, 0) for x in (prompts, prompt_mask))
        once = (firsts(flat(x), group_size) for x in (prompt, mask))
        read = lm.prefill(params, *once, lm.init_cache(parts * refill // group_size, before))
        hidden, kv = jax.tree.map(lambda x: repeated(x, group_size), read)
        length = mask.sum(2, dtype=jnp.int32)
        token, found = chosen(hidden, row, length, jnp.zeros_like(length))
        over, state = ends(token, None if stop_table is None else jnp.zeros_like(token), eos, stop_table)
        ring = (lane.slot - before + jnp.arange(before)) % slots
        seen = jnp.roll(jnp.pad(mask, ((0, 0), (0, 0), (0, max_new_tokens))), lane.slot - before, axis=2)
        new = _Rows(row, jnp.ones_like(row), token, valid & ~over & (max_new_tokens > 1), length, state, seen)
        put = jax.vmap(lambda x, i, y: x.at[i].set(y, mode="drop"))
        put_slots = jax.vmap(lambda x, i, y: x.at[i[:, None], :, ring[None]].set(y.swapaxes(1, 2), mode="drop"))
        return _Lanes(
            lane.slot, lane.taken + valid.sum(1, dtype=jnp.int32),
            jax.tree.map(lambda x, y: put(x, to, y), lane.held, new),
            jax.tree.map(lambda x, y: flat_heads(put_slots(by_part(x), to, by_part(y))), lane.cache, kv),
            _write(lane.written, jnp.where(valid, row, rows), jnp.zeros_like(row), found),
        )  # fmt: skip

    def round_(lane: _Lanes) -> _Lanes:
        return jax.lax.while_loop(lambda x: x.held.alive.any() & ~wanted(x).any(), advance, refilled(lane))

    blank = jnp.zeros((parts, width), jnp.int32)
    nothing = jnp.zeros((parts, rows, max_new_tokens), jnp.float32)
    written = (jnp.full(nothing.shape, -1, jnp.int32), nothing, *((nothing, nothing) if value_head is not None else ()))
    seen = jnp.zeros((parts, width, slots), bool)
    empty = _Rows(blank, blank, blank, blank != 0, blank, None if stop_table is None else blank, seen)
    lane = _Lanes(jnp.int32(before % slots), jnp.zeros(parts, jnp.int32), empty, lm.init_cache(lanes, slots), written)
    lane = jax.lax.while_loop(lambda x: (x.taken < rows).any(), round_, lane)
    return tuple(flat(x) for x in lane.written)


def _check_cache(lm: CausalLM, lanes: int, slots: int) -> None:
    """Refuse a model of whose cache it is not known where rows and slots are."""
    for leaf in jax.tree.leaves(jax.eval_shape(lambda: lm.init_cache(lanes, slots))):
        if len(leaf.shape) != 4 or (leaf.shape[0], leaf.shape[2]) != (lanes, slots):
            raise ValueError(
                f"lanes need a cache whose leaves are [B, heads, S, head_dim], with B={lanes}, S={slots}; this model's has one "
                f"of {leaf.shape}: leave lanes out"
            )


def _write(
    written: tuple[jax.Array, ...], row: jax.Array, column: jax.Array, found: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """Write what was drawn for rows [p, k] into their columns; a row beyond the last one is left out."""
    put = jax.vmap(lambda x, i, j, y: x.at[i, j].set(y, mode="drop"))
    return tuple(put(x, row, column, y) for x, y in zip(written, found, strict=True))
