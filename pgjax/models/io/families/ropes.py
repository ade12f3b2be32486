"""Rotary positions in config.json: `rope_parameters` of transformers 5, `rope_scaling` beside `rope_theta` of 4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture, Rope
from pgjax.models.io.families.fields import FULL, SLIDING, above_zero, boolean, integer

_LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def read_rope(fields: Mapping[str, Any], head_dim: int, *, partial: bool = False, interleaved: bool = False) -> Rope:
    """Read rotary positions in either form.

    Args:
        fields: of the file, over the family's defaults.
        head_dim: of a head.
        partial: the family's own code reads partial_rotary_factor.
        interleaved: the family's own code turns neighbours.

    Raises:
        UserError: an unknown type, a field that is missing or out of range, or two forms that differ.

    >>> read_rope({"rope_theta": 100.0}, 8)
    Rope(theta=100.0, factor=None, ...)
    """
    given = {name: fields[name] for name in ("rope_parameters", "rope_scaling") if fields.get(name)}
    for name, value in given.items():
        if not isinstance(value, Mapping):
            raise UserError(f"{name} = {value!r} must be an object of its fields")
    objects: list[Mapping[str, Any]] = list(given.values()) or [{}]
    read = [rope_of(one, fields, head_dim, partial=partial, interleaved=interleaved) for one in objects]
    if any(rope != read[0] for rope in read):  # transformers 4 and 5 use different ones
        raise UserError(f"rope_parameters and rope_scaling differ ({given}): keep the right one")
    return read[0]


def rope_of(
    given: Mapping[str, Any], fields: Mapping[str, Any], head_dim: int, *, partial: bool, interleaved: bool
) -> Rope:
    """Read one object of rope's fields."""
    kind = given.get("rope_type", given.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # its first name
    theta = above_zero("rope_theta", given.get("rope_theta", fields.get("rope_theta")))
    share = given.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    share = 1.0 if share is None else above_zero("partial_rotary_factor", share)
    if share > 1 or (share < 1 and not partial):
        raise UserError(
            f"partial_rotary_factor = {share} is not supported; supported: {'up to ' if partial else ''}1.0"
        )
    dims = int(head_dim * share)
    if dims % 2:
        raise UserError(
            f"head_dim = {head_dim} rotates {dims} numbers, which is odd, but rotary positions rotate pairs"
        )
    where: dict[str, Any] = {"dims": None if dims == head_dim else dims, "interleaved": interleaved}
    if kind == "default":
        return Rope(theta=theta, **where)
    if kind not in KINDS:
        raise UserError(f"rope type {kind!r} is not supported; supported: {', '.join(KINDS)}")
    if kind == "longrope":
        return Rope(theta, **_longrope(given, fields, dims // 2), **where)
    if kind == "llama3":
        missing = [name for name in _LLAMA3_FIELDS if name not in given]
        if missing:
            raise UserError(f"rope type 'llama3' needs {', '.join(missing)}")
        scale, low, high = (above_zero(name, given[name]) for name in _LLAMA3_FIELDS[:3])
        if not low < high:
            raise UserError(f"low_freq_factor = {low} must be below high_freq_factor = {high}")
        return Rope(theta, scale, low, high, integer({**given, "model_type": "llama3"}, _LLAMA3_FIELDS[3]), **where)
    if kind == "yarn":
        return Rope(theta, **_yarn(given, fields), **where)
    if "factor" not in given:
        raise UserError(f"rope type {kind!r} needs factor")
    original = integer(fields, "max_position_embeddings") if kind == "dynamic" else None
    scale = above_zero("factor", given["factor"])
    return Rope(theta, scale, original_max_positions=original, scaling=kind, **where)


def _original(given: Mapping[str, Any], fields: Mapping[str, Any]) -> int:
    """Find the length that a model was trained on; transformers prefers the field beside rope's."""
    name = "original_max_position_embeddings"
    for holder in (fields, given):
        if holder.get(name) is not None:
            return integer(holder, name)
    return integer(fields, "max_position_embeddings")


def _ratio(given: Mapping[str, Any], fields: Mapping[str, Any], original: int) -> float:
    if given.get("factor") is not None:
        return above_zero("factor", given["factor"])
    return integer(fields, "max_position_embeddings") / original


def _yarn(given: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    original = _original(given, fields)
    scale = _ratio(given, fields, original)
    low, high = (
        above_zero(name, given.get(name) or known) for name, known in (("beta_slow", 1.0), ("beta_fast", 32.0))
    )

    def stretch(by: float) -> float:
        return 0.1 * by * math.log(scale) + 1.0 if scale > 1 else 1.0

    table = given.get("attention_factor")
    if table is None:
        by, over = given.get("mscale"), given.get("mscale_all_dim")
        table = stretch(by) / stretch(over) if by and over else stretch(1.0)
    return {
        "factor": scale, "low_freq_factor": low, "high_freq_factor": high, "original_max_positions": original,
        "scaling": "yarn", "whole_pairs": boolean({"truncate": True, **given}, "truncate"),
        "table_scale": above_zero("attention_factor", table),
    }  # fmt: skip


def _longrope(given: Mapping[str, Any], fields: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    original = _original(given, fields)
    read = {}
    for name in ("short_factor", "long_factor"):
        values = given.get(name)
        if not isinstance(values, list) or len(values) != pairs:
            raise UserError(f"rope type 'longrope' needs {name}, a list of {pairs} numbers, got {values!r}")
        read[f"{name}s"] = tuple(above_zero(name, value) for value in values)
    table, scale = given.get("attention_factor"), _ratio(given, fields, original)
    if table is None:
        table = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    table = above_zero("attention_factor", table)
    return {**read, "original_max_positions": original, "scaling": "longrope", "table_scale": table}


def rope_parameters(rope: Rope, head_dim: int) -> dict[str, Any]:
    """Write the fields of one rope but its theta.

    >>> rope_parameters(Rope(theta=100.0, dims=4), 8)
    {'rope_type': 'default', 'partial_rotary_factor': 0.5}
    """
    share = {} if rope.dims is None else {"partial_rotary_factor": rope.dims / head_dim}
    original = {"original_max_position_embeddings": rope.original_max_positions}
    if rope.scaling == "longrope":
        lists = {"short_factor": list(rope.short_factors or ()), "long_factor": list(rope.long_factors or ())}
        return {"rope_type": "longrope", **lists, **original, "attention_factor": rope.table_scale, **share}
    if rope.factor is None:
        return {"rope_type": "default", **share}
    scaled = {"rope_type": rope.scaling, "factor": rope.factor, **share}
    if rope.scaling == "yarn":
        betas = {"beta_slow": rope.low_freq_factor, "beta_fast": rope.high_freq_factor, "truncate": rope.whole_pairs}
        return {**scaled, **betas, **original, "attention_factor": rope.table_scale}
    if rope.scaling == "llama3":
        return {
            **scaled,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            **original,
        }
    return scaled


def rope_fields(rope: Rope, head_dim: int) -> dict[str, Any]:
    """Write rotary positions for transformers 4 and 5.

    >>> rope_fields(Rope(theta=100.0), 8)
    {'rope_theta': 100.0, 'rope_parameters': {'rope_theta': 100.0, 'rope_type': 'default'}}
    """
    told = rope_parameters(rope, head_dim)
    fields: dict[str, Any] = {"rope_theta": rope.theta, "rope_parameters": {"rope_theta": rope.theta, **told}}
    if rope.dims is not None:
        fields["partial_rotary_factor"] = told["partial_rotary_factor"]
    scaling = {name: value for name, value in told.items() if name != "partial_rotary_factor"}
    return fields if told["rope_type"] == "default" else {**fields, "rope_scaling": scaling}


def by_layer_type(fields: Mapping[str, Any], local_theta: Any, head_dim: int) -> dict[str, Any]:
    """Read one rope for layers that see everything and one for those with a window: `rope` and `window_rope`.

    Args:
        fields: with rope_parameters by type of layer (transformers 5), or rope_scaling, of the first kind alone (4).
        local_theta: theta of layers with a window, where rope_parameters does not say.
        head_dim: of a head.

    >>> ropes = by_layer_type({"rope_theta": 100.0}, 10.0, 8)
    >>> ropes["rope"].theta, ropes["window_rope"].theta
    (100.0, 10.0)
    """
    given = fields.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or not given.keys() <= {FULL, SLIDING}:
        raise UserError(f"rope_parameters = {given!r} must have the fields {FULL} and {SLIDING}")
    full = {**(given.get(FULL) or {}), **(fields.get("rope_scaling") or {})}
    local = {"rope_theta": local_theta, **(given.get(SLIDING) or {})}
    rope, window_rope = (rope_of(one, fields, head_dim, partial=False, interleaved=False) for one in (full, local))
    return {"rope": rope, "window_rope": None if window_rope == rope else window_rope}


def layer_type_parameters(arch: Architecture) -> dict[str, Any]:
    """Write both ropes by type of layer."""
    assert arch.rope is not None
    ropes = {FULL: arch.rope, SLIDING: arch.window_rope or arch.rope}
    return {kind: {"rope_theta": rope.theta, **rope_parameters(rope, arch.head_dim)} for kind, rope in ropes.items()}
