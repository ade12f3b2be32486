"""Checks of single numbers among the arguments of functions and scripts."""

import operator

import chex
import jax
import jax.numpy as jnp


def check_number(
    name: str,
    x: jax.typing.ArrayLike,
    low: float,
    below: float | None = None,
    *,
    strict: bool = False,
    most: float | None = None,
) -> None:
    """Refuse a number that is out of its range. A traced number passes, as its value is not known.

    Args:
      name: the argument's name, for the message.
      x: [] the number.
      low: its lower bound.
      below: its upper bound, which is excluded; None: no upper bound.
      most: its upper bound, which is included; None: no upper bound.
      strict: whether `low` itself is excluded too.

    Raises:
      ValueError: with the number and its range.

    Example:
      >>> check_number("temperature", 0.0, 0, strict=True)
      Traceback (most recent call last):
      ValueError: temperature must be above 0, got 0.0
    """
    chex.assert_rank(x, 0)
    if isinstance(x, jax.core.Tracer):
        return
    number = float(jax.device_get(x))
    if not (low < number if strict else low <= number) or not (below is None or number < below):
        end = "" if below is None else " and finite" if below == jnp.inf else f" and below {below}"
        raise ValueError(f"{name} must be {'above' if strict else 'at least'} {low}{end}, got {x}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {x}")


def check_ids(name: str, x: jax.Array) -> None:
    """Refuse token ids that are not whole numbers: as ids, truth values and fractions would be rounded in silence.

    Args:
      name: of the function and the argument, for the message.
      x: the ids.

    Raises:
      ValueError: with the dtype.

    Example:
      >>> check_ids("token_logprobs: tokens", jnp.ones(2))
      Traceback (most recent call last):
      ValueError: token_logprobs: tokens must be whole numbers, ids of the vocabulary, got float32
    """
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be whole numbers, ids of the vocabulary, got {x.dtype}")


def check_whole(name: str, x: object, least: int) -> None:
    """Refuse a value that is not a whole number, or is too small.

    Args:
      name: the argument's name, for the message.
      x: the value.
      least: the smallest value that is accepted.

    Raises:
      ValueError: with the value and the condition that it breaks.

    Example:
      >>> check_whole("batch_size", 2.0, 1)
      Traceback (most recent call last):
      ValueError: batch_size must be a whole number, got 2.0
    """
    if isinstance(x, jax.core.Tracer):
        raise ValueError(
            f"{name} must be known when the function is traced, got a traced value: make it a static argument"
        )
    try:
        number = None if isinstance(x, bool) else operator.index(x)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name} must be a whole number, got {x!r}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
