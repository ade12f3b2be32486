"""Run all benchmarks in turn: how fast each part is, how near to the machine's limit, and how fast beside other libraries.

    python -m benchmarks
    python -m benchmarks --only rollout learner --output out
    python -m benchmarks --peer-pythons path/to/one/python path/to/another/python

Each benchmark prints its own table and writes its report as JSON when it ends. Where one fails, the others still run; the
failure is printed at the end, and the exit status is 1. The peers run in turn with pgjax. The last table is a summary:

    limit    = max(flops on paper / measured matrix peak, bytes on paper / measured read bandwidth), in seconds
    achieved = limit / seconds
    times    = the peer's median seconds / ours

The pictures are the roofline with every row on it (roofline.png) and the curves of growth (growth.png), drawn from all reports
in the folder: a run of one benchmark renews its own points and keeps the others'.
"""

from __future__ import annotations

import dataclasses
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks import compile, iteration, learner, logprobs, pictures, rollout, scaling, scoring
from benchmarks.checks import check_writable, command
from benchmarks.interpreters import installed
from benchmarks.timing import OURS, Row

BENCHMARKS: dict[str, Any] = {
    "rollout": rollout, "scoring": scoring, "learner": learner, "logprobs": logprobs, "iteration": iteration,
    "compile": compile, "scaling": scaling,
}  # fmt: skip
Name = Literal["rollout", "scoring", "learner", "logprobs", "iteration", "compile", "scaling"]

# What SmolLM2-135M should reach on two CPU cores at the default sizes, by benchmark, our row and dtype. Bounds set before
# the work began, from what a plain jax program, torch and TRL reached on such a machine.
TARGETS: dict[tuple[str, str, str], str] = {
    ("rollout", "decode", "float32"): "4x torch generate, 60% of the memory",  # a plain jax loop, unrolled, is at 2.6x
    ("rollout", "decode", "bfloat16"): "1.5x our float32, on jax 0.12",  # half the bytes to read
    ("learner", "", "float32"): "2.5x torch, 55% of the matrix peak",  # a plain jax program is at 1.3x and 33%
    ("iteration", "PPO", "float32"): "5x TRL's PPO",  # with its separate value model
    ("iteration", "RLOO", "float32"): "3x TRL's RLOO",  # 4 generations, the same number of completions
    ("logprobs", "", "float32"): "1.1x the naive time at most, 15% of its temporaries",  # logits are computed twice
    ("logprobs", "", "bfloat16"): "1.1x the naive time at most, 15% of its temporaries",
    ("compile", "both cold", "float32"): "30 s, on jax 0.12",  # learner and sampler, 30 layers
    ("compile", "both cached", "float32"): "5 s",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """All benchmarks at their default sizes. For other sizes, run one alone: python -m benchmarks.NAME --help."""

    only: tuple[Name, ...] = ()  # benchmarks to run; none given: all
    peer: bool = True  # alternate with torch, TRL and Tunix where they are installed
    peer_pythons: tuple[str, ...] = ()  # interpreters to look for the peers in, in this order; none: this one
    output: Path = Path("runs/benchmarks")  # folder of the JSON files and pictures


def main(config: Config) -> int:
    """Run the benchmarks; return the exit status."""
    names = [name for name in BENCHMARKS if not config.only or name in config.only]
    configs = {name: configured(name, config) for name in names}
    for one in configs.values():
        check_writable("output", one.json)
    for python in config.peer_pythons:
        installed(python, ())  # one that does not run is an error now, and not in each benchmark
    reports, failures = run_all(configs, BENCHMARKS)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(summary(reports))
    pictures.main(pictures.Config(folder=config.output))  # of earlier runs' reports too
    for name, message in failures.items():
        console.print(f"FAILED {name}: {message}", style="bold red", markup=False)
    return 1 if failures else 0


def configured(name: str, config: Config) -> Any:
    """Make the config of one benchmark: its defaults, its JSON file in the folder, and the peers where it has any."""
    kind = BENCHMARKS[name].Config
    shared = {"peer": config.peer, "peer_pythons": config.peer_pythons, "json": config.output / f"{name}.json"}
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{key: value for key, value in shared.items() if key in known})


def run_all(configs: Mapping[str, Any], benchmarks: Mapping[str, Any]) -> tuple[dict[str, Row], dict[str, str]]:
    """Run benchmarks in turn; of one that fails the traceback is printed, and the next one runs.

    Returns:
        The reports by name, and the failures by name in one line each.
    """
    reports: dict[str, Row] = {}
    failures: dict[str, str] = {}
    for name, config in configs.items():
        print(f"\n{name}", flush=True)
        try:
            reports[name] = benchmarks[name].main(config)
        except Exception as error:  # whatever it is, the others' figures must not be lost
            traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {error}"
    return reports, failures


def summary(reports: Mapping[str, Row]) -> Table:
    """Make the table of all of our rows that have a speed, a limit, a peer or a target."""
    table = Table("what", "dtype", "seconds", "tokens/s", "of the limit", "times as fast as", "target on 2 cores",
                  title="summary")  # fmt: skip
    for row in summary_rows(reports):
        table.add_row(*row)
    return table


def summary_rows(reports: Mapping[str, Row]) -> list[tuple[str, ...]]:
    """Give the cells of the summary, a tuple a row.

    >>> row = {"who": "pgjax", "dtype": "float32", "seconds": 2.0, "tokens_per_second": 8.0, "achieved": 0.5,
    ...        "limit": "memory", "times_as_fast_as": {"torch": {"wall": 3.0}}}
    >>> summary_rows({"learner": {"rows": [row, {**row, "who": "torch"}]}})
    [('learner', 'float32', '2.00', '8', '50% of memory', '3.00 torch', '2.5x torch, 55% of the matrix peak')]
    """
    cell: dict[str, Callable[[Row], str]] = {
        "seconds": lambda row: f"{row['seconds']:.3g}" if row["seconds"] < 1 else f"{row['seconds']:.2f}",
        "tokens_per_second": lambda row: f"{row['tokens_per_second']:.0f}",
        "achieved": lambda row: f"{row['achieved']:.0%} of {row['limit']}",
        "times_as_fast_as": lambda row: ", ".join(
            f"{ratio['wall']:.2f} {peer}" for peer, ratio in row["times_as_fast_as"].items()
        ),
    }
    rows: list[tuple[str, ...]] = []
    for benchmark, report in reports.items():
        for row in pictures.with_parts(report["rows"]):
            if benchmark == "scaling" or not row["who"].startswith(OURS):
                continue
            part = part_of(row)
            cells = [make(row) if key in row else "" for key, make in cell.items()]
            target = TARGETS.get((benchmark, part, row["dtype"]), "")
            rows.append((f"{benchmark} {part}".strip(), row["dtype"], *cells, target))
    return rows


def part_of(row: Row) -> str:
    """Name the part of a benchmark that one of our rows measures.

    >>> part_of({"who": "pgjax decode"}), part_of({"who": "pgjax", "program": "both", "cache": "cold"})
    ('decode', 'both cold')
    """
    names = (row["who"].removeprefix(OURS), row.get("program", ""), row.get("cache", ""))
    return " ".join(name.strip() for name in names if name)


if __name__ == "__main__":
    sys.exit(command(main, Config, __doc__))
