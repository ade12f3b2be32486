"""A transformer in Flax NNX, without a cache.

python -m experiments.other_models.nnx_model
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import pgjax as pg
from experiments.other_models import odd_ids
from experiments.other_models.odd_ids import POSITIONS, VOCABULARY, WIDTH


class Block(nnx.Module):
    """Attention and MLP."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Run states [B, T, D]."""
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.down(nnx.relu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    """A decoder whose head is its embedding."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(POSITIONS, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the last hidden states of tokens [B, T]."""
        mask = nnx.make_causal_mask(tokens, dtype=bool)
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


def build(key: jax.Array) -> tuple[pg.CausalLM, Any]:
    """Make the bundle and its parameters: the state of the module, apart from its structure."""
    structure, params = nnx.split(Transformer(nnx.Rngs(key)), nnx.Param)
    lm = pg.bundle(
        lambda params, tokens: nnx.merge(structure, params)(tokens),
        lambda params: nnx.merge(structure, params).tokens.embedding[...],
        vocab_size=VOCABULARY, max_positions=POSITIONS,
    )  # fmt: skip
    return lm, params


if __name__ == "__main__":
    odd_ids.show(*build(jax.random.key(0)))
