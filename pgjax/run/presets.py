"""A script's command line: the name of a preset, the first one where none is named, and fields that override it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pgjax.run.packages import of_scripts

T = TypeVar("T")


def parse(
    presets: Mapping[str, T],
    *,
    description: str | None = None,
    goes_with: Mapping[str, Mapping[str, Any]] | None = None,
    args: Sequence[str] | None = None,
) -> T:
    """Parse a command line into a config by `tyro`.

    Some fields of a preset belong to another of its fields, as held-out rows belong to the rows to train on. Where such
    a leading field is given and the ones that go with it are not, these are dropped.

    Args:
      presets: frozen dataclasses by name; the first one is the default. A single one needs no name.
      description: what --help says above the fields.
      goes_with: leading field -> {field that goes with it: its value without the preset}.
      args: the command line; None: the process's own.

    Returns:
      The config.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     rows: str = "haiku"
      ...     held_out: str | None = "more haiku"
      ...     steps: int = 16
      >>> presets = {"haiku": Config(), "reviews": Config("reviews", "more reviews")}
      >>> goes_with = {"rows": {"held_out": None}}
      >>> parse(presets, goes_with=goes_with, args=["reviews", "--steps", "3"])
      Config(rows='reviews', held_out='more reviews', steps=3)
      >>> parse(presets, goes_with=goes_with, args=["--rows", "mine.jsonl"])
      Config(rows='mine.jsonl', held_out=None, steps=16)
    """
    goes_with = {} if goes_with is None else goes_with
    config: Any = _parsed(presets, description, args)
    followers = {name: value for group in goes_with.values() for name, value in group.items()}
    bare = {name: dataclasses.replace(preset, **followers) for name, preset in presets.items()}  # type: ignore[type-var]
    without: Any = _parsed(bare, description, args)  # what is left of the followers is what the command line gave
    dropped = {
        name: getattr(without, name)
        for leader, group in goes_with.items()
        for name in group
        if not any(
            getattr(preset, leader) == getattr(config, leader) and getattr(preset, name) == getattr(config, name)
            for preset in presets.values()
        )
    }
    return dataclasses.replace(config, **dropped)


def _parsed(presets: Mapping[str, T], description: str | None, args: Sequence[str] | None) -> T:
    tyro = of_scripts("tyro")

    default = next(iter(presets.values()))
    kind: Any = type(default) if len(presets) == 1 else tyro.extras.subcommand_type_from_defaults(presets)
    # cascading arguments need no name of a preset in front of them: they are the default's then
    config = (tyro.conf.CascadeSubcommandArgs,)
    return tyro.cli(kind, default=default, args=args, description=description, config=config)
