"""Time alternating runs, and put the result beside the machine's measured peaks."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.typing import DTypeLike
from rich.console import Console
from rich.table import Table

from pgjax import perf

Row = dict[str, Any]


class Timing(NamedTuple):
    """What the repeated runs of one contender took, in seconds, in the order they ran.

    wall: by the clock on the wall.
    cpu: of all threads together; on a busy machine it moves less than the wall clock does.
    """

    wall: list[float]
    cpu: list[float]


def alternate(
    runs: Mapping[str, Callable[[], object]], repeats: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Run the contenders in turn, one warm-up each and then `repeats` rounds, so that all meet the same disturbances.

    Args:
        runs: name to a call; jax arrays that it returns are waited for.
        repeats: timed rounds.
        clock: seconds; a test gives its own.

    Returns:
        name to its times.

    Raises:
        ValueError: `repeats` is below 1.

    >>> ticks = iter(range(100))
    >>> alternate({"one": lambda: next(ticks), "none": lambda: None}, 2, clock=lambda: float(next(ticks)))["one"].wall
    [2.0, 2.0]
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    times = {name: Timing([], []) for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in runs.items():
            cpu, start = time.process_time(), clock()
            jax.block_until_ready(run())
            times[name].wall.append(clock() - start)
            times[name].cpu.append(time.process_time() - cpu)
    return times


def figures(timing: Timing, tokens: float) -> Row:
    """Sum up one contender: tokens a second at the median, and the spread of the runs.

    >>> figures(Timing([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]), tokens=8)["tokens_per_second"]
    4.0
    """
    median = statistics.median(timing.wall)
    return {
        "tokens_per_second": tokens / median,
        "seconds": median,
        "fastest_seconds": min(timing.wall),
        "slowest_seconds": max(timing.wall),
        "cpu_seconds": statistics.median(timing.cpu),
    }


def add_ratios(rows: Iterable[Row], ours: str = "pgjax") -> None:
    """Write into each of our rows how many times as fast as every peer it is, for the same dtype.

    ratio = the peer's median seconds / our median seconds, both of the same alternating runs; "cpu" is the same of the
    CPU time of all threads, and "fastest" of each one's fastest run, which a busy machine disturbs least.

    >>> rows = [{"who": "pgjax", "dtype": "float32", "seconds": 1.0, "fastest_seconds": 1.0, "cpu_seconds": 1.0},
    ...         {"who": "torch", "dtype": "float32", "seconds": 3.0, "fastest_seconds": 3.0, "cpu_seconds": 2.0}]
    >>> add_ratios(rows)
    >>> rows[0]["times_as_fast_as"]
    {'torch': {'wall': 3.0, 'fastest': 3.0, 'cpu': 2.0}}
    """
    rows = list(rows)
    for row in (row for row in rows if row["who"] == ours):
        row["times_as_fast_as"] = {
            peer["who"]: {
                "wall": peer["seconds"] / row["seconds"],
                "fastest": peer["fastest_seconds"] / row["fastest_seconds"],
                "cpu": peer["cpu_seconds"] / max(row["cpu_seconds"], 1e-9),
            }
            for peer in rows
            if peer["who"] != ours and peer["dtype"] == row["dtype"]
        }


def best_peaks(measured: Iterable[perf.Peaks]) -> perf.Peaks:
    """Take the best of several measurements: a disturbance only ever lowers one.

    >>> best_peaks([perf.Peaks(1.0, 5.0, 3.0), perf.Peaks(2.0, 4.0, 3.0)])
    Peaks(matmul_flops=2.0, copy_bytes=5.0, read_bytes=3.0)
    """
    return perf.Peaks(*(max(column) for column in zip(*measured, strict=True)))


def with_peaks(
    dtype: DTypeLike, runs: Mapping[str, Callable[[], object]], repeats: int
) -> tuple[perf.Peaks, dict[str, Timing]]:
    """Time alternating runs, and measure the machine's peaks right before and right after them."""
    before = perf.measured_peaks(dtype)
    times = alternate(runs, repeats)
    return best_peaks([before, perf.measured_peaks(dtype)]), times


def machine() -> Row:
    """Say where and with what the figures were made."""
    packages = ("pgjax", "jax", "jaxlib", "flax", "torch", "transformers")
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **found,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    found = {
        line.split(":", 1)[0].strip(): line.split(":", 1)[1].strip()
        for line in info.read_text().splitlines()
        if ":" in line
    }
    wanted = ("model name", "cpu family", "model")
    return ", ".join(f"{key} {found[key]}" for key in wanted if key in found)


def missing_peer() -> str | None:
    """Name the packages of the peer that are not installed; None when all are.

    >>> missing_peer() is None or "not installed" in missing_peer()
    True
    """
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    return f"peer missing: {', '.join(absent)} not installed (pip install 'pgjax[peers]')" if absent else None


def show(title: str, report: Row, columns: Mapping[str, Callable[[Row], str]]) -> None:
    """Print the rows of a report as a table, the machine's limits above it and missing peers below."""
    console = Console(width=None if Console().is_terminal else 160)
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items() if value != "not installed"))
    for dtype, peaks in report["peaks"].items():
        console.print(
            f"measured peaks, {dtype}: matrix product {peaks['matmul_flops'] / 1e9:.0f} GFLOP/s, "
            f"memory read {peaks['read_bytes'] / 1e9:.1f} GB/s, copy {peaks['copy_bytes'] / 1e9:.1f} GB/s"
        )
    table = Table("who", "dtype", *columns, title=title)
    for row in report["rows"]:
        table.add_row(row["who"], row["dtype"], *(column(row) for column in columns.values()))
    console.print(table)
    for row in report["rows"]:
        for peer, ratio in row.get("times_as_fast_as", {}).items():
            by = f"{ratio['fastest']:.2f} by the fastest runs, {ratio['cpu']:.2f} by CPU time"
            console.print(f"{row['dtype']}: {ratio['wall']:.2f} times as fast as {peer} ({by})")
    if report["peer"] is not None:
        console.print(report["peer"])


def plain(config: Any) -> Row:
    """Turn a config dataclass into what JSON can hold."""
    return {name: str(x) if isinstance(x, Path) else x for name, x in dataclasses.asdict(config).items()}


def save(report: Row, path: Path | None) -> None:
    """Write a report as JSON, where a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
