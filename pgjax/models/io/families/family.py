"""What a family of models is on disk, and what those that name their fields as Llama does have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture
from pgjax.models.io.families import fields as read
from pgjax.models.io.families.ropes import read_rope, rope_fields

LeafPath = tuple[str, ...]  # keys of a leaf in the parameter tree
Fields = Mapping[str, Any]


class Part(NamedTuple):
    """Where a leaf is in a tensor that holds several: in each group of `total` columns, `size` of them from `start` on."""

    start: int
    size: int
    total: int


class Family(NamedTuple):
    """One family: its classes in transformers, its fields, and the names of its tensors."""

    lm: str
    classifier: str
    defaults: Fields  # of fields that config.json may leave out, as in transformers' class
    read: Callable[[Fields], Architecture]  # fields, over the defaults
    write: Callable[[Architecture], dict[str, Any]]
    names: Mapping[LeafPath, str]  # {} is the number of the layer, a second one that of the expert
    only: Fields  # options that change the computation -> the only value that is implemented
    part: Callable[[Architecture, str], Part | None] = lambda arch, name: None  # of the linear map with that name
    in_out: bool = False  # kernels are stored [in, out]
    side_by_side: Mapping[LeafPath, str] = {}  # other names, where attention and MLP read the stream by a norm each


ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
COMMON: Fields = {
    "use_sliding_window": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "quantization_config": None,
    "is_causal": True,
    "use_bidirectional_attention": False,
}
DEFAULTS: Fields = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,  # None: hidden_size / num_attention_heads
    "num_key_value_heads": None,  # None: num_attention_heads
}


def maps(block: str, attention: str, mlp: str, **tensors: str) -> dict[LeafPath, str]:
    """Name kernels and biases of a layer's linear maps.

    Args:
        block: before the number of the layer, as "model.layers".
        attention: the module of attention.
        mlp: the module of the MLP.
        **tensors: q, k, v, o, gate, up, down: the tensor's name in its module.

    >>> maps("h", "attn", "mlp", up="c_fc")["layers", "up", "bias"]
    'h.{}.mlp.c_fc.bias'
    """
    return {
        ("layers", name, leaf): f"{block}.{{}}.{attention if name in ATTENTION else mlp}.{tensor}.{ending}"
        for name, tensor in tensors.items()
        for leaf, ending in (("kernel", "weight"), ("bias", "bias"))
    }


def norms(block: str, **tensors: str) -> dict[LeafPath, str]:
    """Name scales and biases of a layer's norms.

    >>> norms("h", attn_norm="ln_1")["layers", "attn_norm", "scale"]
    'h.{}.ln_1.weight'
    """
    return {
        ("layers", name, leaf): f"{block}.{{}}.{tensor}.{ending}"
        for name, tensor in tensors.items()
        for leaf, ending in (("scale", "weight"), ("bias", "bias"))
    }


def outer(embedding: str, norm: str, head: str = "lm_head") -> dict[LeafPath, str]:
    """Name what is outside of the layers.

    >>> outer("wte", "ln_f")["norm", "scale"]
    'ln_f.weight'
    """
    return {
        ("embed", "tokens"): f"{embedding}.weight",
        ("norm", "scale"): f"{norm}.weight",
        ("norm", "bias"): f"{norm}.bias",
        ("head", "kernel"): f"{head}.weight",
        ("score", "kernel"): "score.weight",
    }


LAYERS = "model.layers"
OUTER = outer("model.embed_tokens", "model.norm")
MAPS = maps(LAYERS, "self_attn", "mlp", **ATTENTION, gate="gate_proj", up="up_proj", down="down_proj")
QK_NORMS = norms(LAYERS, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
PRE_NORMS = norms(LAYERS, attn_norm="input_layernorm", mlp_norm="post_attention_layernorm")
NAMES: Mapping[LeafPath, str] = {**OUTER, **MAPS, **QK_NORMS, **PRE_NORMS}


def rotary(fields: Fields, *, partial: bool = False, interleaved: bool = False, **changes: Any) -> Architecture:
    """Read an architecture from fields that are named as Llama's.

    Args:
        fields: over the family's defaults.
        partial: as in `ropes.read_rope`.
        interleaved: as in `ropes.read_rope`.
        **changes: fields of the `Architecture` that the family has otherwise.
    """
    width, heads = read.integer(fields, "hidden_size"), read.integer(fields, "num_attention_heads")
    kv_heads = heads if fields["num_key_value_heads"] is None else read.integer(fields, "num_key_value_heads")
    if heads % kv_heads != 0:
        raise UserError(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
    head_dim = read.head_size(width, heads) if fields.get("head_dim") is None else read.integer(fields, "head_dim")
    eps = "layer_norm_eps" if changes.get("norm") == "layer" else "rms_norm_eps"
    attention_bias = "qkv_bias" not in changes and read.boolean(fields, "attention_bias")
    known = {
        "norm": "rms",
        "qkv_bias": attention_bias,
        "out_bias": attention_bias,
        "mlp_bias": False,
        "qk_norm": False,
        "gated_mlp": True,
        "activation": "" if "activation" in changes else read.activation(fields, "hidden_act"),
        "rope": changes["rope"]
        if "rope" in changes
        else read_rope(fields, head_dim, partial=partial, interleaved=interleaved),
        **changes,
    }
    return Architecture(
        family=fields["model_type"],
        vocab_size=read.integer(fields, "vocab_size"),
        width=width,
        depth=read.integer(fields, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=read.integer(fields, "intermediate_size"),
        max_positions=read.integer(fields, "max_position_embeddings"),
        norm_eps=read.above_zero(eps, fields[eps]),
        tied=read.boolean(fields, "tie_word_embeddings"),
        **known,
    )


def rotary_fields(arch: Architecture, **changes: Any) -> dict[str, Any]:
    """Write an architecture as fields that are named as Llama's.

    Args:
        arch: the architecture.
        **changes: fields that the family has otherwise or beside them; None leaves one out.
    """
    if arch.rope is None:
        raise UserError(f"family {arch.family!r} in Hugging Face layout cannot express rope=None")
    fields = {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.width,
        "intermediate_size": arch.mlp_width,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "hidden_act": read.ACTIVATION_NAMES[arch.activation],
        "max_position_embeddings": arch.max_positions,
        "layer_norm_eps" if arch.norm == "layer" else "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tied,
        "attention_dropout": 0.0,
        "attention_bias": arch.qkv_bias,
        **rope_fields(arch.rope, arch.head_dim),
    }
    return {
        name: value for name, value in {**fields, **changes}.items() if value is not None or name == "sliding_window"
    }
