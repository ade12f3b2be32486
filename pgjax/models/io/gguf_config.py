"""The architecture in a GGUF file's metadata: llama.cpp's keys, read as the fields of the family's configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture, Rope
from pgjax.models.io.config import architecture_of
from pgjax.models.io.families.fields import FULL, SLIDING
from pgjax.models.rope import rope_frequencies

Keys = Mapping[str, Any]

_REQUIRED = {  # the key behind the family's name: the field of config.json
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_OF_HEAD = ("attention.value_length", "rope.dimension_count")  # the head size again, where they are there
_ONLY: dict[str, Any] = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0}
# Llama 3.1's rope, 3.2's and 3.3's: a file holds what its pairs are divided by, not these numbers.
_LLAMA3 = tuple(Rope(500000.0, factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))


NEEDED = object()  # in place of a default


class GgufFamily(NamedTuple):
    """A value of general.architecture."""

    model_type: str  # of config.json
    defaults: dict[str, Any]  # of keys that it has beside the common ones, as in llama.cpp
    only: dict[str, Any]  # keys -> the only value that is implemented
    fields: Any  # (keys, over the defaults) -> fields of config.json beside those of the tables above
    interleaved: bool = False  # rows of queries and keys are in pairs of neighbours
    added: float = 0.0  # to the scale of every norm, in the file


def _gemma2(keys: Keys) -> dict[str, Any]:
    # llama.cpp tells the model with 27e9 parameters, whose scores have a scale of their own, by its depth.
    whole = keys["block_count"] == 46
    return {
        "query_pre_attn_scalar": _head_size(keys, whole),
        "attn_logit_softcapping": _decimal(keys["attn_logit_softcapping"]),
        "final_logit_softcapping": _decimal(keys["final_logit_softcapping"]),
        "sliding_window": keys["attention.sliding_window"],
    }


def _gemma3(keys: Keys) -> dict[str, Any]:
    kind, cap = keys["rope.scaling.type"], keys["final_logit_softcapping"]
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": _decimal(keys["rope.freq_base"])}
    if kind == "linear":
        full |= {"rope_type": "linear", "factor": _decimal(keys["rope.scaling.factor"])}
    elif kind != "none":
        raise UserError(f"gemma3.rope.scaling.type = {kind!r} is not supported; supported: 'none', 'linear'")
    local = {"rope_type": "default", "rope_theta": _decimal(keys["rope.freq_base_swa"])}
    return {
        "query_pre_attn_scalar": _head_size(keys, keys["block_count"] == 62),
        "final_logit_softcapping": _decimal(cap) if cap else None,
        "sliding_window": keys["attention.sliding_window"],
        "sliding_window_pattern": keys["attention.sliding_window_pattern"],
        "rope_parameters": {FULL: full, SLIDING: local},
    }


def _head_size(keys: Keys, by_width: bool) -> int:
    size = keys.get("attention.key_length")
    return int(keys["embedding_length"] // keys["attention.head_count"] if by_width or size is None else size)


_GEMMA2 = {"attention.sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA3 = {
    "attention.sliding_window": NEEDED,
    "attention.sliding_window_pattern": 6,
    "final_logit_softcapping": None,
    "rope.freq_base": 1000000.0,
    "rope.freq_base_swa": 10000.0,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
}
FAMILIES: Mapping[str, GgufFamily] = {
    "llama": GgufFamily("llama", {}, _ONLY, lambda keys: {}, interleaved=True),  # Mistral is one of them
    "qwen2": GgufFamily("qwen2", {}, _ONLY, lambda keys: {}),
    "qwen3": GgufFamily("qwen3", {}, _ONLY, lambda keys: {}),
    "gemma": GgufFamily("gemma", {}, _ONLY, lambda keys: {}, added=1.0),
    "gemma2": GgufFamily("gemma2", _GEMMA2, _ONLY, _gemma2, added=1.0),
    "gemma3": GgufFamily("gemma3_text", _GEMMA3, {"expert_count": 0}, _gemma3, added=1.0),
}


def gguf_architecture(
    fields: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_divisors: np.ndarray | None = None,
    *,
    origin: str,
) -> Architecture:
    """Read the architecture from a GGUF file's metadata and the shapes of its tensors.

    Args:
        fields: the metadata, one value a key.
        shapes: of the tensors, rows first.
        rope_divisors: the tensor rope_freqs.weight, which each pair's angle is divided by (Llama 3.1 and later); None: there is
            none.
        origin: the file's name, for messages.

    Raises:
        UserError: when the architecture is not one of `FAMILIES`, or a key is missing or has a value that is not implemented.
    """
    name = str(fields.get("general.architecture"))
    if name not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise UserError(f"{origin}: general.architecture {name!r} is not supported in GGUF; supported: {supported}")
    family = FAMILIES[name]
    given = {key.removeprefix(f"{name}."): value for key, value in fields.items() if key.startswith(f"{name}.")}
    if "token_embd.weight" not in shapes:
        raise UserError(f"{origin} lacks the tensor token_embd.weight")
    try:
        keys = _checked(given, name, family)
        config = {field: keys[key] for key, field in {**_REQUIRED, **_OPTIONAL}.items() if key in keys}
        config = {field: _decimal(x) if isinstance(x, float) else x for field, x in config.items()}
        derived = {"head_dim": _head_size(keys, by_width=False), "num_key_value_heads": keys["attention.head_count"]}
        config = {"vocab_size": shapes["token_embd.weight"][0], **derived, **config}
        arch = architecture_of({**config, "model_type": family.model_type, **family.fields(keys)})
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    for key in _OF_HEAD:
        if given.get(key, arch.head_dim) != arch.head_dim:
            told = f"{name}.{key} = {given[key]}"
            raise UserError(f"{origin}: {told} is not supported; supported: the head size, {arch.head_dim}")
    return dataclasses.replace(
        arch,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        out_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        tied="output.weight" not in shapes,
        rope=arch.rope if rope_divisors is None else _divided(arch, rope_divisors, origin),
    )


def _checked(given: Keys, name: str, family: GgufFamily) -> dict[str, Any]:
    """Check the keys of a family, without its name in front; return them over the defaults."""
    missing = [f"{name}.{key}" for key in _REQUIRED if key not in given]
    missing += [f"{name}.{key}" for key, value in family.defaults.items() if value is NEEDED and key not in given]
    if missing:
        raise UserError(f"it lacks the metadata {', '.join(missing)}")
    for key, only in family.only.items():
        if given.get(key, only) != only:
            raise UserError(f"{name}.{key} = {given[key]!r} is not supported; supported: {only!r}")
    known = {*_REQUIRED, *_OPTIONAL, *_OF_HEAD, *family.only, *family.defaults}
    strange = sorted(f"{name}.{key}" for key in given.keys() - known)
    if strange:
        listed = ", ".join(sorted(f"{name}.{key}" for key in known))
        raise UserError(f"the metadata {', '.join(strange)} is not supported; supported: {listed}")
    for key in (*_REQUIRED, *_OPTIONAL):
        if not isinstance(given.get(key, 0), int | float):
            raise UserError(f"{name}.{key} = {given[key]!r} must be one number for all layers")
    return {**family.defaults, **given}


def _divided(arch: Architecture, divisors: np.ndarray, origin: str) -> Rope:
    """Find the rope whose angles are plain ones over `divisors`: Llama 3.1's by name, or with one factor a pair."""
    rope = arch.rope
    assert rope is not None
    if divisors.shape != (arch.head_dim // 2,):
        raise UserError(
            f"{origin}: rope_freqs.weight has {divisors.size} numbers, but a head has {arch.head_dim // 2} pairs"
        )
    for named in _LLAMA3:
        scaled = dataclasses.replace(named, theta=rope.theta)
        found = np.asarray(rope_frequencies(rope, arch.head_dim)) / np.asarray(rope_frequencies(scaled, arch.head_dim))
        if np.allclose(found, divisors, rtol=1e-5):
            return scaled
    factors = tuple(_decimal(x) for x in divisors)
    return Rope(rope.theta, scaling="longrope", short_factors=factors, long_factors=factors,
                original_max_positions=arch.max_positions)  # fmt: skip


def _decimal(x: float) -> float:
    """Undo the file's rounding to float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(x)))
