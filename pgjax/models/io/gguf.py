"""Weights and architecture from a GGUF file of Llama (with it Mistral), Qwen2 or Qwen3, with the package `gguf`, not torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture, Rope
from pgjax.models.io.tensors import Box, Tensors
from pgjax.models.io.tokenizer import gguf_tokenizer

_TENSORS = {  # the name in the file: the name in Hugging Face layout
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_output.bias": "self_attn.o_proj.bias",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_gate.bias": "mlp.gate_proj.bias",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_up.bias": "mlp.up_proj.bias",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_down.bias": "mlp.down_proj.bias",
}
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
FAMILIES = ("llama", "qwen2", "qwen3")  # general.architecture, which the metadata's names begin with
_REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_OPTIONAL: dict[str, Any] = {  # with llama.cpp's defaults; None: derived from the others
    "attention.head_count_kv": None,
    "attention.key_length": None,
    "attention.value_length": None,
    "rope.dimension_count": None,
    "rope.freq_base": 10000.0,
    "vocab_size": None,
}
_ONLY: dict[str, Any] = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0}


def read_gguf(file: Path) -> tuple[Architecture, Tensors, Any | None]:
    """Open a GGUF file.

    Args:
        file: the path. Quantised tensors are dequantised to float32 when they are read.

    Returns:
        The architecture, the tensors under their Hugging Face names (Llama's query and key rows, which the format permutes,
        put back in Hugging Face's order), and the tokenizer, None where the file holds none.

    Raises:
        UserError: for an architecture, an option or a tokenizer that is not implemented, or a damaged file.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{file} is not a whole GGUF file: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    blobs = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(n) for n in reversed(blob.shape)) for name, blob in blobs.items()}
    arch = gguf_architecture(fields, shapes, origin=str(file))
    source = {_hf_name(name): name for name in blobs}
    heads = {".attn_q.": arch.heads, ".attn_k.": arch.kv_heads} if arch.family == "llama" else {}

    def read(name: str, box: Box) -> np.ndarray:
        blob = blobs[source[name]]
        permuted = [count for part, count in heads.items() if part in blob.name]
        try:
            return _read_box(blob, shapes[blob.name], box, permuted[0] if permuted else None)
        except NotImplementedError as error:
            raise UserError(
                f"{file}: {blob.name} is stored as {blob.tensor_type.name}, which is not supported"
            ) from error

    tensors = Tensors(str(file), {name: shapes[old] for name, old in source.items()}, read)
    return arch, tensors, gguf_tokenizer(fields, max_length=arch.max_positions)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection from GGUF's interleaved pairs to Hugging Face's two halves.

    GGUF's row `2 i + j` of a head is Hugging Face's row `j * head_dim / 2 + i`.

    >>> unpermute(np.arange(4), heads=1).tolist()
    [0, 2, 1, 3]
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _read_box(blob: Any, shape: tuple[int, ...], box: Box, heads: int | None) -> np.ndarray:
    """Dequantise a rectangle of a tensor; `heads` is given where its rows are permuted."""
    import gguf

    size, stored = gguf.GGML_QUANT_SIZES[blob.tensor_type]  # of a block: numbers, bytes
    items = stored if blob.data.dtype == np.uint8 else 1  # entries of the file's array for one block
    (first, last), start = box[-1], box[-1][0] // size
    columns = slice(start * items, -(-last // size) * items)
    if len(shape) == 1:  # one row; a bias of queries or keys is permuted along it
        whole = gguf.dequantize(blob.data, blob.tensor_type).reshape(shape)
        return (whole if heads is None else unpermute(whole, heads))[first:last].copy()
    order = slice(*box[0]) if heads is None else unpermute(np.arange(shape[0]), heads)[slice(*box[0])]
    rows = np.ascontiguousarray(blob.data[order, columns])
    value = gguf.dequantize(rows, blob.tensor_type).reshape(rows.shape[0], -1)
    return value[:, first - start * size : last - start * size]


def gguf_architecture(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, origin: str) -> Architecture:
    """Read the architecture from a GGUF file's metadata and the shapes of its tensors.

    Args:
        fields: the metadata, one value a key.
        shapes: of the tensors, rows first.
        origin: the file's name, for messages.

    Raises:
        UserError: when the architecture is not one of `FAMILIES`, or a key is missing or has a value that is not implemented.
    """
    family = fields.get("general.architecture")
    if family not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise UserError(f"{origin}: general.architecture {family!r} is not supported in GGUF; supported: {supported}")
    _check_fields(fields, shapes, family, origin)
    known = {f"{family}.{name}": value for name, value in _OPTIONAL.items()} | dict(fields)
    get = lambda name: known[f"{family}.{name}"]
    width, heads = get("embedding_length"), get("attention.head_count")
    if not isinstance(heads, int):
        raise UserError(f"{origin}: {family}.attention.head_count = {heads!r} must be one number for all layers")
    kv_heads, rows, head_dim = get("attention.head_count_kv"), get("vocab_size"), get("attention.key_length")
    head_dim = width // heads if head_dim is None else head_dim
    for name in ("attention.value_length", "rope.dimension_count"):
        if get(name) is not None and get(name) != head_dim:
            raise UserError(
                f"{origin}: {family}.{name} = {get(name)} is not supported; supported: the head size, {head_dim}"
            )
    return Architecture(
        family=family,
        vocab_size=shapes["token_embd.weight"][0] if rows is None else rows,
        width=width,
        depth=get("block_count"),
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        mlp_width=get("feed_forward_length"),
        max_positions=get("context_length"),
        activation="silu",
        norm="rms",
        norm_eps=_decimal(get("attention.layer_norm_rms_epsilon")),
        rope=Rope(theta=_decimal(get("rope.freq_base"))),
        gated_mlp=True,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        out_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        qk_norm=family == "qwen3",
        tied="output.weight" not in shapes,
    )


def _check_fields(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], family: str, origin: str) -> None:
    missing = [f"{family}.{name}" for name in _REQUIRED if f"{family}.{name}" not in fields]
    if missing:
        raise UserError(f"{origin} lacks the metadata {', '.join(missing)}")
    for name, only in _ONLY.items():
        value = fields.get(f"{family}.{name}", only)
        if value != only:
            raise UserError(f"{origin}: {family}.{name} = {value!r} is not supported; supported: {only!r}")
    known = {f"{family}.{name}" for name in (*_REQUIRED, *_OPTIONAL, *_ONLY)}
    strange = sorted(name for name in fields if name.startswith(f"{family}.") and name not in known)
    if strange:
        raise UserError(
            f"{origin}: the metadata {', '.join(strange)} is not supported; supported: {', '.join(sorted(known))}"
        )
    if "rope_freqs.weight" in shapes:
        raise UserError(
            f"{origin}: rope_freqs.weight (Llama 3's rope scaling) is not supported in GGUF: "
            "load the model's Hugging Face folder"
        )
    if "token_embd.weight" not in shapes:
        raise UserError(f"{origin} lacks the tensor token_embd.weight")


def _hf_name(name: str) -> str:
    """Translate a tensor's name; an unknown one is kept, and `read_params` reports it as unexpected."""
    if name in _OUTER:
        return _OUTER[name]
    block, _, rest = name.partition(".")
    layer, _, tensor = rest.partition(".")
    if block == "blk" and tensor in _TENSORS:
        return f"model.layers.{layer}.{_TENSORS[tensor]}"
    return name


def _decimal(x: float) -> float:
    """Undo the file's rounding to float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(x)))
