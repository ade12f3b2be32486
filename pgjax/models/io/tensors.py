"""Read parameters from the named tensors of a checkpoint: checked before reading, each device's slice by itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture

LeafPath = tuple[str, ...]  # keys of a leaf in the parameter tree
Span = tuple[int, int]  # of an axis: first index, and one past the last
Box = tuple[Span, ...]  # a rectangle of an array, one span an axis

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
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
_PARTS = {"q": 0, "k": 1, "v": 2}  # GPT-2 keeps the three side by side in one tensor [in, 3 * out]
_HARMLESS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # buffers, not parameters


class Slot(NamedTuple):
    """Where a leaf of the parameter tree is in a checkpoint."""

    name: str  # of the tensor, with {} for the number of the layer where the leaf is stacked
    stacked: bool  # the leaf's first axis is the layer
    transposed: bool  # [out, in] on disk
    part: int | None  # which third of the tensor's last axis, where three leaves share one
    row: bool = False  # a vector [D] that is a matrix [1, D] in the file


class Tensors(NamedTuple):
    """The named tensors of a checkpoint; any rectangle of one can be read without the rest."""

    origin: str  # for messages
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str, Box], np.ndarray]


def slot_of(arch: Architecture, path: LeafPath) -> Slot:
    """Find the tensor of a Hugging Face checkpoint that holds the leaf at `path`.

    >>> from pgjax.models.io.config import architecture_of
    >>> arch = architecture_of({"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4})
    >>> slot_of(arch, ("layers", "k", "bias"))
    Slot(name='transformer.h.{}.attn.c_attn.bias', stacked=True, transposed=False, part=1, row=False)
    """
    path = path[1:] if path[0] == "lm" else path  # the language model inside a reward model
    gpt2 = arch.family == "gpt2"
    names = _GPT2_NAMES if gpt2 else _ROTARY_NAMES
    if path not in names:
        raise UserError(f"family {arch.family!r} has no tensor for the parameter {'/'.join(path)}")
    stacked = path[0] == "layers"
    part = _PARTS[path[1]] if gpt2 and stacked and path[1] in _PARTS else None
    transposed = stacked and path[-1] == "kernel" and not gpt2
    return Slot(names[path], stacked, transposed=transposed, part=part, row=path[0] == "score")


def read_params(arch: Architecture, shapes: Any, tensors: Tensors) -> dict[str, Any]:
    """Read a checkpoint into a parameter tree, leaf by leaf and slice by slice.

    Where a leaf has a sharding, this process reads the slices of its own devices, each one once however many devices
    hold it, so that the host never holds a whole leaf. Where it has none, the leaf goes whole to the default device.

    Args:
        arch: the architecture of the checkpoint.
        shapes: the tree of `jax.ShapeDtypeStruct` to fill, as `jax.eval_shape(lm.init, key)` gives it, with the
            shardings that are wanted; tensors are cast to its dtypes.
        tensors: the checkpoint. Names may lack the prefix of the base model ("model." or "transformer.").

    Returns:
        The parameter tree.

    Raises:
        UserError: before anything is read, when a tensor is missing, unexpected, of another shape or not floating point; the
            message names them.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    slots = [_as_in_file(slot_of(arch, tuple(key.key for key in path)), tensors) for path, _ in leaves]
    _check_tensors(arch, slots, [leaf.shape for _, leaf in leaves], tensors)
    values = [_read_leaf(slot, leaf, tensors) for slot, (_, leaf) in zip(slots, leaves, strict=True)]
    return jax.tree_util.tree_unflatten(treedef, values)


def some_rows_digest(tensors: Tensors) -> str:
    """Digest names, shapes, and each tensor's first, middle and last row: enough to distinguish two fine-tunings of one model.

    >>> one, other = (Tensors("", {"w": (3, 2), "b": ()}, lambda name, box, x=x: np.full(2, x)) for x in (0.0, 1.0))
    >>> some_rows_digest(one) == some_rows_digest(one), some_rows_digest(one) == some_rows_digest(other)
    (True, False)
    """
    digest = hashlib.sha256()
    for name, shape in sorted(tensors.shapes.items()):
        digest.update(f"{name} {tuple(shape)}".encode())
        leading, last = shape[:-1], shape[-1:]
        for at in sorted({tuple(0 for _ in leading), tuple(n // 2 for n in leading), tuple(n - 1 for n in leading)}):
            row = tensors.read(name, tuple((i, i + 1) for i in at) + tuple((0, n) for n in last))
            digest.update(np.asarray(row, np.float32).tobytes())
    return digest.hexdigest()[:16]


def safetensors_of(folder: Path) -> Tensors:
    """Open the weights of a folder in Hugging Face layout: model.safetensors, or the shards of its index.

    Raises:
        UserError: when there is no such file, or a shard is missing, unreadable or lacks a tensor of the index.
    """
    index = folder / "model.safetensors.index.json"
    owner: dict[str, str]  # of every tensor, the file
    if (folder / "model.safetensors").is_file():
        owner = dict.fromkeys(_open(folder / "model.safetensors").keys(), "model.safetensors")
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} holds no weight_map")
        owner = weight_map
    elif list(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{folder} holds its weights as pytorch_model.bin only, which can run code: convert them to safetensors"
        )
    else:
        raise UserError(f"{folder} holds no weights: neither model.safetensors nor model.safetensors.index.json")
    absent = sorted({shard for shard in owner.values() if not (folder / shard).is_file()})
    if absent:
        raise UserError(f"{folder}: the index names shards that do not exist: {_listed(absent)}")
    files = {shard: _open(folder / shard) for shard in sorted(set(owner.values()))}
    held = {shard: set(file.keys()) for shard, file in files.items()}
    lost = sorted(name for name, shard in owner.items() if name not in held[shard])
    if lost:
        raise UserError(f"{folder}: the index names tensors that are not in their shards: {_listed(lost)}")
    shapes = {name: tuple(files[shard].get_slice(name).get_shape()) for name, shard in owner.items()}

    def read(name: str, box: Box) -> np.ndarray:
        return files[owner[name]].get_slice(name)[tuple(slice(*span) for span in box)]

    return Tensors(str(folder), shapes, read)


def read_json(file: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object; a `UserError` names a file that is missing or holds something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent} is not a model folder: it holds no {file.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise UserError(f"{file} is not a complete safetensors file: {error}") from error


def _as_in_file(slot: Slot, tensors: Tensors) -> Slot:
    """Drop the base model's prefix if the checkpoint was saved from the base model alone."""
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
        raise UserError(f"{tensors.origin} does not hold a {arch.family} model as configured; {'; '.join(problems)}")
    _check_types(sorted(wanted), tensors)
    if arch.tied and "score.weight" not in wanted and "lm_head.weight" in tensors.shapes:
        embeddings = next(slot.name for slot in slots if slot.name.endswith(_EMBEDDINGS))
        _check_tied("lm_head.weight", embeddings, tensors)


def _check_tied(head: str, embeddings: str, tensors: Tensors) -> None:
    """Check that a head in the file equals the embeddings that it is tied to: `transformers` would use the head."""
    shape = tensors.shapes[embeddings]

    def equal(first: int) -> bool:
        box = ((first, min(first + 4096, shape[0])), (0, shape[1]))
        return np.array_equal(tensors.read(head, box), tensors.read(embeddings, box))

    same = tensors.shapes[head] == shape and all(equal(first) for first in range(0, shape[0], 4096))
    if not same:
        raise UserError(
            f"{tensors.origin}: tie_word_embeddings is true, but {head} is not {embeddings}: set it to false in config.json, "
            f"or take {head} out of the file"
        )


def _check_types(names: Sequence[str], tensors: Tensors) -> None:
    """Read one number of each tensor, so that an unsupported type is an error before the rest is read."""
    for name in names:
        dtype = tensors.read(name, tuple((0, 1) for _ in tensors.shapes[name])).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(f"{tensors.origin}: {name} is of type {dtype}; supported: floating point")


def _read_leaf(slot: Slot, leaf: jax.ShapeDtypeStruct, tensors: Tensors) -> jax.Array:
    if leaf.sharding is None:
        return jnp.asarray(_read_box(slot, leaf, tuple((0, size) for size in leaf.shape), tensors))
    devices: dict[Box, list[jax.Device]] = {}  # of this process, by what they hold
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        box = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        devices.setdefault(box, []).append(device)
    shards = [
        jax.device_put(value, device)
        for box, holders in devices.items()
        for value in [_read_box(slot, leaf, box, tensors)]
        for device in holders
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _read_box(slot: Slot, leaf: jax.ShapeDtypeStruct, box: Box, tensors: Tensors) -> np.ndarray:
    """Read a rectangle of a leaf, and no more, from its tensors."""
    out = np.empty([last - first for first, last in box], leaf.dtype)
    inside = _box_in_file(slot, leaf.shape, box)
    for row, layer in enumerate(range(*box[0]) if slot.stacked else [0]):
        tensor = tensors.read(slot.name.format(layer), inside)
        tensor = tensor[0] if slot.row else tensor
        target = out[row] if slot.stacked else out
        target[...] = tensor.T if slot.transposed else tensor
    return out


def _box_in_file(slot: Slot, shape: tuple[int, ...], box: Box) -> Box:
    one = box[1:] if slot.stacked else box
    if slot.row:
        return ((0, 1), *one)
    if slot.transposed:
        return one[::-1]
    shift = 0 if slot.part is None else slot.part * shape[-1]
    return (*one[:-1], (one[-1][0] + shift, one[-1][1] + shift))


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + ("" if len(names) <= most else f" and {len(names) - most} more")
