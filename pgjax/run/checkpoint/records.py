"""Small files that a run writes whole, and records in them that are compared field by field."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: a run that is killed meanwhile leaves no half of it.

    Args:
      path: the file; beside it stands PATH.part for a moment.
      text: what it is to hold, in UTF-8.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as root:
      ...     write_whole(Path(root, "x"), "1")
      ...     Path(root, "x").read_text()
      '1'
    """
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def other_fields(
    before: Mapping[str, Any], after: Mapping[str, Any], words: tuple[str, str], but: Collection[str] = ()
) -> list[str]:
    """Name the fields in which two records differ, nested ones by dotted names, with both values.

    Args:
      before: one record.
      after: the other.
      words: what to call them.
      but: fields that may differ, with all that they hold.

    Returns:
      A text a field.

    Example:
      >>> other_fields({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}}, ("there", "here"), but=("c",))
      ['a.b: 1 there, 3 here']
    """
    old, new, missing = _flat(before), _flat(after), "(not set)"
    return [
        f"{name}: {old.get(name, missing)!r} {words[0]}, {new.get(name, missing)!r} {words[1]}"
        for name in sorted(old.keys() | new.keys())
        if name.split(".")[0] not in but and name not in but and old.get(name, missing) != new.get(name, missing)
    ]


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in record.items():
        nested = isinstance(value, Mapping) and len(value) > 0
        fields.update(_flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value})
    return fields
