"""One table of which axes of a mesh split what: batches, parameters and the values between them.

A script builds its mesh once and enters it: `with jax.set_mesh(make_mesh(data=-1)):`. Parameters and batches are placed by
`param_shardings` and `batch_sharding`; inside jit `constrain` and its kin take the mesh from the context. Without a mesh, and
inside the caller's own `shard_map` or `pmap`, they do nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pgjax.core.errors import UserError
from pgjax.parallel.mesh import AXES
from pgjax.parallel.mesh import make_mesh as make_mesh
from pgjax.parallel.mesh import parse_mesh as parse_mesh

# What an axis of an array is -> the axes of the mesh that split it. A row of a batch is "batch"; "row" where tensor has no
# part in the arithmetic, so that its devices take rows too; "lookup" where fsdp splits the width instead.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "row": ("data", "fsdp", "tensor"),
    "lookup": ("data",),
    "width": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
# The linear maps of a layer -> what goes in and what comes out.
_MAPS: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("q", "k", "v"), ("width", "heads")),
    **dict.fromkeys(("gate", "up"), ("width", "mlp")),
    "o": ("heads", "width"),
    "down": ("mlp", "width"),
}
# The end of a parameter's path -> what its axes are; leaves under "layers" have depth first. What is not named (norms, small
# biases) is on every device whole.
PARAMETERS: Mapping[tuple[str, ...], tuple[str | None, ...]] = {
    ("embed", "tokens"): ("vocab", "width"),
    ("embed", "positions"): (None, "width"),
    ("head", "kernel"): ("vocab", "width"),
    **{(name, "kernel"): (None, into, out) for name, (into, out) in _MAPS.items()},
    **{(name, "bias"): (None, out) for name, (_, out) in _MAPS.items() if out != "width"},
    **{(f"expert_{name}", "kernel"): (None, None, *axes) for name, axes in _MAPS.items() if "mlp" in axes},
    **{(name, "lora_a"): (None, into, None) for name, (into, _) in _MAPS.items()},
    **{(name, "lora_b"): (None, None, out) for name, (_, out) in _MAPS.items()},
}


def param_shardings(mesh: Mesh, tree: Any) -> Any:
    """Lay out parameters, or anything that mirrors them, over a mesh, by the table.

    Args:
        mesh: with any of the axes data, fsdp and tensor; those it lacks split nothing.
        tree: of arrays or `jax.ShapeDtypeStruct`: parameters of a causal LM or a reward model, alone or inside another
            tree; an optimizer's state; a `train.TrainState`.

    Returns:
        A tree of `NamedSharding`; what the table does not name (norms, small biases, counters, keys) is whole everywhere.

    Raises:
        ValueError: an axis of a parameter that the mesh does not divide, with the sizes.

    >>> import jax, jax.numpy as jnp
    >>> mesh = make_mesh(fsdp=-1)
    >>> param_shardings(mesh, {"norm": {"scale": jnp.zeros(4)}})["norm"]["scale"].is_fully_replicated
    True
    """
    check_axes(mesh)
    return jax.tree_util.tree_map_with_path(lambda path, x: NamedSharding(mesh, _param_spec(mesh, path, x)), tree)


def batch_sharding(mesh: Mesh | None, rows: int | None = None) -> NamedSharding | None:
    """Split the first axis of an array over data and fsdp.

    Args:
        mesh: with any of the axes, or None.
        rows: the size of that axis; where data x fsdp does not divide it, it is split over fewer devices, or none.

    Returns:
        The sharding; None without a mesh, which `place` takes for the one device.

    >>> batch_sharding(make_mesh(data=-1)).num_devices == jax.device_count()
    True
    """
    if mesh is None:
        return None
    axes = _split_by(mesh, "batch") if rows is None else fitting(mesh, rows, "batch")
    return NamedSharding(mesh, PartitionSpec(_entry(axes)))


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """Put an array on every device whole; None without a mesh.

    >>> replicated(make_mesh(data=-1)).is_fully_replicated
    True
    """
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh | AbstractMesh | None, rows: int, name: str) -> None:
    """Refuse a number of rows that the devices cannot share evenly; without a mesh any number will do.

    Args:
        mesh: or None.
        rows: of a batch.
        name: what the user calls them, for the message.

    Raises:
        ValueError: data x fsdp does not divide the rows.

    >>> check_batch(None, 3, "batch_size")
    """
    shares = batch_parts(mesh)
    if rows % shares:
        sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in RULES["batch"] if axis in mesh.shape)  # type: ignore[union-attr]
        up = rows + -rows % shares
        raise UserError(
            f"{name}: {rows} rows do not divide over {sizes} of the mesh: make it a multiple of {shares}, as {up}"
        )


def whole_groups(mesh: Mesh | AbstractMesh | None, rows: int, group_size: int) -> int:
    """Say in groups of how many rows a batch may be computed: `group_size` where every device gets whole groups, else 1.

    Args:
        mesh: or None.
        rows: of the batch.
        group_size: adjacent rows that have a prompt in common.

    >>> whole_groups(None, 8, 4), whole_groups(None, 6, 4)
    (4, 1)
    """
    return group_size if rows % (batch_parts(mesh) * group_size) == 0 else 1


def batch_parts(mesh: Mesh | AbstractMesh | None) -> int:
    """Count the parts into which a mesh splits a batch's rows.

    >>> batch_parts(None)
    1
    """
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES["batch"] if axis in mesh.shape)


def check_axes(mesh: Mesh | AbstractMesh) -> None:
    """Refuse a mesh on which the model and its training would not be split as it says.

    Args:
        mesh: any.

    Raises:
        ValueError: all its axes are Explicit, or none of them has a name that is known, so that all devices would do the same.

    >>> check_axes(jax.make_mesh((1,), ("data",)))
    Traceback (most recent call last):
    pgjax.UserError: the axes ('data',) of the mesh are Explicit: the model, its sampler and its training want Auto ones, ...
    """
    if mesh.are_all_axes_explicit:
        raise UserError(
            f"the axes {mesh.axis_names} of the mesh are Explicit: the model, its sampler and its training want Auto ones, as "
            "of jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * n); the pure functions take both"
        )
    if mesh.size > 1 and mesh.are_all_axes_auto and not set(mesh.axis_names) & set(AXES):
        raise UserError(
            f"the mesh has the axes {mesh.axis_names}, none of {', '.join(AXES)}: over others nothing would be split, and all "
            "devices would do the same"
        )


def place(tree: Any, sharding: Any) -> Any:
    """Put values onto the mesh; of host values every process holds all, and gives its own devices their parts.

    Args:
        tree: of host arrays and numbers, or of arrays that lie somewhere else.
        sharding: one `NamedSharding` for all of them, or a tree of them of the same structure; None: the default device.

    Returns:
        The same tree, of `jax.Array`.

    >>> import numpy as np
    >>> mesh = make_mesh(data=-1)
    >>> place({"x": np.arange(3)}, replicated(mesh))["x"].tolist()
    [0, 1, 2]
    """

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array):
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if sharding is None:
        return jax.device_put(tree)
    if isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda x: put(x, sharding), tree)
    return jax.tree.map(put, tree, sharding)


def init_sharded(init: Callable[..., Any], *args: Any, mesh: Mesh | None) -> Any:
    """Compute parameters, or an optimizer's state, each device its own part: no device ever holds the whole.

    Args:
        init: of a model or an optimizer.
        *args: its arguments.
        mesh: None: on the default device.

    Returns:
        What `init` returns, laid out as `param_shardings` says.

    >>> import jax.numpy as jnp
    >>> init_sharded(lambda: {"head": {"kernel": jnp.zeros((8, 8))}}, mesh=make_mesh(fsdp=-1))["head"]["kernel"].shape
    (8, 8)
    """
    shardings = None if mesh is None else param_shardings(mesh, jax.eval_shape(init, *args))
    return jax.jit(init, out_shardings=shardings)(*args)


def mesh_of(tree: Any) -> Mesh | None:
    """Find the mesh that arrays lie on; None where they lie on no mesh, or are not known yet.

    >>> import jax.numpy as jnp
    >>> mesh_of({"x": jnp.zeros(2)}) is None
    True
    """
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and isinstance(x.sharding, NamedSharding):
            if not isinstance(x.sharding.mesh, Mesh):
                return None
            check_axes(x.sharding.mesh)
            return x.sharding.mesh
    return None


def ambient_mesh() -> AbstractMesh | None:
    """Find the mesh that `jax.set_mesh` has entered; None without one, and inside `shard_map` and `pmap`.

    >>> ambient_mesh() is None
    True
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    check_axes(mesh)
    return mesh if mesh.are_all_axes_auto else None


def entered(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Make a mesh the ambient one, inside jit too, unless there is one already, or none is given.

    >>> with entered(make_mesh(data=-1)):
    ...     ambient_mesh() is None
    False
    """
    if mesh is None or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Say inside jit how a value is split over the ambient mesh; without one, return it as it is.

    Args:
        x: of any shape.
        *names: what its first axes are, of `RULES`; None and the axes after them are not split. An axis whose size the mesh
            does not divide is not split either.

    Returns:
        The same values.

    >>> import jax.numpy as jnp
    >>> constrain(jnp.ones((2, 3)), "batch").shape
    (2, 3)
    """
    mesh = ambient_mesh()
    if mesh is None:
        return x
    sizes = zip(x.shape, names, strict=False)
    axes = [() if name is None else fitting(mesh, size, name) for size, name in sizes]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(_entry, axes)))


def fitting(mesh: Mesh | AbstractMesh, size: int, name: str) -> tuple[str, ...]:
    """Name the axes of the mesh that split an axis of that size; those that do not divide it are left out.

    >>> fitting(make_mesh(data=-1), 1, "batch")
    ()
    """
    axes = _split_by(mesh, name)
    while size % _size(mesh, axes):
        axes = axes[:-1]
    return axes


def splits(name: str) -> tuple[str, ...]:
    """Name the axes of the ambient mesh that split what `RULES` names; those of size 1 split nothing.

    >>> splits("batch")
    ()
    """
    mesh = ambient_mesh()
    return () if mesh is None else _split_by(mesh, name)


def constrain_batch(tree: Any) -> Any:
    """Split the first axis of every array over data and fsdp, inside jit.

    >>> import jax.numpy as jnp
    >>> constrain_batch({"x": jnp.ones(2)})["x"].shape
    (2,)
    """
    return jax.tree.map(lambda x: constrain(x, "batch"), tree)


def constrain_params(tree: Any) -> Any:
    """Split parameters, or anything that mirrors them, by the table, inside jit.

    >>> import jax.numpy as jnp
    >>> constrain_params({"embed": {"tokens": jnp.ones((2, 2))}})["embed"]["tokens"].shape
    (2, 2)
    """
    return _constrain_each(tree, ())


def gathered(tree: Any) -> Any:
    """Gather parameters over fsdp, inside jit; over tensor they stay split.

    >>> import jax.numpy as jnp
    >>> gathered({"embed": {"tokens": jnp.ones((2, 2))}})["embed"]["tokens"].shape
    (2, 2)
    """
    return _constrain_each(tree, ("fsdp",))


def _constrain_each(tree: Any, without: tuple[str, ...]) -> Any:
    mesh = ambient_mesh()
    if mesh is None:
        return tree
    one = jax.lax.with_sharding_constraint
    return jax.tree_util.tree_map_with_path(lambda path, x: one(x, _param_spec(mesh, path, x, without)), tree)


def _split_by(mesh: Mesh | AbstractMesh, name: str | None, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Name the axes of the mesh that split an axis; those of size 1 split nothing."""
    rule = () if name is None else RULES[name]
    return tuple(axis for axis in rule if mesh.shape.get(axis, 1) > 1 and axis not in without)


def _size(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return axes if len(axes) > 1 else axes[0] if axes else None


def _param_spec(
    mesh: Mesh | AbstractMesh, path: tuple[Any, ...], x: Any, without: tuple[str, ...] = ()
) -> PartitionSpec:
    names = tuple(str(step.key) for step in path if isinstance(step, jax.tree_util.DictKey))
    entries = []
    for size, name in zip(x.shape, PARAMETERS.get(names[-2:], ()), strict=False):
        axes = _split_by(mesh, name, without)
        if size % _size(mesh, axes):
            told = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            raise UserError(
                f"{'/'.join(names)} has an axis of {size}, which {told} of the mesh does not divide: choose sizes that do"
            )
        entries.append(_entry(axes))
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def fold_in(key: jax.Array, number: int) -> jax.Array:
    """Derive a key from a number of the host, by an explicit transfer to the device."""
    return jax.random.fold_in(key, jax.device_put(np.uint32(number)))
