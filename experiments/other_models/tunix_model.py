"""Tunix's Qwen3 (pip install google-tunix), with its own cache.

python -m experiments.other_models.tunix_model
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tunix.models.qwen3.model import ModelConfig, Qwen3

import pgjax as pg
from experiments.other_models import odd_ids
from experiments.other_models.odd_ids import POSITIONS, VOCABULARY, WIDTH

CONFIG = ModelConfig(
    num_layers=2, vocab_size=VOCABULARY, embed_dim=WIDTH, hidden_dim=2 * WIDTH, num_heads=2, head_dim=8, num_kv_heads=1,
    rope_theta=10_000, norm_eps=1e-6, use_tied_embedding=True, dtype=jnp.float32, param_dtype=jnp.float32,
)  # fmt: skip


def forward(model: Qwen3, tokens: Any, positions: Any, cache: Any, seen: Any) -> tuple[jax.Array, Any]:
    """Return what Qwen3's head is given, and its cache: tokens and positions [B, T], seen [B, T, S]."""
    x, written = model.embedder.encode(tokens), {}
    for i, layer in enumerate(model.layers):
        written[f"layer_{i}"], x = layer(x, positions, None if cache is None else cache[f"layer_{i}"], seen)
    return model.final_norm(x), written


def build(key: jax.Array) -> tuple[pg.CausalLM, Any]:
    """Make the bundle and its parameters: the state of the module, apart from its structure."""
    structure, params = nnx.split(Qwen3(CONFIG, rngs=nnx.Rngs(key)), nnx.Param)

    def init_cache(batch: int, length: int) -> Any:
        return Qwen3.init_cache(nnx.merge(structure, params), batch, length, CONFIG.dtype)

    def hidden(params: Any, tokens: jax.Array) -> jax.Array:
        length = tokens.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (len(tokens), length, length))
        return forward(nnx.merge(structure, params), tokens, positions, None, causal)[0]

    def prefill(params: Any, tokens: jax.Array, attention_mask: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        length, columns = tokens.shape[1], cache["layer_0"]["k"].shape[1]
        positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
        seen = jnp.tril(jnp.ones((length, length), bool))[None] & attention_mask[:, None, :]
        seen = jnp.pad(seen, ((0, 0), (0, 0), (0, columns - length)))
        states, cache = forward(nnx.merge(structure, params), tokens, positions, cache, seen)
        return states[:, -1], cache

    def decode(params: Any, token: Any, position: Any, index: Any, slots: Any, cache: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(structure, params)
        states, cache = forward(model, token[:, None], position[:, None], cache, slots[:, None, :])
        return states[:, 0], cache

    lm = pg.bundle(
        hidden, lambda params: nnx.merge(structure, params).embedder.input_embedding[...],
        vocab_size=VOCABULARY, max_positions=POSITIONS, init_cache=init_cache, prefill=prefill, decode=decode,
    )  # fmt: skip
    return lm, params


if __name__ == "__main__":
    odd_ids.show(*build(jax.random.key(0)))
