"""Text and token ids: a text's ids, the ids of its parts, and the text that ids add to those before them."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

# A tokenizer may write a space in front of a text. Behind one of these it writes none; the first that does not merge with the
# text is taken.
_BEFORE = ("\n", "a", "0", ".")
INSIDE = "an answer begins inside a token of the whole text, and is tokenised as a policy would go on from the prompt"
_AT_ONCE = 4_000_000  # characters that are tokenised in one call: a token takes some hundred bytes meanwhile


def encode_texts(texts: Sequence[str], tokenizer: Any, *, special: bool = True) -> list[list[int]]:
    """Turn texts into ids that go on: with what the tokenizer puts in front of a text, without what it puts behind.

    Args:
      texts: any number of them; equal ones are tokenised once.
      tokenizer: a fast Hugging Face tokenizer.
      special: put in front what the tokenizer does (as <s>), unless the text begins with it; False: nothing.

    Returns:
      The ids of each text.

    Example:
      >>> from tokenizers import Tokenizer, models, processors
      >>> from transformers import PreTrainedTokenizerFast
      >>> letters = Tokenizer(models.BPE(vocab={"s": 0, "e": 1, "a": 2}, merges=[]))
      >>> letters.post_processor = processors.TemplateProcessing(single="s $A e", special_tokens=[("s", 0), ("e", 1)])
      >>> encode_texts(["aa", "sa"], PreTrainedTokenizerFast(tokenizer_object=letters))
      [[0, 2, 2], [0, 2]]
    """
    unique = list(dict.fromkeys(texts))
    if not unique:
        return []
    special = special and tokenizer.num_special_tokens_to_add() > 0
    found = tokenizer(
        unique, add_special_tokens=special, return_special_tokens_mask=special, return_attention_mask=False,
        return_token_type_ids=False, verbose=False,
    )  # fmt: skip
    rows = found["input_ids"]
    if special:
        rows = map(_open_ended, rows, found["special_tokens_mask"])
    ids = dict(zip(unique, rows, strict=True))
    return [list(ids[text]) for text in texts]


def _open_ended(ids: list[int], added: list[int]) -> list[int]:
    """Leave out what was added behind a text, and what was added in front of one that begins with it itself."""
    if 0 not in added:
        return []
    begin, end = added.index(0), len(ids)
    while added[end - 1]:
        end -= 1
    twice = begin > 0 and ids[begin : 2 * begin] == ids[:begin]
    return ids[begin if twice else 0 : end]


def encode_parts(
    rows: Sequence[Sequence[str]], tokenizer: Any, *, special: bool | Sequence[bool]
) -> tuple[list[list[list[int]]], list[bool]]:
    """Turn texts that stand in parts into the ids of each part, such that all parts' ids are those of the whole text.

    The ids before a boundary are then those of the text before it, which is what a sampler goes on from. Where that cannot be,
    because the boundary falls inside a token of the whole text ("The film was " + "great", where " great" is one token), the
    text behind it is tokenised on its own, as what goes on from the ids before it, and the row is marked.

    Args:
      rows: of each, the parts of a text; none of them empty.
      tokenizer: a fast Hugging Face tokenizer.
      special: as of `encode_texts`, of all rows or of each.

    Returns:
      The ids of each part of each row; and of each row, whether a boundary fell inside a token.

    Example:
      >>> from tokenizers import Tokenizer, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> vocab = {"a": 0, "b": 1, "c": 2, "bc": 3}
      >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=[("b", "c")])))
      >>> encode_parts([["a", "bc"], ["ab", "c"]], tokenizer, special=False)
      ([[[0], [3]], [[0, 1], [2]]], [False, True])
    """
    flags = [special] * len(rows) if isinstance(special, bool) else special
    found: list[list[list[int]]] = [[] for _ in rows]
    inside = [False] * len(rows)
    for flag in (False, True):
        for numbers in _batches([number for number, x in enumerate(flags) if x == flag], rows):
            begun = {number: list(itertools.accumulate(rows[number])) for number in numbers}
            ids = iter(encode_texts(list(itertools.chain.from_iterable(begun.values())), tokenizer, special=flag))
            for number, texts in begun.items():
                prefixes = list(itertools.islice(ids, len(texts)))
                pieces = _cut(prefixes)
                inside[number] = pieces is None
                found[number] = _cut_apart(rows[number], prefixes, tokenizer) if pieces is None else pieces
    return found, inside


def _batches(numbers: Sequence[int], rows: Sequence[Sequence[str]]) -> Iterator[list[int]]:
    """Split the numbers of rows into batches whose texts, begun at every part, have few enough characters for one call."""
    batch: list[int] = []
    characters = 0
    for number in numbers:
        batch.append(number)
        characters += sum(itertools.accumulate(map(len, rows[number])))
        if characters > _AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _cut(prefixes: Sequence[list[int]]) -> list[list[int]] | None:
    """Cut the last row of ids where the ones before it end; None where it does not begin with them."""
    whole = prefixes[-1]
    if any(whole[: len(prefix)] != prefix for prefix in prefixes):
        return None
    ends = [0, *map(len, prefixes)]
    return [whole[begin:end] for begin, end in itertools.pairwise(ends)]


def _cut_apart(parts: Sequence[str], prefixes: Sequence[list[int]], tokenizer: Any) -> list[list[int]]:
    """Cut a text at the first boundary that falls inside a token, and tokenise what is behind it on its own."""
    count = 1
    while _cut(prefixes[: count + 1]) is not None:
        count += 1
    return (_cut(prefixes[:count]) or []) + _going_on(parts[count:], tokenizer)


def _going_on(parts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokenise parts as the middle of a text."""
    for before in _BEFORE:
        prefixes = encode_texts(list(itertools.accumulate((before, *parts))), tokenizer, special=False)
        if prefixes[1][: len(prefixes[0])] == prefixes[0]:
            pieces = _cut(prefixes)
            return (_cut_apart([before, *parts], prefixes, tokenizer) if pieces is None else pieces)[1:]
    prefixes = encode_texts(list(itertools.accumulate(parts)), tokenizer, special=False)
    return _cut(prefixes) or _cut_apart(parts, prefixes, tokenizer)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """List the ids that are no text: those that ``decode(..., skip_special_tokens=True)`` leaves out."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added.union(tokenizer.all_special_ids))


def stopped_inside(answers: Sequence[str], tokenizer: Any, stops: Collection[int]) -> set[str]:
    """Find the answers that hold an end of sequence before their end.

    Args:
      answers: any number of texts.
      tokenizer: a fast Hugging Face tokenizer.
      stops: the ids that end a sequence.

    Returns:
      Those that do.

    Example:
      >>> from tokenizers import Tokenizer, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> letters = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"e": 0, "a": 1}, merges=[])))
      >>> stopped_inside(["ae", "aea"], letters, [0])
      {'aea'}
    """
    marks = [tokenizer.decode([stop], clean_up_tokenization_spaces=False) for stop in stops]
    suspects = [answer for answer in dict.fromkeys(answers) if any(mark in answer for mark in marks)]
    ids = encode_texts(suspects, tokenizer, special=False)
    return {answer for answer, row in zip(suspects, ids, strict=True) if not set(stops).isdisjoint(row[:-1])}


def added_text(before: Sequence[int], ids: Sequence[int], tokenizer: Any) -> str:
    """Decode ids as the text that they add to the ids before them.

    Decoded on their own they may be another text: decoders of SentencePiece's kind leave out the space that a text begins with.

    Args:
      before: the ids in front, in order; the last few decide. May be empty: the text's beginning then.
      ids: the ids to decode, special ones included.
      tokenizer: a Hugging Face tokenizer.

    Returns:
      decode(before + ids) without decode(before).

    Example:
      >>> from tokenizers import Tokenizer, decoders, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> words = Tokenizer(models.WordLevel({"_was": 0, "_great": 1, "?": 2}, unk_token="?"))
      >>> words.decoder = decoders.Sequence([decoders.Replace("_", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
      >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
      >>> tokenizer.decode([1]), added_text([0], [1], tokenizer)
      ('great', ' great')
    """
    begin = max(0, len(before) - _CONTEXT)
    while begin > 0 and _is_byte(before[begin], tokenizer):  # of a run of bytes all: no character of it is cut then
        begin -= 1
    context = list(before[begin:])
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    old, new = decode(context), decode([*context, *ids])
    known = len(context)
    while not new.startswith(old) and old.endswith(_CUT) and known > max(0, len(context) - _CHARACTER):
        known -= 1  # the ids before end within a character, which those that follow complete
        old = decode(context[:known])
    if new.startswith(old):
        return new[len(old) :]
    known = len(context)
    while known > 0 and _is_byte(context[known - 1], tokenizer):
        known -= 1
    if known < len(context):  # a decoder that spoils a whole run of bytes where one is no part of a character
        return added_text(context[:known], ids, tokenizer)
    return new[len(old.rstrip(_CUT)) :]


_CUT = "\N{REPLACEMENT CHARACTER}"  # written for a part of a character
_CONTEXT = 8  # ids
_CHARACTER = 4  # bytes, at most
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _is_byte(token_id: int, tokenizer: Any) -> bool:
    """Say whether a token is one byte of a character that is not in the vocabulary."""
    return _BYTE.fullmatch(tokenizer.convert_ids_to_tokens(int(token_id)) or "") is not None
