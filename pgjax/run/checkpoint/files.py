"""The files of one snapshot beside its arrays: a sealed record, the sizes of all files, and its place when it is damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgjax.core.errors import UserError
from pgjax.run.checkpoint.barrier import reason
from pgjax.run.checkpoint.records import write_whole

_EXTRA = "extra"  # the folder that orbax keeps JSON in
_SIZES = "sizes.json"


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Add a record's own digest, by which `read_record` sees a change.

    Args:
      record: what JSON can hold.

    Example:
      >>> len(sealed({"step": 3})["seal"])
      64
    """
    return {**record, "seal": _seal(record)}


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record that orbax wrote beside a snapshot's arrays.

    Args:
      folder: of the snapshot.

    Returns:
      The record without its seal.

    Raises:
      ValueError: it cannot be read, or is not what was sealed.

    Example:
      >>> read_record(Path("nowhere"))
      Traceback (most recent call last):
      pgjax.UserError: nowhere/extra/metadata: No such file or directory: 'nowhere/extra/metadata'
    """
    file = folder / _EXTRA / "metadata"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        seal = record.pop("seal")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: {reason(error)}") from error
    if seal != _seal(record):
        raise UserError(f"{file} is not what was saved")
    return record


def note_sizes(folder: Path) -> None:
    """Write down how long each file of a finished snapshot is; orbax never reads some of them, and misses no cut there.

    Args:
      folder: of the snapshot; nothing happens where it is not there, or has been noted.

    Example:
      >>> note_sizes(Path("nowhere"))
    """
    noted = folder / _EXTRA / _SIZES
    if not noted.parent.is_dir() or noted.exists():
        return
    with contextlib.suppress(OSError):  # a full disk: the snapshot itself is whole, and its arrays have digests
        write_whole(noted, json.dumps(_sizes(folder)))


def changed_sizes(folder: Path) -> list[str]:
    """Name the files that are not as long as they were; none where a run was killed before they were noted.

    Args:
      folder: of the snapshot.

    Returns:
      A text a file.

    Example:
      >>> changed_sizes(Path("nowhere"))
      []
    """
    try:
        noted = json.loads((folder / _EXTRA / _SIZES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        return [f"{_SIZES}: {reason(error)}"]
    now = _sizes(folder)
    return [f"{name} has {now.get(name, 0)} bytes of {size}" for name, size in noted.items() if now.get(name) != size]


def put_aside(folder: Path) -> str:
    """Rename a damaged snapshot's folder to FOLDER.damaged, or with a number behind it where there is one.

    Args:
      folder: of the snapshot.

    Returns:
      Where it lies now.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as root:
      ...     (Path(root) / "3").mkdir()
      ...     put_aside(Path(root) / "3").endswith("3.damaged")
      True
    """
    places = [f"{folder.name}.damaged", *(f"{folder.name}.damaged.{i}" for i in range(1, 100))]
    return str(folder.rename(next(place for name in places if not (place := folder.with_name(name)).exists())))


def _seal(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _sizes(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != _SIZES]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}
