"""PPO on a language model against a black-box reward (Schulman et al. 2017; Ouyang et al. 2022), Monte Carlo returns.

    python -m experiments.ppo                   # SmolLM2-135M-Instruct learns the shape of a haiku
    python -m experiments.ppo sentiment         # ... or to continue reviews kindly
    python -m experiments.ppo --algorithm rloo  # or grpo, dr_grpo, reinforce, my_module:my_algorithm
    python -m experiments.ppo --help            # every field; flags override the preset
    python -m experiments.ppo --resume          # go on with a run that was stopped (--resume-from: see --help)
    python -m experiments.ppo --mesh fsdp=-1    # on all devices; --distributed: of several hosts (pgjax/run/devices.py)

prompts > rollout > scores > rewards > returns > advantages > loss > update > checkpoint

With a reward model (`--reward-model FOLDER`, trained with the same --chat) in place of the preset's Python rewards, or beside
`--rewards`, it is RLHF's last stage.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

import pgjax as pg
from pgjax.data.batches import batches
from pgjax.data.prompts import check_rows
from pgjax.data.sources import load_row_sets
from pgjax.learning import programs
from pgjax.learning.by_name import load_algorithm
from pgjax.learning.optimizer import adamw, revived
from pgjax.models.lora import freeze
from pgjax.parallel import batch_rows, processes
from pgjax.parallel.sharding import fold_in, whole_groups
from pgjax.rollout import rewards
from pgjax.rollout.judge import load_judge
from pgjax.rollout.task import check_columns, check_rewards, make_task
from pgjax.run import checks, clock, devices, exits, loop, presets, speed
from pgjax.run.checkpoint.resume import frozen_model, rows_digest, to_best
from pgjax.run.session import INCIDENTAL, RunFlags, open_session, rise, session_options


@dataclasses.dataclass(frozen=True)
class Config(RunFlags):
    """One run. Every number that decides it stands here."""

    model: str = "SmolLM2-135M-Instruct"  # folder, .gguf file, hub id, or a model that an installed package ships
    prompts: str = "experiments.tasks.haiku:train_rows"  # .jsonl, .csv, .parquet or .txt file, or module:function
    held_out: str | None = None  # likewise, for evaluations; None: rows of `prompts`, kept aside
    held_out_rows: int = 16  # how many rows are kept aside where `held_out` is None
    chat: bool = True  # put prompts through the tokenizer's chat template
    rewards: tuple[str, ...] = ("experiments.tasks.haiku:haiku_reward",)  # the black boxes, each as module:function
    reward_weights: tuple[float, ...] = ()  # one for each reward; none given: 1 each; with 0 it is logged and no more
    reward_model: str | None = None  # a sequence classifier with one label, sources as for `model`; None: no such judge
    reward_model_weight: float = 1.0  # of the reward model's score beside the black boxes
    output: Path = Path("runs/haiku")  # the run folder: config, metrics, samples, curves, checkpoints, policy

    steps: int = 16  # iterations of rollout and update
    batch_size: int = 32  # completions sampled in an iteration
    max_new_tokens: int = 32  # the longest completion, in tokens
    temperature: float = 1.0  # of the policy: in sampling and in every log-probability
    top_k: int | None = None  # sample from this many likeliest tokens; None: from all, as on-policy learning asks
    top_p: float | None = None  # sample from the likeliest tokens up to this probability; None: from all, likewise
    truncation_penalty: float = 0.0  # taken off the score of a completion that did not end by itself

    algorithm: str = "ppo"  # ppo, rloo, grpo, dr_grpo, reinforce, or your own as module:name
    # Options of the algorithm (pgjax/learning/algorithms.py); None leaves each as the algorithm has it
    group_size: int | None = None  # completions of each prompt; they share its computation
    reduce: Literal["token_mean", "sequence_mean", "sequence_sum"] | None = None  # how the policy loss is averaged
    clip_eps: float | None = None  # PPO's range of the ratio, 1 - eps to 1 + eps
    clip_eps_high: float | None = None  # eps of the upper end (higher: DAPO, Yu et al. 2025)
    dual_clip: float | None = None  # bound of the ratio where the advantage is below 0 (Ye et al. 2020)
    value_coef: float | None = None  # weight of the value loss beside the policy loss
    value_clip_eps: float | None = None  # range of the value around its old one
    entropy_coef: float | None = None  # weight of the entropy bonus
    discount: float | None = None  # of rewards that come a token later
    kl_coef: float | None = None  # of the penalty on the log-ratio to the reference, in the reward of each token
    kl_loss_coef: float | None = None  # of k3 to the reference in the loss, as GRPO has it
    kl_target: float | None = None  # nats a sequence; adapts kl_coef towards it (Ziegler et al. 2019)
    kl_horizon: float = 10_000.0  # completions; how slowly kl_coef adapts
    importance_cap: float | None = None  # bound of the weights policy / sampler where they differ; None: no weights
    max_approx_kl: float | None = None  # stop an iteration's epochs when the policy has moved further, nats a token
    teacher_force: bool | None = None  # a pass for the policy's own log-probabilities; None: where the sampler's won't do

    epochs: int = 1  # passes over an iteration's completions
    minibatches: int | None = None  # optimizer updates in an epoch; None: 2, or 1 for an on-policy loss
    microbatches: int = 2  # parts of a minibatch, for memory; the gradient is the same
    learning_rate: float = 3e-5  # of AdamW, reached after the warm-up
    warmup_updates: int = 4  # updates over which the rate rises linearly
    decay: bool = False  # fall linearly to 0 over the run
    weight_decay: float = 0.0  # of AdamW, decoupled, on matrices only
    adam_eps: float = 1e-8  # of AdamW; larger ones damp what has small gradients
    max_grad_norm: float = 1.0  # clip the gradient to this global norm

    eval_samples: int = 8  # completions of each held-out prompt in an evaluation
    eval_every: int | None = None  # iterations between evaluations; None: before and after only
    samples_every: int = 8  # iterations between tables of samples
    save_every: int = 8  # iterations between checkpoints
    keep_best: bool = False  # keep the one of the best held-out score too, and save its policy


HAIKU = Config(held_out="experiments.tasks.haiku:held_out_rows")
SENTIMENT = Config(
    prompts="experiments.tasks.sentiment:train_rows", held_out="experiments.tasks.sentiment:held_out_rows", chat=False,
    rewards=("experiments.tasks.sentiment:sentiment_reward",), output=Path("runs/sentiment"), batch_size=64,
    max_new_tokens=20, kl_coef=0.02,
)  # fmt: skip
PRESETS = {"haiku": HAIKU, "sentiment": SENTIMENT}
GOES_WITH = {"prompts": {"held_out": None}, "reward_model": {"rewards": ()}, "algorithm": {"kl_coef": None}}
OPTIONS = (
    "group_size", "reduce", "clip_eps", "clip_eps_high", "dual_clip", "value_coef", "value_clip_eps", "entropy_coef",
    "discount", "kl_coef", "kl_loss_coef",
)  # fmt: skip
MAY_CHANGE = INCIDENTAL | {"steps", "eval_samples", "eval_every", "samples_every", "save_every"}  # when a run goes on


def main(config: Config) -> dict[str, float]:
    """Run PPO; return the held-out score before and after with its standard errors, and the last step's metrics."""
    check(config)
    with devices.on_devices(config) as mesh:
        return run(config, mesh)


def run(config: Config, mesh: Mesh | None) -> dict[str, float]:
    """Do the work of `main` on the devices of a mesh, or on one; all processes of a run call this alike."""
    algorithm = load_algorithm(config.algorithm, **{name: getattr(config, name) for name in OPTIONS})
    minibatches = config.minibatches or (1 if algorithm.on_policy else 2)
    devices.check_shares(mesh, config.batch_size, minibatches=minibatches, microbatches=config.microbatches)
    config = dataclasses.replace(config, output=devices.shared_folder(config.output))
    judges = processes.all_or_none(lambda: [rewards.load_reward(spec) for spec in config.rewards])
    row_sets = processes.all_or_none(
        lambda: load_row_sets(config.prompts, config.held_out, config.held_out_rows, check_rows)
    )
    processes.all_or_none(lambda: [check_columns(rows, judges) for rows in row_sets])
    devices.agree_on(f"the rows of {config.prompts}", row_sets)
    lm, params, tokenizer = pg.load(config.model, dtype=config.dtype, mesh=mesh, remat=config.remat)
    reward_model = config.reward_model and load_judge(
        config.reward_model, config.reward_model_weight, lm, tokenizer, chat=config.chat, mesh=mesh
    )
    task = make_task(
        lm, tokenizer, judges, config.reward_weights or None, row_sets, chat=config.chat, max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, reward_model=reward_model, mesh=mesh,
        group_size=whole_groups(mesh, config.batch_size, algorithm.group_size),
    )  # fmt: skip
    devices.agree_on(f"what the tokenizer of {config.model} makes of the rows", task.prompt_sets)
    train_prompts, held_out = task.prompt_sets
    fed = batch_rows.fed_rows(mesh, config.batch_size)
    deal = batches(train_prompts, config.batch_size, seed=config.seed, group_size=algorithm.group_size, own=fed)

    updates = config.steps * config.epochs * minibatches
    optimizer = adamw(
        config.learning_rate, updates=updates, warmup=min(config.warmup_updates, updates), decay=config.decay,
        max_grad_norm=config.max_grad_norm, weight_decay=config.weight_decay, eps=config.adam_eps,
    )  # fmt: skip
    frozen, trained = freeze(params, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed, mesh=mesh)
    it = pg.iteration(
        lm, algorithm, optimizer, reference=params, frozen=frozen, mesh=mesh, max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, eos_ids=task.eos_ids, pad_id=task.pad_id,
        epochs=config.epochs, minibatches=minibatches, microbatches=config.microbatches,
        max_approx_kl=config.max_approx_kl, importance_cap=config.importance_cap, kl_target=config.kl_target,
        kl_horizon=config.kl_horizon, teacher_force=config.teacher_force,
    )  # fmt: skip
    key, timer = jax.random.key(config.seed), clock.DeviceClock()
    state = it.init(trained, key)._replace(key=None)  # a snapshot's config holds the seed
    del trained

    def policy(state: pg.State) -> Any:
        return pg.with_lora(frozen, state.learner.params["lm"])

    def evaluate(state: pg.State) -> dict[str, float]:
        params_now, scale = policy(state), devices.put(mesh, np.float32(config.temperature))
        kl = functools.partial(
            programs.rollout_kl, lm, params_now, params, temperature=scale, max_new_tokens=config.max_new_tokens,
            parts=minibatches * config.microbatches,
        )  # fmt: skip
        figures = task.evaluate(
            params_now, held_out, config.eval_samples, config.batch_size, fold_in(key, 2**32 - 1), kl
        )
        return {f"eval/{name}": x for name, x in figures.items()}

    def prepare(state: pg.State, i: int) -> Any:
        """Queue the rollout and what the models give to it; nothing is waited for."""
        prompts, seconds = deal[i], timer.queued()  # prompts of the rows that this process feeds
        return prompts, seconds, it.sample(state._replace(key=key), *task.padded(prompts))

    def step(state: pg.State, i: int, work: Any) -> tuple[pg.State, dict[str, Any], list[dict[str, Any]]]:
        """Judge on the host while the device works, then update."""
        prompts, rollout_seconds, rollout = work
        jax.block_until_ready(rollout.tokens)
        timing, begun = {"timing/rollout": rollout_seconds()}, time.perf_counter()
        judged = task.judge(prompts, rollout, task.queue_reward_model(prompts, rollout))
        timing["timing/reward"] = time.perf_counter() - begun
        jax.block_until_ready(rollout)
        timing["timing/score"] = time.perf_counter() - begun
        timer.free()
        update_seconds = timer.queued()
        paid = judged.scores - np.float32(config.truncation_penalty) * ~judged.ended
        state, metrics = it.learn(state._replace(key=key), rollout, paid)
        state = state._replace(key=None)
        metrics |= {**judged.metrics(), **timing, "timing/update": update_seconds, "episode": (i + 1) * config.batch_size}
        metrics["completions/padded_length"] = rollout.tokens.shape[1]
        if i + 1 == config.steps or (config.eval_every is not None and (i + 1) % config.eval_every == 0):
            jax.block_until_ready(state)
            metrics |= {"timing/update": update_seconds(), **evaluate(state)}
            timer.free()
        return state, metrics, judged.samples()

    with open_session(
        config.output, state, **session_options(config), may_change=MAY_CHANGE, steps=config.steps,
        data=rows_digest([train_prompts, held_out]), reference=frozen_model(config.model, params),
        reward_model=reward_model and frozen_model(config.reward_model, reward_model.params),
    ) as (folder, state, start, checkpoints, writer, progress):  # fmt: skip
        speed_of = speed.policy_step(lm, mesh, config.batch_size, config.max_new_tokens, minibatches, config.lora_rank)

        def report(done: int, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
            if done > 0:
                metrics |= speed_of(metrics)
                progress.update(done, metrics)
            writer.write(done, metrics)
            if "eval/scores" in metrics:
                error = f" +- {metrics['eval/scores_stderr']:.3f}" if "eval/scores_stderr" in metrics else ""
                progress.print(f"held-out score after {done} steps: {metrics['eval/scores']:.3f}{error}, KL {metrics['eval/kl']:.2f}")
            if samples and (done % config.samples_every == 0 or done == 1):
                writer.write_samples(done, samples)
                progress.samples(done, samples[:3])

        if start == 0:
            before = evaluate(state)
            loop.check_model(before["eval/kl"], config.model, lm.dtype)
            processes.all_or_none(lambda: report(0, before, []))
        state = loop.run(
            state._replace(learner=revived(state.learner)), steps=config.steps, start=start, prepare=prepare, step=step,
            check=loop.check_finite, report=report, checkpoints=checkpoints, save_every=config.save_every,
            score=lambda metrics: metrics.get("eval/scores"),
        )  # fmt: skip
        pg.save_pretrained(folder / "policy", lm, policy(state), tokenizer)
        if config.keep_best:
            state, best = to_best(checkpoints, state)
            pg.save_pretrained(folder / "policy_best", lm, policy(state), tokenizer)
            progress.print(f"policy_best is the policy after step {best}")
        return processes.on_process_0(lambda: rise(folder, "eval/scores", last="objective/scores"))
