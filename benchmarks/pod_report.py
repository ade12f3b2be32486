"""Print the pod's figures as tables, and draw its memory."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.pod_programs import GIB
from benchmarks.timing import Row
from pgjax.run.curves import EVAL, GREY, INK, LINE, save_figure

# The kinds of memory, from the bottom of a bar to its top: colour and name in the picture.
KINDS = {
    "parameters": (LINE, "parameters"),
    "moments": ("#7aa7f0", "Adam's moments"),
    "beside": ("#c3cfe2", "not given to the program: reference, moments"),
    "gradient": ("#e8a33d", "gradient"),
    "gathered": ("#b06fd8", "weights gathered for decoding"),
    "cache": ("#4fb286", "cache"),
    "other": ("#d3d3d3", "activations and the rest"),
}
SHORT = {
    "all-gather": "AG", "all-reduce": "AR", "reduce-scatter": "RS", "all-to-all": "AA", "collective-permute": "CP",
}  # fmt: skip
NOTES = (
    "d, f, t: data, fsdp, tensor. beside: what training keeps on the chip that the program is not given. rows: at once, over "
    "all chips; largest: the most that fit, by compiling, or (~) extrapolated from this row. AG all-gather, AR all-reduce, RS "
    "reduce-scatter, AA all-to-all, CP collective-permute. sent: a chip, in one run; in one step for decode. at best: the "
    "longest of products (p), memory (m) and links (l). compiler: by its cycles, collectives left out."
)


def show(report: Row) -> None:
    """Print two tables a topology, memory and time, and every defect."""
    console = Console(width=None if Console().is_terminal else 100)
    host = report["machine"]
    console.print(f"compiled by libtpu {host['libtpu']} and jax {host['jax']}; nothing ran on a TPU")
    for topology in dict.fromkeys(row["topology"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["topology"] == topology]
        console.print(memory_table(topology, rows), time_table(topology, rows))
    console.print(NOTES)
    for row in report["rows"]:
        for defect in row["defects"]:
            console.print(f"DEFECT {row['topology']} {row['model']} {row['program']}: {defect}", style="bold red")


def memory_table(topology: str, rows: list[Row]) -> Table:
    """Make the table of the bytes a chip by kind, beside the chip's memory."""
    title = f"{topology}, {rows[0]['chips']} chips of {rows[0]['limit'] / GIB:.2f} GiB: GiB a chip"
    table = _table(title, ("params", "Adam", "beside", "grad", "gather", "cache", "other", "used", "rows", "largest"))
    for row in rows:
        if row["program"] == rows[0]["program"]:
            table.add_row(_model(row))
        sizes = [f"{row['memory'][kind] / GIB:.2f}" for kind in (*KINDS, "used")]
        largest = str(row["largest_rows"]) if "largest_rows" in row else f"~{rows_by_line(row)}"
        table.add_row(f" {row['program']}", *sizes, str(row["rows"]), largest)
    return table


def rows_by_line(row: Row) -> int:
    """Extrapolate how many rows fit, as if all memory but parameters, moments, gradient and gathered weights grew with the rows.

    Part of it does not, so the estimate is low; the search compiles instead.

    >>> memory = dict.fromkeys(KINDS, 0) | {"parameters": 10, "other": 4, "used": 14}
    >>> rows_by_line({"memory": memory, "rows": 8, "limit": 30})
    40
    """
    memory = row["memory"]
    fixed = sum(memory[kind] for kind in ("parameters", "moments", "beside", "gradient", "gathered"))
    return int(row["rows"] * (row["limit"] - fixed) / max(memory["used"] - fixed, 1))


def time_table(topology: str, rows: list[Row]) -> Table:
    """Make the table of what each phase sends and computes, and its time."""
    names = ("collectives (in loops)", "sent MB", "TFLOP", "at best ms", "compiler ms")
    table = _table(f"{topology}: collectives, and time of a chip", names)
    for row in rows:
        if row["program"] == rows[0]["program"]:
            table.add_row(_model(row))
        for phase in row["phases"]:
            sent, times, estimate = phase["collectives"], phase["times"], phase["compiler_seconds"]
            bound = max(times, key=lambda name: times[name])
            table.add_row(
                f" {phase['phase']}", _counts(sent), f"{sum(one['bytes'] for one in sent) / 1e6:.3g}",
                f"{phase['flops'] / 1e12:.3g}", f"{1e3 * times[bound]:.3g} {bound[0]}",
                "none" if estimate is None else f"{1e3 * estimate:.3g}",
            )  # fmt: skip
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="left" if "col" in name else "right")
    return table


def _model(row: Row) -> str:
    return " ".join((row["model"], *(f"{name[0]}{size}" for name, size in row["mesh"].items())))


def _counts(sent: list[Row]) -> str:
    counts: dict[str, list[int]] = {}
    for one in sent:
        found = counts.setdefault(str(SHORT.get(one["kind"], one["kind"])), [0, 0])
        found[0] += one["count"]
        found[1] += one["count"] if one["loops"] else 0
    return ", ".join(f"{count} {name} ({inside})" for name, (count, inside) in sorted(counts.items())) or "none"


def picture(path: Path, report: Row) -> Path | None:
    """Draw the bytes a chip by kind, one panel a topology, with the chip's memory as a line.

    Args:
      path: of the PNG file.
      report: of `benchmarks.pod.main`.

    Returns:
      The path; None without matplotlib, after a printed line.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture of the memory: matplotlib is not installed (pip install matplotlib)")
        return None
    from matplotlib.figure import Figure

    topologies = list(dict.fromkeys(row["topology"] for row in report["rows"]))
    lines = -(-len(topologies) // 2)
    figure = Figure(figsize=(10.4, 1.0 + 2.9 * lines), dpi=110, layout="constrained")
    panels = figure.subplots(lines, min(2, len(topologies)), squeeze=False).ravel()
    for axes, topology in zip(panels, topologies, strict=False):
        _panel(axes, topology, [row for row in report["rows"] if row["topology"] == topology])
    for axes in panels[len(topologies) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=4, fontsize=7.5, frameon=False, labelcolor=INK,
        title="sa sampler, sc scoring, re reference, le learner; d data, f fsdp, t tensor", title_fontsize=7.5,
    )  # fmt: skip
    return save_figure(figure, path)


def _panel(axes: Any, topology: str, rows: list[Row]) -> None:
    models = list(dict.fromkeys(_model(row) for row in rows))
    at = np.array([i + 0.7 * models.index(_model(row)) for i, row in enumerate(rows)])
    ground = np.zeros(len(rows))
    for kind, (colour, name) in KINDS.items():
        size = np.array([max(row["memory"][kind], 0) for row in rows]) / GIB
        axes.bar(at, size, bottom=ground, color=colour, width=0.85, label=name)
        ground += size
    axes.axhline(rows[0]["limit"] / GIB, color=EVAL, linewidth=1.2, linestyle="--", label="memory of the chip")
    for model in models:
        middle = np.mean([x for x, row in zip(at, rows, strict=True) if _model(row) == model])
        axes.text(middle, -0.12, model.replace(" ", "\n", 1), transform=axes.get_xaxis_transform(), ha="center", va="top",
                  fontsize=7.5, color=INK)  # fmt: skip
    axes.set_xticks(at, [row["program"][:2] for row in rows])
    axes.set_title(f"{topology}, {rows[0]['chips']} chips", loc="left", fontsize=9.5, color=INK)
    axes.set_ylabel("GiB a chip", fontsize=8, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=7, length=0)
