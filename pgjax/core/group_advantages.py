"""Advantages of whole sequences from the scores of a prompt's samples, beyond leave-one-out and GRPO (`advantages`).

[B] from scores [B], of which the rows of one prompt are adjacent. What each is an estimate of holds for
`policy_gradient_loss` with "sequence_sum" on the policy's own samples.
"""

import math

import chex
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from pgjax.core.advantages import group_advantages, groups_of
from pgjax.core.checks import check_number, check_whole
from pgjax.core.layouts import like, whole_along
from pgjax.core.masking import AxisName, as_float, as_floats, global_sum, where_mask
from pgjax.core.reductions import aligned


def maxrl_advantages(scores: ArrayLike, *, group_size: int, eps: float = 1e-6) -> jax.Array:
    """Compare each score with the group's mean, in units of that mean: MaxRL.

    A_i = (s_i - mean) / (mean + eps). Tajwar et al. (2026), "Maximum Likelihood Reinforcement Learning".

    For scores of 0 and 1, with success probability p of the prompt: the gradient of the log-likelihood log p, cut off
    after G - 1 terms of its series, which is grad p (1 - (1 - p)^(G - 1)) / p (as eps tends to 0). So it is the exact policy
    gradient at G = 2, and tends to grad log p as G grows. Other scores: biased; they must not be below 0.

    Args:
      scores: [B], not below 0; the `group_size` rows of one prompt are adjacent.
      group_size: G, samples per prompt, at least 2, divides B.
      eps: keeps a group of zeros at 0.

    Returns:
      [B] float32.

    Raises:
      ValueError: `group_size` is below 2 or does not divide B.
      AssertionError: `scores` is not of rank 1.

    Example:
      >>> import jax.numpy as jnp
      >>> [f"{x:.2f}" for x in maxrl_advantages(jnp.array([1.0, 0.0, 0.0, 0.0]), group_size=4)]
      ['3.00', '-1.00', '-1.00', '-1.00']
    """
    centred = group_advantages(scores, group_size=group_size, normalize=False)
    groups = groups_of(scores, group_size)
    means = jnp.broadcast_to(jnp.mean(groups, axis=1, keepdims=True), groups.shape)
    return centred / (means.reshape(-1) + eps)


def reinforce_plus_plus_advantages(
    scores: ArrayLike, lengths: ArrayLike | None = None, *, group_size: int = 1, axis_name: AxisName = None
) -> jax.Array:
    """Whiten the scores over the whole batch, after subtracting each group's mean: REINFORCE++.

    A_i = (x_i - mean x) / sqrt(var x + 1e-8), x_i = s_i - mean of its group; with `group_size` 1, x = s. With `lengths` mean and
    variance are over tokens, so that a sequence counts by its length. Hu et al. (2025), "REINFORCE++".

    Biased, as each score is part of the means and the deviation that it is compared with. As the batch grows it tends to the
    exact gradient, times 1 - 1/G in groups of G, over the deviation of the whole batch: one scale for all prompts, where GRPO
    gives each its own.

    Args:
      scores: [B], reward units; the `group_size` rows of one prompt are adjacent.
      lengths: [B] tokens; None: each sequence counts the same.
      group_size: G, samples per prompt, divides B; 1: no groups.
      axis_name: mapped axis or axes that split the batch.

    Returns:
      [B] float32, in standard deviations.

    Raises:
      ValueError: `group_size` is below 1 or does not divide B.
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> print(reinforce_plus_plus_advantages(jnp.array([1.0, 3.0, 5.0, 7.0]), group_size=2))
      [-1.  1. -1.  1.]
    """
    check_whole("group_size", group_size, 1)
    centred = as_float(scores) if group_size == 1 else group_advantages(scores, group_size=group_size, normalize=False)
    return _whitened(centred, lengths, axis_name)


def gdpo_advantages(
    rewards: ArrayLike,
    weights: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    group_size: int,
    axis_name: AxisName = None,
) -> jax.Array:
    """Normalise each of several rewards in its group by itself, add them up, and whiten the sum over the batch: GDPO.

    A = whitened(sum_k weights_k z_k), z_k = (r_k - mean) / (std + 1e-4) in the group, as `group_advantages`. Liu et al. (2026),
    "GDPO: Group reward-Decoupled Normalization Policy Optimization". A reward with large differences does not drown the others.

    Biased as `group_advantages` is, for each reward: the gradient of no weighted sum of the rewards, because each prompt weighs
    each reward by the inverse of its own deviation.

    Args:
      rewards: [B, K], K rewards of each sequence; the `group_size` rows of one prompt are adjacent.
      weights: [K].
      lengths: [B] tokens, as of `reinforce_plus_plus_advantages`.
      group_size: G, samples per prompt, at least 2, divides B.
      axis_name: mapped axis or axes that split the batch.

    Returns:
      [B] float32, in standard deviations.

    Raises:
      ValueError: `group_size` is below 2 or does not divide B.
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> rewards = jnp.array([[0.0, 1.0], [100.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
      >>> found = gdpo_advantages(rewards, jnp.array([1.0, 1.0]), group_size=2)
      >>> [f"{x:.1f}" for x in jnp.abs(found)]  # 1 against 100 is a tie
      ['0.0', '0.0', '1.4', '1.4']
    """
    rewards, weights = as_floats(rewards, weights)
    chex.assert_rank([rewards, weights], [2, 1])
    chex.assert_axis_dimension(rewards, 1, weights.shape[0])
    scored = jax.vmap(lambda x: group_advantages(x, group_size=group_size), in_axes=1, out_axes=1)(rewards)
    return _whitened(jnp.sum(scored * weights[None], axis=1), lengths, axis_name)


def opo_advantages(scores: ArrayLike, lengths: ArrayLike, *, group_size: int) -> jax.Array:
    """Compare each score with the group's mean by length: OPO.

    A_i = s_i - sum_j l_j s_j / sum_j l_j. Hao et al. (2025), "On-Policy RL with Optimal Reward Baseline": the baseline of least
    variance, if the squared norm of a sequence's gradient is proportional to its length.

    Biased: each score is part of its own baseline. If all lengths are equal it is the group's mean, and the expected gradient
    the exact one times 1 - 1/G.

    Args:
      scores: [B], reward units; the `group_size` rows of one prompt are adjacent.
      lengths: [B] tokens; a group without any has the baseline 0.
      group_size: G, samples per prompt, at least 2, divides B.

    Returns:
      [B] float32, reward units.

    Raises:
      ValueError: `group_size` is below 2 or does not divide B.
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> print(opo_advantages(jnp.array([1.0, 0.0]), jnp.array([3, 1]), group_size=2))
      [ 0.25 -0.75]
    """
    scores, lengths = as_floats(scores, lengths)
    chex.assert_equal_shape([scores, lengths])
    groups, weights = groups_of(scores, group_size), groups_of(lengths, group_size)
    # Relative to the group's first score, equal scores are exactly 0.
    shifted, total = groups - groups[:, :1], jnp.sum(weights, axis=1, keepdims=True)
    baseline = jnp.sum(weights * shifted, axis=1, keepdims=True) / jnp.where(total > 0, total, 1.0)
    return (shifted - jnp.where(total > 0, baseline, -groups[:, :1])).reshape(-1)


def pass_at_k_advantages(scores: ArrayLike, *, group_size: int, k: int | None = None) -> jax.Array:
    """Give a sample what it adds to the best of k: the advantage for pass@k.

    A_i = k mean over the sets J of k - 1 other samples of max(s_i - max_J s, 0). With k = G only the best sample has an
    advantage, G times the distance to the second best. Tang et al. (2025), "Optimizing Language Models for Inference Time
    Objectives using Reinforcement Learning"; smaller k: Walder & Karkhanis (2025), "Pass@K Policy Optimization".

    Unbiased for E[max of k samples' scores], exactly: with scores of 0 and 1, for pass@k. It is not the gradient of E[score].

    Args:
      scores: [B], reward units; the `group_size` rows of one prompt are adjacent.
      group_size: G, samples per prompt, at least 2, divides B.
      k: from 2 to G; None: G. (k = 1 is `leave_one_out_baseline`.)

    Returns:
      [B] float32, reward units, not below 0.

    Raises:
      ValueError: `group_size` is below 2 or does not divide B, or k is out of its range.
      AssertionError: `scores` is not of rank 1.

    Example:
      >>> import jax.numpy as jnp
      >>> print(pass_at_k_advantages(jnp.array([0.0, 3.0, 5.0]), group_size=3))
      [0. 0. 6.]
    """
    groups, size = groups_of(scores, group_size), group_size if k is None else k
    check_whole("k", size, 2)
    if size > group_size:
        raise ValueError(f"k must be at most group_size={group_size}, got {size}")
    others = jnp.asarray([[j for j in range(group_size) if j != i] for i in range(group_size)])
    ordered = jnp.sort(groups[:, others], axis=2)  # [B / G, G, G - 1]
    # The j-th smallest of the others is the best of k - 1 of them in (j over k - 2) sets.
    sets = [math.comb(j, size - 2) / math.comb(group_size - 1, size - 1) for j in range(group_size - 1)]
    gains = jnp.maximum(groups[:, :, None] - ordered, 0.0) * jnp.asarray([[sets]], groups.dtype)
    return size * jnp.sum(gains, axis=2).reshape(-1)


def optimal_token_baseline(
    returns: ArrayLike,
    logprobs: ArrayLike,
    sum_squares: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    group_size: int,
) -> jax.Array:
    """Average a group's returns at each place, by how much the tokens up to there moved the policy.

    B_t = sum_i G_it W_it / sum_i W_it, W_t = sum_{j <= t} (1 - 2 pi_j + sum_v pi_v^2), the squared norm of the gradient of log pi
    by the logits, added up along the sequence. In verl: "optimal token baseline" (2025). It lowers the variance where lengths
    and places differ.

    Biased: a sequence is part of its own baseline, as in `opo_advantages`. Where fewer than two sequences of the group have a
    token, B_t is 0.

    Args:
      returns: [B, T], reward units, reward-to-go; the `group_size` rows of one prompt are adjacent.
      logprobs: [B, T], nats, under the policy that sampled.
      sum_squares: [B, T], the sum over the vocabulary of its squared probabilities.
      mask: [B, T] boolean; None counts every entry.
      group_size: G, samples per prompt, at least 2, divides B.

    Returns:
      [B, T] float32, reward units; 0 outside the mask; carries no gradient.

    Raises:
      ValueError: `group_size` is below 2 or does not divide B.
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> returns, logprobs = jnp.array([[1.0], [0.0]]), jnp.log(jnp.array([[0.5], [0.5]]))
      >>> print(optimal_token_baseline(returns, logprobs, jnp.array([[0.5], [0.5]]), group_size=2))
      [[0.5]
       [0.5]]
    """
    inside, (gains, logp, squares) = aligned(mask, *map(stop_gradient, (returns, logprobs, sum_squares)))
    chex.assert_rank(gains, 2)
    given = gains
    inside, gains, logp, squares = (whole_along(whole_along(x, 0), 1) for x in (inside, gains, logp, squares))
    groups = jax.vmap(lambda x: groups_of(x, group_size), in_axes=1, out_axes=2)(gains)
    weights = where_mask(inside, jnp.cumsum(where_mask(inside, 1.0 - 2.0 * jnp.exp(logp) + squares), axis=1))
    a_group = lambda x: jnp.sum(x.reshape(-1, group_size, x.shape[1]), axis=1, keepdims=True)
    total, met = a_group(weights), a_group(inside.astype(gains.dtype))
    usable = (met > 1) & (total > 0)
    baseline = where_mask(usable, a_group(gains * weights) / jnp.where(usable, total, 1.0))
    return like(where_mask(inside, jnp.broadcast_to(baseline, groups.shape).reshape(gains.shape)), given)


def overlong_penalty(
    lengths: ArrayLike, max_new_tokens: ArrayLike, *, buffer: ArrayLike, coef: ArrayLike = 1.0
) -> jax.Array:
    """Charge the last tokens before the length limit, more and more: DAPO's soft overlong punishment.

    p = -coef min(max(lengths - (max_new_tokens - buffer), 0) / buffer, 1). Yu et al. (2025), "DAPO". Add it to the scores.

    A change of the reward, not an estimate: the gradient is the exact one of E[score + p].

    Args:
      lengths: [B] sampled tokens.
      max_new_tokens: [] the limit, tokens.
      buffer: [] above 0, tokens before the limit over which the penalty grows.
      coef: [] reward units, the penalty at the limit.

    Returns:
      [B] float32, reward units, from -coef to 0.

    Raises:
      ValueError: `buffer` is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> print(overlong_penalty(jnp.array([50, 90, 100]), 100, buffer=20))
      [-0.  -0.5 -1. ]
    """
    check_number("buffer", buffer, 0, strict=True)
    (lengths, limit, width, weight) = as_floats(lengths, max_new_tokens, buffer, coef)
    return -weight * jnp.clip((lengths - (limit - width)) / width, 0.0, 1.0)


def _whitened(x: jax.Array, lengths: ArrayLike | None, axis_name: AxisName) -> jax.Array:
    """Bring scores to mean 0 and variance 1, each counted by its length."""
    weights = jnp.ones_like(x) if lengths is None else jnp.asarray(lengths).astype(x.dtype)
    chex.assert_equal_shape([x, weights])
    total = global_sum(weights, axis_name)
    mean_of = lambda y: global_sum(weights * y, axis_name) / jnp.where(total > 0, total, 1.0)
    centred = x - mean_of(x)
    centred = centred - mean_of(centred)  # twice, so that equal scores are 0 to the last digit
    return centred * jax.lax.rsqrt(mean_of(jnp.square(centred)) + 1e-8)
