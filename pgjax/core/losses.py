"""Losses: scalars for `jax.grad`. Gradients flow through the model's outputs (`logprobs`, `values`, scores) alone.

With `axis_name`, numerators and denominators are summed over devices, so the loss is the global batch's. For its gradient
inside `shard_map` and `pmap` see `masking.masked_mean`.
"""

import chex
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from pgjax.core.checks import check_number
from pgjax.core.masking import AxisName, as_floats, as_mask, global_sum, masked_mean, where_mask
from pgjax.core.reductions import aligned, ratio_range, reduced


def policy_gradient_loss(
    logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    reduce: str = "token_mean",
    axis_name: AxisName = None,
) -> jax.Array:
    """Compute the loss whose gradient is minus the policy gradient.

    L = -reduce(advantages * logprobs). Williams (1992), "Simple Statistical Gradient-Following Algorithms".

    Unbiased on samples of the present policy with "sequence_sum", if the advantages are rewards-to-go, minus any value
    that does not depend on the token or later ones. If every sequence has T tokens, the means over tokens give that
    gradient divided by T. If lengths vary they are biased. "sequence_mean" gives the gradient of E[R / length] for an
    advantage R that is the same for all tokens. "token_mean" tends to the exact gradient over the mean length as the batch
    grows, and for one sequence it equals "sequence_mean". A baseline then biases too: even a constant advantage changes
    the lengths.

    Args:
      logprobs: any shape ([B, T] tokens, [B] sequences), nats, under the policy that sampled them.
      advantages: the same shape; carries no gradient.
      mask: the same shape, boolean; None counts every entry.
      reduce: "token_mean": mean over all tokens. "sequence_mean": mean over the last axis, then over sequences.
        "sequence_sum": sum over the last axis, then mean over sequences. Sequences with an empty mask are left out of the
        mean over sequences. With fewer than two axes each entry is a sequence, and all three are the mean. "none": no
        reduction. To accumulate exactly, divide the sum by the tokens in the mask for "token_mean", by the sequences with a
        token for "sequence_sum", and for "sequence_mean" each token by its sequence's tokens first, all counted over
        everything that is accumulated.
      axis_name: mapped axis or axes to reduce over too (they split sequences, not tokens).

    Returns:
      [], float32; with "none" the shape of `logprobs`, 0 outside the mask.

    Raises:
      ValueError: `reduce` is none of the four.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(policy_gradient_loss(jnp.array([-1.0, -2.0]), jnp.array([1.0, -1.0])))
      -0.5
    """
    inside, (logprobs, advantages) = aligned(mask, logprobs, stop_gradient(advantages))
    return reduced(-advantages * logprobs, inside, reduce, axis_name)


def clipped_surrogate_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    clip_eps: ArrayLike = 0.2,
    clip_eps_high: ArrayLike | None = None,
    dual_clip: ArrayLike | None = None,
    reduce: str = "token_mean",
    axis_name: AxisName = None,
) -> jax.Array:
    """Compute PPO's clipped loss.

    L = -reduce(min(r A, clip(r, 1 - clip_eps, 1 + clip_eps_high) A)), r = exp(logprobs - old_logprobs).
    Schulman et al. (2017), "Proximal Policy Optimization Algorithms"; a higher upper bound: Yu et al. (2025),
    "DAPO"; `dual_clip` c: max(min(...), c A) where A < 0, Ye et al. (2020), "Mastering Complex Control in
    MOBA Games".

    At logprobs = old_logprobs, its gradient is that of `policy_gradient_loss`, whatever the bounds. Once they differ: ratios
    of whole sequences ([B]), unclipped, still give the exact gradient of E[R]. Ratios of tokens, unclipped, give that of
    the local objective E_old[sum_t r_t A_t] (Kakade & Langford 2002), in which prefixes and continuations are the old
    policy's: it is biased for the new policy. The clip adds to the bias.

    An entry's gradient is 0 if and only if (A > 0 and r > 1 + clip_eps_high) or (A < 0 and r < 1 - clip_eps),
    or (A < 0 and r > dual_clip), or A = 0.

    Args:
      logprobs: any shape ([B, T] tokens, [B] sequences), nats, under the present policy.
      old_logprobs: the same shape, nats, under the policy that sampled; carries no gradient.
      advantages: the same shape; carries no gradient.
      mask: the same shape, boolean; None counts every entry.
      clip_eps: [] not below 0; 0 is allowed.
      clip_eps_high: [] not below 0; None: `clip_eps`.
      dual_clip: [] above 1; None: no bound on r where A < 0.
      reduce: "token_mean", "sequence_mean", "sequence_sum" or "none", as in `policy_gradient_loss`.
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      [], float32; with "none" the shape of `logprobs`, 0 outside the mask.

    Raises:
      ValueError: a bound is out of its range, or `reduce` is none of the four.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> new, old, advantages = jnp.log(jnp.array([1.5, 0.9])), jnp.zeros(2), jnp.array([1.0, 1.0])
      >>> print(clipped_surrogate_loss(new, old, advantages, clip_eps=0.2))
      -1.05
    """
    if dual_clip is not None:
        check_number("dual_clip", dual_clip, 1, strict=True)
    inside, (new, old, advantages) = aligned(mask, logprobs, stop_gradient(old_logprobs), stop_gradient(advantages))
    low, high = ratio_range(clip_eps, clip_eps_high, new.dtype)
    upper = jnp.where(advantages > 0, high, jnp.asarray(jnp.inf if dual_clip is None else dual_clip, new.dtype))
    lower = jnp.where(advantages < 0, low, -jnp.inf)
    # Comparisons instead of min and clip, because these divide the gradient between their arguments at a tie. Entries that
    # get no gradient are removed before exp: where it overflows, 0 * inf would be NaN.
    at = jnp.exp(stop_gradient(new - old))
    stopped = (at < lower) | (at > upper)
    moving = jnp.exp(where_mask(~stopped & (advantages != 0), new - old))
    ratio = jnp.where(stopped, stop_gradient(jnp.clip(at, lower, upper)), moving)
    return reduced(-ratio * advantages, inside, reduce, axis_name)


def value_loss(
    values: ArrayLike,
    returns: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    old_values: ArrayLike | None = None,
    clip_eps: ArrayLike | None = None,
    reduce: str = "token_mean",
    axis_name: AxisName = None,
) -> jax.Array:
    """Compute half the mean squared error of the values, optionally clipped around the old values.

    L = reduce(0.5 (V - G)^2), or with `old_values` and `clip_eps`
    L = reduce(0.5 max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2)), the larger of the two errors: the
    value clipping of the PPO code of Dhariwal et al. (2017), "OpenAI Baselines".

    Unclipped and with on-policy returns, its minimum is each prefix's expected return, with which `monte_carlo_advantages`
    have low variance. The clip moves the minimum towards the old value where the expected return lies outside the bounds.

    Args:
      values: any shape, reward units.
      returns: the same shape; carries no gradient.
      mask: the same shape, boolean; None counts every entry.
      old_values: the same shape, the values at sampling time; carries no gradient. Needs `clip_eps`.
      clip_eps: [] not below 0, reward units. Needs `old_values`.
      reduce: "token_mean", "sequence_mean", "sequence_sum" or "none", as in `policy_gradient_loss`.
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      [], float32, reward units squared; with "none" the shape of `values`, 0 outside the mask.

    Raises:
      ValueError: one of `old_values` and `clip_eps` comes without the other, `clip_eps` is below 0, or `reduce` is none of
        the four.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(value_loss(jnp.array([1.0, 2.0]), jnp.array([0.0, 2.0])))
      0.25
    """
    if (old_values is None) != (clip_eps is None):
        given, absent = ("clip_eps", "old_values") if old_values is None else ("old_values", "clip_eps")
        raise ValueError(f"value_loss got {given} without {absent}; give both to clip, neither not to")
    if old_values is None or clip_eps is None:
        inside, (new, target) = aligned(mask, values, stop_gradient(returns))
        return reduced(0.5 * jnp.square(new - target), inside, reduce, axis_name)
    check_number("clip_eps", clip_eps, 0)
    inside, (new, target, old) = aligned(mask, values, stop_gradient(returns), stop_gradient(old_values))
    bound = jax.lax.stop_gradient(jnp.asarray(clip_eps, new.dtype))
    held = old + jnp.clip(new - old, -bound, bound)
    error, held_error = jnp.square(new - target), jnp.square(held - target)
    return reduced(0.5 * jnp.where(held_error > error, held_error, error), inside, reduce, axis_name)


def cross_entropy_loss(
    logprobs: ArrayLike, mask: ArrayLike | None = None, *, reduce: str = "token_mean", axis_name: AxisName = None
) -> jax.Array:
    """Compute the mean negative log-likelihood, for supervised fine-tuning.

    L = -reduce(logprobs) over the mask. On samples of another policy, its expected gradient is that of KL(other || policy)
    divided by the number of tokens. This is exact if all lengths are equal; otherwise it holds as the batch grows.

    Args:
      logprobs: any shape, nats, from `token_logprobs` or `linear_token_logprobs`.
      mask: the same shape, boolean: the tokens to learn; None counts every entry, entry 0 of a row included.
      reduce: "token_mean", "sequence_mean", "sequence_sum" or "none", as in `policy_gradient_loss`.
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      [], float32, nats per token; with "none" the shape of `logprobs`, 0 outside the mask.

    Raises:
      ValueError: `reduce` is none of the four.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(cross_entropy_loss(jnp.array([[0.0, -1.0, -3.0]]), jnp.array([[False, True, True]])))
      2.0
    """
    inside, (new,) = aligned(mask, logprobs)
    return reduced(-new, inside, reduce, axis_name)


def preference_loss(
    chosen: ArrayLike,
    rejected: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    margin: ArrayLike | None = None,
    center_coef: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    reduce: str = "sequence_mean",
    axis_name: AxisName = None,
) -> jax.Array:
    """Compute the Bradley-Terry loss of a reward model.

    L = mean(-log sigmoid(chosen - rejected - margin) + center_coef * (chosen + rejected)^2). Bradley
    and Terry (1952); margin: Touvron et al. (2023), "Llama 2"; centring: Eisenstein et al. (2023), "Helping
    or Herding?".

    If preferences are drawn with probability sigmoid(true chosen - true rejected), its minimum is the true reward plus any
    constant. Centring fixes the constant and shrinks the scores towards 0. A margin spreads them. Both bias.

    Args:
      chosen: [B], the model's scores of the preferred answers; carries gradient.
      rejected: [B], of the other answers; carries gradient.
      mask: [B] boolean, the pairs that count; None counts every pair.
      margin: [B] or [], by how much the chosen score should exceed the rejected one; carries no gradient.
      center_coef: [] weight of the squared sum of the two scores.
      weights: [B] not below 0; the mean is then the sum of weight times term over the sum of weights. Carries no gradient.
      reduce: "sequence_mean", or "none": each pair's term, times its weight. To accumulate exactly, divide their sum by the pairs
        in the mask, or by the sum of their weights, counted over everything that is accumulated.
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      [], float32; with "none" [B], 0 outside the mask.

    Raises:
      ValueError: `reduce` is none of the two.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(preference_loss(jnp.array([1.0]), jnp.array([1.0])))
      0.6931472
    """
    chosen, rejected, offset, weight = as_floats(
        chosen, rejected, stop_gradient(0.0 if margin is None else margin), stop_gradient(center_coef)
    )
    chex.assert_equal_shape([chosen, rejected])
    chex.assert_rank(weight, 0)
    if offset.ndim:
        chex.assert_equal_shape([chosen, offset])
    if reduce not in ("sequence_mean", "none"):
        raise ValueError(f"reduce must be sequence_mean or none, got {reduce!r}")
    inside = as_mask(mask, chosen)
    chosen, rejected, offset = (
        where_mask(inside, jnp.broadcast_to(x, chosen.shape)) for x in (chosen, rejected, offset)
    )

    # Without centring, the square of a large sum must not overflow.
    sums = jnp.where(weight == 0, 0.0, chosen + rejected)
    terms = -jax.nn.log_sigmoid(chosen - rejected - offset) + weight * jnp.square(sums)
    given = inside if weights is None else jnp.asarray(weights)
    of_pairs = where_mask(inside, stop_gradient(given).astype(terms.dtype))
    chex.assert_equal_shape([of_pairs, terms])
    weighed = where_mask(inside, of_pairs * terms)
    if reduce == "none":
        return weighed
    total = global_sum(of_pairs, axis_name)
    return (global_sum(weighed, axis_name) / jnp.where(total > 0, total, 1.0)).astype(jnp.float32)


def surrogate_diagnostics(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    clip_eps: ArrayLike = 0.2,
    clip_eps_high: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> dict[str, jax.Array]:
    """Measure how far the policy has moved from the one that sampled.

    With r = exp(logprobs - old_logprobs): approx_kl = mean(r - 1 - log r), an estimate of KL(old || new) that is unbiased and
    never below 0 (Schulman 2020); clip_fraction, the fraction with r < 1 - clip_eps or r > 1 + clip_eps_high; and the
    mean, smallest and largest r. approx_kl is per token: if every sequence has T tokens, T times it is the KL of sequences.

    Args:
      logprobs: any shape, nats, under the present policy.
      old_logprobs: the same shape, nats, under the policy that sampled.
      mask: the same shape, boolean; None counts every entry.
      clip_eps: [] the loss's bound.
      clip_eps_high: [] its upper bound; None: `clip_eps`.
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      A dict of [] float32: approx_kl, clip_fraction, ratio_mean, ratio_min, ratio_max; all 0 if the mask is
      empty. Carries no gradient.

    Raises:
      ValueError: a bound is a number below 0.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> found = surrogate_diagnostics(jnp.log(jnp.array([1.0, 1.5])), jnp.zeros(2))
      >>> print(found["clip_fraction"], found["ratio_max"])
      0.5 1.5
    """
    inside, (new, old) = aligned(mask, stop_gradient(logprobs), stop_gradient(old_logprobs))
    log_ratio = new - old
    ratio = jnp.exp(log_ratio)
    least = jnp.min(ratio, initial=jnp.inf, where=inside)
    largest = jnp.max(ratio, initial=-jnp.inf, where=inside)
    if axis_name is not None:
        least, largest = jax.lax.pmin(least, axis_name), jax.lax.pmax(largest, axis_name)
    seen = global_sum(inside.astype(ratio.dtype), axis_name) > 0
    low, high = ratio_range(clip_eps, clip_eps_high, ratio.dtype)
    far = ((ratio < low) | (ratio > high)).astype(ratio.dtype)
    return {
        "approx_kl": masked_mean(jnp.expm1(log_ratio) - log_ratio, inside, axis_name=axis_name),
        "clip_fraction": masked_mean(far, inside, axis_name=axis_name),
        "ratio_mean": masked_mean(ratio, inside, axis_name=axis_name),
        "ratio_min": where_mask(seen, least).astype(jnp.float32),
        "ratio_max": where_mask(seen, largest).astype(jnp.float32),
    }
