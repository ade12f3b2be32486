"""Prompts: rows that are checked, turned into token ids, and completions turned back into text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pgjax.core.errors import UserError
from pgjax.data.tables import Placed, Row, as_messages, check_messages, check_same_columns, check_text
from pgjax.data.templates import Message

Prompt = str | Sequence[Message]
TOOLS = "tools"  # the column of a prompt's tools


def check_rows(placed: Placed) -> list[Row]:
    """Check that every row has a valid prompt, and that all rows have the same columns.

    Args:
      placed: rows with their locations; at least one.

    Returns:
      The rows without locations; a prompt that is a JSON list of messages is parsed.

    Raises:
      UserError: naming the row.

    Example:
      >>> check_rows([("row 0", {"prompt": "Write"})])
      [{'prompt': 'Write'}]
    """
    for place, row in placed:
        if isinstance(row, Mapping) and "prompt" not in row:
            listed = ", ".join(map(repr, row)) or "none"
            raise UserError(f"{place}: there is no column 'prompt'; the columns are {listed}")
    check_same_columns(placed)
    rows = [{**row, "prompt": as_messages(place, "the prompt", row["prompt"])} for place, row in placed]
    for (place, _), row in zip(placed, rows, strict=True):
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
      The schemas; None where there are none.

    Raises:
      UserError: naming the row.

    Example:
      >>> as_tools("line 2", '[{"name": "clock", "default": null}]'), as_tools("line 3", [{"name": "clock", "default": None}])
      ([{'name': 'clock', 'default': None}], [{'name': 'clock'}])
    """
    tools = value
    if isinstance(value, str) and value.strip():
        try:
            tools = json.loads(value)
        except (ValueError, RecursionError):
            tools = None
    if value is None or value == "" or (isinstance(tools, list) and not tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(
            f"{place}: the column 'tools' is {str(value)[:80]!r}, not a list of JSON schemas: write it so, or rename the column"
        )
    return tools if isinstance(value, str) else [_without_none(tool) for tool in tools]


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(x) for key, x in value.items() if x is not None}
    return [_without_none(x) for x in value] if isinstance(value, list) else value


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Any, *, chat: bool, max_length: int | None, place: str | None = None
) -> list[list[int]]:
    """Turn prompts into token ids, with the chat template if `chat`.

    Args:
      prompts: texts, or lists of messages (then ``chat`` must be True).
      tokenizer: a Hugging Face tokenizer.
      chat: True renders each prompt with the tokenizer's chat template, a text as one user message, and opens
        the assistant's turn; False encodes the text as it is, with the special tokens that the tokenizer
        adds.
      max_length: longest prompt allowed, in tokens; None is no limit. Nothing is truncated.
      place: the prompt's name in messages; None: its number among these.

    Returns:
      The ids of each prompt, unpadded.

    Raises:
      UserError: the chat template is missing or refuses a prompt, a list of messages without ``chat``, an empty prompt, or one
        longer than ``max_length``.

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
            raise UserError(
                f"{called} has {len(ids)} tokens, the limit is {max_length}: shorten it, "
                f"ask for fewer new tokens, or use a model with more positions. It begins {str(prompt)[:80]!r}"
            )
        encoded.append(ids)
    return encoded


def completion_texts(tokens: Any, mask: Any, tokenizer: Any) -> list[str]:
    """Decode what the policy sampled in each row, without the special tokens.

    Args:
      tokens: [B, T] token ids, prompt and all.
      mask: [B, T] bool, True where the policy sampled the token.
      tokenizer: a Hugging Face tokenizer.

    Returns:
      [B] texts.

    Raises:
      UserError: the shapes differ.

    Example:
      >>> class Letters:  # stands in for a tokenizer
      ...     def decode(self, ids, skip_special_tokens):
      ...         return "".join(chr(i) for i in ids if i != 0)
      >>> completion_texts([[97, 98, 99, 0]], [[False, True, True, True]], Letters())
      ['bc']
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask, np.bool_)
    if tokens.ndim != 2 or tokens.shape != mask.shape:
        raise UserError(f"tokens {tokens.shape} and mask {mask.shape} must be of one shape [B, T]")
    pairs = zip(tokens, mask, strict=True)
    return [tokenizer.decode(row[sampled].tolist(), skip_special_tokens=True) for row, sampled in pairs]


def encode_prompt(prompt: Prompt, tokenizer: Any, *, chat: bool, place: str) -> list[int]:
    """Turn one prompt into token ids, as `encode_prompts` does; `place` is its name in messages."""
    if chat:
        if tokenizer.chat_template is None:
            raise UserError(f"{place}: the tokenizer has no chat template: use an instruct model, or chat=False")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        except Exception as error:  # a template is a program of its own: it may fail with anything
            raise UserError(
                f"{place}: the chat template refuses it ({error}); it begins {str(prompt)[:80]!r}"
            ) from error
    elif isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        raise UserError(f"{place} is a list of messages: use chat=True, or write it as a text")
    if not ids:
        raise UserError(f"{place} has no tokens: {prompt!r}")
    return [int(i) for i in ids]
