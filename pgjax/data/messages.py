"""Messages of a conversation: their words, and the tool calls that one may hold in place of words."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pgjax.data.templates import Message


def conversation(prompt: str | Sequence[Message]) -> Sequence[Message]:
    """Give a prompt as messages: a text is the user's.

    Args:
      prompt: a text or a list of messages.

    Returns:
      The messages.

    Example:
      >>> conversation("Hi")
      [{'role': 'user', 'content': 'Hi'}]
    """
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def is_like(keys: Collection[Any]) -> bool:
    """Say whether these are the keys of a message.

    Args:
      keys: of a dict.

    Returns:
      Whether they are.

    Example:
      >>> is_like({"role": "user", "content": "Hi"}), is_like({"role": "user"})
      (True, False)
    """
    return "role" in keys and ("content" in keys or "tool_calls" in keys)


def without_nulls(value: Any) -> Any:
    """Leave out keys that are None, also inside: data sets put a key into all records that one has.

    Args:
      value: dicts and lists, and what else they hold.

    Returns:
      The same without them.

    Example:
      >>> without_nulls([{"name": "clock", "default": None}])
      [{'name': 'clock'}]
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(x) for key, x in value.items() if x is not None}
    return [without_nulls(x) for x in value] if isinstance(value, list) else value


def listed(value: Any) -> Any:
    """Turn tuples and arrays of objects into lists, also inside, as pandas and NumPy hold messages.

    Args:
      value: dicts, lists, tuples and arrays, and what else they hold.

    Returns:
      The same of dicts and lists.

    Example:
      >>> listed(({"role": "user", "content": ("a",)},))
      [{'role': 'user', 'content': ['a']}]
    """
    if isinstance(value, str):
        return value
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {key: listed(x) for key, x in value.items()}
    return [listed(x) for x in value] if isinstance(value, list | tuple) else value


def words(message: Message) -> str:
    """Give the text of a message's content, which may be none, or parts of text.

    Args:
      message: with or without the key ``content``.

    Returns:
      The text; an empty one where there is none.

    Example:
      >>> words({"role": "user", "content": [{"type": "text", "text": "Hi"}]}), words({"role": "assistant", "content": None})
      ('Hi', '')
    """
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def all_text(message: Message) -> str:
    """Give a message's words and its tool calls as one text.

    Args:
      message: of any role.

    Returns:
      The words, and behind them the calls in JSON.

    Example:
      >>> all_text({"role": "assistant", "tool_calls": [{"function": {"name": "clock"}}]})
      '[{"function": {"name": "clock"}}]'
    """
    calls = message.get("tool_calls")
    return words(message) + (json.dumps(calls, ensure_ascii=False, default=str) if calls else "")


def says_anything(message: Message) -> bool:
    """Say whether a message holds words that are not all space, or tool calls.

    Args:
      message: of any role.

    Returns:
      Whether it does.

    Example:
      >>> says_anything({"role": "assistant", "content": " "})
      False
    """
    return bool(words(message).strip() or message.get("tool_calls"))


def writes_calls(message: Message, text: str) -> bool:
    """Say whether a text names all functions that a message calls: many chat templates leave tool calls out.

    Args:
      message: of any role.
      text: what a template makes of it.

    Returns:
      Whether it does; True where nothing is called.

    Example:
      >>> writes_calls({"role": "assistant", "tool_calls": [{"function": {"name": "clock"}}]}, "<|assistant|>")
      False
    """
    calls = message.get("tool_calls") or []
    return all(str((call.get("function") or call).get("name") or "") in text for call in calls)


def joined(message: Message, added: Message) -> Message:
    """Let a message's words go on with those of another one.

    Args:
      message: the first.
      added: the second; its other keys count.

    Returns:
      One message.

    Example:
      >>> joined({"role": "assistant", "content": "It is"}, {"role": "assistant", "content": " late."})
      {'role': 'assistant', 'content': 'It is late.'}
    """
    return {**message, **added, "content": words(message) + words(added)}
