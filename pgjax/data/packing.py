"""Pack examples into rows of one length, with segment ids that separate them."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pgjax.core.errors import UserError
from pgjax.data.examples import Example, encode_examples
from pgjax.data.tables import Placed


class Packed(NamedTuple):
    """Rows of one length, each holding several examples."""

    tokens: Any  # [R, L] int32
    segment_ids: Any  # [R, L] int32: 1, 2, ... in each row, 0 on padding
    mask: Any  # [R, L] bool, True where the token is learned; never the first one of a segment


def pack(examples: Sequence[Example], length: int, pad_id: int = 0) -> Packed:
    """Pack examples into few rows by best fit: the longest first, each into the fullest row that still holds it.

    The first token of an example is never learned: its prediction would come from the example before it.

    Args:
      examples: each of at least 1 and at most ``length`` tokens.
      length: of a row, L.
      pad_id: the id of padding; padding is recognised by segment id 0, not by this id.

    Returns:
      The rows, in the order of their longest examples. The result is deterministic.

    Raises:
      UserError: no examples, or one that is empty or longer than ``length``.

    Example:
      >>> short, long = Example([1, 2], [False, True]), Example([3, 4, 5], [True, True, True])
      >>> packed = pack([short, long, short], 5)
      >>> packed.tokens.tolist(), packed.segment_ids.tolist()
      ([[3, 4, 5, 1, 2], [1, 2, 0, 0, 0]], [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]])
      >>> packed.mask.astype(int).tolist()
      [[0, 1, 1, 0, 1], [0, 1, 0, 0, 0]]
    """
    if not examples:
        raise UserError("there are no examples to pack")
    rows = _best_fit([len(example.ids) for example in examples], length)
    tokens = np.full((len(rows), length), pad_id, np.int32)
    segment_ids = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), np.bool_)
    for row, numbers in enumerate(rows):
        begin = 0
        for segment, number in enumerate(numbers, start=1):
            ids, learned = examples[number]
            place = slice(begin, begin + len(ids))
            tokens[row, place], segment_ids[row, place], mask[row, place] = ids, segment, learned
            mask[row, begin] = False
            begin += len(ids)
    return Packed(tokens, segment_ids, mask)


def pack_rows(
    row_sets: Mapping[str, Placed], tokenizer: Any, *, chat: bool, max_length: int, learn_prompt: bool = False
) -> tuple[list[Packed], list[str]]:
    """Turn sets of checked rows into token ids and pack them.

    Args:
      row_sets: rows of `examples.check_examples`, by what they are called in notes and errors.
      tokenizer: a Hugging Face tokenizer.
      chat: as in `examples.encode_examples`.
      max_length: tokens of a packed row, and of an example at most.
      learn_prompt: as in `examples.encode_examples`.

    Returns:
      The packed rows of each set, and lines for the user: what was left out or cut, and how many tokens there are.

    Raises:
      UserError: as in `examples.encode_examples`, with the set's name in front.

    Example:
      >>> from tokenizers import Tokenizer, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> letters = Tokenizer(models.BPE(vocab={"e": 0, "a": 1, "b": 2}, merges=[]))
      >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="e")
      >>> (packed,), notes = pack_rows({"training": [("line 1", {"text": "ab"})]}, tokenizer, chat=False, max_length=4)
      >>> packed.tokens.tolist(), notes
      ([[1, 2, 0, 0]], ['training data: 1 examples, 2 tokens to learn, in 1 rows of 4 tokens, 75.0% full'])
    """
    sets, notes = [], []
    for name, placed in row_sets.items():
        try:
            found = encode_examples(placed, tokenizer, chat=chat, max_length=max_length, learn_prompt=learn_prompt)
        except UserError as error:
            raise UserError(f"{name} data: {error}") from error
        packed = pack(found.examples, max_length)
        learned, full = packed.mask.sum(), (packed.segment_ids > 0).mean()
        counted = (
            f"{len(found.examples):,} examples, {learned:,} tokens to learn, "
            f"in {len(packed.tokens):,} rows of {max_length} tokens, {full:.1%} full"
        )
        sets.append(packed)
        notes += [f"{name} data: {note}" for note in (*found.notes(), counted)]
    return sets, notes


def _best_fit(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Assign examples, by index, to rows: the longest first, each to the fullest row that still holds it."""
    worst = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[worst] > length or min(lengths) < 1:
        raise UserError(f"examples have {min(lengths)} to {lengths[worst]} tokens: each needs 1 to {length}")
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free places, row), sorted
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        found = bisect.bisect_left(rooms, (lengths[number], 0))
        if found == len(rooms):
            room, row = length, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(found)
        rows[row].append(number)
        if room > lengths[number]:
            bisect.insort(rooms, (room - lengths[number], row))
    return rows
