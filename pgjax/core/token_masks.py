"""Masks of tokens that learn: by how far they are off policy, by their entropy, by how their completion ended.

A mask from here is part of the mask that it was made from. There are two ways to use it, and they estimate different things:

- As the loss's `mask`, what is left out is not counted either: with "token_mean" each of the others weighs more, the more are
  left out.
- On the advantages, `jnp.where(kept, advantages, 0)`, with the old mask in the loss: what is left out counts as 0. The
  estimate is linear in what is kept, and exact under microbatches.
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from pgjax.core.checks import check_ids, check_number
from pgjax.core.masking import AxisName, as_mask, global_sum
from pgjax.core.reductions import aligned, everywhere, over_sequences


def m2po_mask(
    logprobs: ArrayLike,
    sampler_logprobs: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    threshold: ArrayLike = 0.04,
    axis_name: AxisName = None,
) -> jax.Array:
    """Leave out the tokens that have moved most, until the others' mean squared log-ratio is below a threshold: M2PO.

    kept = the most tokens with the smallest d^2 whose mean d^2 is below the threshold, d = logprobs - sampler_logprobs, over
    the whole batch. Zheng et al. (2025), "Prosperity before Collapse: How Far Can Off-Policy RL Reach with Stale Data on LLMs?".

    At d = 0 it keeps everything. Elsewhere the gradient is that of what is kept: biased, in size and in direction.

    Args:
      logprobs: any shape ([B, T] tokens), nats, under the policy.
      sampler_logprobs: the same shape, nats, under the distribution that was sampled from.
      mask: the same shape, boolean; None counts every entry.
      threshold: [] above 0, nats squared.
      axis_name: mapped axis or axes that split the batch.

    Returns:
      The same shape, boolean; nothing is kept where even the smallest d^2 reaches the threshold.

    Raises:
      ValueError: `threshold` is not above 0.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(m2po_mask(jnp.array([0.1, -0.3, 1.0]), jnp.zeros(3), threshold=0.06))
      [ True  True False]
    """
    check_number("threshold", threshold, 0, strict=True)
    inside, (new, old) = aligned(mask, stop_gradient(logprobs), stop_gradient(sampler_logprobs))
    moved = jnp.where(inside, jnp.square(new - old), jnp.inf)
    ordered = jnp.sort(everywhere(moved, axis_name))
    means = jnp.cumsum(ordered) / jnp.arange(1, ordered.size + 1).astype(new.dtype)
    kept = jnp.sum(means < jnp.asarray(threshold, new.dtype))  # means of more and more tokens never fall
    return inside & (kept > 0) & (moved <= ordered[jnp.maximum(kept, 1) - 1])


def opsm_mask(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    delta: ArrayLike,
) -> jax.Array:
    """Leave out sequences that are to become rarer and that the policy has already left: off-policy sequence masking.

    kept = A >= 0 or mean over the sequence's tokens of (old_logprobs - logprobs) <= delta. DeepSeek-AI (2025), "DeepSeek-V3.2".

    At logprobs = old_logprobs it keeps everything. Elsewhere the gradient is that of what is kept: biased towards the
    sequences with A >= 0.

    Args:
      logprobs: [B, T] tokens (or [B] sequences), nats, under the present policy.
      old_logprobs: the same shape, nats, under the distribution that was sampled from.
      advantages: the same shape.
      mask: the same shape, boolean; None counts every entry.
      delta: [] nats a token.

    Returns:
      The same shape, boolean.

    Raises:
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> new, old, advantages = jnp.array([[-3.0], [-3.0]]), jnp.array([[-1.0], [-1.0]]), jnp.array([[1.0], [-1.0]])
      >>> print(opsm_mask(new, old, advantages, delta=0.5))
      [[ True]
       [False]]
    """
    inside, (new, old, advantages) = aligned(mask, *map(stop_gradient, (logprobs, old_logprobs, advantages)))
    left = over_sequences(old - new, inside, mean=True)
    return inside & ((advantages >= 0) | (left <= jnp.asarray(delta, new.dtype)))


def entropy_quantile_mask(
    entropy: ArrayLike, mask: ArrayLike | None = None, *, fraction: ArrayLike = 0.2, axis_name: AxisName = None
) -> jax.Array:
    """Keep the tokens of highest entropy, where the policy was undecided.

    kept = entropy >= its quantile at 1 - fraction over all tokens of the batch, interpolated linearly. Wang et al. (2025),
    "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM Reasoning".

    Biased, on policy too: only the kept prefixes' part of the gradient is there. At a fixed quantile that part is exact: for
    logits in a table it is the gradient by the kept prefixes' rows.

    Args:
      entropy: any shape ([B, T] tokens), nats, of the distribution that each token was drawn from.
      mask: the same shape, boolean; None counts every entry.
      fraction: [] from 0 to 1, of the tokens in the mask.
      axis_name: mapped axis or axes that split the batch.

    Returns:
      The same shape, boolean.

    Raises:
      ValueError: `fraction` is out of its range.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(entropy_quantile_mask(jnp.array([0.1, 2.0, 0.3, 1.0, 0.2]), fraction=0.4))
      [False  True False  True False]
    """
    check_number("fraction", fraction, 0, 1 + 1e-6)
    inside, (entropy,) = aligned(mask, stop_gradient(entropy))
    ordered = jnp.sort(everywhere(jnp.where(inside, entropy, jnp.inf), axis_name))
    last = jnp.maximum(global_sum(inside.astype(entropy.dtype), axis_name) - 1.0, 0.0)
    place = jnp.clip(1.0 - jnp.asarray(fraction).astype(entropy.dtype), 0.0, 1.0) * last
    below, above = (ordered[end(place).astype(jnp.int32)] for end in (jnp.floor, jnp.ceil))
    quantile = jnp.where(above > below, below + (place - jnp.floor(place)) * (above - below), below)
    return inside & (entropy >= quantile)


def finished_mask(tokens: ArrayLike, mask: ArrayLike | None, *, eos_ids: Sequence[int]) -> jax.Array:
    """Keep the completions that ended by themselves, and leave out those that the length limit cut.

    kept = all tokens of the sequences whose last sampled token is one of `eos_ids`. DAPO, Yu et al. (2025), "overlong
    filtering"; the other way to treat them is `overlong_penalty`.

    On the advantages R - b, with "sequence_sum" and a constant b: the gradient of E[(R - b) 1(ended)], as if a cut completion
    scored b. As the loss's mask the means divide by what ended: the fewer end, the more each of them weighs.

    Args:
      tokens: [B, T] ids.
      mask: [B, T] boolean, sampled by the policy; None counts every entry.
      eos_ids: that end a completion.

    Returns:
      [B, T] boolean.

    Raises:
      ValueError: `eos_ids` is empty, or `tokens` are not whole numbers.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(finished_mask(jnp.array([[5, 2, 0], [5, 5, 5]]), jnp.array([[1, 1, 0], [1, 1, 1]]), eos_ids=(2,)))
      [[ True  True False]
       [False False False]]
    """
    if not len(eos_ids):
        raise ValueError("eos_ids must hold at least one id: without one no completion ends by itself")
    tokens = jnp.asarray(tokens)
    chex.assert_rank(tokens, 2)
    check_ids("finished_mask: tokens", tokens)
    inside = as_mask(mask, tokens)
    places = jax.lax.broadcasted_iota(jnp.int32, inside.shape, 1)
    last = inside & (places == jnp.max(places, axis=1, keepdims=True, initial=-1, where=inside))
    ends = jnp.any(tokens[..., None] == jnp.asarray([[eos_ids]], tokens.dtype), axis=-1)
    return inside & jnp.any(last & ends, axis=1, keepdims=True)
