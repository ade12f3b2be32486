"""Slots of the key-value cache: one a column, or a ring of the last columns where a layer sees no more than a window."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def write_slot(cache: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
    """Write x [B, heads, 1, hd] into slot `index` of cache [B, heads, S, hd], in place where XLA may.

    On a CPU as integers of the same bits: XLA would convert a whole 16-bit float buffer to 32 bits and back at every step. On a
    TPU that trick would copy the buffer twice.

    >>> write_slot(jnp.zeros((1, 1, 3, 1), jnp.bfloat16), jnp.ones((1, 1, 1, 1), jnp.bfloat16), jnp.int32(1)).ravel().tolist()
    [0.0, 1.0, 0.0]
    """
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=2)
    bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=f"uint{8 * cache.dtype.itemsize}")

    def as_bits(cache: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(write(bits(cache), bits(x), index), cache.dtype)

    return jax.lax.platform_dependent(cache, x, index, cpu=as_bits, default=write)


def fill_slots(cache: jax.Array, x: jax.Array) -> jax.Array:
    """Write x [B, heads, P, hd] into cache [B, heads, S, hd], column c into slot c mod S; the last S columns remain.

    >>> fill_slots(jnp.zeros((1, 1, 2, 1)), jnp.array([5.0, 6.0, 7.0]).reshape(1, 1, 3, 1)).ravel().tolist()
    [7.0, 6.0]
    """
    slots, columns = cache.shape[2], x.shape[2]
    if columns > slots:
        x = jnp.roll(x[:, :, columns - slots :], columns % slots, axis=2)
    return jax.lax.dynamic_update_slice_in_dim(cache, x, 0, axis=2)


def ring_slots(slots: jax.Array, index: jax.Array, window: int) -> jax.Array:
    """Mark the slots of a ring that a token at column `index` attends to: slots [B, S] of all columns to [B, window].

    >>> ring_slots(jnp.array([[False, True, True, True]]), jnp.int32(2), 2).tolist()
    [[True, True]]
    """
    columns = (
        index - (index - jnp.arange(window)) % window
    )  # which each slot holds; before the first one: not written yet
    return jnp.take(slots, columns, axis=1, mode="clip") & (columns >= 0)[None, :]
