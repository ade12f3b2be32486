"""PPO on a language model against a black-box reward (Schulman et al. 2017; Ouyang et al. 2022), Monte Carlo returns.

    python -m experiments.ppo                   # SmolLM2-135M-Instruct learns the shape of a haiku
    python -m experiments.ppo sentiment         # ... or to continue reviews kindly
    python -m experiments.ppo --help            # every field; flags override the preset
    python -m experiments.ppo --resume          # go on with a run that was stopped

prompts > rollout > scores > rewards > returns > advantages > loss > update > checkpoint
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import pgjax as pg
from experiments.task import check_columns, fold_in, load_rows, make_task
from pgjax import data, logs, loop, perf, ppo, rewards, train
from pgjax.checkpoint import Checkpoints
from pgjax.curves import plot_curves
from pgjax.progress import Progress


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. Every number that decides it stands here."""

    model: str = "SmolLM2-135M-Instruct"  # folder, .gguf file, hub id, or a model that an installed package ships
    prompts: str = "experiments.haiku:train_rows"  # .jsonl, .csv, .parquet or .txt file, or module:function giving rows
    held_out: str | None = None  # likewise, for the evaluation before and after; None: rows of `prompts`, kept aside
    held_out_rows: int = 16  # how many rows are kept aside where `held_out` is None
    chat: bool = True  # put prompts through the tokenizer's chat template
    rewards: tuple[str, ...] = ("experiments.haiku:haiku_reward",)  # the black boxes, each as module:function
    reward_weights: tuple[float, ...] = ()  # one for each reward; none given: 1 each
    output: Path = Path("runs/haiku")  # the run folder: config, metrics, samples, curves, checkpoints, policy
    resume: bool = False  # go on with the run in `output`
    seed: int = 0  # of prompt order, sampling and minibatches

    steps: int = 16  # iterations of rollout and update
    batch_size: int = 32  # completions sampled in an iteration
    max_new_tokens: int = 32  # the longest completion, in tokens
    temperature: float = 1.0  # of the policy: in sampling and in every log-probability
    top_k: int | None = None  # sample from this many likeliest tokens; None: from all, as on-policy learning asks
    top_p: float = 1.0  # sample from the likeliest tokens up to this probability; 1: from all, likewise
    truncation_penalty: float = 0.0  # taken off the score of a completion that did not end by itself

    epochs: int = 1  # passes over an iteration's completions
    minibatches: int = 2  # optimizer updates in an epoch
    microbatches: int = 2  # parts of a minibatch, for memory; the gradient is the same
    learning_rate: float = 3e-5  # of AdamW, reached after the warm-up
    warmup_updates: int = 4  # updates over which the rate rises linearly
    decay: bool = False  # fall linearly to 0 over the run
    weight_decay: float = 0.0  # of AdamW, decoupled, on matrices only
    max_grad_norm: float = 1.0  # clip the gradient to this global norm
    clip_eps: float = 0.2  # PPO's range of the ratio, 1 - eps to 1 + eps
    value_clip_eps: float | None = None  # range of the value around its old one; None does not clip
    value_coef: float = 0.5  # weight of the value loss beside the policy loss
    entropy_coef: float = 0.0  # weight of the entropy bonus; 0 is none
    discount: float = 1.0  # of rewards that come a token later
    kl_coef: float = 0.005  # of the penalty on the log-ratio to the reference, in the reward of each token
    kl_target: float | None = None  # nats a sequence; adapts kl_coef towards it (Ziegler et al. 2019)
    kl_horizon: float = 10_000.0  # completions; how slowly kl_coef adapts
    max_approx_kl: float | None = None  # stop an iteration's epochs when the policy has moved further, nats a token

    eval_samples: int = 8  # completions of each held-out prompt, before and after
    samples_every: int = 8  # iterations between tables of samples
    save_every: int = 8  # iterations between checkpoints


PRESETS = {
    "haiku": Config(held_out="experiments.haiku:held_out_rows"),
    "sentiment": Config(
        prompts="experiments.sentiment:train_rows",
        held_out="experiments.sentiment:held_out_rows",
        chat=False,
        rewards=("experiments.sentiment:sentiment_reward",),
        output=Path("runs/sentiment"),
        batch_size=64,
        max_new_tokens=20,
        kl_coef=0.02,
    ),
}


MAY_CHANGE = {"output", "resume", "steps", "eval_samples", "samples_every", "save_every"}  # when a run goes on


class State(NamedTuple):
    """What a checkpoint holds; the rest follows from the config and the step number."""

    learner: train.TrainState  # {"lm", "value"} and AdamW's moments
    kl_coef: jax.Array


def main(config: Config) -> dict[str, float]:
    """Run PPO; return the held-out score before and after with its standard errors, and the last step's metrics."""
    check(config)
    judges = [rewards.load_reward(spec) for spec in config.rewards]
    if config.held_out is None:
        row_sets = data.split_rows(load_rows(config.prompts), config.held_out_rows, seed=0)
    else:
        row_sets = load_rows(config.prompts), load_rows(config.held_out)
    for rows in row_sets:
        check_columns(rows, judges)
    lm, params, tokenizer = pg.load(config.model)
    task = make_task(
        lm, tokenizer, judges, config.reward_weights or None, row_sets, chat=config.chat, max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
    )  # fmt: skip
    folder = logs.open_run(config.output, dataclasses.asdict(config), resume=config.resume, may_change=MAY_CHANGE)
    train_prompts, held_out = task.prompt_sets
    deal = data.batches(train_prompts, config.batch_size, seed=config.seed)
    peaks = machine_peaks(jnp.dtype(lm.dtype).name)

    updates = config.steps * config.epochs * config.minibatches
    optimizer = train.adamw(
        config.learning_rate, updates=updates, warmup=min(config.warmup_updates, updates), decay=config.decay,
        max_grad_norm=config.max_grad_norm, weight_decay=config.weight_decay,
    )  # fmt: skip
    reference = {"lm": params, "value": pg.init_value_head(lm.arch.width)}
    policy = jax.tree.map(jnp.copy, reference)  # updates consume their buffers: the reference keeps its own
    state = State(train.init_state(policy, optimizer), jnp.float32(config.kl_coef))
    checkpoints = Checkpoints(folder / "checkpoints")
    start = 0
    if config.resume and checkpoints.latest() is not None:
        state, extra = checkpoints.restore(state)
        state, start = state._replace(learner=state.learner._replace(healthy=jnp.ones((), bool))), extra["step"]
        print(f"going on after step {start}")
        if start > config.steps:
            raise ValueError(f"steps={config.steps} lies below the {start} steps that {folder} has done already")
    del policy

    key = jax.random.key(config.seed)
    parts = config.minibatches * config.microbatches
    scorer = functools.partial(
        ppo.score, lm, temperature=jnp.float32(config.temperature), window=config.max_new_tokens + 1, parts=parts
    )
    take_update = functools.partial(
        ppo.update, lm=lm, optimizer=optimizer, microbatches=config.microbatches, temperature=config.temperature,
        clip_eps=config.clip_eps, value_clip_eps=config.value_clip_eps, value_coef=config.value_coef,
        entropy_coef=config.entropy_coef,
    )  # fmt: skip
    minibatch_numbers = jax.device_put(list(np.arange(config.minibatches, dtype=np.int32)))
    free_at = 0.0  # when the device was last seen without work

    def prepare(state: State, i: int) -> Any:
        """Queue the rollout; nothing is waited for."""
        sample_key, shuffle_key = jax.random.split(fold_in(key, i))
        prompts = deal[i]
        return prompts, shuffle_key, time.perf_counter(), task.generate(state.learner.params["lm"], prompts, sample_key)

    def step(state: State, i: int, work: Any) -> tuple[State, dict[str, Any], list[dict[str, Any]]]:
        """Score on the device, judge on the host meanwhile, then update."""
        nonlocal free_at
        prompts, shuffle_key, queued_at, rollout = work
        learner, kl_coef = state
        jax.block_until_ready(rollout)
        rolled_out = time.perf_counter()
        policy = scorer(learner.params, rollout.tokens, rollout.attention_mask)
        frozen = scorer(reference, rollout.tokens, rollout.attention_mask)
        judged = task.judge(prompts, rollout)
        rewarded = time.perf_counter()
        jax.block_until_ready((policy, frozen))
        scored = time.perf_counter()

        paid = judged.scores - np.float32(config.truncation_penalty) * ~judged.ended
        batch, kl_coef, metrics = ppo.experience(
            rollout, policy, frozen, jax.device_put(paid), kl_coef,
            discount=config.discount, kl_target=config.kl_target, kl_horizon=config.kl_horizon,
        )  # fmt: skip
        taken: list[train.Metrics] = []
        for epoch in range(config.epochs):
            order = train.minibatches(fold_in(shuffle_key, epoch), config.batch_size, config.minibatches)
            for number in minibatch_numbers:
                learner, of_update = take_update(learner, batch, order, number)
                taken.append(of_update)
            if (
                config.max_approx_kl is not None
                and jax.device_get(taken[-1]["policy/approxkl_avg"]) > config.max_approx_kl
            ):
                break

        def update_seconds() -> float:
            nonlocal free_at
            free_at = time.perf_counter()
            return free_at - scored

        numbers = {
            "objective/scores": judged.scores.mean(),
            "objective/scores_std": judged.scores.std(),
            **{f"rewards/{name}": part.mean() for name, part in judged.parts.items()},
            "val/num_eos_tokens": judged.ended.sum(),
            "completions/clipped_ratio": 1 - judged.ended.mean(),
            "completions/padded_length": rollout.tokens.shape[1],
            "episode": (i + 1) * config.batch_size,
            "train/updates": len(taken),
            "timing/rollout": rolled_out - max(queued_at, free_at),
            "timing/reward": rewarded - rolled_out,
            "timing/score": scored - rolled_out,
            "timing/update": update_seconds,
        }
        of_updates = {name: [metrics[name] for metrics in taken] for name in taken[0]}
        health = {"train/healthy": taken[-1]["train/healthy"]}  # once False, it stays so
        return State(learner, kl_coef), {**metrics, **of_updates, **health, **numbers}, judged.samples(prompts, 8)

    with (
        logs.Writer(folder, start_step=start + 1 if start else 0) as writer,
        Progress(config.steps, start=start) as progress,
    ):

        def check_health(done: int, metrics: dict[str, float]) -> None:
            if not metrics["train/healthy"]:
                raise FloatingPointError(
                    f"loss or gradient is not finite in step {done} (gradient norm {metrics['train/grad_norm']}): its bad "
                    "update was left out and the state before it is saved; start anew with a lower --learning-rate"
                )

        def report(done: int, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
            metrics |= speed(lm, config, peaks, metrics)
            writer.write(done, metrics)
            progress.update(done, metrics)
            if done % config.samples_every == 0 or done == 1:
                writer.write_samples(done, samples)
                progress.samples(done, samples[:3])

        def evaluate(params: Any, step: int) -> None:
            progress.print(f"sampling {len(held_out)} held-out prompts, {config.eval_samples} times each")
            figures = task.evaluate(
                params["lm"], held_out, config.eval_samples, config.batch_size, fold_in(key, 2**32 - 1)
            )
            writer.write(step, {f"eval/{name}": value for name, value in figures.items()})
            progress.print(
                f"held-out score after {step} steps: {figures['scores']:.3f} +- {figures['scores_stderr']:.3f}"
            )

        try:
            if start == 0:
                evaluate(state.learner.params, 0)
            state = loop.run(
                state, steps=config.steps, start=start, prepare=prepare, step=step, check=check_health, report=report,
                checkpoints=checkpoints, save_every=config.save_every,
            )  # fmt: skip
            if not any(row["step"] == config.steps and "eval/scores" in row for row in logs.read_metrics(folder)):
                evaluate(state.learner.params, config.steps)
        finally:
            plot_curves(folder)
            checkpoints.close()

    pg.save_pretrained(folder / "policy", lm, state.learner.params["lm"], tokenizer)
    return summary(folder)


@functools.cache
def machine_peaks(dtype: str) -> perf.Peaks:
    """Measure the machine's limits, once a process."""
    return perf.measured_peaks(dtype)


def speed(lm: pg.CausalLM, config: Config, peaks: perf.Peaks, metrics: dict[str, float]) -> dict[str, float]:
    """Work out tokens a second, and the share of the machine's measured peaks that learner and sampler reach."""
    length, completion = metrics["completions/padded_length"], metrics["completions/mean_length"]
    seconds = metrics["timing/rollout"] + metrics["timing/score"] + metrics["timing/update"]
    rows, window = config.batch_size * metrics["train/updates"] / config.minibatches, config.max_new_tokens + 1
    flops = perf.training_flops(lm.arch, tokens=rows * length, context=length / 2, head_tokens=rows * window)
    size = jnp.dtype(lm.dtype).itemsize
    context = length - config.max_new_tokens + completion / 2
    a_step = perf.decode_bytes(lm.arch, batch=config.batch_size, context=context, weight_bytes=size, cache_bytes=size)
    return {
        "perf/tokens_per_second": config.batch_size * completion / seconds,
        "perf/mfu": perf.mfu(flops, metrics["timing/update"], peaks.matmul_flops),
        "perf/decode_mbu": perf.mbu(
            a_step * metrics["completions/max_length"], metrics["timing/rollout"], peaks.read_bytes
        ),
    }


def summary(folder: Path) -> dict[str, float]:
    """Read off a finished run what changed on the held-out prompts, in standard errors of the difference."""
    rows = logs.read_metrics(folder)
    before, *_, after = [row for row in rows if "eval/scores" in row]
    error = math.hypot(before["eval/scores_stderr"], after["eval/scores_stderr"])
    last = [row for row in rows if "objective/scores" in row][-1]
    rise = after["eval/scores"] - before["eval/scores"]
    return {
        "eval/before": before["eval/scores"],
        "eval/after": after["eval/scores"],
        "eval/rise_in_stderr": rise / error if error > 0 else math.copysign(math.inf, rise) if rise else 0.0,
        **last,
    }


def check(config: Config) -> None:
    """Refuse a run that cannot work, before anything is read or computed."""

    def require(ok: bool, message: str) -> None:
        if not ok:
            raise ValueError(message)

    positive = (
        "steps",
        "batch_size",
        "max_new_tokens",
        "held_out_rows",
        "epochs",
        "minibatches",
        "microbatches",
        "eval_samples",
        "samples_every",
        "save_every",
    )
    for name in positive:
        require(getattr(config, name) >= 1, f"{name} must be at least 1, got {getattr(config, name)}")
    parts = config.minibatches * config.microbatches
    require(
        config.batch_size % parts == 0,
        f"batch_size={config.batch_size} does not divide into minibatches={config.minibatches} times "
        f"microbatches={config.microbatches}: make it a multiple of {parts}",
    )
    require(
        0 < config.temperature < math.inf,
        f"temperature must be above 0 (a greedy policy has no gradient), got {config.temperature}",
    )
    require(config.top_k is None or config.top_k >= 1, f"top_k must be at least 1, or None, got {config.top_k}")
    require(0 < config.top_p <= 1, f"top_p must be above 0 and at most 1, got {config.top_p}")
    require(0 < config.clip_eps < 1, f"clip_eps must be between 0 and 1, got {config.clip_eps}")
    require(0 < config.discount <= 1, f"discount must be above 0 and at most 1, got {config.discount}")
    for name in (
        "kl_coef",
        "value_coef",
        "entropy_coef",
        "truncation_penalty",
        "weight_decay",
        "learning_rate",
        "warmup_updates",
    ):
        require(
            0 <= getattr(config, name) < math.inf, f"{name} must be finite and not below 0, got {getattr(config, name)}"
        )
    require(
        config.kl_target is None or config.kl_coef > 0, "kl_target adapts kl_coef by factors: it must start above 0"
    )
    for name in ("value_clip_eps", "kl_target", "max_approx_kl", "kl_horizon", "max_grad_norm"):
        value = getattr(config, name)
        require(value is None or 0 < value < math.inf, f"{name} must be above 0, got {value}")
    require(0 <= config.seed < 2**32, f"seed must be from 0 to 2^32 - 1, got {config.seed}")
    weights = config.reward_weights
    require(len(config.rewards) >= 1, "rewards is empty: name at least one module:function")
    require(
        len(weights) in (0, len(config.rewards)) and all(math.isfinite(weight) for weight in weights),
        f"reward_weights must be a finite number for each of {config.rewards}, or left out, got {weights}",
    )


if __name__ == "__main__":
    arguments = sys.argv[1:]
    preset = PRESETS[arguments.pop(0) if arguments and arguments[0] in PRESETS else "haiku"]
    if any(argument.partition("=")[0] == "--prompts" for argument in arguments):
        preset = dataclasses.replace(preset, held_out=None)  # the preset's held-out prompts go with its own prompts
    try:
        figures = main(tyro.cli(Config, default=preset, args=arguments, description=__doc__))
    except loop.Interrupted as stopped:
        sys.exit(f"{stopped}: the same command with --resume goes on")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command with --resume goes on from the last checkpoint")
    except rewards.RewardError:
        raise  # with the traceback of the reward's own code
    except (ValueError, ImportError, FileExistsError) as error:
        sys.exit(f"error: {error}")
    before, after, rise = (figures[f"eval/{name}"] for name in ("before", "after", "rise_in_stderr"))
    print(f"held-out score {before:.3f} -> {after:.3f}, a rise of {rise:.1f} standard errors")
