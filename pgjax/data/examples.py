"""Examples for fine-tuning: rows turned into token ids, with a mask of the tokens to learn."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from pgjax.core.checks import check_whole
from pgjax.core.errors import UserError
from pgjax.data.drafts import Draft, equal_until, write_draft
from pgjax.data.messages import words
from pgjax.data.prompts import TOOLS, Prompt, as_tools, check_prompt
from pgjax.data.tables import (
    Placed,
    Row,
    as_messages,
    check_dicts,
    check_messages,
    check_same_columns,
    check_text,
    left_out_notes,
    note,
)
from pgjax.data.tokens import INSIDE, encode_parts, stopped_inside
from pgjax.models.io.stops import end_id, stop_ids

KINDS = (("prompt", "completion"), ("messages",), ("text",))  # the columns that make a row an example


class Example(NamedTuple):
    """The token ids of a text, and which of them to learn."""

    ids: list[int]
    learned: list[bool]  # as long as ids


class Examples(NamedTuple):
    """The examples made from rows, and the rows that were left out or cut, or of which there is something to say."""

    examples: list[Example]
    left_out: dict[str, list[str]]  # reason -> locations of the rows
    cut: list[str]  # locations of the plain texts that were cut into pieces
    remarks: dict[str, list[str]]  # what is said of rows -> their locations

    def notes(self) -> list[str]:
        """Report what was left out, cut or not learned, a line each; an empty list where nothing was."""
        cut = [note("cut", self.cut, "long text", " into pieces")] if self.cut else []
        remarks = [note("in", places, "row", f" {remark}") for remark, places in self.remarks.items()]
        return left_out_notes(self.left_out) + cut + remarks


def check_examples(placed: Placed) -> list[tuple[str, Row]]:
    """Check that rows are examples for fine-tuning, all of one kind.

    A row has the columns ``prompt`` and ``completion`` (texts, or lists of messages), or ``messages`` (a list of
    messages), or ``text``. Beside messages there may be ``tools``, a list of JSON schemas that the chat template is told of.
    Lists may be written in JSON, as CSV has them. Columns of other names are ignored, and so is a ``prompt`` beside
    ``messages``, which hold it.

    Args:
      placed: rows with their locations, as `tables.read_table` gives them.

    Returns:
      The same pairs, with the columns of the kind alone, and ``tools`` where a row has any.

    Raises:
      UserError: unknown columns, two kinds at once, rows without the columns of the first row's kind, or a value of
        the wrong type; the message names the row.

    Example:
      >>> check_examples([("line 1", {"prompt": "1 + 1 =", "completion": " 2", "source": "sums"})])
      [('line 1', {'prompt': '1 + 1 =', 'completion': ' 2'})]
    """
    check_dicts(placed)
    kind = _kind(*placed[0])
    check_same_columns(placed, kind)
    checked = []
    for place, row in placed:
        values = {
            name: row[name] if name == "text" else as_messages(place, f"the column {name!r}", row[name])
            for name in kind
        }
        if kind == ("text",):
            check_text(place, "the text", values["text"])
        elif kind == ("messages",):
            if isinstance(values["messages"], str):
                raise UserError(
                    f"{place}: the messages are neither a list nor one in JSON: {values['messages'][:200]!r}"
                )
            check_messages(place, "the messages", values["messages"])
        else:
            check_prompt(place, values["prompt"])
            _check_completion(place, values["prompt"], values["completion"])
        if kind != ("text",) and (tools := as_tools(place, row.get(TOOLS))):
            values[TOOLS] = tools
        checked.append((place, values))
    return checked


def texts_of(placed: Placed) -> Iterator[str]:
    """Give all texts of examples, of every kind.

    Args:
      placed: rows of `check_examples`.

    Yields:
      A text for each column, or for each message of one that holds any.

    Example:
      >>> list(texts_of([("line 1", {"prompt": [{"role": "user", "content": "Hello"}], "completion": "Hi"})]))
      ['Hello', 'Hi']
    """
    for _, row in placed:
        for name, value in row.items():
            if isinstance(value, str):
                yield value
            elif name != TOOLS:
                yield from filter(None, map(words, value))


def encode_examples(
    placed: Placed, tokenizer: Any, *, chat: bool, max_length: int, learn_prompt: bool = False
) -> Examples:
    """Turn checked rows into token ids, with a mask of the tokens to learn.

    The ids are those of the whole text, as `transformers` renders and tokenises it, and those before an answer are what a policy
    is given there. What is learned:

    - of a prompt with a completion, the completion and an end of sequence; where the prompt is a conversation that ends in the
      assistant's words, they go on;
    - of messages, every turn of the assistant with the token that ends it, tool calls included: what the chat template tags by
      ``{% generation %}``, or without such tags all that it writes behind the opened turn. Where the template rewrites earlier
      turns when one is added and has no tags, the last turn alone;
    - of a plain text, every token but the first, and the end of sequence. One longer than ``max_length`` is cut into pieces
      that overlap by one token, so that each token is still learned once.

    Where an answer begins inside a token of the whole text ("The film was " + "great"), it is tokenised as what goes on from the
    ids before it, and the row is listed.

    Args:
      placed: rows of `check_examples`.
      tokenizer: a fast Hugging Face tokenizer.
      chat: render a text prompt with the chat template, as one message of the user.
      max_length: of an example, in tokens; at least 2, since the first token is never learned.
      learn_prompt: learn the prompt's tokens too: all of an example but its first.

    Returns:
      The examples in order. Rows with an empty completion or text, without an answer of the assistant, with an end of
      sequence inside an answer, with a last turn that the chat template rewrites or tool calls that it does not write, or
      longer than ``max_length`` (unless plain texts) are left out and listed. So are rows with turns that are not learned.

    Raises:
      UserError: a chat template is needed and missing, or it refuses a row; the tokenizer has no end of sequence; or no row
        is left.

    Example:
      >>> from tokenizers import Tokenizer, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> letters = Tokenizer(models.BPE(vocab={"e": 0, "a": 1, "b": 2, "c": 3}, merges=[]))
      >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="e")
      >>> rows = [("line 1", {"prompt": "ab", "completion": "c"}), ("line 2", {"prompt": "a", "completion": ""})]
      >>> examples = encode_examples(rows, tokenizer, chat=False, max_length=8)
      >>> examples.examples
      [Example(ids=[1, 2, 3, 0], learned=[False, False, True, True])]
      >>> examples.notes()
      ['left out 1 row, empty: line 2']
    """
    check_whole("max_length", max_length, 2)
    _check_tokenizer(tokenizer, placed, chat)
    stops = stop_ids(tokenizer)
    ends = {special: end for special in (True, False) if (end := end_id(tokenizer, chat=not special)) is not None}
    found = Examples([], {}, [], {})
    drafts: list[tuple[str, Draft]] = []
    for place, row in placed:
        draft = write_draft(place, row, tokenizer, chat)
        if isinstance(draft, str):
            found.left_out.setdefault(draft, []).append(place)
        else:
            drafts.append((place, draft))
    texts, special = [draft.parts for _, draft in drafts], [draft.special for _, draft in drafts]
    pieces = encode_parts(texts, tokenizer, special=special)
    odd = stopped_inside([answer for _, draft in drafts for answer in draft.answers], tokenizer, stops)
    for (place, draft), parts, inside in zip(drafts, *pieces, strict=True):
        example = _example(draft, parts, stops, ends[draft.special], tokenizer)
        if not any(example.learned):
            why = "without an answer to learn"
        elif not odd.isdisjoint(draft.answers):
            why = "an end of sequence inside the answer"
        elif len(example.ids) > max_length and draft.answers:
            why = f"longer than {max_length} tokens"
        else:
            for remark in [*draft.remarks, *([INSIDE] if inside else [])]:
                found.remarks.setdefault(remark, []).append(place)
            found.examples.extend(_fitted(example, max_length, learn_prompt))
            found.cut.extend([place] if len(example.ids) > max_length else [])
            continue
        found.left_out.setdefault(why, []).append(place)
    if not any(any(example.learned[1:]) for example in found.examples):
        raise UserError(f"no row is left to learn from: {'; '.join(found.notes()) or 'no token is learned'}")
    return found


def _kind(place: str, row: Row) -> tuple[str, ...]:
    known = {name for kind in KINDS for name in kind}
    beside = {"prompt"} if "messages" in row else set()  # messages hold their prompt
    found = [kind for kind in KINDS if set(kind) == known & set(row) - beside]
    if not found:
        listed = ", ".join(map(repr, row)) or "none"
        kinds = ", or ".join(" and ".join(map(repr, kind)) for kind in KINDS)
        raise UserError(f"{place}: the columns are {listed}; an example has {kinds}, and only one of these")
    return found[0]


def _check_completion(place: str, prompt: Prompt, completion: Any) -> None:
    if not isinstance(completion, list):
        check_text(place, "the completion", completion)
        return
    check_messages(place, "the completion", completion)
    if isinstance(prompt, str):
        raise UserError(f"{place}: the completion is a list of messages, the prompt a text: make both the same")
    if completion[0]["role"] != "assistant":
        raise UserError(f"{place}: the completion begins with the role {completion[0]['role']!r}, not 'assistant'")


def _check_tokenizer(tokenizer: Any, placed: Placed, chat: bool) -> None:
    columns = placed[0][1]
    if chat and "text" in columns:
        raise UserError(
            "plain texts cannot be rendered with a chat template: use chat=False, or give prompts and completions"
        )
    lists = "messages" in columns or any(isinstance(row.get("prompt"), list) for _, row in placed)
    if (chat or lists) and tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template, which messages need: use an instruct model, or texts")
    if not stop_ids(tokenizer):
        raise UserError("the tokenizer has no end-of-sequence token, so a model could not learn to end: add one")


def _example(draft: Draft, pieces: Sequence[list[int]], stops: Sequence[int], end: int, tokenizer: Any) -> Example:
    """Put an example together; what a template writes after the last end of a turn is left out."""
    ids = list(itertools.chain.from_iterable(pieces))
    if draft.tagged is not None and draft.tagged[0] == ids:
        begin = draft.begin if len(pieces) == 1 else len(pieces[0])
        return _as_tagged(ids, [i >= begin and tag for i, tag in enumerate(draft.tagged[1])], stops, end)
    if len(pieces) == 1:
        ids = ids if ids and ids[-1] in stops else [*ids, end]
        return Example(ids, [True] * len(ids))
    learned = [False] * len(pieces[0])
    for number, part in enumerate(pieces[1:-1], start=1):
        until = _end_of_turn(draft, number, part, stops, tokenizer)
        learned += [True] * until + [False] * (len(part) - until)
    stop = _first(stops, pieces[-1])
    last = [*pieces[-1], end] if stop is None else pieces[-1][: stop + 1]
    return Example(ids[: len(learned)] + last, learned + [True] * len(last))


def _first(stops: Sequence[int], ids: Sequence[int]) -> int | None:
    return min((ids.index(stop) for stop in stops if stop in ids), default=None)


def _end_of_turn(draft: Draft, number: int, ids: Sequence[int], stops: Sequence[int], tokenizer: Any) -> int:
    """Count the ids of a turn's text, up to an end of sequence in it; what stands between it and the next turn follows."""
    stop = _first(stops, ids)
    until = len(ids) if stop is None else stop + 1
    text = draft.parts[number][: draft.ends[number - 1]]
    added = tokenizer.added_tokens_decoder
    if stop is not None and any(i in added and added[i].content in text for i in stops):
        return until
    ((*_, turn),), _ = encode_parts([[*draft.parts[:number], text]], tokenizer, special=draft.special)
    return min(until, equal_until(turn, ids))


def _as_tagged(ids: list[int], tagged: list[bool], stops: Sequence[int], end: int) -> Example:
    """Learn the tagged tokens, and the end of sequence behind each run of them; a run of ends alone answers nothing."""
    learned = [False] * len(ids)
    for is_tagged, run in itertools.groupby(range(len(ids)), key=tagged.__getitem__):
        places = list(run)
        if is_tagged and not {ids[i] for i in places} <= set(stops):
            learned[places[0] : places[-1] + 1] = [True] * len(places)
            after = places[-1] + 1
            if ids[after - 1] not in stops and after < len(ids) and ids[after] in stops:
                learned[after] = True
    if not any(learned):
        return Example(ids, learned)
    until = len(ids) - learned[::-1].index(True)
    ending = [] if ids[until - 1] in stops else [end]
    return Example(ids[:until] + ending, learned[:until] + [True] * len(ending))


def _fitted(example: Example, length: int, learn_prompt: bool) -> Iterable[Example]:
    """Cut an example into pieces of a length that overlap by one token, so that each token but the first is learned once."""
    if learn_prompt:
        example = Example(example.ids, [False] + [True] * (len(example.ids) - 1))
    if len(example.ids) <= length:
        return [example]
    parts = [slice(begin, begin + length) for begin in range(0, len(example.ids) - 1, length - 1)]
    return [Example(example.ids[part], [False, *example.learned[part][1:]]) for part in parts]
