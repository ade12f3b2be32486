"""Convert Hugging Face's config.json to and from an `Architecture`; an unknown option is an error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture, Rope

# The defaults of Hugging Face's configuration classes for fields that config.json leaves out. Other fields are required.
_ROTARY_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,  # None: hidden_size / num_attention_heads
    "num_key_value_heads": None,  # None: num_attention_heads
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_ROTARY_DEFAULTS, "max_position_embeddings": 2048},
    "qwen2": {**_ROTARY_DEFAULTS, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {**_ROTARY_DEFAULTS, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "gpt2": {
        "n_positions": 1024,
        "n_inner": None,  # None: 4 * n_embd
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
}

# Options that change the computation, each with the only value that is implemented; null or a missing field counts as that.
ONLY: dict[str, Any] = {
    "use_sliding_window": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "is_causal": True,
}

ACTIVATIONS: dict[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_CLASSIFIERS = {
    "llama": "LlamaForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
}
_LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Read an architecture from the fields of a Hugging Face config.json.

    Args:
        config: the parsed file, of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Returns:
        The architecture.

    Raises:
        UserError: for an unknown family, activation or rope type, a missing field, or an option that is not
            implemented; the message names the value and lists what is supported.

    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    >>> architecture_of(config).mlp_width
    64
    >>> architecture_of({"model_type": "mamba"})
    Traceback (most recent call last):
    pgjax.UserError: model_type 'mamba' is not supported; supported: gpt2, llama, qwen2, qwen3
    """
    family = config.get("model_type")
    if family is None:
        raise UserError("the configuration has no field 'model_type'")
    if not isinstance(family, str) or family not in DEFAULTS:
        raise UserError(f"model_type {family!r} is not supported; supported: {', '.join(sorted(DEFAULTS))}")
    fields = {**DEFAULTS[family], **config}
    _check_options(fields)
    return _gpt2(fields) if family == "gpt2" else _rotary(family, fields)


def config_of(arch: Architecture) -> dict[str, Any]:
    """Write an architecture as the fields of a Hugging Face config.json, readable by transformers 4 and 5.

    Args:
        arch: an architecture that its family can express.

    Returns:
        A dict for JSON, without token ids and dtype.

    Raises:
        UserError: when the family has no field for one of the architecture's options; the message names them.

    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    >>> config_of(architecture_of(config))["n_inner"]
    64
    """
    arch = dataclasses.replace(arch, known_ids=None)  # the tokenizer's files say that
    if arch.family not in _CLASSES:
        raise UserError(f"family {arch.family!r} is not supported; supported: {', '.join(sorted(_CLASSES))}")
    if arch.activation not in _ACTIVATION_NAMES:
        raise UserError(f"activation {arch.activation!r} is not supported; supported: {', '.join(_ACTIVATION_NAMES)}")
    config = _gpt2_config(arch) if arch.family == "gpt2" else _rotary_config(arch)
    config = {"architectures": [_CLASSES[arch.family]], "model_type": arch.family, **config}
    back = architecture_of(config)
    lost = [name for name in arch.__dataclass_fields__ if vars(arch)[name] != vars(back)[name]]
    if lost:
        listed = ", ".join(f"{name}={vars(arch)[name]!r}" for name in lost)
        raise UserError(f"family {arch.family!r} in Hugging Face layout cannot express {listed}")
    return config


def classifier_config_of(arch: Architecture) -> dict[str, Any]:
    """Write the config.json of a sequence classifier with one label, as reward models are saved.

    Args:
        arch: as in `config_of`.

    Returns:
        A dict for JSON, without token ids and dtype.

    Raises:
        UserError: as in `config_of`.

    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    >>> classifier_config_of(architecture_of(config))["architectures"]
    ['GPT2ForSequenceClassification']
    """
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1, "problem_type": "regression"}
    return {**config_of(arch), "architectures": [_CLASSIFIERS[arch.family]], **labels}


def labels_of(config: Mapping[str, Any]) -> list[str] | None:
    """List the labels of a sequence classifier's config.json; None where it names neither labels nor their number.

    Args:
        config: the parsed file.

    Returns:
        One name a label, in the order of the scores.

    >>> labels_of({"id2label": {"1": "good", "0": "bad"}}), labels_of({"num_labels": 1})
    (['bad', 'good'], ['LABEL_0'])
    """
    names, number = config.get("id2label"), config.get("num_labels")
    if names is not None:
        return [str(names[key]) for key in sorted(names, key=int)]
    return None if number is None else [f"LABEL_{i}" for i in range(int(number))]


def _check_options(fields: Mapping[str, Any]) -> None:
    for name, only in ONLY.items():
        if name in fields and fields[name] is not None and fields[name] != only:
            raise UserError(f"{name} = {fields[name]!r} is not supported; supported: {only!r}")
    layer_types = fields.get("layer_types")
    strange = [] if layer_types is None else sorted(set(layer_types) - {"full_attention"})
    if strange:
        raise UserError(f"layer_types holds {strange}; supported: full_attention")


def _integer(fields: Mapping[str, Any], name: str) -> int:
    if name not in fields:
        raise UserError(f"the configuration has no field {name!r}, which model_type {fields['model_type']!r} needs")
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} = {value!r} must be a positive integer")
    return value


def _above_zero(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{name} = {value!r} must be a number above 0")
    return float(value)


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
    if not isinstance(fields[name], bool):
        raise UserError(f"{name} = {fields[name]!r} must be true or false")
    return fields[name]


def _activation(fields: Mapping[str, Any], name: str) -> str:
    if not isinstance(fields[name], str) or fields[name] not in ACTIVATIONS:
        raise UserError(f"{name} {fields[name]!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[fields[name]]


def _head_dim(width: int, heads: int) -> int:
    if width % heads != 0:
        raise UserError(f"a width of {width} does not divide into {heads} heads")
    return width // heads


def _rotary(family: str, fields: Mapping[str, Any]) -> Architecture:
    width, heads = _integer(fields, "hidden_size"), _integer(fields, "num_attention_heads")
    kv_heads = heads if fields["num_key_value_heads"] is None else _integer(fields, "num_key_value_heads")
    if heads % kv_heads != 0:
        raise UserError(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
    head_dim = _head_dim(width, heads) if fields["head_dim"] is None else _integer(fields, "head_dim")
    if head_dim % 2:
        raise UserError(f"head_dim = {head_dim} is odd, but rotary positions rotate pairs")
    attention_bias = family != "qwen2" and _boolean(fields, "attention_bias")
    return Architecture(
        family=family,
        vocab_size=_integer(fields, "vocab_size"),
        width=width,
        depth=_integer(fields, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=_integer(fields, "intermediate_size"),
        max_positions=_integer(fields, "max_position_embeddings"),
        activation=_activation(fields, "hidden_act"),
        norm="rms",
        norm_eps=_above_zero("rms_norm_eps", fields["rms_norm_eps"]),
        rope=_rope(fields),
        gated_mlp=True,
        qkv_bias=attention_bias or family == "qwen2",
        out_bias=attention_bias,
        mlp_bias=family == "llama" and _boolean(fields, "mlp_bias"),
        qk_norm=family == "qwen3",
        tied=_boolean(fields, "tie_word_embeddings"),
    )


def _gpt2(fields: Mapping[str, Any]) -> Architecture:
    width, heads = _integer(fields, "n_embd"), _integer(fields, "n_head")
    return Architecture(
        family="gpt2",
        vocab_size=_integer(fields, "vocab_size"),
        width=width,
        depth=_integer(fields, "n_layer"),
        heads=heads,
        kv_heads=heads,
        head_dim=_head_dim(width, heads),
        mlp_width=4 * width if fields["n_inner"] is None else _integer(fields, "n_inner"),
        max_positions=_integer(fields, "n_positions"),
        activation=_activation(fields, "activation_function"),
        norm="layer",
        norm_eps=_above_zero("layer_norm_epsilon", fields["layer_norm_epsilon"]),
        rope=None,
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qk_norm=False,
        tied=_boolean(fields, "tie_word_embeddings"),
    )


def _rope(fields: Mapping[str, Any]) -> Rope:
    """Read either form: `rope_parameters`, which includes theta, or `rope_scaling` with a separate `rope_theta`."""
    given = {name: fields[name] for name in ("rope_parameters", "rope_scaling") if fields.get(name)}
    for name, value in given.items():
        if not isinstance(value, Mapping):
            raise UserError(f"{name} = {value!r} must be an object of its fields")
    read = [_rope_of(value, fields["rope_theta"]) for value in given.values()] or [_rope_of({}, fields["rope_theta"])]
    if any(rope != read[0] for rope in read):  # transformers 4 and 5 use different ones
        raise UserError(f"rope_parameters and rope_scaling differ ({given}): keep the right one")
    return read[0]


def _rope_of(given: Mapping[str, Any], theta: Any) -> Rope:
    kind = given.get("rope_type", given.get("type", "default"))
    theta = _above_zero("rope_theta", given.get("rope_theta", theta))
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("a partial_rotary_factor other than 1.0 is not supported")
    if kind == "default":
        return Rope(theta=theta)
    if kind != "llama3":
        raise UserError(f"rope type {kind!r} is not supported; supported: default, llama3")
    missing = [name for name in _LLAMA3_FIELDS if name not in given]
    if missing:
        raise UserError(f"rope type 'llama3' needs {', '.join(missing)}")
    factor, low, high = (_above_zero(name, given[name]) for name in _LLAMA3_FIELDS[:3])
    if not low < high:
        raise UserError(f"low_freq_factor = {low} must be below high_freq_factor = {high}")
    original = _integer({**given, "model_type": "llama3"}, _LLAMA3_FIELDS[3])
    return Rope(theta, factor, low, high, original)


def _rotary_config(arch: Architecture) -> dict[str, Any]:
    if arch.rope is None:
        raise UserError(f"family {arch.family!r} in Hugging Face layout cannot express rope=None")
    biases = {"attention_bias": arch.qkv_bias} if arch.family != "qwen2" else {"use_sliding_window": False}
    if arch.family == "llama":
        biases["mlp_bias"] = arch.mlp_bias
    return {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.width,
        "intermediate_size": arch.mlp_width,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "hidden_act": _ACTIVATION_NAMES[arch.activation],
        "max_position_embeddings": arch.max_positions,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tied,
        "attention_dropout": 0.0,
        **biases,
        **_rope_config(arch.rope),
    }


def _rope_config(rope: Rope) -> dict[str, Any]:
    if rope.factor is None:
        scaling: dict[str, Any] = {"rope_type": "default"}
    else:
        numbers = (rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_max_positions)
        scaling = {"rope_type": "llama3", **dict(zip(_LLAMA3_FIELDS, numbers, strict=True))}
    config = {"rope_theta": rope.theta, "rope_parameters": {"rope_theta": rope.theta, **scaling}}
    return config if rope.factor is None else {**config, "rope_scaling": scaling}


def _gpt2_config(arch: Architecture) -> dict[str, Any]:
    return {
        "vocab_size": arch.vocab_size,
        "n_positions": arch.max_positions,
        "n_embd": arch.width,
        "n_layer": arch.depth,
        "n_head": arch.heads,
        "n_inner": arch.mlp_width,
        "activation_function": _ACTIVATION_NAMES[arch.activation],
        "layer_norm_epsilon": arch.norm_eps,
        "tie_word_embeddings": arch.tied,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
