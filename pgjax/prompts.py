"""Prompt files: rows of JSON lines, CSV, parquet, plain text or a data set, checked to the line."""

from collections.abc import Mapping, Sequence

from pgjax.tables import Placed, Row, as_messages, check_messages, check_same_columns, check_text

Prompt = str | Sequence[Mapping[str, str]]


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
