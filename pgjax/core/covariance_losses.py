"""KL-Cov and Clip-Cov: hold back the few tokens that lower the entropy most. Cui et al. (2025), "The Entropy Mechanism".

A token's part in the covariance of advantages and log-probabilities, over all tokens of a batch,

    c = (A - mean A) (log pi - mean log pi),

is how much its gradient lowers the policy's entropy. A choice among all tokens of a batch is lost where the batch is learned in
parts: choose first, by `high_covariance_mask`, and cut afterwards.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from pgjax.core.checks import check_number
from pgjax.core.losses import clipped_surrogate_loss
from pgjax.core.masking import AxisName, as_mask, global_sum, where_mask
from pgjax.core.reductions import aligned, everywhere, ratio_range, reduced


def high_covariance_mask(
    logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    fraction: ArrayLike = 2e-4,
    axis_name: AxisName = None,
) -> jax.Array:
    """Choose the tokens with the largest part in the covariance of advantages and log-probabilities.

    The fraction of all tokens with the largest c = (A - mean A)(log pi - mean log pi), at least one. Cui et al. (2025).

    Args:
      logprobs: any shape, nats, under the policy.
      advantages: the same shape.
      mask: the same shape, boolean; None counts every entry.
      fraction: [] above 0, of the tokens in the mask.
      axis_name: mapped axis or axes that split the batch.

    Returns:
      The same shape, boolean. Tokens that tie with the last one chosen are chosen too.

    Raises:
      ValueError: `fraction` is not above 0.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(high_covariance_mask(jnp.array([-0.1, -2.0, -2.0]), jnp.array([1.0, 0.0, -1.0]), fraction=0.3))
      [ True False False]
    """
    check_number("fraction", fraction, 0, strict=True)
    inside, (logp, advantages) = aligned(mask, stop_gradient(logprobs), stop_gradient(advantages))
    covariance = _covariance(logp, advantages, inside, axis_name)
    return _largest(covariance, inside, _count(inside, fraction, axis_name), axis_name)


def kl_cov_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    fraction: ArrayLike = 2e-4,
    coef: ArrayLike = 1.0,
    chosen: ArrayLike | None = None,
    reduce: str = "token_mean",
    axis_name: AxisName = None,
) -> jax.Array:
    """Take the unclipped ratio, and hold the tokens of high covariance to the old policy: KL-Cov.

    L = reduce(-r A + coef |log r| [chosen]), chosen by `high_covariance_mask`. Cui et al. (2025), "The Entropy Mechanism of
    Reinforcement Learning for Reasoning Language Models".

    At logprobs = old_logprobs, its gradient is that of `policy_gradient_loss`: the slope of |log r| at 0 is taken as 0, so that
    the first update is not held at all. Later it is that of the local objective (`clipped_surrogate_loss`), biased, plus coef
    times the sign of log r on the chosen tokens.

    Args:
      logprobs: any shape ([B, T] tokens), nats, under the present policy.
      old_logprobs: the same shape, nats, under the policy that sampled; carries no gradient.
      advantages: the same shape; carries no gradient.
      mask: the same shape, boolean; None counts every entry.
      fraction: [] above 0, of the tokens in the mask.
      coef: [] not below 0, advantage units a nat.
      chosen: the same shape, boolean: the tokens to hold, where they are known beforehand, of a larger batch than this part
        of it; None: chosen here.
      reduce: "token_mean", "sequence_mean", "sequence_sum" or "none", as in `policy_gradient_loss`.
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      [], float32; with "none" the shape of `logprobs`, 0 outside the mask.

    Raises:
      ValueError: a number is out of its range, or `reduce` is none of the four.
      AssertionError: the shapes differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> new, old = jnp.array([-0.1, -2.0, -2.0]), jnp.array([-0.3, -2.0, -2.0])
      >>> gradient = jax.grad(kl_cov_loss)(new, old, jnp.array([1.0, 0.0, -1.0]), reduce="sequence_sum")
      >>> [f"{abs(3 * x):.2f}" for x in gradient]  # exp(0.2) less the hold of 1, which is on the first alone
      ['0.22', '0.00', '1.00']
    """
    check_number("coef", coef, 0)
    inside, (new, old, advantages) = aligned(mask, logprobs, stop_gradient(old_logprobs), stop_gradient(advantages))
    if chosen is None:
        chosen = high_covariance_mask(new, advantages, inside, fraction=fraction, axis_name=axis_name)
    losses = clipped_surrogate_loss(new, old, advantages, inside, clip_eps=jnp.inf, reduce="none")
    moved = jnp.sign(stop_gradient(new - old)) * (new - old)  # jnp.abs has slope 1 at 0
    held = stop_gradient(jnp.asarray(coef).astype(new.dtype)) * where_mask(as_mask(chosen, moved), moved)
    return reduced(losses + held, inside, reduce, axis_name)


def clip_cov_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    key: jax.Array,
    clip_eps: ArrayLike = 0.2,
    clip_eps_high: ArrayLike | None = None,
    fraction: ArrayLike = 2e-4,
    low: ArrayLike = 1.0,
    high: ArrayLike = 5.0,
    reduce: str = "token_mean",
    axis_name: AxisName = None,
) -> jax.Array:
    """Clip the ratio, and leave out a few random tokens of high covariance: Clip-Cov.

    L = reduce([not dropped] PPO's clipped loss); dropped are a random fraction of all tokens, at least one, among those with
    low < c < high that the clip does not hold. Cui et al. (2025), "The Entropy Mechanism of Reinforcement Learning for Reasoning
    Language Models".

    Biased at logprobs = old_logprobs too: what is dropped has a high A log pi, and is missing from the gradient. With n of N
    tokens dropped among M candidates, the expected gradient is that of `clipped_surrogate_loss` with the candidates'
    losses times 1 - n / M.

    Args:
      logprobs: any shape ([B, T] tokens), nats, under the present policy.
      old_logprobs: the same shape, nats, under the policy that sampled; carries no gradient.
      advantages: the same shape; carries no gradient.
      mask: the same shape, boolean; None counts every entry.
      key: of the draw. Inside `shard_map` the same on all devices.
      clip_eps: [] not below 0.
      clip_eps_high: [] not below 0; None: `clip_eps`.
      fraction: [] above 0, of the tokens in the mask.
      low, high: [] the range of c.
      reduce: "token_mean", "sequence_mean", "sequence_sum" or "none", as in `policy_gradient_loss`. What is dropped counts
        in the mean, as 0.
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      [], float32; with "none" the shape of `logprobs`, 0 outside the mask.

    Raises:
      ValueError: a number is out of its range, or `reduce` is none of the four.
      AssertionError: the shapes differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> new, advantages = jnp.array([-0.1, -3.0, -3.0]), jnp.array([2.0, 0.0, -2.0])
      >>> abs(float(clip_cov_loss(new, new, advantages, key=jax.random.key(0))))  # one of two is left out: 2 / 3
      0.666...
    """
    check_number("fraction", fraction, 0, strict=True)
    inside, (new, old, advantages) = aligned(mask, logprobs, stop_gradient(old_logprobs), stop_gradient(advantages))
    covariance = _covariance(stop_gradient(new), advantages, inside, axis_name)
    below, above = ratio_range(clip_eps, clip_eps_high, new.dtype)
    ratio = jnp.exp(stop_gradient(new - old))
    clipped = ((advantages > 0) & (ratio > above)) | ((advantages < 0) & (ratio < below))
    candidates = inside & ~clipped & (covariance > low) & (covariance < high)
    draw = jax.random.uniform(key if axis_name is None else _of_device(key, axis_name), new.shape, new.dtype)
    dropped = _largest(draw, candidates, _count(inside, fraction, axis_name), axis_name)
    return clipped_surrogate_loss(
        new, old, where_mask(~dropped, advantages), inside,
        clip_eps=clip_eps, clip_eps_high=clip_eps_high, reduce=reduce, axis_name=axis_name,
    )  # fmt: skip


def _covariance(logprobs: jax.Array, advantages: jax.Array, inside: jax.Array, axis_name: AxisName) -> jax.Array:
    count = jnp.maximum(global_sum(inside.astype(logprobs.dtype), axis_name), 1.0)
    one, other = (x - global_sum(x, axis_name) / count for x in (logprobs, advantages))
    return one * other


def _count(inside: jax.Array, fraction: ArrayLike, axis_name: AxisName) -> jax.Array:
    tokens = global_sum(inside.astype(jnp.int32), axis_name)
    share = jnp.asarray(fraction).astype(jnp.float32) * tokens.astype(jnp.float32)
    return jnp.maximum(jnp.floor(share).astype(jnp.int32), 1)


def _largest(x: jax.Array, candidates: jax.Array, count: jax.Array, axis_name: AxisName) -> jax.Array:
    """Choose the `count` largest candidates of all devices."""
    ordered = jnp.sort(everywhere(jnp.where(candidates, x, -jnp.inf), axis_name), descending=True)
    return candidates & (x >= ordered[jnp.minimum(count, ordered.size) - 1])


def _of_device(key: jax.Array, axis_name: AxisName) -> jax.Array:
    return jax.random.fold_in(key, jax.lax.axis_index(axis_name))
