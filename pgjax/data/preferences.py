"""Preferences: rows with two answers to one prompt, checked and turned into token ids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pgjax.core.errors import UserError
from pgjax.data.batches import split_rows
from pgjax.data.drafts import UNUSED_TOOLS, answer_behind, unused_tools, write_answer
from pgjax.data.messages import conversation, says_anything, words
from pgjax.data.prompts import TOOLS, Prompt, as_tools, check_prompt
from pgjax.data.sources import load_rows
from pgjax.data.tables import (
    Placed,
    Row,
    as_messages,
    check_messages,
    check_same_columns,
    check_text,
    left_out_notes,
    note,
)
from pgjax.data.templates import Message, dropped_space, render
from pgjax.data.tokens import INSIDE, encode_parts, stopped_inside
from pgjax.models.io.stops import end_id, stop_ids

STOPPED = "an end of sequence inside the answer"
DIALOGUE = "\n\nAssistant:"  # opens an answer in pairs that are written as two whole dialogues
TEMPLATED = "prompts_were_templated"  # a tokenizer's setting: was a reward model trained with its chat template?


class Answered(NamedTuple):
    """A prompt with an answer to it."""

    prompt: Prompt
    answer: str | Message  # a message is written by the chat template; a text goes on from the opened turn as it is
    tools: Sequence[Any] | None = None  # what the chat template is told of tools, as JSON schemas


class Pair(NamedTuple):
    """Two answers to one prompt, the first one preferred."""

    place: str  # location of its row
    chosen: Answered
    rejected: Answered
    margin: float  # by how much the scores should differ at least


class Reference(NamedTuple):
    """An answer whose score is used to normalise scores."""

    place: str  # location of its row
    answered: Answered


class EncodedPair(NamedTuple):
    """A pair in token ids: each is the prompt followed by an answer."""

    chosen: list[int]
    rejected: list[int]
    margin: float
    prompt: int | None = None  # the number of its prompt in its set: pairs of one prompt are not independent


class Kept(NamedTuple):
    """The rows that were kept, and the locations of the others."""

    kept: list[Any]
    left_out: dict[str, list[str]]  # reason -> locations of the rows
    remarks: Mapping[str, Sequence[str]] = {}  # what is said of kept rows -> their locations

    def notes(self) -> list[str]:
        """Report what was left out, and what is said of other rows, a line each; an empty list where there is nothing."""
        return left_out_notes(self.left_out) + [note("in", x, "row", f" {what}") for what, x in self.remarks.items()]


def check_pairs(placed: Placed) -> Kept:
    """Check rows of preferences, leaving out those that express none.

    Columns: ``chosen`` and ``rejected``, each a text or a list of messages; ``prompt``, a text or a list of messages, which
    may be missing where both answers are whole conversations; ``tools``, a list of JSON schemas that the chat template is told
    of; and, if there is one, ``margin``, a number of at least 0, which is 0 where it is missing. Lists may be written in JSON,
    as CSV has them. Messages that begin with the assistant's are an answer to the prompt; others contain the prompt. The last
    message is the answer. Other columns are ignored. Without a prompt two texts may be dialogues that go alike up to their last
    "\\n\\nAssistant:", which ends the prompt. Rows with two equal answers or an empty one are left out, and so are dialogues
    that do not go alike.

    Args:
      placed: rows with their locations; at least one.

    Returns:
      The pairs as `Pair`, and the locations of the rows left out.

    Raises:
      UserError: a missing column, a value of the wrong type, answers to different prompts, or no pair is left; the message
        names the row.

    Example:
      >>> rows = [{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, {"prompt": "Hi", "chosen": "a", "rejected": "a"}]
      >>> pairs = check_pairs([(f"line {i}", row) for i, row in enumerate(rows, start=1)])
      >>> pairs.kept[0].chosen, pairs.notes()
      (Answered(prompt='Hi', answer='Hello', tools=None), ['left out 1 row, two equal answers: line 2'])
    """
    check_same_columns(placed, ("prompt", "chosen", "rejected"))
    missing = [name for name in ("chosen", "rejected") if name not in placed[0][1]]
    if missing:
        place, row = placed[0]
        raise UserError(
            f"{place}: there is no column {missing[0]!r}; the columns are {', '.join(map(repr, row)) or 'none'}"
        )
    kept: list[Pair] = []
    left_out: dict[str, list[str]] = {}
    for place, row in placed:
        chosen, rejected = (_answered(place, row, name) for name in ("chosen", "rejected"))
        pair = Pair(place, chosen, rejected, _margin(place, row))
        if isinstance(chosen.prompt, str) != isinstance(rejected.prompt, str):
            one, other = (
                ("a text", "a list of messages") if isinstance(chosen.prompt, str) else ("a list of messages", "a text")
            )
            raise UserError(f"{place}: 'chosen' is {one} and 'rejected' is {other}: make both the same")
        if "prompt" not in row and isinstance(chosen.prompt, str) and chosen.prompt != rejected.prompt:
            left_out.setdefault(f"two dialogues that differ before their last {DIALOGUE!r}", []).append(place)
            continue
        if chosen.prompt != rejected.prompt:
            raise UserError(f"{place}: 'chosen' and 'rejected' answer different prompts, so they cannot be compared")
        why = "an empty answer" if _is_empty(chosen.answer) or _is_empty(rejected.answer) else "two equal answers"
        if why == "two equal answers" and chosen.answer != rejected.answer:
            kept.append(pair)
        else:
            left_out.setdefault(why, []).append(place)
    return _some_left(Kept(kept, left_out), "pair is left to learn from")


def load_pair_sets(source: str, held_out: str | None, held_out_rows: int) -> dict[str, Kept]:
    """Read the pairs to learn from and those kept aside: from a source of their own, or else split off at random.

    Args:
      source: of the pairs to learn from, as for `sources.load_rows`.
      held_out: likewise, of those kept aside; None: they are rows of `source`, the same ones each time.
      held_out_rows: how many they are then.

    Returns:
      The pairs as "training" and "held-out".

    Raises:
      UserError: as in `sources.load_rows` and `check_pairs`, or too few rows to keep so many aside.
    """
    pairs = load_rows(source, check_pairs)
    if held_out is not None:
        return {"training": pairs, "held-out": load_rows(held_out, check_pairs)}
    kept, aside = split_rows(pairs.kept, held_out_rows, seed=0)
    return {"training": pairs._replace(kept=kept), "held-out": Kept(aside, {})}


def check_answers(placed: Placed) -> Kept:
    """Check rows with a ``prompt`` and a ``completion``, each a text or a list of messages; empty completions are left out.

    Args:
      placed: rows with their locations; at least one.

    Returns:
      The rows as `Reference`, and the locations of the rows left out.

    Raises:
      UserError: a row that is not of this form, which the message names, or no row is left.

    Example:
      >>> check_answers([("line 1", {"prompt": "Hi", "completion": "Hello"})]).kept
      [Reference(place='line 1', answered=Answered(prompt='Hi', answer='Hello', tools=None))]
    """
    check_same_columns(placed, ("prompt", "completion"))
    if "completion" not in placed[0][1]:
        listed = ", ".join(map(repr, placed[0][1])) or "none"
        raise UserError(f"{placed[0][0]}: there is no column 'completion'; the columns are {listed}")
    answers = [Reference(place, _answered(place, row, "completion")) for place, row in placed]
    empty = [place for place, answered in answers if _is_empty(answered.answer)]
    kept = [reference for reference in answers if not _is_empty(reference.answered.answer)]
    return _some_left(Kept(kept, {"an empty answer": empty} if empty else {}), "reference is left")


def encode_answers(answers: Sequence[Answered], tokenizer: Any, *, chat: bool, eos: bool) -> list[list[int]]:
    """Turn prompts with their answers into token ids, as a policy samples them: the prompt's ids, then the answer's.

    An answer's ids are those that stand behind the prompt's in the whole text, and end with the end of sequence. Where the answer
    begins inside a token of the whole text, it is tokenised as what goes on from the prompt. A text stands behind the opened turn
    as it is, as a policy may have written it; a message stands as the chat template writes it in a conversation.

    Args:
      answers: prompts with answers.
      tokenizer: a fast Hugging Face tokenizer.
      chat: render prompts that are texts with the chat template too; lists of messages always are.
      eos: end each answer with the end of sequence, unless it ends with one already; False where the answers already
        show whether they ended.

    Returns:
      The ids of each, unpadded.

    Raises:
      UserError: a chat template is needed and missing, it refuses the messages, or the tokenizer has no end of sequence to add.

    Example:
      >>> from tokenizers import Tokenizer, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> letters = Tokenizer(models.BPE(vocab={"e": 0, "a": 1, "b": 2, "c": 3}, merges=[]))
      >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="e")
      >>> encode_answers([Answered("ab", "c")], tokenizer, chat=False, eos=True)
      [[1, 2, 3, 0]]
    """
    places = [f"answer {number} (counted from 0)" for number in range(len(answers))]
    found = _encode(places, answers, tokenizer, chat=chat, eos=eos, sampled=True)
    if odd := next((f"{place}: {coded.why}" for place, coded in zip(places, found, strict=True) if coded.why), None):
        raise UserError(odd)
    return [coded.prompt + coded.answer for coded in found]


class _Encoded(NamedTuple):
    """A prompt and an answer in token ids."""

    prompt: list[int]
    answer: list[int]
    remarks: Sequence[str]
    why: str | None = None  # the reason why they cannot be scored


class _Written(NamedTuple):
    """A prompt and an answer as texts."""

    prompt: str
    answer: str
    remarks: Sequence[str] = ()
    why: str | None = None


def _encode(
    places: Sequence[str], answers: Sequence[Answered], tokenizer: Any, *, chat: bool, eos: bool, sampled: bool = False
) -> list[_Encoded]:
    """Encode as `encode_answers` does, keeping the ids of a prompt and of its answer separate; `sampled` texts are kept whole."""
    stops = stop_ids(tokenizer)
    if eos and not stops:
        raise UserError("the tokenizer has no end-of-sequence token to end an answer with: add one, or use eos=False")
    plain = [not chat and isinstance(answered.prompt, str) for answered in answers]
    prompts: dict[str, str] = {}  # the two answers of a pair, and often many pairs, share one
    texts: list[_Written] = []
    for place, answered, is_plain in zip(places, answers, plain, strict=True):
        unused = [UNUSED_TOOLS] if is_plain and answered.tools else unused_tools(answered.tools, tokenizer)
        if is_plain:
            texts.append(_Written(str(answered.prompt), str(answered.answer), unused))
        elif isinstance(answered.answer, str):
            messages, key = conversation(answered.prompt), repr((answered.prompt, answered.tools))
            if key not in prompts:
                prompts[key] = render(messages, tokenizer, place=place, tools=answered.tools)
            opened = prompts[key]
            spaced = dropped_space(messages, opened) + answered.answer, list[str]()
            text, remarks = spaced if sampled else answer_behind(messages, opened, answered.answer)
            texts.append(_Written(opened, text, [*unused, *remarks]))
        else:
            texts.append(_of_message(place, answered, answered.answer, unused, tokenizer))
    rows, inside = encode_parts([text[:2] for text in texts], tokenizer, special=plain)
    ends = {x: end for x in set(plain) if eos and (end := end_id(tokenizer, chat=not x)) is not None}
    encoded = []
    for place, answered, is_plain, text, (prompt, ids), torn in zip(
        places, answers, plain, texts, rows, inside, strict=True
    ):
        if not prompt:
            raise UserError(f"{place} has no tokens: {answered.prompt!r}")
        if not isinstance(answered.answer, str):  # the chat template has ended it
            stop = next((i for i, token in enumerate(ids) if token in stops), len(ids))
            ids = ids[: stop + 1 if eos else stop]
        ending = [ends[is_plain]] if is_plain in ends and not (ids and ids[-1] in stops) else []
        encoded.append(_Encoded(prompt, ids + ending, [*text.remarks, *([INSIDE] if torn else [])], text.why))
    return encoded


def _of_message(place: str, answered: Answered, answer: Message, unused: list[str], tokenizer: Any) -> _Written:
    """Write an answer that is a message as the chat template does."""
    found = write_answer(place, conversation(answered.prompt), answer, tokenizer, answered.tools)
    if not isinstance(found, str):
        inside = stopped_inside([words(answer)], tokenizer, stop_ids(tokenizer))
        return _Written(found[0], found[1], [*unused, *found[2]], STOPPED if inside else None)
    if answer.get("tool_calls"):
        raise UserError(
            f"{place}: the chat template does not write the answer's tool calls behind its prompt: leave the row out, or use a "
            "model for tool calls"
        )
    return _Written("-", "-", why=found)


def encode_pairs(pairs: Kept, tokenizer: Any, *, chat: bool, eos: bool, max_length: int) -> Kept:
    """Turn pairs into token ids; nothing is truncated.

    Left out are pairs of which an answer is too long or holds an end of sequence before its end, which a policy would have
    stopped at, and pairs whose answers have the same ids, or that the chat template does not write.

    Args:
      pairs: of `check_pairs`.
      tokenizer: a Hugging Face tokenizer.
      chat: as in `encode_answers`.
      eos: as in `encode_answers`.
      max_length: longest prompt with answer, in tokens.

    Returns:
      The pairs as `EncodedPair`, and the locations of all rows left out.

    Raises:
      UserError: no pair is left, or as in `encode_answers`.

    Example:
      >>> from tokenizers import Tokenizer, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> letters = Tokenizer(models.BPE(vocab={"e": 0, "a": 1, "b": 2}, merges=[]))
      >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="e")
      >>> pairs = check_pairs([("line 1", {"prompt": "a", "chosen": "b", "rejected": "ab"})])
      >>> encode_pairs(pairs, tokenizer, chat=False, eos=True, max_length=4).kept
      [EncodedPair(chosen=[1, 2, 0], rejected=[1, 1, 2, 0], margin=0.0, prompt=0)]
    """
    answers = [answered for pair in pairs.kept for answered in (pair.chosen, pair.rejected)]
    places = [pair.place for pair in pairs.kept for _ in range(2)]
    ids = _encode(places, answers, tokenizer, chat=chat, eos=eos)
    stops = set(stop_ids(tokenizer))
    found = Kept([], {why: list(places) for why, places in pairs.left_out.items()})
    remarks: dict[str, list[str]] = {}
    prompts: dict[tuple[int, ...], int] = {}
    for pair, chosen, rejected in zip(pairs.kept, ids[::2], ids[1::2], strict=True):
        why = _fault(chosen, stops, max_length) or _fault(rejected, stops, max_length)
        if why is None and chosen.answer == rejected.answer:
            why = "two equal answers"
        if why is not None:
            found.left_out.setdefault(why, []).append(pair.place)
            continue
        number = prompts.setdefault(tuple(chosen.prompt), len(prompts))
        both = (chosen.prompt + chosen.answer, rejected.prompt + rejected.answer)
        found.kept.append(EncodedPair(*both, pair.margin, number))
        for remark in dict.fromkeys([*chosen.remarks, *rejected.remarks]):
            remarks.setdefault(remark, []).append(pair.place)
    return _some_left(found._replace(remarks=remarks), "pair is left to learn from")


def encode_references(references: Kept, tokenizer: Any, *, chat: bool, eos: bool, max_length: int) -> Kept:
    """Turn references into token ids, leaving out those that `encode_pairs` would.

    Args:
      references: of `check_answers`.
      tokenizer: a Hugging Face tokenizer.
      chat: as in `encode_answers`.
      eos: as in `encode_answers`.
      max_length: longest prompt with answer, in tokens.

    Returns:
      The ids of each, and the locations of all rows left out.

    Raises:
      UserError: no reference is left, or as in `encode_answers`.

    Example:
      >>> from tokenizers import Tokenizer, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> letters = Tokenizer(models.BPE(vocab={"e": 0, "a": 1, "b": 2, "c": 3}, merges=[]))
      >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="e")
      >>> rows = [("line 1", {"prompt": "a", "completion": "b"}), ("line 2", {"prompt": "a", "completion": "bca"})]
      >>> found = encode_references(check_answers(rows), tokenizer, chat=False, eos=True, max_length=3)
      >>> found.kept, found.notes()
      ([[1, 2, 0]], ['left out 1 row, longer than 3 tokens: line 2'])
    """
    places, answers = zip(*references.kept, strict=True)
    stops = set(stop_ids(tokenizer))
    found = Kept([], {why: list(places) for why, places in references.left_out.items()})
    remarks: dict[str, list[str]] = {}
    for place, coded in zip(places, _encode(places, answers, tokenizer, chat=chat, eos=eos), strict=True):
        why = _fault(coded, stops, max_length)
        if why is not None:
            found.left_out.setdefault(why, []).append(place)
            continue
        found.kept.append(coded.prompt + coded.answer)
        for remark in coded.remarks:
            remarks.setdefault(remark, []).append(place)
    return _some_left(found._replace(remarks=remarks), "reference is left")


def encode_sets(
    pair_sets: Mapping[str, Kept], references: Kept | None, tokenizer: Any,
    *, chat: bool, eos: bool, max_length: int, reference_rows: int,
) -> tuple[list[list[EncodedPair]], list[list[int]], list[str]]:  # fmt: skip
    """Turn all that a reward model learns from into token ids; the tokenizer keeps whether prompts were templated.

    Args:
      pair_sets: pairs of `check_pairs`, by what they are called in notes; the first set is learned from.
      references: of `check_answers`; None: both answers of the first set's pairs.
      tokenizer: a Hugging Face tokenizer.
      chat: as in `encode_answers`.
      eos: as in `encode_answers`.
      max_length: longest prompt with answer, in tokens.
      reference_rows: so many references, or pairs whose answers are references, from the first on.

    Returns:
      The pairs of each set, the ids of the references, and lines for the user: what was left out, and how many there are.

    Raises:
      UserError: as in `encode_pairs` and `encode_references`.
    """
    first = next(iter(pair_sets.values())).kept[0]
    tokenizer.init_kwargs[TEMPLATED] = chat or not isinstance(first.chosen.prompt, str)
    sets, notes = [], []
    for name, pairs in pair_sets.items():
        found = encode_pairs(pairs, tokenizer, chat=chat, eos=eos, max_length=max_length)
        sets.append(found.kept)
        notes += [f"{name} pairs: {note}" for note in (*found.notes(), f"{len(found.kept):,} to use")]
    if references is None:
        return sets, [ids for pair in sets[0][:reference_rows] for ids in (pair.chosen, pair.rejected)], notes
    references = references._replace(kept=references.kept[:reference_rows])
    found = encode_references(references, tokenizer, chat=chat, eos=eos, max_length=max_length)
    return sets, found.kept, notes + [f"references: {note}" for note in found.notes()]


def _fault(coded: _Encoded, stops: set[int], max_length: int) -> str | None:
    """Give the reason why a prompt with its answer cannot be scored, or None."""
    if coded.why is not None:
        return coded.why
    if not stops.isdisjoint(coded.answer[:-1]):
        return STOPPED
    return f"longer than {max_length} tokens" if len(coded.prompt) + len(coded.answer) > max_length else None


def _some_left(found: Kept, what: str) -> Kept:
    if not found.kept:
        raise UserError(f"no {what}: {'; '.join(found.notes())}")
    return found


def _answered(place: str, row: Row, name: str) -> Answered:
    """Split a row's column into the prompt and the answer."""
    prompt, value = (as_messages(place, f"the column {x!r}", row.get(x)) for x in ("prompt", name))
    tools = as_tools(place, row.get(TOOLS))
    if not isinstance(value, list):
        check_text(place, f"the column {name!r}", value)
        if "prompt" not in row:
            return _of_dialogue(place, row, name)
        check_prompt(place, prompt)
        return Answered(prompt, value, tools)
    check_messages(place, f"the column {name!r}", value)
    if value[-1]["role"] != "assistant":
        raise UserError(f"{place}: {name!r} ends with the role {value[-1]['role']!r}, not 'assistant'")
    before: Sequence[Message] = ()
    if value[0]["role"] == "assistant":
        check_prompt(place, prompt)
        before = conversation(prompt)
    return Answered([*before, *value[:-1]], value[-1], tools)


def _of_dialogue(place: str, row: Row, name: str) -> Answered:
    """Split a text behind its last "\\n\\nAssistant:"."""
    before, opening, answer = row[name].rpartition(DIALOGUE)
    if not opening:
        listed = ", ".join(map(repr, row))
        raise UserError(
            f"{place}: there is no column 'prompt'; the columns are {listed}. Add it, or write {name!r} as a list of messages "
            f"or as a dialogue whose last answer begins behind {DIALOGUE!r}"
        )
    return Answered(before + opening, answer)


def _is_empty(answer: str | Message) -> bool:
    return not (answer.strip() if isinstance(answer, str) else says_anything(answer))


def _margin(place: str, row: Row) -> float:
    given = row.get("margin", 0.0)
    try:
        margin = math.nan if isinstance(given, bool) else float(given)  # a CSV gives texts
    except (TypeError, ValueError):
        margin = math.nan
    if not 0 <= margin < math.inf:
        raise UserError(f"{place}: the margin is {given!r}, not a finite number of at least 0")
    return margin
