"""Preferences: rows with two answers to one prompt, checked to the row and turned into token ids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pgjax.data import encode_prompts
from pgjax.models.tokenizer import stop_ids
from pgjax.prompts import Prompt, check_prompt
from pgjax.tables import Placed, Row, check_messages, check_same_columns, check_text

_MANY = 5  # places that a note lists


class Answered(NamedTuple):
    """A prompt with an answer to it."""

    prompt: Prompt
    answer: str


class Pair(NamedTuple):
    """Two answers to one prompt, the first one preferred."""

    place: str  # where its row stands
    chosen: Answered
    rejected: Answered
    margin: float  # how far apart their scores should be at least


class Encoded(NamedTuple):
    """A pair in token ids, each answer behind its prompt."""

    chosen: list[int]
    rejected: list[int]
    margin: float


class Kept(NamedTuple):
    """What became of rows."""

    kept: list[Any]
    left_out: dict[str, list[str]]  # why -> places of the rows

    def notes(self) -> list[str]:
        """Say what was left out, a line for each reason; no lines where there is nothing to say."""
        return [f"left out {len(places)} rows, {why}: {_listed(places)}" for why, places in self.left_out.items()]


def check_pairs(placed: Placed) -> Kept:
    """Check rows of preferences, leaving out those that say nothing.

    Columns: ``chosen`` and ``rejected``, each a text or a list of messages; ``prompt``, a text or a list of messages, which
    may be missing where both answers are whole conversations; and, if there is one, ``margin``, a number of at least 0.
    Messages that begin with the assistant's answer the prompt, others hold it; the last message is what is judged. Other
    columns are not looked at. Rows with two equal answers or an empty one are left out.

    Args:
      placed: rows with their places; at least one.

    Returns:
      The pairs as `Pair`, and where the others stood.

    Raises:
      ValueError: a missing column, a value of another kind, answers to different prompts, or no row that says
        anything; it names the place.

    Example:
      >>> rows = [{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, {"prompt": "Hi", "chosen": "a", "rejected": "a"}]
      >>> pairs = check_pairs([(f"line {i}", row) for i, row in enumerate(rows, start=1)])
      >>> pairs.kept[0].chosen, pairs.notes()
      (Answered(prompt='Hi', answer='Hello'), ['left out 1 rows, two equal answers: line 2'])
    """
    check_same_columns(placed)
    missing = [name for name in ("chosen", "rejected") if name not in placed[0][1]]
    if missing:
        place, row = placed[0]
        raise ValueError(
            f"{place}: there is no column {missing[0]!r}; the columns are {', '.join(map(repr, row)) or 'none'}"
        )
    kept: list[Pair] = []
    left_out: dict[str, list[str]] = {}
    for place, row in placed:
        chosen, rejected = (_answered(place, row, name) for name in ("chosen", "rejected"))
        pair = Pair(place, chosen, rejected, _margin(place, row))
        if chosen.prompt != rejected.prompt:
            raise ValueError(f"{place}: 'chosen' and 'rejected' answer different prompts, so they do not compare")
        why = "an empty answer" if not (chosen.answer.strip() and rejected.answer.strip()) else "two equal answers"
        if why == "two equal answers" and chosen.answer != rejected.answer:
            kept.append(pair)
        else:
            left_out.setdefault(why, []).append(place)
    found = Kept(kept, left_out)
    if not kept:
        raise ValueError(f"no pair is left to learn from: {'; '.join(found.notes())}")
    return found


def check_answers(placed: Placed) -> list[Answered]:
    """Check rows with a ``prompt`` and a ``completion``, each a text or a list of messages.

    Args:
      placed: rows with their places; at least one.

    Returns:
      The rows as `Answered`.

    Raises:
      ValueError: naming the place.

    Example:
      >>> check_answers([("line 1", {"prompt": "Hi", "completion": "Hello"})])
      [Answered(prompt='Hi', answer='Hello')]
    """
    check_same_columns(placed)
    if "completion" not in placed[0][1]:
        listed = ", ".join(map(repr, placed[0][1])) or "none"
        raise ValueError(f"{placed[0][0]}: there is no column 'completion'; the columns are {listed}")
    return [_answered(place, row, "completion") for place, row in placed]


def encode_answers(answers: Sequence[Answered], tokenizer: Any, *, chat: bool, eos: bool) -> list[list[int]]:
    """Turn prompts with their answers into token ids, as a policy samples them: the prompt's ids, then the answer's.

    The answer is tokenised apart, without special tokens of the tokenizer's own, and ends with the end of sequence.

    Args:
      answers: prompts with answers.
      tokenizer: a Hugging Face tokenizer.
      chat: put prompts that are texts through the chat template too; messages always go through it.
      eos: end each answer with the end of sequence, unless it ends with it already; False where completions say
        themselves whether they ended.

    Returns:
      The ids of each, unpadded.

    Raises:
      ValueError: no chat template where one is needed, messages that it refuses, or no end of sequence to add.

    Example:
      >>> class Letters:  # stands in for a tokenizer
      ...     eos_token_id, init_kwargs = 0, {}
      ...     def __call__(self, text, **options):
      ...         ids = lambda text: [ord(letter) for letter in text]
      ...         return {"input_ids": ids(text) if isinstance(text, str) else [ids(one) for one in text]}
      >>> encode_answers([Answered("ab", "c")], Letters(), chat=False, eos=True)
      [[97, 98, 99, 0]]
    """
    stops = stop_ids(tokenizer)
    if eos and not stops:
        raise ValueError("the tokenizer has no end-of-sequence token to end an answer with: add one, or use eos=False")
    end = [] if not eos else [tokenizer.eos_token_id if tokenizer.eos_token_id in stops else stops[0]]
    texts = [answered.answer for answered in answers]
    endings = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    prompts: dict[str, list[int]] = {}  # the two answers of a pair, and often many pairs, share one
    encoded = []
    for answered, ids in zip(answers, endings, strict=True):
        key = repr(answered.prompt)
        if key not in prompts:
            prompts[key] = _prompt_ids(answered.prompt, tokenizer, chat)
        encoded.append([*prompts[key], *map(int, ids), *(end if list(ids)[-1:] != end else [])])
    return encoded


def encode_pairs(pairs: Kept, tokenizer: Any, *, chat: bool, eos: bool, max_length: int) -> Kept:
    """Turn pairs into token ids, leaving out those of which an answer is too long; nothing is ever cut.

    Args:
      pairs: of `check_pairs`.
      tokenizer: a Hugging Face tokenizer.
      chat: as in `encode_answers`.
      eos: as in `encode_answers`.
      max_length: longest prompt with answer, in tokens.

    Returns:
      The pairs as `Encoded`, and where all others stood.

    Raises:
      ValueError: no pair is left, or `encode_answers` refuses.

    Example:
      >>> from tokenizers import Tokenizer, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> letters = Tokenizer(models.BPE(vocab={"e": 0, "a": 1, "b": 2}, merges=[]))
      >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="e")
      >>> pairs = check_pairs([("line 1", {"prompt": "a", "chosen": "b", "rejected": "ab"})])
      >>> encode_pairs(pairs, tokenizer, chat=False, eos=True, max_length=4).kept
      [Encoded(chosen=[1, 2, 0], rejected=[1, 1, 2, 0], margin=0.0)]
    """
    answers = [answered for pair in pairs.kept for answered in (pair.chosen, pair.rejected)]
    ids = encode_answers(answers, tokenizer, chat=chat, eos=eos)
    kept, long = [], []
    for pair, chosen, rejected in zip(pairs.kept, ids[::2], ids[1::2], strict=True):
        if max(len(chosen), len(rejected)) <= max_length:
            kept.append(Encoded(chosen, rejected, pair.margin))
        else:
            long.append(pair.place)
    found = Kept(kept, {**pairs.left_out, **({f"longer than {max_length} tokens": long} if long else {})})
    if not kept:
        raise ValueError(f"no pair is left to learn from: {'; '.join(found.notes())}")
    return found


def _answered(place: str, row: Row, name: str) -> Answered:
    """Find the prompt and the text that is judged in a row's column."""
    prompt, value = row.get("prompt"), row[name]
    if not isinstance(value, list):
        check_text(place, f"the column {name!r}", value)
        if "prompt" not in row:
            listed = ", ".join(map(repr, row))
            raise ValueError(f"{place}: there is no column 'prompt'; the columns are {listed}")
        check_prompt(place, prompt)
        return Answered(prompt, value)  # type: ignore[arg-type]  # check_prompt has seen to it
    check_messages(place, f"the column {name!r}", value)
    if value[-1]["role"] != "assistant":
        raise ValueError(f"{place}: {name!r} ends with the role {value[-1]['role']!r}, not 'assistant'")
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
        raise ValueError(f"{place}: the margin is {given!r}, not a finite number of at least 0")
    return margin


def _prompt_ids(prompt: Prompt, tokenizer: Any, chat: bool) -> list[int]:
    from jinja2.exceptions import TemplateError

    try:
        return encode_prompts([prompt], tokenizer, chat=chat or not isinstance(prompt, str), max_length=None)[0]
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a prompt ({error}): {str(prompt)[:200]}") from error


def _listed(places: Sequence[str]) -> str:
    more = f" and {len(places) - _MANY} more" if len(places) > _MANY else ""
    return "; ".join(places[:_MANY]) + more
