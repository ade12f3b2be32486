"""GPT-2 (Radford et al. 2019) and GPT-NeoX, with it Pythia (Black et al. 2022)."""

from __future__ import annotations

from typing import Any

from pgjax.models.architecture import Architecture
from pgjax.models.io.families import fields as read
from pgjax.models.io.families.family import COMMON, Family, Fields, Part, maps, norms, outer, rotary, rotary_fields

_H = "transformer.h"


def _gpt2(fields: Fields) -> Architecture:
    width, heads = read.integer(fields, "n_embd"), read.integer(fields, "n_head")
    return Architecture(
        family="gpt2",
        vocab_size=read.integer(fields, "vocab_size"),
        width=width,
        depth=read.integer(fields, "n_layer"),
        heads=heads,
        kv_heads=heads,
        head_dim=read.head_size(width, heads),
        mlp_width=4 * width if fields["n_inner"] is None else read.integer(fields, "n_inner"),
        max_positions=read.integer(fields, "n_positions"),
        activation=read.activation(fields, "activation_function"),
        norm="layer",
        norm_eps=read.above_zero("layer_norm_epsilon", fields["layer_norm_epsilon"]),
        rope=None,
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qk_norm=False,
        tied=read.boolean(fields, "tie_word_embeddings"),
    )


def _gpt2_fields(arch: Architecture) -> dict[str, Any]:
    return {
        "vocab_size": arch.vocab_size,
        "n_positions": arch.max_positions,
        "n_embd": arch.width,
        "n_layer": arch.depth,
        "n_head": arch.heads,
        "n_inner": arch.mlp_width,
        "activation_function": read.ACTIVATION_NAMES[arch.activation],
        "layer_norm_epsilon": arch.norm_eps,
        "tie_word_embeddings": arch.tied,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _thirds(arch: Architecture, name: str) -> Part | None:
    """Queries, keys and values side by side."""
    return Part("qkv".index(name) * arch.width, arch.width, 3 * arch.width) if name in {"q", "k", "v"} else None


GPT2 = Family(
    "GPT2LMHeadModel",
    "GPT2ForSequenceClassification",
    {
        "n_positions": 1024,
        "n_inner": None,  # None: 4 * n_embd
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    _gpt2,
    _gpt2_fields,
    {
        **outer("transformer.wte", "transformer.ln_f"),
        ("embed", "positions"): "transformer.wpe.weight",
        **maps(_H, "attn", "mlp", q="c_attn", k="c_attn", v="c_attn", o="c_proj", up="c_fc", down="c_proj"),
        **norms(_H, attn_norm="ln_1", mlp_norm="ln_2"),
    },
    {**COMMON, "partial_rotary_factor": 1.0},
    _thirds,
    in_out=True,
)

_N = "gpt_neox.layers"


def _neox(fields: Fields) -> Architecture:
    # The names before transformers 5, which reads both.
    old = {
        "rope_theta": fields.get("rotary_emb_base", 10000.0),
        "partial_rotary_factor": fields.get("rotary_pct", 0.25),
    }
    biases = {name: read.boolean(fields, "attention_bias") for name in ("qkv_bias", "out_bias")}
    named = {**old, "head_dim": None, "num_key_value_heads": None, **fields}
    return rotary(
        named,
        partial=True,
        norm="layer",
        gated_mlp=False,
        mlp_bias=True,
        parallel=read.boolean(fields, "use_parallel_residual"),
        **biases,
    )


def _neox_fields(arch: Architecture) -> dict[str, Any]:
    assert arch.rope is not None
    share = 1.0 if arch.rope.dims is None else arch.rope.dims / arch.head_dim
    fields = rotary_fields(
        arch, num_key_value_heads=None, head_dim=None, use_parallel_residual=arch.parallel, partial_rotary_factor=share,
        rotary_pct=share, rotary_emb_base=arch.rope.theta, hidden_dropout=0.0,
    )  # fmt: skip
    fields["rope_parameters"] = {**fields["rope_parameters"], "partial_rotary_factor": share}
    return fields


def _by_head(arch: Architecture, name: str) -> Part | None:
    """Each head has its query, its key and its value side by side."""
    size = arch.head_dim
    return Part("qkv".index(name) * size, size, 3 * size) if name in {"q", "k", "v"} else None


_QKV = "query_key_value"
GPT_NEOX = Family(
    "GPTNeoXForCausalLM",
    "GPTNeoXForSequenceClassification",
    {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
    },
    _neox,
    _neox_fields,
    {
        **outer("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
        **maps(_N, "attention", "mlp", q=_QKV, k=_QKV, v=_QKV, o="dense", up="dense_h_to_4h", down="dense_4h_to_h"),
        **norms(_N, attn_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
    },
    COMMON,
    _by_head,
)
