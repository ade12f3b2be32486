"""The picture of `experiments/laboratory/catalogue.py`: its measurements, and nothing computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot(
    named: Mapping[str, Sequence[Any]], ages: Sequence[int], corrections: Mapping[str, Sequence[Any]],
    divergences: Sequence[float], batch: int, path: Path,
) -> None:  # fmt: skip
    """Draw cosine and rows of every name, and bias, variance and error of the corrections by the samples' age."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure: Any = plt.figure(figsize=(11, 12.5), dpi=80, layout="constrained", facecolor="white")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.75, 1))
    upper.suptitle("Every loss and advantage by name, on the token MDP, enumerated", fontsize=11)
    _draw_named(upper.subplots(1, 2, sharey=True), named, ages)
    lower.suptitle("Corrections, by how far the sampler is from the policy", fontsize=11)
    _draw_corrections(lower.subplots(1, 3), corrections, divergences, batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _draw_named(panels: Any, named: Mapping[str, Sequence[Any]], ages: Sequence[int]) -> None:
    """Draw a row a name and a colour an age."""
    for i, age in enumerate(ages):
        places = np.arange(len(named)) + 0.2 * (i - (len(ages) - 1) / 2)
        found = [measured[i] for measured in named.values()]
        label = "on policy" if age == 0 else f"samples {age} update{'s' * (age > 1)} old"
        panels[0].plot([x.cosine for x in found], places, "o", color=f"C{i}", markersize=5, label=label)
        panels[1].plot([x.rows for x in found], places, "o", color=f"C{i}", markersize=5)
    panels[0].set(yticks=np.arange(len(named)), yticklabels=list(named), ylim=(len(named) - 0.4, -0.6))
    panels[0].set(xlabel="cosine of the expected gradient to the exact one")
    panels[1].set(xscale="log", xlabel="sequences until noise and gradient are as long")
    panels[0].legend(frameon=False, fontsize=8, loc="lower left")
    for axes in panels:
        _plain(axes)
    _numbers(panels[1].xaxis)


def _draw_corrections(
    panels: Any, corrections: Mapping[str, Sequence[Any]], divergences: Sequence[float], batch: int
) -> None:
    """Draw a line a correction."""
    for i, (name, found) in enumerate(corrections.items()):
        style = {"color": f"C{i % 10}", "marker": "o", "markersize": 3, "linewidth": 1.3}
        style |= {"label": name, "linestyle": ("-", "--")[i // 6]}
        variances = [(x.error**2 - x.bias**2) * batch for x in found]
        panels[0].plot(divergences, [max(x.bias, 1e-3) for x in found], **style)
        panels[1].plot(divergences, variances, **style)
        panels[2].plot(divergences, [x.error for x in found], **style)
    panels[0].set_ylabel("bias / |exact gradient|")
    panels[1].set(ylabel="variance of one sequence / |exact gradient|²")
    panels[2].set(ylabel=f"error of a batch of {batch} / |exact gradient|")
    panels[0].set_title("exact: drawn at 0.001", fontsize=8)
    panels[2].legend(frameon=False, fontsize=7)
    for axes in panels:
        axes.set(xscale="log", yscale="log", xlabel="KL(sampler || policy), nats a sequence")
        _plain(axes)
        _numbers(axes.xaxis)
        _numbers(axes.yaxis)
    panels[0].set_ylim(8e-4, 2)


def _numbers(axis: Any) -> None:
    """Write 200, not 2 x 10^2, and not at every line."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_minor_formatter(lambda x, _: "")


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
