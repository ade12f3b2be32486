"""From scores to advantages: rewards per token, Monte Carlo returns, baselines over groups of samples."""

import chex
import jax
import jax.numpy as jnp

from pgjax.core.checks import check_number, check_whole
from pgjax.core.layouts import like, whole_along
from pgjax.core.masking import as_float, as_floats, as_mask, where_mask

_Affine = tuple[jax.Array, jax.Array]  # x -> second + first * x


def place_scores(scores: jax.typing.ArrayLike, mask: jax.typing.ArrayLike) -> jax.Array:
    """Put each sequence's score at its last sampled token.

    r[b, t] = scores[b] if t is the last entry inside mask[b], else 0. Without a discount, every token of the sequence has the
    score as its return, which keeps the policy gradient unbiased.

    Args:
      scores: [B], reward units, of any real dtype.
      mask: [B, T] boolean, sampled by the policy.

    Returns:
      [B, T] float32; a row with an empty mask is all zeros.

    Raises:
      ValueError: `mask` is None: it alone says how many tokens there are.
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> print(place_scores(jnp.array([0.9]), jnp.array([[False, True, True, False]])))
      [[0.  0.  0.9 0. ]]
    """
    if mask is None:
        raise ValueError("place_scores: mask must be given: it alone says how many tokens there are")
    scores, mask = as_float(scores), jnp.asarray(mask)
    chex.assert_rank([scores, mask], [1, 2])
    chex.assert_equal_shape_prefix([scores, mask], 1)
    places = jax.lax.broadcasted_iota(jnp.int32, mask.shape, 1)
    last = jnp.max(places, axis=1, keepdims=True, initial=-1, where=as_mask(mask, mask))
    return where_mask(places == last, jnp.broadcast_to(scores[:, None], mask.shape))


def kl_shaped_rewards(
    scores: jax.typing.ArrayLike,
    kl: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike | None,
    *,
    kl_coef: jax.typing.ArrayLike,
) -> jax.Array:
    """Reward the last sampled token with the score, and subtract the KL penalty at every sampled token.

    r[b, t] = scores[b] [t is last] - kl_coef * kl[b, t] inside the mask, 0 outside.
    Ziegler et al. (2019), "Fine-Tuning Language Models from Human Preferences".

    With k1 as `kl` and reward-to-go, this gives the exact gradient of E[score] - kl_coef * KL(policy || reference). With
    any other estimator it is biased, because the gradient through `kl` itself is missing: k3 or `categorical_kl` is exact
    only if it is a term of the loss as well.

    Args:
      scores: [B], reward units.
      kl: [B, T], nats per token, usually `kl_k1(old_logprobs, ref_logprobs)`.
      mask: [B, T] boolean, sampled by the policy; None counts every entry.
      kl_coef: [], reward units per nat.

    Returns:
      [B, T] float32, reward units.

    Raises:
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> kl, mask = jnp.array([[9.0, 0.5, 1.0]]), jnp.array([[False, True, True]])
      >>> print(kl_shaped_rewards(jnp.array([2.0]), kl, mask, kl_coef=0.5))
      [[ 0.   -0.25  1.5 ]]
    """
    scores, kl = as_floats(scores, kl)
    # Cast, because where 64 bits are enabled, a Python number would make everything float64.
    coef = jnp.asarray(kl_coef).astype(kl.dtype)
    chex.assert_rank([kl, coef], [2, 0])
    inside = as_mask(mask, kl)
    return place_scores(scores, inside) - coef * where_mask(inside, kl)


def monte_carlo_returns(
    rewards: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike | None,
    *,
    discount: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """Sum the rewards from each sampled token to the end of its sequence.

    G_t = r_t + discount * G_{t'}, t' the next entry inside the mask. After the last one the return is 0, also where the
    sequence was cut at the length limit: nothing is bootstrapped. Entries outside the mask add no reward and are no step of
    discounting.

    Unbiased at discount 1. A lower discount biases: the effect of token t on the reward at u is weighted by
    discount^(u - t), but the prefixes are not weighted. The result is not the gradient of any objective. Nota and Thomas
    (2020), "Is the Policy Gradient a Gradient?".

    Args:
      rewards: [B, T], one per token; integers become float32.
      mask: [B, T] boolean, sampled by the policy; None counts every entry.
      discount: [] in [0, 1], the factor per sampled token; may be traced.

    Returns:
      [B, T] float32, reward units; 0 outside the mask.

    Raises:
      ValueError: `discount` is a number outside [0, 1].
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> mask = jnp.array([[False, True, True, False]])
      >>> print(monte_carlo_returns(jnp.array([[7.0, 1.0, 2.0, 7.0]]), mask, discount=0.5))
      [[0. 2. 2. 0.]]
    """
    given = as_float(rewards)
    rewards = whole_along(given, -1)
    check_number("discount", discount, 0, most=1)
    factor = jnp.asarray(discount).astype(rewards.dtype)
    chex.assert_rank([rewards, factor], [2, 0])
    inside = whole_along(as_mask(mask, given), -1)
    factors = jnp.where(inside, factor, 1.0)

    def join(later: _Affine, earlier: _Affine) -> _Affine:
        return earlier[0] * later[0], earlier[1] + earlier[0] * later[1]

    elements = (factors, where_mask(inside, rewards))
    _, returns = jax.lax.associative_scan(join, elements, reverse=True, axis=1)
    return like(where_mask(inside, returns), given)


def monte_carlo_advantages(
    rewards: jax.typing.ArrayLike,
    values: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike | None,
    *,
    discount: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """Subtract the values from the Monte Carlo returns.

    A_t = G_t - V_t inside the mask. Ahmadian et al. (2024), "Back to Basics". Unbiased for any values that are estimated
    before the token is seen, accurate or not (lambda = 1: nothing is bootstrapped). Accurate ones lower the variance. A
    value that depends on the token biases.

    Args:
      rewards: [B, T], one per token.
      values: [B, T], the value before each token, reward units.
      mask: [B, T] boolean, sampled by the policy; None counts every entry.
      discount: [] in [0, 1], the factor per sampled token.

    Returns:
      [B, T] float32, reward units; 0 outside the mask.

    Raises:
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> rewards, values = jnp.array([[1.0, 2.0]]), jnp.array([[0.5, 0.5]])
      >>> print(monte_carlo_advantages(rewards, values, jnp.array([[True, True]])))
      [[2.5 1.5]]
    """
    rewards, values = as_floats(rewards, values)
    chex.assert_equal_shape([rewards, values])
    returns = monte_carlo_returns(rewards, mask, discount=discount)
    return where_mask(as_mask(mask, rewards), returns - values)


def groups_of(scores: jax.typing.ArrayLike, group_size: int) -> jax.Array:
    """Lay out scores a group a row.

    Args:
      scores: [B], reward units; the `group_size` rows of one prompt are adjacent.
      group_size: G, samples per prompt, at least 2, divides B.

    Returns:
      [B / G, G] float32.

    Raises:
      ValueError: `group_size` is below 2 or does not divide B.
      AssertionError: `scores` is not of rank 1.

    Example:
      >>> import jax.numpy as jnp
      >>> print(groups_of(jnp.array([1, 3, 5, 7]), 2))
      [[1. 3.]
       [5. 7.]]
    """
    scores = as_float(scores)
    chex.assert_rank(scores, 1)
    if not isinstance(group_size, jax.core.Tracer) and group_size < 2:
        raise ValueError(f"group_size must be at least 2, got {group_size}: one sample has none to compare with")
    check_whole("group_size", group_size, 2)
    if scores.shape[0] % group_size:
        raise ValueError(f"{scores.shape[0]} scores do not divide into groups of group_size {group_size}")
    return whole_along(scores, 0).reshape(-1, group_size)  # a group may lie on several devices


def leave_one_out_baseline(
    scores: jax.typing.ArrayLike, *, group_size: int, mask: jax.typing.ArrayLike | None = None
) -> jax.Array:
    """Average the scores of the other samples of the same prompt.

    b_i = sum_{j != i} s_j / (G - 1) over the group of i. Kool et al. (2019), "Buy 4 REINFORCE Samples, Get a
    Baseline for Free!"; Ahmadian et al. (2024), RLOO. The baseline is independent of sample i, so `scores - b` is
    unbiased. (The mean of the whole group as a baseline scales the expected gradient by 1 - 1/G.)

    Args:
      scores: [B], reward units; the `group_size` rows of one prompt are adjacent.
      group_size: G, samples per prompt, at least 2, divides B.
      mask: [B] boolean, the samples that are compared; None: all. The others count in nobody's baseline. Where a sample has
        no other to be compared with, its own score is the baseline, so that it teaches nothing.

    Returns:
      [B] float32, reward units.

    Raises:
      ValueError: `group_size` is below 2 or does not divide B.
      AssertionError: `scores` is not of rank 1.

    Example:
      >>> import jax.numpy as jnp
      >>> print(leave_one_out_baseline(jnp.array([1.0, 3.0, 5.0, 7.0]), group_size=2))
      [3. 1. 7. 5.]
    """
    groups = groups_of(scores, group_size)
    if mask is not None:
        inside = _inside(mask, groups)
        counted = where_mask(inside, groups)
        others = jnp.sum(counted, axis=1, keepdims=True) - counted
        count = jnp.sum(inside, axis=1, keepdims=True) - inside.astype(jnp.int32)
        mean = others / jnp.maximum(count, 1).astype(others.dtype)
        return like(jnp.where(count > 0, mean, counted).reshape(-1), as_float(scores))
    others = jnp.sum(groups, axis=1, keepdims=True) - groups
    return like((others / (group_size - 1)).reshape(-1), as_float(scores))


def group_advantages(
    scores: jax.typing.ArrayLike,
    *,
    group_size: int,
    normalize: bool = True,
    mask: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Subtract the group's mean from each sample's score, and divide by the group's standard deviation.

    A_i = (s_i - mean) / (std + 1e-4), std the sample standard deviation (divided by G - 1): GRPO, Shao et al.
    (2024), "DeepSeekMath", in the form that public trainers use. `normalize=False`: A_i = s_i - mean, Dr.
    GRPO, Liu et al. (2025), "Understanding R1-Zero-Like Training". A group of equal scores gives exactly 0.

    Biased. Without `normalize` the expected gradient is the exact one times 1 - 1/G. With it, the gradient has another
    direction, and does not depend on the scale of the scores. With G = 2 it is proportional to that of P(s > s') - P(s < s'),
    where s' is the score of a sample from the policy held fixed. As G grows it tends to the exact gradient
    divided by the scores' standard deviation, so that each prompt is weighted by the inverse of its own.

    Args:
      scores: [B], reward units; the `group_size` rows of one prompt are adjacent.
      group_size: G, samples per prompt, at least 2, divides B.
      normalize: whether to divide by the group's standard deviation.
      mask: [B] boolean, the samples that are compared; None: all. The others count in no mean and no deviation, and their
        own advantage is 0, as is that of a sample alone in its group.

    Returns:
      [B] float32, in standard deviations, or reward units without `normalize`.

    Raises:
      ValueError: `group_size` is below 2 or does not divide B.
      AssertionError: `scores` is not of rank 1.

    Example:
      >>> import jax.numpy as jnp
      >>> print(group_advantages(jnp.array([1.0, 3.0, 5.0, 5.0]), group_size=2, normalize=False))
      [-1.  1.  0.  0.]
    """
    groups = groups_of(scores, group_size)
    if mask is not None:
        return like(_advantages_inside(groups, _inside(mask, groups), normalize).reshape(-1), as_float(scores))
    # Relative to the group's first score, equal scores are exactly 0: the division would scale a rounding error up by 1e4.
    shifted = groups - groups[:, :1]
    centred = shifted - jnp.mean(shifted, axis=1, keepdims=True)
    if not normalize:
        return like(centred.reshape(-1), as_float(scores))
    variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / (group_size - 1)
    return like((centred / (_root(variance) + 1e-4)).reshape(-1), as_float(scores))


def _inside(mask: jax.typing.ArrayLike, groups: jax.Array) -> jax.Array:
    whole = whole_along(jnp.asarray(mask), 0)
    chex.assert_shape(whole, (groups.size,))
    return as_mask(whole.reshape(groups.shape), groups)


def _advantages_inside(groups: jax.Array, inside: jax.Array, normalize: bool) -> jax.Array:
    """Compare the scores of each row inside a mask, [groups, G]."""
    count = jnp.sum(inside, axis=1, keepdims=True).astype(groups.dtype)
    one = jnp.argmax(inside, axis=1, keepdims=True)  # the first that counts
    shifted = where_mask(inside, groups - jnp.take_along_axis(groups, one, axis=1))
    mean = jnp.sum(shifted, axis=1, keepdims=True) / jnp.maximum(count, 1)
    centred = where_mask(inside, shifted - mean)
    if not normalize:
        return centred
    variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
    return centred / (_root(variance) + 1e-4)


def _root(variance: jax.Array) -> jax.Array:
    """Take the square root, 0 of 0, with a gradient that is finite."""
    varied = variance > 0
    return where_mask(varied, jnp.sqrt(jnp.where(varied, variance, 1.0)))
