"""Set this build beside another one of pgjax, in one run: seconds of the same work in turn, and memory at its peak.

    git clone . ../older && git -C ../older checkout ddcce80
    python -m benchmarks.against ../older
    python -m benchmarks.against ../older --parts script --repeats 3

Each part of each build runs in a process of its own, with its own checkout as working directory, so that only its modules are
found. The processes work in turn, one warm-up each and then `repeats` rounds; while one works, the others wait. Parts:

    PPO, RLOO  = an iteration, 16 x (16 + 32) tokens
    rollout    = 16 x (16 + 64) tokens
    learner    = PPO's loss and gradient, 8 x 128 tokens
    script     = `python -m experiments.ppo --steps 2 --eval-samples 1`, each run a new process that compiles everything anew

    ratio      = median seconds of this build / of the other one: below 1 this one is faster; of peak memory likewise
    peak MB    = high-water mark of the process's resident memory: loading, compiling and working (Linux)

Every part but the script is the checkout's own benchmark (`benchmarks/side.py` asks it), so both need those of the same names.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.checks import check, command
from benchmarks.timing import Contender, Row, Sample, Timing, alternate, commit, machine, plain, save
from benchmarks.worker import ROOT, Worker
from pgjax.core.errors import UserError

Part = Literal["PPO", "RLOO", "rollout", "learner", "script"]
PARTS: tuple[Part, ...] = ("PPO", "RLOO", "rollout", "learner", "script")
SIDE = Path(__file__).with_name("side.py").read_text(encoding="utf-8")
SCRIPT = """
import re, runpy, sys
file = sys.argv.pop(1)
try:
    runpy.run_module("experiments.ppo", run_name="__main__", alter_sys=True)
finally:  # VmHWM is this program's own; what getrusage and wait4 tell may be the process's that started it
    open(file, "w").write(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
THIS, OTHER = "this", "other"


@dataclasses.dataclass(frozen=True)
class Config:
    """One comparison."""

    other: tyro.conf.Positional[Path]  # checkout of the build to compare with
    parts: tuple[Part, ...] = PARTS  # that are compared, one after the other
    model: str = "SmolLM2-135M-Instruct"  # that both sides load, in float32
    repeats: int = 5  # timed rounds
    python: str = sys.executable  # interpreter of both sides
    json: Path | None = None  # write the report here too


def main(config: Config) -> Row:
    """Compare the builds part by part; return and print the report."""
    check(config)
    if not (config.other / "benchmarks" / "iteration.py").is_file():
        raise UserError(f"{config.other} is no checkout of pgjax: it has no benchmarks/iteration.py")
    checkouts = {THIS: ROOT, OTHER: config.other.resolve()}
    commits = {who: commit(folder) for who, folder in checkouts.items()}
    report: Row = {"machine": machine(), "commits": commits, "config": plain(config), "rows": []}
    for part in config.parts:
        sides = scripts if part == "script" else workers
        with sides(config, part, checkouts) as contenders:
            times = alternate(contenders, config.repeats)
            for who in checkouts:
                if who not in times:
                    contenders[who]()  # it failed: say what it said
        report["rows"].append(measure(part, times))
        print(line(report["rows"][-1]), flush=True)
    show(report)
    save(report, config.json)
    return report


@contextmanager
def workers(config: Config, part: str, checkouts: Mapping[str, Path]) -> Iterator[dict[str, Contender]]:
    """Start a process for each checkout that does one part of the work whenever it is asked; end them afterwards."""
    with ExitStack() as stack:
        running: dict[str, Contender] = {}
        for who, folder in checkouts.items():
            setup = {"part": part, "model": config.model}
            worker = Worker(f"{who} build", [config.python, "-c", SIDE], setup, folder=folder)
            stack.callback(worker.close)
            running[who] = worker.run
        yield running


@contextmanager
def scripts(config: Config, part: str, checkouts: Mapping[str, Path]) -> Iterator[dict[str, Contender]]:
    """Give, for each checkout, a call that runs its script."""
    yield {who: functools.partial(script, config, folder) for who, folder in checkouts.items()}


def script(config: Config, checkout: Path) -> Sample:
    """Run a checkout's script for two steps in a new process, without any compiled program of an earlier run."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--model", config.model, "--steps", "2", "--eval-samples", "1", "--output", f"{folder}/run"]
        before, start = os.times(), time.perf_counter()
        done = subprocess.run(
            [config.python, "-c", SCRIPT, f"{folder}/peak", *arguments], cwd=checkout, capture_output=True, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "JAX_COMPILATION_CACHE_DIR": f"{folder}/programs"},
        )  # fmt: skip
        wall, after = time.perf_counter() - start, os.times()
        if done.returncode != 0:
            raise RuntimeError(
                f"experiments.ppo in {checkout.name} ended with {done.returncode}:\n{done.stderr[-3000:]}"
            )
        peak = 1024 * int(Path(f"{folder}/peak").read_text())
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return Sample(wall, cpu, {"peak_bytes": peak})


def measure(part: str, times: Mapping[str, Timing]) -> Row:
    """Set the two builds' seconds and memory of a part side by side.

    >>> timing = lambda wall, size: Timing([wall], [wall], [{"peak_bytes": size}])
    >>> row = measure("rollout", {"this": timing(1.0, 3e9), "other": timing(2.0, 4e9)})
    >>> row["ratio"], row["peak_ratio"], row["this"]["seconds"]
    (0.5, 0.75, 1.0)
    """
    sides = {
        who: {
            "seconds": statistics.median(timing.wall),
            "fastest_seconds": min(timing.wall),
            "slowest_seconds": max(timing.wall),
            "round_seconds": timing.wall,
            "cpu_seconds": statistics.median(timing.cpu),
            "peak_bytes": max(result["peak_bytes"] for result in timing.results),
        }
        for who, timing in times.items()
    }
    ratio: Callable[[str], float] = lambda name: sides[THIS][name] / sides[OTHER][name]  # type: ignore[operator]
    ratios = {"ratio": ratio("seconds"), "cpu_ratio": ratio("cpu_seconds"), "fastest_ratio": ratio("fastest_seconds")}
    return {"part": part, **sides, **ratios, "peak_ratio": ratio("peak_bytes")}


def line(row: Row) -> str:
    """Say in one line how the builds compare in a part."""
    return f"{row['part']}: {row['ratio']:.2f} of the other build's seconds, {row['peak_ratio']:.2f} of its memory"


def show(report: Row) -> None:
    """Print the table."""
    spread: Callable[[Row], str] = lambda side: (
        f"{side['seconds']:.2f} ({side['fastest_seconds']:.2f} to {side['slowest_seconds']:.2f})"
    )
    table = Table("", "seconds, this build", "other build", "ratio", "by the fastest", "by CPU time", "peak MB", "other",
                  "ratio", title="this build beside another one")  # fmt: skip
    for row in report["rows"]:
        ratios = (f"{row[name]:.2f}" for name in ("ratio", "fastest_ratio", "cpu_ratio"))
        memory = (f"{row[who]['peak_bytes'] / 1e6:.0f}" for who in (THIS, OTHER))
        table.add_row(row["part"], spread(row[THIS]), spread(row[OTHER]), *ratios, *memory, f"{row['peak_ratio']:.2f}")
    Console(width=None if Console().is_terminal else 160).print(table)


if __name__ == "__main__":
    command(main, Config, __doc__)
