"""What a tokenizer's chat template is given beside the messages: its variables and its date, settings of the tokenizer."""

from __future__ import annotations

import datetime
import inspect
import re
from collections.abc import Mapping
from typing import Any

from pgjax.core.errors import UserError

ARGS = "chat_template_args"  # settings of the tokenizer, so that tokenizer_config.json saves them
DATE = "chat_template_date"


def set_template(tokenizer: Any, *, args: Mapping[str, Any] | None = None, date: str | None = None) -> Any:
    """Fix what a tokenizer's chat template is given beside the messages: in the tokenizer, which saves it.

    Args:
        tokenizer: a Hugging Face tokenizer, changed in place; None, of a source without one, stays None.
        args: variables of the template, as ``{"enable_thinking": False}``; None leaves those that it carries.
        date: what templates that write today's date write instead, as 2026-11-30, so that a run that goes on tomorrow reads
            the same prompts; None leaves the one that it carries, and without a template there is none to carry.

    Returns:
        The same tokenizer.

    Raises:
        UserError: there are arguments, but no chat template or none that names them, or that conversations give, as
            ``messages`` and ``tools``; or no such date.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
        >>> tokenizer.chat_template = "{{ messages[0]['content'] }}{% if shout %}!{% endif %}"
        >>> set_template(tokenizer, args={"shout": True}).init_kwargs["chat_template_args"]
        {'shout': True}
    """
    if tokenizer is None:
        return None
    if args is not None:
        template = tokenizer.chat_template
        if args and template is None:
            raise UserError(f"the tokenizer has no chat template that could take {dict(args)}")
        taken = {"messages", "strftime_now", *inspect.signature(tokenizer.apply_chat_template).parameters}
        if odd := sorted(taken & set(args)):
            raise UserError(f"{odd[0]!r} is no argument to set for the chat template: each conversation gives its own")
        texts = template.values() if isinstance(template, Mapping) else [template]
        for name in args:
            if not any(re.search(rf"\b{re.escape(name)}\b", text) for text in texts):
                raise UserError(f"the chat template names no {name!r}, so to set it would change nothing")
        tokenizer.init_kwargs[ARGS] = dict(args)
    if date is not None:
        as_date(date)
        if tokenizer.chat_template is not None:
            tokenizer.init_kwargs[DATE] = date
    return tokenizer


def as_date(text: str) -> datetime.datetime:
    """Read the date of a chat template.

    Raises:
        UserError: it is not one like 2026-11-30.

    Example:
        >>> as_date("2026-11-30").strftime("%d %b %Y")
        '30 Nov 2026'
    """
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%d")
    except ValueError:
        raise UserError(f"the date of the chat template is {text!r}, not one like 2026-11-30") from None
