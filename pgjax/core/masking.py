"""Masks, and the two reductions over them: the mean and whitening. Both divide by the count over all devices."""

import chex
import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...] | None


def as_float(x: jax.typing.ArrayLike) -> jax.Array:
    """Cast to float32, or leave at float64.

    Integers and booleans become float32 too: in an integer array, a reward of 0.9 would be cut to 0. So do plain Python
    numbers, also where 64 bits are enabled.

    Args:
      x: any array or number.

    Returns:
      The same values, float32 (float64 if `x` is float64).

    Raises:
      ValueError: the numbers are complex: their imaginary parts would be dropped.

    Example:
      >>> import jax.numpy as jnp
      >>> as_float(jnp.array([1, 0])).dtype
      dtype('float32')
    """
    array = jnp.asarray(x)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"numbers must be real, got {array.dtype}")
    wide = array.dtype == jnp.float64 and type(x) is not float
    return array if wide else array.astype(jnp.float32)


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
      ValueError: the mask holds another number than 0 and 1, or is of a floating type where its values are not known (traced,
        or of other processes): it might be fractions, or added to logits elsewhere (0 and -inf). Whole numbers are taken
        there, and every one but 0 includes its entry.
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
    if all(map(_known, jax.tree.leaves(mask))):
        _check_zeros_and_ones(mask)
    elif not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"mask must be boolean or whole numbers where its values are not known, as under jit, got {array.dtype}: pass "
            "mask > 0 if it holds 0 and 1; it gives an entry no weight"
        )
    return array != 0


def _known(x: jax.typing.ArrayLike) -> bool:
    """Say whether the values of an array can be looked at: not those of a traced one, or of one of other processes."""
    return not isinstance(x, jax.core.Tracer) and not (isinstance(x, jax.Array) and not x.is_fully_addressable)


def _check_zeros_and_ones(mask: jax.typing.ArrayLike) -> None:
    """Refuse a mask that holds another number than 0 and 1."""
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

    mean = sum_i m_i x_i / sum_i m_i. With `axis_name`, both sums run over all devices: the result is the global mean, not
    a mean of the devices' means. An empty mask gives 0. Entries outside the mask, NaN included, change neither the value
    nor the gradient.

    As a mean over the tokens of sampled sequences: if every sequence has T tokens, its gradient is that of the
    sequence's sum divided by T, and just as unbiased. If lengths vary it is biased, most in small batches, because the
    samples also decide the number of tokens that the sum is divided by.

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
    """Scale the entries inside the mask to variance one and, by default, shift them to mean zero.

    y = (x - mean) / sqrt(var + 1e-8), with the population variance of the entries inside the mask, over all devices of
    `axis_name`. `shift_mean=False` adds the mean back, unscaled.

    As an advantage it is biased, because each entry is part of the mean and the deviation that it is compared with: the
    scores of two sequences become 1 and -1. As the batch grows, the gradient tends to the exact one divided by the standard
    deviation.

    Args:
      x: [B, T] or any other shape, any unit.
      mask: the same shape, boolean or 0/1; None counts every entry.
      shift_mean: False keeps the mean.
      axis_name: mapped axis or axes to reduce over too, inside `shard_map` or `pmap`.

    Returns:
      The shape of `x`, in standard deviations; 0 outside the mask.

    Raises:
      ValueError: the mask holds another number than 0 and 1, as in `as_mask`.
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
    # Centred twice: where all entries are equal, the rounding error of the mean would remain, and be scaled up to as much as 1.
    centred = where_mask(inside, centred - _mean(centred, inside, axis_name))
    variance = _mean(jnp.square(centred), inside, axis_name)
    whitened = centred * jax.lax.rsqrt(variance + 1e-8)
    return whitened if shift_mean else where_mask(inside, whitened + mean)
