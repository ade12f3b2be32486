"""How arrays lie on a mesh with Explicit axes (jax's default): read off their types, and changed where a function needs it.

The type of an array, `jax.typeof(x)`, names the axes of the mesh that split each of its axes, inside jit and outside. On a
mesh with Auto axes, and without a mesh, it names none, and these functions do nothing.
"""

import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Axes = tuple[str, ...]  # of a mesh


def explicit_mesh(*xs: jax.Array) -> AbstractMesh | None:
    """Find the mesh with Explicit axes on which one of the arrays lies; None where there is none.

    Args:
      *xs: arrays, traced or not.

    Returns:
      The mesh of the first one that lies on one, without its devices.

    Example:
      >>> import jax.numpy as jnp
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> explicit_mesh(jnp.ones(2), jax.device_put(jnp.ones(2), NamedSharding(mesh, PartitionSpec("data")))).axis_names
      ('data',)
    """
    for x in xs:
        mesh = jax.typeof(x).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def explicit_axes(mesh: AbstractMesh) -> Axes:
    """Name the Explicit axes of a mesh: inside a `shard_map` over some of its axes those are Manual, and the rest are not.

    Example:
      >>> explicit_axes(jax.make_mesh((1,), ("data",)).abstract_mesh)
      ('data',)
    """
    named = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in named if kind == AxisType.Explicit)


def axes_of(x: jax.Array) -> tuple[Axes, ...]:
    """Name the Explicit axes of the mesh that split each axis of an array.

    Args:
      x: any array.

    Returns:
      For each axis of `x` the names; an empty tuple where it is not split.

    Example:
      >>> import jax.numpy as jnp
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> axes_of(jax.device_put(jnp.ones((2, 3)), NamedSharding(mesh, PartitionSpec("data")))), axes_of(jnp.ones(2))
      ((('data',), ()), ((),))
    """
    entries = tuple(jax.typeof(x).sharding.spec)
    named = [entry if isinstance(entry, tuple) else (entry,) if isinstance(entry, str) else () for entry in entries]
    return (*named, *[()] * (x.ndim - len(named)))


def fitting(mesh: AbstractMesh, size: int, axes: Axes) -> bool:
    """Say whether axes of a mesh split an axis of that size evenly.

    Example:
      >>> fitting(jax.make_mesh((1,), ("data",)).abstract_mesh, 3, ("data",))
      True
    """
    return size % math.prod(mesh.shape[axis] for axis in axes) == 0


def laid_out(x: jax.Array, mesh: Mesh | AbstractMesh, *axes: Axes) -> jax.Array:
    """Lay an array out over the Explicit axes of a mesh; where it lies so already, return it as it is.

    Args:
      x: any array.
      mesh: of `explicit_mesh`.
      *axes: for each of the first axes of `x`, which axes of the mesh split it; the other axes are not split.

    Returns:
      The same values. The gradient comes back in the layout of `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> with jax.set_mesh(mesh):
      ...     print(jax.typeof(laid_out(jnp.ones(2), mesh.abstract_mesh, ("data",))))
      float32[2@data]
    """
    wanted = (*axes, *[()] * (x.ndim - len(axes)))
    if explicit_mesh(x) is not None and axes_of(x) == wanted:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, spec_of(*wanted)))


def spec_of(*axes: Axes) -> PartitionSpec:
    """Write names of axes, a tuple for each axis of an array, as a `PartitionSpec`.

    Example:
      >>> tuple(spec_of((), ("data",)))
      (None, 'data')
    """
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in axes))


def whole_along(x: jax.Array, axis: int) -> jax.Array:
    """Gather an array along one of its axes, so that it is not split there.

    Args:
      x: any array.
      axis: which; negative from the end.

    Returns:
      The same values, `x` itself where nothing splits that axis.

    Example:
      >>> import jax.numpy as jnp
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> x = jax.device_put(jnp.ones((2, 3)), NamedSharding(mesh, PartitionSpec(None, "data")))
      >>> print(jax.typeof(whole_along(x, 1)))
      float32[2,3]
    """
    mesh, split = explicit_mesh(x), axes_of(x)
    if mesh is None or not split[axis]:
        return x
    at = axis % x.ndim
    return laid_out(x, mesh, *split[:at], (), *split[at + 1 :])


def like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Lay an array out as another one of the same shape lies; where that lies on no Explicit axes, return it as it is.

    Example:
      >>> import jax.numpy as jnp
      >>> print(like(jnp.ones(2), jnp.zeros(2)))
      [1. 1.]
    """
    mesh = explicit_mesh(other)
    return x if mesh is None else laid_out(x, mesh, *axes_of(other))
