"""Weights, architecture and tokenizer from a GGUF file, read by the package `gguf`, not torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture
from pgjax.models.io.gguf_config import FAMILIES, gguf_architecture
from pgjax.models.io.gguf_tokenizer import gguf_tokenizer
from pgjax.models.io.tensors import Box, Tensors

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
_GEMMA = {  # where norms stand behind attention and MLP too
    **_TENSORS,
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_ROPE = "rope_freqs.weight"


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
    divisors = gguf.dequantize(blobs[_ROPE].data, blobs[_ROPE].tensor_type).ravel() if _ROPE in blobs else None
    arch = gguf_architecture(fields, shapes, divisors, origin=str(file))
    family = FAMILIES[fields["general.architecture"]]
    source = {_hf_name(name, _GEMMA if arch.post_norms else _TENSORS): name for name in blobs if name != _ROPE}
    heads = {".attn_q.": arch.heads, ".attn_k.": arch.kv_heads} if family.interleaved else {}

    def read(name: str, box: Box) -> np.ndarray:
        blob = blobs[source[name]]
        permuted = [count for part, count in heads.items() if part in blob.name]
        try:
            value = _read_box(blob, shapes[blob.name], box, permuted[0] if permuted else None)
            return value - np.float32(family.added) if name.endswith("norm.weight") and family.added else value
        except NotImplementedError as error:
            raise UserError(
                f"{file}: {blob.name} is stored as {blob.tensor_type.name}, which is not supported"
            ) from error

    tensors = Tensors(str(file), {name: shapes[old] for name, old in source.items()}, read)
    return arch, tensors, gguf_tokenizer(fields, max_length=arch.max_positions, origin=str(file))


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


def _hf_name(name: str, of_layer: dict[str, str]) -> str:
    """Translate a tensor's name; an unknown one is kept, and `read_params` reports it as unexpected."""
    if name in _OUTER:
        return _OUTER[name]
    block, _, rest = name.partition(".")
    layer, _, tensor = rest.partition(".")
    if block == "blk" and tensor in of_layer:
        return f"model.layers.{layer}.{of_layer[tensor]}"
    return name
