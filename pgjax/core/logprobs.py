"""Log-probabilities and entropies in the token frame. The only shift between logits and tokens is in this file.

Every per-token array is [B, T], and entry t belongs to `tokens[:, t]`, which the model predicts at position t - 1.
`token_frame` moves a value from the position where it was computed to the token that the position predicts.
"""

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pgjax.core.checks import check_ids, check_number
from pgjax.core.layouts import like, whole_along
from pgjax.core.masking import as_float


def token_frame(x: ArrayLike) -> jax.Array:
    """Move each position's value to the token that the position predicts.

    y[:, t] = x[:, t - 1], y[:, 0] = 0.

    Args:
      x: [B, T, ...], one value per position.

    Returns:
      The same shape, one value per token. The last position predicts no token, and its value is dropped.

    Example:
      >>> import jax.numpy as jnp
      >>> print(token_frame(jnp.array([[1.0, 2.0, 3.0]])))
      [[0. 1. 2.]]
    """
    given = jnp.asarray(x)
    whole = whole_along(given, 1)
    return like(jnp.concatenate([jnp.zeros_like(whole[:, :1]), whole[:, :-1]], axis=1), given)


def next_tokens(tokens: jax.Array) -> jax.Array:
    """Return the token that each position predicts. The last position gets id 0, which `token_frame` drops again.

    Example:
      >>> print(next_tokens(jnp.array([[5, 6, 7]])))
      [[6 7 0]]
    """
    tokens = jnp.asarray(tokens).astype(jnp.int32)
    whole = whole_along(tokens, 1)
    return like(jnp.concatenate([whole[:, 1:], jnp.zeros_like(whole[:, :1])], axis=1), tokens)


def _scaled(logits: jax.Array, temperature: ArrayLike) -> jax.Array:
    return as_float(logits) / jax.lax.stop_gradient(jnp.asarray(temperature)).astype(as_float(logits).dtype)


def shifted_logits(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Subtract each row's largest logit, and mark the rows that are usable.

    A row with NaN or +inf, or in which every logit is -inf, is not usable. It is replaced by zeros, so that it puts no NaN
    into the gradient where a mask excludes it.

    Args:
      logits: [..., V] floating.

    Returns:
      ([..., V] logits of which the largest is 0, [...] boolean: whether the row is usable).

    Example:
      >>> import jax.numpy as jnp
      >>> z, usable = shifted_logits(jnp.array([[1.0, 3.0], [jnp.nan, 0.0]]))
      >>> print(z, usable)
      [[-2.  0.]
       [ 0.  0.]] [ True False]
    """
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    usable = jnp.isfinite(top)
    shifted = jnp.where(usable, logits - top, 0.0)
    return shifted, jnp.squeeze(usable, axis=-1)


def picked_logits(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Pick the logit of one id from each row: [..., V] and [...] to [...]; 0 for an id outside the vocabulary."""
    # A comparison instead of a gather: XLA fuses it with the other sums over V, and V may be sharded.
    hit = jax.lax.broadcasted_iota(ids.dtype, logits.shape, logits.ndim - 1) == ids[..., None]
    return jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)


def token_logprobs(logits: ArrayLike, tokens: ArrayLike, *, temperature: ArrayLike = 1.0) -> jax.Array:
    """Compute each token's log-probability given the tokens before it.

    logprobs[:, t] = log softmax(logits[:, t - 1] / temperature)[tokens[:, t]], logprobs[:, 0] = 0.

    Logits of -inf are fine (a forbidden token). A row of logits with NaN gives NaN there and no gradient.

    Args:
      logits: [B, T, V] of any floating type; computed in float32.
      tokens: [B, T] integer ids in [0, V); an id outside gives NaN at its place.
      temperature: [] above 0, the sampler's; carries no gradient.

    Returns:
      [B, T] float32, in nats; entry 0 is 0.

    Raises:
      ValueError: `temperature` is a number that is not above 0, or `tokens` are not whole numbers.
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> print(token_logprobs(jnp.zeros((1, 3, 4)), jnp.array([[0, 1, 2]])))
      [[ 0.        -1.3862944 -1.3862944]]
    """
    logits, tokens = jnp.asarray(logits), jnp.asarray(tokens)
    chex.assert_rank([logits, tokens], [3, 2])
    check_ids("token_logprobs: tokens", tokens)
    return token_frame(_at_positions(logits, next_tokens(tokens), temperature))


def aligned_token_logprobs(logits: ArrayLike, tokens: ArrayLike, *, temperature: ArrayLike = 1.0) -> jax.Array:
    """Compute each token's log-probability from logits that stand beside it: those of completions, in much other code.

    logprobs[:, t] = log softmax(logits[:, t] / temperature)[tokens[:, t]]: nothing is shifted. For logits of whole
    sequences, in which position t predicts token t + 1, take `token_logprobs`.

    Args:
      logits: [B, C, V] of any floating type; logits[:, t] are those that tokens[:, t] was drawn from.
      tokens: [B, C] integer ids in [0, V); an id outside gives NaN at its place.
      temperature: [] above 0, the sampler's; carries no gradient.

    Returns:
      [B, C] float32, in nats.

    Raises:
      ValueError: `temperature` is a number that is not above 0, or `tokens` are not whole numbers.
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> print(aligned_token_logprobs(jnp.array([[[0.0, 0.0], [0.0, 9.0]]]), jnp.array([[0, 1]])).round(3))
      [[-0.693 -0.   ]]
    """
    logits, tokens = jnp.asarray(logits), jnp.asarray(tokens)
    check_ids("aligned_token_logprobs: tokens", tokens)
    return _at_positions(logits, tokens.astype(jnp.int32), temperature)


def _at_positions(logits: jax.Array, ids: jax.Array, temperature: ArrayLike) -> jax.Array:
    """Compute the log-probability of one id at each position."""
    check_number("temperature", temperature, 0, strict=True)
    chex.assert_rank([logits, ids], [3, 2])
    chex.assert_equal_shape_prefix([logits, ids], 2)
    z, usable = shifted_logits(_scaled(logits, temperature))
    logprobs = picked_logits(z, ids) - jnp.log(jnp.sum(jnp.exp(z), axis=-1))
    return jnp.where(usable & (ids >= 0) & (ids < logits.shape[-1]), logprobs, jnp.nan)


def token_entropy(logits: ArrayLike, *, temperature: ArrayLike = 1.0) -> jax.Array:
    """Compute the entropy of the distribution that each token was drawn from.

    entropy[:, t] = logsumexp(z) - sum_v softmax(z)_v z_v with z = logits[:, t - 1] / temperature.

    As a bonus in the loss it is biased. Its gradient is exact for each token's distribution given its prefix, but leaves
    out the effect on which prefixes are sampled.

    Args:
      logits: [B, T, V] of any floating type; -inf is fine (a forbidden token).
      temperature: [] above 0, the sampler's; carries no gradient.

    Returns:
      [B, T] float32, in nats, not below 0; entry 0 is 0.

    Raises:
      ValueError: `temperature` is a number that is not above 0.
      AssertionError: `logits` is not of rank 3.

    Example:
      >>> import jax.numpy as jnp
      >>> print(token_entropy(jnp.zeros((1, 2, 4))))
      [[0.        1.3862944]]
    """
    check_number("temperature", temperature, 0, strict=True)
    logits = jnp.asarray(logits)
    chex.assert_rank(logits, 3)
    z, usable = shifted_logits(_scaled(logits, temperature))
    weights = jnp.exp(z)
    total = jnp.sum(weights, axis=-1)
    # exp(-inf) * -inf is NaN, in the value and in the gradient, where the limit is 0.
    finite_z = jnp.where(jnp.isneginf(z), 0.0, z)
    entropy = jnp.log(total) - jnp.sum(weights * finite_z, axis=-1) / total
    return token_frame(jnp.where(usable, entropy, jnp.nan))
