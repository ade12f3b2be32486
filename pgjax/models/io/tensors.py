"""Read parameters from the named tensors of a checkpoint: checked before reading, each device's slice by itself."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture
from pgjax.models.io.families import FAMILIES
from pgjax.models.io.families.family import LeafPath, Part

Span = tuple[int, int]  # of an axis: first index, and one past the last
Box = tuple[Span, ...]  # a rectangle of an array, one span an axis

_HEADS = ("lm_head", "embed_out", "score")  # outside of the base model, whatever its prefix
_HARMLESS = (  # buffers, not parameters
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
)


class Slot(NamedTuple):
    """Where a leaf of the parameter tree is in a checkpoint."""

    name: (
        str  # of the tensor, with {} for the number of the layer where the leaf is stacked, and for that of the expert
    )
    leading: int  # axes of the leaf that are numbers in the name
    transposed: bool  # [out, in] on disk
    part: Part | None  # of the tensor's columns, seen as the leaf is, where several leaves are in one
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
    Slot(name='transformer.h.{}.attn.c_attn.bias', leading=1, transposed=False, part=Part(start=16, size=16, total=48), row=False)
    """
    path = path[1:] if path[0] == "lm" else path  # the language model inside a reward model
    family = FAMILIES[arch.family]
    names = {**family.names, **family.side_by_side} if arch.parallel and not arch.one_norm else family.names
    if path not in names:
        raise UserError(f"family {arch.family!r} has no tensor for the parameter {'/'.join(path)}")
    name, is_map = names[path], path[0] == "layers" and path[-1] == "kernel"
    part = family.part(arch, path[1]) if path[0] == "layers" else None
    return Slot(name, name.count("{}"), transposed=is_map and not family.in_out, part=part, row=path[0] == "score")


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


def tensor_names(slot: Slot, shape: tuple[int, ...]) -> dict[tuple[int, ...], str]:
    """Name the tensors of a leaf of that shape, by the numbers of its leading axes.

    >>> tensor_names(Slot("h.{}.w", 1, transposed=False, part=None), (2, 5))
    {(0,): 'h.0.w', (1,): 'h.1.w'}
    """
    return {index: slot.name.format(*index) for index in np.ndindex(*shape[: slot.leading])}


def _shape_in_file(slot: Slot, shape: tuple[int, ...]) -> tuple[int, ...]:
    one = shape[slot.leading :]
    if slot.row:
        return (1, *one)
    if slot.part is not None:
        one = (*one[:-1], one[-1] // slot.part.size * slot.part.total)
    return one[::-1] if slot.transposed else one


def _check_tensors(arch: Architecture, slots: list[Slot], shapes: list[tuple[int, ...]], tensors: Tensors) -> None:
    wanted = {
        name: _shape_in_file(slot, shape)
        for slot, shape in zip(slots, shapes, strict=True)
        for name in tensor_names(slot, shape).values()
    }
    missing = sorted(wanted.keys() - tensors.shapes.keys())
    known = FAMILIES[arch.family].names
    head, embeddings = known["head", "kernel"], known["embed", "tokens"]
    unused_head = arch.tied or "score.weight" in wanted  # a classifier computes no logits
    harmless = {name for name in tensors.shapes if name.endswith(_HARMLESS) or (unused_head and name == head)}
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
    if arch.tied and "score.weight" not in wanted and head in tensors.shapes:
        _check_tied(head, next(slot.name for slot in slots if embeddings.endswith(slot.name)), tensors)


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
    numbers, one = [range(*span) for span in box[: slot.leading]], box[slot.leading :]
    spans = [*one[:-1]], _spans(slot.part, one[-1])
    for at, index in zip(np.ndindex(*out.shape[: slot.leading]), itertools.product(*numbers), strict=True):
        name = slot.name.format(*index)
        pieces = [_read_piece(slot, name, (*spans[0], span), tensors) for span in spans[1]]
        out[at] = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)
    return out


def _spans(part: Part | None, span: Span) -> list[Span]:
    """Find where a span of a leaf's last axis is in a tensor that holds several leaves: one span a group."""
    if part is None:
        return [span]
    spans = []
    for group in range(span[0] // part.size, -(-span[1] // part.size)):
        shift = group * (part.total - part.size) + part.start
        first, last = max(span[0], group * part.size), min(span[1], (group + 1) * part.size)
        spans.append((first + shift, last + shift))
    return spans


def _read_piece(slot: Slot, name: str, box: Box, tensors: Tensors) -> np.ndarray:
    if slot.row:
        return tensors.read(name, ((0, 1), *box))[0]
    return tensors.read(name, box[::-1]).T if slot.transposed else tensors.read(name, box)


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + ("" if len(names) <= most else f" and {len(names) - most} more")
