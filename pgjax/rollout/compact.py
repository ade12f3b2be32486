"""A decode loop whose batch shrinks as rows end: the rows that go on are gathered into one of a few smaller batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

SMALLEST = 8  # rows: below, a step reads the weights, and fewer rows make it no faster
SHORTEST = 64  # tokens: each size is a loop to compile, which shorter completions do not repay

# step [], what is held of rows, tokens, alive, states of stop strings, what is written of rows, their caches
Carry = tuple[jax.Array, Any, jax.Array, jax.Array, jax.Array | None, Any, Any]


def loop_sizes(rows: int, max_new_tokens: int) -> tuple[int, ...]:
    """List the numbers of rows that a decode loop goes through: each half of the one before.

    Args:
        rows: B.
        max_new_tokens: the longest completion.

    Returns:
        B first; B alone where little could be gained.

    Example:
        >>> loop_sizes(64, 256), loop_sizes(64, 32), loop_sizes(8, 256)
        ((64, 32, 16, 8), (64,), (8,))
    """
    sizes = [rows]
    while max_new_tokens >= SHORTEST and sizes[-1] // 2 >= SMALLEST:
        sizes.append(sizes[-1] // 2)
    return tuple(sizes)


def while_alive(advance: Callable[[Carry], Carry], carry: Carry, sizes: Sequence[int], steps: int) -> Any:
    """Run a decode loop until no row is alive or all steps are made, in ever smaller batches.

    Once the rows alive fit the next size, they are gathered, with everything that is held of them; what they wrote goes back to
    their places in the end. A row's numbers do not depend on the others, so its tokens are those of one loop over all rows.

    Args:
        advance: makes a step for the rows that it is given.
        carry: before the first step, of B rows: each array but the step is [B, ...].
        sizes: of the batches, falling, B first.
        steps: at most.

    Returns:
        What was written of all B rows.

    Example:
        >>> def advance(carry):
        ...     step, row, token, alive, state, written, cache = carry
        ...     written = written.at[:, step].set(jnp.where(alive, row, 0))
        ...     return step + 1, row, token, alive & (step + 1 < row), state, written, cache
        >>> rows = jnp.array([3, 1, 2, 1])
        >>> carry = jnp.int32(0), rows, rows, rows > 0, None, jnp.zeros((4, 3), jnp.int32), ()
        >>> while_alive(advance, carry, (4, 2, 1), steps=3).tolist()
        [[3, 3, 3], [1, 0, 0], [2, 2, 0], [1, 0, 0]]
    """
    places: list[jax.Array] = []
    outer: list[Any] = []
    for size, smaller in itertools.pairwise((*sizes, 0)):
        step, *held = carry
        if size < len(held[2]):
            first = jnp.argsort(~held[2], stable=True)[:size]  # those alive, in their order
            places.append(first)
            outer.append(held[4])
            held = jax.tree.map(lambda x, first=first: x[first], held)
        many = lambda carry, smaller=smaller: (carry[0] < steps) & (carry[3].sum() > smaller)
        carry = jax.lax.while_loop(many, advance, (step, *held))
    written = carry[5]
    for first, whole in zip(reversed(places), reversed(outer), strict=True):
        written = jax.tree.map(lambda x, y, first=first: x.at[first].set(y, unique_indices=True), whole, written)
    return written
