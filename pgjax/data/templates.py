"""Chat templates: messages rendered as text, with the settings that a tokenizer carries for its template."""

from __future__ import annotations

import contextlib
import functools
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from pgjax.core.errors import UserError
from pgjax.models.io import chat_template
from pgjax.models.io.chat_template import as_date

Message = Mapping[str, Any]


def render(
    messages: Sequence[Message],
    tokenizer: Any,
    *,
    place: str,
    open_turn: bool = True,
    go_on: bool = True,
    tools: Any = None,
) -> str:
    """Render messages with the tokenizer's chat template.

    Args:
      messages: at least one. Keys of a message that are None are left out: data sets put a key into all that one has.
      tokenizer: a Hugging Face tokenizer.
      place: where the messages stand, for errors.
      open_turn: end in an opened turn of the assistant: a new one, or the last message where that is the assistant's, whose
        words go on.
      go_on: False opens a new turn there too.
      tools: descriptions of tools, as JSON schemas; None: no tools.

    Returns:
      The text.

    Raises:
      UserError: there is no chat template, or it refuses the messages.
    """
    goes_on = open_turn and go_on and messages[-1]["role"] == "assistant"
    opens = {"add_generation_prompt": open_turn and not goes_on, "continue_final_message": goes_on}
    return str(_applied(messages, tokenizer, place, tools, tokenize=False, **opens))


def tagged_tokens(
    messages: Sequence[Message], tokenizer: Any, *, place: str, tools: Any = None
) -> tuple[list[int], list[bool]] | None:
    """Render messages as ids, and tell which ones the template tags as the assistant's, by {% generation %}.

    Args:
      messages: as for `render`.
      tokenizer: a fast Hugging Face tokenizer.
      place: as for `render`.
      tools: as for `render`.

    Returns:
      The ids, and whether each is tagged; None where the template has no tags.

    Raises:
      UserError: as in `render`.

    Example:
      >>> from tokenizers import Tokenizer, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> letters = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "e": 2}, merges=[]))
      >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
      >>> tokenizer.chat_template = "a{% generation %}{{ messages[0]['content'] }}{% endgeneration %}e"
      >>> tagged_tokens([{"role": "assistant", "content": "b"}], tokenizer, place="row 0")
      ([0, 1, 2], [False, True, False])
    """
    if tokenizer.chat_template is None or not _TAG.search(tokenizer.get_chat_template(None, tools)):
        return None
    found = _applied(messages, tokenizer, place, tools, return_dict=True, return_assistant_tokens_mask=True)
    return list(found["input_ids"]), [bool(x) for x in found["assistant_masks"]]


_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _applied(messages: Sequence[Message], tokenizer: Any, place: str, tools: Any, **how: Any) -> Any:
    """Call the tokenizer's template with the settings that it carries."""
    if tokenizer.chat_template is None:
        raise UserError(f"{place}: the tokenizer has no chat template: use an instruct model, or chat=False")
    given = [{name: value for name, value in message.items() if value is not None} for message in messages]
    texts = [text for message in given if isinstance(text := message.get("content"), str) and text.strip()]
    settings = tokenizer.init_kwargs

    def attempt(given: Sequence[Message]) -> tuple[Any, str]:
        template = _dated(tokenizer.get_chat_template(None, tools), settings.get(chat_template.DATE))
        made = tokenizer.apply_chat_template(
            given, chat_template=template, tools=tools or None, **how, **settings.get(chat_template.ARGS, {})
        )
        return made, made if isinstance(made, str) else tokenizer.decode(made["input_ids"])

    refusal = None
    try:
        found, text = attempt(given)
        if not texts or any(words.strip() in text for words in texts):
            return found
    except Exception as error:  # a template is a program of its own: it may fail with anything
        found, refusal = None, error
    with contextlib.suppress(Exception):  # some templates take content in parts alone
        in_parts, text = attempt(list(map(_in_parts, given)))
        if all(words.strip() in text for words in texts) and "{'type'" not in text:
            return in_parts
    if found is None:
        begins = str(messages[-1].get("content"))[:80]
        raise UserError(
            f"{place}: the chat template refuses the messages ({refusal}); the last begins {begins!r}"
        ) from refusal
    return found


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def names_tools(tokenizer: Any, tools: Any) -> bool:
    """Say whether the chat template that tools would go to mentions them: many leave them out."""
    return "tools" in tokenizer.get_chat_template(None, tools)


def dropped_space(messages: Sequence[Message], opened: str) -> str:
    """Give the space that ends an assistant's last words where the template leaves it out: what goes on begins with it.

    Args:
      messages: as for `render`.
      opened: what `render` makes of them.

    Returns:
      The space; an empty text where none is missing.

    Example:
      >>> dropped_space([{"role": "assistant", "content": "It is "}], "<|assistant|>It is")
      ' '
    """
    last = messages[-1].get("content")
    if messages[-1]["role"] != "assistant" or not isinstance(last, str) or opened.endswith(last):
        return ""
    return last[len(last.rstrip()) :]


@functools.lru_cache
def _dated(template: str, date: str | None) -> str:
    """Let a template's calls for today's date write a given one, however it calls."""
    if date is None or "strftime_now" not in template:
        return template
    day = as_date(date)
    names = [mark + letter for mark in ("", "-") for letter in string.ascii_letters]
    written = {"\0": "%"} | {name: text for name in names if (text := day.strftime(f"%{name}")) != f"%{name}"}
    behind = re.sub(r"^[ \t]+(?=\{[%#](?!\+))", "", template)  # as lstrip_blocks does where a line begins
    return _FIXED_DATE.replace("WRITTEN", repr(written)) + behind


# A macro hides the function of the same name that transformers gives to templates; a function given to one would not reach it.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{%- set written = WRITTEN -%}"
    "{%- for part in format.replace('%%', '%\\0').split('%') -%}{{- part if loop.first"
    " else written[part[:2]] + part[2:] if part[:2] in written"
    " else written[part[:1]] + part[1:] if part[:1] in written else '%' + part -}}{%- endfor -%}{%- endmacro +%}"
)
