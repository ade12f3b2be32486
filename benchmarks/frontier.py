"""Reward against KL: train on the sentiment task, evaluate on held-out prompts, and draw policies beside the best possible.

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
training steps alone, compilation included; loading and evaluation are left out, for TRL too. Standard errors are over prompts:
completions of one prompt are not independent.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

import pgjax as pg
from benchmarks.frontier_report import (
    BETA,
    Samples,
    best_of_row,
    figures,
    line,
    optimum_row,
    picture,
    show,
    summary,
)
from benchmarks.timing import Row, machine, plain, save
from experiments import ppo as experiment
from experiments.tasks import reviews
from pgjax.core.errors import UserError
from pgjax.data.batches import split_rows
from pgjax.data.prompts import check_rows
from pgjax.data.sources import load_rows
from pgjax.learning import programs
from pgjax.parallel.sharding import fold_in
from pgjax.rollout import rewards
from pgjax.rollout.task import Encoded, Task, make_task
from pgjax.run import logs
from pgjax.run.exits import plain_errors

# The arguments of experiments.ppo for each method, by the number of episodes that they were found for (benchmarks/README.md has
# what was tried). The rate is low and the warm-up long: at 6e-4 without one, Adam's first 40 steps cost eight nats of KL, and
# the penalty won few of them back.
SHARED: dict[str, Any] = {"minibatches": 4, "microbatches": 1, "decay": True}
LEAVE_ONE_OUT = {
    "algorithm": "rloo",
    "group_size": 4,
    "clip_eps": 0.2,
    "reduce": "token_mean",
}  # four updates a rollout
CRITIC = {"algorithm": "ppo"}
RECIPES: dict[str, dict[int, dict[str, Any]]] = {
    "RLOO": {
        6_400: LEAVE_ONE_OUT | {"learning_rate": 3e-4, "warmup_updates": 120},
        25_600: LEAVE_ONE_OUT | {"learning_rate": 2e-4, "warmup_updates": 800, "adam_eps": 1e-4},
    },
    "PPO": {
        6_400: CRITIC | {"learning_rate": 3e-4, "warmup_updates": 120},
        25_600: CRITIC | {"learning_rate": 2e-4, "warmup_updates": 500, "adam_eps": 2e-4},
    },
}
TRL_LEARNING_RATES = {6_400: 3e-4, 25_600: 1e-4}  # of its RLOO, k = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """One benchmark. The defaults are what the committed figures were measured with."""

    model: str = "runs/sft/model"  # the reference: folder or any other source that pg.load takes
    prompts: str | None = None  # to train on: .jsonl, .csv, .parquet, .txt or module:function; None: from the reviews
    held_out: str | None = None  # likewise, to evaluate on; None: set aside from the reviews, or from `prompts`
    prompt_tokens: int = 6  # length of the prompts that are cut from the reviews
    held_out_prompts: int = 128  # the most that are evaluated on, at least 2
    reward: str = "experiments.tasks.sentiment:whole_text_sentiment"  # the black box, as module:function
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
    of_reference = draw(
        task, reference, None, prompts, config.reference_samples, 8 * config.batch_size, fold_in(key, 0)
    )
    evaluate = functools.partial(
        draw, task, reference=reference, prompts=prompts, samples=config.samples, batch_size=4 * config.batch_size,
        key=fold_in(key, 1),
    )  # fmt: skip
    report: Row = {
        "machine": machine(),
        "config": plain(config),
        "recipes": RECIPES,
        "best_of": [best_of_row(of_reference.scores, n) for n in config.best_of],
        "optimum": [optimum_row(of_reference.scores, beta) for beta in config.betas],
        "peer": None if not config.peer else missing_trl(config.peer_python),
        "rows": [],
    }
    for method, episodes, kl_coef, seed in plan(config):
        row, policy = train(config, files, method, episodes, kl_coef, seed)
        report["rows"].append(row | figures(evaluate(policy)))
        console.print(line(report["rows"][-1]))
    for episodes, seed in peer_plan(config) if config.peer and report["peer"] is None else ():
        row, policy = train_trl(config, files, episodes, seed)
        report["rows"].append(row | figures(evaluate(policy)))
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
        raise UserError(f"methods are {' and '.join(RECIPES)}, got {', '.join(sorted(unknown))}")
    for episodes in (*config.episodes, *(config.peer_episodes or ())):
        if episodes < 1 or episodes % config.batch_size:
            raise UserError(f"episodes={episodes} is no positive multiple of batch_size={config.batch_size}")
    if not config.episodes or not config.kl_coefs or not config.seeds:
        raise UserError("episodes, kl_coefs and seeds must each name at least one")
    if min(config.betas, default=1.0) <= 0:
        raise UserError(f"betas must be above 0, got {min(config.betas)}")
    for n in config.best_of:
        if not 1 <= n <= config.reference_samples:
            raise UserError(f"best_of must be from 1 to reference_samples={config.reference_samples}, got {n}")
    if config.prompt_tokens < 1:
        raise UserError(f"prompt_tokens must be at least 1, got {config.prompt_tokens}")
    if config.samples < 1:
        raise UserError(f"samples must be at least 1, got {config.samples}")
    if config.held_out_prompts < 2:
        raise UserError(
            f"held_out_prompts must be at least 2, for a standard error over prompts, got {config.held_out_prompts}"
        )


def prompt_sets(config: Config, tokenizer: Any) -> tuple[list[Row], list[Row]]:
    """Read the prompts to train on and to evaluate on, or cut them from the reviews."""
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
        if count < 2:
            raise UserError(f"{config.prompts} has {len(rows)} rows: too few to set two aside; name --held-out")
        rows, held_out = split_rows(rows, count, seed=0)
    if len(held_out) < 2:
        raise UserError(f"{config.held_out} has {len(held_out)} rows: a standard error over prompts needs two")
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
    """Write the prompts to the files that every run reads, TRL's too."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "prompts.jsonl", folder / "held_out.jsonl"
    for path, rows in zip(paths, (train_rows, held_out), strict=True):
        text = "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(f"{path} holds the prompts of another benchmark: give another --output")
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
    """Train a policy, or go on with a run that was stopped; a finished one is not trained again."""
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
    """Give the reason why TRL cannot run; None when it can."""
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
    """Train with TRL's RLOO in its own process, from the same weights, prompts and reward; a finished run is not repeated."""
    folder = config.output / f"trl_{episodes}_{seed}"
    command = peer_command(config, files[0], folder, episodes, seed)
    finished = folder / "finished.json"
    if finished.exists():
        result = json.loads(finished.read_text(encoding="utf-8"))
        if result.pop("options") != command[1:]:
            raise UserError(f"{folder} holds another run: give another --output")
    else:
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"TRL failed:\n{done.stderr[-3000:]}")
        result = json.loads(done.stdout.strip().rpartition("\n")[2])
        finished.write_text(json.dumps({**result, "options": command[1:]}) + "\n", encoding="utf-8")
    row = {"who": "TRL", "method": "RLOO", "episodes": episodes, "kl_coef": config.kl_coefs[0], "seed": seed, **result}
    return row, pg.load(folder / "policy")[1]


def draw(
    task: Task, policy: Any, reference: Any, prompts: Sequence[Encoded], samples: int, batch_size: int, key: jax.Array
) -> Samples:
    """Sample each prompt many times and score the completions; without a reference the KL is left 0."""
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    scores, kl = [], []
    logprobs_of = functools.partial(
        programs.reference_logprobs, task.lm, temperature=jnp.float32(1.0), window=task.max_new_tokens + 1, parts=4
    )
    for own, _, rollout in task.rollouts(policy, repeated, batch_size, key):
        if reference is not None:
            both = (logprobs_of(x, rollout.tokens, rollout.attention_mask) for x in (policy, reference))
            kl.append(np.asarray(programs.sequence_kl(*both, rollout.mask)))
        scores.append(task.judge(own, rollout).scores)
    shape, count = (len(prompts), samples), len(repeated)
    found = np.concatenate(scores)[:count].astype(np.float64).reshape(shape)
    return Samples(found, np.concatenate(kl)[:count].astype(np.float64).reshape(shape) if kl else np.zeros(shape))


if __name__ == "__main__":
    with plain_errors("the same command goes on"):
        main(tyro.cli(Config, description=__doc__))
