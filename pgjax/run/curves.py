"""Draw the curves of a run as one small picture."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pgjax.run.logs import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, LINE, EVAL = "#1f2933", "#9aa5b1", "#1f6feb", "#d9480f"


class _Panel(NamedTuple):
    metric: str
    title: str


PANELS = (
    _Panel("objective/scores", "Score"),
    _Panel("objective/kl", "KL to the reference (nats per sequence)"),
    _Panel("objective/entropy", "Entropy (nats)"),
    _Panel("completions/mean_length", "Completion length (tokens)"),
    _Panel("policy/clipfrac_avg", "Clip fraction"),
    _Panel("loss/value_avg", "Value loss"),
    _Panel("loss/cross_entropy", "Cross-entropy (nats per token)"),
)


def series(rows: Sequence[Mapping[str, float]], metric: str) -> tuple[list[float], list[float]]:
    """Give the steps and the finite values of a metric.

    Args:
        rows: of a run's `metrics.jsonl`.
        metric: its name; rows without it are left out.

    Returns:
        Two series of one length.

    Example:
        >>> from pgjax.run.curves import series
        >>> series([{"step": 0, "x": 0.5}, {"step": 1}, {"step": 2, "x": 0.25}], "x")
        ([0, 2], [0.5, 0.25])
    """
    found = [(row["step"], row[metric]) for row in rows if metric in row and math.isfinite(row[metric])]
    return [step for step, _ in found], [value for _, value in found]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Average each value with its neighbours.

        mean_i = average of values[i - width // 2 : i + width // 2 + 1], cut at the ends

    Args:
        values: a series.
        width: how many values a full window holds; an even width counts as the next odd one.

    Returns:
        A series as long as `values`.

    Example:
        >>> from pgjax.run.curves import running_mean
        >>> running_mean([0.0, 3.0, 6.0, 0.0], 3)
        [1.5, 3.0, 3.0, 3.0]
    """
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _draw_panel(axes: Axes, panel: _Panel, rows: Sequence[Mapping[str, float]]) -> None:
    """Draw raw points thin and their running mean thick."""
    steps, values = series(rows, panel.metric)
    axes.set_title(panel.title, loc="left", fontsize=10, color=INK)
    axes.plot(steps, values, color=LINE, linewidth=0.8, alpha=0.35, marker=".", markersize=2.5)
    axes.plot(steps, running_mean(values, max(1, len(values) // 12)), color=LINE, linewidth=2.2)
    axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.margins(x=0.03, y=0.12)


def _draw_eval(axes: Axes, rows: Sequence[Mapping[str, float]]) -> None:
    """Lay the held-out scores over the training scores, with a bar of one standard error each way."""
    evals = [row for row in rows if math.isfinite(row.get("eval/scores", math.nan))]
    if not evals:
        return
    bars = [row.get("eval/scores_stderr", 0.0) for row in evals]
    axes.errorbar(
        [row["step"] for row in evals],
        [row["eval/scores"] for row in evals],
        yerr=[bar if math.isfinite(bar) else 0.0 for bar in bars],
        color=EVAL, marker="D", markersize=5, capsize=3, linewidth=1.2, linestyle="none",
        label="held-out prompts, \u00b1 1 standard error", zorder=5,
    )  # fmt: skip
    axes.legend(loc="best", fontsize=7.5, frameon=False, labelcolor=INK)


def plot_curves(folder: str | Path) -> Path | None:
    """Draw score, KL, entropy, length and losses of a run as `curves.png`.

    A panel whose metric was never written is left out. Held-out scores (`eval/scores`, with
    `eval/scores_stderr`) are drawn over the training scores, and the held-out loss (`eval/loss`) over the
    cross-entropy of fine-tuning.

    Args:
        folder: the run folder, with its `metrics.jsonl`.

    Returns:
        The picture's path; None when matplotlib is not installed or the disk takes no picture (each said in one
        printed line), or when there is nothing to draw yet.

    Raises:
        ValueError: a line of the metrics is not JSON.

    Example:
        >>> import tempfile
        >>> from pgjax.run.curves import plot_curves
        >>> from pgjax.run.logs import Writer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Writer(folder) as writer:
        ...         writer.write(0, {"objective/scores": 0.1})
        ...     plot_curves(folder).name
        'curves.png'
    """
    rows = read_metrics(folder)
    panels = [panel for panel in PANELS if series(rows, panel.metric)[0]]
    if not panels:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture of the curves: matplotlib is not installed (pip install matplotlib)")
        return None
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(3, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = Figure(
        figsize=(3.6 * columns, 2.5 * height + 0.2), dpi=120, layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)
    )
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(height, columns, index + 1)
        _draw_panel(axes, panel, rows)
        if panel.metric == "objective/scores":
            _draw_eval(axes, rows)
        if panel.metric == "loss/cross_entropy":
            held_out = series(rows, "eval/loss")
            axes.plot(*held_out, color=EVAL, marker="D", markersize=5, linewidth=1.2, label="held-out examples")
            axes.legend(loc="best", fontsize=7.5, frameon=False, labelcolor=INK)
        if index + columns >= len(panels):
            axes.set_xlabel("step", fontsize=8, color=INK)
    path = Path(folder) / "curves.png"
    try:
        save_figure(figure, path)
    except OSError as error:  # a run that ends on a full disk has something to say that this must not hide
        path.unlink(missing_ok=True)
        print(f"no picture of the curves: {error}")
        return None
    return path


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as a small PNG file: in 128 colours, to the eye the same at a third of the bytes.

    Args:
        figure: of matplotlib, made without pyplot.
        path: of the file; its folder is made where it is not there.

    Returns:
        The path.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from matplotlib.figure import Figure
        >>> from pgjax.run.curves import save_figure
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_figure(Figure(figsize=(1, 1)), Path(folder) / "new" / "empty.png").read_bytes()[1:4]
        b'PNG'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image  # matplotlib brings it

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(128, method=Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    return path
