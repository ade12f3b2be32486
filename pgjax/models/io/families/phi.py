"""Phi-3 and 4 (Abdin et al. 2024): queries, keys and values in one tensor, gate and up in another."""

from __future__ import annotations

from typing import Any

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture
from pgjax.models.io.families.family import (
    ATTENTION,
    COMMON,
    DEFAULTS,
    LAYERS,
    OUTER,
    PRE_NORMS,
    Family,
    Fields,
    Part,
    maps,
    rotary,
    rotary_fields,
)
from pgjax.models.io.families.llama import everywhere
from pgjax.models.io.families.ropes import read_rope


def _phi3(fields: Fields) -> Architecture:
    # Its class has the field, and what it says is the length that rope was trained on.
    original = fields.get("original_max_position_embeddings") or 4096
    arch = rotary({**fields, "original_max_position_embeddings": original}, partial=True, **everywhere(fields))
    if (
        arch.rope is not None
        and arch.rope.scaling == "longrope"
        and arch.window is not None
        and arch.window < arch.max_positions
    ):
        raise UserError(
            f"sliding_window = {arch.window} with rope type 'longrope' is not supported; supported: at least "
            f"max_position_embeddings = {arch.max_positions}"
        )
    return arch


def _phi3_fields(arch: Architecture) -> dict[str, Any]:
    assert arch.rope is not None
    share = 1.0 if arch.rope.dims is None else arch.rope.dims / arch.head_dim
    original = arch.rope.original_max_positions
    fields = rotary_fields(
        arch, attention_bias=None, sliding_window=arch.window, original_max_position_embeddings=original,
        partial_rotary_factor=share, resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    fields["rope_parameters"] = {**fields["rope_parameters"], "partial_rotary_factor": share}
    if arch.rope.scaling == "longrope":  # transformers 4 wants these three fields and no other
        lists = {name: fields["rope_scaling"][name] for name in ("short_factor", "long_factor")}
        short = {**fields, "rope_parameters": None, "rope_scaling": {"type": "longrope", **lists}}
        if read_rope(short, arch.head_dim, partial=True) == arch.rope:
            fields["rope_scaling"] = short["rope_scaling"]
    return fields


def gate_up(arch: Architecture, name: str) -> Part | None:
    """Find gate or up in the tensor that holds both."""
    names = ("gate", "up")
    return Part(names.index(name) * arch.mlp_width, arch.mlp_width, 2 * arch.mlp_width) if name in names else None


def _parts(arch: Architecture, name: str) -> Part | None:
    sizes = {"q": arch.heads * arch.head_dim, **dict.fromkeys("kv", arch.kv_heads * arch.head_dim)}
    if name not in sizes:
        return gate_up(arch, name)
    return Part(sum(list(sizes.values())[: "qkv".index(name)]), sizes[name], sum(sizes.values()))


GATE_UP = maps(LAYERS, "self_attn", "mlp", gate="gate_up_proj", up="gate_up_proj", down="down_proj")
_FUSED = maps(LAYERS, "self_attn", "mlp", **{**ATTENTION, **dict.fromkeys("qkv", "qkv_proj")})
PHI3 = Family(
    "Phi3ForCausalLM",
    "Phi3ForSequenceClassification",
    {**DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None},
    _phi3,
    _phi3_fields,
    {**OUTER, **PRE_NORMS, **_FUSED, **GATE_UP},
    COMMON,
    _parts,
)
