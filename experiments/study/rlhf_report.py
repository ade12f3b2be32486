"""What `experiments.rlhf` shows in the end: a table of its stages, samples, a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from experiments.study.pictures import picture_path
from pgjax.data.tables import Row, read_table
from pgjax.rollout import rewards
from pgjax.run import logs
from pgjax.run.curves import running_mean, series
from pgjax.run.progress import format_seconds, samples_table
from pgjax.run.stages import Done

if TYPE_CHECKING:
    from experiments.rlhf import Config

PROXY = "eval/rewards/reward_model"  # what experiments.ppo calls the reward model's score on held-out prompts


def report(config: Config, done: Mapping[str, Done]) -> None:
    """Print the time and the held-out figures of each stage and samples of the policy, and draw the curves."""
    table = Table(title=f"RLHF in {config.output}", title_justify="left", show_lines=True)
    for column in ("stage", "time", "on held-out data"):
        table.add_column(column, overflow="fold")
    for name, stage in done.items():
        time = format_seconds(stage.seconds) + (" (before)" if stage.skipped else "")
        table.add_row(name, time, "\n".join(outcome(config, name, stage)))
    console = Console()
    console.print(table)
    show_samples(console, done["ppo"].folder)
    print(f"{format_seconds(sum(stage.seconds for stage in done.values()))} of work in all")
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    picture = picture_path(config.output / "rlhf.png", config.refresh_pictures)
    draw(config, done, picture)
    print(f"picture: {picture}")


def outcome(config: Config, name: str, stage: Done) -> list[str]:
    """List what a stage came to, before > after, with standard errors clustered by prompt where there are any."""
    if name == "pairs":
        found = stage.metrics
        return [
            f"{found['train_pairs']:,.0f} pairs, {found['held_out_pairs']:,.0f} of held-out prompts",
            f"gold of the samples {with_error(found, 'train_gold')}, standard deviation {found['train_gold_std']:.3f}",
            f"the judge prefers the better one in {found['train_judge_right']:.1%} of pairs",
        ]
    lines = []
    for metric, title in watched(config)[name].items():
        rows = [row for row in logs.read_metrics(stage.folder) if metric in row]
        if rows:
            lines.append(f"{title} {with_error(rows[0], metric)} > {with_error(rows[-1], metric)}")
    return lines


def with_error(figures: Mapping[str, float], name: str) -> str:
    """Write a figure with its standard error, where there is one.

    Example:
      >>> with_error({"gold": 0.5, "gold_stderr": 0.01}, "gold"), with_error({"gold": 0.5}, "gold")
      ('0.500 +- 0.010', '0.500')
    """
    error = figures.get(f"{name}_stderr")
    return f"{figures[name]:.3f}" if error is None else f"{figures[name]:.3f} +- {error:.3f}"


def watched(config: Config) -> dict[str, dict[str, str]]:
    """Name the metrics of each stage that are shown, on held-out data."""
    gold = {} if config.gold is None else {gold_metric(config.gold): "gold"}
    return {
        "sft": {"eval/perplexity": "perplexity"},
        "reward_model": {
            "eval/accuracy": "accuracy", "eval/loss": "loss", "eval/calibration_error": "calibration error",
        },
        "ppo": {PROXY: "proxy, the reward model's score", **gold, "eval/kl": "KL to the fine-tuned model, nats,"},
    }  # fmt: skip


def gold_metric(gold: str) -> str:
    """Name the metric that experiments.ppo writes of the gold score."""
    return f"eval/rewards/{rewards.reward_names([rewards.load_reward(gold)])[0]}"


def last_samples(folder: Path) -> list[Row]:
    """Read the samples of a run's last step that has some."""
    rows = [row for _, row in read_table(folder / "samples.jsonl")]
    return [row for row in rows if row["step"] == rows[-1]["step"]]


def show_samples(console: Console, folder: Path) -> None:
    """Print a few completions of the last step with the score of each judge."""
    rows = last_samples(folder)[:4]
    scores = [name for name in rows[0] if name.startswith("rewards/")]
    console.print(samples_table(f"samples at step {rows[0]['step']}", rows, scores, encoding=console.encoding))


def draw(config: Config, done: Mapping[str, Done], picture: Path) -> None:
    """Draw the curves of each stage: on held-out data, but for the reward model's accuracy on its batches."""
    from matplotlib.figure import Figure

    panels = [
        ("sft", "eval/perplexity", "SFT: perplexity", "update"),
        ("reward_model", "train/accuracy", "Reward model: accuracy on its batches", "update"),
        ("ppo", PROXY, "PPO: proxy (standard deviations)", "step"),
        ("ppo", "eval/kl", "PPO: KL to SFT (nats)", "step"),
    ]
    if config.gold is not None:
        panels.insert(3, ("ppo", gold_metric(config.gold), "PPO: gold", "step"))
    figure = Figure(figsize=(2.9 * len(panels), 3.1), layout="constrained")
    for axes, (stage, metric, title, unit) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        steps, values = series(logs.read_metrics(done[stage].folder), metric)
        of_batches = metric.startswith("train/")
        axes.plot(steps, running_mean(values, len(values) // 8) if of_batches else values,
                  color="#1f6feb", linewidth=2, marker="" if of_batches else ".")  # fmt: skip
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel(unit, fontsize=9)
        axes.set_yscale("log" if metric == "eval/perplexity" else "linear")
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="#9aa5b1", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)
