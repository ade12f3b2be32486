"""Load tokenizers from a model folder or a GGUF file's metadata."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgjax.core.errors import UserError
from pgjax.models.io.stops import STOP_IDS, gathered_stops, read_stop_strings, read_stops, set_stops, stop_ids

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

# How text is split before the byte-pair merges, by `tokenizer.ggml.pre`.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one
PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "qwen2", "smollm")
_CONTROL, _USER_DEFINED = 3, 4  # token types in GGUF


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
    _quiet()
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


def gguf_tokenizer(fields: Mapping[str, Any], *, max_length: int) -> Any | None:
    """Build the tokenizer that a GGUF file's metadata describes: byte-level BPE (Radford et al. 2019).

    Args:
        fields: the metadata, one value a key.
        max_length: positions of the model, in tokens.

    Returns:
        A `transformers.PreTrainedTokenizerFast`, or None where the file holds no tokenizer.

    Raises:
        UserError: for a kind of tokenizer or a pre-tokenizer that is not implemented.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind is None:
        return None
    if kind != "gpt2":
        raise UserError(f"tokenizer.ggml.model {kind!r} is not supported in GGUF; supported: gpt2 (byte-level BPE)")
    pre = fields.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise UserError(f"tokenizer.ggml.pre {pre!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}")
    _quiet()
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    named = {
        name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    stops = [fields[name] for name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if name in fields]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(fields, pre),
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **named,
    )
    tokenizer.init_kwargs[STOP_IDS] = list(gathered_stops(stops, tokenizer))
    return tokenizer


def _byte_level_bpe(fields: Mapping[str, Any], pre: str) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    cuts: dict[str, list[Any]] = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "llama-bpe": [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
        "qwen2": [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts[pre])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, fields["tokenizer.ggml.token_type"], strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, kind in kinds if kind == _CONTROL]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t, kind in kinds if kind == _USER_DEFINED])
    # llama.cpp adds BOS for this kind even if the file does not say so.
    if fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        bos = fields["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A {tokens[bos]} $B", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _quiet() -> None:
    """Keep transformers from advising to install torch, which is not needed."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
