"""Losses whose ratio is a whole sequence's: GSPO, GMPO, VESPO and A*PO.

In [B, T] the last axis is a sequence's tokens, and all of a row must be there. With fewer than two axes each entry is a
sequence.
"""

import math

import chex
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from pgjax.core.advantages import groups_of
from pgjax.core.checks import check_number
from pgjax.core.losses import clipped_surrogate_loss
from pgjax.core.masking import AxisName, as_floats, where_mask
from pgjax.core.reductions import aligned, over_sequences, ratio_range, reduced


def gspo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    clip_eps: ArrayLike = 3e-4,
    clip_eps_high: ArrayLike | None = 4e-4,
    reduce: str = "sequence_mean",
    axis_name: AxisName = None,
) -> jax.Array:
    """Clip the geometric mean of a sequence's ratios, and give each token the sequence's: GSPO.

    L = -reduce(min(s_t A, clip(s_t) A)), s_t = sg[s] pi / sg[pi], s = exp(mean over tokens of log r). Zheng et al. (2025),
    "Group Sequence Policy Optimization", in its form for tokens (GSPO-token), whose gradient is GSPO's where the tokens of a
    sequence have one advantage and `reduce` is "sequence_mean".

    At logprobs = old_logprobs, its gradient is that of `policy_gradient_loss`, whatever the bounds; with "sequence_mean" that
    is the gradient of E[R / length]. Once they differ it is that of E_old[s A] inside the bounds. That is biased: s is the
    importance weight to the power of 1 / length, so that a sequence is corrected by a small part of what it has moved.

    Args:
      logprobs: [B, T] tokens (or [B] sequences), nats, under the present policy.
      old_logprobs: the same shape, nats, under the policy that sampled; carries no gradient.
      advantages: the same shape; carries no gradient.
      mask: the same shape, boolean; None counts every entry.
      clip_eps: [] not below 0, of s. The paper's are far smaller than those of a token's ratio.
      clip_eps_high: [] not below 0; None: `clip_eps`.
      reduce: "token_mean", "sequence_mean", "sequence_sum" or "none", as in `policy_gradient_loss`.
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      [], float32; with "none" the shape of `logprobs`, 0 outside the mask.

    Raises:
      ValueError: a bound is out of its range, or `reduce` is none of the four.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> new, old = jnp.log(jnp.array([[2.0, 0.5]])), jnp.zeros((1, 2))
      >>> print(gspo_loss(new, old, jnp.ones((1, 2))))  # s = 1: the two tokens' ratios cancel
      -1.0
    """
    inside, (new, old, advantages) = aligned(mask, logprobs, stop_gradient(old_logprobs), stop_gradient(advantages))
    log_ratio = stop_gradient(over_sequences(new - old, inside, mean=True)) + new - stop_gradient(new)
    return clipped_surrogate_loss(
        log_ratio, jnp.zeros_like(old), advantages, inside,
        clip_eps=clip_eps, clip_eps_high=clip_eps_high, reduce=reduce, axis_name=axis_name,
    )  # fmt: skip


def gmpo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    clip_eps: ArrayLike = 0.4,
    clip_eps_high: ArrayLike | None = None,
    reduce: str = "sequence_mean",
    axis_name: AxisName = None,
) -> jax.Array:
    """Clip each token's log-ratio, and weigh the sequence by the geometric mean of what is left: GMPO.

    L = -reduce(A G), G = exp(mean over tokens of c), c = log r, but at most clip_eps_high where A > 0, and at least -clip_eps
    where A < 0. Zhao et al. (2025), "Geometric-Mean Policy Optimization".

    At logprobs = old_logprobs and one advantage a sequence, its gradient is that of `policy_gradient_loss` with the same
    `reduce`; as in GSPO, that of E[R / length] with "sequence_mean". Once they differ it is biased as GSPO is, and a token
    beyond its bound has no gradient, while the others of its sequence keep theirs.

    Args:
      logprobs: [B, T] tokens (or [B] sequences), nats, under the present policy.
      old_logprobs: the same shape, nats, under the policy that sampled; carries no gradient.
      advantages: the same shape, one number a sequence; carries no gradient. Where they differ, each token's counts.
      mask: the same shape, boolean; None counts every entry.
      clip_eps: [] not below 0, nats: of the log-ratio, not of the ratio.
      clip_eps_high: [] not below 0, nats; None: `clip_eps`.
      reduce: "token_mean", "sequence_mean", "sequence_sum" or "none", as in `policy_gradient_loss`.
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      [], float32; with "none" the shape of `logprobs`, 0 outside the mask.

    Raises:
      ValueError: a bound is out of its range, or `reduce` is none of the four.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> new, old = jnp.array([[0.4, 0.9]]), jnp.zeros((1, 2))
      >>> f"{gmpo_loss(new, old, jnp.ones((1, 2))):.3f}"  # -exp(0.4): the second token is held at 0.4 too
      '-1.492'
    """
    inside, (new, old, advantages) = aligned(mask, logprobs, stop_gradient(old_logprobs), stop_gradient(advantages))
    low, high = ratio_range(clip_eps, clip_eps_high, new.dtype)
    log_ratio = new - old
    above, below = (advantages > 0) & (log_ratio > high - 1.0), (advantages < 0) & (log_ratio < low - 1.0)
    held = jnp.where(above, high - 1.0, jnp.where(below, low - 1.0, where_mask(advantages != 0, log_ratio)))
    return reduced(-advantages * jnp.exp(over_sequences(held, inside, mean=True)), inside, reduce, axis_name)


def vespo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    k_pos: ArrayLike = 2.0,
    lambda_pos: ArrayLike = 3.0,
    k_neg: ArrayLike = 3.0,
    lambda_neg: ArrayLike = 2.0,
    reduce: str = "token_mean",
    axis_name: AxisName = None,
) -> jax.Array:
    """Weigh each sequence by a soft function of its whole importance weight: VESPO.

    L = -reduce(sg[phi(W)] A log pi), phi(W) = W^k exp(lambda (1 - W)), W = prod over tokens of pi / pi_old, with k_pos and
    lambda_pos where A >= 0, k_neg and lambda_neg elsewhere. Shen et al. (2026), "VESPO: Variational Sequence-Level Soft
    Policy Optimization". Where the sampler is not the old policy, give the sampler's log-probabilities as `old_logprobs`.

    At logprobs = old_logprobs phi is 1, and its gradient is that of `policy_gradient_loss`. Once they differ it is biased: the
    exact weight is W itself. phi is largest at W = k / lambda, below 1 where A >= 0, and falls to 0 on both sides.

    Args:
      logprobs: [B, T] tokens (or [B] sequences), nats, under the present policy.
      old_logprobs: the same shape, nats, under the distribution that was sampled from; carries no gradient.
      advantages: the same shape; carries no gradient.
      mask: the same shape, boolean; None counts every entry.
      k_pos, lambda_pos: [] above 0, of phi where A >= 0.
      k_neg, lambda_neg: [] above 0, of phi where A < 0.
      reduce: "token_mean", "sequence_mean", "sequence_sum" or "none", as in `policy_gradient_loss`.
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      [], float32; with "none" the shape of `logprobs`, 0 outside the mask.

    Raises:
      ValueError: one of the four is not above 0, or `reduce` is none of the four.
      AssertionError: the shapes differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> ones = jnp.ones((1, 2))
      >>> print(jax.grad(vespo_loss)(-ones, -ones, ones), abs(jax.grad(vespo_loss)(ones, -ones, ones)))
      [[-0.5 -0.5]] [[0. 0.]]
    """
    for name, x in {"k_pos": k_pos, "lambda_pos": lambda_pos, "k_neg": k_neg, "lambda_neg": lambda_neg}.items():
        check_number(name, x, 0, strict=True)
    inside, (new, old, advantages) = aligned(mask, logprobs, stop_gradient(old_logprobs), stop_gradient(advantages))
    log_weight = stop_gradient(jnp.minimum(over_sequences(new - old, inside, mean=False), 50.0))  # phi is 0 long before
    k, rate = (
        jnp.where(advantages >= 0, jnp.asarray(pos, new.dtype), jnp.asarray(neg, new.dtype))
        for pos, neg in ((k_pos, k_neg), (lambda_pos, lambda_neg))
    )
    phi = jnp.exp(k * log_weight - rate * jnp.expm1(log_weight))  # expm1 keeps the digits of W - 1 near 1
    return reduced(-stop_gradient(phi) * advantages * new, inside, reduce, axis_name)


def astar_po_loss(
    logprobs: ArrayLike,
    ref_logprobs: ArrayLike,
    scores: ArrayLike,
    optimal_values: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    beta: ArrayLike = 1e-3,
    reduce: str = "sequence_mean",
    axis_name: AxisName = None,
) -> jax.Array:
    """Regress the policy's log-ratio to the reference on the optimal advantage: A*PO.

    L = mean over sequences of (beta log(pi(y) / ref(y)) - (R - V*))^2. Brantley et al. (2025), "Accelerating RL for LLM
    Reasoning with Optimal Advantage Regression". V* comes from `optimal_values`.

    With J = E[R] - beta KL(policy || reference), its expected gradient on the policy's own samples is -2 beta times that of J,
    whatever V* is, as long as it does not depend on the sample. On samples of any other policy it is biased for J, but with
    the exact V* = beta log E_ref[exp(R / beta)] it is 0 for every sample at the optimum of J, pi = ref exp((R - V*) / beta).

    Args:
      logprobs: [B, T], nats, under the present policy.
      ref_logprobs: [B, T], nats, under the reference; carries no gradient.
      scores: [B], reward units; carries no gradient.
      optimal_values: [B], reward units, of each row's prompt; carries no gradient.
      mask: [B, T], boolean; None counts every entry.
      beta: [] above 0, reward units a nat.
      reduce: "sequence_mean", or "none": each sequence's term. To accumulate exactly, divide their sum by the sequences with a
        token, counted over everything that is accumulated.
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      [], float32, reward units squared; with "none" [B]. Rows with an empty mask are left out.

    Raises:
      ValueError: `beta` is not above 0, or `reduce` is none of the two.
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> zeros = jnp.zeros((1, 2))
      >>> print(astar_po_loss(zeros, zeros - 1.0, jnp.array([3.0]), jnp.array([2.0]), beta=0.5))
      0.0
    """
    check_number("beta", beta, 0, strict=True)
    if reduce not in ("sequence_mean", "none"):
        raise ValueError(f"reduce must be sequence_mean or none, got {reduce!r}")
    inside, (new, ref) = aligned(mask, logprobs, stop_gradient(ref_logprobs))
    log_ratio, scores, values = as_floats(
        jnp.sum(new - ref, axis=-1), stop_gradient(scores), stop_gradient(optimal_values)
    )
    chex.assert_rank(new, 2)
    chex.assert_equal_shape([log_ratio, scores, values])
    known = jnp.any(inside, axis=-1)
    errors = jnp.asarray(beta, scores.dtype) * log_ratio - where_mask(known, scores - values)
    return reduced(jnp.square(errors), known, reduce, axis_name)


def optimal_values(ref_scores: ArrayLike, *, group_size: int, beta: ArrayLike = 0.5) -> jax.Array:
    """Estimate the value of each prompt under the best policy, from scores of the reference's samples.

    V* = beta log mean over the prompt's samples of exp(R / beta), for `astar_po_loss`. Brantley et al. (2025).

    Biased low, because the logarithm is concave, and the more the smaller beta is beside the scores' spread: it tends to the
    largest score that was seen. As the group grows it tends to beta log E_ref[exp(R / beta)].

    Args:
      ref_scores: [B], reward units, of completions that the reference sampled; a prompt's are adjacent.
      group_size: G, samples per prompt, at least 2, divides B.
      beta: [] above 0, reward units a nat.

    Returns:
      [B / G] float32, reward units, one a prompt.

    Raises:
      ValueError: `beta` is not above 0, or `group_size` is below 2 or does not divide B.
      AssertionError: `ref_scores` is not of rank 1.

    Example:
      >>> import jax.numpy as jnp
      >>> print(optimal_values(jnp.array([1.0, 1.0, 0.0, 5.0]), group_size=2, beta=1e-3).round(2))
      [1. 5.]
    """
    check_number("beta", beta, 0, strict=True)
    groups = groups_of(ref_scores, group_size)
    scale = jnp.asarray(beta, groups.dtype)
    return scale * (jax.nn.logsumexp(groups / scale, axis=1) - math.log(group_size))
