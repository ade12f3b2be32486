"""Checks of plain numbers, at the top of functions and of scripts."""

import operator

import chex
import jax
import jax.numpy as jnp


def check_number(
    name: str, x: jax.typing.ArrayLike, low: float, below: float | None = None, *, strict: bool = False
) -> None:
    """Refuse a number that is out of its range; one that is traced can't be looked at.

    Args:
      name: what the caller calls it.
      x: [] the number.
      low: the least that it may be.
      below: what it must be less than; None: any.
      strict: whether `low` itself is refused.

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
    """Refuse what is no whole number, or one that is too small.

    Args:
      name: what the caller calls it.
      x: the number.
      least: the smallest that it may be.

    Raises:
      ValueError: with the number and what it must be.

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
