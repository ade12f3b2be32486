"""Prompts on their way to the model: encoded, padded, and dealt out in batches found by step number."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pgjax.masking import check_whole
from pgjax.prompts import Prompt

if TYPE_CHECKING:
    import grain

_SMALLEST_BUCKET = 16
_UINT32 = 2**32


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Any, *, chat: bool, max_length: int | None, place: str | None = None
) -> list[list[int]]:
    """Turn prompts into token ids, through the chat template where asked.

    Args:
      prompts: texts, or lists of messages (then ``chat`` must be True).
      tokenizer: a Hugging Face tokenizer.
      chat: True renders each prompt with the tokenizer's chat template, a text as one user message, and opens
        the assistant's turn; False encodes the text as it is, with the special tokens that the tokenizer
        adds.
      max_length: longest prompt allowed, in tokens; None is no limit. Nothing is ever cut.
      place: what an error calls the prompt that it is about; None: its number among these.

    Returns:
      The ids of each prompt, unpadded.

    Raises:
      ValueError: no chat template, one that refuses a prompt, messages without ``chat``, an empty prompt, or one longer than
        ``max_length``.

    Example:
      >>> class Letters:  # stands in for a tokenizer
      ...     def __call__(self, text):
      ...         return {"input_ids": [ord(letter) for letter in text]}
      >>> encode_prompts(["ab", "c"], Letters(), chat=False, max_length=4)
      [[97, 98], [99]]
    """
    encoded = []
    for row, prompt in enumerate(prompts):
        called = f"prompt {row} (counted from 0)" if place is None else place
        ids = encode_prompt(prompt, tokenizer, chat=chat, place=called)
        if max_length is not None and len(ids) > max_length:
            raise ValueError(
                f"{called} has {len(ids)} tokens, the limit is {max_length}: shorten it, "
                f"ask for fewer new tokens, or use a model with more positions. It begins {str(prompt)[:80]!r}"
            )
        encoded.append(ids)
    return encoded


def left_pad(ids: Sequence[Sequence[int]], pad_id: int, *, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pad sequences on the left, so that every prompt ends in the same column.

    Args:
      ids: token ids of each row, none empty.
      pad_id: the id put in the padding; it may well occur in the rows too, only the mask says what is
        padding.
      length: columns P of the result; None is the longest row.

    Returns:
      tokens [B, P] int32 and attention mask [B, P] bool, False on padding.

    Raises:
      ValueError: no rows, an empty row, or one longer than ``length``.

    Example:
      >>> tokens, mask = left_pad([[5, 6, 7], [8]], 0)
      >>> tokens.tolist(), mask.astype(int).tolist()
      ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])
    """
    if len(ids) == 0:
        raise ValueError("there are no rows to pad")
    lengths = [len(row) for row in ids]
    width = max(lengths) if length is None else length
    if min(lengths) == 0:
        raise ValueError(f"row {lengths.index(0)} (counted from 0) holds no tokens")
    if max(lengths) > width:
        raise ValueError(f"row {lengths.index(max(lengths))} has {max(lengths)} tokens, more than the length {width}")
    tokens = np.full((len(ids), width), pad_id, np.int32)
    mask = np.zeros((len(ids), width), np.bool_)
    for row, sequence in enumerate(ids):
        tokens[row, width - len(sequence) :] = sequence
        mask[row, width - len(sequence) :] = True
    return tokens, mask


def bucket_length(n: int) -> int:
    """Round a length up to 16, 24, 32, 48, 64, 96, 128, ...: 2^k and 1.5 * 2^k.

    A program is compiled for each padded length: at most two for each doubling, and less than half of a row
    wasted.

    Args:
      n: length in tokens, at least 1.

    Returns:
      The smallest such length that is at least ``n``.

    Raises:
      ValueError: n < 1.

    Example:
      >>> [bucket_length(n) for n in (1, 17, 32, 33, 49, 100)]
      [16, 24, 32, 48, 64, 128]
    """
    if n < 1:
        raise ValueError(f"a length of {n} tokens has no bucket: it starts at 1")
    bucket = _SMALLEST_BUCKET
    while bucket < n:
        if bucket + bucket // 2 >= n:
            return bucket + bucket // 2
        bucket *= 2
    return bucket


def completion_texts(tokens: Any, mask: Any, tokenizer: Any) -> list[str]:
    """Decode what the policy sampled in each row, without the special tokens.

    Args:
      tokens: [B, T] token ids, prompt and all.
      mask: [B, T] bool, True where the policy sampled the token.
      tokenizer: a Hugging Face tokenizer.

    Returns:
      [B] texts.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> class Letters:  # stands in for a tokenizer
      ...     def decode(self, ids, skip_special_tokens):
      ...         return "".join(chr(i) for i in ids if i != 0)
      >>> completion_texts([[97, 98, 99, 0]], [[False, True, True, True]], Letters())
      ['bc']
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask, np.bool_)
    if tokens.ndim != 2 or tokens.shape != mask.shape:
        raise ValueError(f"tokens {tokens.shape} and mask {mask.shape} must be of one shape [B, T]")
    pairs = zip(tokens, mask, strict=True)
    return [tokenizer.decode(row[sampled].tolist(), skip_special_tokens=True) for row, sampled in pairs]


def batches(
    rows: Sequence[Any], batch_size: int, *, seed: int, group_size: int = 1, own: Sequence[int] | None = None
) -> "grain.MapDataset[list[Any]]":
    """Deal rows out in batches for ever, in a new order each epoch; the step number is the only state.

    Epoch e is a permutation of the rows drawn from (seed, e), and the epochs follow each other without a gap,
    so a batch may hold the end of one and the start of the next, and no row is dropped. The batches are the same, whatever
    the number of processes; each is dealt its own part of them alone.

    Args:
      rows: anything that can be indexed.
      batch_size: places of a batch, B; may be larger than the number of rows, which then come more than once.
      seed: chooses the orders, 0 <= seed < 2^32.
      group_size: so many adjacent places of a batch get the same row; divides B.
      own: the places, in 0 to B - 1, that this process is dealt, as `shares.fed_rows` lists them; None is all.

    Returns:
      A grain dataset: ``ds[step]`` is the list of that step's rows, one for each own place.

    Raises:
      ValueError: no rows, a batch size that isn't a positive integer, one that the group size doesn't divide, an own place
        outside the batch, or a seed out of range.

    Example:
      >>> ds = batches(["a", "b", "c", "d"], 2, seed=0)
      >>> sorted(ds[0] + ds[1]), ds[1000] == ds[1000]
      (['a', 'b', 'c', 'd'], True)
      >>> batches(["a", "b", "c", "d"], 2, seed=0, own=[1])[0] == ds[0][1:]
      True
    """
    if len(rows) == 0:
        raise ValueError("there are no rows to make batches of")
    check_whole("batch_size", batch_size, 1)
    check_whole("group_size", group_size, 1)
    if batch_size % group_size:
        raise ValueError(f"a batch of {batch_size} does not divide into groups of {group_size}")
    places = range(batch_size) if own is None else list(own)
    outside = [place for place in places if not 0 <= place < batch_size]
    if outside:
        raise ValueError(
            f"place {outside[0]} is not in a batch of {batch_size}, whose places are 0 to {batch_size - 1}"
        )
    if not 0 <= seed < _UINT32:
        raise ValueError(f"seed is {seed}: it must be in [0, 2^32)")
    import grain  # here, because importing it takes a second that `import pgjax` should not

    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    steps = grain.MapDataset.range(len(order) // batch_size)

    def dealt(step: int) -> list[Any]:
        asked = [(step * batch_size + place) // group_size for place in places]
        found = {
            index: order[index] for index in dict.fromkeys(asked)
        }  # once a group: an index takes a few ms of few rows
        return [found[index] for index in asked]

    return steps.map(dealt)


def split_rows(rows: Sequence[Any], held_out: int, seed: int) -> tuple[list[Any], list[Any]]:
    """Split rows at random into training and held-out ones, each in file order.

    Args:
      rows: all rows.
      held_out: how many to hold out, 0 <= held_out < len(rows).
      seed: chooses which.

    Returns:
      The training rows and the held-out rows.

    Raises:
      ValueError: held_out out of range.

    Example:
      >>> train, held_out = split_rows(list("abcde"), 2, seed=0)
      >>> len(train), len(held_out), sorted(train + held_out)
      (3, 2, ['a', 'b', 'c', 'd', 'e'])
    """
    if not 0 <= held_out < len(rows):
        raise ValueError(f"can't hold out {held_out} of {len(rows)} rows: at least one must be left to train on")
    chosen = set(np.random.default_rng(seed).permutation(len(rows))[:held_out].tolist())
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [rows[index] for index in sorted(chosen)]


def encode_prompt(prompt: Prompt, tokenizer: Any, *, chat: bool, place: str) -> list[int]:
    """Turn one prompt into token ids, as `encode_prompts` does; an error says where it stands."""
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{place}: the tokenizer has no chat template: use an instruct model, or encode without chat (--no-chat)"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        except Exception as error:  # a template is a program of its own: it may fail with anything
            raise ValueError(
                f"{place}: the chat template refuses it ({error}); it begins {str(prompt)[:80]!r}"
            ) from error
    elif isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        raise ValueError(f"{place} is a list of messages: it needs the chat template, or write it as a text")
    if not ids:
        raise ValueError(f"{place} has no tokens: {prompt!r}")
    return [int(i) for i in ids]
