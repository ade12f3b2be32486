"""Tables of rows from JSON lines, CSV, parquet, plain text, or the package `datasets`; each row with its location."""

import ast
import csv
import io
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pgjax.core.errors import UserError
from pgjax.data.messages import is_like, listed
from pgjax.data.records import read_dataset, read_parquet

Row = dict[str, Any]
Placed = Sequence[tuple[str, Row]]  # rows with their locations: ("rows.jsonl, line 7", row)
_MANY = 5  # locations that a note lists


def read_table(source: str | os.PathLike[str], *, text_column: str = "prompt") -> list[tuple[str, Row]]:
    """Read the rows of a table, each with its location.

    Args:
      source: a file that ends in ``.jsonl`` (an object a line, blank lines skipped), ``.csv`` (with a header
        line), ``.parquet`` (needs pyarrow) or ``.txt`` (a text a line, blank lines skipped), in UTF-8; or a
        folder or a name that the package ``datasets`` knows, as ``NAME``, ``NAME:SPLIT`` or
        ``NAME:CONFIGURATION:SPLIT``; the split is ``train`` where none is given, and may be a part of one as
        ``datasets`` writes it, ``train[:100]`` or ``train[10%:20%]+test``.
      text_column: the column that the lines of a ``.txt`` file come in.

    Returns:
      The pairs (location, row) in order: ``("rows.jsonl, line 7", {...})``. Parquet and data sets put every field into every
      record, so from their messages and ``tools`` fields that are null are left out.

    Raises:
      UserError: no such file, data set or split, an unknown suffix, no rows, or a malformed line; the message names the file
        and the line.
      MissingPackageError: the package that reads this kind of file is not installed; the message names it.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "rows.csv"
      >>> _ = path.write_text("prompt,topic\\nWrite a haiku about rain,rain\\n")
      >>> [(place[-16:], row["topic"]) for place, row in read_table(path)]
      [('rows.csv, line 2', 'rain')]
    """
    path = Path(source)
    readers: dict[str, Callable[[Path], list[tuple[str, Row]]]] = {
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".txt": lambda path: _read_text(path, text_column),
        ".parquet": read_parquet,
    }
    if path.suffix.lower() in readers:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        numbered = readers[path.suffix.lower()](path)
    elif path.is_file():
        raise UserError(f"{path}: a table's file ends in {', '.join(readers)}, not {path.suffix or 'nothing'!r}")
    else:
        numbered = read_dataset(os.fspath(source), list(readers))
    if not numbered:
        raise UserError(f"{source}: the {'file' if path.is_file() else 'data set'} holds no rows")
    return [(f"{source}, {place}", row) for place, row in numbered]


def check_dicts(placed: Placed) -> None:
    """Check that all rows are dicts from column to value.

    Args:
      placed: rows with their locations.

    Raises:
      UserError: naming the row.

    Example:
      >>> check_dicts([("row 0", "a")])
      Traceback (most recent call last):
      pgjax.UserError: row 0: 'a' is not a row, a dict from column to value
    """
    for place, row in placed:
        if not isinstance(row, Mapping):
            raise UserError(f"{place}: {row!r} is not a row, a dict from column to value")


def check_same_columns(placed: Placed, among: Collection[str] | None = None) -> None:
    """Check that all rows have the columns of the first one.

    Args:
      placed: rows with their locations; at least one.
      among: the columns to compare; None: all.

    Raises:
      UserError: naming the row and the columns.

    Example:
      >>> check_same_columns([("row 0", {"text": "a"}), ("row 1", {"text": "b", "n": 1})])
      Traceback (most recent call last):
      pgjax.UserError: row 1: its columns differ from those of the first row in ['n']; give every row the same ones
    """
    check_dicts(placed)
    for place, row in placed:
        odd = sorted(name for name in set(row) ^ set(placed[0][1]) if among is None or name in among)
        if odd:
            raise UserError(
                f"{place}: its columns differ from those of the first row in {odd}; give every row the same ones"
            )


def check_text(place: str, name: str, text: Any) -> None:
    """Check that a value is a text that can be encoded.

    Args:
      place: location of its row, for messages.
      name: what the value is, for messages.
      text: the value.

    Raises:
      UserError: naming the row.

    Example:
      >>> check_text("line 2", "the answer", 3)
      Traceback (most recent call last):
      pgjax.UserError: line 2: the answer is 3, not a text
    """
    if not isinstance(text, str):
        raise UserError(f"{place}: {name} is {text!r}, not a text")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{place}: {name} {text!r} holds half of a surrogate pair, which cannot be encoded")


def check_messages(place: str, name: str, messages: Any) -> None:
    """Check that a value is a list of messages ``{"role": text, "content": text}``.

    Content may be a list of parts ``{"type": "text", "text": text}``, of which `as_messages` makes a text. A message with
    ``tool_calls``, a list of dicts, may have none. Other keys may hold anything: the chat template reads them.

    Args:
      place: location of its row, for messages.
      name: what the value is, for messages.
      messages: the value.

    Raises:
      UserError: naming the row.

    Example:
      >>> check_messages("line 2", "the prompt", [{"role": "user", "content": None}])
      Traceback (most recent call last):
      pgjax.UserError: line 2: a message is {'role': 'user', 'content': None}, and only one with tool_calls can do without content
    """
    if not isinstance(messages, list):
        raise UserError(f"{place}: {name} is {messages!r}, not a list of messages")
    if not messages:
        raise UserError(f"{place}: {name} is an empty list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"{place}: a message is {message!r}, not {{'role': a text, 'content': a text}}")
        calls, content = message.get("tool_calls"), message.get("content")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
            raise UserError(f"{place}: a message's tool_calls are {calls!r}, not a list of {{'function': a dict}}")
        if content is None and not calls:
            raise UserError(f"{place}: a message is {message!r}, and only one with tool_calls can do without content")
        for text in [content] if content is None or isinstance(content, str) else _texts(place, message):
            check_text(place, "a message's content", text or "")


def as_messages(place: str, name: str, value: Any) -> Any:
    """Read a value as messages where it is a list, tuple or array of them, or a text that is a list in JSON, as CSV holds it.

    Args:
      place: location of its row, for messages.
      name: what the value is, for messages.
      value: the value of a column that may hold messages.

    Returns:
      The list, each message without keys that are None (data sets put a key into every message) and with one text in place of
      parts of text; any other value as it is.

    Raises:
      UserError: a text that holds messages in another form, as Python prints them, one alone, or in JSON twice; it names the
        row.

    Example:
      >>> as_messages("line 2", "the prompt", '[{"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": null}]')
      [{'role': 'user', 'content': 'Hi'}]
      >>> as_messages("line 2", "the prompt", "[{x}]")
      '[{x}]'
      >>> as_messages("line 2", "the prompt", "[{'role': 'user', 'content': 'Hi'}]")
      Traceback (most recent call last):
      pgjax.UserError: line 2: the prompt is a list of messages as Python prints it: write it in JSON, as json.dumps does
    """
    value = _read_cell(place, name, value) if isinstance(value, str) else listed(value)
    return [_in_one_form(message) for message in value] if isinstance(value, list) else value


def _read_cell(place: str, name: str, text: str) -> Any:
    """Read a text that is messages in JSON; one that holds them otherwise is refused."""
    if not text.lstrip().startswith(("[", "{", "(", '"', "array(")) or not ("role" in text or "from" in text):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        if _is_printed(text):
            raise UserError(
                f"{place}: {name} is a list of messages as Python prints it: write it in JSON, as json.dumps does"
            ) from None
        return text
    if isinstance(found, list) and found and all(isinstance(x, dict) and is_like(x) for x in found):
        return found
    if isinstance(found, list) and found and all(isinstance(x, dict) and {"from", "value"} <= set(x) for x in found):
        raise UserError(
            f"{place}: {name} is a list of {{'from', 'value'}}: name them 'role' and 'content', and the roles 'user' and "
            "'assistant'"
        )
    if isinstance(found, dict) and is_like(found):
        raise UserError(f"{place}: {name} is a single message: write a list of it, [{{...}}]")
    if isinstance(found, str) and isinstance(_read_cell(place, name, found), list):
        raise UserError(f"{place}: {name} is a list of messages in JSON within JSON: encode it once")
    return text


def _in_one_form(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    given = {key: value for key, value in message.items() if value is not None}
    parts = given.get("content")
    if isinstance(parts, list) and all(map(_is_text, parts)):
        given["content"] = "".join(part["text"] for part in parts)
    return given


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _texts(place: str, message: Mapping[str, Any]) -> list[str]:
    """Give the texts of a message's content, which is no text itself."""
    parts = message["content"]
    if not isinstance(parts, list):
        raise UserError(f"{place}: a message is {message!r}, not {{'role': a text, 'content': a text}}")
    for part in parts:
        if not _is_text(part):
            kind = part.get("type") if isinstance(part, Mapping) else None
            what = repr(part)[:200] if kind in (None, "text") else f"of the type {kind!r}"
            raise UserError(
                f"{place}: a part of a message's content is {what}, and only parts {{'type': 'text', 'text': a text}} can be "
                "read: leave it out"
            )
    return [part["text"] for part in parts]


def _is_printed(text: str) -> bool:
    """Say whether a text is messages as Python prints them, or NumPy, which leaves out the commas. Nothing is run."""
    if not re.match(r"\s*(array\()?\s*[\[(]?\s*\{\s*['\"]", text):
        return False
    for source in (text, re.sub(r"\}\s+\{", "}, {", text)):
        try:
            found: ast.AST = ast.parse(source.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        if isinstance(found, ast.Call) and found.args:
            found = found.args[0]
        return all(
            isinstance(message, ast.Dict) and is_like([getattr(key, "value", None) for key in message.keys])
            for message in (found.elts if isinstance(found, ast.List | ast.Tuple) else [found])
        )
    return False


def note(done: str, places: Sequence[str], noun: str, rest: str) -> str:
    """Report what was done to some rows: how many they are, and the locations of the first of them.

    Args:
      done: the verb.
      places: locations of the rows; at least one.
      noun: what one of them is called.
      rest: what follows the noun.

    Returns:
      A line.

    Example:
      >>> note("left out", ["line 2"], "row", ", empty"), note("cut", ["line 3", "line 5"], "text", " into pieces")
      ('left out 1 row, empty: line 2', 'cut 2 texts into pieces: line 3; line 5')
    """
    more = f" and {len(places) - _MANY} more" if len(places) > _MANY else ""
    plural = "" if len(places) == 1 else "s"
    return f"{done} {len(places)} {noun}{plural}{rest}: {'; '.join(places[:_MANY])}{more}"


def left_out_notes(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """Report which rows were left out, a line for each reason.

    Args:
      left_out: reason -> locations of the rows.

    Returns:
      The lines; an empty list where nothing was left out.

    Example:
      >>> left_out_notes({"empty": ["line 2", "line 5"]})
      ['left out 2 rows, empty: line 2; line 5']
    """
    return [note("left out", places, "row", f", {why}") for why, places in left_out.items()]


def _lines(path: Path) -> list[tuple[int, str]]:
    """Split a file into numbered lines, ends kept; only the newline character ends a line."""
    numbered = []
    for number, raw in enumerate(io.BytesIO(path.read_bytes()), start=1):
        try:
            numbered.append((number, raw.decode("utf-8-sig" if number == 1 else "utf-8")))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not UTF-8 text ({error.reason}); save the file as UTF-8"
            ) from error
    return numbered


def _read_jsonl(path: Path) -> list[tuple[str, Row]]:
    rows = []
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg} at character {error.pos + 1})") from error
        except (ValueError, RecursionError) as error:  # a number of too many digits, lists too deep
            raise UserError(f"{path}, line {number}: JSON that cannot be read ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f'{path}, line {number}: a {type(row).__name__}, not an object like {{"prompt": "..."}}')
        rows.append((f"line {number}", row))
    return rows


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise UserError(f"the key {twice!r} occurs twice")
    return found


def _read_text(path: Path, column: str) -> list[tuple[str, Row]]:
    return [(f"line {number}", {column: line.rstrip("\r\n")}) for number, line in _lines(path) if line.strip()]


def _read_csv(path: Path) -> list[tuple[str, Row]]:
    # The csv module refuses fields beyond 128 KiB unless told otherwise; a text may well be longer.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    rows: list[tuple[str, Row]] = []
    header: list[str] | None = None
    try:
        for fields in reader:
            place = f"line {reader.line_num}"
            if not fields:
                continue
            if header is None:
                header = _check_header(path, fields)
            elif len(fields) != len(header):
                raise UserError(f"{path}, {place}: {len(fields)} fields, but the header names {len(header)} columns")
            else:
                rows.append((place, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    return rows


def _check_header(path: Path, header: list[str]) -> list[str]:
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise UserError(f"{path}, line 1: the column {twice[0]!r} occurs twice")
    return header
