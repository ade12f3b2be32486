"""The picture of `experiments/laboratory/estimators.py`: its measurements, and nothing computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CRITICS = ("exact", "learned", "wrong")
Exact = Mapping[str, Sequence[Any]]  # of each estimator, `estimators.Measured` at each batch size


def plot(
    exact: Exact, language: Mapping[str, Any], sizes: Sequence[int], lambdas: Sequence[float], model: str, path: Path
) -> None:
    """Draw bias, variance and cosine on the MDP, the way of GAE from lambda 0 to 1, and the variance on the LM."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure: Any = plt.figure(figsize=(10.5, 9), dpi=90, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.6, 1))
    upper.suptitle("The exact token MDP: every estimator against the exact gradient", fontsize=11)
    panels = upper.subplots(1, 3, sharey=True)
    _draw_exact(panels, exact, sizes)
    left, right = lower.subplots(1, 2, width_ratios=(1, 1.1))
    _draw_gae(left, exact, len(sizes) // 2, sizes, lambdas)
    if language:
        _draw_language(right, language, model)
    else:
        right.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _draw_exact(panels: Any, exact: Exact, sizes: Sequence[int]) -> None:
    """Draw a row an estimator and a colour a batch size; a bias that noise explains is hollow."""
    for i, size in enumerate(sizes):
        places = np.arange(len(exact)) + 0.22 * (i - (len(sizes) - 1) / 2)
        found, color = [measured[i] for measured in exact.values()], f"C{i}"
        for x, place in zip(found, places, strict=True):
            panels[0].plot(x.bias, place, "o", color=color, markersize=5, fillstyle="full" if x.seen else "none")
        panels[1].plot([x.variance for x in found], places, "o", color=color, markersize=5)
        panels[2].plot([x.cosine for x in found], places, "o", color=color, markersize=5, label=f"B = {size}")
    panels[0].set(xscale="log", xlabel="bias / |exact gradient|\n(hollow: no more than noise)")
    panels[0].set(yticks=np.arange(len(exact)), yticklabels=list(exact), ylim=(len(exact) - 0.4, -0.6))
    panels[1].set(xscale="log", xlabel="variance of a batch's gradient\n(trace of the covariance)")
    panels[2].set(xlabel="mean cosine of a batch's\ngradient to the exact one", xlim=(0, 1))
    panels[2].legend(frameon=False, fontsize=8, loc="lower right")
    for axes in panels:
        _plain(axes)


def _draw_gae(axes: Any, exact: Exact, which: int, sizes: Sequence[int], lambdas: Sequence[float]) -> None:
    """Draw bias against variance along lambda, for each critic."""
    for i, critic in enumerate(CRITICS):
        names = [f"GAE {lam:g}, {critic}" for lam in lambdas] + [f"value, {critic}"]
        found = [exact[name][which] for name in names]
        axes.plot([x.variance for x in found], [x.bias for x in found], color=f"C{i}", marker="o", markersize=4)
        for lam, x in zip([*lambdas, 1.0], found, strict=True):
            beside = (4, 4) if critic != "exact" else (4, -10)
            axes.annotate(f"{lam:g}", (x.variance, x.bias), beside, textcoords="offset points", fontsize=7)
        first = found[0]
        axes.annotate(
            f"{critic} critic",
            (first.variance, first.bias),
            (2, 14),
            textcoords="offset points",
            fontsize=8,
            color=f"C{i}",
        )
    noise = exact["value, wrong"][which].noise
    axes.axhspan(axes.get_ylim()[0] / 10, noise, color="0.5", alpha=0.12, linewidth=0)
    low = min(exact[f"GAE {lam:g}, exact"][which].bias for lam in lambdas)
    axes.set(xscale="log", yscale="log", ylim=(low / 2, 4), ylabel="bias / |exact gradient|  (grey: noise)")
    axes.set(xlabel="variance of a batch's gradient (trace)")
    axes.set_title(f"GAE by lambda, B = {sizes[which]}; at 1 it is Monte Carlo less the value", fontsize=10)
    axes.xaxis.set_major_locator(_ticks())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(lambda x, _: "")
    _plain(axes)


def _draw_language(axes: Any, language: Mapping[str, Any], model: str) -> None:
    """Draw the variance of one sequence's gradient, with bars of two standard errors."""
    places, found = np.arange(len(language)), list(language.values())
    errors = [2 * x.error for x in found]
    axes.errorbar([x.variance for x in found], places, xerr=errors, fmt="o", markersize=4, capsize=2, color="C3")
    names = ["GRPO (its own unit)" if name == "GRPO" else name for name in language]
    axes.set(xscale="log", yticks=places, yticklabels=names, ylim=(len(language) - 0.5, -0.5))
    axes.set(xlabel="variance of one sequence's gradient (trace)")
    axes.set_title(f"A language model: {model}", fontsize=10)
    _plain(axes)


def _ticks() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1.0, 2.0, 5.0))


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
