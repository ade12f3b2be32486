"""Gemma, Gemma 2 and the text models of Gemma 3 (Gemma Team 2024, 2025)."""

from __future__ import annotations

import math
from typing import Any

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
from pgjax.models.io.families.ropes import by_layer_type, layer_type_parameters

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
        **read.windows(fields, [bool((layer + 1) % every) for layer in range(depth)], needed=True),
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
    ropes = by_layer_type(fields, fields["rope_local_base_freq"], read.integer(fields, "head_dim"))
    return _later(fields, read.integer(fields, "sliding_window_pattern"), qk_norm=True, **ropes)


def _gemma3_fields(arch: Architecture) -> dict[str, Any]:
    ropes = layer_type_parameters(arch)
    return _later_fields(arch, rope_parameters=ropes, rope_local_base_freq=ropes[read.SLIDING]["rope_theta"])


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
