"""Fingerprints of arrays, exact to the bit and the same however the arrays are spread over devices."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
_PARTS_OF_A_BYTE = {"int2": jnp.uint2, "int4": jnp.uint4, "float4_e2m1fn": jnp.uint4}


def name_of(path: tuple[Any, ...]) -> str:
    """Name a leaf by the keys on the way to it.

    Args:
        path: as `jax.tree_util` gives it.

    Returns:
        The keys, joined by dots.

    Example:
        >>> name_of((jax.tree_util.DictKey("embed"), jax.tree_util.DictKey("tokens")))
        'embed.tokens'
    """
    return jax.tree_util.keystr(path, simple=True, separator=".")


def leaf_digests(tree: Tree) -> dict[str, int]:
    """Compute a number of 32 bits for each array of a tree, on the devices where it lies.

        sum_i (2 i + 1) mix(word_i) mod 2^32

    over the array's bits in words, in row-major order, where mix is the finalizer of MurmurHash3 (Appleby 2011), which
    is one to one: so a change of any one word always changes the number.

    Args:
        tree: of arrays; typed keys count as their bits.

    Returns:
        The numbers by the names of the leaves.

    Example:
        >>> leaf_digests({"w": jnp.zeros(3), "b": jnp.ones(3)})
        {'b': 1056980838, 'w': 0}
    """
    named = [(name_of(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    groups: dict[Any, list[tuple[str, Any]]] = {}
    for name, leaf in named:
        placed = isinstance(leaf, jax.Array) and leaf.committed
        groups.setdefault(frozenset(leaf.sharding.device_set) if placed else None, []).append((name, leaf))
    numbers: dict[str, int] = {}
    for group in groups.values():  # one program cannot read arrays that are bound to different devices
        found = jax.device_get(_digests([_host_words(leaf) for _, leaf in group]))
        numbers |= {name: int(number) for (name, _), number in zip(group, found, strict=True)}
    return {name: numbers[name] for name, _ in named}


def digest(tree: Tree) -> str:
    """Compute a fingerprint of a tree of arrays: of its names, shapes, dtypes and every bit.

    Args:
        tree: of arrays, in any sharding.

    Returns:
        16 hexadecimal digits.

    Example:
        >>> digest({"w": jnp.arange(4.0)}) == digest({"w": jnp.arange(4.0).at[0].set(1e-45)})
        False
    """
    lines = []
    for (name, number), leaf in zip(leaf_digests(tree).items(), jax.tree.leaves(tree), strict=True):
        lines.append(f"{name} {leaf.dtype} {tuple(leaf.shape)} {number}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _host_words(leaf: Any) -> Any:
    """Take the bits of a host array as they are: jax would cast numbers of 64 bits to 32."""
    if isinstance(leaf, np.ndarray) and leaf.dtype.itemsize >= 8:
        return np.ascontiguousarray(leaf).reshape(-1).view(np.uint32)
    return leaf


@jax.jit
def _digests(leaves: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([_weighted_sum(_words(leaf)) for leaf in leaves])


def _words(x: jax.Array) -> jax.Array:
    """See an array as unsigned words: one for each element, two for an element of 64 bits."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    if x.dtype.name in _PARTS_OF_A_BYTE:
        word = _PARTS_OF_A_BYTE[x.dtype.name]
    return jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)


def _weighted_sum(words: jax.Array) -> jax.Array:
    place = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum((2 * place + 1) * _mix(words), dtype=jnp.uint32)


def _mix(word: jax.Array) -> jax.Array:
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
