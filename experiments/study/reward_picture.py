"""The picture of a reward model on held-out pairs: can its confidence be believed, and how far apart does it hold answers?"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from pgjax.learning.reward_learning import calibration, pair_metrics
from pgjax.run.curves import EVAL, GREY, INK, LINE, save_figure


def plot_calibration(path: Path, scores: np.ndarray) -> Path | None:
    """Draw the predicted probability against the measured frequency, beside the histogram of the margins.

    Error bars are two binomial standard errors of a bin, (p (1 - p) / n)^(1/2) at the predicted p.

    Args:
      path: of the PNG file.
      scores: [N, 2], chosen and rejected, as the loss saw them (not normalised).

    Returns:
      The path; None when matplotlib is not installed, said in one printed line.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture of the calibration: matplotlib is not installed (pip install matplotlib)")
        return None
    from matplotlib.figure import Figure

    figures = pair_metrics(scores)
    figure = Figure(figsize=(8.4, 3.9), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    gaps = np.asarray(scores, np.float64) @ np.array([1.0, -1.0])
    bins = calibration(gaps)
    predicted, measured, counts = (np.array(column, np.float64) for column in zip(*bins, strict=True))
    bars = 2 * np.sqrt(np.maximum(predicted * (1 - predicted), 1e-9) / counts)
    left.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1, linestyle="--", label="confidence is frequency")
    left.errorbar(
        predicted, measured, yerr=bars, color=LINE, marker="o", markersize=5, capsize=3, linewidth=1.2,
        label="held-out pairs, ± 2 standard errors",
    )  # fmt: skip
    left.set(xlim=(0.48, 1.02), ylim=(min(0.3, measured.min() - 0.05), 1.05))
    left.set_xlabel("predicted probability of the answer with the higher score", fontsize=8.5, color=INK)
    left.set_ylabel("how often it was the chosen one", fontsize=8.5, color=INK)
    left.set_title(
        f"Calibration: error {figures['calibration_error']:.3f}, {len(gaps)} pairs", loc="left", fontsize=10, color=INK
    )
    left.legend(loc="lower right", fontsize=7.5, frameon=False, labelcolor=INK)
    right.hist(gaps, bins=30, color=LINE, alpha=0.75)
    right.axvline(0, color=GREY, linewidth=1, linestyle="--")
    right.axvline(gaps.mean(), color=EVAL, linewidth=1.5, label=f"mean margin {gaps.mean():.2f}")
    right.set_xlabel("score of the chosen answer - score of the rejected one (nats)", fontsize=8.5, color=INK)
    right.set_ylabel("pairs", fontsize=8.5, color=INK)
    right.set_title(
        f"Margins: {figures['accuracy']:.1%} above 0",
        loc="left",
        fontsize=10,
        color=INK,
    )
    right.legend(loc="upper left", fontsize=7.5, frameon=False, labelcolor=INK)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(GREY)
        axes.tick_params(colors=INK, labelsize=8)
    return save_figure(figure, path)
