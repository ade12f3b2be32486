"""What the policy losses have in common: arrays of one type and shape inside the mask, and the reduction to one number."""

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from pgjax.core.checks import check_number
from pgjax.core.masking import AxisName, as_floats, as_mask, masked_mean, where_mask

REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum")  # of a loss to one number


def aligned(mask: ArrayLike | None, *xs: ArrayLike) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Cast arrays to one float type and set them to zero outside the mask, before exp is applied to them.

    Args:
      mask: the arrays' shape, boolean; None counts every entry.
      *xs: arrays of one shape.

    Returns:
      The mask, boolean, and the arrays.

    Raises:
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(aligned(jnp.array([True, False]), jnp.array([1, 2]))[1][0])
      [1. 0.]
    """
    arrays = as_floats(*xs)
    chex.assert_equal_shape(arrays)
    inside = as_mask(mask, arrays[0])
    return inside, tuple(where_mask(inside, x) for x in arrays)


def reduced(losses: jax.Array, mask: jax.Array, reduce: str, axis_name: AxisName) -> jax.Array:
    """Reduce the losses of tokens to one number, as `losses.policy_gradient_loss` says.

    Args:
      losses: any shape.
      mask: the same shape, boolean.
      reduce: "token_mean", "sequence_mean", "sequence_sum" or "none".
      axis_name: mapped axis or axes to reduce over too.

    Returns:
      [], float32; with "none" the shape and type of `losses`, 0 outside the mask.

    Raises:
      ValueError: `reduce` is none of the four.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> print(reduced(x, x < 4, "sequence_mean", None))
      2.25
    """
    if reduce == "none":
        return where_mask(mask, losses)
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, none, got {reduce!r}")
    if reduce == "token_mean" or losses.ndim < 2:
        return masked_mean(losses, mask, axis_name=axis_name)
    sums = jnp.sum(where_mask(mask, losses), axis=-1)
    counts = jnp.sum(mask.astype(losses.dtype), axis=-1)
    rows = sums / jnp.maximum(counts, 1.0) if reduce == "sequence_mean" else sums
    return masked_mean(rows, counts > 0, axis_name=axis_name)


def ratio_range(clip_eps: ArrayLike, clip_eps_high: ArrayLike | None, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Give the ends of the ratio's range: 1 - clip_eps and 1 + clip_eps_high.

    Args:
      clip_eps: [] not below 0.
      clip_eps_high: [] not below 0; None: `clip_eps`.
      dtype: of the ends.

    Returns:
      [] each.

    Raises:
      ValueError: one is a number below 0.

    Example:
      >>> [float(end) for end in ratio_range(0.5, None, "float32")]
      [0.5, 1.5]
    """
    above = clip_eps if clip_eps_high is None else clip_eps_high
    check_number("clip_eps", clip_eps, 0)
    check_number("clip_eps_high", above, 0)
    return 1.0 - jnp.asarray(clip_eps, dtype), 1.0 + jnp.asarray(above, dtype)


def over_sequences(x: jax.Array, mask: jax.Array, *, mean: bool) -> jax.Array:
    """Sum or average over each sequence's tokens, and give every token the result.

    Args:
      x: [..., T] 0 outside the mask; with fewer than two axes each entry is a sequence, and comes back as it is.
      mask: the same shape, boolean.
      mean: whether to divide by the number of tokens.

    Returns:
      The shape of `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 3.0, 0.0]])
      >>> print(over_sequences(x, x > 0, mean=True))
      [[2. 2. 2.]]
    """
    if x.ndim < 2:
        return x
    total = jnp.sum(x, axis=-1, keepdims=True)
    count = jnp.maximum(jnp.sum(mask.astype(x.dtype), axis=-1, keepdims=True), 1.0)
    return jnp.broadcast_to(total / count if mean else total, x.shape)


def everywhere(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Gather an array's entries from all devices, in one row, inside `shard_map` and on an Explicit mesh.

    Args:
      x: any shape.
      axis_name: mapped axis or axes that split it; None: it is whole.

    Returns:
      [N], all entries; of an empty array a single 0, so that there is an entry to compare with.

    Example:
      >>> import jax.numpy as jnp
      >>> everywhere(jnp.zeros((2, 3)), None).shape
      (6,)
    """
    if x.size == 0:
        return jnp.zeros(1, x.dtype)
    if axis_name is not None:
        return jax.lax.all_gather(x.reshape(-1), axis_name, tiled=True)
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:  # there nothing is gathered that is not asked for
        x = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))
    return x.reshape(-1)
