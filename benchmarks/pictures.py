"""Draw the benchmarks' reports: every row under the machine's roofline, and the curves of growth.

python -m benchmarks.pictures --folder benchmarks/results
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.timing import OURS, Row
from pgjax.run.curves import EVAL, GREY, INK, LINE, save_figure

COLOURS = {"float32": LINE, "bfloat16": EVAL}
PARTS = {"learner": LINE, "decode": EVAL}
MEASURES = {"seconds": "seconds", "temp_bytes": "temporaries (MB)"}
UNITS = {"seconds": 1.0, "temp_bytes": 1e6}


@dataclasses.dataclass(frozen=True)
class Config:
    """Draw the pictures of reports that exist already."""

    folder: Path = Path("benchmarks/results")  # with the benchmarks' JSON files; the pictures go there too


def main(config: Config) -> list[Path]:
    """Draw the folder's reports; return and print the pictures' paths."""
    names = ("rollout", "scoring", "learner", "logprobs", "iteration", "scaling")
    found = {name: config.folder / f"{name}.json" for name in names}
    reports = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.is_file()}
    drawn = draw(config.folder, reports)
    for path in drawn:
        print(path)
    return drawn


def draw(folder: Path, reports: Mapping[str, Row]) -> list[Path]:
    """Draw roofline.png and growth.png, each if the reports hold its data.

    Args:
        folder: of the pictures.
        reports: name of a benchmark to its report.

    Returns:
        The pictures' paths; none without matplotlib, after a printed line.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures of the benchmarks: matplotlib is not installed (pip install matplotlib)")
        return []
    drawn = []
    if points_of(reports):
        drawn.append(roofline(folder / "roofline.png", reports))
    if reports.get("scaling", {}).get("exponents"):
        drawn.append(growth(folder / "growth.png", reports["scaling"]))
    return drawn


def points_of(reports: Mapping[str, Row]) -> list[Row]:
    """Collect the points of the roofline: the rows that have operations, bytes and seconds.

    intensity = flops / bytes, speed = flops / seconds. The name ends in the speed's share of the roof above it, which is the best
    measured in any report. A peer's row has the operations and bytes of the work on paper, whatever it really computed.

    >>> row = {"who": "pgjax", "dtype": "float32", "flops": 8.0, "bytes": 2.0, "seconds": 4.0}
    >>> report = {"rows": [row, {"who": "torch"}], "peaks": {"float32": {"matmul_flops": 4.0, "read_bytes": 2.0}}}
    >>> points_of({"learner": report})
    [{'name': 'learner 50%', 'ours': True, 'dtype': 'float32', 'intensity': 4.0, 'speed': 2.0}]
    """
    roofs = best_roofs(reports)
    return [
        {
            "name": f"{label(benchmark, row['who'])} {share(row, roofs[row['dtype']]):.0%}",
            "ours": row["who"].startswith(OURS),
            "dtype": row["dtype"],
            "intensity": row["flops"] / row["bytes"],
            "speed": row["flops"] / row["seconds"],
        }
        for benchmark, report in reports.items()
        for row in drawn_rows(benchmark, report["rows"])
        if {"flops", "bytes", "seconds"} <= set(row) and row["flops"] > 0 and row["bytes"] > 0
    ]


def drawn_rows(benchmark: str, rows: Sequence[Row]) -> list[Row]:
    """Choose the rows to draw: of sampling its parts, which have different limits, of all else the whole."""
    return [row for row in with_parts(rows) if not row.get("parts")] if benchmark == "rollout" else list(rows)


def with_parts(rows: Sequence[Row]) -> list[Row]:
    """Add, after each row, its parts that have a limit of their own, such as prefill and decode, as rows.

    A part of ours is compared with the same part of each peer that its row is compared with.

    >>> ours = {"who": "pgjax", "dtype": "float32", "parts": {"decode": {"seconds": 1.0, "flops": 2.0}},
    ...         "times_as_fast_as": {"torch": {"wall": 4.0}}}
    >>> torch = {"who": "torch", "dtype": "float32", "parts": {"decode": {"seconds": 3.0, "flops": 2.0}}}
    >>> [row["who"] for row in with_parts([ours, torch])], with_parts([ours, torch])[1]["times_as_fast_as"]
    (['pgjax', 'pgjax decode', 'torch', 'torch decode'], {'torch': {'wall': 3.0}})
    """
    found: list[Row] = []
    for row in rows:
        found.append(row)
        for name, part in row.get("parts", {}).items():
            if "flops" not in part:
                continue
            peers = {
                peer["who"]: {"wall": peer["parts"][name]["seconds"] / part["seconds"]}
                for peer in rows
                if peer["who"] in row.get("times_as_fast_as", {})
                and peer["dtype"] == row["dtype"]
                and name in peer.get("parts", {})
            }
            found.append({**part, "who": f"{row['who']} {name}", "dtype": row["dtype"], "times_as_fast_as": peers})
    return found


def label(benchmark: str, who: str) -> str:
    """Name a point.

    >>> label("rollout", "pgjax decode"), label("learner", "pgjax"), label("learner", "torch")
    ('rollout: decode', 'learner', 'learner: torch')
    """
    part = who.removeprefix(OURS).strip(" ,:")
    return f"{benchmark}: {part}" if part else benchmark


def share(row: Row, roof: Row) -> float:
    """Give the share of its limit that a row reached.

    >>> share({"flops": 8.0, "bytes": 2.0, "seconds": 4.0}, {"matmul_flops": 100.0, "read_bytes": 1.0})
    0.5
    """
    return max(row["flops"] / roof["matmul_flops"], row["bytes"] / roof["read_bytes"]) / row["seconds"]


def where(reports: Mapping[str, Row]) -> str:
    """Name the machine and the days of the reports.

    >>> machine = {"processor": "EPYC", "cores": 2, "device": "cpu", "date": "2026-11-26 21:05 UTC"}
    >>> where({"a": {"machine": machine}, "b": {"machine": {**machine, "date": "2026-11-27"}}})
    'cpu, EPYC, 2 cores, 2026-11-26 and 2026-11-27'
    """
    machines = [report["machine"] for report in reports.values() if "machine" in report]
    named = [
        ", ".join(str(x) for x in (one["device"], one["processor"], f"{one['cores']} cores") if x) for one in machines
    ]
    days = sorted({one["date"][:10] for one in machines})
    return "; ".join(dict.fromkeys(named)) + (", " + " and ".join(days) if days else "")


def best_roofs(reports: Mapping[str, Row]) -> dict[str, Row]:
    """Take the best peaks of each dtype over all reports.

    >>> best_roofs({"a": {"peaks": {"float32": {"x": 1.0}}}, "b": {"peaks": {"float32": {"x": 2.0}}}})
    {'float32': {'x': 2.0}}
    """
    roofs: dict[str, Row] = {}
    for report in reports.values():
        for dtype, peaks in report["peaks"].items():
            known = roofs.setdefault(dtype, dict(peaks))
            roofs[dtype] = {name: max(value, known[name]) for name, value in peaks.items()}
    return roofs


def roofline(path: Path, reports: Mapping[str, Row]) -> Path:
    """Draw each row at its intensity and speed, a panel a dtype, under min(matrix peak, read bandwidth * intensity)."""
    from matplotlib.figure import Figure

    points, roofs = points_of(reports), best_roofs(reports)
    dtypes = list(dict.fromkeys(point["dtype"] for point in points))
    figure = Figure(figsize=(6.6 * len(dtypes), 5.4), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(dtypes), squeeze=False, sharex=True, sharey=True).ravel()
    at = [point["intensity"] for point in points]
    span = np.geomspace(min(at) / 4, max(at) * 6, 200)
    highest = max(roof["matmul_flops"] for roof in roofs.values()) / 1e9
    lowest = min(point["speed"] for point in points) / 1e9
    for axes, dtype in zip(panels, dtypes, strict=True):
        roof = roofs[dtype]
        axes.set(xscale="log", yscale="log", xlim=(span[0], span[-1]), ylim=(lowest / 2.5, highest * 2.2))
        axes.plot(span, np.minimum(roof["matmul_flops"], roof["read_bytes"] * span) / 1e9, color=INK, linewidth=1.4)
        axes.text(
            0.02, 0.98, f"roof: matrix product {roof['matmul_flops'] / 1e9:,.0f} GFLOP/s\n"
            f"slope: memory read {roof['read_bytes'] / 1e9:,.1f} GB/s\n"
            "(the best measured; shares are of the roof above the point)",
            transform=axes.transAxes, ha="left", va="top", fontsize=8, color=INK,
        )  # fmt: skip
        axes.set_title(dtype, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("arithmetic intensity (FLOP a byte that must be read)", fontsize=8.5, color=INK)
        _scatter(axes, [point for point in points if point["dtype"] == dtype], COLOURS.get(dtype, LINE))
        tidy(axes)
    panels[0].set_ylabel("speed (GFLOP/s, work on paper)", fontsize=8.5, color=INK)
    figure.suptitle(where(reports), x=0.01, ha="left", fontsize=8, color=INK)
    return save_figure(figure, path)


def _scatter(axes: Any, points: list[Row], colour: str) -> None:
    for ours, marker, name in ((True, "o", "pgjax"), (False, "s", "peers")):
        chosen = [point for point in points if point["ours"] == ours]
        if not chosen:
            continue
        axes.scatter(
            [point["intensity"] for point in chosen], [point["speed"] / 1e9 for point in chosen], marker=marker, s=34,
            color=colour if ours else "white", edgecolors=colour if ours else GREY, linewidths=1.3, zorder=4,
            alpha=0.8, label=name,
        )  # fmt: skip
    write_labels(axes, points)
    axes.legend(loc="lower right", fontsize=8, frameon=False, labelcolor=INK)


def write_labels(axes: Any, points: Sequence[Row]) -> None:
    """Write the points' names in a column beside the panel, the fastest at the top, a thin line from each to its point."""
    low, high = axes.get_ylim()
    by_speed = sorted(points, key=lambda point: -point["speed"])
    wanted = [math.log(point["speed"] / 1e9 / low) / math.log(high / low) for point in by_speed]
    for point, height in zip(by_speed, spread(wanted, 0.042), strict=True):
        axes.annotate(
            point["name"], (point["intensity"], point["speed"] / 1e9), xytext=(1.03, height),
            textcoords="axes fraction", fontsize=7.5, color=INK if point["ours"] else "#6b7785", ha="left", va="center",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(wanted: Sequence[float], step: float) -> list[float]:
    """Move falling heights apart by at least `step`, none above 1.

    Where names stand too close, the group that they form is centred on what its members wanted.

    >>> [round(y, 3) for y in spread([0.9, 0.5, 0.5, 0.1], 0.1)]
    [0.9, 0.55, 0.45, 0.1]
    """
    groups: list[tuple[float, int]] = []  # middle and members of names that touch, from the top
    for height in wanted:
        middle, count = height, 1
        while groups and groups[-1][0] - middle < step * (groups[-1][1] + count) / 2 - 1e-12:
            above, others = groups.pop()
            middle = (above * others + middle * count) / (others + count)
            count += others
        groups.append((middle, count))
    heights = [middle + step * ((count - 1) / 2 - i) for middle, count in groups for i in range(count)]
    over = max(0.0, heights[0] - 1.0) if heights else 0.0
    return [height - over for height in heights]


def growth(path: Path, report: Row) -> Path:
    """Draw time and temporaries against each size, log against log, with the fitted exponents."""
    from matplotlib.figure import Figure

    dimensions = list(dict.fromkeys(row["dimension"] for row in report["exponents"]))
    figure = Figure(figsize=(2.75 * len(dimensions), 5.4), dpi=110, layout="constrained")
    panels = figure.subplots(len(MEASURES), len(dimensions), squeeze=False, sharey="row")
    for column, dimension in enumerate(dimensions):
        for row, measure in enumerate(MEASURES):
            axes = panels[row][column]
            _curves(axes, report, dimension, measure)
            if row == 0:
                axes.set_title(dimension, loc="left", fontsize=10, color=INK)
            if column == 0:
                axes.set_ylabel(MEASURES[measure], fontsize=8.5, color=INK)
        panels[-1][column].set_xlabel(f"{dimension} ({UNIT[dimension]})", fontsize=8.5, color=INK)
    figure.suptitle(where({"scaling": report}), x=0.01, ha="left", fontsize=8, color=INK)
    return save_figure(figure, path)


UNIT = {
    "batch": "rows", "length": "tokens a row", "vocabulary": "tokens", "depth": "layers", "microbatches": "of a batch",
}  # fmt: skip


def _curves(axes: Any, report: Row, dimension: str, measure: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes: list[int] = []
    for fit in (fit for fit in report["exponents"] if fit["dimension"] == dimension):
        rows = [row for row in report["rows"] if row["who"] == fit["who"] and row["dimension"] == dimension]
        sizes = [row["size"] for row in rows]
        values = np.array([row[measure] for row in rows]) / UNITS[measure]
        part = fit["who"].removeprefix(OURS).strip()
        colour = PARTS.get(part, INK)
        p = fit["exponents"][measure]
        x = np.array(sizes, np.float64)
        fitted = np.exp(np.log(values).mean() + p * (np.log(x) - np.log(x).mean()))
        axes.plot(x, fitted, color=colour, linewidth=1, linestyle="--", alpha=0.7)
        axes.plot(x, values, color=colour, marker="o", markersize=4.5, linestyle="", label=f"{part}: size^{p:.2f}")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.margins(y=0.25)
    axes.legend(loc="best", fontsize=7.5, frameon=False, labelcolor=INK, handletextpad=0.2)
    tidy(axes)


def tidy(axes: Any) -> None:
    """Give a panel the look of the project's other pictures."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(GREY)
    axes.tick_params(which="both", colors=INK, labelsize=8)
    axes.grid(alpha=0.2)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
