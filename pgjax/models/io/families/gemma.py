"""Gemma, Gemma 2 and the text models of Gemma 3 (Gemma Team 2024, 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture
from pgjax.models.io.families import fields as read
from pgjax.models.io.families.family import (
    COMMON,
    DEFAULTS,
    LAYERS,
    MAPS,
    NAMES,
    OUTER,
    QK_NORMS,
    Family,
    Fields,
    norms,
    rotary,
    rotary_fields,
)
from pgjax.models.io.families.ropes import rope_of, rope_parameters

_ONLY = {**COMMON, "partial_rotary_factor": 1.0}
_FOUR_NORMS = norms(
    LAYERS,
    attn_norm="input_layernorm",
    attn_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
_KNOWN: Fields = {
    **DEFAULTS,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
}
_TANH = {"gelu": "gelu_tanh"}  # what the first configurations call gelu is the approximation by tanh


def _gemma(fields: Fields) -> Architecture:
    read.check_full(fields)
    activation = read.activation(
        fields, "hidden_act" if fields.get("hidden_activation") is None else "hidden_activation"
    )
    return rotary(fields, activation=_TANH.get(activation, activation), **_scales(fields))


def _scales(fields: Fields) -> dict[str, Any]:
    return {"norm_offset": 1.0, "embedding_scale": math.sqrt(read.integer(fields, "hidden_size"))}


def _activations(arch: Architecture, *names: str) -> dict[str, Any]:
    name = "gelu_pytorch_tanh" if arch.activation == "gelu_tanh" else read.ACTIVATION_NAMES[arch.activation]
    return {"hidden_act": None, **dict.fromkeys(names, name)}


GEMMA = Family(
    "GemmaForCausalLM",
    "GemmaForSequenceClassification",
    {**_KNOWN, "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": None},
    _gemma,
    lambda arch: rotary_fields(arch, **_activations(arch, "hidden_act", "hidden_activation")),
    NAMES,
    _ONLY,
)


def _later(fields: Fields, every: int, **changes: Any) -> Architecture:
    """Read what Gemma 2 and 3 have in common; every so many layers, one sees everything."""
    depth = read.integer(fields, "num_hidden_layers")
    return rotary(
        fields,
        activation=read.activation(fields, "hidden_activation"),
        post_norms=True,
        attention_scale=read.above_zero("query_pre_attn_scalar", fields["query_pre_attn_scalar"]) ** -0.5,
        attention_cap=read.factor(fields, "attn_logit_softcapping", nothing=None),
        logit_cap=read.factor(fields, "final_logit_softcapping", nothing=None),
        **read.windows(fields, [bool((layer + 1) % every) for layer in range(depth)]),
        **_scales(fields),
        **changes,
    )


def _later_fields(arch: Architecture, **changes: Any) -> dict[str, Any]:
    scalar = arch.head_dim if arch.attention_scale is None else read.tidy(arch.attention_scale**-2)
    return rotary_fields(
        arch,
        query_pre_attn_scalar=int(scalar) if scalar == int(scalar) else scalar,
        **{**_activations(arch, "hidden_activation"), **read.window_fields(arch), **changes},
    ) | {"attn_logit_softcapping": arch.attention_cap, "final_logit_softcapping": arch.logit_cap}


_LATER: Fields = {
    **_KNOWN,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,  # None: alternating
}
GEMMA2 = Family(
    "Gemma2ForCausalLM",
    "Gemma2ForSequenceClassification",
    {**_LATER, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    lambda fields: _later(fields, 2),
    _later_fields,
    {**OUTER, **MAPS, **_FOUR_NORMS},
    _ONLY,
)


def _gemma3(fields: Fields) -> Architecture:
    given = fields.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or not given.keys() <= {read.FULL, read.SLIDING}:
        raise UserError(f"rope_parameters = {given!r} must have the fields {read.FULL} and {read.SLIDING}")
    head_dim = read.integer(fields, "head_dim")
    one = {"partial": False, "interleaved": False}
    full = {**(given.get(read.FULL) or {}), **(fields.get("rope_scaling") or {})}
    local = {"rope_theta": fields["rope_local_base_freq"], **(given.get(read.SLIDING) or {})}
    rope, window_rope = rope_of(full, fields, head_dim, **one), rope_of(local, fields, head_dim, **one)
    pattern = read.integer(fields, "sliding_window_pattern")
    return _later(fields, pattern, qk_norm=True, rope=rope, window_rope=None if window_rope == rope else window_rope)


def _gemma3_fields(arch: Architecture) -> dict[str, Any]:
    assert arch.rope is not None
    local = arch.window_rope or arch.rope
    both = {
        kind: {"rope_theta": rope.theta, **rope_parameters(rope, arch.head_dim)}
        for kind, rope in ((read.FULL, arch.rope), (read.SLIDING, local))
    }
    return _later_fields(arch, rope_parameters=both, rope_local_base_freq=local.theta)


GEMMA3 = Family(
    "Gemma3ForCausalLM",
    "Gemma3TextForSequenceClassification",
    {
        **_LATER,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    _gemma3,
    _gemma3_fields,
    {**OUTER, **MAPS, **QK_NORMS, **_FOUR_NORMS},
    _ONLY,
)
