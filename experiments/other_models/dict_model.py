"""A transformer in plain JAX, a dict of arrays with a list of layers, with a cache of its own.

python -m experiments.other_models.dict_model
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

import pgjax as pg
from experiments.other_models import odd_ids
from experiments.other_models.odd_ids import POSITIONS, VOCABULARY, WIDTH

DEPTH = 2


def init(key: jax.Array) -> dict[str, Any]:
    """Draw parameters."""

    def matrix(number: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, number), shape) / math.sqrt(WIDTH)

    shapes = dict.fromkeys("qkvo", (WIDTH, WIDTH)) | {"up": (WIDTH, 2 * WIDTH), "down": (2 * WIDTH, WIDTH)}
    blocks = [
        {name: matrix(10 * layer + i, *shape) for i, (name, shape) in enumerate(shapes.items())}
        for layer in range(1, DEPTH + 1)
    ]
    return {"embed": matrix(0, VOCABULARY, WIDTH), "positions": matrix(1, POSITIONS, WIDTH), "blocks": blocks}


def forward(params: Any, tokens: Any, positions: Any, seen: Any, cache: Any, index: Any) -> tuple[jax.Array, Any]:
    """Run tokens [B, T], which stand in columns index, ... of rows of S; each attends to the columns seen [B, T, S]."""

    def norm(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    def put(cache: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(cache, x, index, axis=1)

    x, written = params["embed"][tokens] + params["positions"][positions], []
    for block, (keys, values) in zip(params["blocks"], cache, strict=True):
        h = norm(x)
        keys, values = put(keys, h @ block["k"]), put(values, h @ block["v"])
        scores = jnp.einsum("btd,bsd->bts", h @ block["q"], keys) / math.sqrt(WIDTH)
        x = x + jax.nn.softmax(jnp.where(seen, scores, -1e9)) @ values @ block["o"]
        x = x + jax.nn.relu(norm(x) @ block["up"]) @ block["down"]
        written.append((keys, values))
    return norm(x), written


def init_cache(batch: int, length: int) -> Any:
    """Make a cache of zeros: keys and values of each layer, rows first."""
    return [(jnp.zeros((batch, length, WIDTH)), jnp.zeros((batch, length, WIDTH))) for _ in range(DEPTH)]


def hidden(params: Any, tokens: jax.Array) -> jax.Array:
    """Run whole rows, whose tokens come first."""
    rows, length = tokens.shape
    causal = jnp.tril(jnp.ones((1, length, length), bool))
    return forward(params, tokens, jnp.arange(length)[None, :], causal, init_cache(rows, length), 0)[0]


def prefill(params: Any, tokens: jax.Array, attention_mask: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    """Read prompts, padded on the left, into the first columns of the cache."""
    positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
    length, columns = tokens.shape[1], cache[0][0].shape[1]
    seen = jnp.tril(jnp.ones((length, length), bool))[None] & attention_mask[:, None, :]
    seen = jnp.pad(seen, ((0, 0), (0, 0), (0, columns - length)))
    states, cache = forward(params, tokens, positions, seen, cache, 0)
    return states[:, -1], cache


def decode(params: Any, token: Any, position: Any, index: Any, slots: Any, cache: Any) -> tuple[jax.Array, Any]:
    """Read one token a row, in column index."""
    states, cache = forward(params, token[:, None], position[:, None], slots[:, None, :], cache, index)
    return states[:, 0], cache


def build(key: jax.Array) -> tuple[pg.CausalLM, Any]:
    """Make the bundle and its parameters."""
    lm = pg.bundle(
        hidden, lambda params: params["embed"], vocab_size=VOCABULARY, max_positions=POSITIONS,
        init=init, init_cache=init_cache, prefill=prefill, decode=decode,
    )  # fmt: skip
    return lm, init(key)


if __name__ == "__main__":
    odd_ids.show(*build(jax.random.key(0)))
