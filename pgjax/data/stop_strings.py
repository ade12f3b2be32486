"""Stop strings as a table that the sampler follows token by token: texts at which a completion ends."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from pgjax.core.errors import UserError
from pgjax.data.tokens import added_text

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token that stands for one byte


def stop_table(strings: Sequence[str], tokenizer: Any, vocab_size: int) -> np.ndarray | None:
    """Build the automaton that finds strings in what a completion adds to its prompt (Aho and Corasick 1975).

    Its states are the beginnings of the strings: the longest one that the bytes so far end with. A token may end a string
    within itself, and a string may span tokens; its first token need not begin where the string does.

    Args:
      strings: at which a completion ends; none of them empty. Special tokens are found by their text, too.
      tokenizer: a fast Hugging Face tokenizer.
      vocab_size: rows of the model's embedding.

    Returns:
      [S, vocab_size] int32: the state after a token, from the state before it, beginning with 0; -1 where a string is complete.
      None without strings.

    Raises:
      UserError: an empty string, or one that the tokenizer's tokens cannot write.

    Example:
      >>> from tokenizers import Tokenizer, decoders, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> letters = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
      >>> letters.decoder = decoders.Fuse()
      >>> stop_table(["ba"], PreTrainedTokenizerFast(tokenizer_object=letters), 3)  # states: nothing, and "b"
      array([[ 0,  1,  1],
             [-1,  1, -1]], dtype=int32)
    """
    if not strings:
        return None
    wanted = [string.encode() for string in strings]
    if b"" in wanted:
        raise UserError("a stop string is empty: every completion would end before it begins")
    pieces = token_bytes(tokenizer)
    missing = set(b"".join(wanted)) - set(b"".join(pieces))
    if missing:
        odd = next(string for string, raw in zip(strings, wanted, strict=True) if missing.intersection(raw))
        raise UserError(
            f"no completion can hold the stop string {odd!r}: the tokenizer has no token for all its characters"
        )
    step = _by_byte(wanted)
    table = np.tile(np.arange(len(step), dtype=np.int32)[:, None], vocab_size)
    lengths = np.array([len(piece) for piece in pieces])
    for at in range(lengths.max()):
        ids = np.flatnonzero(lengths > at)
        table[:, ids] = step[table[:, ids], [pieces[i][at] for i in ids]]
    return np.where(table == len(step) - 1, -1, table)[:-1].astype(np.int32)


def _by_byte(strings: Sequence[bytes]) -> np.ndarray:
    """Give the state after a byte, [S + 1, 256]; the last state is the end, which is never left."""
    states = sorted({string[:size] for string in strings for size in range(len(string))}, key=lambda x: (len(x), x))
    number = {state: i for i, state in enumerate(states)}
    step = np.full((len(states) + 1, 256), len(states))
    for state in states:
        for byte in range(256):
            text = state + bytes([byte])
            if not text.endswith(tuple(strings)):
                step[number[state], byte] = next(number[text[i:]] for i in range(len(text) + 1) if text[i:] in number)
    return step


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Give the bytes that each token adds to a text, by id.

    Args:
      tokenizer: a fast Hugging Face tokenizer.

    Returns:
      As many as its largest id plus 1; empty for ids that no token has.

    Example:
      >>> from tokenizers import Tokenizer, decoders, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> words = Tokenizer(models.WordLevel({"▁sun": 0, "?": 1}, unk_token="?"))
      >>> words.decoder = decoders.Metaspace()
      >>> token_bytes(PreTrainedTokenizerFast(tokenizer_object=words))
      [b' sun', b'?']
    """
    vocab = tokenizer.get_vocab()
    pieces = [b""] * (max(vocab.values()) + 1)
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    raw, fallback = "ByteLevel" in decoder, "ByteFallback" in decoder
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    for token, i in vocab.items():
        if raw and i not in tokenizer.added_tokens_decoder:
            pieces[i] = bytes(_BYTE_OF[character] for character in token)
        elif fallback and (found := _BYTE.fullmatch(token)):
            pieces[i] = bytes([int(found[1], 16)])
        else:
            pieces[i] = added_text(before, [i], tokenizer).encode()
    return pieces


def _byte_level_alphabet() -> dict[str, int]:
    """Invert the table by which byte-level tokenizers write bytes as printable characters (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def ends_at_string(table: np.ndarray, completions: Sequence[Sequence[int]]) -> np.ndarray:
    """Say which completions have come to a stop string.

    Args:
      table: of `stop_table`.
      completions: the ids of each.

    Returns:
      [B] bool.

    Example:
      >>> ends_at_string(np.array([[0, 1, 1], [-1, 1, -1]]), [[1, 0], [0, 1]]).tolist()
      [True, False]
    """

    def found(ids: Sequence[int]) -> bool:
        state = 0
        for i in ids:
            state = table[state, i] if state >= 0 else state
        return state < 0

    return np.array([found(ids) for ids in completions], bool)
