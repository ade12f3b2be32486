"""Fields of a config.json, checked one by one: the error names the field, its value and what it may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture

ACTIVATIONS: dict[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
FULL, SLIDING = "full_attention", "sliding_attention"


def integer(fields: Mapping[str, Any], name: str) -> int:
    """Read a positive integer, which must be there."""
    if name not in fields:
        raise UserError(f"the configuration has no field {name!r}, which model_type {fields['model_type']!r} needs")
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} = {value!r} must be a positive integer")
    return value


def above_zero(name: str, value: Any) -> float:
    """Check a number above 0.

    >>> above_zero("rope_theta", 10000)
    10000.0
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{name} = {value!r} must be a number above 0")
    return float(value)


def factor(fields: Mapping[str, Any], name: str, *, nothing: float | None = 1.0) -> float | None:
    """Read a number above 0; None where it is null, or `nothing`, which changes nothing."""
    value = fields[name]
    return None if value is None or value == nothing else above_zero(name, value)


def boolean(fields: Mapping[str, Any], name: str) -> bool:
    """Read true or false."""
    if not isinstance(fields[name], bool):
        raise UserError(f"{name} = {fields[name]!r} must be true or false")
    return fields[name]


def activation(fields: Mapping[str, Any], name: str) -> str:
    """Read the name of an activation."""
    if not isinstance(fields[name], str) or fields[name] not in ACTIVATIONS:
        raise UserError(f"{name} {fields[name]!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[fields[name]]


def head_size(width: int, heads: int) -> int:
    """Divide the width over the heads.

    >>> head_size(64, 4)
    16
    """
    if width % heads != 0:
        raise UserError(f"a width of {width} does not divide into {heads} heads")
    return width // heads


def tidy(x: float) -> float:
    """Round to twelve digits: the inverse of an inverse is then the number itself.

    >>> 1 / (1 / 49.0), tidy(1 / (1 / 49.0))
    (49.00000000000001, 49.0)
    """
    return float(f"{x:.12g}")


def check_only(fields: Mapping[str, Any], only: Mapping[str, Any]) -> None:
    """Refuse options that are not implemented: each has the only value that is; null or a missing field counts as that.

    >>> check_only({"alibi": True}, {"alibi": False})
    Traceback (most recent call last):
    pgjax.UserError: alibi = True is not supported; supported: False
    """
    for name, value in only.items():
        if name in fields and fields[name] is not None and fields[name] != value:
            raise UserError(f"{name} = {fields[name]!r} is not supported; supported: {value!r}")


def check_full(fields: Mapping[str, Any]) -> None:
    """Refuse layers that see a window, in a family whose own code has none."""
    types = fields.get("layer_types")
    strange = [] if types is None else sorted({str(kind) for kind in types} - {FULL})
    if strange:
        raise UserError(f"layer_types holds {strange}; supported: {FULL}")


def windows(fields: Mapping[str, Any], default: list[bool], *, needed: bool = False) -> dict[str, Any]:
    """Read which layers see a window of how many keys: `window` and `windowed` of an `Architecture`.

    Args:
        fields: with sliding_window, and perhaps layer_types.
        default: for each layer whether it has the window, where layer_types does not say.
        needed: sliding_window may not be null where layers have a window; otherwise null is none.

    >>> windows({"sliding_window": 4, "layer_types": None}, [True, False])
    {'window': 4, 'windowed': (True, False)}
    """
    types = fields.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != len(default):
            raise UserError(f"layer_types = {types!r} must list one type for each of {len(default)} layers")
        strange = sorted({str(kind) for kind in types} - {FULL, SLIDING})
        if strange:
            raise UserError(f"layer_types holds {strange}; supported: {FULL}, {SLIDING}")
    windowed = default if types is None else [kind == SLIDING for kind in types]
    if not any(windowed):
        return {}
    if fields.get("sliding_window") is None:
        if needed or types is not None:
            raise UserError(
                f"sliding_window is null or unused, but layers {[i for i, one in enumerate(windowed) if one]} have it"
            )
        return {}
    return {"window": integer(fields, "sliding_window"), "windowed": None if all(windowed) else tuple(windowed)}


def window_fields(arch: Architecture) -> dict[str, Any]:
    """Write sliding_window and layer_types."""
    windowed = arch.windowed or (arch.window is not None,) * arch.depth
    return {"sliding_window": arch.window, "layer_types": [SLIDING if one else FULL for one in windowed]}
