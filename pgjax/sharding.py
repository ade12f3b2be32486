"""Which axis of the mesh splits which axis of a parameter, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Batches split over data and fsdp; parameters over fsdp and tensor (heads, MLP width and vocabulary over tensor).
# Keys are the ends of a parameter's path; leaves under "layers" have depth first.
RULES: Mapping[tuple[str, ...], tuple[str | None, ...]] = {
    ("embed", "tokens"): ("tensor", "fsdp"),
    ("embed", "positions"): (None, "fsdp"),
    ("head", "kernel"): ("tensor", "fsdp"),
    **{(name, "kernel"): (None, "fsdp", "tensor") for name in ("q", "k", "v", "gate", "up")},
    **{(name, "bias"): (None, "tensor") for name in ("q", "k", "v", "gate", "up")},
    **{(name, "kernel"): (None, "tensor", "fsdp") for name in ("o", "down")},
}


def make_mesh(**axes: int) -> Mesh:
    """Build a mesh of the named axes over all devices.

    Args:
        **axes: sizes by name, of data, fsdp and tensor; their product is the number of devices.

    Returns:
        A mesh for `jit` with `NamedSharding` (its axes are of type Auto).

    Raises:
        ValueError: an unknown axis, or sizes that do not multiply to the number of devices.

    >>> import jax
    >>> make_mesh(data=jax.device_count()).axis_names
    ('data',)
    """
    unknown = [name for name in axes if name not in ("data", "fsdp", "tensor")]
    if unknown:
        raise ValueError(f"unknown mesh axes {unknown}: the axes are data, fsdp and tensor")
    needed, there = 1, jax.device_count()
    for size in axes.values():
        needed *= size
    if needed != there or not axes:
        raise ValueError(f"the mesh {axes} needs {needed} devices, but there are {there}: change the sizes")
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def param_shardings(mesh: Mesh, shapes: Any) -> Any:
    """Lay out a tree of parameters over a mesh, by the table.

    Args:
        mesh: with any of the axes data, fsdp and tensor; those it lacks split nothing.
        shapes: a tree of arrays or `jax.ShapeDtypeStruct`, of `CausalLM.init`.

    Returns:
        A tree of `NamedSharding`; what the table does not name (norms, small biases) is on every device whole.

    Raises:
        ValueError: an axis of a parameter that its mesh axis does not divide, with the sizes.

    >>> import jax, jax.numpy as jnp
    >>> mesh = make_mesh(fsdp=jax.device_count())
    >>> param_shardings(mesh, {"embed": {"tokens": jnp.zeros((8, 4))}})["embed"]["tokens"].spec[1]
    'fsdp'
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: NamedSharding(mesh, _spec(mesh, path, x.shape)), shapes)


def _spec(mesh: Mesh, path: tuple[Any, ...], shape: tuple[int, ...]) -> PartitionSpec:
    names = tuple(step.key for step in path)
    rule = RULES.get(names[-2:], ())
    axes = [axis if axis in mesh.axis_names else None for axis in rule]
    for size, axis in zip(shape, axes, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{'/'.join(names)} has an axis of {size}, which {axis}={mesh.shape[axis]} of the mesh does not divide"
            )
    return PartitionSpec(*axes)
