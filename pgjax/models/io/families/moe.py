"""Mixtral (Jiang et al. 2024) and Qwen3-MoE: every MLP is a choice of experts."""

from __future__ import annotations

from typing import Any

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture, Experts
from pgjax.models.io.families import fields as read
from pgjax.models.io.families.family import (
    ATTENTION,
    DEFAULTS,
    LAYERS,
    OUTER,
    PRE_NORMS,
    QK_NORMS,
    Family,
    Fields,
    LeafPath,
    maps,
    rotary,
    rotary_fields,
)
from pgjax.models.io.families.llama import WINDOWLESS, everywhere


def _named(module: str, gate: str, up: str, down: str) -> dict[LeafPath, str]:
    each = {"expert_gate": gate, "expert_up": up, "expert_down": down}
    return {
        ("layers", "experts", "router", "kernel"): f"{LAYERS}.{{}}.{module}.gate.weight",
        **{
            ("layers", "experts", name, "kernel"): f"{LAYERS}.{{}}.{module}.experts.{{}}.{tensor}.weight"
            for name, tensor in each.items()
        },
    }


def _experts(fields: Fields, number: str, *, normalized: bool) -> Experts:
    experts = Experts(read.integer(fields, number), read.integer(fields, "num_experts_per_tok"), normalized)
    if experts.per_token > experts.number:
        raise UserError(f"num_experts_per_tok = {experts.per_token} is more than {number} = {experts.number}")
    return experts


def _expert_fields(arch: Architecture, number: str) -> dict[str, Any]:
    if arch.experts is None:
        raise UserError(f"family {arch.family!r} in Hugging Face layout cannot express experts=None")
    return {number: arch.experts.number, "num_experts_per_tok": arch.experts.per_token}


_ATTENTION = {**OUTER, **PRE_NORMS, **maps(LAYERS, "self_attn", "", **ATTENTION)}


def _mixtral(fields: Fields) -> Architecture:
    experts = _experts(fields, "num_local_experts", normalized=True)
    return rotary(fields, qkv_bias=False, out_bias=False, experts=experts, **everywhere(fields))


MIXTRAL = Family(
    "MixtralForCausalLM",
    "MixtralForSequenceClassification",
    {
        **DEFAULTS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    _mixtral,
    lambda arch: rotary_fields(
        arch, attention_bias=None, sliding_window=arch.window, **_expert_fields(arch, "num_local_experts")
    ),
    {**_ATTENTION, **_named("block_sparse_moe", "w1", "w3", "w2")},
    {**WINDOWLESS, "router_jitter_noise": 0.0},
)


def _qwen3_moe(fields: Fields) -> Architecture:
    # As transformers 5.24 writes it, or as all before do.
    number = "num_experts" if fields.get("num_local_experts") is None else "num_local_experts"
    window = fields["sliding_window"] if read.boolean(fields, "use_sliding_window") else None
    return rotary(
        {**fields, "intermediate_size": read.integer(fields, "moe_intermediate_size")},
        qk_norm=True,
        experts=_experts(fields, number, normalized=read.boolean(fields, "norm_topk_prob")),
        **everywhere({**fields, "sliding_window": window}),
    )


def _qwen3_moe_fields(arch: Architecture) -> dict[str, Any]:
    counts = _expert_fields(arch, "num_experts")
    assert arch.experts is not None
    return rotary_fields(
        arch,
        moe_intermediate_size=arch.mlp_width,
        norm_topk_prob=arch.experts.normalized,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        use_sliding_window=arch.window is not None,
        sliding_window=arch.window,
        **counts,
    )


QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    "Qwen3MoeForSequenceClassification",
    {
        **DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
    },
    _qwen3_moe,
    _qwen3_moe_fields,
    {**_ATTENTION, **QK_NORMS, **_named("mlp", "gate_proj", "up_proj", "down_proj")},
    {
        **{k: v for k, v in WINDOWLESS.items() if k != "use_sliding_window"},
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
)
