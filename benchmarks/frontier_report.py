"""Figures of the frontier's samples: of a policy, of the best of n, of the sampled optimum; their table and picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.timing import Row
from experiments.study.gao_forms import best_of, best_of_kl
from pgjax.run.statistics import clustered_stderr

BETA = 0.05  # of the objective, score - beta KL


class Samples(NamedTuple):
    """Completions of the held-out prompts, N of each: scores and KL, each [P, N]."""

    scores: np.ndarray
    kl: np.ndarray  # nats a sequence, to the reference


def figures(samples: Samples) -> Row:
    """Summarise a policy's samples: score, KL and score - 0.05 KL, each with its standard error.

    Completions of one prompt are not independent: standard errors are clustered by prompt.

    >>> found = figures(Samples(np.array([[0.5, 0.7], [0.7, 0.9]]), np.array([[1.0, 3.0], [1.0, 3.0]])))
    >>> round(found["objective"], 3), round(found["score_stderr"], 3), found["kl_stderr"]
    (0.6, 0.1, 0.0)
    """
    columns = {"score": samples.scores, "kl": samples.kl, "objective": samples.scores - BETA * samples.kl}
    prompts = np.repeat(np.arange(len(samples.scores)), samples.scores.shape[1]).tolist()
    return {name: float(x.mean()) for name, x in columns.items()} | {
        f"{name}_stderr": clustered_stderr(x.ravel(), prompts) for name, x in columns.items()
    }


def best_of_row(scores: np.ndarray, n: int) -> Row:
    """Estimate what the best of n samples scores, and bound its KL.

    >>> best_of_row(np.array([[0.0, 1.0, 1.0]]), 2)["score"]
    1.0
    """
    return {"n": n, "score": float(best_of(scores, scores, n).mean()), "kl": best_of_kl(n)}


def optimum_row(scores: np.ndarray, beta: float) -> Row:
    """Estimate reward and KL of pi* ~ reference * exp(score / beta), from the scores [P, N] of the reference's samples.

    >>> row = optimum_row(np.array([[1.0, 0.0, 0.0, 0.0]]), 0.01)
    >>> round(row["score"], 3), round(row["kl"], 3), round(math.log(4), 3)  # all weight on one sample of four
    (1.0, 1.386, 1.386)
    """
    tilted = scores / beta
    shifted = tilted - tilted.max(1, keepdims=True)
    log_weights = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    weights = np.exp(log_weights)
    score = float((weights * scores).sum(1).mean())
    kl = float((weights * (log_weights + math.log(scores.shape[1]))).sum(1).mean())
    return {"beta": beta, "score": score, "kl": kl, "objective": score - BETA * kl}


def label(row: Row) -> str:
    """Name a run's method as the picture does.

    >>> label({"who": "TRL", "method": "RLOO"})
    'TRL RLOO'
    """
    return f"{row['who']} {row['method']}"


def line(row: Row) -> str:
    """Describe a run's result in one line."""
    return (
        f"{label(row)}, {row['episodes']} episodes, beta {row['kl_coef']}, seed {row['seed']}: score {row['score']:.3f}, "
        f"KL {row['kl']:.2f}, objective {row['objective']:.3f} +- {row['objective_stderr']:.3f}, {row['seconds']:.0f} s"
    )


def summary(rows: Sequence[Row]) -> list[Row]:
    """Average over seeds, beside the lowest objective of them.

    >>> rows = [{"who": "pgjax", "method": "PPO", "episodes": 64, "kl_coef": 0.05, "seed": seed, "score": 0.5, "kl": 2.0,
    ...          "objective": x, "seconds": 1.0} for seed, x in enumerate([0.3, 0.5])]
    >>> [(row["objective"], row["lowest_objective"], row["seeds"]) for row in summary(rows)]
    [(0.4, 0.3, [0, 1])]
    """
    kinds: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row["who"], row["method"], row["episodes"], row["kl_coef"]), []).append(row)
    mean: Callable[[list[Row], str], float] = lambda group, name: float(np.mean([row[name] for row in group]))
    return [
        {
            **dict(zip(("who", "method", "episodes", "kl_coef"), kind, strict=True)),
            "seeds": [row["seed"] for row in group],
            **{name: mean(group, name) for name in ("score", "kl", "objective", "seconds")},
            "lowest_objective": min(row["objective"] for row in group),
        }
        for kind, group in kinds.items()
    ]


def show(console: Console, report: Row) -> None:
    """Print the table: policies, averaged over seeds, then best of n and the sampled optimum."""
    columns = ("who", "episodes", "beta", "seeds", "score", "KL", f"score - {BETA} KL", "lowest seed", "seconds")
    table = Table(*columns, title="reward against KL, held-out prompts")
    for row in report["summary"]:
        table.add_row(
            label(row), f"{row['episodes']:,}", f"{row['kl_coef']:g}", str(len(row["seeds"])), f"{row['score']:.3f}",
            f"{row['kl']:.2f}", f"{row['objective']:.3f}", f"{row['lowest_objective']:.3f}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    for row in report["best_of"]:
        bound = row["score"] - BETA * row["kl"]
        table.add_row(
            f"best of {row['n']}", "", "", "", f"{row['score']:.3f}", f"<= {row['kl']:.2f}", f">= {bound:.3f}"
        )
    for row in report["optimum"]:
        numbers = (f"{row[name]:.{digits}f}" for name, digits in (("score", 3), ("kl", 2), ("objective", 3)))
        table.add_row("sampled optimum", "", f"{row['beta']:g}", "", *numbers)
    console.print(table)
    if report["peer"] is not None:
        console.print(report["peer"])


COLOURS = {"pgjax RLOO": "#1f6feb", "pgjax PPO": "#d9480f", "TRL RLOO": "#6b7785"}


def picture(report: Row, path: Path) -> None:
    """Draw reward against KL: a small mark a seed, a large one their mean, filled for the most episodes."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = chart.subplots()
    optimum, best = (sorted(report[name], key=lambda row: row["kl"]) for name in ("optimum", "best_of"))
    axes.plot(*points(optimum), color="#1f2933", marker=".", label="sampled optimum")
    axes.plot(*points(best), color="#9aa5b1", linestyle="--", marker=".", label="best of n (KL: upper bound)")
    for row in optimum:
        note(axes, row, rf"$\beta$={row['beta']:g}", (-5, 5), "right")
    for row in best[:: 2 if len(best) > 4 else 1]:
        note(axes, row, f"n={row['n']}", (5, -10), "left")
    sizes = sorted({row["episodes"] for row in report["rows"]})
    for (name, episodes), group in grouped(report["summary"]).items():
        colour, filled = COLOURS[name], episodes == sizes[-1]
        seeds = [row for row in report["rows"] if label(row) == name and row["episodes"] == episodes]
        marker = "s" if name.startswith("TRL") else "o"
        axes.scatter(*points(seeds), s=9, color=colour, alpha=0.6, linewidths=0)
        axes.scatter(
            *points(group), s=58, marker=marker, edgecolors=colour, facecolors=colour if filled else "white",
            linewidths=1.6, zorder=3, label=f"{name}, {episodes:,} episodes",
        )  # fmt: skip
    axes.set_xlabel("KL to the reference (nats a sequence)")
    axes.set_ylabel("score (VADER compound)")
    axes.set_title("Sentiment: reward against KL, held-out prompts", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(path, dpi=110)


def grouped(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """Group the averages by method and number of episodes, over all coefficients."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((label(row), row["episodes"]), []).append(row)
    return found


def points(rows: Iterable[Row]) -> tuple[list[float], list[float]]:
    """Give KL and score of each row, as plots want them."""
    pairs = [(row["kl"], row["score"]) for row in rows]
    return [kl for kl, _ in pairs], [score for _, score in pairs]


def note(axes: Any, row: Row, text: str, offset: tuple[int, int], side: str) -> None:
    """Write a small note beside a point."""
    axes.annotate(
        text, (row["kl"], row["score"]), xytext=offset, textcoords="offset points", ha=side, fontsize=7.5,
        color="#52606d",
    )  # fmt: skip
