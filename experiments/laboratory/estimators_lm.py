"""Gradients of a language model, one sequence at a time: how much they vary. `estimators.py` compares with it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pgjax as pg
from experiments.chapters import small_lm


class Scored(NamedTuple):
    """Completions and their rewards: every array [B, T]."""

    rollout: pg.Rollout
    rewards: jax.Array  # the haiku score at the last token; the KL is 0, for the policy is the reference still


class Spread(NamedTuple):
    """How much the gradient varies from one sequence to another."""

    variance: float  # trace of the covariance of one sequence's gradient
    error: float  # its standard error


def roll_out(
    lm: pg.CausalLM, params: Any, tokenizer: Any, prompts: int, group_size: int, max_new_tokens: int, key: jax.Array
) -> Scored:
    """Sample completions of each prompt and score them."""
    asked = small_lm.prompts(tokenizer, prompts, repeat=group_size)
    rollout, _, scores = small_lm.play(lm, params, tokenizer, asked, key, max_new_tokens=max_new_tokens)
    return Scored(rollout, pg.place_scores(scores, rollout.mask))


@functools.partial(jax.jit, static_argnames="lm")
def hidden_states(lm: pg.CausalLM, params: Any, rollout: pg.Rollout) -> jax.Array:
    """Run the model's body: [B, T, D]."""
    return lm.hidden(params, rollout.tokens, rollout.attention_mask)


@functools.partial(jax.jit, static_argnames="lm")
def per_sequence(
    lm: pg.CausalLM, params: Any, rollout: pg.Rollout, advantages: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Take the gradient of each sequence's own loss: their squared norms [B] and that of their mean []."""

    def loss(params: Any, row: pg.Rollout, advantages: jax.Array) -> jax.Array:
        logprobs = pg.token_logprobs(lm.apply(params, row.tokens, row.attention_mask), row.tokens)
        return pg.policy_gradient_loss(logprobs, advantages, row.mask, reduce="sequence_sum")

    def step(total: Any, one: tuple[pg.Rollout, jax.Array]) -> tuple[Any, jax.Array]:
        gradient = jax.grad(loss)(params, *jax.tree.map(lambda x: x[None], one))
        return jax.tree.map(jnp.add, total, gradient), squared_norm(gradient)

    total, squares = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, params), (rollout, advantages))
    return squares, squared_norm(total) / len(squares) ** 2


def squared_norm(tree: Any) -> jax.Array:
    """Sum the squares of a tree's numbers."""
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda x: jnp.sum(jnp.square(x)), tree))


def spread_of(squares: jax.Array, mean: jax.Array) -> Spread:
    """Turn the squared norms of single gradients and of their mean into a trace: sum |g - mean|^2 / (B - 1)."""
    count = len(squares)
    error = jnp.std(squares, ddof=1) / jnp.sqrt(count)
    return Spread(float((squares.mean() - mean) * count / (count - 1)), float(error))
