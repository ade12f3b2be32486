"""Checks of a benchmark's config before any work begins, and the command line's way to report what they refuse."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

from pgjax.core.errors import UserError
from pgjax.run.checks import require

Dtype = Literal["float32", "bfloat16"]  # jax makes float64 into float32 unless told otherwise, and no peer runs float16


def check(config: Any) -> None:
    """Refuse counts below 1, unknown or no dtypes, and a path that the report can't be written to.

    Args:
        config: of a benchmark; every whole number in it is a count, except the seed.

    Raises:
        UserError: with the field, its value and what it must be.

    >>> config = dataclasses.make_dataclass("Config", [("repeats", "int"), ("depth", "int | None", None)])
    >>> check(config(repeats=1))
    >>> check(config(repeats=0))
    Traceback (most recent call last):
    pgjax.UserError: repeats must be at least 1, got 0
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "int" or (field.type == "int | None" and value is not None):
            least = 0 if field.name == "seed" else 1
            require(value >= least, f"{field.name} must be at least {least}, got {value}")
        elif field.name == "dtypes":
            check_dtypes(value)
        elif field.name == "json" and value is not None:
            check_writable("json", value)


def check_dtypes(dtypes: tuple[str, ...]) -> None:
    """Refuse a dtype that no benchmark has, and an empty list of them.

    >>> check_dtypes(("float64",))
    Traceback (most recent call last):
    pgjax.UserError: dtypes must be one or more of float32, bfloat16, got ('float64',)
    """
    known = get_args(Dtype)
    require(
        bool(dtypes) and set(dtypes) <= set(known), f"dtypes must be one or more of {', '.join(known)}, got {dtypes}"
    )


def check_writable(name: str, path: Path) -> None:
    """Make a file's folder and try to write there, so that a report that can't be saved is known before the work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            path.open("a").close()
    except OSError as error:
        raise UserError(f"{name}={path} can't be written: {error.strerror}") from error


def command(main: Callable[[Any], Any], config: type, description: str | None) -> Any:
    """Run a benchmark from the command line; what it refuses in its input is printed as one line, without a traceback."""
    chosen: Any = tyro.cli(config, description=description)
    try:
        return main(chosen)
    except UserError as error:
        sys.exit(f"error: {error}")
