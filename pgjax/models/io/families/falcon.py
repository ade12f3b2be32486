"""Falcon (Almazrouei et al. 2023): attention beside the MLP, and the queries of a key head next to it in one tensor."""

from __future__ import annotations

from typing import Any

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture
from pgjax.models.io.families import fields as read
from pgjax.models.io.families.family import COMMON, Family, Fields, Part, maps, norms, outer, rotary, rotary_fields


def _falcon(fields: Fields) -> Architecture:
    new, one_key = read.boolean(fields, "new_decoder_architecture"), read.boolean(fields, "multi_query")
    parallel, heads = read.boolean(fields, "parallel_attn"), read.integer(fields, "num_attention_heads")
    if new and not parallel:
        raise UserError("parallel_attn = False with new_decoder_architecture is not supported; supported: True")
    # Its own class says one key head a query head where each layer has one in all.
    kv_heads = heads if fields["num_kv_heads"] is None else fields["num_kv_heads"]
    kv_heads = kv_heads if new else 1 if one_key else heads
    count = fields["num_ln_in_parallel_attn"] or (2 if new else 1)
    if count not in (1, 2):
        raise UserError(f"num_ln_in_parallel_attn = {count!r} is not supported; supported: 1, 2")
    width, bias = read.integer(fields, "hidden_size"), read.boolean(fields, "bias")
    named = {
        "intermediate_size": 4 * width if fields["ffn_hidden_size"] is None else fields["ffn_hidden_size"],
        "num_key_value_heads": kv_heads,
        "layer_norm_eps": fields["layer_norm_epsilon"],
        "head_dim": None,
    }
    return rotary(
        {**fields, **named},
        norm="layer",
        gated_mlp=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        parallel=parallel,
        one_norm=parallel and not (new and count == 2),
        activation=read.activation(fields, "activation"),
    )


def _falcon_fields(arch: Architecture) -> dict[str, Any]:
    # The first architecture shares one key head, or has one for each query head; all else is the new one.
    new = arch.parallel and not (arch.one_norm and arch.kv_heads in (1, arch.heads))
    renamed = dict.fromkeys(
        ("intermediate_size", "num_key_value_heads", "head_dim", "hidden_act", "layer_norm_eps", "attention_bias")
    )
    return rotary_fields(
        arch,
        **renamed,
        ffn_hidden_size=arch.mlp_width,
        num_kv_heads=arch.kv_heads if new else arch.heads,
        activation=read.ACTIVATION_NAMES[arch.activation],
        layer_norm_epsilon=arch.norm_eps,
        bias=arch.mlp_bias,
        alibi=False,
        multi_query=new or arch.kv_heads == 1,
        parallel_attn=arch.parallel,
        new_decoder_architecture=new,
        num_ln_in_parallel_attn=1 if new and arch.one_norm else None,  # None: 2 in the new one
        hidden_dropout=0.0,
    )


def _by_key_head(arch: Architecture, name: str) -> Part | None:
    """A key head's queries, its key and its value side by side."""
    queries, size = arch.heads // arch.kv_heads, arch.head_dim
    starts = {"q": (0, queries), "k": (queries, 1), "v": (queries + 1, 1)}
    if name not in starts:
        return None
    start, count = starts[name]
    return Part(start * size, count * size, (queries + 2) * size)


_H, _QKV = "transformer.h", "query_key_value"
FALCON = Family(
    "FalconForCausalLM",
    "FalconForSequenceClassification",
    {
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "activation": "gelu",
        "ffn_hidden_size": None,  # None: 4 * hidden_size
        "num_kv_heads": None,  # None: num_attention_heads, where it is read
        "num_ln_in_parallel_attn": None,
        "multi_query": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
        "bias": False,
    },
    _falcon,
    _falcon_fields,
    {
        **outer("transformer.word_embeddings", "transformer.ln_f"),
        **maps(
            _H, "self_attention", "mlp", q=_QKV, k=_QKV, v=_QKV, o="dense", up="dense_h_to_4h", down="dense_4h_to_h"
        ),
        **norms(_H, attn_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
    },
    {**COMMON, "alibi": False, "partial_rotary_factor": 1.0},
    _by_key_head,
    side_by_side=norms(_H, attn_norm="ln_attn", mlp_norm="ln_mlp"),
)
