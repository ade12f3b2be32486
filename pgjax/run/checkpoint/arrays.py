"""The arrays of a state as a checkpoint sees them: their stored form, where they go, and how two trees differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.core.errors import UserError
from pgjax.run.checkpoint.digest import name_of

Tree = Any
# What the files can hold: jax's dtypes, but for some that tensorstore lacks, and NumPy's numbers of 64 bits.
_STORABLE = frozenset(
    (
        *("bool", "int2", "int4", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float4_e2m1fn", "float8_e3m4"),
        *("float8_e4m3fn", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
)


class Leaf(NamedTuple):
    """What is stored of one array: its shape and its dtype (of the raw bits, for a typed PRNG key)."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored_form(leaf: Any) -> Leaf:
    """Give the shape and dtype under which a leaf is stored: a typed key is stored as its raw bits."""
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return Leaf(tuple(leaf.shape), np.dtype(leaf.dtype))


def stored_leaves(tree: Tree) -> dict[str, Leaf]:
    """List the arrays of a tree as they are stored.

    Args:
        tree: of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
        Shape and dtype of each by its name.

    Raises:
        ValueError: a leaf is something else, holds nothing, or has a dtype that no file can hold; or there is no leaf.

    Example:
        >>> stored_leaves({"key": jax.random.key(0)})
        {'key': Leaf(shape=(2,), dtype=dtype('uint32'))}
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise UserError(
                f"a checkpoint holds arrays only, but {name_of(path)} is a {type(leaf).__name__}: "
                "pass plain numbers in extra"
            )
        found[name_of(path)] = form = _stored_form(leaf)
        if form.dtype.name not in _STORABLE or not form.dtype.isnative:
            raise UserError(f"a checkpoint cannot hold {name_of(path)}, whose dtype is {form.dtype}")
        if 0 in form.shape:
            raise UserError(f"a checkpoint cannot hold {name_of(path)}, which is empty: its shape is {form.shape}")
    if not found:
        raise UserError("a checkpoint holds arrays, but the state has none")
    return found


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    return None if isinstance(leaf, np.ndarray) else leaf.sharding


def _everywhere() -> jax.sharding.NamedSharding:
    """Give the sharding of a whole copy on every device of every process."""
    return jax.sharding.NamedSharding(jax.sharding.Mesh(jax.devices(), ("all",)), jax.sharding.PartitionSpec())


def _is_wide(leaf: Any) -> bool:
    """Say whether jax, as it is configured, would halve the numbers of a host array."""
    on_host = isinstance(leaf, np.ndarray) or (isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None)
    return on_host and not _is_key(leaf) and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype


def _is_local(leaf: Any) -> bool:
    """Say whether each of several processes holds its own copy of a leaf, which orbax does not take."""
    sharding = _sharding(leaf)
    return jax.process_count() > 1 and (sharding is None or sharding.is_fully_addressable)


def as_global(leaf: Any) -> Any:
    """Turn the copies that each process holds of a leaf into one array of them all.

    Args:
        leaf: an array; with one process, or spread over all of them, it comes back as it is.

    Returns:
        An array that orbax takes.

    Raises:
        ValueError: under several processes, a host array of 64-bit numbers, which jax would halve.

    Example:
        >>> as_global(jnp.ones(()))
        Array(1., dtype=float32)
    """
    if not _is_local(leaf):
        return leaf
    if _is_wide(leaf):
        raise UserError(
            f"a host array of {leaf.dtype} would be halved on the way to {jax.process_count()} processes: "
            "cast it, or turn jax_enable_x64 on"
        )
    if _is_key(leaf):
        return jax.random.wrap_key_data(as_global(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, _everywhere(), lambda index: value[index])


def target(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    """Say where a leaf goes on restore: its own sharding, or the first local device when it has none.

    Host arrays of 64 bits stay on the host, where jax is not configured to take them.

    Args:
        leaf: an array or a `jax.ShapeDtypeStruct`, as the caller wants it back.

    Returns:
        What orbax is asked for.

    Example:
        >>> target(jax.ShapeDtypeStruct((2,), jnp.float32)).sharding
        SingleDeviceSharding(...)
    """
    if _is_wide(leaf):
        return np.empty(leaf.shape, leaf.dtype)
    sharding = _sharding(leaf)
    if _is_local(leaf):
        sharding = _everywhere()
    elif sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def recommit(like: Any, restored: Any) -> Any:
    """Free a restored array from its device where `like` was free too.

    orbax commits all it restores to a device. A key or a counter that was free before would then refuse to
    enter one program with parameters that are spread over a mesh. A leaf without a sharding is free as well.

    Args:
        like: what the caller wants back, as given to `target`.
        restored: what orbax gave.

    Returns:
        The array, placed as `like` is.

    Example:
        >>> bound = jax.device_put(jnp.ones(()), jax.devices()[0])
        >>> bound.committed, recommit(jnp.zeros(()), bound).committed
        (True, False)
    """
    if _is_wide(like):
        return np.asarray(restored)
    committed = like.committed if isinstance(like, jax.Array) else _sharding(like) is not None
    if committed and not _is_local(like):
        return restored
    if _is_key(like):
        bits = jnp.array(_host_copy(jax.random.key_data(restored)))
        free = jax.random.wrap_key_data(bits, impl=jax.random.key_impl(restored))
    else:
        free = jnp.array(_host_copy(restored))
    return jax.device_put(free, _sharding(like)) if committed else free


def _host_copy(x: jax.Array) -> np.ndarray:
    return np.asarray(x.addressable_data(0) if x.is_fully_replicated else x)


def tree_differences(wanted: Mapping[str, Leaf], stored: Mapping[str, Leaf]) -> list[str]:
    """Say of each leaf how the tree on disk differs from the one asked for.

    Args:
        wanted: by `stored_leaves`.
        stored: likewise, of the checkpoint.

    Returns:
        A line for each difference.

    Example:
        >>> tree_differences(stored_leaves({"w": jnp.ones(2)}), stored_leaves({"w": jnp.ones(3)}))
        ['w is float32[3], expected float32[2]']
    """
    lines = [f"{name} is not in the checkpoint" for name in wanted if name not in stored]
    lines += [f"{name} is in the checkpoint only" for name in stored if name not in wanted]
    for name, want in wanted.items():
        have = stored.get(name, want)
        if have != want:
            lines.append(f"{name} is {have.dtype}{list(have.shape)}, expected {want.dtype}{list(want.shape)}")
    return lines


def shorten(lines: Sequence[str]) -> str:
    """Join lines for a message, the first five of them.

    Args:
        lines: each a finding.

    Returns:
        One line.

    Example:
        >>> shorten(["a", "b", "c", "d", "e", "f", "g"])
        'a; b; c; d; e; and 2 more'
    """
    return "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
