"""A transformer in Haiku (pip install dm-haiku), without a cache.

python -m experiments.other_models.haiku_model
"""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

import pgjax as pg
from experiments.other_models import odd_ids
from experiments.other_models.odd_ids import POSITIONS, VOCABULARY, WIDTH


def forward(tokens: jax.Array) -> jax.Array:
    """Return the last hidden states of tokens [B, T]."""

    def norm(name: str, x: jax.Array) -> jax.Array:
        return hk.LayerNorm(-1, create_scale=True, create_offset=True, name=name)(x)

    length = tokens.shape[1]
    positions = hk.get_parameter("positions", (POSITIONS, WIDTH), init=hk.initializers.RandomNormal())
    x = hk.Embed(VOCABULARY, WIDTH, name="embed")(tokens) + positions[None, :length]
    mask = jnp.tril(jnp.ones((1, 1, length, length), bool))
    for layer in range(2):
        start = hk.initializers.VarianceScaling(1.0)
        attention = hk.MultiHeadAttention(2, WIDTH // 2, w_init=start, name=f"attention_{layer}")
        h = norm(f"before_attention_{layer}", x)
        x = x + attention(h, h, h, mask=mask)
        h = hk.Linear(2 * WIDTH, name=f"up_{layer}")(norm(f"before_mlp_{layer}", x))
        x = x + hk.Linear(WIDTH, name=f"down_{layer}")(jax.nn.relu(h))
    return norm("last", x)


def build(key: jax.Array) -> tuple[pg.CausalLM, Any]:
    """Make the bundle and its parameters."""
    model: Any = hk.without_apply_rng(hk.transform(forward))
    lm = pg.bundle(
        model.apply, lambda params: params["embed"]["embeddings"], vocab_size=VOCABULARY, max_positions=POSITIONS
    )
    return lm, model.init(key, jnp.zeros((1, 4), jnp.int32))


if __name__ == "__main__":
    odd_ids.show(*build(jax.random.key(0)))
