"""Sample completions: one compiled program a prompt bucket, a prefill and then a decode loop over a key-value cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.core.checks import check_whole
from pgjax.data.padding import bucket_length
from pgjax.models.causal_lm import CausalLM, Params
from pgjax.models.shared_prompts import firsts, repeated
from pgjax.parallel.sharding import (
    batch_parts,
    batch_sharding,
    check_batch,
    constrain_batch,
    entered,
    mesh_of,
    place,
    replicated,
)
from pgjax.rollout.draws import Drawn, draw_tokens, ends
from pgjax.rollout.lanes import generate_in_lanes
from pgjax.rollout.sample_checks import check_lanes, check_options, check_prompts

Rows: TypeAlias = jax.typing.ArrayLike | Sequence[Sequence[int]]  # [B, P] of token ids, or of True and False


class Scored(NamedTuple):
    """A model's outputs for given tokens, each [B, W]: the last W entries of the token frame."""

    logprobs: jax.Array  # log pi(token_t | before), nats
    values: jax.Array  # V(before t), units of reward
    entropy: jax.Array  # of the distribution that token t was drawn from, nats


class Rollout(NamedTuple):
    """Prompts and their sampled completions; every field is [B, P + max_new_tokens], in the token frame."""

    tokens: jax.Array  # int32; pad_id before the prompt and after the end
    attention_mask: jax.Array  # bool; True where a token is not padding
    mask: jax.Array  # bool; True where the policy sampled the token, the end-of-sequence token included
    logprobs: jax.Array  # float32; of the distribution sampled from; 0 outside mask


def sample(
    lm: CausalLM,
    params: Params,
    prompts: Rows,
    prompt_mask: Rows,
    key: jax.Array,
    *,
    max_new_tokens: int,
    temperature: jax.typing.ArrayLike = 1.0,
    top_k: jax.typing.ArrayLike | None = None,
    top_p: jax.typing.ArrayLike | None = None,
    min_p: jax.typing.ArrayLike | None = None,
    eos_ids: Sequence[int] = (),
    stop_table: jax.typing.ArrayLike | None = None,
    pad_id: int = 0,
    group_size: int = 1,
    lanes: int | None = None,
    min_new_tokens: int = 0,
) -> Rollout:
    """Continue left-padded prompts until each row's end-of-sequence token or the length limit.

    tokens[i, t] ~ softmax(filter(logits / temperature)) given tokens[i, :t], with the randomness
    fold_in(fold_in(key, i), position): a row's sample depends neither on the other rows, nor on padding or sharding.
    Compiles once for a batch size, a prompt bucket (`data.bucket_length`) and max_new_tokens; temperature, the
    filters, the end-of-sequence ids (up to 8) and pad_id are data. Over a mesh, parameters are gathered over fsdp once,
    before the first step; rows stay split over data and fsdp, heads over tensor.

    Args:
        lm: the model's functions.
        params: its parameters; where they lie on a mesh, that is where it runs.
        prompts: [B, P] token ids, padded on the left.
        prompt_mask: [B, P] True on real tokens; at least one a row.
        key: a typed key.
        max_new_tokens: the longest completion, in tokens.
        temperature: 0 is greedy; log-probabilities are then 0, since the token is certain.
        top_k, top_p, min_p: see `sampling.filter_logits`; None is off.
        eos_ids: ids that end a sequence; none: every completion has the full length.
        stop_table: [S, V] of `data.stop_strings.stop_table`: texts that end a completion too, with the token that completes
            them; None: there are none.
        pad_id: written where there is no token.
        group_size: completions a prompt: so many adjacent rows hold the same one, and its prefill is computed once.
        lanes: rows in the decode loop at once, fewer than B: where a row ends, the next one takes its place. The tokens are the
            same, in less time where lengths differ and with a smaller cache; log-probabilities up to rounding. None: all rows.
        min_new_tokens: so many tokens at least, and then the one that ends it: before, no id that would is drawn.

    Returns:
        A `Rollout`.

    Raises:
        ValueError: shapes, lengths or options that cannot be meant, or rows that the mesh cannot share, with the numbers.

    >>> import jax
    >>> import pgjax as pg
    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
    >>> lm = pg.causal_lm(architecture_of(config))
    >>> rollout = pg.sample(lm, lm.init(jax.random.key(0)), np.array([[0, 5]]), np.array([[False, True]]),
    ...                     jax.random.key(1), max_new_tokens=3)
    >>> rollout.mask.tolist()
    [[False, False, True, True, True]]
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    stops = eos_ids, stop_table
    return _run(
        lm, params, None, prompts, prompt_mask, key, max_new_tokens, options, stops, pad_id, group_size, lanes,
        min_new_tokens,
    )[0]  # fmt: skip


def sample_scored(
    lm: CausalLM,
    params: dict[str, Any],
    prompts: Rows,
    prompt_mask: Rows,
    key: jax.Array,
    *,
    max_new_tokens: int,
    temperature: jax.typing.ArrayLike = 1.0,
    eos_ids: Sequence[int] = (),
    stop_table: jax.typing.ArrayLike | None = None,
    pad_id: int = 0,
    group_size: int = 1,
    lanes: int | None = None,
) -> tuple[Rollout, Scored]:
    """Sample as `sample` does, and return the log-probabilities, values and entropies that the sampler computes anyway.

    They are those of `programs.teacher_force` with the same parameters, up to the rounding between decoding and a whole
    forward pass: 2e-5 nats in float32, more in 16 bits. There are no filters, which would change the distribution.

    Args:
        params: {"lm": parameters, "value": a value head}.
        lm, prompts, prompt_mask, key, max_new_tokens, temperature, eos_ids, stop_table, pad_id, group_size,
            lanes: as of `sample`.

    Returns:
        The rollout of `sample` with the same key, and the policy's outputs for its last max_new_tokens + 1 entries; 0 where
        nothing was sampled.

    Raises:
        ValueError: as `sample`.

    >>> import pgjax as pg
    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
    >>> lm = pg.causal_lm(architecture_of(config))
    >>> params = {"lm": lm.init(jax.random.key(0)), "value": pg.init_value_head(8)}
    >>> _, outputs = sample_scored(lm, params, [[0, 5]], [[False, True]], jax.random.key(1), max_new_tokens=3)
    >>> outputs.entropy.shape
    (1, 4)
    """
    options = {"temperature": temperature, "top_k": None, "top_p": None, "min_p": None}
    head, stops = params["value"], (eos_ids, stop_table)
    return _run(
        lm, params["lm"], head, prompts, prompt_mask, key, max_new_tokens, options, stops, pad_id, group_size, lanes
    )


def _run(
    lm, params, value_head, prompts, prompt_mask, key, max_new_tokens, options, stops, pad_id, group_size, lanes,
    min_new_tokens=0,
):  # fmt: skip
    """Check the arguments and run the compiled program."""
    prompts, prompt_mask = (x if isinstance(x, jax.Array) else np.asarray(x) for x in (prompts, prompt_mask))
    if prompts.dtype.kind not in "iu":
        raise ValueError(f"prompts must be token ids, whole numbers, got {prompts.dtype}")
    prompts, prompt_mask = prompts.astype(np.int32), prompt_mask.astype(np.bool_)
    check_prompts(lm, prompts, prompt_mask, max_new_tokens, group_size)
    eos_ids, stop_table = stops
    check_options(lm.arch.vocab_size, **options, eos_ids=eos_ids)
    if stop_table is not None and (stop_table.ndim != 2 or stop_table.shape[1] != lm.arch.vocab_size):
        raise ValueError(f"stop_table must be [S, {lm.arch.vocab_size}], a column for each id, got {stop_table.shape}")
    check_whole("pad_id", pad_id, 0)
    check_whole("min_new_tokens", min_new_tokens, 0)
    if min_new_tokens > max_new_tokens:
        raise ValueError(f"min_new_tokens={min_new_tokens} is more than max_new_tokens={max_new_tokens}")
    if min_new_tokens and stop_table is not None:
        raise ValueError(
            f"min_new_tokens={min_new_tokens} keeps ids from ending a completion, and no stop strings: leave one out"
        )
    mesh = mesh_of(params)
    check_batch(mesh, len(prompts) // group_size, "prompts")
    parts = batch_parts(mesh)
    check_lanes(lanes, parts, group_size)
    few = None if lanes is None or lanes >= len(prompts) else (lanes, parts)
    length = prompts.shape[1]
    extra = bucket_length(length) - length
    off = {"temperature": 1.0, "top_k": lm.arch.vocab_size, "top_p": 1.0, "min_p": 0.0}
    options = {
        name: _as_scalar(off[name] if x is None else x, np.int32 if name == "top_k" else np.float32)
        for name, x in options.items()
    }
    room = max(8, 1 << (len(eos_ids) - 1).bit_length())
    eos = np.full(room, -1, np.int32)
    eos[: len(eos_ids)] = list(eos_ids)
    prompts, prompt_mask = _with_columns(prompts, extra), _with_columns(prompt_mask, extra)
    batch = place(
        (prompts, prompt_mask), batch_sharding(mesh)
    )  # explicit transfers, so that a transfer guard allows them
    *others, stop_table = place((options, eos, np.int32(pad_id), stop_table), replicated(mesh))
    with entered(mesh):
        rollout, outputs = _generate(
            lm, params, *batch, key, *others,
            max_new_tokens=max_new_tokens, value_head=value_head, group_size=group_size, few=few,
            stop_table=stop_table, min_new_tokens=min_new_tokens,
        )  # fmt: skip
        return _without_columns(rollout, extra) if extra else rollout, outputs


@functools.partial(jax.jit, static_argnames=("lm", "max_new_tokens", "group_size", "few", "min_new_tokens"))
def _generate(
    lm,
    params,
    prompts,
    prompt_mask,
    key,
    options,
    eos,
    pad_id,
    max_new_tokens: int,
    value_head=None,
    group_size: int = 1,
    few: tuple[int, int] | None = None,
    stop_table=None,
    min_new_tokens: int = 0,
) -> tuple[Rollout, Scored | None]:
    prompts, prompt_mask = constrain_batch((prompts, prompt_mask))
    if few is not None:
        drawn = generate_in_lanes(
            lm, params, prompts, prompt_mask, key, options, eos, stop_table, max_new_tokens=max_new_tokens, lanes=few[0],
            parts=few[1], group_size=group_size, value_head=value_head, min_new_tokens=min_new_tokens,
        )  # fmt: skip
        return _joined(prompts, prompt_mask, pad_id, *drawn)
    batch, start = prompts.shape
    length = start + max_new_tokens
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    prompt_lengths = prompt_mask.sum(1, dtype=jnp.int32)
    weights = lm.decode_params(params)
    unembedding = lm.unembedding(weights).astype(lm.dtype)

    def choose(hidden: jax.Array, step: jax.Array) -> Drawn:
        closed = (jnp.broadcast_to(step < min_new_tokens, batch), eos) if min_new_tokens else None
        return draw_tokens(lm.arch, unembedding, hidden, row_keys, prompt_lengths + step, options, value_head, closed)

    def write(step: jax.Array, alive: jax.Array, chosen: tuple[Any, ...], written: tuple[Rollout, Any]) -> Any:
        token, *outputs = chosen
        logprob, more = jax.tree.map(lambda x: jnp.where(alive, x, 0.0), outputs)
        column = Rollout(jnp.where(alive, token, pad_id), alive, alive, logprob), more
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start + step, axis=1)
        return constrain_batch(jax.tree.map(lambda x, y: put(x, y[:, None]), written, column))

    def advance(carry):
        step, token, alive, state, written, cache = carry
        index = start + step  # where the token that is read now stands; the one drawn goes one further
        slots = jnp.where(columns < start, seen, columns <= index)
        hidden, cache = lm.decode(weights, token, prompt_lengths + step, index, slots, cache)
        chosen = token, *_ = choose(hidden, step + 1)
        written = write(step + 1, alive, chosen, written)
        over, state = ends(token, state, eos, stop_table)
        return step + 1, token, alive & ~over, state, written, cache

    def unfinished(carry):
        step, _, alive, *_ = carry
        return (step + 1 < max_new_tokens) & alive.any()

    columns = jnp.arange(length, dtype=jnp.int32)[None, :]
    grow = functools.partial(jnp.pad, pad_width=((0, 0), (0, max_new_tokens)))
    seen = grow(prompt_mask)
    blank = jnp.zeros((batch, length), jnp.float32)
    rollout = Rollout(jnp.where(seen, grow(prompts), pad_id), seen, jnp.zeros_like(seen), blank)
    once = (firsts(x, group_size) for x in (prompts, prompt_mask))
    read = lm.prefill(params, *once, lm.init_cache(batch // group_size, length))
    hidden, cache = jax.tree.map(lambda x: repeated(x, group_size), read)
    alive = jnp.ones(batch, bool)
    step = jnp.int32(0)
    chosen = token, _, more = choose(hidden, step)
    written = write(step, alive, chosen, (rollout, jax.tree.map(lambda _: blank, more)))
    over, state = ends(token, None if stop_table is None else jnp.zeros(batch, jnp.int32), eos, stop_table)
    carry = step, token, alive & ~over, state, written, cache
    rollout, more = jax.lax.while_loop(unfinished, advance, carry)[4]
    if value_head is None:
        return rollout, None
    return rollout, Scored(*(x[:, -(max_new_tokens + 1) :] for x in (rollout.logprobs, *more)))


def _joined(
    prompts: jax.Array, prompt_mask: jax.Array, pad_id: jax.Array, tokens: jax.Array, *outputs: jax.Array
) -> tuple[Rollout, Scored | None]:
    """Put prompts and what was drawn, [B, N] with -1 where nothing was, into the token frame."""
    sampled = tokens >= 0
    join = functools.partial(jnp.concatenate, axis=1)
    rollout = Rollout(
        jnp.where(join((prompt_mask, sampled)), join((prompts, tokens)), pad_id), join((prompt_mask, sampled)),
        join((jnp.zeros_like(prompt_mask), sampled)), join((jnp.zeros(prompts.shape, jnp.float32), outputs[0])),
    )  # fmt: skip
    scored = [jnp.pad(x, ((0, 0), (1, 0))) for x in outputs]
    return constrain_batch((rollout, Scored(*scored) if len(scored) > 1 else None))


def _with_columns(x: jax.Array | np.ndarray, count: int) -> jax.Array | np.ndarray:
    return _pad_left(x, count) if isinstance(x, jax.Array) else np.pad(x, ((0, 0), (count, 0)))


# Outside jit, a pad or a slice would transfer its numbers to the device implicitly.
@functools.partial(jax.jit, static_argnames="count")
def _pad_left(x: jax.Array, count: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (count, 0)))


@functools.partial(jax.jit, static_argnames="count")
def _without_columns(rollout: Rollout, count: int) -> Rollout:
    return constrain_batch(jax.tree.map(lambda x: x[:, count:], rollout))


def _as_scalar(x: jax.typing.ArrayLike, dtype: type[np.generic]) -> jax.Array | np.generic:
    return x.astype(dtype) if isinstance(x, jax.Array) else dtype(x)
