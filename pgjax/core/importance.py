"""Importance weights, for samples of another distribution than the policy's: bounded or masked, of tokens or of sequences.

With mu the distribution that was sampled from, the weight of a token is pi / mu. Three levels of it differ in what they
correct:

- "sequence": the product over the sequence, pi(y) / mu(y). Unbiased for every objective, if nothing is cut off. Its variance
  grows exponentially with the length.
- "token": corrects each token's draw, at the sampler's prefixes. It gives the gradient of the local objective
  (`losses.clipped_surrogate_loss`), which is biased: the prefixes, and what follows the token, remain the sampler's.
- "geometric": the product to the power of 1 / length. It is no importance weight, whatever the cap; its use is to mask
  sequences on which the two distributions differ much.

Truncating gives a weight beyond the cap the cap, masking gives it 0. Masking is biased the more, because what the policy has
come to prefer is left out where truncating weakens it.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from pgjax.core.checks import check_number
from pgjax.core.masking import where_mask
from pgjax.core.reductions import aligned, over_sequences

LEVELS = ("token", "sequence", "geometric")


def truncated_importance_weights(
    logprobs: ArrayLike,
    sampler_logprobs: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    cap: ArrayLike,
    level: str = "token",
) -> jax.Array:
    """Compute importance weights for samples of another distribution than the policy's, bounded by a cap.

    w = min(exp(logprobs - sampler_logprobs), cap). Ionides (2008), "Truncated Importance Sampling". Use it where the
    sampler differs from the learner: by its precision, by a filter such as top_p, or by its age. `level` "sequence" takes
    the product over the sequence, "geometric" its root of the length.

    For whole sequences ([B], or "sequence"), w times the advantage is unbiased at `cap` = inf, provided that the sampler can
    draw every sequence that the policy can. For single tokens ([B, T]), it corrects the distribution of each token given the
    sampler's prefixes: this is the gradient of the local objective (`losses.clipped_surrogate_loss`), which is biased for
    the policy's own objective. "geometric" is biased at any cap. A cap bounds the variance, and biases towards the
    sampler's gradient by the probability mass that it cuts off.

    Args:
      logprobs: any shape ([B, T] tokens, [B] sequences), nats, under the policy.
      sampler_logprobs: the same shape, nats, under the distribution that was sampled from.
      mask: the same shape, boolean; None counts every entry.
      cap: [] above 0; infinity for no cap.
      level: "token", "sequence" or "geometric"; with fewer than two axes each entry is a sequence.

    Returns:
      The same shape, float32, 0 outside the mask; carries no gradient.

    Raises:
      ValueError: `cap` is a number not above 0, or `level` is none of the three.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> policy, sampler = jnp.log(jnp.array([0.2, 0.8])), jnp.log(jnp.array([0.4, 0.2]))
      >>> print(truncated_importance_weights(policy, sampler, cap=2.0).round(3))
      [0.5 2. ]
    """
    check_number("cap", cap, 0, strict=True)
    inside, log_weights = _log_weights(logprobs, sampler_logprobs, mask, level)
    bound = stop_gradient(jnp.asarray(cap).astype(log_weights.dtype))
    # The cap is applied before exp, so that nothing overflows.
    return where_mask(inside, jnp.exp(jnp.minimum(log_weights, jnp.log(bound))))


def masked_importance_weights(
    logprobs: ArrayLike,
    sampler_logprobs: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    cap: ArrayLike,
    floor: ArrayLike = 0.0,
    level: str = "token",
) -> jax.Array:
    """Compute importance weights, and set those out of a range to zero.

    w = exp(logprobs - sampler_logprobs) where floor <= w <= cap, else 0. Masked importance sampling, Liu, Li et al. (2025),
    "When Speed Kills Stability". The weights of "sequence" and "geometric" are those of whole sequences.

    Biased: the policy's gradient over what is left in alone. At floor = 0 and cap = inf nothing is left out, and "sequence"
    is unbiased (`truncated_importance_weights`).

    Args:
      logprobs: any shape ([B, T] tokens, [B] sequences), nats, under the policy.
      sampler_logprobs: the same shape, nats, under the distribution that was sampled from.
      mask: the same shape, boolean; None counts every entry.
      cap: [] above 0, the largest weight that is kept; infinity for none.
      floor: [] not below 0, the smallest weight that is kept.
      level: "token", "sequence" or "geometric"; with fewer than two axes each entry is a sequence.

    Returns:
      The same shape, float32, 0 outside the mask; carries no gradient.

    Raises:
      ValueError: a bound is out of its range, or `level` is none of the three.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> policy, sampler = jnp.log(jnp.array([0.2, 0.8])), jnp.log(jnp.array([0.4, 0.2]))
      >>> print(masked_importance_weights(policy, sampler, cap=2.0).round(3))
      [0.5 0. ]
    """
    check_number("cap", cap, 0, strict=True)
    check_number("floor", floor, 0)
    inside, log_weights = _log_weights(logprobs, sampler_logprobs, mask, level)
    low, high = (jnp.log(stop_gradient(jnp.asarray(x).astype(log_weights.dtype))) for x in (floor, cap))
    kept = inside & (log_weights >= low) & (log_weights <= high)
    return where_mask(kept, jnp.exp(where_mask(kept, log_weights)))


def icepop_weights(
    logprobs: ArrayLike,
    sampler_logprobs: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    floor: ArrayLike = 0.5,
    cap: ArrayLike = 5.0,
) -> jax.Array:
    """Compute importance weights of tokens, and leave out the tokens on which sampler and learner differ in either direction.

    w = exp(logprobs - sampler_logprobs) where floor <= w <= cap, else 0. IcePop, Ling team (2025), "Every Step Evolves".
    It is `masked_importance_weights` of tokens with a floor.

    Biased: the local objective's gradient (`losses.clipped_surrogate_loss`) over the tokens that are left in.

    Args:
      logprobs: any shape ([B, T] tokens, [B] sequences), nats, under the policy.
      sampler_logprobs: the same shape, nats, under the distribution that was sampled from.
      mask: the same shape, boolean; None counts every entry.
      floor: [] not below 0, the smallest weight that is kept.
      cap: [] above 0, the largest one.

    Returns:
      The same shape, float32, 0 outside the mask; carries no gradient.

    Raises:
      ValueError: a bound is out of its range.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(icepop_weights(jnp.log(jnp.array([0.4, 1.0, 6.0])), jnp.zeros(3)))
      [0. 1. 0.]
    """
    return masked_importance_weights(logprobs, sampler_logprobs, mask, cap=cap, floor=floor)


def _log_weights(
    logprobs: ArrayLike, sampler_logprobs: ArrayLike, mask: ArrayLike | None, level: str
) -> tuple[jax.Array, jax.Array]:
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    inside, (new, old) = aligned(mask, stop_gradient(logprobs), stop_gradient(sampler_logprobs))
    log_ratio = new - old
    return inside, log_ratio if level == "token" else over_sequences(log_ratio, inside, mean=level == "geometric")
