"""Rows of records that have columns and types of their own: parquet files, and data sets of the package `datasets`."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pgjax.core.errors import MissingPackageError, UserError
from pgjax.data.messages import is_like, without_nulls

Row = dict[str, Any]


def read_parquet(path: Path) -> list[tuple[str, Row]]:
    """Read the rows of a parquet file.

    Args:
      path: the file.

    Returns:
      The rows, each with its number.

    Raises:
      UserError: it is no parquet file.
      MissingPackageError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingPackageError(
            f"{path}: reading parquet needs pyarrow: pip install pyarrow, or save it as .jsonl"
        ) from error
    try:
        records = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these two
        raise UserError(f"{path}: not a parquet file ({error})") from error
    return _counted(records)


def read_dataset(source: str, endings: Sequence[str]) -> list[tuple[str, Row]]:
    """Read the rows of a data set that the package `datasets` knows, or has saved in a folder.

    Args:
      source: as NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT; a split may be a part of one, ``train[:100]``.
      endings: of the files that it could have been, for messages.

    Returns:
      The rows, each with its number.

    Raises:
      UserError: no such data set or split.
      MissingPackageError: datasets is not installed.
    """
    kinds = f"no file (those end in {', '.join(endings)})"
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            f"{source!r} is {kinds}; as a name for the package datasets it needs: pip install datasets"
        ) from error
    name, *rest = re.split(r":(?![^\[]*\])", source)  # those within brackets are a slice's
    if len(rest) > 2 or not name or not all(rest):
        raise UserError(f"{source!r} is {kinds}, nor NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT of datasets")
    split = rest[-1] if rest else "train"
    saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "dataset_info.json"))
    try:
        if saved:
            return _counted(_saved_rows(source, datasets, datasets.load_from_disk(name), rest))
        return _counted(datasets.load_dataset(name, rest[0] if len(rest) == 2 else None, split=split))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = f"{type(error).__name__}: {error}"[:400]
        raise UserError(f"{source!r} is {kinds}, and datasets cannot give its split {split!r} ({reason})") from error


def _saved_rows(source: str, datasets: Any, found: Any, rest: Sequence[str]) -> Iterable[Row]:
    """Give the rows of a saved folder's split, or of a part of it."""
    if len(rest) == 2:
        raise UserError(f"{source!r}: a saved folder has no configurations: leave out {rest[0]!r}")
    if isinstance(found, datasets.DatasetDict):
        splits, split = dict(found), rest[0] if rest else "train"
    elif not rest:
        return found
    else:
        (split,) = rest
        name = None if found.split is None else str(found.split).partition("[")[0]
        if split.partition("[")[0] != name:
            known = "without splits" if name is None else f"the split {name!r}"
            raise UserError(
                f"{source!r}: the folder holds one data set, {known}, and no {split!r}: leave out the split, or save a "
                "DatasetDict that has it"
            )
        splits = {name: found}
    if split in splits:
        return splits[split]
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    return itertools.chain.from_iterable(splits[x.splitname].select(range(x.from_, x.to)) for x in parts)


def _counted(records: Iterable[Row]) -> list[tuple[str, Row]]:
    return [
        (f"row {number} (counted from 0)", {name: _records_as_given(name, value) for name, value in row.items()})
        for number, row in enumerate(records)
    ]


def _records_as_given(name: str, value: Any) -> Any:
    """Leave out of messages and tools what Arrow has put into every record; a null that was written there looks the same."""
    records = isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    return without_nulls(value) if records and (name == "tools" or is_like(value[0])) else value
