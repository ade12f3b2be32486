"""Command R7B (Cohere 2), GLM-4-0414 and StableLM: pairs of neighbours, part of a head turned, attention beside the MLP."""

from __future__ import annotations

from typing import Any

from pgjax.models.architecture import Architecture
from pgjax.models.io.families import fields as read
from pgjax.models.io.families.family import (
    ATTENTION,
    COMMON,
    DEFAULTS,
    LAYERS,
    MAPS,
    OUTER,
    PRE_NORMS,
    Family,
    Fields,
    maps,
    norms,
    rotary,
    rotary_fields,
)
from pgjax.models.io.families.phi import GATE_UP, gate_up


def _cohere2(fields: Fields) -> Architecture:
    depth, every = read.integer(fields, "num_hidden_layers"), read.integer(fields, "sliding_window_pattern")
    windows = read.windows(fields, [bool((layer + 1) % every) for layer in range(depth)], needed=True)
    # Only layers with a window know where a token stands.
    rotated = windows["windowed"] if windows else (False,) * depth
    return rotary(
        {**fields, "head_dim": None},
        interleaved=True,
        norm="layer",
        norm_bias=False,
        parallel=True,
        one_norm=True,
        logit_scale=read.factor(fields, "logit_scale"),
        rotated=rotated,
        **windows,
    )


def _cohere2_fields(arch: Architecture) -> dict[str, Any]:
    scale = 1.0 if arch.logit_scale is None else arch.logit_scale
    return rotary_fields(arch, logit_scale=scale, **read.window_fields(arch))


COHERE2 = Family(
    "Cohere2ForCausalLM",
    "Cohere2ForSequenceClassification",  # which transformers lacks
    {
        **DEFAULTS,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "logit_scale": 0.0625,
        "sliding_window": 4096,
        "layer_types": None,  # None: by the pattern
        "sliding_window_pattern": 4,
    },
    _cohere2,
    _cohere2_fields,
    {**OUTER, **MAPS, **norms(LAYERS, attn_norm="input_layernorm")},
    {**COMMON, "partial_rotary_factor": 1.0},
)


def _glm4(fields: Fields) -> Architecture:
    read.check_full(fields)
    bias = read.boolean(fields, "attention_bias")
    return rotary(fields, partial=True, interleaved=True, post_norms=True, qkv_bias=bias, out_bias=False)


GLM4 = Family(
    "Glm4ForCausalLM",
    "Glm4ForSequenceClassification",
    {
        **DEFAULTS,
        "rms_norm_eps": 1.5625e-07,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    },
    _glm4,
    rotary_fields,
    {
        **OUTER,
        **maps(LAYERS, "self_attn", "mlp", **ATTENTION),
        **GATE_UP,
        **norms(
            LAYERS,
            attn_norm="input_layernorm",
            attn_post_norm="post_self_attn_layernorm",
            mlp_norm="post_attention_layernorm",
            mlp_post_norm="post_mlp_layernorm",
        ),
    },
    COMMON,
    gate_up,
)


def _stablelm(fields: Fields) -> Architecture:
    read.check_full(fields)
    parallel = read.boolean(fields, "use_parallel_residual")
    return rotary(
        {**fields, "head_dim": None},
        partial=True,
        norm="layer",
        parallel=parallel,
        one_norm=parallel,
        qkv_bias=read.boolean(fields, "use_qkv_bias"),
        out_bias=False,
    )


STABLELM = Family(
    "StableLmForCausalLM",
    "StableLmForSequenceClassification",
    {
        **DEFAULTS,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": False,
        "use_parallel_residual": False,
    },
    _stablelm,
    lambda arch: rotary_fields(
        arch, attention_bias=None, use_qkv_bias=arch.qkv_bias, use_parallel_residual=arch.parallel
    ),
    {**OUTER, **MAPS, **PRE_NORMS},
    {**COMMON, "qk_layernorm": False},
)
