"""Load and save reward models in Hugging Face layout, as sequence classifiers with one label."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pgjax.core.errors import UserError
from pgjax.models.io.config import classifier_config_of, labels_of
from pgjax.models.io.load import compute_dtype, laid_out, read_alike, read_config
from pgjax.models.io.save import write_folder
from pgjax.models.io.sources import find
from pgjax.models.io.stops import stop_ids
from pgjax.models.io.tensors import Tensors, read_params, safetensors_of
from pgjax.models.io.tokenizer import folder_tokenizer, prepare_tokenizer
from pgjax.models.reward_model import Params, RewardModel, reward_model

PAD_TOKEN = "<|pad|>"  # added to a tokenizer that has no token for padding


def load_reward_model(
    source: str | os.PathLike[str], *, dtype: Any = None, param_dtype: Any = jnp.float32, mesh: Any = None
) -> tuple[RewardModel, Params, Any | None]:
    """Load a reward model: a sequence classifier with one label, in Hugging Face layout.

    The score is read at the last token that the attention mask marks as real. `transformers` reads it at the last id that
    is not the padding id. The two are the same unless a text ends with the padding id; a warning says so where it can happen.

    Args:
        source: a folder or a hub id.
        dtype: of activations; None is bfloat16 on TPU and GPU, float32 on CPU.
        param_dtype: of the parameters.
        mesh: spread the parameters over this mesh as they are read: every process calls this, and reads the slices of
            its own devices. None leaves them on the default device.

    Returns:
        `(rm, params, tokenizer)`; the tokenizer pads on the right, and is None where the source holds none.

    Raises:
        UserError: for a source that cannot be found or downloaded, a model with several labels, a language model without a
            score head, weights that do not match the configuration, or a mesh that does not divide it.

    >>> load_reward_model("no-such-model")
    Traceback (most recent call last):
    pgjax.UserError: 'no-such-model' is not a model source; expected a folder in Hugging Face layout, a .gguf file, ...
    """

    def read() -> tuple[tuple[RewardModel, Params, Any | None], Tensors]:
        path = find(source)
        if path.is_file():
            raise UserError(f"{path} holds a language model, not a reward model: {_TRAIN_ONE}")
        arch, config = read_config(path)
        tensors = safetensors_of(path)
        _check_labels(path, config, tensors.shapes)
        tokenizer = folder_tokenizer(path)
        if tokenizer is not None:
            _prepare(tokenizer, config, arch.vocab_size, path)
        rm = reward_model(arch, dtype=compute_dtype(dtype), param_dtype=param_dtype)
        shapes = laid_out(mesh, jax.eval_shape(rm.init, jax.random.key(0)))
        return (rm, read_params(arch, shapes, tensors), tokenizer), tensors

    return read()[0] if mesh is None else read_alike(source, read)


def save_reward_model(folder: str | os.PathLike[str], rm: RewardModel, params: Params, tokenizer: Any | None) -> None:
    """Save a reward model in Hugging Face layout: `AutoModelForSequenceClassification` gives the same scores.

    `transformers` reads the score at the last id that is not the padding id. So the saved tokenizer pads with a token that
    no text ends with (`with_padding_token`), and on the right, where GPT-2 counts the same positions.

    Args:
        folder: where to. It may exist if it is empty or holds nothing but files that this function writes again.
        rm: the model's functions; only the architecture is read.
        params: its parameters, saved in their dtype. Every process calls this; process 0 writes.
        tokenizer: not changed; None for none, and then `transformers` scores one row at a time.

    Raises:
        UserError: when the folder holds other files, which are named.
        UserError: when the parameters are not those of `rm`.

    >>> import tempfile
    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    >>> rm = reward_model(architecture_of(config))
    >>> params = rm.init(jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_reward_model(folder, rm, params, None)
    ...     _, again, tokenizer = load_reward_model(folder)
    >>> bool(jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, again))), tokenizer
    (True, None)
    """
    if tokenizer is not None:
        rm, params, tokenizer = with_padding_token(rm, params, tokenizer)
    write_folder(folder, rm.arch, rm.init, classifier_config_of(rm.arch), params, tokenizer)


def with_padding_token(rm: RewardModel, params: Params, tokenizer: Any) -> tuple[RewardModel, Params, Any]:
    """Give a reward model's tokenizer a padding token that ends no text, and padding on the right.

    It keeps its own unless that is an end of sequence. Else the first of these: an unused special token with "pad" in its name,
    one with "reserved", any other that is neither BOS, EOS nor UNK nor in the chat template. Where there is none (GPT-2) a
    new token is added, in a spare row of the embedding, or in a new row of zeros.

    Args:
        rm: the reward model.
        params: its parameters.
        tokenizer: not changed.

    Returns:
        The three, with a copy of the tokenizer; the first two are unchanged unless the embedding had to grow.

    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 2, "n_embd": 16, "n_layer": 2, "n_head": 4}
    >>> rm = reward_model(architecture_of(config))
    >>> letters = Tokenizer(models.BPE(vocab={"<end>": 0, "a": 1}, merges=[]))
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>", pad_token="<end>")
    >>> rm, params, tokenizer = with_padding_token(rm, rm.init(jax.random.key(0)), tokenizer)
    >>> rm.arch.vocab_size, params["lm"]["embed"]["tokens"].shape, tokenizer.pad_token, tokenizer.pad_token_id
    (3, (3, 16), '<|pad|>', 2)
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    ends = {*stop_ids(tokenizer), tokenizer.eos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return rm, params, tokenizer
    spare = _spare_token(tokenizer, ends)
    if spare is not None:
        tokenizer.pad_token = spare
        return rm, params, tokenizer
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if tokenizer.pad_token_id < rm.arch.vocab_size:
        return rm, params, tokenizer
    return *_grown(rm, params, tokenizer.pad_token_id + 1), tokenizer


_TRAIN_ONE = "train a reward model from it, or open it as a language model with pgjax.load"


def _check_labels(path: Path, config: dict[str, Any], shapes: Any) -> None:
    if "score.weight" not in shapes:
        classes = config.get("architectures") or []
        kind = f"a {classes[0]}" if classes else f"a model of type {config['model_type']}"
        other = [name for name in ("classifier.weight", "v_head.summary.weight", "value_head.weight") if name in shapes]
        held = f", and its head is {other[0]}" if other else ""
        raise UserError(
            f"{path} holds {kind}, which is not a reward model: there is no tensor score.weight{held}; {_TRAIN_ONE}"
        )
    labels, rows = labels_of(config), shapes["score.weight"][0]
    if labels is None:
        labels = [f"LABEL_{i}" for i in range(rows)]
    if len(labels) != 1 or rows != 1:
        raise UserError(
            f"{path} is a classifier with {max(len(labels), rows)} labels ({', '.join(labels)}); a reward model has one"
        )


def _prepare(tokenizer: Any, config: dict[str, Any], vocab_size: int, path: Path) -> None:
    """Pad as `transformers` would with this folder, and warn where it would read the score at another token."""
    pad_id = config.get("pad_token_id")
    if tokenizer.pad_token is None and isinstance(pad_id, int) and 0 <= pad_id < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    mend = "learn the reward from a language model with rows for all of its tokens"
    prepare_tokenizer(tokenizer, vocab_size=vocab_size, origin=str(path), mend=mend)
    tokenizer.padding_side = "right"
    if pad_id is not None and pad_id in {*stop_ids(tokenizer), tokenizer.eos_token_id}:
        warnings.warn(
            f"{path}: the padding id {pad_id} is also an end of sequence. Where a text ends with it, transformers reads the "
            "score at the token before; pgjax reads it at the end of sequence, the last token that is not masked",
            stacklevel=4,
        )


def _spare_token(tokenizer: Any, ends: set[int]) -> str | None:
    """Choose a special token that no text ends with."""
    used = {*ends, tokenizer.bos_token_id, tokenizer.unk_token_id}
    template = str(tokenizer.chat_template or "")
    names = [
        token.content
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and number not in used and token.content not in template
    ]
    for word in ("pad", "reserved", ""):
        for name in names:
            if word in name.lower():
                return name
    return None


def _grown(rm: RewardModel, params: Params, vocab_size: int) -> tuple[RewardModel, Params]:
    """Append rows of zeros to the embedding."""
    embed = params["lm"]["embed"]
    table = jnp.pad(embed["tokens"], ((0, vocab_size - rm.arch.vocab_size), (0, 0)))
    arch = dataclasses.replace(rm.arch, vocab_size=vocab_size)
    bigger = reward_model(arch, dtype=rm.dtype, param_dtype=table.dtype)
    return bigger, {**params, "lm": {**params["lm"], "embed": {**embed, "tokens": table}}}
