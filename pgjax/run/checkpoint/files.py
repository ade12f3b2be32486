"""The files of one snapshot beside its arrays: its record, and its folder when it is damaged."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgjax.core.errors import UserError
from pgjax.run.checkpoint.records import write_whole

_RECORD = "record.json"


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a snapshot whose arrays are written; without it, it is none.

    With it stand the lengths of all files, since orbax never reads some of them and misses no cut there, and its own digest.

    Args:
      folder: of the snapshot.
      record: what JSON can hold.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_record(Path(folder), {"step": 3})
      ...     read_record(Path(folder))
      {'step': 3, 'sizes': {}}
    """
    record = {**record, "sizes": _sizes(folder)}
    write_whole(folder / _RECORD, json.dumps({**record, "seal": _seal(record)}))


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of a snapshot.

    Args:
      folder: of the snapshot.

    Returns:
      The record and `sizes`, the lengths of all other files.

    Raises:
      UserError: it cannot be read, or is not what was written.

    Example:
      >>> read_record(Path("nowhere"))
      Traceback (most recent call last):
      pgjax.UserError: nowhere/record.json: No such file or directory: 'nowhere/record.json'
    """
    file = folder / _RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        seal = record.pop("seal")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: {reason(error)}") from error
    if seal != _seal(record):
        raise UserError(f"{file} is not what was saved")
    return record


def changed_sizes(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """Name the files that are not as long as they were.

    Args:
      folder: of the snapshot.
      sizes: of its record.

    Returns:
      A text a file.

    Example:
      >>> changed_sizes(Path("nowhere"), {"state/d/1": 70})
      ['state/d/1 has 0 bytes of 70']
    """
    now = _sizes(folder)
    return [f"{name} has {now.get(name, 0)} bytes of {size}" for name, size in sizes.items() if now.get(name) != size]


def rename_damaged(folder: Path) -> str:
    """Rename a damaged snapshot's folder to FOLDER.damaged, or with a number behind it where there is one.

    Args:
      folder: of the snapshot.

    Returns:
      Where it lies now.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as root:
      ...     (Path(root) / "3").mkdir()
      ...     rename_damaged(Path(root) / "3").endswith("3.damaged")
      True
    """
    places = [f"{folder.name}.damaged", *(f"{folder.name}.damaged.{i}" for i in range(1, 100))]
    return str(folder.rename(next(place for name in places if not (place := folder.with_name(name)).exists())))


def reason(error: BaseException) -> str:
    """Find the operating system's own words in an error, or else take its first line.

    Args:
      error: of the file system, of orbax or of tensorstore.

    Returns:
      One line.

    Example:
      >>> reason(OSError(28, "No space left on device")), reason(ValueError("no"))
      ('No space left on device', 'no')
    """
    text = str(error) or type(error).__name__
    found = re.search(r": ([^:\[\]\n]+) \[os_error_code=", text)
    return found.group(1) if found else re.sub(r"^\[Errno \d+\] ", "", text.split("\n")[0])[:200]


def _seal(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _sizes(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / _RECORD]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}
