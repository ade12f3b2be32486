"""Load the tokenizer of a model folder."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from pgjax.core.errors import UserError
from pgjax.models.io.stops import STOP_IDS, read_stop_strings, read_stops, set_stops, stop_ids

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates",  # a folder, of named ones
)
_WHOLE = ("tokenizer.json", "vocab.json", "tokenizer.model")  # any one of them makes a tokenizer
_FOREIGN = ("tekken.json", "spiece.model", "vocab.txt", "sentencepiece.bpe.model")  # of which none is read


def folder_tokenizer(folder: Path) -> Any | None:
    """Read the tokenizer of a folder in Hugging Face layout.

    Args:
        folder: the path.

    Returns:
        The tokenizer, None where the folder holds none.

    Raises:
        UserError: its files cannot be read.
    """
    if not any((folder / name).is_file() for name in _WHOLE):
        return None
    quiet()
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json is complete, and is read as it is. AutoTokenizer may rebuild it as the class that
    # tokenizer_config.json names: as a GPT2Tokenizer, SmolLM2's would no longer split digits one by one.
    reader = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = reader.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # damaged files raise errors of many types: of JSON, of Rust, KeyError, ...
        if reader is AutoTokenizer and importlib.util.find_spec("sentencepiece") is None:
            raise UserError(
                f"{folder} holds no tokenizer.json, and its tokenizer is read by a package that is not installed: "
                "pip install sentencepiece"
            ) from error
        raise UserError(f"{folder}: its tokenizer's files cannot be read ({error})") from error
    tokenizer.init_kwargs[STOP_IDS] = list(read_stops(folder, tokenizer))
    set_stops(tokenizer, (), read_stop_strings(folder, tokenizer))
    return tokenizer


def missing_tokenizer(source: object) -> str:
    """Say that a model's source holds no tokenizer, and what to do about one in files that are not read.

    Example:
        >>> missing_tokenizer("models/tiny")
        'models/tiny holds no tokenizer: add its files'
    """
    found = next((name for name in _FOREIGN if (Path(str(source)) / name).is_file()), None)
    if found is None:
        return f"{source} holds no tokenizer: add its files"
    return (
        f"{source} holds no tokenizer that is read: {found} is another form; add the tokenizer.json that transformers' "
        "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes of it"
    )


def largest_id(tokenizer: Any) -> int:
    """Find the largest id of a tokenizer, added tokens included."""
    return max(tokenizer.get_vocab().values())


def prepare_tokenizer(tokenizer: Any, *, vocab_size: int, origin: str, mend: str) -> Any:
    """Make a tokenizer pad on the left, with the end of sequence if it has no padding token.

    Args:
        tokenizer: changed in place.
        vocab_size: rows of the model's embedding.
        origin: the model's path, for messages.
        mend: what to do about a tokenizer that is larger than the embedding, for messages.

    Returns:
        The same tokenizer.

    Raises:
        UserError: when a token id or a stop id is beyond the model's vocabulary: an embedding would silently clamp it.
    """
    largest = largest_id(tokenizer)
    if largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"{origin}: the tokenizer's largest id is {largest} ({token!r}), but the model's embedding ends at "
            f"{vocab_size - 1}: take the tokenizer that it was trained with, or {mend}"
        )
    if odd := [i for i in stop_ids(tokenizer) if not 0 <= i < vocab_size]:
        raise UserError(
            f"{origin}: eos_token_id holds {odd[0]}, outside the model's vocabulary of {vocab_size}: correct its "
            "generation_config.json or config.json"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def quiet() -> None:
    """Keep transformers from advising to install torch, which is not needed."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
