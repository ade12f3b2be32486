"""Time alternating runs, and compare them with the machine's measured peaks."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from pgjax.models.architecture import Architecture
from pgjax.run.flops import decode_bytes, mbu, mfu
from pgjax.run.peaks import Peaks, measured_peaks

Row = dict[str, Any]

OURS = "pgjax"  # the names of our own contenders begin with it


class Sample(NamedTuple):
    """What one run of one contender took, in seconds, and its further numbers.

    wall: elapsed time.
    cpu: of all threads of the contender's process together.
    result: further numbers, such as the loss or the seconds of parts.
    """

    wall: float
    cpu: float
    result: Mapping[str, float] = MappingProxyType({})


Contender = Callable[[], Sample]


class PeerError(RuntimeError):
    """A peer can't go on; the message holds what it printed."""


class Timing(NamedTuple):
    """What the repeated runs of one contender took, in seconds, in the order they ran.

    wall: elapsed time.
    cpu: of all threads together; a busy machine changes it less than the elapsed time.
    results: the further numbers of each run.
    """

    wall: list[float]
    cpu: list[float]
    results: Sequence[Mapping[str, float]] = ()


def timed(run: Callable[[], object], *, clock: Callable[[], float] = time.perf_counter) -> Contender:
    """Make a contender of a call in this process; jax arrays that it returns are waited for.

    A dict of Python numbers that it returns is taken as the sample's result.

    >>> ticks = iter([10.0, 12.5])
    >>> timed(lambda: {"loss": 0.5}, clock=lambda: next(ticks))()[::2]
    (2.5, {'loss': 0.5})
    """

    def contender() -> Sample:
        cpu, start = time.process_time(), clock()
        result = jax.block_until_ready(run())
        wall = clock() - start
        numbers = isinstance(result, dict) and all(isinstance(x, float | int) for x in result.values())
        return Sample(wall, time.process_time() - cpu, result if numbers else {})

    return contender


def alternate(contenders: Mapping[str, Contender], repeats: int) -> dict[str, Timing]:
    """Run the contenders in turn, one warm-up each and then `repeats` rounds, so that other load disturbs all alike.

    A peer that can't go on takes no further turns, and is left out of the result.

    Args:
        contenders: name to a call that runs once and returns its sample: of `timed`, or of a worker process.
        repeats: timed rounds.

    Returns:
        name to its times.

    Raises:
        ValueError: `repeats` is below 1.

    >>> samples = iter([Sample(9.0, 9.0), Sample(2.0, 1.0), Sample(3.0, 1.5)])
    >>> alternate({"one": lambda: next(samples)}, 2)["one"].wall
    [2.0, 3.0]
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    for _ in range(1 + repeats):
        for name in tuple(samples):
            try:
                samples[name].append(contenders[name]())
            except PeerError:  # `Worker` keeps the message
                del samples[name]
    return {name: Timing(*(list(x) for x in zip(*taken[1:], strict=True))) for name, taken in samples.items()}


def median_result(timing: Timing, name: str) -> float:
    """Give the median over the runs of one of their further numbers.

    >>> median_result(Timing([], [], [{"loss": 1.0}, {"loss": 3.0}, {"loss": 2.0}]), "loss")
    2.0
    """
    return statistics.median(result[name] for result in timing.results)


def figures(timing: Timing, tokens: float) -> Row:
    """Summarise one contender: tokens a second at the median, and the spread of the runs.

    >>> figures(Timing([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]), tokens=8)["tokens_per_second"]
    4.0
    """
    median = statistics.median(timing.wall)
    return {
        "tokens_per_second": tokens / median,
        "seconds": median,
        "fastest_seconds": min(timing.wall),
        "slowest_seconds": max(timing.wall),
        "round_seconds": timing.wall,
        "cpu_seconds": statistics.median(timing.cpu),
    }


def roofline(seconds: float, flops: float, read: float, peaks: Peaks) -> Row:
    """Compare a time with the least that the machine could need: the longer of its products and its reading.

        achieved = max(flops / matmul_flops, bytes / read_bytes) / seconds

    Args:
        seconds: what it took.
        flops: operations on paper.
        read: bytes on paper that must be read.
        peaks: of the machine, measured.

    Returns:
        Fields of a row; "limit" names the longer one, "mfu" and "mbu" are the shares of the two peaks.

    >>> peaks = Peaks(matmul_flops=100.0, copy_bytes=1.0, read_bytes=10.0)
    >>> row = roofline(2.0, flops=50.0, read=10.0, peaks=peaks)
    >>> row["limit"], row["achieved"], row["mfu"]
    ('memory', 0.5, 0.25)
    """
    matmul, memory = mfu(flops, seconds, peaks.matmul_flops), mbu(read, seconds, peaks.read_bytes)
    limit = "matrix product" if matmul >= memory else "memory"
    return {
        "flops": flops,
        "bytes": read,
        "mfu": matmul,
        "mbu": memory,
        "limit": limit,
        "achieved": max(matmul, memory),
    }


def weight_bytes(arch: Architecture, itemsize: float, *, passes: float = 1) -> float:
    """Count the bytes of `passes` readings of every weight that takes part in matrix products."""
    once = decode_bytes(arch, batch=0, context=0, weight_bytes=itemsize, cache_bytes=0)
    return passes * once


def add_ratios(rows: Iterable[Row], versus: Mapping[str, Sequence[str]] | None = None) -> None:
    """Write into each of our rows how many times as fast as its peers it is, for the same dtype.

    ratio = the peer's median seconds / our median seconds, both of the same alternating runs; "cpu" is the same of the
    CPU time of all threads, and "fastest" of each one's fastest run, which other load disturbs least.

    Args:
        rows: of a report; ours are those whose name begins with "pgjax".
        versus: name of ours to the peers that do the same work; None: all are compared.

    >>> rows = [{"who": "pgjax", "dtype": "float32", "seconds": 1.0, "fastest_seconds": 1.0, "cpu_seconds": 1.0},
    ...         {"who": "torch", "dtype": "float32", "seconds": 3.0, "fastest_seconds": 3.0, "cpu_seconds": 2.0}]
    >>> add_ratios(rows)
    >>> rows[0]["times_as_fast_as"]
    {'torch': {'wall': 3.0, 'fastest': 3.0, 'cpu': 2.0}}
    """
    rows = list(rows)
    peers = [row for row in rows if not row["who"].startswith(OURS)]
    for row in (row for row in rows if row["who"].startswith(OURS)):
        row["times_as_fast_as"] = {
            peer["who"]: {
                "wall": peer["seconds"] / row["seconds"],
                "fastest": peer["fastest_seconds"] / row["fastest_seconds"],
                "cpu": peer["cpu_seconds"] / max(row["cpu_seconds"], 1e-9),
            }
            for peer in peers
            if peer["dtype"] == row["dtype"] and (versus is None or peer["who"] in versus.get(row["who"], ()))
        }


def best_peaks(measured: Iterable[Peaks]) -> Peaks:
    """Take the best of several measurements: other load can only lower one.

    >>> best_peaks([Peaks(1.0, 5.0, 3.0), Peaks(2.0, 4.0, 3.0)])
    Peaks(matmul_flops=2.0, copy_bytes=5.0, read_bytes=3.0)
    """
    return Peaks(*(max(column) for column in zip(*measured, strict=True)))


def with_peaks(
    report: Row, dtype: str, contenders: Mapping[str, Contender], repeats: int
) -> tuple[Peaks, dict[str, Timing]]:
    """Time alternating runs, and measure the machine's peaks right before and right after them.

    Args:
        report: both are added to its "measured_peaks" of the dtype, the best of all to its "peaks".
        dtype: of the matrix product.
        contenders: as for `alternate`.
        repeats: timed rounds.

    Returns:
        The best peaks of the dtype, and the times.
    """
    before = measured_peaks(dtype)
    times = alternate(contenders, repeats)
    after = measured_peaks(dtype)
    measured = report["measured_peaks"].setdefault(dtype, [])
    measured.append({"before": before._asdict(), "after": after._asdict()})
    best = best_peaks(Peaks(**peaks) for both in measured for peaks in both.values())
    report["peaks"][dtype] = best._asdict()
    return best, times


def machine() -> Row:
    """Describe the machine and the versions that the figures were made with."""
    packages = ("pgjax", "jax", "jaxlib", "flax", "transformers")
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {
        "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "commit": commit(Path(__file__).parent),
        **found,
    }


def commit(folder: Path) -> str:
    """Name the commit of a checkout, ending in -dirty where its files differ from it; "unknown" outside a checkout.

    >>> commit(Path("/"))
    'unknown'
    """
    try:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return "unknown"
    return done.stdout.strip() or "unknown"


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


def show(title: str, report: Row, columns: Mapping[str, Callable[[Row], str]]) -> None:
    """Print the rows of a report as a table, below the machine's peaks and above the peers' versions and the missing peers."""
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
    for who, versions in report.get("peers", {}).items():
        console.print(f"{who}: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    for row in report["rows"]:
        for peer, ratio in row.get("times_as_fast_as", {}).items():
            by = f"{ratio['fastest']:.2f} by the fastest runs, {ratio['cpu']:.2f} by CPU time"
            console.print(f"{row['dtype']}: {ratio['wall']:.2f} times as fast as {peer} ({by})")
    if report["peer"] is not None:
        console.print(report["peer"], markup=False)


SPEED: dict[str, Callable[[Row], str]] = {
    "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
    "seconds (spread)": lambda row: (
        f"{row['seconds']:.3f} ({row['fastest_seconds']:.3f} to {row['slowest_seconds']:.3f})"
    ),
    "CPU s": lambda row: f"{row['cpu_seconds']:.2f}",
}
LIMIT: dict[str, Callable[[Row], str]] = {"of the limit": lambda row: f"{row['achieved']:.0%} of {row['limit']}"}


def plain(config: Any) -> Row:
    """Turn a config dataclass into what JSON can hold, without the paths of interpreters and reports on this machine."""
    fields = {name: x for name, x in dataclasses.asdict(config).items() if name not in ("peer_pythons", "json")}
    return {name: str(x) if isinstance(x, Path) else x for name, x in fields.items()}


def begun(config: Any, absent: str | None) -> Row:
    """Begin a report: the machine, the config, and the peers that are missing."""
    return {"machine": machine(), "config": plain(config), "peer": absent, "peers": {}, "peaks": {},
            "measured_peaks": {}, "rows": []}  # fmt: skip


def save(report: Row, path: Path | None) -> None:
    """Write a report as JSON, where a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
