"""Masks, and the only two reductions over them: the mean and whitening, both by the global count."""

import chex
import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...] | None


def as_float(x: jax.typing.ArrayLike) -> jax.Array:
    """Cast to float32, or leave at float64.

    Integers and booleans become float32 too: a reward of 0.9 in an integer array would be 0.

    Args:
      x: any array or number.

    Returns:
      The same values, float32 (float64 if `x` is float64).

    Example:
      >>> import jax.numpy as jnp
      >>> as_float(jnp.array([1, 0])).dtype
      dtype('float32')
    """
    array = jnp.asarray(x)
    return array if array.dtype == jnp.float64 else array.astype(jnp.float32)


def as_floats(*xs: jax.typing.ArrayLike) -> tuple[jax.Array, ...]:
    """Cast several arrays to one float type: float32, or float64 if one of them is float64.

    Args:
      *xs: any arrays or numbers.

    Returns:
      The arrays in one dtype, in order.

    Example:
      >>> import jax.numpy as jnp
      >>> [x.dtype.name for x in as_floats(jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.int32))]
      ['float32', 'float32']
    """
    floats = [as_float(x) for x in xs]
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in floats) else jnp.float32
    return tuple(x.astype(dtype) for x in floats)


def as_mask(mask: jax.typing.ArrayLike | None, x: jax.Array) -> jax.Array:
    """Make a boolean mask with the shape of `x`.

    Args:
      mask: boolean or 0/1, the shape of `x`; None includes every entry.
      x: the array that is masked.

    Returns:
      A boolean array with the shape of `x`.

    Raises:
      ValueError: the mask holds another number than 0 and 1. The values of a traced mask can't be checked: there every
        number but 0 includes its entry.
      AssertionError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> as_mask(jnp.array([1, 0]), jnp.zeros(2))
      Array([ True, False], dtype=bool)
    """
    if mask is None:
        return jnp.ones_like(x, dtype=bool)
    array = jnp.asarray(mask)
    chex.assert_equal_shape([array, x])
    if array.dtype == jnp.bool_:
        return array
    _check_zeros_and_ones(mask)
    return array != 0


def _check_zeros_and_ones(mask: jax.typing.ArrayLike) -> None:
    """Refuse a mask that holds another number than 0 and 1; a traced one, or one of other processes, can't be looked at."""
    for x in jax.tree.leaves(mask):
        if isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return
    with jax.ensure_compile_time_eval():  # of a constant inside jit too
        values = jax.device_get(jnp.asarray(mask))
    others = values[(values != 0) & (values != 1)]
    if others.size:
        shown = ", ".join(f"{float(value):g}" for value in others[:3]) + (", ..." if others.size > 3 else "")
        raise ValueError(
            f"mask must hold only 0 and 1, got {shown} in {others.size} of {values.size} entries: "
            "a mask includes or excludes an entry, it gives it no weight"
        )


def where_mask(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Put zeros outside the mask, so that nothing there (NaN, infinity) reaches a value or a gradient.

    Args:
      mask: boolean, the shape of `x`.
      x: any floating array.

    Returns:
      `x` inside the mask and 0 outside.

    Example:
      >>> import jax.numpy as jnp
      >>> where_mask(jnp.array([True, False]), jnp.array([2.0, jnp.nan]))
      Array([2., 0.], dtype=float32)
    """
    return jnp.where(mask, x, 0)


def global_sum(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Sum an array here, and over the devices of `axis_name` if there is one.

    Args:
      x: any array.
      axis_name: name or names of mapped axes, or None.

    Returns:
      [], the dtype of `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> global_sum(jnp.array([1.0, 2.0]), None)
      Array(3., dtype=float32)
    """
    total = jnp.sum(x)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def _mean(x: jax.Array, mask: jax.Array, axis_name: AxisName) -> jax.Array:
    total = global_sum(where_mask(mask, x), axis_name)
    count = global_sum(mask.astype(x.dtype), axis_name)
    return total / jnp.maximum(count, 1)


def masked_mean(
    x: jax.typing.ArrayLike, mask: jax.typing.ArrayLike | None = None, *, axis_name: AxisName = None
) -> jax.Array:
    """Average the entries inside the mask.

    mean = sum_i m_i x_i / sum_i m_i, both sums over every device of `axis_name`: the global count, not a mean
    of means. An empty mask gives 0. What stands outside the mask, NaN included, changes neither value nor
    gradient.

    Over the tokens of sampled sequences: where all have T tokens, its gradient is that of the sum over a sequence
    divided by T, and as unbiased. Where lengths vary it is biased, most in small batches: the samples that are summed
    also decide what the sum is divided by.

    Gradients with `axis_name`: in `jax.shard_map` the gradient with respect to a replicated argument is
    already the gradient of the global mean. In `jax.pmap` (and in `shard_map` with `check_vma=False`) JAX
    differentiates the sum of every device's copy of the result, so take `jax.lax.pmean` of the gradients.

    Args:
      x: array of any shape, any unit.
      mask: the same shape, boolean or 0/1; None counts every entry.
      axis_name: mapped axis or axes to reduce over too, inside `shard_map` or `pmap`.

    Returns:
      [], float32, in the unit of `x`.

    Raises:
      ValueError: the mask holds another number than 0 and 1, as in `as_mask`.
      AssertionError: the shapes of `x` and `mask` differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(masked_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])))
      2.0
    """
    x = as_float(x)
    return _mean(x, as_mask(mask, x), axis_name).astype(jnp.float32)


def masked_whiten(
    x: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike | None,
    *,
    shift_mean: bool = True,
    axis_name: AxisName = None,
) -> jax.Array:
    """Scale the entries inside the mask to variance one and, unless told otherwise, to mean zero.

    y = (x - mean) / sqrt(var + 1e-8), with the population variance of the entries inside the mask, over every
    device of `axis_name`; `shift_mean=False` adds the mean back, unscaled.

    Biased as an advantage, since an entry stands in its own mean and deviation: the scores of two sequences
    become 1 and -1. As the batch grows the gradient is the exact one over the standard deviation.

    Args:
      x: [B, T] (any shape will do), any unit.
      mask: the same shape, boolean; None counts every entry.
      shift_mean: False keeps the mean.
      axis_name: mapped axis or axes to reduce over too, inside `shard_map` or `pmap`.

    Returns:
      The shape of `x`, in standard deviations; 0 outside the mask.

    Raises:
      AssertionError: the shapes of `x` and `mask` differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(masked_whiten(jnp.array([[1.0, 3.0, 9.0]]), jnp.array([[True, True, False]])))
      [[-1.  1.  0.]]
    """
    x = as_float(x)
    inside = as_mask(mask, x)
    mean = _mean(x, inside, axis_name)
    centred = where_mask(inside, x - mean)
    # A second time: of equal entries the mean's rounding would be left, blown up to as much as 1.
    centred = where_mask(inside, centred - _mean(centred, inside, axis_name))
    variance = _mean(jnp.square(centred), inside, axis_name)
    whitened = centred * jax.lax.rsqrt(variance + 1e-8)
    return whitened if shift_mean else where_mask(inside, whitened + mean)
