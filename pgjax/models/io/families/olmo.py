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
