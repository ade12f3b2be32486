"""Drafts of examples for fine-tuning: a row's text, cut where the answers begin that are learned."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pgjax.data.messages import all_text, conversation, joined, says_anything, writes_calls
from pgjax.data.prompts import TOOLS
from pgjax.data.tables import Row
from pgjax.data.templates import Message, dropped_space, names_tools, render, tagged_tokens
from pgjax.data.tokens import encode_texts

REWRITTEN = (
    "the chat template rewrites earlier turns when a turn is added, so the tokens of that turn cannot be found "
    "(give prompts and completions instead)"
)
UNWRITTEN = "the chat template does not write the answer, or not its tool calls"
# What is said of rows that are kept, behind "in 2 rows".
LAST_ONLY = "only the last turn is learned, since the chat template rewrites earlier ones"
UNANSWERED = "the assistant's opening turn answers nothing and is not learned"
EMPTY_TURN = "an empty turn of the assistant is not learned"
UNUSED_TOOLS = "the tools are not used: only a chat template that names them writes them"


class Draft(NamedTuple):
    """The text of an example, cut where answers begin."""

    parts: list[str]  # the context, then each answer with what stands between it and the next
    ends: list[int]  # of each part but the first, how many characters the answer with its end takes
    answers: list[str]  # as the row has them: may hold an end of sequence at their end only
    special: bool  # whether the tokenizer puts something in front
    remarks: Sequence[str] = ()
    tagged: tuple[list[int], list[bool]] | None = None  # ids, and those that the chat template tags as the assistant's
    begin: int = 0  # the tokens before this one are context, though they are tagged


def write_draft(place: str, row: Row, tokenizer: Any, chat: bool) -> Draft | str:
    """Write the text of a row's example; a text is the reason why nothing can be learned from it."""
    if "text" in row:
        return Draft([row["text"]], [], [], special=True) if row["text"].strip() else "empty"
    tools = row.get(TOOLS)
    if "messages" in row:
        return _turns(place, [], row["messages"], tokenizer, tools)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(completion, list):
        if not all(says_anything(message) for message in completion if message["role"] == "assistant"):
            return "empty"
        return _turns(place, prompt, completion, tokenizer, tools)
    if not completion.strip():
        return "empty"
    if isinstance(prompt, str) and not chat:
        remarks = [UNUSED_TOOLS] if tools else []
        return Draft([prompt, completion], [len(completion)], [completion], special=True, remarks=remarks)
    messages = conversation(prompt)
    opened = render(messages, tokenizer, place=place, tools=tools)
    answer = dropped_space(messages, opened) + completion
    return Draft([opened, answer], [len(answer)], [completion], special=False, remarks=_unused(tools, tokenizer))


def _turns(place: str, given: Sequence[Message], added: Sequence[Message], tokenizer: Any, tools: Any) -> Draft | str:
    """Write a conversation, cut where the assistant's turns behind the given messages begin."""
    goes_on = len(given) > 0 and given[-1]["role"] == added[0]["role"] == "assistant"
    messages = [*given[:-1], joined(given[-1], added[0]), *added[1:]] if goes_on else [*given, *added]
    begin = len(given) - goes_on if given else 1  # an assistant's opening turn answers nothing: not learned
    spoken = [n for n in range(begin, len(messages)) if messages[n]["role"] == "assistant"]
    numbers = [n for n in spoken if says_anything(messages[n])]
    if not numbers:
        return "without an answer to learn"
    remarks = _unused(tools, tokenizer)
    remarks += [UNANSWERED] if not given and messages[0]["role"] == "assistant" else []
    remarks += [EMPTY_TURN] if len(numbers) < len(spoken) else []

    show = functools.partial(render, tokenizer=tokenizer, place=place, tools=tools)
    opened = [show(given) if goes_on and n == begin else show(messages[:n], go_on=False) for n in numbers]
    closed = [show(messages[: n + 1], open_turn=False) for n in numbers]
    turns = [added[0] if goes_on and n == begin else messages[n] for n in numbers]
    tagged = tagged_tokens(messages[: numbers[-1] + 1], tokenizer, place=place, tools=tools)
    if not _is_growing(itertools.chain.from_iterable(zip(opened, closed, strict=True))):
        context = opened[0] if goes_on or any(message["role"] == "assistant" for message in messages[:begin]) else ""
        if tagged is not None and closed[-1].startswith(context):
            before = _equal_until(encode_texts([context], tokenizer, special=False)[0], tagged[0]) if context else 0
            return Draft([closed[-1]], [], list(map(all_text, turns)), False, remarks, tagged, before)
        remarks += [LAST_ONLY] if len(numbers) > 1 else []
        turns, opened, closed = turns[-1:], opened[-1:], closed[-1:]
    draft = _cut(turns, opened, closed)
    return draft if isinstance(draft, str) else draft._replace(remarks=remarks, tagged=tagged)


def _cut(turns: Sequence[Message], opened: Sequence[str], closed: Sequence[str]) -> Draft | str:
    """Cut a conversation where turns begin, of which each is given opened and closed."""
    if not closed[0].startswith(opened[0]):
        return REWRITTEN
    texts = [after[len(before) :] for before, after in zip(opened, closed, strict=True)]
    if not all(text and writes_calls(turn, text) for turn, text in zip(turns, texts, strict=True)):
        return UNWRITTEN
    parts = [after[len(before) :] for before, after in itertools.pairwise(["", *opened, closed[-1]])]
    return Draft(parts, list(map(len, texts)), list(map(all_text, turns)), special=False)


def _is_growing(texts: Iterable[str]) -> bool:
    return all(after.startswith(before) for before, after in itertools.pairwise(texts))


def _equal_until(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _unused(tools: Any, tokenizer: Any) -> list[str]:
    return [UNUSED_TOOLS] if tools and not names_tools(tokenizer, tools) else []
