"""Lay runs out on one page: their curves over each other, where the time went, completions to sort, filter and compare.

    python -m experiments.report runs/haiku                   # runs/haiku/report.html, as at the end of each run
    python -m experiments.report runs/haiku runs/sentiment    # both on report.html in the working folder

A run may be under way. The page loads nothing from anywhere and opens from disk.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from pgjax.core.errors import UserError
from pgjax.run import exits, presets
from pgjax.run.report.page import REPORT, write_report


@dataclasses.dataclass(frozen=True)
class Config:
    """Which runs are shown, and where."""

    runs: Positional[tuple[Path, ...]]  # the run folders
    output: Path | None = None  # the page; None: report.html in the folder of one run, or here of several


def main(config: Config) -> Path:
    """Write the page; return its path."""
    if not config.runs:
        raise UserError("no run is named: name one or more run folders")
    beside = config.runs[0] / REPORT if len(config.runs) == 1 else Path(REPORT)
    return write_report(config.runs, config.output or beside)


if __name__ == "__main__":
    with exits.plain_errors():
        print(main(presets.parse({"": Config(())}, description=__doc__)))
