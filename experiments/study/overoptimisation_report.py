"""What `experiments.overoptimisation` shows in the end: a table of its runs, samples side by side, a picture."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.study import rlhf_report
from experiments.study.gao_forms import Bend, Curve, Fit, distance, fit_best_of_n, fit_rl, mean_curve
from experiments.study.pictures import picture_path
from pgjax.run.progress import printable

if TYPE_CHECKING:
    from experiments.overoptimisation import Config


def show(
    config: Config, curves: Mapping[float, Sequence[Curve]], chosen: Curve, found: Mapping[str, Mapping[str, float]]
) -> None:
    """Print the table and the two runs' samples side by side, and draw the picture."""
    console = Console()
    seeds = ", ".join(map(str, config.seeds))
    table = Table(title=f"held-out prompts; means over seeds {seeds}, lowest and highest seed", title_justify="left")
    for column in ("", "proxy", "gold: start > peak > end", "KL: peak, end", "a, b of the fit"):
        table.add_column(column, overflow="fold")
    for name, row in found.items():
        peak = f" > {row['gold_peak']:.2f}" if "gold_peak" in row else ""
        span = f" ({row['lowest_gold_after']:.2f} to {row['highest_gold_after']:.2f})" if "gold_peak" in row else ""
        span += f" +- {row['gold_after_stderr']:.2f}" if "gold_after_stderr" in row else ""
        table.add_row(
            name.replace("_", " "), f"{row['proxy_before']:.2f} > {row['proxy_after']:.2f}",
            f"{row['gold_before']:.2f}{peak} > {row['gold_after']:.2f}{span}",
            f"{row['kl_at_peak']:.0f}, {row['kl_after']:.0f}" if "kl_at_peak" in row else f"{row['kl_after']:.1f}",
            f"{row['a']:.2f}, {row['b']:.2f}",
        )  # fmt: skip
    console.print(table)
    free, healthy = (
        config.output / f"kl_{coef:g}_seed_{config.seeds[0]}" for coef in (config.kl_coefs[0], config.kl_coefs[-1])
    )
    text = side_by_side(free, healthy)
    (config.output / "samples.md").write_text(text, encoding="utf-8")
    console.print(text, markup=False, highlight=False)
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    picture = picture_path(config.output / "overoptimisation.png", config.refresh_pictures)
    draw(curves, chosen, picture)
    print(f"picture: {picture}; samples: {config.output / 'samples.md'}")


def side_by_side(free: Path, healthy: Path) -> str:
    """Put a few of the last samples of two runs on the same prompts into one Markdown text."""
    last = [rlhf_report.last_samples(folder) for folder in (free, healthy)]
    lines = []
    for pair in list(zip(*last, strict=True))[:5]:
        lines.append(f"**{one_line(str(pair[0]['prompt']))}**\n")
        for folder, row in zip((free, healthy), pair, strict=True):
            gold = next(x for name, x in row.items() if name.startswith("rewards/") and name != "rewards/reward_model")
            lines.append(
                f"- {folder.name}, step {row['step']} (proxy {row['rewards/reward_model']:+.2f}, gold {gold:+.2f}): "
                f"{one_line(row['completion'])}"
            )
        lines.append("")
    return "\n".join(lines)


def one_line(text: str) -> str:
    """Put a model's text on one line.

    Example:
      >>> one_line("two\\n\\nlines")
      'two lines'
    """
    return " ".join(printable(text).split())


def draw(curves: Mapping[float, Sequence[Curve]], chosen: Curve, path: Path) -> None:
    """Draw proxy (dashed) and gold (solid) against sqrt(KL), with the fitted forms (dotted)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = ("#d9480f", "#e8a317", "#2f9e44", "#1f6feb", "#7048e8", "#0b7285")
    for colour, (kl_coef, runs) in zip(itertools.cycle(colours), curves.items(), strict=False):
        for run in runs:
            left.plot(distance(run.kl), run.proxy, color=colour, linestyle="--", linewidth=0.8, alpha=0.35)
            right.plot(distance(run.kl), run.gold, color=colour, linewidth=0.8, alpha=0.35)
        mean = mean_curve(runs)
        name = f"PPO, kl_coef {kl_coef:g}"
        draw_way(left, right, mean, fit_rl, np.log, colour, name)
    draw_way(left, right, chosen, fit_best_of_n, lambda d: d, "#343a40", f"best of n, to {2 ** (len(chosen.kl) - 1)}")
    left.set_title("Proxy: the reward model's score (standard deviations)", loc="left", fontsize=10)
    right.set_title("Gold; dotted: the forms of Gao et al. fitted", loc="left", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel(r"$d = \sqrt{\mathrm{KL}}$ to the fine-tuned model (nats$^{1/2}$)")
        axes.grid(color="#9aa5b1", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def draw_way(left: Any, right: Any, curve: Curve, fit: Fit, bend: Bend, colour: str, name: str) -> None:
    """Draw one method: means of proxy and gold, and the form fitted to gold."""
    d = distance(curve.kl)
    left.plot(d, curve.proxy, color=colour, linestyle="--", linewidth=2, marker=".", label=name)
    right.plot(d, curve.gold, color=colour, linewidth=2, marker=".")
    a, b = fit(d, curve.gold - curve.gold[0])
    x = np.linspace(d[d > 0].min(), d.max(), 100)
    right.plot(x, curve.gold[0] + x * (a - b * bend(x)), color=colour, linestyle=":", linewidth=1.4)
