"""PPO on a language model against a black-box reward (Schulman et al. 2017; Ouyang et al. 2022), Monte Carlo returns.

    python -m experiments.ppo                   # SmolLM2-135M-Instruct learns the shape of a haiku
    python -m experiments.ppo sentiment         # ... or to continue reviews kindly
    python -m experiments.ppo --help            # every field; flags override the preset
    python -m experiments.ppo --resume          # go on with a run that was stopped
    python -m experiments.ppo --resume-from last-good      # ... whose last snapshot is damaged
    python -m experiments.ppo --mesh fsdp=-1    # on all devices; --distributed: of several hosts (pgjax/run/devices.py)

prompts > rollout > scores > rewards > returns > advantages > loss > update > checkpoint

What else is this script, by flags:
    (none)                                                                                   PPO with a critic
    --advantage leave-one-out --algorithm reinforce --reduce sequence_sum --minibatches 1    RLOO, Ahmadian et al. 2024
    --advantage group --reduce sequence_mean --kl-coef 0 --kl-loss-coef 0.04                 GRPO, Shao et al. 2024
    --advantage group --no-normalize-group --reduce sequence_sum --kl-coef 0                 Dr. GRPO, Liu et al. 2025
    --advantage none --algorithm reinforce --reduce sequence_sum --minibatches 1    REINFORCE, Williams 1992

REINFORCE's loss is exact with one update a rollout: a second minibatch learns from samples that are an update old, unclipped.
With a reward model (`--reward-model FOLDER`, trained with the same --chat) in place of the preset's Python rewards, or beside
`--rewards`, it is RLHF's last stage.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

import pgjax as pg
from experiments.ppo_run import check, check_steps, machine_peaks, scores_samples, speed, summary
from pgjax.core.errors import NotFiniteError
from pgjax.data.batches import batches
from pgjax.data.prompts import check_rows
from pgjax.data.sources import load_row_sets
from pgjax.data.tables import Row
from pgjax.learning import programs
from pgjax.learning.optimizer import Metrics, TrainState, adamw, init_state, minibatches, revived
from pgjax.models.lora import freeze
from pgjax.parallel import batch_rows, processes
from pgjax.parallel.sharding import fold_in, whole_groups
from pgjax.rollout import rewards
from pgjax.rollout.judge import load_judge
from pgjax.rollout.task import check_columns, make_task
from pgjax.run import logs, loop
from pgjax.run.checkpoint.resume import From, frozen_model, go_on, last_step, open_checkpoints, rows_digest, to_best
from pgjax.run.curves import plot_curves
from pgjax.run.devices import MACHINE, Flags, agree_on, check_batch_divides, on_devices, replicate, shared_folder
from pgjax.run.exits import plain_errors
from pgjax.run.progress import Progress


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """One run. Every number that decides it stands here."""

    model: str = "SmolLM2-135M-Instruct"  # folder, .gguf file, hub id, or a model that an installed package ships
    prompts: str = (
        "experiments.tasks.haiku:train_rows"  # .jsonl, .csv, .parquet or .txt file, or module:function giving rows
    )
    held_out: str | None = None  # likewise, for the evaluation before and after; None: rows of `prompts`, kept aside
    held_out_rows: int = 16  # how many rows are kept aside where `held_out` is None
    chat: bool = True  # put prompts through the tokenizer's chat template
    rewards: tuple[str, ...] = ("experiments.tasks.haiku:haiku_reward",)  # the black boxes, each as module:function
    reward_weights: tuple[float, ...] = ()  # one for each reward; none given: 1 each; with 0 it is logged and no more
    reward_model: str | None = None  # a sequence classifier with one label, sources as for `model`; None: no such judge
    reward_model_weight: float = 1.0  # of the reward model's score beside the black boxes
    output: Path = Path("runs/haiku")  # the run folder: config, metrics, samples, curves, checkpoints, policy
    resume: bool = False  # go on with the run in `output`
    resume_from: From = None  # last-good: go on, from the newest snapshot that is whole where later ones are damaged
    seed: int = 0  # of prompt order, sampling and minibatches

    steps: int = 16  # iterations of rollout and update
    batch_size: int = 32  # completions sampled in an iteration
    max_new_tokens: int = 32  # the longest completion, in tokens
    temperature: float = 1.0  # of the policy: in sampling and in every log-probability
    top_k: int | None = None  # sample from this many likeliest tokens; None: from all, as on-policy learning asks
    top_p: float = 1.0  # sample from the likeliest tokens up to this probability; 1: from all, likewise
    truncation_penalty: float = 0.0  # taken off the score of a completion that did not end by itself

    algorithm: Literal["ppo", "reinforce"] = "ppo"  # the policy loss: the clipped ratio, or log-probabilities
    advantage: Literal["value", "leave-one-out", "group", "none"] = "value"  # what a return is compared with
    group_size: int = 4  # completions of each prompt, for leave-one-out and group; they share its computation
    normalize_group: bool = True  # in units of the group's standard deviation, as GRPO; Dr. GRPO does not
    reduce: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"  # how the policy loss is averaged
    epochs: int = 1  # passes over an iteration's completions
    minibatches: int = 2  # optimizer updates in an epoch
    score_samples: bool | None = None  # by a pass of the policy; None: where the sampler's own word won't do
    microbatches: int = 2  # parts of a minibatch, for memory; the gradient is the same
    learning_rate: float = 3e-5  # of AdamW, reached after the warm-up
    lora_rank: int | None = None  # train adapters of this rank, at some ten times the rate; None: all parameters
    lora_alpha: float = 32.0  # the adapters' weight times the rank
    warmup_updates: int = 4  # updates over which the rate rises linearly
    decay: bool = False  # fall linearly to 0 over the run
    weight_decay: float = 0.0  # of AdamW, decoupled, on matrices only
    adam_eps: float = 1e-8  # of AdamW; larger ones damp what has small gradients
    max_grad_norm: float = 1.0  # clip the gradient to this global norm
    clip_eps: float = 0.2  # PPO's range of the ratio, 1 - eps to 1 + eps
    clip_eps_high: float | None = None  # eps of the upper end; None: the same (higher: DAPO, Yu et al. 2025)
    dual_clip: float | None = None  # bound of the ratio where the advantage is below 0 (Ye et al. 2020); None: none
    importance_cap: float | None = None  # bound of the weights policy / sampler where they differ; None: no weights
    value_clip_eps: float | None = None  # range of the value around its old one; None does not clip
    value_coef: float = 0.5  # weight of the value loss beside the policy loss
    entropy_coef: float = 0.0  # weight of the entropy bonus; 0 is none
    discount: float = 1.0  # of rewards that come a token later
    kl_coef: float = 0.005  # of the penalty on the log-ratio to the reference, in the reward of each token
    kl_loss_coef: float = 0.0  # of k3 to the reference in the loss, as GRPO has it; 0 is none
    kl_target: float | None = None  # nats a sequence; adapts kl_coef towards it (Ziegler et al. 2019)
    kl_horizon: float = 10_000.0  # completions; how slowly kl_coef adapts
    max_approx_kl: float | None = None  # stop an iteration's epochs when the policy has moved further, nats a token

    eval_samples: int = 8  # completions of each held-out prompt in an evaluation
    eval_every: int | None = None  # iterations between evaluations; None: before and after only
    samples_every: int = 8  # iterations between tables of samples
    save_every: int = 8  # iterations between checkpoints
    keep: int = 2  # how many of the latest checkpoints stay
    keep_best: bool = False  # keep the one after the iteration of the best mean score too, and save its policy


PRESETS = {
    "haiku": Config(held_out="experiments.tasks.haiku:held_out_rows"),
    "sentiment": Config(
        prompts="experiments.tasks.sentiment:train_rows",
        held_out="experiments.tasks.sentiment:held_out_rows",
        chat=False,
        rewards=("experiments.tasks.sentiment:sentiment_reward",),
        output=Path("runs/sentiment"),
        batch_size=64,
        max_new_tokens=20,
        kl_coef=0.02,
    ),
}


INCIDENTAL = {"output", "resume", "resume_from", "keep", "keep_best", *MACHINE}  # nothing of a result depends on these
MAY_CHANGE = INCIDENTAL | {"steps", "eval_samples", "eval_every", "samples_every", "save_every"}  # when a run goes on


class State(NamedTuple):
    """What a checkpoint holds; the rest follows from the config, the frozen models and the step number."""

    learner: TrainState  # {"lm", "value"} and AdamW's moments
    kl_coef: jax.Array
    key: jax.Array  # of the run; each step folds its number into it


def main(config: Config) -> dict[str, float]:
    """Run PPO; return the held-out score before and after with its standard errors, and the last step's metrics."""
    config = dataclasses.replace(config, resume=config.resume or config.resume_from is not None)
    check(config)
    with on_devices(config) as mesh:
        return run(config, mesh)


def run(config: Config, mesh: Mesh | None) -> dict[str, float]:
    """Do the work of `main` on the devices of a mesh, or on one; all processes of a run call this alike."""
    check_batch_divides(mesh, config.batch_size, minibatches=config.minibatches, microbatches=config.microbatches)
    config = dataclasses.replace(config, output=shared_folder(config.output))
    judges = processes.all_or_none(lambda: [rewards.load_reward(spec) for spec in config.rewards])
    row_sets = processes.all_or_none(lambda: read_rows(config, judges))
    agree_on(f"the rows of {config.prompts}", row_sets)
    lm, params, tokenizer = pg.load(config.model, mesh=mesh, remat=config.remat)
    reward_model = None
    if config.reward_model is not None:
        reward_model = load_judge(
            config.reward_model, config.reward_model_weight, lm, tokenizer, chat=config.chat, mesh=mesh
        )
    group = config.group_size if config.advantage in ("leave-one-out", "group") else 1
    parts = config.minibatches * config.microbatches
    task = make_task(
        lm, tokenizer, judges, config.reward_weights or None, row_sets, chat=config.chat, max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, reward_model=reward_model, mesh=mesh,
        group_size=whole_groups(mesh, config.batch_size, group),
    )  # fmt: skip
    agree_on(f"what the tokenizer of {config.model} makes of the rows", task.prompt_sets)

    def open_folder() -> Path:
        if config.resume and config.resume_from is None:  # before the new config is written
            check_steps(config.steps, last_step(config.output), config.output)
        return logs.open_run(config.output, dataclasses.asdict(config), resume=config.resume, may_change=MAY_CHANGE)

    folder = processes.on_process_0(open_folder)
    train_prompts, held_out = task.prompt_sets
    own = batch_rows.rows_to_feed(mesh, config.batch_size)
    deal = batches(train_prompts, config.batch_size, seed=config.seed, group_size=group, own=own)
    peaks = machine_peaks(jnp.dtype(lm.dtype).name)

    updates = config.steps * config.epochs * config.minibatches
    optimizer = adamw(
        config.learning_rate, updates=updates, warmup=min(config.warmup_updates, updates), decay=config.decay,
        max_grad_norm=config.max_grad_norm, weight_decay=config.weight_decay, eps=config.adam_eps,
    )  # fmt: skip
    reference = {"lm": params, "value": replicate(mesh, pg.init_value_head(lm.arch.width))}
    frozen, trained = freeze(reference, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed, mesh=mesh)
    policy = jax.tree.map(jnp.copy, trained)  # updates consume their buffers: the reference keeps its own
    state = State(
        init_state(policy, optimizer), replicate(mesh, np.float32(config.kl_coef)), jax.random.key(config.seed)
    )
    del policy, trained
    checkpoints = open_checkpoints(
        folder, dataclasses.asdict(config), MAY_CHANGE, keep=config.keep, keep_best=config.keep_best,
        data=rows_digest([train_prompts, held_out]), reference=frozen_model(config.model, params),
        reward_model=None if reward_model is None else frozen_model(config.reward_model, reward_model.params),
    )  # fmt: skip
    state, start = go_on(checkpoints, state, resume=config.resume, resume_from=config.resume_from)
    state = state._replace(learner=revived(state.learner))
    check_steps(config.steps, start, folder)

    key = state.key
    unsplit = whole_groups(None, config.batch_size // config.minibatches, group)  # by minibatches, on any mesh
    shared = whole_groups(mesh, config.batch_size // parts, group)  # whose prompt is computed once
    temperature = replicate(mesh, np.float32(config.temperature))
    scorer = functools.partial(
        programs.score, lm, temperature=temperature, window=config.max_new_tokens + 1, parts=parts, group_size=shared
    )
    take_update = functools.partial(
        programs.update, frozen=frozen, lm=lm, optimizer=optimizer, microbatches=config.microbatches,
        temperature=config.temperature,        algorithm=config.algorithm, reduce=config.reduce, kl_loss_coef=config.kl_loss_coef,
        clip_eps=config.clip_eps, clip_eps_high=config.clip_eps_high, dual_clip=config.dual_clip,
        value_coef=config.value_coef if config.advantage == "value" else 0.0, value_clip_eps=config.value_clip_eps,
        entropy_coef=config.entropy_coef, group_size=shared,
    )  # fmt: skip
    minibatch_numbers = replicate(mesh, list(np.arange(config.minibatches, dtype=np.int32)))
    log_from = start + 1 if start else 0
    free_at = 0.0  # when the device was last seen without work

    def prepare(state: State, i: int) -> Any:
        """Queue the rollout; nothing is waited for."""
        sample_key, shuffle_key = jax.random.split(fold_in(state.key, i))
        prompts = deal[i]  # of the rows that this process feeds
        queued_at, params = time.perf_counter(), pg.with_lora(frozen, state.learner.params)
        if scores_samples(config):
            return prompts, shuffle_key, queued_at, task.generate(params["lm"], prompts, sample_key), None
        return prompts, shuffle_key, queued_at, *task.generate_scored(params, prompts, sample_key)

    def step(state: State, i: int, work: Any) -> tuple[State, dict[str, Any], list[dict[str, Any]]]:
        """Score on the device, judge on the host meanwhile, then update."""
        nonlocal free_at
        prompts, shuffle_key, queued_at, rollout, policy = work
        learner, kl_coef, key = state
        jax.block_until_ready(rollout)
        rolled_out = time.perf_counter()
        if config.eval_every is not None and i % config.eval_every == 0:
            evaluate(learner.params, i)
        asked_at = time.perf_counter()
        asked = task.ask(prompts, rollout)
        said = policy is not None  # by the sampler, on its way
        if policy is None:
            policy = scorer(pg.with_lora(frozen, learner.params), rollout.tokens, rollout.attention_mask)
        referred = scorer(reference, rollout.tokens, rollout.attention_mask)
        judged = task.judge(prompts, rollout, asked)
        rewarded = time.perf_counter()
        jax.block_until_ready((policy, referred))
        scored = time.perf_counter()

        paid = judged.scores - np.float32(config.truncation_penalty) * ~judged.ended
        batch, kl_coef, metrics = programs.experience(
            rollout, policy, referred, replicate(mesh, paid), kl_coef,
            advantage=config.advantage, group_size=group, normalize_group=config.normalize_group,
            importance_cap=config.importance_cap, discount=config.discount,
            kl_target=config.kl_target, kl_horizon=config.kl_horizon,
        )  # fmt: skip
        if said:
            del metrics["val/sampler_gap"]  # nothing to compare
            if config.epochs * config.minibatches == 1:
                batch = batch._replace(old_logprobs=None)
        taken: list[Metrics] = []
        for epoch in range(config.epochs):
            order = minibatches(fold_in(shuffle_key, epoch), config.batch_size, config.minibatches, unsplit)
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
            "timing/reward": rewarded - asked_at,
            "timing/score": scored - asked_at,
            "timing/update": update_seconds,
        }
        of_updates = {name: [metrics[name] for metrics in taken] for name in taken[0]}
        health = {"train/healthy": taken[-1]["train/healthy"]}  # once False, it stays so
        return State(learner, kl_coef, key), {**metrics, **of_updates, **health, **numbers}, judged.samples()

    with (
        processes.all_or_none(
            lambda: logs.Writer(folder, start_step=log_from, active=processes.is_process_0())
        ) as writer,
        Progress(config.steps, start=start) as progress,
    ):

        def report(done: int, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
            metrics |= speed(lm, config, peaks, metrics, mesh, shared)
            writer.write(done, metrics)
            progress.update(done, metrics)
            if done % config.samples_every == 0 or done == 1:
                writer.write_samples(done, samples)
                progress.samples(done, samples[:3])

        def evaluate(params: Any, step: int) -> None:
            if step in processes.on_process_0(
                lambda: [x["step"] for x in logs.read_metrics(folder) if "eval/scores" in x]
            ):
                return  # done before the run was stopped

            params = pg.with_lora(frozen, params)
            scored = functools.partial(scorer, group_size=whole_groups(None, config.eval_samples, shared))

            def kl(rollout: pg.Rollout) -> jax.Array:
                policy, referred = (scored(x, rollout.tokens, rollout.attention_mask) for x in (params, reference))
                return programs.sequence_kl(policy, referred, rollout.mask)

            progress.print(f"sampling {len(held_out)} held-out prompts, {config.eval_samples} times each")
            figures = task.evaluate(
                params["lm"], held_out, config.eval_samples, config.batch_size, fold_in(key, 2**32 - 1), kl
            )
            if step == 0 and not math.isfinite(figures["kl"]):
                raise NotFiniteError(
                    f"the log-probabilities of {config.model} are not finite before the first update: its weights hold NaN or "
                    f"infinities, or overflow in {jnp.dtype(lm.dtype).name}"
                )
            processes.all_or_none(lambda: writer.write(step, {f"eval/{name}": x for name, x in figures.items()}))
            progress.print(
                f"held-out score after {step} steps: {figures['scores']:.3f} +- {figures['scores_stderr']:.3f}, "
                f"KL {figures['kl']:.2f}"
            )

        def save(state: State, to: Path) -> None:
            pg.save_pretrained(to, lm, pg.with_lora(frozen, state.learner.params)["lm"], tokenizer)

        try:
            if start == 0:
                evaluate(state.learner.params, 0)
            state = loop.run(
                state, steps=config.steps, start=start, prepare=prepare, step=step, check=loop.check_finite, report=report,
                checkpoints=checkpoints, save_every=config.save_every, score=lambda metrics: metrics["objective/scores"],
            )  # fmt: skip
            evaluate(state.learner.params, config.steps)
            save(state, folder / "policy")
            if config.keep_best:
                state, best = to_best(checkpoints, state)
                save(state, folder / "policy_best")
                progress.print(f"policy_best is the policy after step {best}")
        finally:
            if processes.is_process_0():
                plot_curves(folder)
            checkpoints.close()

    return processes.on_process_0(lambda: summary(folder))


def read_rows(config: Config, judges: list[rewards.Reward]) -> tuple[list[Row], list[Row]]:
    """Read the prompts to train on and those kept aside."""
    row_sets = load_row_sets(config.prompts, config.held_out, config.held_out_rows, check_rows)
    for rows in row_sets:
        check_columns(rows, judges)
    return row_sets


def preset(arguments: list[str]) -> tuple[Config, list[str]]:
    """Find the preset that the command line names, less what goes with its own task alone, and the other arguments."""
    named = bool(arguments) and arguments[0] in PRESETS
    config, rest = PRESETS[arguments[0] if named else "haiku"], arguments[named:]
    given = {argument.partition("=")[0].replace("_", "-") for argument in rest}
    if "--prompts" in given:
        config = dataclasses.replace(config, held_out=None)
    if "--reward-model" in given and "--rewards" not in given:
        config = dataclasses.replace(config, rewards=())
    return config, rest


if __name__ == "__main__":
    default, arguments = preset(sys.argv[1:])
    with plain_errors():
        figures = main(tyro.cli(Config, default=default, args=arguments, description=__doc__))
    before, after, rise = (figures[f"eval/{name}"] for name in ("before", "after", "rise_in_stderr"))
    if processes.is_process_0():
        print(f"held-out score {before:.3f} -> {after:.3f}, a rise of {rise:.1f} standard errors")
