"""Load rows from a file, a data set, or a function named as module:function."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from pgjax.core.errors import UserError
from pgjax.data.batches import split_rows
from pgjax.data.tables import Placed, read_table

Checked = TypeVar("Checked")
Kind = TypeVar("Kind")  # type of a checked row


def load_rows(source: str | Path, check: Callable[[Placed], Checked], *, text_column: str = "prompt") -> Checked:
    """Read rows and check them.

    Args:
      source: what `pgjax.data.tables.read_table` takes, or module:function, a function without arguments that
        gives rows.
      check: takes the rows with their locations, as `pgjax.data.prompts.check_rows` does.
      text_column: the column that the lines of a .txt file come in.

    Returns:
      What `check` returns.

    Raises:
      UserError: no such source, no rows, or rows that `check` refuses.

    Example:
      >>> from pgjax.data.prompts import check_rows
      >>> load_rows("experiments.tasks.haiku:held_out_rows", check_rows)[0]
      {'prompt': 'Write a haiku about dragons', 'topic': 'dragons'}
    """
    source = str(source)
    module, colon, name = source.partition(":")
    if not colon or Path(source).exists() or not _is_module(module):
        if colon and "." in module and _is_module(module.partition(".")[0]):
            raise UserError(f"{source!r}: there is no module {module!r}")  # or the hub is searched, slowly
        try:
            placed = read_table(source, text_column=text_column)
        except UserError as error:
            if not colon:
                raise
            raise UserError(f"{error}; and as module:function, there is no module {module!r}") from error
        return check(placed)
    try:
        function: Callable[[], list[Any]] = vars(importlib.import_module(module))[name]
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{source!r}: module {module!r} cannot be imported ({error})") from error
    except KeyError:
        raise UserError(f"{source!r}: module {module!r} has no function {name!r}") from None
    given = function() if callable(function) and _needs_nothing(function) else None
    if not isinstance(given, Iterable):
        raise UserError(
            f"{source!r} must be a function without arguments that returns a list of rows; it is {function!r}"
        )
    rows = list(given)
    if not rows:
        raise UserError(f"{source} returns no rows")
    return check([(f"{source}, row {i}", row) for i, row in enumerate(rows)])


def load_row_sets(
    source: str,
    held_out: str | None,
    held_out_rows: int,
    check: Callable[[Placed], list[Kind]],
    *,
    text_column: str = "prompt",
) -> tuple[list[Kind], list[Kind]]:
    """Load training rows and held-out rows; without a source of their own the latter are split off at random.

    Args:
      source: of the training rows, as for `load_rows`.
      held_out: of the held-out rows; None: they are taken from `source`, the same ones each time.
      held_out_rows: how many to split off where `held_out` is None.
      check: as for `load_rows`.
      text_column: as for `load_rows`.

    Returns:
      The training rows and the held-out rows.

    Raises:
      UserError: as in `load_rows`, or fewer rows than are to be held out.

    Example:
      >>> from pgjax.data.prompts import check_rows
      >>> [len(rows) for rows in load_row_sets("experiments.tasks.haiku:held_out_rows", None, 6, check_rows)]
      [10, 6]
    """
    rows = load_rows(source, check, text_column=text_column)
    if held_out is None:
        return split_rows(rows, held_out_rows, seed=0)
    return rows, load_rows(held_out, check, text_column=text_column)


def _needs_nothing(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    return True


def _is_module(name: str) -> bool:
    """Say whether a dotted name is that of an existing module; "org/name", "imdb" and a folder are data sets.

    Nothing is imported for that, as `importlib.util.find_spec` would import the packages that the module is in.
    """
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return False
    if name in sys.modules:
        return True
    found = importlib.util.find_spec(parts[0]) if parts[0] not in sys.modules else sys.modules[parts[0]].__spec__
    for end in range(2, len(parts) + 1):
        if found is None or found.submodule_search_locations is None:
            return False
        found = importlib.machinery.PathFinder.find_spec(".".join(parts[:end]), list(found.submodule_search_locations))
    return found is not None and found.origin is not None  # a plain folder is found too, without an origin
