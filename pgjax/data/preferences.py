"""Preferences: rows with two answers to one prompt, checked and turned into token ids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pgjax.core.errors import UserError
from pgjax.data.batches import split_rows
from pgjax.data.prompts import Prompt, check_prompt, encode_prompt
from pgjax.data.sources import load_rows
from pgjax.data.tables import Placed, Row, as_messages, check_messages, check_same_columns, check_text, left_out_notes
from pgjax.models.io.stops import stop_ids

TEMPLATED = "prompts_were_templated"  # a tokenizer's setting: was a reward model trained with its chat template?


class Answered(NamedTuple):
    """A prompt with an answer to it."""

    prompt: Prompt
    answer: str


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

    def notes(self) -> list[str]:
        """Report what was left out, a line for each reason; an empty list where nothing was."""
        return left_out_notes(self.left_out)


def check_pairs(placed: Placed) -> Kept:
    """Check rows of preferences, leaving out those that express none.

    Columns: ``chosen`` and ``rejected``, each a text or a list of messages; ``prompt``, a text or a list of messages, which
    may be missing where both answers are whole conversations; and, if there is one, ``margin``, a number of at least 0,
    which is 0 where it is missing. A list of messages may be written in JSON, as CSV has it. Messages that begin with the
    assistant's are an answer to the prompt; others contain the prompt. The last message is the answer. Other columns are ignored.
    Rows with two equal answers or an empty one are left out.

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
      (Answered(prompt='Hi', answer='Hello'), ['left out 1 row, two equal answers: line 2'])
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
        if chosen.prompt != rejected.prompt:
            raise UserError(f"{place}: 'chosen' and 'rejected' answer different prompts, so they cannot be compared")
        why = "an empty answer" if not (chosen.answer.strip() and rejected.answer.strip()) else "two equal answers"
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
      [Reference(place='line 1', answered=Answered(prompt='Hi', answer='Hello'))]
    """
    check_same_columns(placed, ("prompt", "completion"))
    if "completion" not in placed[0][1]:
        listed = ", ".join(map(repr, placed[0][1])) or "none"
        raise UserError(f"{placed[0][0]}: there is no column 'completion'; the columns are {listed}")
    answers = [Reference(place, _answered(place, row, "completion")) for place, row in placed]
    empty = [place for place, answered in answers if not answered.answer.strip()]
    kept = [reference for reference in answers if reference.answered.answer.strip()]
    return _some_left(Kept(kept, {"an empty answer": empty} if empty else {}), "reference is left")


def encode_answers(answers: Sequence[Answered], tokenizer: Any, *, chat: bool, eos: bool) -> list[list[int]]:
    """Turn prompts with their answers into token ids, as a policy samples them: the prompt's ids, then the answer's.

    The answer is tokenised separately, without the tokenizer's special tokens, and ends with the end of sequence.

    Args:
      answers: prompts with answers.
      tokenizer: a Hugging Face tokenizer.
      chat: render prompts that are texts with the chat template too; lists of messages always are.
      eos: end each answer with the end of sequence, unless it ends with one already; False where the answers already
        show whether they ended.

    Returns:
      The ids of each, unpadded.

    Raises:
      UserError: a chat template is needed and missing, it refuses the messages, or the tokenizer has no end of sequence to add.

    Example:
      >>> class Letters:  # stands in for a tokenizer
      ...     eos_token_id, init_kwargs = 0, {}
      ...     def __call__(self, text, **options):
      ...         ids = lambda text: [ord(letter) for letter in text]
      ...         return {"input_ids": ids(text) if isinstance(text, str) else [ids(one) for one in text]}
      >>> encode_answers([Answered("ab", "c")], Letters(), chat=False, eos=True)
      [[97, 98, 99, 0]]
    """
    places = [f"answer {number} (counted from 0)" for number in range(len(answers))]
    return [prompt + answer for prompt, answer in _encode(places, answers, tokenizer, chat=chat, eos=eos)]


def _encode(
    places: Sequence[str], answers: Sequence[Answered], tokenizer: Any, *, chat: bool, eos: bool
) -> list[tuple[list[int], list[int]]]:
    """Encode as `encode_answers` does, keeping the ids of a prompt and of its answer separate."""
    stops = stop_ids(tokenizer)
    if eos and not stops:
        raise UserError("the tokenizer has no end-of-sequence token to end an answer with: add one, or use eos=False")
    end = [] if not eos else [tokenizer.eos_token_id if tokenizer.eos_token_id in stops else stops[0]]
    texts = [answered.answer for answered in answers]
    endings = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    prompts: dict[str, list[int]] = {}  # the two answers of a pair, and often many pairs, share one
    encoded = []
    for place, answered, ids in zip(places, answers, endings, strict=True):
        key = repr(answered.prompt)
        if key not in prompts:
            templated = chat or not isinstance(answered.prompt, str)
            prompts[key] = encode_prompt(answered.prompt, tokenizer, chat=templated, place=place)
        ended = len(ids) > 0 and int(ids[-1]) in stops
        encoded.append((prompts[key], [*map(int, ids), *([] if ended else end)]))
    return encoded


def encode_pairs(pairs: Kept, tokenizer: Any, *, chat: bool, eos: bool, max_length: int) -> Kept:
    """Turn pairs into token ids; nothing is truncated.

    Left out are pairs of which an answer is too long or holds an end of sequence before its end, which a policy would have
    stopped at, and pairs whose answers have the same ids.

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
    kept, left_out = [], {why: list(places) for why, places in pairs.left_out.items()}
    prompts: dict[tuple[int, ...], int] = {}
    for pair, chosen, rejected in zip(pairs.kept, ids[::2], ids[1::2], strict=True):
        why = _fault(chosen, tokenizer, max_length) or _fault(rejected, tokenizer, max_length)
        if why is None and chosen == rejected:
            why = "two equal answers"
        if why is None:
            number = prompts.setdefault(tuple(chosen[0]), len(prompts))
            kept.append(EncodedPair(chosen[0] + chosen[1], rejected[0] + rejected[1], pair.margin, number))
        else:
            left_out.setdefault(why, []).append(pair.place)
    return _some_left(Kept(kept, left_out), "pair is left to learn from")


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
      >>> class Letters:  # stands in for a tokenizer
      ...     eos_token_id, init_kwargs = 0, {}
      ...     def __call__(self, text, **options):
      ...         ids = lambda text: [ord(letter) for letter in text]
      ...         return {"input_ids": ids(text) if isinstance(text, str) else [ids(one) for one in text]}
      >>> rows = [("line 1", {"prompt": "a", "completion": "b"}), ("line 2", {"prompt": "a", "completion": "bcd"})]
      >>> found = encode_references(check_answers(rows), Letters(), chat=False, eos=True, max_length=3)
      >>> found.kept, found.notes()
      ([[97, 98, 0]], ['left out 1 row, longer than 3 tokens: line 2'])
    """
    places, answers = zip(*references.kept, strict=True)
    kept, left_out = [], {why: list(places) for why, places in references.left_out.items()}
    for place, ids in zip(places, _encode(places, answers, tokenizer, chat=chat, eos=eos), strict=True):
        why = _fault(ids, tokenizer, max_length)
        if why is None:
            kept.append(ids[0] + ids[1])
        else:
            left_out.setdefault(why, []).append(place)
    return _some_left(Kept(kept, left_out), "reference is left")


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


def _fault(ids: tuple[list[int], list[int]], tokenizer: Any, max_length: int) -> str | None:
    """Give the reason why a prompt with its answer cannot be scored, or None."""
    prompt, answer = ids
    if not set(stop_ids(tokenizer)).isdisjoint(answer[:-1]):
        return "an end of sequence inside the answer"
    return f"longer than {max_length} tokens" if len(prompt) + len(answer) > max_length else None


def _some_left(found: Kept, what: str) -> Kept:
    if not found.kept:
        raise UserError(f"no {what}: {'; '.join(found.notes())}")
    return found


def _answered(place: str, row: Row, name: str) -> Answered:
    """Split a row's column into the prompt and the answer."""
    prompt, value = (as_messages(place, f"the column {x!r}", row.get(x)) for x in ("prompt", name))
    if not isinstance(value, list):
        check_text(place, f"the column {name!r}", value)
        if "prompt" not in row:
            listed = ", ".join(map(repr, row))
            raise UserError(f"{place}: there is no column 'prompt'; the columns are {listed}")
        check_prompt(place, prompt)
        return Answered(prompt, value)
    check_messages(place, f"the column {name!r}", value)
    if value[-1]["role"] != "assistant":
        raise UserError(f"{place}: {name!r} ends with the role {value[-1]['role']!r}, not 'assistant'")
    before: list[Mapping[str, str]] = []
    if value[0]["role"] == "assistant":
        check_prompt(place, prompt)
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or ())
    return Answered([*before, *value[:-1]], value[-1]["content"])


def _margin(place: str, row: Row) -> float:
    given = row.get("margin", 0.0)
    try:
        margin = math.nan if isinstance(given, bool) else float(given)  # a CSV gives texts
    except (TypeError, ValueError):
        margin = math.nan
    if not 0 <= margin < math.inf:
        raise UserError(f"{place}: the margin is {given!r}, not a finite number of at least 0")
    return margin
