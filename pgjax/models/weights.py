"""Parameters to and from the named tensors of a checkpoint: which is which, checks before reading, stacking."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.models.architecture import Architecture

LeafPath = tuple[str, ...]  # of a leaf in the parameter tree

_ROTARY_NAMES: dict[LeafPath, str] = {
    ("embed", "tokens"): "model.embed_tokens.weight",
    ("layers", "attn_norm", "scale"): "model.layers.{}.input_layernorm.weight",
    ("layers", "q", "kernel"): "model.layers.{}.self_attn.q_proj.weight",
    ("layers", "q", "bias"): "model.layers.{}.self_attn.q_proj.bias",
    ("layers", "k", "kernel"): "model.layers.{}.self_attn.k_proj.weight",
    ("layers", "k", "bias"): "model.layers.{}.self_attn.k_proj.bias",
    ("layers", "v", "kernel"): "model.layers.{}.self_attn.v_proj.weight",
    ("layers", "v", "bias"): "model.layers.{}.self_attn.v_proj.bias",
    ("layers", "o", "kernel"): "model.layers.{}.self_attn.o_proj.weight",
    ("layers", "o", "bias"): "model.layers.{}.self_attn.o_proj.bias",
    ("layers", "q_norm", "scale"): "model.layers.{}.self_attn.q_norm.weight",
    ("layers", "k_norm", "scale"): "model.layers.{}.self_attn.k_norm.weight",
    ("layers", "mlp_norm", "scale"): "model.layers.{}.post_attention_layernorm.weight",
    ("layers", "gate", "kernel"): "model.layers.{}.mlp.gate_proj.weight",
    ("layers", "gate", "bias"): "model.layers.{}.mlp.gate_proj.bias",
    ("layers", "up", "kernel"): "model.layers.{}.mlp.up_proj.weight",
    ("layers", "up", "bias"): "model.layers.{}.mlp.up_proj.bias",
    ("layers", "down", "kernel"): "model.layers.{}.mlp.down_proj.weight",
    ("layers", "down", "bias"): "model.layers.{}.mlp.down_proj.bias",
    ("norm", "scale"): "model.norm.weight",
    ("head", "kernel"): "lm_head.weight",
    ("score", "kernel"): "score.weight",
}
_GPT2_NAMES: dict[LeafPath, str] = {
    ("embed", "tokens"): "transformer.wte.weight",
    ("embed", "positions"): "transformer.wpe.weight",
    ("layers", "attn_norm", "scale"): "transformer.h.{}.ln_1.weight",
    ("layers", "attn_norm", "bias"): "transformer.h.{}.ln_1.bias",
    ("layers", "q", "kernel"): "transformer.h.{}.attn.c_attn.weight",
    ("layers", "q", "bias"): "transformer.h.{}.attn.c_attn.bias",
    ("layers", "k", "kernel"): "transformer.h.{}.attn.c_attn.weight",
    ("layers", "k", "bias"): "transformer.h.{}.attn.c_attn.bias",
    ("layers", "v", "kernel"): "transformer.h.{}.attn.c_attn.weight",
    ("layers", "v", "bias"): "transformer.h.{}.attn.c_attn.bias",
    ("layers", "o", "kernel"): "transformer.h.{}.attn.c_proj.weight",
    ("layers", "o", "bias"): "transformer.h.{}.attn.c_proj.bias",
    ("layers", "mlp_norm", "scale"): "transformer.h.{}.ln_2.weight",
    ("layers", "mlp_norm", "bias"): "transformer.h.{}.ln_2.bias",
    ("layers", "up", "kernel"): "transformer.h.{}.mlp.c_fc.weight",
    ("layers", "up", "bias"): "transformer.h.{}.mlp.c_fc.bias",
    ("layers", "down", "kernel"): "transformer.h.{}.mlp.c_proj.weight",
    ("layers", "down", "bias"): "transformer.h.{}.mlp.c_proj.bias",
    ("norm", "scale"): "transformer.ln_f.weight",
    ("norm", "bias"): "transformer.ln_f.bias",
    ("head", "kernel"): "lm_head.weight",
    ("score", "kernel"): "score.weight",
}
_HEADS = ("lm_head", "score")  # outside of the base model, whatever its prefix
_PARTS = {"q": 0, "k": 1, "v": 2}  # GPT-2 keeps the three side by side in one tensor [in, 3 * out]
_HARMLESS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # buffers, not parameters


class Slot(NamedTuple):
    """Where one leaf of the parameter tree lives in a checkpoint."""

    name: str  # of the tensor, with {} for the number of the layer where the leaf is stacked
    stacked: bool  # the leaf's first axis is the layer
    transposed: bool  # [out, in] on disk
    part: int | None  # which third of the tensor's last axis, where three leaves share one
    row: bool = False  # a vector [D] that the file keeps as a matrix of one row, [1, D]


class Tensors(NamedTuple):
    """The named tensors of a checkpoint, read one at a time."""

    origin: str  # for messages
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def slot_of(arch: Architecture, path: LeafPath) -> Slot:
    """Say which tensor of a Hugging Face checkpoint holds the leaf at `path`.

    >>> from pgjax.models.families import architecture_of
    >>> arch = architecture_of({"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4})
    >>> slot_of(arch, ("layers", "k", "bias"))
    Slot(name='transformer.h.{}.attn.c_attn.bias', stacked=True, transposed=False, part=1, row=False)
    """
    path = path[1:] if path[0] == "lm" else path  # the language model inside a reward model
    gpt2 = arch.family == "gpt2"
    names = _GPT2_NAMES if gpt2 else _ROTARY_NAMES
    if path not in names:
        raise ValueError(f"family {arch.family!r} has no tensor for the parameter {'/'.join(path)}")
    stacked = path[0] == "layers"
    part = _PARTS[path[1]] if gpt2 and stacked and path[1] in _PARTS else None
    transposed = stacked and path[-1] == "kernel" and not gpt2
    return Slot(names[path], stacked, transposed=transposed, part=part, row=path[0] == "score")


def read_params(
    arch: Architecture, shapes: Any, tensors: Tensors, place: Callable[[LeafPath, np.ndarray], jax.Array]
) -> dict[str, Any]:
    """Read a checkpoint into a parameter tree, leaf by leaf, so that the host never holds a second copy of the model.

    Args:
        arch: the architecture that the checkpoint is of.
        shapes: the tree of `jax.ShapeDtypeStruct` to fill, as `jax.eval_shape(lm.init, key)` gives it; tensors are
            cast to its dtypes.
        tensors: the checkpoint. Names may lack the prefix of the base model ("model." or "transformer.").
        place: puts a finished leaf on the devices, given its path and value.

    Returns:
        The parameter tree.

    Raises:
        ValueError: before anything is read, when a tensor is missing, unexpected or of another shape; it names them.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    paths = [tuple(key.key for key in path) for path, _ in leaves]
    slots = [_as_in_file(slot_of(arch, path), tensors) for path in paths]
    _check_tensors(arch, slots, [leaf.shape for _, leaf in leaves], tensors)
    values = [
        place(path, _read_leaf(slot, leaf, tensors)) for path, slot, (_, leaf) in zip(paths, slots, leaves, strict=True)
    ]
    return jax.tree_util.tree_unflatten(treedef, values)


def named_tensors(arch: Architecture, params: Any) -> dict[str, np.ndarray]:
    """Turn a parameter tree into the tensors of a Hugging Face checkpoint, in the dtypes of the parameters.

    Args:
        arch: the architecture that the parameters are of.
        params: the tree; its leaves may be spread over devices and processes.

    Returns:
        Contiguous arrays on the host by name.
    """
    out: dict[str, np.ndarray] = {}
    thirds: dict[str, dict[int, np.ndarray]] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        slot = slot_of(arch, tuple(key.key for key in keys))
        value = _on_host(leaf)
        for layer, tensor in enumerate(value) if slot.stacked else [(0, value)]:
            name = slot.name.format(layer)
            if slot.part is not None:
                thirds.setdefault(name, {})[slot.part] = tensor
            else:
                tensor = tensor[None] if slot.row else tensor
                out[name] = np.ascontiguousarray(tensor.T if slot.transposed else tensor)
    for name, parts in thirds.items():
        out[name] = np.concatenate([parts[0], parts[1], parts[2]], axis=-1)
    return out


def safetensors_of(folder: Path) -> Tensors:
    """Open the weights of a folder in Hugging Face layout: model.safetensors, or the shards of its index.

    Raises:
        ValueError: when there is no such file, or a shard is missing, unreadable or lacks a tensor of the index.
    """
    index = folder / "model.safetensors.index.json"
    owner: dict[str, str]  # of every tensor, the file
    if (folder / "model.safetensors").is_file():
        owner = dict.fromkeys(_open(folder / "model.safetensors").keys(), "model.safetensors")
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} holds no weight_map")
        owner = weight_map
    elif list(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{folder} holds its weights as pytorch_model.bin only, which can run code: convert them to safetensors"
        )
    else:
        raise ValueError(f"{folder} holds no weights: neither model.safetensors nor model.safetensors.index.json")
    absent = sorted({shard for shard in owner.values() if not (folder / shard).is_file()})
    if absent:
        raise ValueError(f"{folder}: the index names shards that are not there: {_listed(absent)}")
    files = {shard: _open(folder / shard) for shard in sorted(set(owner.values()))}
    held = {shard: set(file.keys()) for shard, file in files.items()}
    lost = sorted(name for name, shard in owner.items() if name not in held[shard])
    if lost:
        raise ValueError(f"{folder}: the index promises tensors that their shards lack: {_listed(lost)}")
    shapes = {name: tuple(files[shard].get_slice(name).get_shape()) for name, shard in owner.items()}
    return Tensors(str(folder), shapes, lambda name: files[owner[name]].get_tensor(name))


def read_json(file: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object; a `ValueError` names a file that is missing or holds something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.parent} is not a model folder: it holds no {file.name}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


def _as_in_file(slot: Slot, tensors: Tensors) -> Slot:
    """Drop the base model's prefix where the checkpoint was saved from the base model alone."""
    prefix, _, rest = slot.name.partition(".")
    if prefix in _HEADS or any(name.startswith(f"{prefix}.") for name in tensors.shapes):
        return slot
    return slot._replace(name=rest)


def _shape_in_file(slot: Slot, shape: tuple[int, ...]) -> tuple[int, ...]:
    one = shape[1:] if slot.stacked else shape
    if slot.row:
        return (1, *one)
    if slot.transposed:
        return one[::-1]
    return one if slot.part is None else (*one[:-1], 3 * one[-1])


def _check_tensors(arch: Architecture, slots: list[Slot], shapes: list[tuple[int, ...]], tensors: Tensors) -> None:
    wanted = {
        slot.name.format(layer): _shape_in_file(slot, shape)
        for slot, shape in zip(slots, shapes, strict=True)
        for layer in range(arch.depth if slot.stacked else 1)
    }
    missing = sorted(wanted.keys() - tensors.shapes.keys())
    unused_head = arch.tied or "score.weight" in wanted  # a classifier computes no logits
    harmless = {
        name for name in tensors.shapes if name.endswith(_HARMLESS) or (unused_head and name == "lm_head.weight")
    }
    extra = sorted(tensors.shapes.keys() - wanted.keys() - harmless)
    wrong = [
        f"{name} has {list(tensors.shapes[name])}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors.shapes and tuple(tensors.shapes[name]) != shape
    ]
    problems = [
        f"{what}: {_listed(names)}"
        for what, names in (("missing tensors", missing), ("unexpected tensors", extra), ("wrong shapes", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"{tensors.origin} does not hold a {arch.family} model as configured; {'; '.join(problems)}")


def _read_leaf(slot: Slot, leaf: jax.ShapeDtypeStruct, tensors: Tensors) -> np.ndarray:
    out = np.empty(leaf.shape, leaf.dtype)
    for layer in range(leaf.shape[0] if slot.stacked else 1):
        name = slot.name.format(layer)
        tensor = tensors.read(name)
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"{tensors.origin}: {name} is of type {tensor.dtype}; supported: floating point")
        if slot.part is not None:
            tensor = np.split(tensor, 3, axis=-1)[slot.part]
        target = out[layer] if slot.stacked else out
        tensor = tensor[0] if slot.row else tensor
        target[...] = tensor.T if slot.transposed else tensor
    return out


def _on_host(leaf: jax.Array) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + ("" if len(names) <= most else f" and {len(names) - most} more")
