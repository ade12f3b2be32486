"""Write a model to a folder in Hugging Face layout: atomically, one tensor at a time off the devices."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import stat
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture
from pgjax.models.io.stops import STOP_IDS, stop_ids
from pgjax.models.io.tensors import Slot, read_json, slot_of, tensor_names
from pgjax.models.io.tokenizer import TOKENIZER_FILES
from pgjax.models.lora import merge_lora
from pgjax.parallel.processes import all_or_none, on_process_0

MAX_SHARD_BYTES = 5 * 10**9  # of one weights file; the host holds one at a time
_INDEX = "model.safetensors.index.json"
_OURS = {"config.json", "generation_config.json", "model.safetensors", _INDEX, *TOKENIZER_FILES}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class Outgoing(NamedTuple):
    """A tensor that is to be written to a checkpoint."""

    size: int  # in bytes
    fetch: Callable[[], np.ndarray]  # brings it to the host, contiguous; a collective where processes share the model


def write_folder(
    folder: str | os.PathLike[str],
    arch: Architecture,
    init: Callable[[jax.Array], Any],
    config: dict[str, Any],
    params: dict[str, Any],
    tokenizer: Any | None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model in Hugging Face layout atomically.

    Every process calls this: together they fetch one tensor at a time from the devices, and process 0 writes. The others
    wait for it, and raise where it fails.

    Args:
        folder: as in `save_pretrained`.
        arch: decides the names of the tensors.
        init: (key) -> parameters, whose shapes `params` must have.
        config: the fields of config.json, without token ids and dtype.
        params: the parameters, on any devices; adapters are merged (`lora`).
        tokenizer: None for none.
        max_shard_bytes: a model larger than this is written as several files and an index.

    Raises:
        UserError: when the folder holds other files.
        UserError: when the parameters have other shapes.

    >>> import tempfile
    >>> from pgjax.models.causal_lm import causal_lm
    >>> from pgjax.models.io.config import architecture_of, config_of
    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    >>> lm = causal_lm(architecture_of(config))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_folder(folder, lm.arch, lm.init, config_of(lm.arch), lm.init(jax.random.key(0)), None)
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['config.json', 'generation_config.json', 'model.safetensors']
    """
    target, params = Path(folder).expanduser().absolute(), merge_lora(params)
    _check_params(arch, init, params)
    on_process_0(lambda: _check_replaceable(target))
    tensors = named_tensors(arch, params)
    config = {**config, **_token_ids(tokenizer), "dtype": str(jax.tree.leaves(params)[0].dtype)}
    values = ((name, tensor.fetch()) for name, tensor in tensors.items())

    def write() -> None:
        try:
            if jax.process_index() == 0:
                _write_files(target, config, tokenizer, _shards(tensors, max_shard_bytes), values)
        finally:
            if jax.process_count() > 1:  # fetching is collective: all go through it, even if process 0 could not write
                deque(values, maxlen=0)

    all_or_none(write)


def named_tensors(arch: Architecture, params: Any) -> dict[str, Outgoing]:
    """List the tensors of a Hugging Face checkpoint made from a parameter tree, in the dtypes of the parameters.

    Args:
        arch: the architecture of the parameters.
        params: the tree; its leaves may be spread over devices and processes.

    Returns:
        For each name the tensor's size and how to fetch it; in the same order on every process.

    >>> from pgjax.models.causal_lm import causal_lm
    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    >>> lm = causal_lm(architecture_of(config))
    >>> fused = named_tensors(lm.arch, lm.init(jax.random.key(0)))["transformer.h.1.attn.c_attn.weight"]
    >>> fused.size, fused.fetch().shape
    (3072, (16, 48))
    """
    sources: dict[str, list[Source]] = {}  # tensor -> its leaves: several where the family keeps them in one
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        slot = slot_of(arch, tuple(key.key for key in keys))
        for index, name in tensor_names(slot, leaf.shape).items():
            sources.setdefault(name, []).append((slot, leaf, index))
    return {
        name: Outgoing(
            sum(leaf.nbytes // math.prod(leaf.shape[: slot.leading]) for slot, leaf, _ in parts),
            functools.partial(_fetch, sorted(parts, key=lambda one: one[0].part or (0,))),
        )
        for name, parts in sources.items()
    }


Source = tuple[Slot, Any, tuple[int, ...]]  # a leaf, and the numbers of its leading axes


def _fetch(parts: list[Source]) -> np.ndarray:
    values = [_on_host(leaf, index) for _, leaf, index in parts]
    slot, value = parts[0][0], values[0]
    if slot.part is not None:  # group by group
        groups = [x.reshape(*x.shape[:-1], -1, one.part.size) for (one, _, _), x in zip(parts, values, strict=True)]  # type: ignore[union-attr]
        value = np.concatenate(groups, axis=-1).reshape(*value.shape[:-1], -1)
    return np.ascontiguousarray(value[None] if slot.row else value.T if slot.transposed else value)


def _on_host(leaf: Any, index: tuple[int, ...]) -> np.ndarray:
    if not isinstance(leaf, jax.Array) or _is_host_memory(leaf):
        return np.asarray(leaf)[index]  # a view
    # A new array: np.asarray(leaf) would keep the host's copy of the leaf for as long as the leaf lives.
    part = _one(leaf, index) if index else _copied(leaf)
    if part.is_fully_addressable:
        return np.asarray(part)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(part, tiled=True))


def _is_host_memory(leaf: jax.Array) -> bool:
    return (
        len(leaf.sharding.device_set) == 1
        and leaf.is_fully_addressable
        and next(iter(leaf.devices())).platform == "cpu"
    )


@jax.jit
def _one(leaf: jax.Array, index: tuple[int, ...]) -> jax.Array:
    for number in index:
        leaf = jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)
    return leaf


@jax.jit
def _copied(leaf: jax.Array) -> jax.Array:
    return jax.numpy.copy(leaf)


def _shards(tensors: Mapping[str, Outgoing], max_bytes: int) -> list[list[str]]:
    """Assign tensors to files in order; one that is larger than a file gets its own."""
    shards: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or tensor.size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= tensor.size
    return shards


def _write_files(
    target: Path,
    config: dict[str, Any],
    tokenizer: Any | None,
    shards: list[list[str]],
    values: Iterator[tuple[str, np.ndarray]],
) -> None:
    draft = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    draft.mkdir(parents=True)
    try:
        _write_json(draft / "config.json", config)
        known = {name: value for name, value in _token_ids(tokenizer).items() if value is not None}
        _write_json(draft / "generation_config.json", known)
        _write_weights(draft, shards, values)
        if tokenizer is not None:
            _write_tokenizer(draft, tokenizer)
        _swap(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_weights(draft: Path, shards: list[list[str]], values: Iterator[tuple[str, np.ndarray]]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    owner: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        held = dict(next(values) for _ in names)
        owner |= dict.fromkeys(held, file)
        total += sum(value.nbytes for value in held.values())
        try:
            save_file(held, draft / file, metadata={"format": "pt"})
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))
            if found is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(draft.parent)) from error
        # safetensors keeps the file to its owner; the others have the mode that the umask asks for.
        (draft / file).chmod(stat.S_IMODE((draft / "config.json").stat().st_mode))
        del held  # before the next file's tensors are fetched
    if len(shards) > 1:
        _write_json(draft / _INDEX, {"metadata": {"total_size": total}, "weight_map": owner})


def _write_tokenizer(draft: Path, tokenizer: Any) -> None:
    """Write the tokenizer's files, with all ids that completions end at, such that transformers 4 reads them as 5 does."""
    tokenizer.save_pretrained(draft)
    file = draft / "tokenizer_config.json"
    config = {**read_json(file), STOP_IDS: list(stop_ids(tokenizer))}
    if config["tokenizer_class"] == "TokenizersBackend":  # 5 alone has this name
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        before = tokenizer.backend_tokenizer.pre_tokenizer
        state = {} if before is None else json.loads(before.__getstate__())
        if "add_prefix_space" in state:  # 4 takes it from here, not from tokenizer.json
            config["add_prefix_space"] = state["add_prefix_space"]
    if isinstance(config.get("extra_special_tokens"), list):  # to 4 this is a table of named ones
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    _write_json(file, config)


def _token_ids(tokenizer: Any | None) -> dict[str, Any]:
    """Give all three ids, null where unknown: transformers has defaults of its own for missing ones."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    stops = stop_ids(tokenizer)
    eos = list(stops) if len(stops) > 1 else stops[0] if stops else None
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id}


def _check_params(arch: Architecture, init: Callable[[jax.Array], Any], params: dict[str, Any]) -> None:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}

    wanted, given = shapes(jax.eval_shape(init, jax.random.key(0))), shapes(params)
    wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if wrong:
        told = ", ".join(f"{name} is {given.get(name)}, expected {wanted.get(name)}" for name in wrong[:8])
        raise UserError(f"the parameters are not those of the {arch.family} model: {told}")


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; a model is saved as a folder")
    names = sorted(entry.name for entry in target.iterdir())
    others = [name for name in names if name not in _OURS and not _SHARD.fullmatch(name)]
    if others:
        raise UserError(f"{target} holds other files ({', '.join(others[:8])}): save to a new folder")


def _swap(draft: Path, target: Path) -> None:
    """Rename the draft to the target; an old target is removed after that."""
    if not target.exists():
        draft.rename(target)
        return
    old = target.parent / f".{target.name}.old.{uuid.uuid4().hex}"
    target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
