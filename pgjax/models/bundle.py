"""A model of any library as a `CausalLM`: from two functions, with a cache of the model's own or without one."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pgjax.core.checks import check_whole
from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture
from pgjax.models.causal_lm import CausalLM, Params, logits_of, unchanged

_DEFAULTS = {x.name: x.default for x in dataclasses.fields(Architecture) if x.default is not dataclasses.MISSING}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is known of a model that is not pgjax's transformer; an option that only that one has is off.

    >>> Sizes(vocab_size=11, max_positions=32).width
    Traceback (most recent call last):
    pgjax.UserError: this model was made by pg.bundle, which does not know its width: only pgjax's own transformer ...
    """

    vocab_size: int
    max_positions: int

    def __getattr__(self, name: str) -> Any:
        if name in _DEFAULTS:
            return _DEFAULTS[name]
        if name.startswith("_"):  # Python looks for many, and takes an AttributeError for no
            raise AttributeError(name)
        raise UserError(
            f"this model was made by pg.bundle, which does not know its {name}: only pgjax's own transformer "
            "(pg.causal_lm, pg.load) can be saved in Hugging Face layout, given a reward head or have its work counted"
        )


def bundle(
    hidden: Callable[[Params, jax.Array], jax.Array],
    unembedding: Callable[[Params], jax.Array],
    *,
    vocab_size: int,
    max_positions: int,
    dtype: Any = jnp.float32,
    init: Callable[[jax.Array], Params] | None = None,
    init_cache: Callable[..., Any] | None = None,
    prefill: Callable[..., Any] | None = None,
    decode: Callable[..., Any] | None = None,
    decode_params: Callable[[Params], Params] | None = None,
) -> CausalLM:
    """Make a `CausalLM` of a model that is not pgjax's: NNX, Equinox, Haiku, Tunix, a function of a dict.

    Parameters are any tree of floating-point arrays; only these functions read it. Make the bundle once: programs are compiled
    for its functions. Rows reach `hidden` with their tokens first and padding (id 0) behind, where a causal model does not see
    it, so `hidden` needs no mask, and its positions are those of an unpadded text.

    Without a cache, each new token takes a forward pass over its whole row: a completion of N tokens after P takes N (P + N)
    tokens of work where a cache takes P + N. The first sampling warns of it.

    Args:
        hidden: (params, tokens[B,T]) -> [B,T,D], what the unembedding is multiplied by: after the last norm; causal, without
            dropout. T is at most `max_positions`.
        unembedding: (params) -> [V,D], so that logits = hidden @ unembedding.T. A head with a bias: append 1 to each
            hidden state, and the bias as a last column here.
        vocab_size: V.
        max_positions: the longest text, in tokens.
        dtype: of the hidden states.
        init: (key) -> params.
        init_cache, prefill, decode: all three or none, as `CausalLM` describes them; the prompts that `prefill` gets are padded
            on the left.
        decode_params: (params) -> what prefill, decode and unembedding get while sampling, made once a call; None: params.

    Returns:
        A `CausalLM` whose `arch` knows the two sizes. Packed rows (segment_ids) are refused.

    Raises:
        ValueError: a size below 1, or a part of a cache.

    >>> import pgjax as pg
    >>> def hidden(params, tokens):  # the mean of the embeddings so far
    ...     states = jnp.cumsum(params["table"][tokens], axis=1)
    ...     return states / jnp.arange(1.0, tokens.shape[1] + 1)[None, :, None]
    >>> lm = pg.bundle(hidden, lambda params: params["table"], vocab_size=11, max_positions=32)
    >>> params = {"table": jax.random.normal(jax.random.key(0), (11, 4))}
    >>> with warnings.catch_warnings(action="ignore"):
    ...     rollout = pg.sample(lm, params, [[0, 5]], [[False, True]], jax.random.key(1), max_new_tokens=3)
    >>> rollout.mask.tolist()
    [[False, False, True, True, True]]
    """
    check_whole("vocab_size", vocab_size, 1)
    check_whole("max_positions", max_positions, 1)
    cache = {"init_cache": init_cache, "prefill": prefill, "decode": decode}
    missing = [name for name, function in cache.items() if function is None]
    if 0 < len(missing) < 3:
        raise UserError(f"a cache takes init_cache, prefill and decode: {' and '.join(missing)} missing")

    def on_rows(
        params: Params,
        tokens: jax.Array,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        prompt_length: int = 0,
        group_size: int = 1,  # an option to do less work, with the same result
    ) -> jax.Array:
        if segment_ids is not None:
            raise UserError("a model made by pg.bundle takes one text a row, not packed rows with segment_ids")
        if attention_mask is None:
            attention_mask = jnp.ones(tokens.shape, bool)
        return _on_aligned(hidden, params, tokens, attention_mask, max_positions).astype(dtype)

    def apply(params: Params, tokens: jax.Array, *masks: Any, **named: Any) -> jax.Array:
        return logits_of(on_rows(params, tokens, *masks, **named), unembedding(params))

    def no_init(key: jax.Array) -> Params:
        raise UserError("this model was made by pg.bundle without init: give the parameters that you have")

    by_cache: Any = _without_cache(on_rows) if missing else (init_cache, prefill, decode)
    sizes: Any = Sizes(vocab_size, max_positions)  # what of an Architecture is read
    functions = (init or no_init, apply, on_rows, unembedding, *by_cache, decode_params or unchanged)
    return CausalLM(sizes, jnp.dtype(dtype), *functions)


def _on_aligned(
    hidden: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    tokens: jax.Array,
    attention_mask: jax.Array,
    max_positions: int,
) -> jax.Array:
    """Run a model on rows moved to the left, so that padding stands behind them; NaN past the last position there is."""
    real = attention_mask.astype(bool)
    place = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
    first = jnp.argsort(~real, axis=1, stable=True)[:, :max_positions]
    aligned = jnp.take_along_axis(jnp.where(real, tokens, 0), first, axis=1)
    states = hidden(params, aligned)
    if states.ndim != 3 or states.shape[:2] != aligned.shape:
        raise UserError(f"hidden must return [B, T, D] for tokens [B, T] = {aligned.shape}, got {states.shape}")
    inside = jnp.minimum(place, aligned.shape[1] - 1)
    found = jnp.take_along_axis(states, inside[:, :, None], axis=1)
    return jnp.where((place < max_positions)[:, :, None], found, jnp.nan)


def _without_cache(hidden: Callable[..., jax.Array]) -> tuple[Callable[..., Any], ...]:
    """Decode with the row's tokens in place of a cache: every step reads all of them again."""

    @functools.cache
    def warn() -> None:
        warnings.warn(
            "this model has no cache, so every sampled token takes a forward pass over its whole row: give pg.bundle "
            "init_cache, prefill and decode to sample faster",
            stacklevel=2,
        )

    def init_cache(batch: int, length: int) -> jax.Array:
        warn()
        return jnp.zeros((batch, length), jnp.int32)

    def prefill(
        params: Params, tokens: jax.Array, attention_mask: jax.Array | None, cache: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        read = jax.lax.dynamic_update_slice_in_dim(cache, tokens, 0, axis=1)
        return hidden(params, tokens, attention_mask)[:, -1], read

    def decode(
        params: Params, token: jax.Array, position: jax.Array, index: jax.Array, slots: jax.Array, cache: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        read = jax.lax.dynamic_update_slice_in_dim(cache, token[:, None], index, axis=1)
        states = hidden(params, read, slots)
        return jax.lax.dynamic_index_in_dim(states, index, axis=1, keepdims=False), read

    return init_cache, prefill, decode
