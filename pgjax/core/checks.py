"""Checks of single numbers among the arguments of functions and scripts."""

import operator

import chex
import jax
import jax.numpy as jnp


def check_number(
    name: str, x: jax.typing.ArrayLike, low: float, below: float | None = None, *, strict: bool = False
) -> None:
    """Refuse a number that is out of its range. A traced number passes, as its value is not known.

    Args:
      name: the argument's name, for the message.
      x: [] the number.
      low: its lower bound.
      below: its upper bound, which is excluded; None: no upper bound.
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
    try:
        number = None if isinstance(x, bool) else operator.index(x)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name} must be a whole number, got {x!r}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
