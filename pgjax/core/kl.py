"""The KL divergence of the policy from its reference: estimators, the exact sum, and an adaptive weight.

The effect of an estimator depends on where it is used. With pi the policy, d = log pi - log ref of a sampled token, and
samples drawn from pi:

- k1 in the reward, with reward-to-go: the exact gradient of the sequence's KL(pi || ref).
- k1 as a loss: an expected gradient of zero (E[grad log pi] = 0). The penalty has no effect.
- k2 as a loss, of the log-ratio summed over the sequence: the exact gradient of KL(pi || ref).
- k2 as a loss, token by token: not that gradient. It leaves out each token's effect on the tokens after it.
- k3 as a loss: the gradient of the forward KL(ref || pi), not of the divergence that it estimates.
- k2, k3 or the categorical KL in the reward alone: the gradient of its mean, minus the gradient that it has as a loss.
- k3 or the categorical KL in both the reward and the loss: exact, because its mean is the KL.

These statements hold for the sum over a sequence's tokens. If every sequence has T tokens, the mean is that sum over T.
If lengths vary, the mean is biased: k1 as a loss then changes the lengths, by the gradient of E[1 / length] for one
sequence, and by less in a larger batch.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pgjax.core.checks import check_number
from pgjax.core.logprobs import shifted_logits, token_frame
from pgjax.core.masking import as_float, as_floats, where_mask
from pgjax.core.reductions import aligned


def _log_ratio(logprobs: ArrayLike, ref_logprobs: ArrayLike) -> jax.Array:
    policy, reference = as_floats(logprobs, ref_logprobs)
    chex.assert_equal_shape([policy, reference])
    return policy - jax.lax.stop_gradient(reference)


def _finite_gradient(function: Callable[[Any], jax.Array], d: Any) -> jax.Array:
    # The mask is applied later, so a masked entry may hold any value here. One that is not finite is returned as it is and
    # gets no gradient: 0 * inf would put NaN into the gradients of everything that it was computed from.
    value = jax.lax.stop_gradient(function(d))
    finite = jnp.isfinite(value)
    return jnp.where(finite, function(jax.tree.map(lambda x: jnp.where(finite, x, 0.0), d)), value)


def kl_k1(logprobs: ArrayLike, ref_logprobs: ArrayLike) -> jax.Array:
    """Estimate KL(policy || reference) by the log-ratio: unbiased, and positive or negative.

    k1 = d = log pi - log ref. Schulman (2020), "Approximating KL Divergence", joschu.net/blog/kl-approx.html.

    Use: in the reward with reward-to-go (`kl_shaped_rewards`, `monte_carlo_returns`), or summed over the sequence in its
    score, its policy gradient is unbiased. As a loss term its expected on-policy gradient is 0: it penalises nothing.

    Args:
      logprobs: any shape, nats, of tokens sampled from the policy.
      ref_logprobs: the same shape, nats, of the same tokens; carries no gradient.

    Returns:
      The same shape, float32, in nats.

    Raises:
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(kl_k1(jnp.array([-1.0, -3.0]), jnp.array([-2.0, -2.0])))
      [ 1. -1.]
    """
    return _log_ratio(logprobs, ref_logprobs)


def kl_k2(logprobs: ArrayLike, ref_logprobs: ArrayLike) -> jax.Array:
    """Estimate KL(policy || reference) by half the squared log-ratio: biased, never negative.

    k2 = d^2 / 2, d = log pi - log ref. Schulman (2020), "Approximating KL Divergence".

    Use: as a loss on whole sequences (`logprobs` summed over tokens first), its expected on-policy gradient is exactly
    that of the KL. As a loss on single tokens it is biased: it leaves out each token's effect on later ones, and its
    expected gradient equals that of `categorical_kl` as a loss. In the reward it is biased: it gives the gradient of its
    own mean, minus the gradient that it has as a loss.

    Args:
      logprobs: any shape, nats, sampled from the policy: [B, T] tokens or [B] sequences.
      ref_logprobs: the same shape, nats; carries no gradient.

    Returns:
      The same shape, float32, in nats.

    Raises:
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(kl_k2(jnp.array([-1.0, -4.0]), jnp.array([-2.0, -2.0])))
      [0.5 2. ]
    """
    return _finite_gradient(lambda d: 0.5 * jnp.square(d), _log_ratio(logprobs, ref_logprobs))


def kl_k3(logprobs: ArrayLike, ref_logprobs: ArrayLike) -> jax.Array:
    """Estimate KL(policy || reference) without bias and never below zero.

    k3 = exp(-d) - 1 + d, d = log pi - log ref. Schulman (2020), "Approximating KL Divergence"; the KL term of
    GRPO (Shao et al. 2024).

    Use: well suited to measure the KL. As a loss it is biased: its expected on-policy gradient is that of the forward KL
    of each token's distribution at the policy's prefixes, or of KL(reference || policy) itself if `logprobs` are summed
    over the sequence first. In the reward it is biased too: it gives the gradient of the KL minus that one.

    Args:
      logprobs: any shape, nats, of tokens sampled from the policy.
      ref_logprobs: the same shape, nats; carries no gradient.

    Returns:
      The same shape, float32, in nats.

    Raises:
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(kl_k3(jnp.array([-1.0, -2.0]), jnp.array([-1.0, -2.0])))
      [0. 0.]
    """
    # expm1 keeps the digits that exp(-d) - 1 + d loses near d = 0.
    return _finite_gradient(lambda d: jnp.expm1(-d) + d, _log_ratio(logprobs, ref_logprobs))


def kl_k3_unbiased(logprobs: ArrayLike, ref_logprobs: ArrayLike, old_logprobs: ArrayLike) -> jax.Array:
    """Estimate KL(policy || reference) by k3, weighted so that its gradient as a loss is the KL's own.

    r k3, r = exp(logprobs - old_logprobs), k3 = exp(-d) - 1 + d, d = log pi - log ref; the gradient goes through both.
    DeepSeek-AI (2025), "DeepSeek-V3.2".

    Use: as a loss. Its expected gradient is that of each token's own KL(policy || reference), at the prefixes of the policy that
    sampled, on and off policy: that of `categorical_kl` as a loss and, on policy, of `kl_k2`. (k3 alone gives the forward KL's.)
    It leaves out each token's effect on later ones; of `logprobs` summed over the sequence first, it is exactly that of the
    sequence's KL.

    Args:
      logprobs: any shape, nats, under the present policy.
      ref_logprobs: the same shape, nats, of the same tokens; carries no gradient.
      old_logprobs: the same shape, nats, under the policy that sampled them; carries no gradient.

    Returns:
      The same shape, float32, in nats.

    Raises:
      AssertionError: the shapes differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.array([-1.0])
      >>> f"{kl_k3_unbiased(x, x + 1.0, x - 1.0)[0]:.3f}"
      '1.952'
    """
    d = _log_ratio(logprobs, ref_logprobs)
    log_ratio = _log_ratio(logprobs, old_logprobs).astype(d.dtype)
    return _finite_gradient(lambda both: jnp.exp(both[1]) * (jnp.expm1(-both[0]) + both[0]), (d, log_ratio))


def categorical_kl(logits: ArrayLike, ref_logits: ArrayLike) -> jax.Array:
    """Sum KL(policy || reference) over the vocabulary, at each token.

    kl[:, t] = sum_v p_v (log p_v - log q_v), p = softmax(logits[:, t - 1]), q = softmax(ref_logits[:, t - 1]).

    As a loss it is biased: its gradient is exact for each token's distribution given its prefix, but leaves out the effect
    on which prefixes are sampled. In the reward it gives that effect alone. In both, it is exact. Divide both logits by the
    temperature first if it is not 1.

    Args:
      logits: [B, T, V] of any floating type; -inf is fine (a forbidden token).
      ref_logits: [B, T, V]; carries no gradient. -inf where the policy's is finite gives inf, and no gradient there.

    Returns:
      [B, T] float32, in nats; entry 0 is 0.

    Raises:
      AssertionError: the shapes differ or are not of rank 3.

    Example:
      >>> import jax.numpy as jnp
      >>> print(categorical_kl(jnp.zeros((1, 2, 4)), jnp.array([[[0.0] * 4, [9.0] * 4]])))
      [[0. 0.]]
    """
    policy, reference = as_floats(logits, jax.lax.stop_gradient(ref_logits))
    chex.assert_rank(policy, 3)
    chex.assert_equal_shape([policy, reference])
    z, usable = shifted_logits(policy)
    ref_z, ref_usable = shifted_logits(reference)
    logp = z - jnp.log(jnp.sum(jnp.exp(z), axis=-1, keepdims=True))
    logq = ref_z - jnp.log(jnp.sum(jnp.exp(ref_z), axis=-1, keepdims=True))
    possible = ~jnp.isneginf(z)
    # Where it is not covered, the KL is inf. It is not summed there: the gradient of the sum would be 0 * inf, which is NaN
    # whatever mask follows.
    covered = ~jnp.any(possible & jnp.isneginf(ref_z), axis=-1)
    summed = possible & covered[..., None]
    kl = jnp.sum(jnp.exp(logp) * (where_mask(summed, logp) - where_mask(summed, logq)), axis=-1)
    kl = jnp.where(covered, kl, jnp.inf)
    return token_frame(jnp.where(usable & ref_usable, kl, jnp.nan))


def distillation_advantages(
    teacher_logprobs: ArrayLike, logprobs: ArrayLike, mask: ArrayLike | None = None
) -> jax.Array:
    """Reward each token of the policy's own samples by how much likelier the teacher finds it: on-policy distillation.

    A_t = sg[log pi_teacher - log pi]. Agarwal et al. (2024), "On-Policy Distillation of Language Models"; Lu and Thinking
    Machines (2025), "On-Policy Distillation".

    Biased for KL(policy || teacher), the reverse KL of sequences: a token is not charged for the prefixes that it leads to. The
    gradient is minus that of each token's own reverse KL at the policy's prefixes: that of `categorical_kl` as a loss, which
    sums over the vocabulary and so has less variance. With reward-to-go, `monte_carlo_returns` of these, it is exact.

    Args:
      teacher_logprobs: [B, T], nats, of the same tokens.
      logprobs: [B, T], nats, under the policy that sampled them.
      mask: [B, T] boolean; None counts every entry.

    Returns:
      [B, T] float32, nats; 0 outside the mask; carries no gradient.

    Raises:
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(distillation_advantages(jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -2.0]])))
      [[1. 0.]]
    """
    _, (teacher, policy) = aligned(mask, jax.lax.stop_gradient(teacher_logprobs), jax.lax.stop_gradient(logprobs))
    return teacher - policy


def adaptive_kl_coef(
    coef: ArrayLike,
    kl: ArrayLike,
    *,
    target: ArrayLike,
    horizon: ArrayLike,
    batch_size: ArrayLike,
) -> jax.Array:
    """Move the weight of the KL penalty towards the one that holds the KL at its target.

    coef * (1 + clip(kl / target - 1, -0.2, 0.2) * batch_size / horizon).
    Ziegler et al. (2019), "Fine-Tuning Language Models from Human Preferences", section 2.2.

    Args:
      coef: [] the present weight, reward units per nat.
      kl: [] nats per sequence: the KL summed over each sequence's tokens, then averaged over sequences. (A mean over
        tokens would be too small by a factor of the length.)
      target: [] nats per sequence.
      horizon: [] episodes over which an error of 20% or more changes the weight by about 20%. It must be more than a fifth
        of batch_size: otherwise the weight may fall below 0.
      batch_size: [] episodes since the last change.

    Returns:
      [], float32: the next weight.

    Raises:
      AssertionError: an argument is not a scalar.
      ValueError: `target` or `horizon` is a number not above 0.

    Example:
      >>> print(adaptive_kl_coef(0.1, 9.0, target=6.0, horizon=10000, batch_size=500))
      0.101
    """
    chex.assert_rank([coef, kl, target, horizon, batch_size], 0)
    check_number("target", target, 0, strict=True)
    check_number("horizon", horizon, 0, strict=True)
    coef, kl, target, horizon, batch_size = (
        as_float(x).astype(jnp.float32) for x in (coef, kl, target, horizon, batch_size)
    )
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return coef * (1.0 + error * batch_size / horizon)
