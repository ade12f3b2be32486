"""Llama and those that only add a bias, a norm of queries and keys, or windows: Qwen2, Qwen3, Mistral, SmolLM3, Granite."""

from __future__ import annotations

import dataclasses
from typing import Any

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture
from pgjax.models.io.families import fields as read
from pgjax.models.io.families.family import COMMON, DEFAULTS, NAMES, Family, Fields, rotary, rotary_fields

WINDOWLESS = {**COMMON, "partial_rotary_factor": 1.0}
WINDOWS = {name: value for name, value in WINDOWLESS.items() if name != "use_sliding_window"}


def _llama(fields: Fields) -> Architecture:
    read.check_full(fields)
    return rotary(fields, mlp_bias=read.boolean(fields, "mlp_bias"))


LLAMA = Family(
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    {**DEFAULTS, "max_position_embeddings": 2048},
    _llama,
    lambda arch: rotary_fields(arch, mlp_bias=arch.mlp_bias),
    NAMES,
    WINDOWLESS,
)


def qwen_windows(fields: Fields) -> dict[str, Any]:
    """Read Qwen's windows: layers from max_window_layers on, where use_sliding_window is true."""
    first, depth = fields["max_window_layers"], read.integer(fields, "num_hidden_layers")
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise UserError(f"max_window_layers = {first!r} must be a whole number, 0 or more")
    used = {} if read.boolean(fields, "use_sliding_window") else {"sliding_window": None}
    return read.windows({**fields, **used}, [layer >= first for layer in range(depth)])


def qwen_window_fields(arch: Architecture) -> dict[str, Any]:
    """Write Qwen's windows."""
    if arch.window is None:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, **read.window_fields(arch)}


_QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QWEN2 = Family(
    "Qwen2ForCausalLM",
    "Qwen2ForSequenceClassification",
    {**DEFAULTS, **_QWEN},
    lambda fields: rotary(fields, qkv_bias=True, out_bias=False, **qwen_windows(fields)),
    lambda arch: rotary_fields(arch, attention_bias=None, **qwen_window_fields(arch)),
    NAMES,
    WINDOWS,
)
QWEN3 = Family(
    "Qwen3ForCausalLM",
    "Qwen3ForSequenceClassification",
    {**DEFAULTS, **_QWEN, "head_dim": 128},
    lambda fields: rotary(fields, qk_norm=True, **qwen_windows(fields)),
    lambda arch: rotary_fields(arch, **qwen_window_fields(arch)),
    NAMES,
    WINDOWS,
)


def everywhere(fields: Fields) -> dict[str, Any]:
    """Read a window that all layers have, where there is one."""
    read.check_full(fields)
    depth = read.integer(fields, "num_hidden_layers")
    return read.windows({"sliding_window": fields["sliding_window"]}, [True] * depth)


MISTRAL = Family(
    "MistralForCausalLM",
    "MistralForSequenceClassification",
    {**DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    lambda fields: rotary(fields, qkv_bias=False, out_bias=False, **everywhere(fields)),
    lambda arch: rotary_fields(arch, attention_bias=None, sliding_window=arch.window),
    NAMES,
    WINDOWLESS,
)


def _smollm3(fields: Fields) -> Architecture:
    depth, every = read.integer(fields, "num_hidden_layers"), read.integer(fields, "no_rope_layer_interval")
    turned = fields["no_rope_layers"]  # the name notwithstanding: 1 rotates, 0 does not
    if turned is None:
        turned = [int((layer + 1) % every != 0) for layer in range(depth)]
    if not isinstance(turned, list) or len(turned) != depth or not set(turned) <= {0, 1}:
        raise UserError(f"no_rope_layers = {turned!r} must list 1 (rotates) or 0 (does not) for each of {depth} layers")
    used = {} if read.boolean(fields, "use_sliding_window") else {"sliding_window": None}
    windows = read.windows({**fields, **used}, [not one for one in turned])
    rotated = None if all(turned) else tuple(bool(one) for one in turned)
    return rotary(fields, mlp_bias=read.boolean(fields, "mlp_bias"), rotated=rotated, **windows)


def _smollm3_fields(arch: Architecture) -> dict[str, Any]:
    turned = [int(one) for one in arch.rotated or (True,) * arch.depth]
    return rotary_fields(arch, mlp_bias=arch.mlp_bias, no_rope_layers=turned, **qwen_window_fields(arch))


SMOLLM3 = Family(
    "SmolLM3ForCausalLM",
    "SmolLM3ForSequenceClassification",
    {
        **DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,  # None: by the interval
        "no_rope_layer_interval": 4,
    },
    _smollm3,
    _smollm3_fields,
    NAMES,
    WINDOWS,
)


def _granite(fields: Fields) -> Architecture:
    read.check_full(fields)
    down = read.factor(fields, "logits_scaling")
    return rotary(
        fields,
        mlp_bias=read.boolean(fields, "mlp_bias"),
        embedding_scale=read.factor(fields, "embedding_multiplier"),
        residual_scale=read.factor(fields, "residual_multiplier"),
        attention_scale=read.above_zero("attention_multiplier", fields["attention_multiplier"]),
        logit_scale=None if down is None else 1 / down,
    )


def _granite_fields(arch: Architecture) -> dict[str, Any]:
    if arch.attention_scale is None:  # written as what it is
        arch = dataclasses.replace(arch, attention_scale=arch.head_dim**-0.5)
    return rotary_fields(
        arch,
        mlp_bias=arch.mlp_bias,
        embedding_multiplier=arch.embedding_scale or 1.0,
        residual_multiplier=arch.residual_scale or 1.0,
        attention_multiplier=arch.attention_scale,
        logits_scaling=1.0 if arch.logit_scale is None else read.tidy(1 / arch.logit_scale),
    )


GRANITE = Family(
    "GraniteForCausalLM",
    "GraniteForSequenceClassification",  # which transformers lacks
    {
        **DEFAULTS,
        "max_position_embeddings": 2048,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    _granite,
    _granite_fields,
    NAMES,
    WINDOWLESS,
)
