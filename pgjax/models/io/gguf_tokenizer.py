"""The tokenizer in a GGUF file's metadata: byte-level BPE ("gpt2"), or SentencePiece's pieces with scores ("llama")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pgjax.core.errors import UserError
from pgjax.models.io.stops import STOP_IDS, gathered_stops
from pgjax.models.io.tokenizer import quiet

# How text is split before the byte-pair merges, by `tokenizer.ggml.pre`.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one
_DEFAULT_SPLITS = (  # of llama.cpp, one behind the other
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
PRE_TOKENIZERS = ("default", "gpt-2", "llama-bpe", "qwen2", "smollm")
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "phi-2": "gpt-2"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token types in GGUF
_SPACE = "\u2581"


def gguf_tokenizer(fields: Mapping[str, Any], *, max_length: int, origin: str) -> Any | None:
    """Build the tokenizer that a GGUF file's metadata describes.

    Byte-level BPE (Radford et al. 2019) is cut as `tokenizer.ggml.pre` says. Where that is absent or "default", Qwen's models
    are cut as Qwen's are, vocabularies with Llama 3's first token as Llama 3's, and all else as llama.cpp does. SentencePiece's
    pieces (Kudo & Richardson 2018) are merged by their scores, and bytes stand for what is in no piece.

    Args:
        fields: the metadata, one value a key.
        max_length: positions of the model, in tokens.
        origin: the file's name, for messages.

    Returns:
        A `transformers.PreTrainedTokenizerFast`, or None where the file holds no tokenizer.

    Raises:
        UserError: for a kind of tokenizer or a pre-tokenizer that is not implemented, or a key that is missing.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind is None:
        return None
    builders = {"gpt2": (_byte_level_bpe, "merges"), "llama": (_sentencepiece, "scores")}
    if kind not in builders:
        raise UserError(
            f"{origin}: tokenizer.ggml.model {kind!r} is not supported; supported: gpt2 (byte-level BPE), llama (SentencePiece)"
        )
    build, ranks = builders[kind]
    needed = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", ranks)]
    if missing := [name for name in needed if name not in fields]:
        raise UserError(f"{origin} lacks the metadata {', '.join(missing)}, which tokenizer.ggml.model {kind!r} needs")
    tokens = fields[needed[0]]
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {
        name: fields[f"tokenizer.ggml.{key}_token_id"]
        for name, key in keys.items()
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    if beyond := {name: i for name, i in ids.items() if not 0 <= i < len(tokens)}:
        raise UserError(f"{origin}: {beyond} is beyond its {len(tokens)} tokens")
    quiet()
    from transformers import PreTrainedTokenizerFast

    built = build(fields, tokens, origin)
    _add_tokens(built, tokens, fields["tokenizer.ggml.token_type"], spaces=kind == "llama")
    pre = _pre(fields, origin) if kind == "gpt2" else "llama"
    # llama.cpp adds BOS for these kinds even if the file does not say so.
    first = fields.get("tokenizer.ggml.add_bos_token", pre in {"llama", "llama-bpe"})
    _put_around(built, tokens, ids, first=first, last=fields.get("tokenizer.ggml.add_eos_token", False), origin=origin)
    stops = [fields[name] for name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if name in fields]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=built,
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **{name: tokens[i] for name, i in ids.items()},
    )
    tokenizer.init_kwargs[STOP_IDS] = list(gathered_stops(stops, tokenizer))
    return tokenizer


def _pre(fields: Mapping[str, Any], origin: str) -> str:
    """Choose how text is cut before the merges of byte-level BPE."""
    given = fields.get("tokenizer.ggml.pre") or "default"
    pre = str(_ALIASES.get(given, given))
    if pre not in PRE_TOKENIZERS:
        listed = ", ".join((*PRE_TOKENIZERS, *_ALIASES))
        raise UserError(f"{origin}: tokenizer.ggml.pre {given!r} is not supported; supported: {listed}")
    if pre == "default" and str(fields.get("general.architecture")).startswith("qwen"):
        return "qwen2"
    if pre == "default" and "<|begin_of_text|>" in fields["tokenizer.ggml.tokens"]:
        return "llama-bpe"
    return pre


def _byte_level_bpe(fields: Mapping[str, Any], tokens: Sequence[str], origin: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    def by(*patterns: str) -> list[Any]:
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
        return [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]

    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cuts: dict[str, list[Any]] = {
        "default": by(*_DEFAULT_SPLITS),
        "gpt-2": [whole],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), whole],
        "llama-bpe": by(_LLAMA3_SPLIT),
        "qwen2": by(_QWEN2_SPLIT),
    }
    pre = _pre(fields, origin)
    pairs = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts[pre])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: Mapping[str, Any], tokens: Sequence[str], origin: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    kinds = fields["tokenizer.ggml.token_type"]
    pieces = {_in_vocabulary(token): i for i, token in enumerate(tokens)}
    merged = {
        _in_vocabulary(token): score
        for token, kind, score in zip(tokens, kinds, fields["tokenizer.ggml.scores"], strict=True)
        if kind in {_NORMAL, _USER_DEFINED}
    }
    unknown = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN]
    merges = generate_merges({token: pieces[token] for token in merged}, merged)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=pieces, merges=merges, byte_fallback=True, fuse_unk=True, unk_token=unknown[0] if unknown else None
        )
    )
    in_front = fields.get("tokenizer.ggml.add_space_prefix", True)
    spaces, back = normalizers.Replace(" ", _SPACE), decoders.Replace(_SPACE, " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if in_front else spaces
    steps = [back, decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if in_front else steps)
    return tokenizer


def _in_vocabulary(token: str) -> str:
    """Write a run of spaces as SentencePiece does; the format stores user-defined ones as they stand in a text."""
    return _SPACE * len(token) if token and not token.strip(" ") else token


def _add_tokens(tokenizer: Any, tokens: Sequence[str], kinds: Sequence[int], *, spaces: bool) -> None:
    from tokenizers import AddedToken

    of_kind = lambda wanted: [
        AddedToken(_in_vocabulary(token) if spaces else token, normalized=False, special=wanted != _USER_DEFINED)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind == wanted
    ]
    tokenizer.add_special_tokens([*of_kind(_CONTROL), *(of_kind(_UNKNOWN) if spaces else [])])
    tokenizer.add_tokens(of_kind(_USER_DEFINED))


def _put_around(
    tokenizer: Any, tokens: Sequence[str], ids: Mapping[str, int], *, first: bool, last: bool, origin: str
) -> None:
    """Put the tokens of the beginning and the end of sequence around a text."""
    from tokenizers import processors

    wanted = [name for name, used in (("bos_token", first), ("eos_token", last)) if used]
    if missing := [name for name in wanted if name not in ids]:
        listed = ", ".join(f"tokenizer.ggml.{name.removesuffix('_token')}_token_id" for name in missing)
        raise UserError(f"{origin} lacks the metadata {listed}, which its tokenizer puts around every text")
    if not wanted:
        return
    before, after = (tokens[ids["bos_token"]] if first else "", tokens[ids["eos_token"]] if last else "")
    around = lambda text: " ".join(part for part in (before, text, after) if part)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around("$A"),
        pair=f"{around('$A')} {around('$B')}",
        special_tokens=[(tokens[ids[name]], ids[name]) for name in wanted],
    )
