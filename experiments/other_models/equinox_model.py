"""A recurrent network in Equinox (pip install equinox): its cache is its state, whatever the length.

python -m experiments.other_models.equinox_model
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import pgjax as pg
from experiments.other_models import odd_ids
from experiments.other_models.odd_ids import POSITIONS, VOCABULARY, WIDTH


class Recurrent(eqx.Module):
    """An embedding, a GRU cell (Cho et al. 2014) and a head with a bias."""

    embed: eqx.nn.Embedding
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        embed_key, cell_key, head_key = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=embed_key)
        self.cell = eqx.nn.GRUCell(WIDTH, WIDTH, key=cell_key)
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=head_key)

    def step(self, state: jax.Array, token: jax.Array) -> jax.Array:
        """Read one token of each row: state [B, D], token [B]."""
        return jax.vmap(self.cell)(jax.vmap(self.embed)(token), state)


def with_one(states: jax.Array) -> jax.Array:
    """Append the 1 that the head's bias is multiplied by."""
    return jnp.concatenate([states, jnp.ones_like(states[..., :1])], axis=-1)


def build(key: jax.Array) -> tuple[pg.CausalLM, Any]:
    """Make the bundle and its parameters: the arrays of the module, apart from everything else."""
    params, rest = eqx.partition(Recurrent(key), eqx.is_inexact_array)

    def init_cache(batch: int, length: int) -> jax.Array:
        return jnp.zeros((batch, WIDTH))

    def hidden(params: Any, tokens: jax.Array) -> jax.Array:
        model = eqx.combine(params, rest)

        def read(state: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
            state = model.step(state, token)
            return state, state

        return with_one(jax.lax.scan(read, init_cache(len(tokens), 0), tokens.T)[1].swapaxes(0, 1))

    def unembedding(params: Any) -> jax.Array:
        return jnp.concatenate([params.head.weight, params.head.bias[:, None]], axis=1)

    def prefill(params: Any, tokens: jax.Array, attention_mask: jax.Array, cache: jax.Array) -> tuple[jax.Array, Any]:
        model = eqx.combine(params, rest)

        def read(state: jax.Array, column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            token, real = column
            return jnp.where(real[:, None], model.step(state, token), state), None

        state = jax.lax.scan(read, cache, (tokens.T, attention_mask.T))[0]
        return with_one(state), state

    def decode(params: Any, token: Any, position: Any, index: Any, slots: Any, cache: Any) -> tuple[jax.Array, Any]:
        state = eqx.combine(params, rest).step(cache, token)
        return with_one(state), state

    lm = pg.bundle(
        hidden, unembedding, vocab_size=VOCABULARY, max_positions=POSITIONS,
        init_cache=init_cache, prefill=prefill, decode=decode,
    )  # fmt: skip
    return lm, params


if __name__ == "__main__":
    odd_ids.show(*build(jax.random.key(0)))
