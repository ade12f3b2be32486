"""Whole iterations of RLOO whose completions end when they end: this build, packed and padded, beside another checkout.

    git clone . ../older && git -C ../older checkout ddcce80
    python -m benchmarks.uneven ../older
    python -m benchmarks.uneven ../older --lists heavy --completions 64 --json benchmarks/results/uneven.json

The lengths of prompts and completions are lists that are kept here (`uneven_lengths.json`): of haiku as SmolLM2 writes them, and
two lognormal ones. Every row of this build ends where its list says, by force; ids are random. Contenders take turns, each
in a process of its own, one warm-up and then `repeats` rounds:

    packed  = this build, with pack_tokens
    padded  = this build, with microbatches
    other   = the other checkout's own iteration with every completion at the limit. A build from before packed rows computes
              as much on the list: it scores and learns all columns of every row, and samples until the longest row ends, which
              is at the limit in every list (of fewer completions than 64: in the limit that is cut to their longest)

    tokens/s       = tokens of completions on the list / seconds
    times as fast  = median seconds of the other / of this contender; of sampling and of the whole
    memory         = high-water mark of the process (Linux), against the other's
    --limits       = instead, seconds of the packed iteration on one list under several limits, and the exponent of
                     seconds ~ limit^e: 0 where a limit that nobody reaches costs nothing
"""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.checks import check, command
from benchmarks.timing import Row, Timing, alternate, commit, machine, plain, save
from benchmarks.worker import ROOT, Worker
from pgjax.core.errors import UserError

LISTS: dict[str, Row] = json.loads(Path(__file__).with_name("uneven_lengths.json").read_text(encoding="utf-8"))
SIDE = Path(__file__).with_name("uneven_side.py").read_text(encoding="utf-8")
GROUP = 4  # completions of each prompt in the lists


@dataclasses.dataclass(frozen=True)
class Config:
    """One comparison."""

    other: tyro.conf.Positional[Path | None] = None  # checkout of the build to compare with; None: this build alone
    lists: tuple[Literal["haiku", "questions", "heavy"], ...] = ("haiku",)  # of lengths, one after the other
    completions: int = 64  # the first ones of a list
    limits: tuple[int, ...] = ()  # measure growth with the limit, in place of the comparison
    model: str = "SmolLM2-135M-Instruct"  # in float32
    pack_tokens: int = 512  # of the packed iteration
    microbatches: int = 4  # of the others
    repeats: int = 3  # timed rounds
    json: Path | None = None  # write the report here too


def main(config: Config) -> Row:
    """Run the benchmark; return and print the report."""
    check(config)
    if config.completions % (GROUP * config.microbatches) or config.completions > 64:
        raise UserError(
            f"completions={config.completions} must be at most 64, and hold whole groups of {GROUP} in each of "
            f"microbatches={config.microbatches}"
        )
    report: Row = {"machine": machine(), "commit": commit(ROOT), "config": plain(config), "rows": []}
    for name in config.lists:
        pairs = LISTS[name]["pairs"][: config.completions]
        longest = max(new for _, new in pairs)
        if config.limits:
            if min(config.limits) < longest:
                raise UserError(f"limits={config.limits}: the longest completion of {name} has {longest} tokens")
            sides = {str(limit): (ROOT, ours(config, pairs, limit)) for limit in config.limits}
        else:
            padded = {**ours(config, pairs, longest), "pack_tokens": None}
            sides = {
                "packed": (ROOT, ours(config, pairs, longest)),
                "padded": (ROOT, {**padded, "microbatches": config.microbatches}),
            }
            if config.other is not None:
                whole = {key: x for key, x in padded.items() if key != "pack_tokens"}
                sides["other"] = (config.other.resolve(), {**whole, "microbatches": config.microbatches})
        with ExitStack() as stack:
            running = {}
            for who, (folder, setup) in sides.items():
                worker = Worker(who, [sys.executable, "-c", SIDE], setup, folder=folder)
                stack.callback(worker.close)
                running[who] = worker.run
            times = alternate(running, config.repeats)
            for who in sides:
                if who not in times:
                    running[who]()  # it failed: raise its error
        report["rows"] += [measure(name, who, timing, pairs) for who, timing in times.items()]
        if config.limits:
            seconds = [median(times[str(limit)].wall) for limit in config.limits]
            report.setdefault("exponents", {})[name] = float(np.polyfit(np.log(config.limits), np.log(seconds), 1)[0])
    show(report)
    save(report, config.json)
    return report


def ours(config: Config, pairs: list[Any], limit: int) -> Row:
    """Give the set-up of the packed iteration."""
    return {
        "model": config.model, "pairs": pairs, "limit": limit, "group_size": GROUP, "microbatches": 1,
        "pack_tokens": config.pack_tokens,
    }  # fmt: skip


def measure(name: str, who: str, timing: Timing, pairs: list[Any]) -> Row:
    """Take the medians of a contender.

    >>> row = measure("heavy", "packed", Timing([2.0], [3.0], [{"rollout": 1.5, "peak_bytes": 5}]), [[1, 8], [1, 2]])
    >>> row["tokens_per_second"], row["rollout_seconds"]
    (5.0, 1.5)
    """
    seconds, tokens = median(timing.wall), sum(new for _, new in pairs)
    return {
        "list": name, "who": who, "seconds": seconds, "round_seconds": timing.wall, "cpu_seconds": median(timing.cpu),
        "rollout_seconds": median(x["rollout"] for x in timing.results), "tokens": tokens,
        "tokens_per_second": tokens / seconds, "peak_bytes": max(x["peak_bytes"] for x in timing.results),
    }  # fmt: skip


def show(report: Row) -> None:
    """Print the table."""
    table = Table(
        "list",
        "who",
        "seconds",
        "CPU s",
        "sampling s",
        "tokens/s",
        "times as fast",
        "sampling",
        "peak MB",
        "of the other's",
    )
    other = {row["list"]: row for row in report["rows"] if row["who"] == "other"}
    for row in report["rows"]:
        versus = other.get(row["list"])
        ratios = ["", "", ""]
        if versus is not None:
            ratios = [f"{versus[key] / row[key]:.2f}" for key in ("seconds", "rollout_seconds", "peak_bytes")]
            ratios[2] = f"{row['peak_bytes'] / versus['peak_bytes']:.2f}"
        figures = (f"{row[key]:.1f}" for key in ("seconds", "cpu_seconds", "rollout_seconds", "tokens_per_second"))
        table.add_row(row["list"], row["who"], *figures, *ratios[:2], f"{row['peak_bytes'] / 1e6:.0f}", ratios[2])
    Console(width=None if Console().is_terminal else 160).print(table)
    for name, exponent in report.get("exponents", {}).items():
        print(f"{name}: seconds grow with the limit to the power {exponent:.2f}")


if __name__ == "__main__":
    command(main, Config, __doc__)
