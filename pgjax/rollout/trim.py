"""Columns that no completion of a batch reaches, cut off before anything is computed for them."""

from __future__ import annotations

import functools
from typing import TypeVar

import jax

from pgjax.data.padding import bucket_length

Tree = TypeVar("Tree")


def columns_behind(mask: jax.Array, max_new_tokens: int) -> int:
    """Count the columns at the end of a rollout that no completion reaches, once the longest is rounded up to its bucket.

    It waits for the rollout. Few numbers come out, so that few programs are compiled for the lengths that follow.

    Args:
        mask: [B, T] True where a token was sampled.
        max_new_tokens: N, how many columns completions have.

    Returns:
        N - min(N, the bucket of the longest completion), the same on every process.

    Example:
        >>> import jax.numpy as jnp
        >>> columns_behind(jnp.arange(100)[None] < 20, 100)  # of 20 tokens: 24 columns stay
        76
    """
    longest = int(jax.device_get(_longest(mask)))
    return max_new_tokens - min(max_new_tokens, bucket_length(max(longest, 1)))


def without_last(tree: Tree, columns: int) -> Tree:
    """Cut columns off the end of every array [B, T] of a tree.

    Args:
        tree: such as a `Rollout`.
        columns: how many.

    Returns:
        The tree, as it is where there is nothing to cut.

    Example:
        >>> import jax.numpy as jnp
        >>> without_last({"tokens": jnp.arange(6).reshape(2, 3)}, 1)["tokens"].tolist()
        [[0, 1], [3, 4]]
    """
    return _cut(tree, columns=columns) if columns else tree


@jax.jit
def _longest(mask: jax.Array) -> jax.Array:
    return mask.sum(1).max()


@functools.partial(jax.jit, static_argnames="columns")
def _cut(tree: Tree, *, columns: int) -> Tree:
    return jax.tree.map(lambda x: x[:, :-columns], tree)
