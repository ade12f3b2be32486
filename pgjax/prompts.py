"""Prompt files: rows of JSON lines, CSV, parquet, plain text or a data set, checked to the line."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pgjax.tables import Placed, Row, as_messages, check_messages, check_same_columns, check_text, read_table

Prompt = str | Sequence[Mapping[str, str]]


def read_rows(path: str | Path) -> list[Row]:
    """Read the rows of a prompt file, each with a ``prompt`` and maybe further columns for the reward.

    Args:
      path: a source that `tables.read_table` takes: a file that ends in ``.jsonl``, ``.csv``, ``.parquet`` or
        ``.txt`` (a prompt a line), or a name for the package ``datasets``. A prompt is a text or a list of
        messages ``{"role": ..., "content": ...}``, which may be written in JSON, as CSV has it.

    Returns:
      The rows in file order, all with the same columns.

    Raises:
      ValueError: no such source, an unknown ending, no rows, no ``prompt`` column, or a malformed line; it
        names the file and the line.
      ImportError: the package that reads this kind of source is not installed.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "prompts.jsonl"
      >>> _ = path.write_text('{"prompt": "Write a haiku about rain", "topic": "rain"}')
      >>> read_rows(path)
      [{'prompt': 'Write a haiku about rain', 'topic': 'rain'}]
    """
    return check_rows(read_table(path, required=("prompt",)))


def check_rows(placed: Placed) -> list[Row]:
    """Check that rows have a prompt that can be one, and the same columns.

    Args:
      placed: each row behind the words that say where it stands; at least one.

    Returns:
      The rows alone; a prompt that is a JSON list of messages is that list.

    Raises:
      ValueError: naming the place.

    Example:
      >>> check_rows([("row 0", {"prompt": "Write"})])
      [{'prompt': 'Write'}]
    """
    for place, row in placed:
        if isinstance(row, Mapping) and "prompt" not in row:
            listed = ", ".join(map(repr, row)) or "none"
            raise ValueError(f"{place}: there is no column 'prompt'; the columns are {listed}")
    check_same_columns(placed)
    rows = [{**row, "prompt": as_messages(row["prompt"])} for _, row in placed]
    for (place, _), row in zip(placed, rows, strict=True):
        check_prompt(place, row["prompt"])
    return rows


def check_prompt(place: str, prompt: object) -> None:
    """Check that a value can be a prompt: a text that is not empty, or a list of messages.

    Args:
      place: where its row stands.
      prompt: the value.

    Raises:
      ValueError: naming the place.

    Example:
      >>> check_prompt("line 3", "")
      Traceback (most recent call last):
      ValueError: line 3: the prompt is empty
    """
    if isinstance(prompt, list):
        check_messages(place, "the prompt", prompt)
    elif not isinstance(prompt, str):
        raise ValueError(f"{place}: the prompt is {prompt!r}, not a text or a list of messages")
    else:
        check_text(place, "the prompt", prompt)
        if not prompt:
            raise ValueError(f"{place}: the prompt is empty")
