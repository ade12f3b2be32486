"""Chat templates: messages rendered as text, with the settings that a tokenizer carries for its template."""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pgjax.core.errors import UserError

Message = Mapping[str, Any]
TEMPLATE_ARGS = "chat_template_args"  # settings of the tokenizer, so that tokenizer_config.json saves them
TEMPLATE_DATE = "chat_template_date"


def set_template(tokenizer: Any, *, args: Mapping[str, Any] | None = None, date: str | None = None) -> Any:
    """Fix what a tokenizer's chat template is given beside the messages: in the tokenizer, which saves it.

    Args:
      tokenizer: a Hugging Face tokenizer, changed in place; None, of a source without one, stays None.
      args: variables of the template, as ``{"enable_thinking": False}``; None leaves those that it carries.
      date: what templates that write today's date write instead, as 2026-11-30, so that a run that goes on tomorrow reads the
        same prompts; None leaves the one that it carries, and without a template there is none to carry.

    Returns:
      The same tokenizer.

    Raises:
      UserError: there are arguments, but no chat template or none that names them; or no such date.

    Example:
      >>> from tokenizers import Tokenizer, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
      >>> tokenizer.chat_template = "{{ messages[0]['content'] }}{% if shout %}!{% endif %}"
      >>> render([{"role": "user", "content": "Hi"}], set_template(tokenizer, args={"shout": True}), place="row 0")
      'Hi!'
    """
    if tokenizer is None:
        return None
    if args is not None:
        template = tokenizer.chat_template
        if args and template is None:
            raise UserError(f"the tokenizer has no chat template that could take {dict(args)}")
        texts = template.values() if isinstance(template, Mapping) else [template]
        for name in args:
            if not any(re.search(rf"\b{re.escape(name)}\b", text) for text in texts):
                raise UserError(f"the chat template names no {name!r}, so to set it would change nothing")
        tokenizer.init_kwargs[TEMPLATE_ARGS] = dict(args)
    if date is not None:
        _as_date(date)
        if tokenizer.chat_template is not None:
            tokenizer.init_kwargs[TEMPLATE_DATE] = date
    return tokenizer


def render(
    messages: Sequence[Message], tokenizer: Any, *, place: str, open_turn: bool = True, tools: Any = None
) -> str:
    """Render messages with the tokenizer's chat template.

    Args:
      messages: at least one. Keys of a message that are None are left out: data sets put a key into all that one has.
      tokenizer: a Hugging Face tokenizer.
      place: where the messages stand, for errors.
      open_turn: end in an opened turn of the assistant: a new one, or the last message where that is the assistant's, whose
        words go on.
      tools: descriptions of tools, as JSON schemas; None: no tools.

    Returns:
      The text.

    Raises:
      UserError: there is no chat template, or it refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{place}: the tokenizer has no chat template: use an instruct model, or chat=False")
    given = [{name: value for name, value in message.items() if value is not None} for message in messages]
    goes_on = open_turn and given[-1]["role"] == "assistant"
    try:
        template = tokenizer.get_chat_template(None, tools)
        return str(
            tokenizer.apply_chat_template(
                given, chat_template=_dated(template, tokenizer.init_kwargs.get(TEMPLATE_DATE)), tools=tools or None,
                add_generation_prompt=open_turn and not goes_on, continue_final_message=goes_on, tokenize=False,
                **tokenizer.init_kwargs.get(TEMPLATE_ARGS, {}),
            )
        )  # fmt: skip
    except Exception as error:  # a template is a program of its own: it may fail with anything
        begins = str(messages[-1].get("content"))[:80]
        raise UserError(
            f"{place}: the chat template refuses the messages ({error}); the last begins {begins!r}"
        ) from error


@functools.lru_cache
def _dated(template: str, date: str | None) -> str:
    """Write a date into a template in place of its calls for today's: a function given to it would not reach it."""
    if date is None:
        return template
    day = _as_date(date)
    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda call: repr(day.strftime(call[2])), template)


def _as_date(text: str) -> datetime.datetime:
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%d")
    except ValueError:
        raise UserError(f"the date of the chat template is {text!r}, not one like 2026-11-30") from None
