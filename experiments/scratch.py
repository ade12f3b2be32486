"""A language model from nothing: a tokenizer trained on the spot, and the parameters of a small Llama or of a config."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pgjax as pg
from pgjax.core.errors import UserError
from pgjax.data.prompts import Prompt
from pgjax.data.tables import Row
from pgjax.models.io.config import architecture_of

END, PAD, TURN = "<|endoftext|>", "<|pad|>", "<|turn|>"
VOCAB_SIZE = 2048  # where neither the command line nor a config says another
LETTERS = 256  # the bytes, which are in every vocabulary
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
    if vocab_size < LETTERS + len(special):
        raise UserError(f"vocab_size={vocab_size} is too small: it starts at {LETTERS + len(special)}, for the bytes")
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


def texts_of(rows: Sequence[Row]) -> Iterator[str]:
    """Give all texts of examples, of every kind that `examples.check_examples` lets through.

    Example:
      >>> list(texts_of([{"prompt": [{"role": "user", "content": "Hello"}], "completion": "Hi"}]))
      ['Hello', 'Hi']
    """
    for row in rows:
        for value in row.values():
            yield from _texts(value)


def small_architecture(vocab_size: int) -> pg.Architecture:
    """Describe a Llama of five layers: 1.33 million parameters with 2,048 entries of vocabulary."""
    return pg.Architecture(
        family="llama", vocab_size=vocab_size, width=128, depth=5, heads=4, kv_heads=4, head_dim=32, mlp_width=384,
        max_positions=512, activation="silu", norm="rms", norm_eps=1e-5, rope=pg.Rope(theta=10000.0), gated_mlp=True,
        qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=False, tied=True,
    )  # fmt: skip


def read_architecture(path: Path) -> pg.Architecture:
    """Read the architecture of a Hugging Face config.json.

    Args:
      path: the file, or the folder that holds it.

    Raises:
      ValueError: no such file, no JSON, or an architecture that is not supported; it names the file.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; config is the path of a Hugging Face config.json")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise UserError(f"a {type(fields).__name__}, not an object")
        return architecture_of(fields)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def _texts(value: Prompt) -> list[str]:
    return [value] if isinstance(value, str) else [message["content"] for message in value]
