"""Losses that tell the policy that the clip is around from the one that sampled: decoupled PPO and A-3PO."""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from pgjax.core.checks import check_number
from pgjax.core.importance import truncated_importance_weights
from pgjax.core.losses import clipped_surrogate_loss
from pgjax.core.masking import AxisName, as_floats
from pgjax.core.reductions import aligned


def decoupled_ppo_loss(
    logprobs: ArrayLike,
    prox_logprobs: ArrayLike,
    sampler_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    clip_eps: ArrayLike = 0.2,
    clip_eps_high: ArrayLike | None = None,
    cap: ArrayLike = jnp.inf,
    reduce: str = "token_mean",
    axis_name: AxisName = None,
) -> jax.Array:
    """Clip around a recent policy, and correct for the older one that sampled: decoupled PPO.

    L = -reduce(w min(r A, clip(r) A)), r = pi / pi_prox, w = min(pi_prox / mu, cap). Hilton et al. (2022), "Batch
    size-invariance for policy optimization"; Fu et al. (2025), "AReaL". With pi_prox = mu it is `clipped_surrogate_loss`; with
    `a3po_logprobs` as pi_prox, A-3PO.

    Unclipped and uncapped its gradient is that of the local objective (`clipped_surrogate_loss`) at mu's prefixes, whatever
    pi_prox is, because w r = pi / mu: exact where the policy is mu, biased elsewhere. The clip and the cap add to the bias;
    the clip does not act at pi = pi_prox, however old the samples are.

    Args:
      logprobs: any shape ([B, T] tokens, [B] sequences), nats, under the present policy.
      prox_logprobs: the same shape, nats, under the policy that the clip is around; carries no gradient.
      sampler_logprobs: the same shape, nats, under the distribution that was sampled from; carries no gradient.
      advantages: the same shape; carries no gradient.
      mask: the same shape, boolean; None counts every entry.
      clip_eps: [] not below 0.
      clip_eps_high: [] not below 0; None: `clip_eps`.
      cap: [] above 0, the largest weight w.
      reduce: "token_mean", "sequence_mean", "sequence_sum" or "none", as in `policy_gradient_loss`.
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      [], float32; with "none" the shape of `logprobs`, 0 outside the mask.

    Raises:
      ValueError: a bound is out of its range, or `reduce` is none of the four.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> policy, sampler = jnp.log(jnp.array([0.9])), jnp.log(jnp.array([0.5]))
      >>> print(decoupled_ppo_loss(policy, policy, sampler, jnp.ones(1)))  # 1.8 times as likely, and not clipped
      -1.8
    """
    weights = truncated_importance_weights(prox_logprobs, sampler_logprobs, mask, cap=cap)
    (advantages, weights) = as_floats(advantages, weights)
    return clipped_surrogate_loss(
        logprobs, prox_logprobs, weights * advantages, mask,
        clip_eps=clip_eps, clip_eps_high=clip_eps_high, reduce=reduce, axis_name=axis_name,
    )  # fmt: skip


def a3po_logprobs(logprobs: ArrayLike, sampler_logprobs: ArrayLike, *, alpha: ArrayLike) -> jax.Array:
    """Put a proximal policy between the sampler and the present policy, without a pass of its own: A-3PO.

    log pi_prox = sg[log mu + alpha (log pi - log mu)], for `decoupled_ppo_loss`. Li et al. (2025), "A-3PO: Accelerating
    Asynchronous LLM Training with Staleness-aware Proximal Policy Approximation".

    Only the clip depends on it: r = (pi / mu)^(1 - alpha), w = (pi / mu)^alpha, and w r is pi / mu at every alpha. At alpha = 0
    the loss is `clipped_surrogate_loss` around mu, at alpha = 1 nothing is clipped. (It is no normalised distribution.)

    Args:
      logprobs: any shape, nats, under the present policy.
      sampler_logprobs: the same shape, nats, under the distribution that was sampled from.
      alpha: [] in [0, 1].

    Returns:
      The same shape, float32, nats; carries no gradient.

    Raises:
      ValueError: `alpha` is a number outside [0, 1].
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(a3po_logprobs(jnp.array([-1.0]), jnp.array([-3.0]), alpha=0.25))
      [-2.5]
    """
    check_number("alpha", alpha, 0, most=1)
    _, (new, old) = aligned(None, stop_gradient(logprobs), stop_gradient(sampler_logprobs))
    return old + stop_gradient(jnp.asarray(alpha).astype(new.dtype)) * (new - old)
