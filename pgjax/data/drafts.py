"""Drafts of examples for fine-tuning: a row's text, cut where the answers begin that are learned."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from pgjax.data.messages import all_text, conversation, joined, says_anything, words, writes_calls
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
OPENED_OTHERWISE = (
    "the answer is learned as the chat template writes it in a conversation, not behind all that opens a turn"
)
THOUGHT_DROPPED = "the chat template leaves out the answer's thought, which is not learned"
OPENED_TWICE = "the answer begins with the tag that the chat template opens the turn with, which is written once"
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
    answer, remarks = answer_behind(messages, opened, completion)
    remarks = [*unused_tools(tools, tokenizer), *remarks]
    return Draft([opened, answer], [len(answer)], [completion], special=False, remarks=remarks)


def answer_behind(messages: Sequence[Message], opened: str, answer: str) -> tuple[str, list[str]]:
    """Write the text of an answer as it goes on behind an opened turn.

    Args:
      messages: those before the answer.
      opened: what `templates.render` makes of them.
      answer: the text.

    Returns:
      The text, with the space that the template leaves out, and without a tag that the template has written; and what is to be
      said of that.

    Example:
      >>> answer_behind([{"role": "user", "content": "1 + 1?"}], "1 + 1?<think>", "<think>So</think>2")[0]
      'So</think>2'
    """
    tag = _OPENING_TAG.search(opened)
    if tag is None or messages[-1]["role"] == "assistant" or not answer.lstrip().startswith(tag[1]):
        return dropped_space(messages, opened) + answer, []
    return answer.lstrip().removeprefix(tag[1]).removeprefix(tag[2]), [OPENED_TWICE]


_OPENING_TAG = re.compile(r"(<[^<>\s/]+>)(\s*)\Z")


def write_answer(
    place: str, given: Sequence[Message], answer: Message, tokenizer: Any, tools: Any
) -> tuple[str, str, list[str]] | str:
    """Write a message as the answer to others, as the chat template does in a conversation.

    Args:
      place: where the messages stand, for errors.
      given: the messages before; the words of a last one of the assistant go on.
      answer: the assistant's message.
      tokenizer: a Hugging Face tokenizer.
      tools: as for `templates.render`.

    Returns:
      The text before the answer, the text of the answer and what the template puts behind it, and what is to be said of them;
      or the reason why that cannot be told.
    """
    show = functools.partial(render, tokenizer=tokenizer, place=place, tools=tools)
    goes_on = given[-1]["role"] == "assistant"
    closed = show([*given[:-1], joined(given[-1], answer)] if goes_on else [*given, answer], open_turn=False)
    opened = _opening(answer, show(given), closed, lambda: show(given[:-1] if goes_on else given, open_turn=False))
    if isinstance(opened, str):
        return opened
    before, remarks = opened
    losses = _losses(answer, before, closed)
    return losses if isinstance(losses, str) else (before, closed[len(before) :], remarks + losses)


def _turns(place: str, given: Sequence[Message], added: Sequence[Message], tokenizer: Any, tools: Any) -> Draft | str:
    """Write a conversation, cut where the assistant's turns behind the given messages begin."""
    goes_on = len(given) > 0 and given[-1]["role"] == added[0]["role"] == "assistant"
    messages = [*given[:-1], joined(given[-1], added[0]), *added[1:]] if goes_on else [*given, *added]
    begin = len(given) - goes_on if given else 1  # an assistant's opening turn answers nothing: not learned
    spoken = [n for n in range(begin, len(messages)) if messages[n]["role"] == "assistant"]
    numbers = [n for n in spoken if says_anything(messages[n])]
    if not numbers:
        return "without an answer to learn"
    remarks = unused_tools(tools, tokenizer)
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
            before = equal_until(encode_texts([context], tokenizer, special=False)[0], tagged[0]) if context else 0
            return Draft([closed[-1]], [], list(map(all_text, turns)), False, remarks, tagged, before)
        remarks += [LAST_ONLY] if len(numbers) > 1 else []
        turns, opened, closed = turns[-1:], opened[-1:], closed[-1:]
        last = numbers[-1]
        found = _opening(turns[0], opened[0], closed[0], lambda: show(messages[:last], open_turn=False))
        if isinstance(found, str):
            return found
        opened, remarks = [found[0]], remarks + found[1]
    losses = [_losses(*turn) for turn in zip(turns, opened, closed, strict=True)]
    for loss in losses:
        if isinstance(loss, str):
            return loss
        remarks += [remark for remark in loss if remark not in remarks]
    ends = [len(after) - len(before) for before, after in zip(opened, closed, strict=True)]
    parts = [after[len(before) :] for before, after in itertools.pairwise(["", *opened, closed[-1]])]
    return Draft(parts, ends, list(map(all_text, turns)), False, remarks, tagged)


def _opening(turn: Message, opened: str, closed: str, bare: Callable[[], str]) -> tuple[str, list[str]] | str:
    """Give the text before a last turn, and what is to be said of it; or the reason why it cannot be found.

    Where a conversation does not begin as the opened turn does, a turn begins behind what both have in common, if that holds all
    messages before it, which `bare` renders.
    """
    if closed.startswith(opened):
        return opened, []
    begins = [re.sub(r"<[^<>\s]*\Z", "", closed[: equal_until(opened, closed)])]  # before a tag that is another one
    spoken = words(turn).strip()
    if spoken and spoken in closed:  # of which the first letters may be those of what opens a turn
        begins.append(closed[: closed.rindex(spoken)])
    begin = next((x for x in begins if _losses(turn, x, closed) == []), begins[0])
    return (begin, [OPENED_OTHERWISE]) if begin.startswith(bare()) else REWRITTEN


def _losses(turn: Message, opened: str, closed: str) -> str | list[str]:
    """Say what a template leaves out of a turn: a reason to leave the row out, or what is to be said of it."""
    text = closed[len(opened) :]
    if not text or not writes_calls(turn, text):
        return UNWRITTEN
    tag = _OPENING_TAG.search(opened)
    shown, spoken = _letters((tag[0] if tag else "") + text), words(turn)
    if _letters(spoken) in shown:
        return []
    thought, _, rest = spoken.rpartition("</think>")
    if not thought or not rest.strip() or _letters(rest) not in shown:
        return UNWRITTEN
    return [THOUGHT_DROPPED] if thought.strip().removeprefix("<think>").strip() else []


def _letters(text: str) -> str:
    return "".join(text.split())


def _is_growing(texts: Iterable[str]) -> bool:
    return all(after.startswith(before) for before, after in itertools.pairwise(texts))


def equal_until(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Count the ids, or letters, that two rows have in common from the first on."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def unused_tools(tools: Any, tokenizer: Any) -> list[str]:
    """Say of tools that the chat template does not write them."""
    return [UNUSED_TOOLS] if tools and not names_tools(tokenizer, tools) else []
