"""Over-optimisation: the reward model's score keeps rising while the gold score behind it falls (Gao et al. 2023).

    python -m experiments.overoptimisation                      # after `python -m experiments.rlhf`, or it makes that first
    python -m experiments.overoptimisation --seeds 0 --steps 40 # a shorter look

PPO against the reward model of an RLHF run, for several coefficients of the KL penalty and several seeds, and best-of-n from
the fine-tuned model, n up to 64. The gold score is only logged. Both are evaluated on held-out prompts as the policy moves
away from where it started, and drawn against d = sqrt(KL), with the forms of Gao, Schulman and Hilton fitted to gold:

    best-of-n  R(d) = d (a - b d)          RL  R(d) = d (a - b log d)          R: gold - gold at the start

Measured on the default RLHF run, seeds 0 to 2, 64 held-out prompts (in brackets: lowest and highest seed). Without the penalty
the proxy climbs from 0.00 to 3.02 standard deviations while gold goes from 0.18 to 0.68 at a KL of 36 nats and then falls to
0.30 (0.24 to 0.35) at 83: "entertaining entertaining interesting comedy ...". With kl_coef 0.03 it ends at 0.71 (0.65 to 0.81)
at a KL of 32, with 0.1 at 0.62 (0.57 to 0.67) at 10; best of 64 has 0.54 at 3.2. The RL form catches that gold rises and falls,
not how sharply: its fit peaks at 0.54. 17 minutes on 2 cores that other work shared, after 12 for the RLHF run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments import ppo, rlhf
from experiments.study import best_of_n, pairs, rlhf_report, rlhf_stages
from experiments.study.gao_forms import Curve, distance, fit_best_of_n, fit_rl, mean_curve
from experiments.study.overoptimisation_report import show
from pgjax.core.errors import UserError
from pgjax.data.prompts import check_rows
from pgjax.data.sources import load_row_sets
from pgjax.run import exits, logs, presets
from pgjax.run.checks import at_least_one, require
from pgjax.run.session import INCIDENTAL
from pgjax.run.stages import Done, finished, run_stage, write_json

PPO = ppo.Config(
    steps=60, batch_size=64, minibatches=1, microbatches=1, learning_rate=1e-3, eval_every=5, eval_samples=4,
    samples_every=60, save_every=60,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """One study."""

    rlhf: Path = Path("runs/rlhf")  # output of experiments.rlhf, whose models and prompts are used; made where missing
    output: Path = Path("runs/overoptimisation")  # a folder a PPO run, best_of_n, summary.json, samples.md, a picture
    kl_coefs: tuple[float, ...] = (0.0, 0.03, 0.1)  # of the penalty; samples of the first and the last are compared
    seeds: tuple[int, ...] = (0, 1, 2)  # a PPO run each, for each coefficient
    held_out_rows: int = 64  # prompts that everything is evaluated on
    best_of: int = 64  # the largest n, a power of 2
    best_of_samples: int = 128  # completions of each held-out prompt that the subsets of n are taken from
    ppo: ppo.Config = PPO  # the same for every run
    refresh_pictures: bool = False  # draw over the picture that the tutorial shows, not into `output`


def main(config: Config) -> dict[str, float]:
    """Run what is missing of the study; return its figures: for each coefficient, where proxy and gold began and ended."""
    check(config)
    stages = made_rlhf(config.rlhf)
    base = ppo_config(config, stages)
    curves: dict[float, list[Curve]] = {}
    for seed in config.seeds:
        for kl_coef in config.kl_coefs:
            run = dataclasses.replace(base, kl_coef=kl_coef, seed=seed)
            curves.setdefault(kl_coef, []).append(curve(ppo_stage(config, run, stages).folder))
    sizes = [2**k for k in range(config.best_of.bit_length())]
    best = best_of_n.stage(
        config.output / "best_of_n", base, sizes, config.best_of_samples, config.held_out_rows,
        made_from=[stages["sft"], stages["reward_model"]],
    )  # fmt: skip
    chosen = Curve(*(np.array(best.metrics[name]) for name in Curve._fields))
    found = summary(curves, chosen)
    if "gold_stderr" in best.metrics:
        found["best_of_n"]["gold_after_stderr"] = best.metrics["gold_stderr"][-1]
    write_json(config.output / "summary.json", found)
    show(config, curves, chosen, found)
    return {f"{name}/{key}": x for name, row in found.items() for key, x in row.items()}


def made_rlhf(folder: Path) -> dict[str, Done]:
    """Find the stages of a finished RLHF run, or make it with its default numbers."""
    stages = {name: finished(folder / name) for name in rlhf_stages.MADE_FROM}
    if stages["sft"] is None or stages["reward_model"] is None or stages["ppo"] is None:
        print(f"{folder} holds no complete RLHF run: making it first")
        rlhf.main(rlhf.Config(output=folder))
    return {name: stage for name in rlhf_stages.MADE_FROM if (stage := finished(folder / name)) is not None}


def ppo_config(config: Config, stages: Mapping[str, Done]) -> ppo.Config:
    """Set up PPO on the same prompts as that run, with gold only watched, to move far in few steps."""
    asked = stages["ppo"].config
    if asked["gold"] is None:
        raise UserError(
            f"{config.rlhf} has no gold score (gold is None there): over-optimisation can't be seen without one"
        )
    _, rows = load_row_sets(asked["prompts"], asked["held_out_prompts"], asked["ppo.held_out_rows"], check_rows)
    held_out = config.output / "held_out.jsonl"
    config.output.mkdir(parents=True, exist_ok=True)
    pairs.write_lines(held_out, [rows[i] for i in evenly(len(rows), config.held_out_rows)])
    return dataclasses.replace(
        config.ppo, model=str(stages["sft"].folder / "model"), reward_model=str(stages["reward_model"].folder / "model"),
        prompts=asked["prompts"], held_out=str(held_out), max_new_tokens=asked["max_new_tokens"], rewards=(asked["gold"],),
        reward_weights=(0.0,), **{name: asked[name] for name in ("chat", "template_args")},
        template_date=asked["template_date"] or logs.recorded(stages["ppo"].folder, "template_date"),
    )  # fmt: skip


def evenly(count: int, wanted: int) -> list[int]:
    """Take numbers below `count`, evenly spread: `wanted` of them, or all.

    Example:
      >>> evenly(10, 4), evenly(2, 4)
      ([0, 2, 5, 7], [0, 1])
    """
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def ppo_stage(config: Config, run: ppo.Config, stages: Mapping[str, Done]) -> Done:
    """Run PPO once, in a folder of its own, unless that is done already."""
    asked = {
        k: x for k, x in dataclasses.asdict(run).items() if k not in {"model", "reward_model", "held_out", *INCIDENTAL}
    }
    folder = config.output / f"kl_{run.kl_coef:g}_seed_{run.seed}"
    work = lambda folder, resume: ppo.main(dataclasses.replace(run, output=folder, resume=resume))
    made_from = [stages["sft"], stages["reward_model"]]
    return run_stage(folder, {**asked, "held_out_rows": config.held_out_rows}, work, made_from=made_from)


def curve(folder: Path) -> Curve:
    """Read the evaluations of a PPO run, the one before training first."""
    rows = [row for row in logs.read_metrics(folder) if "eval/kl" in row]
    gold = next(name for name in rows[0] if name.startswith("eval/rewards/") and name != rlhf_report.PROXY)
    return Curve(*(np.array([row[name] for row in rows]) for name in ("eval/kl", rlhf_report.PROXY, gold)))


def summary(curves: Mapping[float, Sequence[Curve]], chosen: Curve) -> dict[str, dict[str, float]]:
    """Say of each way where it began, peaked and ended, and how gold bends: a and b of the fitted form.

    The peak is that of the mean over seeds: the highest of several noisy evaluations of one run lies above the truth.
    """
    found: dict[str, dict[str, float]] = {}
    for kl_coef, runs in curves.items():
        mean = mean_curve(runs)
        peak = int(np.argmax(mean.gold))
        a, b = fit_rl(distance(mean.kl), mean.gold - mean.gold[0])
        falls = [float(run.gold[peak] - run.gold[-1]) for run in runs]
        found[f"kl_coef={kl_coef:g}"] = {
            "proxy_before": mean.proxy[0], "proxy_after": mean.proxy[-1], "gold_before": mean.gold[0],
            "gold_peak": mean.gold[peak], "kl_at_peak": mean.kl[peak], "gold_after": mean.gold[-1], "kl_after": mean.kl[-1],
            "fall": mean.gold[peak] - mean.gold[-1], "smallest_fall": min(falls),
            "lowest_gold_after": min(float(run.gold[-1]) for run in runs),
            "highest_gold_after": max(float(run.gold[-1]) for run in runs), "a": a, "b": b,
        }  # fmt: skip
    a, b = fit_best_of_n(distance(chosen.kl), chosen.gold - chosen.gold[0])
    found["best_of_n"] = {
        "proxy_before": chosen.proxy[0], "proxy_after": chosen.proxy[-1], "gold_before": chosen.gold[0],
        "gold_after": chosen.gold[-1], "kl_after": chosen.kl[-1], "a": a, "b": b,
    }  # fmt: skip
    return {name: {key: float(x) for key, x in row.items()} for name, row in found.items()}


def check(config: Config) -> None:
    """Refuse a study that cannot work, before anything is computed."""
    for name in ("kl_coefs", "seeds"):
        values = vars(config)[name]
        different = len(values) > 0 and len(set(values)) == len(values)
        require(different, f"{name} must be different numbers, at least one, got {values}")
    at_least_one(config, "held_out_rows", "best_of", "best_of_samples")
    require(
        4 <= config.best_of <= config.best_of_samples,
        f"best_of must be from 4 to best_of_samples={config.best_of_samples}, got {config.best_of}",
    )
    given, shipped = vars(config.ppo), vars(Config().ppo)
    for name in (*rlhf_stages.from_above(rlhf.Config())["ppo"], "kl_coef", "reward_model_weight"):
        require(given[name] == shipped[name], f"ppo.{name} is set by the study itself: leave it out")
    require(
        config.ppo.eval_every is not None and 2 * config.ppo.eval_every <= config.ppo.steps,
        f"a curve needs ppo.eval_every at most half of ppo.steps={config.ppo.steps}, got {config.ppo.eval_every}",
    )


if __name__ == "__main__":
    with exits.plain_errors("the same command goes on"):
        main(presets.parse({"": Config()}, description=__doc__))
