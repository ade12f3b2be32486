"""Devices in the order of a mesh: its sizes as a command line gives them, and the mesh built by jax's own helpers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from pgjax.core.errors import UserError

AXES = ("data", "fsdp", "tensor")  # of a mesh, the innermost last: its neighbours talk most


def parse_mesh(text: str) -> dict[str, int]:
    """Read the sizes of a mesh as a command line gives them.

    Args:
        text: axes and sizes, as "data=4,fsdp=2"; -1 takes the devices that the others leave.

    Returns:
        Sizes by name, for `make_mesh`.

    Raises:
        ValueError: an unknown axis, one named twice, or a size that is none.

    >>> parse_mesh("data=-1,fsdp=2")
    {'data': -1, 'fsdp': 2}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES:
            raise UserError(
                f"the mesh {text!r} names the axis {name!r}: write sizes of {', '.join(AXES)}, as data=4,fsdp=2"
            )
        if name in sizes:
            raise UserError(f"the mesh {text!r} names {name} twice")
        try:
            sizes[name] = int(size)
        except ValueError:
            raise UserError(f"the mesh {text!r} gives {name} the size {size!r}, which is not a whole number") from None
    _check_sizes(sizes)
    return sizes


def make_mesh(*, devices: Sequence[Any] | None = None, **axes: int) -> Mesh:
    """Build a mesh of the named axes over all devices, ordered by jax's own helpers.

    Devices that are close stand together on tensor, then on fsdp; where there are several slices of TPUs, data crosses them.

    Args:
        devices: those of the mesh; None: all of them, of every process.
        **axes: sizes by name, of data, fsdp and tensor; one of them may be -1, which takes what the others leave. The mesh
            has the axes that are named, in the order data, fsdp, tensor.

    Returns:
        A mesh for `jit` with `NamedSharding` (its axes are of type Auto).

    Raises:
        ValueError: an unknown axis, or sizes that do not multiply to the number of devices.

    >>> import jax
    >>> make_mesh(data=-1, fsdp=1).shape["data"] == jax.device_count()
    True
    """
    unknown = [name for name in axes if name not in AXES]
    if unknown:
        raise UserError(f"unknown mesh axes {unknown}: the axes are {', '.join(AXES)}")
    _check_sizes(axes)
    devices = jax.devices() if devices is None else list(devices)
    sizes = _filled(axes, len(devices))
    arranged = _arranged(sizes, devices)
    return Mesh(arranged, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _check_sizes(sizes: Mapping[str, int]) -> None:
    if not sizes:
        raise UserError(f"the mesh has no axes: give sizes of {', '.join(AXES)}")
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise UserError(f"{name}={size}: the size of a mesh axis is at least 1, or -1 for what the others leave")
    filling = [name for name, size in sizes.items() if size == -1]
    if len(filling) > 1:
        raise UserError(f"{' and '.join(filling)} are both -1, but only one axis can take what the others leave")


def _filled(sizes: Mapping[str, int], there: int) -> dict[str, int]:
    """Put the axes in order and work out a size of -1."""
    given = math.prod(size for size in sizes.values() if size != -1)
    filled = {name: there // given if sizes[name] == -1 else sizes[name] for name in AXES if name in sizes}
    if math.prod(filled.values()) == there:
        return filled
    told = ",".join(f"{name}={size}" for name, size in sizes.items())
    needs = f"a multiple of {given}" if -1 in sizes.values() else str(given)
    fits, left = {}, there
    for name in ("tensor", "fsdp"):
        fits[name] = math.gcd(left, abs(sizes.get(name, 1)))
        left //= fits[name]
    fit = ",".join(
        f"{name}={size}" for name, size in {"data": left, "fsdp": fits["fsdp"], "tensor": fits["tensor"]}.items()
    )
    raise UserError(f"the mesh {told} needs {needs} devices, but there are {there}: change the sizes ({fit} would fit)")


def _arranged(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    shape = tuple(sizes.values())
    tpu = devices[0].platform == "tpu"
    slices = len({device.slice_index for device in devices}) if tpu and hasattr(devices[0], "slice_index") else 1
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across, left = {}, slices
    for name, size in sizes.items():  # data first: it talks least
        across[name] = math.gcd(left, size)
        left //= across[name]
    if left != 1:
        raise UserError(
            f"the devices are {slices} slices: make data, or data x fsdp, a multiple of {slices}, got {dict(sizes)}"
        )
    within = tuple(size // across[name] for name, size in sizes.items())
    return mesh_utils.create_hybrid_device_mesh(within, tuple(across.values()), devices, allow_split_physical_axes=True)
