"""OLMo 2 and 3 (OLMo Team 2025): norms behind attention and MLP alone, one over all queries and one over all keys."""

from __future__ import annotations

from typing import Any

from pgjax.models.architecture import Architecture
from pgjax.models.io.families import fields as read
from pgjax.models.io.families.family import (
    COMMON,
    DEFAULTS,
    LAYERS,
    MAPS,
    OUTER,
    QK_NORMS,
    Family,
    Fields,
    norms,
    rotary,
    rotary_fields,
)
from pgjax.models.io.families.ropes import by_layer_type, layer_type_parameters

_ONLY = {**COMMON, "partial_rotary_factor": 1.0}
_NORMS: dict[str, Any] = {"pre_norms": False, "post_norms": True, "qk_norm_whole": True}
_NAMES = {
    **OUTER,
    **MAPS,
    **QK_NORMS,
    **norms(LAYERS, attn_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm"),
}
_KNOWN = {**DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}


def _olmo2(fields: Fields) -> Architecture:
    read.check_full(fields)
    return rotary(fields, **_NORMS)


OLMO2 = Family("Olmo2ForCausalLM", "Olmo2ForSequenceClassification", _KNOWN, _olmo2, rotary_fields, _NAMES, _ONLY)


def _olmo3(fields: Fields) -> Architecture:
    width, heads = read.integer(fields, "hidden_size"), read.integer(fields, "num_attention_heads")
    head_dim = read.head_size(width, heads) if fields["head_dim"] is None else read.integer(fields, "head_dim")
    depth = read.integer(fields, "num_hidden_layers")
    windows = read.windows(fields, [(layer + 1) % 4 != 0 for layer in range(depth)], needed=True)
    return rotary(fields, **_NORMS, **windows, **by_layer_type(fields, fields["rope_theta"], head_dim))


OLMO3 = Family(
    "Olmo3ForCausalLM",
    "Olmo3ForSequenceClassification",
    {**_KNOWN, "rope_theta": 500000.0, "sliding_window": 4096, "layer_types": None},
    _olmo3,
    lambda arch: rotary_fields(arch, rope_parameters=layer_type_parameters(arch), **read.window_fields(arch)),
    _NAMES,
    _ONLY,
)
