"""What every benchmark asks of its input before any work, and how it ends when that is wrong: one line that names the field."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

from pgjax.core.checks import check_whole

Dtype = Literal["float32", "bfloat16"]  # jax makes float64 into float32 unless told otherwise, and no peer runs float16


def check(config: Any) -> None:
    """Refuse counts below 1, unknown or no dtypes, and a path that the report can't be written to.

    Args:
        config: of a benchmark; every whole number in it is a count, but for the seed.

    Raises:
        ValueError: with the field, its value and what it must be.

    >>> config = dataclasses.make_dataclass("Config", [("repeats", "int"), ("depth", "int | None", None)])
    >>> check(config(repeats=1))
    >>> check(config(repeats=0))
    Traceback (most recent call last):
    ValueError: repeats must be at least 1, got 0
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "int" or (field.type == "int | None" and value is not None):
            check_whole(field.name, value, 0 if field.name == "seed" else 1)
        elif field.name == "dtypes":
            check_dtypes(value)
        elif field.name == "json" and value is not None:
            check_writable("json", value)


def check_dtypes(dtypes: tuple[str, ...]) -> None:
    """Refuse a dtype that no benchmark has, and none at all.

    >>> check_dtypes(("float64",))
    Traceback (most recent call last):
    ValueError: dtypes must be one or more of float32, bfloat16, got ('float64',)
    """
    if not dtypes or not set(dtypes) <= set(get_args(Dtype)):
        raise ValueError(f"dtypes must be one or more of {', '.join(get_args(Dtype))}, got {dtypes}")


def check_writable(name: str, path: Path) -> None:
    """Make a file's folder and try to write there: who asks for a report must not learn after the work that none can be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            path.open("a").close()
    except OSError as error:
        raise ValueError(f"{name}={path} can't be written: {error.strerror}") from error


def command(main: Callable[[Any], Any], config: type, story: str | None) -> Any:
    """Run a benchmark from the command line; input that it refuses is one line, without a traceback."""
    chosen: Any = tyro.cli(config, description=story)
    try:
        return main(chosen)
    except ValueError as error:
        sys.exit(f"error: {error}")
