"""Prompts: rows that are checked, turned into token ids, and completions turned back into text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pgjax.core.errors import UserError
from pgjax.data.messages import conversation, listed, without_nulls
from pgjax.data.tables import Placed, Row, as_messages, check_messages, check_same_columns, check_text
from pgjax.data.templates import Message, render
from pgjax.data.tokens import added_text, encode_texts, special_ids
from pgjax.models.io.stops import stop_ids

Prompt = str | Sequence[Message]
TOOLS = "tools"  # the column of a prompt's tools


def check_rows(placed: Placed) -> list[Row]:
    """Check rows as `check_prompts` does, and give them without their locations.

    Args:
      placed: rows with their locations; at least one.

    Returns:
      The rows; a prompt that is a JSON list of messages is parsed.

    Raises:
      UserError: naming the row.

    Example:
      >>> check_rows([("row 0", {"prompt": "Write"})])
      [{'prompt': 'Write'}]
    """
    return [row for _, row in check_prompts(placed)]


def check_prompts(placed: Placed) -> list[tuple[str, Row]]:
    """Check that every row has a valid prompt, and that all rows have the same columns.

    Args:
      placed: rows with their locations; at least one.

    Returns:
      The rows with their locations; a prompt that is a JSON list of messages is parsed.

    Raises:
      UserError: naming the row.

    Example:
      >>> check_prompts([("row 0", {"prompt": '[{"role": "user", "content": "Hi"}]'})])
      [('row 0', {'prompt': [{'role': 'user', 'content': 'Hi'}]})]
    """
    for place, row in placed:
        if isinstance(row, Mapping) and "prompt" not in row:
            listed = ", ".join(map(repr, row)) or "none"
            raise UserError(f"{place}: there is no column 'prompt'; the columns are {listed}")
    check_same_columns(placed)
    rows = [(place, {**row, "prompt": as_messages(place, "the prompt", row["prompt"])}) for place, row in placed]
    for place, row in rows:
        check_prompt(place, row["prompt"])
    return rows


def check_prompt(place: str, prompt: object) -> None:
    """Check that a value can be a prompt: a text that is not empty, or a list of messages.

    Args:
      place: location of its row, for messages.
      prompt: the value.

    Raises:
      UserError: naming the row.

    Example:
      >>> check_prompt("line 3", "")
      Traceback (most recent call last):
      pgjax.UserError: line 3: the prompt is empty
    """
    if isinstance(prompt, list):
        check_messages(place, "the prompt", prompt)
    elif not isinstance(prompt, str):
        raise UserError(f"{place}: the prompt is {prompt!r}, not a text or a list of messages")
    else:
        check_text(place, "the prompt", prompt)
        if not prompt:
            raise UserError(f"{place}: the prompt is empty")


def as_tools(place: str, value: Any) -> list[Any] | None:
    """Read the tools of a prompt: a list of JSON schemas, or such a list in JSON text, as a CSV file holds one.

    Args:
      place: location of its row, for messages.
      value: the value of the column ``tools``. Keys of a schema that are None are left out, but for those of a JSON text: data
        sets put a key into all schemas that one has.

    Returns:
      The schemas; None where there are none: NaN, null, an empty text or list.

    Raises:
      UserError: naming the row.

    Example:
      >>> as_tools("line 2", '[{"name": "clock", "default": null}]'), as_tools("line 3", [{"name": "clock", "default": None}])
      ([{'name': 'clock', 'default': None}], [{'name': 'clock'}])
    """
    tools = value = listed(value)
    if isinstance(value, str):
        try:
            tools = json.loads(value)
        except (ValueError, RecursionError):
            tools = None
    is_nothing = value is None or value != value or (isinstance(value, str) and value.strip() in _NO_TOOLS)
    if is_nothing or (isinstance(tools, list) and not tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(
            f"{place}: the column 'tools' is {str(value)[:80]!r}, not a list of JSON schemas: write it so, or rename the column"
        )
    return tools if isinstance(value, str) else without_nulls(tools)


_NO_TOOLS = ("", "null", "None", "nan")  # as tables write that there is nothing


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Any, *, chat: bool, max_length: int | None = None,
    places: Sequence[str] | None = None, tools: Sequence[Any] | None = None,
) -> list[list[int]]:  # fmt: skip
    """Turn prompts into token ids that a completion goes on from, with the chat template if `chat`.

    A prompt begins with what the tokenizer puts in front of a text, once, and does not end with what it puts behind one.

    Args:
      prompts: texts, or lists of messages (then ``chat`` must be True).
      tokenizer: a fast Hugging Face tokenizer.
      chat: True renders each prompt with the tokenizer's chat template, a text as one user message, and opens the assistant's
        turn, or goes on with it where the last message is the assistant's; False encodes the text as it is.
      max_length: longest prompt allowed, in tokens; None is no limit. Nothing is truncated.
      places: the prompts' names in messages; None: their numbers.
      tools: of each prompt, what its chat template is told of tools, as `as_tools` takes it; None: no prompt has any.

    Returns:
      The ids of each prompt, unpadded.

    Raises:
      UserError: the chat template is missing or refuses a prompt, a list of messages without ``chat``, an empty prompt, one
        longer than ``max_length``, or tools that are none.

    Example:
      >>> from tokenizers import Tokenizer, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> letters = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2}, merges=[]))
      >>> encode_prompts(["ab", "c"], PreTrainedTokenizerFast(tokenizer_object=letters), chat=False, max_length=4)
      [[0, 1], [2]]
    """
    if places is None:
        places = [f"prompt {row} (counted from 0)" for row in range(len(prompts))]
    given = [None] * len(prompts) if tools is None else tools
    texts = [
        _text(prompt, tokenizer, chat=chat, place=place, tools=mine)
        for place, prompt, mine in zip(places, prompts, given, strict=True)
    ]
    encoded = encode_texts(texts, tokenizer, special=not chat)  # a chat template writes special tokens itself
    for place, prompt, ids in zip(places, prompts, encoded, strict=True):
        if not ids:
            raise UserError(f"{place} has no tokens: {prompt!r}")
        if max_length is not None and len(ids) > max_length:
            raise UserError(
                f"{place} has {len(ids)} tokens, the limit is {max_length}: shorten it, "
                f"ask for fewer new tokens, or use a model with more positions. It begins {str(prompt)[:80]!r}"
            )
    return encoded


def _text(prompt: Prompt, tokenizer: Any, *, chat: bool, place: str, tools: Any) -> str:
    """Write a prompt as the text that is tokenised."""
    if chat:
        return render(conversation(prompt), tokenizer, place=place, tools=as_tools(place, tools))
    if not isinstance(prompt, str):
        raise UserError(f"{place} is a list of messages: use chat=True, or write it as a text")
    return prompt


def completion_texts(tokens: Any, mask: Any, tokenizer: Any, *, keep_special: bool = False) -> list[str]:
    """Give the text that what the policy sampled in each row adds to what stands before it.

    That is not the text of the sampled ids alone, of which many tokenizers leave out the first space: after "The film was", the
    token ▁great adds " great". The stop token that ended a completion is never part of its text.

    Args:
      tokens: [B, T] token ids, prompt and all.
      mask: [B, T] bool, True where the policy sampled the token.
      tokenizer: a Hugging Face tokenizer.
      keep_special: write special tokens too, as ``<think>``; False leaves them out.

    Returns:
      [B] texts.

    Raises:
      UserError: the shapes differ.

    Example:
      >>> from tokenizers import Tokenizer, decoders, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> words = Tokenizer(models.WordLevel({"</s>": 0, "▁The": 1, "▁sun": 2, "<b>": 3}, unk_token="</s>"))
      >>> words.decoder = decoders.Metaspace()
      >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", extra_special_tokens=["<b>"])
      >>> row = [[1, 3, 2, 0]], [[False, True, True, True]]
      >>> completion_texts(*row, tokenizer), completion_texts(*row, tokenizer, keep_special=True)
      ([' sun'], ['<b> sun'])
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask, np.bool_)
    if tokens.ndim != 2 or tokens.shape != mask.shape:
        raise UserError(f"tokens {tokens.shape} and mask {mask.shape} must be of one shape [B, T]")
    left_out = frozenset() if keep_special else special_ids(tokenizer)
    stops = frozenset(stop_ids(tokenizer))

    def text(row: list[int], where: np.ndarray) -> str:
        if where.size and row[where[-1]] in stops:
            where = where[:-1]
        turns = np.split(where, np.flatnonzero(np.diff(where) > 1) + 1)  # what stands between them is not the policy's
        ids = ([row[i] for i in turn if row[i] not in left_out] for turn in turns)
        return "".join(added_text(row[: turn[0]], new, tokenizer) for turn, new in zip(turns, ids, strict=True) if new)

    return [text(row.tolist(), np.flatnonzero(sampled)) for row, sampled in zip(tokens, mask, strict=True)]


def completion_ids(tokens: Any, mask: Any) -> list[list[int]]:
    """List the ids that the policy sampled in each row, the one that ended it included.

    Args:
      tokens: [B, T] token ids, prompt and all.
      mask: [B, T] bool, True where the policy sampled the token.

    Returns:
      [B] lists.

    Example:
      >>> completion_ids([[5, 6, 2], [5, 2, 0]], [[False, True, True], [False, True, False]])
      [[6, 2], [2]]
    """
    pairs = zip(np.asarray(tokens), np.asarray(mask, np.bool_), strict=True)
    return [row[sampled].tolist() for row, sampled in pairs]
