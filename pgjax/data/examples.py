"""Examples for fine-tuning: rows turned into token ids, with a mask of the tokens to learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pgjax.core.checks import check_whole
from pgjax.core.errors import UserError
from pgjax.data.prompts import Prompt, check_prompt
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
from pgjax.models.io.stops import stop_ids

KINDS = (("prompt", "completion"), ("messages",), ("text",))  # the columns that make a row an example
REWRITTEN = (
    "the chat template rewrites earlier turns when a turn is added, so the tokens of that turn cannot be found "
    "(give prompts and completions instead)"
)


class Example(NamedTuple):
    """The token ids of a text, and which of them to learn."""

    ids: list[int]
    learned: list[bool]  # as long as ids


class Examples(NamedTuple):
    """The examples made from rows, and the rows that were left out or cut."""

    examples: list[Example]
    left_out: dict[str, list[str]]  # reason -> locations of the rows
    cut: list[str]  # locations of the plain texts that were cut into pieces

    def notes(self) -> list[str]:
        """Report what was left out and cut, a line each; an empty list where nothing was."""
        cut = [note("cut", self.cut, "long text", " into pieces")] if self.cut else []
        return left_out_notes(self.left_out) + cut


class _Chunk(NamedTuple):
    """A piece of an example that is tokenised separately."""

    text: str
    special: bool  # whether the tokenizer adds its special tokens
    learned: bool
    ends: bool  # learn up to its first end-of-sequence token only, and add one where it is missing
    answer: str = ""  # the part of it that comes from the row: may hold an end of sequence at its end only


def check_examples(placed: Placed) -> list[tuple[str, Row]]:
    """Check that rows are examples for fine-tuning, all of one kind.

    A row has the columns ``prompt`` and ``completion`` (texts, or lists of messages), or ``messages`` (a list of
    messages), or ``text``. A list of messages may be written in JSON, as CSV has it. Columns of other names are ignored,
    and so is a ``prompt`` beside ``messages``, which hold it.

    Args:
      placed: rows with their locations, as `tables.read_table` gives them.

    Returns:
      The same pairs, with the columns of the kind alone.

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
        checked.append((place, values))
    return checked


def texts_of(placed: Placed) -> Iterator[str]:
    """Give all texts of examples, of every kind.

    Args:
      placed: rows of `check_examples`.

    Yields:
      A text for each column, or for each message of one.

    Example:
      >>> list(texts_of([("line 1", {"prompt": [{"role": "user", "content": "Hello"}], "completion": "Hi"})]))
      ['Hello', 'Hi']
    """
    for _, row in placed:
        for value in row.values():
            yield from [value] if isinstance(value, str) else (message["content"] for message in value)


def encode_examples(
    placed: Placed, tokenizer: Any, *, chat: bool, max_length: int, learn_prompt: bool = False
) -> Examples:
    """Turn checked rows into token ids, with a mask of the tokens to learn.

    A prompt and its completion are tokenised separately, as in sampling: the completion without special tokens,
    then the end of sequence. Of messages, every turn of the assistant is learned with the token that ends it; the
    chat template is rendered turn by turn. Of a plain text, every token but the first is learned, and the end of
    sequence; one longer than ``max_length`` is cut into pieces that overlap by one token, so that each token is still
    learned once.

    Args:
      placed: rows of `check_examples`.
      tokenizer: a Hugging Face tokenizer.
      chat: render a text prompt with the chat template, as one message of the user.
      max_length: of an example, in tokens; at least 2, since the first token is never learned.
      learn_prompt: learn the prompt's tokens too: all of an example but its first.

    Returns:
      The examples in order. Rows with an empty completion or text, without an answer of the assistant, with an end of
      sequence inside an answer, with turns that the chat template rewrites when another is added, or longer than
      ``max_length`` (unless plain texts) are left out and listed.

    Raises:
      UserError: a chat template is needed and missing, or it refuses a row; the tokenizer has no end of sequence; or no row
        is left.

    Example:
      >>> class Letters:  # stands in for a tokenizer
      ...     eos_token_id, init_kwargs, chat_template = 0, {}, None
      ...     def __call__(self, texts, **options):
      ...         return {"input_ids": [[ord(letter) for letter in text] for text in texts]}
      >>> rows = [("line 1", {"prompt": "ab", "completion": "c"}), ("line 2", {"prompt": "a", "completion": ""})]
      >>> examples = encode_examples(rows, Letters(), chat=False, max_length=8)
      >>> examples.examples
      [Example(ids=[97, 98, 99, 0], learned=[False, False, True, True])]
      >>> examples.notes()
      ['left out 1 row, empty: line 2']
    """
    check_whole("max_length", max_length, 2)
    _check_tokenizer(tokenizer, placed, chat)
    chunked = [(place, _chunks(place, row, tokenizer, chat)) for place, row in placed]
    flat = [chunk for _, chunks in chunked if not isinstance(chunks, str) for chunk in chunks]
    ids = iter(_tokenised(tokenizer, flat))
    answers = iter(_tokenised(tokenizer, [_Chunk(chunk.answer, False, True, True) for chunk in flat]))
    stops = stop_ids(tokenizer)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in stops else stops[0]
    examples: list[Example] = []
    left_out: dict[str, list[str]] = {}
    cut = []
    for (place, row), (_, chunks) in zip(placed, chunked, strict=True):
        if isinstance(chunks, str):
            left_out.setdefault(chunks, []).append(place)
            continue
        written = [next(answers) for _ in chunks]
        example = _joined([(chunk, next(ids)) for chunk in chunks], stops, end)
        if learn_prompt:
            example = Example(example.ids, [False] + [True] * (len(example.ids) - 1))
        if any(not set(stops).isdisjoint(answer[:-1]) for answer in written):
            left_out.setdefault("an end of sequence inside the answer", []).append(place)
        elif len(example.ids) <= max_length:
            examples.append(example)
        elif "text" in row:
            cut.append(place)
            examples += _pieces(example, max_length)
        else:
            left_out.setdefault(f"longer than {max_length} tokens", []).append(place)
    found = Examples(examples, left_out, cut)
    if not any(any(example.learned[1:]) for example in examples):
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


def _chunks(place: str, row: Row, tokenizer: Any, chat: bool) -> list[_Chunk] | str:
    """Cut a row into the pieces that are tokenised separately; a text is the reason why nothing can be learned from it."""
    if "text" in row:
        return [_Chunk(row["text"], special=True, learned=True, ends=True)] if row["text"].strip() else "empty"
    if "messages" in row:
        return _turns(place, [], row["messages"], tokenizer)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(completion, list):
        if not all(message["content"].strip() for message in completion if message["role"] == "assistant"):
            return "empty"
        return _turns(place, prompt, completion, tokenizer)
    if not completion.strip():
        return "empty"
    answer = _Chunk(completion, special=False, learned=True, ends=True, answer=completion)
    if isinstance(prompt, str) and not chat:
        return [_Chunk(prompt, special=True, learned=False, ends=False), answer]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    rendered = _render(place, messages, tokenizer, opened=True)
    return [_Chunk(rendered, special=False, learned=False, ends=False), answer]


def _turns(
    place: str, given: Sequence[Mapping[str, str]], learned: Sequence[Mapping[str, str]], tokenizer: Any
) -> list[_Chunk] | str:
    """Render a conversation turn by turn; the assistant's turns after the given ones are learned."""
    messages, written = [*given, *learned], ""
    chunks: list[_Chunk] = []
    for number in range(max(len(given), 1), len(messages)):  # an assistant's first message answers nothing: not learned
        answer = messages[number]["content"]
        if messages[number]["role"] != "assistant" or not answer.strip():
            continue
        opened = _render(place, messages[:number], tokenizer, opened=True)
        closed = _render(place, messages[: number + 1], tokenizer, opened=False)
        if not (opened.startswith(written) and closed.startswith(opened)):
            return REWRITTEN
        if opened != written:
            chunks.append(_Chunk(opened[len(written) :], special=False, learned=False, ends=False))
        chunks.append(_Chunk(closed[len(opened) :], special=False, learned=True, ends=True, answer=answer))
        written = closed
    return chunks or "without an answer to learn"


def _render(place: str, messages: Sequence[Mapping[str, str]], tokenizer: Any, *, opened: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=opened, tokenize=False))
    except Exception as error:  # a template is a program of its own: it may fail with anything
        raise UserError(f"{place}: the chat template refuses the messages ({error})") from error


def _tokenised(tokenizer: Any, chunks: Sequence[_Chunk]) -> list[list[int]]:
    """Tokenise all chunks in two calls, one with the special tokens that the tokenizer adds and one without."""
    ids: list[list[int]] = [[] for _ in chunks]
    for special in (False, True):
        numbers = [number for number, chunk in enumerate(chunks) if chunk.special == special]
        if numbers:
            texts = [chunks[number].text for number in numbers]
            found = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
            for number, row in zip(numbers, found, strict=True):
                ids[number] = [int(i) for i in row]
    return ids


def _joined(pieces: Sequence[tuple[_Chunk, list[int]]], stops: Sequence[int], end: int) -> Example:
    """Join the pieces of an example; what a template writes after the last end of a turn is left out."""
    example = Example([], [])
    for number, (chunk, ids) in enumerate(pieces):
        last = number == len(pieces) - 1
        stop = next((i for i, token in enumerate(ids) if token in stops), None) if chunk.ends else None
        if chunk.ends and chunk.special:  # a plain text: a special token in front of it does not end it
            stop = len(ids) - 1 if ids and ids[-1] in stops else None
        if chunk.ends and last:
            ids = [*ids, end] if stop is None else ids[: stop + 1]
        until = len(ids) if stop is None else stop + 1
        example.ids.extend(ids)
        example.learned.extend(chunk.learned and i < until for i in range(len(ids)))
    return example


def _pieces(example: Example, length: int) -> Iterable[Example]:
    for begin in range(0, len(example.ids) - 1, length - 1):
        part = slice(begin, begin + length)
        yield Example(example.ids[part], [False, *example.learned[part][1:]])
