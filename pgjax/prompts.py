"""Prompt files: rows of JSON lines, CSV, parquet or plain text, checked to the line."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Prompt = str | Sequence[Mapping[str, str]]


def read_rows(path: str | Path) -> list[Row]:
    """Read the rows of a prompt file, each with a ``prompt`` and maybe further columns for the reward.

    Args:
      path: a file that ends in ``.jsonl`` (an object a line, blank lines skipped), ``.csv`` (with a header
        line), ``.parquet`` (needs pyarrow) or ``.txt`` (a prompt a line, blank lines skipped), in UTF-8. A
        prompt is a text or a list of messages ``{"role": ..., "content": ...}``.

    Returns:
      The rows in file order, all with the same columns.

    Raises:
      ValueError: no such file, an unknown ending, no rows, no ``prompt`` column, or a malformed line; it
        names the file and the line.
      ImportError: a parquet file without pyarrow installed.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "prompts.jsonl"
      >>> _ = path.write_text('{"prompt": "Write a haiku about rain", "topic": "rain"}')
      >>> read_rows(path)
      [{'prompt': 'Write a haiku about rain', 'topic': 'rain'}]
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_text, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: a prompt file ends in {', '.join(readers)}, not {path.suffix or 'nothing'!r}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    numbered = readers[path.suffix.lower()](path)
    if not numbered:
        raise ValueError(f"{path}: the file holds no rows")
    return check_rows([(f"{path}, {place}", row) for place, row in numbered])


def check_rows(placed: Sequence[tuple[str, Row]]) -> list[Row]:
    """Check that rows have a prompt that can be one, and the same columns.

    Args:
      placed: each row behind the words that say where it stands; at least one.

    Returns:
      The rows alone.

    Raises:
      ValueError: naming the place.

    Example:
      >>> check_rows([("row 0", {"prompt": "Write"})])
      [{'prompt': 'Write'}]
    """
    for place, row in placed:
        if not isinstance(row, Mapping):
            raise ValueError(f"{place}: {row!r} is not a row, a dict with a 'prompt'")
        _check_row(place, row, list(placed[0][1]))
    return [row for _, row in placed]


def _check_row(place: str, row: Row, columns: Sequence[str]) -> None:
    if "prompt" not in row:
        raise ValueError(f"{place}: there is no column 'prompt'; the columns are {', '.join(map(repr, row)) or 'none'}")
    if set(row) != set(columns):
        odd = sorted(set(row) ^ set(columns))
        raise ValueError(
            f"{place}: its columns differ from those of the first row in {odd}; give every row the same ones"
        )
    prompt = row["prompt"]
    if isinstance(prompt, list):
        _check_messages(place, prompt)
    elif not isinstance(prompt, str):
        raise ValueError(f"{place}: the prompt is {prompt!r}, not a text or a list of messages")
    elif any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError(f"{place}: the prompt {prompt!r} holds half a surrogate pair, which is no text")
    elif not prompt:
        raise ValueError(f"{place}: the prompt is empty")


def _check_messages(place: str, messages: Sequence[Any]) -> None:
    if not messages:
        raise ValueError(f"{place}: the prompt is an empty list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(f"{place}: a message is {message!r}, not {{'role': a text, 'content': a text}}")


def _lines(path: Path) -> list[tuple[int, str]]:
    """Split a file into numbered lines, ends kept; only the newline ends a line, no other separator."""
    numbered = []
    for number, raw in enumerate(io.BytesIO(path.read_bytes()), start=1):
        try:
            numbered.append((number, raw.decode("utf-8-sig" if number == 1 else "utf-8")))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not UTF-8 text ({error.reason}); save the file as UTF-8"
            ) from error
    return numbered


def _read_jsonl(path: Path) -> list[tuple[str, Row]]:
    rows = []
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg} at character {error.pos + 1})") from error
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {number}: a {type(row).__name__}, not an object like {{"prompt": "..."}}')
        rows.append((f"line {number}", row))
    return rows


def _read_text(path: Path) -> list[tuple[str, Row]]:
    return [(f"line {number}", {"prompt": line.rstrip("\r\n")}) for number, line in _lines(path) if line.strip()]


def _read_csv(path: Path) -> list[tuple[str, Row]]:
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
                raise ValueError(f"{path}, {place}: {len(fields)} fields, but the header names {len(header)} columns")
            else:
                rows.append((place, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    return rows


def _check_header(path: Path, header: list[str]) -> list[str]:
    if "prompt" not in header:
        raise ValueError(f"{path}, line 1: there is no column 'prompt'; the columns are {', '.join(map(repr, header))}")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise ValueError(f"{path}, line 1: the column {twice[0]!r} is there twice")
    return header


def _read_parquet(path: Path) -> list[tuple[str, Row]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(
            f"{path}: reading parquet needs pyarrow: pip install pyarrow, or save it as .jsonl"
        ) from error
    try:
        records: Iterable[Row] = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are these two
        raise ValueError(f"{path}: not a parquet file ({error})") from error
    return [(f"row {number} (counted from 0)", row) for number, row in enumerate(records)]
