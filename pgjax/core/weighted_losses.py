"""Losses that weigh each token by a function of its ratio: CISPO, SAPO, DPPO; and one that charges the ratio's square."""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from pgjax.core.checks import check_number
from pgjax.core.importance import truncated_importance_weights
from pgjax.core.masking import AxisName
from pgjax.core.reductions import aligned, ratio_range, reduced

DIVERGENCES = ("tv", "kl")
_FAR = 20.0  # nats: at larger log-ratios SAPO's gate is flat to the last digit


def cispo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    clip_eps: ArrayLike = 1.0,
    clip_eps_high: ArrayLike | None = 4.0,
    reduce: str = "token_mean",
    axis_name: AxisName = None,
) -> jax.Array:
    """Clip each token's ratio as a weight, through which no gradient flows: CISPO.

    L = -reduce(sg[clip(r, 1 - clip_eps, 1 + clip_eps_high)] A log pi), r = exp(logprobs - old_logprobs). MiniMax (2025),
    "MiniMax-M1". Every token keeps a gradient, also beyond the bounds, where `clipped_surrogate_loss` gives it none.

    At logprobs = old_logprobs, its gradient is that of `policy_gradient_loss`, as long as 1 lies within the bounds. Once they
    differ, and inside the bounds, it is that of the local objective (`clipped_surrogate_loss`), biased. Beyond them a token
    counts as the bound, which biases towards the old policy's gradient.

    Args:
      logprobs: any shape ([B, T] tokens, [B] sequences), nats, under the present policy.
      old_logprobs: the same shape, nats, under the policy that sampled; carries no gradient.
      advantages: the same shape; carries no gradient.
      mask: the same shape, boolean; None counts every entry.
      clip_eps: [] not below 0; from 1 on there is no lower bound, as in the paper.
      clip_eps_high: [] not below 0; None: `clip_eps`. The largest weight is 1 + clip_eps_high. (TRL's `epsilon_high` is the
        weight itself, so that its default of 0.2 scales the gradient by 0.2.)
      reduce: "token_mean", "sequence_mean", "sequence_sum" or "none", as in `policy_gradient_loss`.
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      [], float32; with "none" the shape of `logprobs`, 0 outside the mask.

    Raises:
      ValueError: a bound is out of its range, or `reduce` is none of the four.
      AssertionError: the shapes differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> new, old, advantages = jnp.log(jnp.array([0.5, 8.0])), jnp.zeros(2), jnp.ones(2)
      >>> print(jax.grad(cispo_loss)(new, old, advantages))  # weights 0.5 and 5, each over two tokens
      [-0.25 -2.5 ]
    """
    inside, (new, old, advantages) = aligned(mask, logprobs, stop_gradient(old_logprobs), stop_gradient(advantages))
    low, high = ratio_range(clip_eps, clip_eps_high, new.dtype)
    weight = jnp.maximum(jnp.exp(jnp.minimum(new - old, jnp.log(high))), low)  # bounded before exp
    return reduced(-stop_gradient(weight) * advantages * new, inside, reduce, axis_name)


def sapo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    tau_pos: ArrayLike = 1.0,
    tau_neg: ArrayLike = 1.05,
    reduce: str = "sequence_mean",
    axis_name: AxisName = None,
) -> jax.Array:
    """Let each token's gradient fade as its ratio leaves 1, instead of clipping it: SAPO.

    L = -reduce(4 / tau sigmoid(tau (r - 1)) A), tau = tau_pos where A > 0, else tau_neg. Gao et al. (2025), "Soft Adaptive
    Policy Optimization". The gradient of a token is 4 p (1 - p) r A times that of log pi, p = sigmoid(tau (r - 1)).

    At logprobs = old_logprobs, its gradient is that of `policy_gradient_loss`. Once they differ it is biased: of the local
    objective (`clipped_surrogate_loss`) with each token's weight r times 4 p (1 - p), which is at most 1.

    Args:
      logprobs: any shape ([B, T] tokens, [B] sequences), nats, under the present policy.
      old_logprobs: the same shape, nats, under the policy that sampled; carries no gradient.
      advantages: the same shape; carries no gradient.
      mask: the same shape, boolean; None counts every entry.
      tau_pos, tau_neg: [] above 0; the larger, the nearer to 1 the gradient fades.
      reduce: "token_mean", "sequence_mean", "sequence_sum" or "none", as in `policy_gradient_loss`.
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      [], float32; with "none" the shape of `logprobs`, 0 outside the mask.

    Raises:
      ValueError: a tau is not above 0, or `reduce` is none of the four.
      AssertionError: the shapes differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> gradient = jax.grad(sapo_loss)(jnp.log(jnp.array([1.0, 4.0])), jnp.zeros(2), jnp.ones(2))
      >>> [f"{x:.2f}" for x in gradient]
      ['-0.50', '-0.36']
    """
    check_number("tau_pos", tau_pos, 0, strict=True)
    check_number("tau_neg", tau_neg, 0, strict=True)
    inside, (new, old, advantages) = aligned(mask, logprobs, stop_gradient(old_logprobs), stop_gradient(advantages))
    tau = jnp.where(advantages > 0, jnp.asarray(tau_pos, new.dtype), jnp.asarray(tau_neg, new.dtype))
    ratio = jnp.exp(jnp.minimum(new - old, _FAR))
    return reduced(-4.0 / tau * jax.nn.sigmoid(tau * (ratio - 1.0)) * advantages, inside, reduce, axis_name)


def dppo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    divergence: str = "tv",
    delta: ArrayLike = 0.2,
    cap: ArrayLike = 20.0,
    reduce: str = "token_mean",
    axis_name: AxisName = None,
) -> jax.Array:
    """Stop a token where its probability has moved far, not where its ratio has: DPPO.

    L = -reduce(sg[min(r, cap)] A log pi), 0 where A > 0 and pi > pi_old, or A <= 0 and pi < pi_old, by a divergence above
    delta: "tv", |pi - pi_old|, or "kl", of the two outcomes "this token" and "another one", KL(pi_old || pi). Qi et al.
    (2026), "Rethinking the Trust Region in LLM Reinforcement Learning". A rare token may double; a common one may not.

    At logprobs = old_logprobs, its gradient is that of `policy_gradient_loss`. Once they differ it is that of the local
    objective (`clipped_surrogate_loss`) over the tokens that are not stopped: biased, and the stops add to the bias.

    Args:
      logprobs: any shape ([B, T] tokens), nats, under the present policy.
      old_logprobs: the same shape, nats, under the policy that sampled; carries no gradient.
      advantages: the same shape; carries no gradient.
      mask: the same shape, boolean; None counts every entry.
      divergence: "tv" or "kl".
      delta: [] not below 0, of the divergence: a probability, or nats.
      cap: [] above 0, the largest weight.
      reduce: "token_mean", "sequence_mean", "sequence_sum" or "none", as in `policy_gradient_loss`.
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      [], float32; with "none" the shape of `logprobs`, 0 outside the mask.

    Raises:
      ValueError: `divergence` is none of the two, a number is out of its range, or `reduce` is none of the four.
      AssertionError: the shapes differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> new, old = jnp.log(jnp.array([0.02, 0.9])), jnp.log(jnp.array([0.01, 0.6]))
      >>> print(abs(jax.grad(dppo_loss)(new, old, jnp.ones(2))))  # the rare one has doubled and moves on
      [1. 0.]
    """
    check_number("delta", delta, 0)
    inside, (new, old, advantages) = aligned(mask, logprobs, stop_gradient(old_logprobs), stop_gradient(advantages))
    moved = jnp.exp(new) - jnp.exp(old)
    far = _divergence(stop_gradient(new), old, divergence) > jnp.asarray(delta, new.dtype)
    stopped = far & jnp.where(advantages > 0, moved > 0, moved < 0)
    weight = truncated_importance_weights(new, old, ~stopped, cap=cap)
    return reduced(-weight * advantages * new, inside, reduce, axis_name)


def squared_log_ratio_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    coef: ArrayLike = 1e-3,
    reduce: str = "token_mean",
    axis_name: AxisName = None,
) -> jax.Array:
    """Pull the policy to the one that sampled by the square of the log-ratio, instead of clipping.

    L = reduce(-A log pi + coef (log pi - log pi_old)^2). Kimi team (2025), "Kimi k1.5", whose tau is 2 coef; with sequences
    ([B]) it is theirs.

    At logprobs = old_logprobs, its gradient is that of `policy_gradient_loss`. Once they differ it is biased for J: it goes on to
    weigh samples as the old policy drew them, and each entry's minimum lies at the log-ratio A / (2 coef).

    Args:
      logprobs: any shape ([B, T] tokens, [B] sequences), nats, under the present policy.
      old_logprobs: the same shape, nats, under the policy that sampled; carries no gradient.
      advantages: the same shape; carries no gradient.
      mask: the same shape, boolean; None counts every entry.
      coef: [] not below 0, reward units a nat squared.
      reduce: "token_mean", "sequence_mean", "sequence_sum" or "none", as in `policy_gradient_loss`.
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      [], float32; with "none" the shape of `logprobs`, 0 outside the mask.

    Raises:
      ValueError: `coef` is a number below 0, or `reduce` is none of the four.
      AssertionError: the shapes differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> print(jax.grad(squared_log_ratio_loss)(jnp.zeros(1), jnp.zeros(1) - 1.0, jnp.ones(1), coef=0.5))  # at the minimum
      [0.]
    """
    check_number("coef", coef, 0)
    inside, (new, old, advantages) = aligned(mask, logprobs, stop_gradient(old_logprobs), stop_gradient(advantages))
    weight = stop_gradient(jnp.asarray(coef).astype(new.dtype))
    return reduced(weight * jnp.square(new - old) - advantages * new, inside, reduce, axis_name)


def _divergence(new: jax.Array, old: jax.Array, divergence: str) -> jax.Array:
    """Measure how far a token's probability has moved."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if divergence == "tv":
        return jnp.abs(jnp.exp(new) - jnp.exp(old))
    # Of another token; never 0, so that a certain one makes no NaN.
    other, old_other = (jnp.maximum(-jnp.expm1(x), 1e-8) for x in (new, old))
    return jnp.exp(old) * (old - new) + old_other * (jnp.log(old_other) - jnp.log(other))
