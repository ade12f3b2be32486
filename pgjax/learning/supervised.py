"""Supervised fine-tuning on packed rows: the update that learns their marked tokens, and how well a model foresees them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.core.losses import cross_entropy_loss
from pgjax.data.packing import Packed
from pgjax.learning.optimizer import Metrics, TrainState, Transformation, accumulate, apply_gradient
from pgjax.models.causal_lm import CausalLM, Params
from pgjax.models.heads import head_logprobs, logit_options
from pgjax.models.lora import with_lora
from pgjax.parallel import sharding


def logprobs(lm: CausalLM, params: Any, packed: Packed) -> jax.Array:
    """Compute the log-probability of every token given those before it in its own segment.

    Args:
      lm: the model's functions.
      params: its parameters.
      packed: [B, L].

    Returns:
      [B, L] float32, nats; the entry of a segment's first token means nothing.
    """
    hidden = lm.hidden(params, packed.tokens, None, packed.segment_ids)
    return head_logprobs(hidden, lm.unembedding(params), packed.tokens, **logit_options(lm.arch))


@functools.partial(jax.jit, static_argnames=("lm", "optimizer", "microbatches"), donate_argnames="state")
def update(
    state: TrainState, packed: Packed, frozen: Params | None = None,
    *, lm: CausalLM, optimizer: Transformation, microbatches: int,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Take one step down the mean cross-entropy of the learned tokens of a batch.

    L = -sum over learned tokens of log p(token | its segment so far) / their number, however they are spread over rows
    and microbatches.

    Args:
      state: consumed.
      packed: [B, L].
      frozen: parameters of the model where `state.params` are adapters to them (`lora`); None: all are trained.
      lm: the model's functions.
      optimizer: the one that made the state.
      microbatches: divides B; the gradient is the same, the memory less.

    Returns:
      The state after the step, and {"loss/cross_entropy", "train/tokens" (learned ones), "train/positions" (all but padding),
      "train/grad_norm", "train/healthy", "lr"}.
    """

    def loss_fn(params: Any, part: Packed) -> tuple[jax.Array, Metrics]:
        return cross_entropy_loss(logprobs(lm, with_lora(frozen, params), part), part.mask), {}

    counts = packed.mask.sum(1)
    gradient, metrics = accumulate(loss_fn, state.params, packed, counts, microbatches)
    state, stepped = apply_gradient(state, gradient, metrics["loss"], optimizer)
    positions = (packed.segment_ids > 0).sum()
    counted = {"loss/cross_entropy": metrics["loss"], "train/tokens": counts.sum(), "train/positions": positions}
    return state, counted | stepped


@functools.partial(jax.jit, static_argnames="lm")
def surprise(params: Any, packed: Packed, *, lm: CausalLM) -> tuple[jax.Array, jax.Array]:
    """Sum the negative log-probabilities of the learned tokens of a batch, and count them.

    Args:
      params: the model's parameters.
      packed: [B, L].
      lm: the model's functions.

    Returns:
      The sum in nats, [] float32, and the count, [] int32.
    """
    return -jnp.where(packed.mask, logprobs(lm, params, packed), 0.0).sum(), packed.mask.sum()


def mean_surprise(lm: CausalLM, params: Any, packed: Packed, batch_size: int) -> float:
    """Compute the mean negative log-probability over all learned tokens of any number of rows.

    Args:
      lm: the model's functions.
      params: its parameters.
      packed: [R, L].
      batch_size: rows that are computed at a time.

    Returns:
      Nats a token; its exponential is the perplexity.

    Raises:
      ValueError: no token is learned.
    """
    if not packed.mask.any():
        raise ValueError(f"none of the {packed.mask.size} tokens is learned: there is no mean")
    spread = sharding.batch_sharding(sharding.mesh_of(params), batch_size)
    total, count = 0.0, 0
    for begin in range(0, len(packed.tokens), batch_size):
        rows = [x[begin : begin + batch_size] for x in packed]
        short = batch_size - len(rows[0])  # one shape, one program: rows without learned tokens fill the last batch
        part = Packed(*(np.pad(x, ((0, short), (0, 0))) for x in rows))
        nats, tokens = jax.device_get(surprise(params, sharding.place(part, spread), lm=lm))
        total, count = total + float(nats), count + int(tokens)
    return total / count
