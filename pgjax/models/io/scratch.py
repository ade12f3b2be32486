"""A language model from nothing: a tokenizer trained on the spot, and the parameters of a small Llama or of a config."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture, Rope
from pgjax.models.causal_lm import CausalLM, Params, causal_lm
from pgjax.models.io.config import architecture_of
from pgjax.models.io.resize import with_known_ids
from pgjax.models.io.tensors import read_json
from pgjax.parallel import sharding

END, PAD, TURN = "<|endoftext|>", "<|pad|>", "<|turn|>"
VOCAB_SIZE = 2048  # where neither the caller nor a config gives one
BYTES = 256  # in every vocabulary
TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)  # a turn ends with the end of sequence, so that sampling stops there


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019) on texts.

    Args:
      texts: what it learns its merges from; the same texts give the same tokenizer.
      vocab_size: entries at most, the 256 bytes and three special tokens among them; few texts give fewer.

    Returns:
      A `transformers.PreTrainedTokenizerFast` that loses nothing of any text, adds no special tokens by itself,
      pads on the left, and has a chat template.

    Raises:
      ValueError: `vocab_size` does not hold the bytes and the special tokens.

    Example:
      >>> tokenizer = train_tokenizer(["a film, a fine film"] * 4, 300)
      >>> tokenizer.decode(tokenizer("a film")["input_ids"]), tokenizer.eos_token_id
      ('a film', 0)
    """
    special = [END, PAD, TURN]
    if vocab_size < BYTES + len(special):
        raise UserError(f"vocab_size={vocab_size} is too small: it starts at {BYTES + len(special)}, for the bytes")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def small_architecture(vocab_size: int) -> Architecture:
    """Describe a Llama of five layers: 1.33 million parameters with 2,048 entries of vocabulary."""
    return Architecture(
        family="llama", vocab_size=vocab_size, width=128, depth=5, heads=4, kv_heads=4, head_dim=32, mlp_width=384,
        max_positions=512, activation="silu", norm="rms", norm_eps=1e-5, rope=Rope(theta=10000.0), gated_mlp=True,
        qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=False, tied=True,
    )  # fmt: skip


def read_architecture(path: Path) -> Architecture:
    """Read the architecture of a Hugging Face config.json.

    Args:
      path: the file, or the folder that holds it.

    Raises:
      ValueError: no such file, no JSON, or an architecture that is not supported; it names the file.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; config is the path of a Hugging Face config.json")
    fields = read_json(file)
    try:
        return architecture_of(fields)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def new_model(
    texts: Iterable[str],
    key: jax.Array,
    *,
    config: Path | None = None,
    vocab_size: int | None = None,
    tokenizer: Any | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
) -> tuple[CausalLM, Params, Any]:
    """Make a language model with random parameters, and a tokenizer for it.

    Args:
      texts: what the tokenizer is trained on.
      key: draws the parameters.
      config: config.json of the architecture; None: `small_architecture`.
      vocab_size: entries of the tokenizer at most; None: those of the architecture, or `VOCAB_SIZE`.
      tokenizer: one that was trained before, as when a run goes on; None: a new one is trained.
      dtype: of activations; None is float32.
      mesh: spread the parameters over it; None: on the default device.

    Returns:
      The model's functions, its parameters, and the tokenizer.

    Raises:
      UserError: a config that cannot be read, or a vocabulary that does not fit it.

    Example:
      >>> lm, params, tokenizer = new_model(["a film", "a film"], jax.random.key(0), vocab_size=260)
      >>> lm.arch.family, lm.arch.vocab_size == len(tokenizer)
      ('llama', True)
    """
    arch = None if config is None else read_architecture(config)
    if vocab_size is None:
        vocab_size = VOCAB_SIZE if arch is None else arch.vocab_size
    if arch is not None and vocab_size > arch.vocab_size:
        raise UserError(f"vocab_size={vocab_size} is more than the {arch.vocab_size} entries that {config} has")
    if tokenizer is None:
        tokenizer = train_tokenizer(texts, vocab_size)
    arch = small_architecture(len(tokenizer)) if arch is None else with_known_ids(arch, tokenizer)
    lm = causal_lm(arch, dtype=jnp.float32 if dtype is None else jnp.dtype(dtype).type)
    return lm, sharding.init_sharded(lm.init, key, mesh=mesh), tokenizer
