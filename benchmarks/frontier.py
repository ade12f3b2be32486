"""Reward against KL: train on the sentiment task, evaluate on held-out prompts, and draw the frontier beside what is possible.

    python -m experiments.sft                   # a small language model of film reviews
    python -m benchmarks.frontier --model runs/sft/model
    python -m benchmarks.frontier --model FOLDER --prompts FILE --held-out FILE --peer-python OTHER_ENVIRONMENT/bin/python

The reward is VADER's compound of prompt + completion, the temperature 1. What stands in the picture:

    policies        RLOO and PPO with a critic, by `experiments.ppo` with the arguments of RECIPES; TRL's RLOO, where installed
    best of n       the best of n samples of the reference. Its KL is drawn at log n - (n - 1) / n, an upper bound
                    (Beirami et al. 2024): the true one can only lie further left
    optimum         pi* ~ reference * exp(score / beta), which maximises E[score] - beta KL. Estimated a prompt from N samples of
                    the reference by self-normalised importance: w_i = exp(s_i / beta) / sum_j exp(s_j / beta),
                    reward = sum_i w_i s_i, KL = sum_i w_i log(N w_i). With finite N both come out too low
    objective       score - beta KL with beta = 0.05, whatever coefficient a policy was trained with

KL is the log-ratio to the reference summed over the sampled tokens (k1: unbiased), in nats a sequence. Seconds are those of the
training steps alone, compilation included; loading and evaluation are left out, for TRL too. Standard errors are over samples.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import pgjax as pg
from benchmarks.timing import Row, machine, plain, save
from experiments import ppo as experiment
from experiments import reviews
from experiments.cli import plain_errors
from experiments.overoptimisation import best_of, best_of_kl
from experiments.rows import load_rows
from experiments.task import Encoded, Task, fold_in, make_task
from pgjax import data, logs, ppo, rewards
from pgjax.prompts import check_rows

BETA = 0.05  # what the objective charges for a nat

# The arguments of experiments.ppo for each method, by the number of episodes that they were found for (what was tried stands in
# benchmarks/README.md). A low rate and a long warm-up: at 6e-4 without one, Adam's first 40 steps cost eight nats, of which the
# penalty won back few.
SHARED: dict[str, Any] = {"minibatches": 4, "microbatches": 1, "decay": True}
RECIPES: dict[str, dict[int, dict[str, Any]]] = {
    "RLOO": {
        6_400: {"advantage": "leave-one-out", "group_size": 4, "learning_rate": 3e-4, "warmup_updates": 120},
        25_600: {"advantage": "leave-one-out", "group_size": 4, "learning_rate": 2e-4, "warmup_updates": 300},
    },
    "PPO": {
        6_400: {"advantage": "value", "learning_rate": 3e-4, "warmup_updates": 120},
        25_600: {"advantage": "value", "learning_rate": 2e-4, "warmup_updates": 300},
    },
}
TRL_LEARNING_RATES = {6_400: 3e-4, 25_600: 1e-4}  # of its RLOO, k = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """One benchmark. The defaults are what the committed figures were measured with."""

    model: str = "runs/sft/model"  # the reference: folder or any other source that pg.load takes
    prompts: str | None = None  # to train on: .jsonl, .csv, .parquet, .txt or module:function; None: from the reviews
    held_out: str | None = (
        None  # likewise, to evaluate on; None: of reviews kept aside, or rows of `prompts` kept aside
    )
    prompt_tokens: int = 6  # length of the prompts that are cut from the reviews
    held_out_prompts: int = 128  # at most so many are evaluated on
    reward: str = "experiments.sentiment:whole_text_sentiment"  # the black box, as module:function
    output: Path = Path("runs/frontier")  # a folder a run
    methods: tuple[str, ...] = tuple(RECIPES)  # RLOO, PPO
    episodes: tuple[int, ...] = (6_400, 25_600)  # completions sampled in a run
    kl_coefs: tuple[float, ...] = (BETA, 0.2)  # of the penalty; all but the first with the fewest episodes only
    seeds: tuple[int, ...] = (0, 1, 2)  # runs of each kind
    batch_size: int = 64  # completions an iteration
    max_new_tokens: int = 20  # the longest completion
    samples: int = 24  # completions of each held-out prompt, of every policy
    reference_samples: int = 256  # likewise of the reference, for best of n and the optimum
    best_of: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)  # the values of n
    betas: tuple[float, ...] = (0.4, 0.2, 0.1, 0.05)  # of the sampled optimum
    peer: bool = True  # run TRL's RLOO too, where it is installed
    peer_python: Path | None = None  # a Python that has TRL; None: this one
    peer_seeds: tuple[int, ...] = (0,)  # of TRL
    peer_episodes: tuple[int, ...] | None = None  # of TRL; None: those of `episodes`
    picture: Path = Path("runs/frontier/frontier.png")  # the frontier
    json: Path | None = None  # write the report here too


class Samples(NamedTuple):
    """What completions of the held-out prompts are worth, each [P, N]."""

    scores: np.ndarray
    kl: np.ndarray  # nats a sequence, to the reference


def main(config: Config) -> Row:
    """Run the benchmark; return and print the report."""
    check(config)
    lm, reference, tokenizer = pg.load(config.model)
    train_rows, held_out = prompt_sets(config, tokenizer)
    task = make_task(
        lm, tokenizer, [rewards.load_reward(config.reward)], None, (train_rows, held_out),
        chat=False, max_new_tokens=config.max_new_tokens, temperature=1.0,
    )  # fmt: skip
    prompts = task.prompt_sets[1]
    files = write_prompts(config.output, train_rows, held_out)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(f"{len(train_rows)} prompts to train on, {len(held_out)} held out; sampling the reference")
    key = jax.random.key(2**31)  # far from those of training
    ideal = draw(task, reference, None, prompts, config.reference_samples, 8 * config.batch_size, fold_in(key, 0))
    look = functools.partial(
        draw, task, reference=reference, prompts=prompts, samples=config.samples, batch_size=4 * config.batch_size,
        key=fold_in(key, 1),
    )  # fmt: skip
    report: Row = {
        "machine": machine(),
        "config": plain(config),
        "recipes": RECIPES,
        "best_of": [best_of_row(ideal.scores, n) for n in config.best_of],
        "optimum": [optimum_row(ideal.scores, beta) for beta in config.betas],
        "peer": None if not config.peer else missing_trl(config.peer_python),
        "rows": [],
    }
    for method, episodes, kl_coef, seed in plan(config):
        row, policy = train(config, files, method, episodes, kl_coef, seed)
        report["rows"].append(row | figures(look(policy)))
        console.print(line(report["rows"][-1]))
    for episodes, seed in peer_plan(config) if config.peer and report["peer"] is None else ():
        row, policy = train_trl(config, files, episodes, seed)
        report["rows"].append(row | figures(look(policy)))
        console.print(line(report["rows"][-1]))
    report["summary"] = summary(report["rows"])
    show(console, report)
    picture(report, config.picture)
    console.print(f"picture: {config.picture}")
    save(report, config.json)
    return report


def check(config: Config) -> None:
    """Refuse what cannot be run, before anything is computed."""
    unknown = set(config.methods) - set(RECIPES)
    if unknown:
        raise ValueError(f"methods are {' and '.join(RECIPES)}, got {', '.join(sorted(unknown))}")
    for episodes in (*config.episodes, *(config.peer_episodes or ())):
        if episodes < 1 or episodes % config.batch_size:
            raise ValueError(f"episodes={episodes} is no positive multiple of batch_size={config.batch_size}")
    if not config.episodes or not config.kl_coefs or not config.seeds:
        raise ValueError("episodes, kl_coefs and seeds must each name at least one")
    if min(config.betas, default=1.0) <= 0:
        raise ValueError(f"betas must be above 0, got {min(config.betas)}")
    for n in config.best_of:
        if not 1 <= n <= config.reference_samples:
            raise ValueError(f"best_of must be from 1 to reference_samples={config.reference_samples}, got {n}")
    if config.prompt_tokens < 1:
        raise ValueError(f"prompt_tokens must be at least 1, got {config.prompt_tokens}")
    if min(config.samples, config.held_out_prompts) < 1 or config.samples * config.held_out_prompts < 2:
        raise ValueError("samples and held_out_prompts must be at least 1, and not both 1")


def prompt_sets(config: Config, tokenizer: Any) -> tuple[list[Row], list[Row]]:
    """Read the prompts to train on and those to evaluate on, or cut them from the reviews."""
    if config.prompts is None:
        texts = reviews.split(reviews.texts())
        rows, aside = (review_prompts(part, tokenizer, config.prompt_tokens) for part in texts)
        seen = {row["prompt"] for row in rows}
        held_out = [row for row in aside if row["prompt"] not in seen]
    else:
        rows, held_out = load_rows(config.prompts, check_rows), []
    if config.held_out is not None:
        held_out = load_rows(config.held_out, check_rows)
    elif not held_out:
        count = min(config.held_out_prompts, len(rows) // 4)
        if count < 1:
            raise ValueError(f"{config.prompts} has {len(rows)} rows: too few to keep some aside; name --held-out")
        rows, held_out = data.split_rows(rows, count, seed=0)
    return list(rows), list(held_out)[: config.held_out_prompts]


def review_prompts(texts: Sequence[str], tokenizer: Any, count: int) -> list[Row]:
    """Cut prompts of `count` tokens from the beginnings of longer texts, those left out that read back as other tokens.

    >>> class Letters:  # stands in for a tokenizer
    ...     def __call__(self, texts):
    ...         return {"input_ids": [[ord(letter) for letter in text] for text in texts]}
    ...     def batch_decode(self, rows):
    ...         return ["".join(map(chr, row)) for row in rows]
    >>> review_prompts(["abcd", "abce", "ab"], Letters(), 3)
    [{'prompt': 'abc'}]
    """
    ids = [row[:count] for row in tokenizer(list(texts))["input_ids"] if len(row) > count]
    cut = tokenizer.batch_decode(ids)
    same = [text for text, old, new in zip(cut, ids, tokenizer(cut)["input_ids"], strict=True) if old == new]
    return [{"prompt": text} for text in dict.fromkeys(same)]


def write_prompts(folder: Path, train_rows: Iterable[Row], held_out: Iterable[Row]) -> tuple[Path, Path]:
    """Write the prompts where every run, TRL's too, reads the same ones."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "prompts.jsonl", folder / "held_out.jsonl"
    for path, rows in zip(paths, (train_rows, held_out), strict=True):
        text = "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise FileExistsError(f"{path} holds the prompts of another benchmark: give another --output")
        path.write_text(text, encoding="utf-8")
    return paths


def recipe(method: str, episodes: int) -> dict[str, Any]:
    """Pick the arguments of a method: those of the nearest number of episodes, in factors.

    >>> recipe("RLOO", 7_000) == SHARED | RECIPES["RLOO"][6_400]
    True
    """
    return SHARED | nearest(RECIPES[method], episodes)


def nearest(table: dict[int, Any], episodes: int) -> Any:
    """Look up the entry whose number of episodes is nearest, in factors.

    >>> nearest({6_400: "short", 25_600: "long"}, 20_000)
    'long'
    """
    return table[min(table, key=lambda known: abs(math.log(known / episodes)))]


def plan(config: Config) -> list[tuple[str, int, float, int]]:
    """List the runs: method, episodes, coefficient of the KL penalty, seed."""
    first, *others = config.kl_coefs
    kinds = [(n, first) for n in config.episodes] + [(min(config.episodes), kl_coef) for kl_coef in others]
    return [(method, n, kl_coef, seed) for method in config.methods for n, kl_coef in kinds for seed in config.seeds]


def peer_plan(config: Config) -> list[tuple[int, int]]:
    """List TRL's runs: episodes, seed."""
    wanted = config.episodes if config.peer_episodes is None else config.peer_episodes
    return [(episodes, seed) for episodes in wanted for seed in config.peer_seeds]


def train(
    config: Config, files: tuple[Path, Path], method: str, episodes: int, kl_coef: float, seed: int
) -> tuple[Row, Any]:
    """Train a policy, or go on with it where it was stopped; a finished one is taken as it is."""
    steps = episodes // config.batch_size
    folder = config.output / f"{method.lower()}_{episodes}_{kl_coef}_{seed}"
    run = experiment.Config(
        model=config.model, prompts=str(files[0]), held_out=str(files[1]), chat=False, rewards=(config.reward,),
        output=folder, resume=folder.exists(), seed=seed, steps=steps, batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens, kl_coef=kl_coef, eval_samples=1, samples_every=steps, save_every=steps,
        **recipe(method, episodes),
    )  # fmt: skip
    experiment.main(run)
    timed = [row for row in logs.read_metrics(folder) if "timing/update" in row]
    seconds = sum(row["timing/rollout"] + row["timing/score"] + row["timing/update"] for row in timed)
    row = {"who": "pgjax", "method": method, "episodes": episodes, "kl_coef": kl_coef, "seed": seed, "seconds": seconds}
    return row, pg.load(folder / "policy")[1]


def missing_trl(python: Path | None) -> str | None:
    """Say why TRL cannot run; None when it can."""
    if python is None:
        absent = [name for name in ("trl", "torch", "datasets") if importlib.util.find_spec(name) is None]
        mend = "pip install trl, or --peer-python with an environment that has it"
        return f"TRL left out: {', '.join(absent)} not installed ({mend})" if absent else None
    try:
        command = [str(python), "-c", "import trl, torch, datasets, vaderSentiment"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"TRL left out: {python} does not run ({error})"
    problem = found.stderr.strip().rpartition("\n")[2]
    return None if found.returncode == 0 else f"TRL left out: {python} cannot import it ({problem})"


def peer_command(config: Config, prompts: Path, folder: Path, episodes: int, seed: int) -> list[str]:
    """Write the command line of `benchmarks.frontier_trl`."""
    options = {
        "model": Path(config.model).resolve(), "prompts": prompts.resolve(), "reward": config.reward, "output": folder.resolve(),
        "learning-rate": nearest(TRL_LEARNING_RATES, episodes), "kl-coef": config.kl_coefs[0],
        "steps": episodes // config.batch_size, "batch-size": config.batch_size, "group-size": 4,
        "max-new-tokens": config.max_new_tokens, "seed": seed,
    }  # fmt: skip
    written = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [str((config.peer_python or Path(sys.executable)).absolute()), "-m", "benchmarks.frontier_trl", *written]


def train_trl(config: Config, files: tuple[Path, Path], episodes: int, seed: int) -> tuple[Row, Any]:
    """Train with TRL's RLOO in a process of its own, from the same weights, prompts and reward; a finished run is taken."""
    folder = config.output / f"trl_{episodes}_{seed}"
    command = peer_command(config, files[0], folder, episodes, seed)
    finished = folder / "finished.json"
    if finished.exists():
        told = json.loads(finished.read_text(encoding="utf-8"))
        if told.pop("options") != command[1:]:
            raise FileExistsError(f"{folder} holds another run: give another --output")
    else:
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"TRL failed:\n{done.stderr[-3000:]}")
        told = json.loads(done.stdout.strip().rpartition("\n")[2])
        finished.write_text(json.dumps({**told, "options": command[1:]}) + "\n", encoding="utf-8")
    row = {"who": "TRL", "method": "RLOO", "episodes": episodes, "kl_coef": config.kl_coefs[0], "seed": seed, **told}
    return row, pg.load(folder / "policy")[1]


def draw(
    task: Task, policy: Any, reference: Any, prompts: Sequence[Encoded], samples: int, batch_size: int, key: jax.Array
) -> Samples:
    """Sample each prompt many times and judge; without a reference no KL is computed (0)."""
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    scores, kl = [], []
    head = pg.init_value_head(task.lm.arch.width)
    scorer = functools.partial(
        ppo.score, task.lm, temperature=jnp.float32(1.0), window=task.max_new_tokens + 1, parts=4
    )
    for begin in range(0, len(repeated), batch_size):
        filled = (repeated[begin : begin + batch_size] + repeated[:1] * batch_size)[:batch_size]  # one shape
        rollout = task.generate(policy, filled, fold_in(key, begin))
        if reference is not None:
            said = [
                scorer({"lm": x, "value": head}, rollout.tokens, rollout.attention_mask) for x in (policy, reference)
            ]
            kl.append(np.asarray(ppo.sequence_kl(*said, rollout.mask)))
        scores.append(task.judge(filled, rollout).scores)
    shape, count = (len(prompts), samples), len(repeated)
    found = np.concatenate(scores)[:count].astype(np.float64).reshape(shape)
    return Samples(found, np.concatenate(kl)[:count].astype(np.float64).reshape(shape) if kl else np.zeros(shape))


def figures(samples: Samples) -> Row:
    """Sum up a policy's samples: score, KL and score - 0.05 KL, each with its standard error.

    >>> found = figures(Samples(np.array([[0.5, 0.7]]), np.array([[1.0, 3.0]])))
    >>> round(found["objective"], 3), round(found["score_stderr"], 3)
    (0.5, 0.1)
    """
    columns = {"score": samples.scores, "kl": samples.kl, "objective": samples.scores - BETA * samples.kl}
    return {name: float(x.mean()) for name, x in columns.items()} | {
        f"{name}_stderr": float(x.std(ddof=1) / math.sqrt(x.size)) for name, x in columns.items()
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
    """Say in one line what a run came to."""
    return (
        f"{label(row)}, {row['episodes']} episodes, beta {row['kl_coef']}, seed {row['seed']}: score {row['score']:.3f}, "
        f"KL {row['kl']:.2f}, objective {row['objective']:.3f} +- {row['objective_stderr']:.3f}, {row['seconds']:.0f} s"
    )


def summary(rows: Sequence[Row]) -> list[Row]:
    """Average over seeds, and name the worst of them.

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
    """Print the table: policies, averaged over seeds, then what is possible."""
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
    """Put the averages of one method and number of episodes together, whatever their coefficient."""
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


if __name__ == "__main__":
    with plain_errors("the same command goes on"):
        main(tyro.cli(Config, description=__doc__))
