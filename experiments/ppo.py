"""PPO on a language model against a black-box reward (Schulman et al. 2017; Ouyang et al. 2022), Monte Carlo returns.

    python -m experiments.ppo                   # SmolLM2-135M-Instruct learns the shape of a haiku
    python -m experiments.ppo sentiment         # ... or to continue reviews kindly; whole_haiku: to end one, and to count
    python -m experiments.ppo --algorithm rloo  # or grpo, dr_grpo, reinforce, my_module:my_algorithm
    python -m experiments.ppo --help            # every field; flags override the preset
    python -m experiments.ppo --resume          # go on with a run that was stopped (--resume-from: see --help)
    python -m experiments.ppo --mesh fsdp=-1    # on all devices; --distributed: of several hosts (pgjax/run/devices.py)

prompts > rollout > scores > rewards > returns > advantages > loss > update > checkpoint
With `--reward-model FOLDER` (trained with the same --chat) in place of Python rewards, or beside them, it is RLHF's last stage.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import pgjax as pg
from pgjax.data.batches import batches
from pgjax.learning import flags
from pgjax.learning.collecting import learned, refilled
from pgjax.learning.evaluation import check_start, evaluate
from pgjax.learning.optimizer import revived
from pgjax.models.io.stops import set_stops, told_stops
from pgjax.models.lora import freeze
from pgjax.parallel import batch_rows, processes
from pgjax.parallel.sharding import fold_in
from pgjax.rollout.judge import load_judge
from pgjax.rollout.task import make_task, read_task
from pgjax.run import checks, clock, devices, exits, loop, presets, stop
from pgjax.run.checkpoint.resume import frozen_model, rows_digest, to_best
from pgjax.run.session import INCIDENTAL, RunFlags, load_options, open_session, session_options, settled, templated
from pgjax.run.speed import policy_speed
from pgjax.run.summary import before_and_after, comparison


@dataclasses.dataclass(frozen=True)
class Config(flags.LearningFlags, flags.RewardFlags, RunFlags):
    """One run. Every number that decides it stands here."""

    model: str = "SmolLM2-135M-Instruct"  # folder, .gguf file, hub id, or a model that an installed package ships
    prompts: str = "experiments.tasks.haiku:train_rows"  # .jsonl, .csv, .parquet or .txt file, or module:function
    held_out: str | None = None  # likewise, for evaluations; None: rows of `prompts`, kept aside
    held_out_rows: int = 16  # how many rows are kept aside where `held_out` is None
    chat: bool = True  # put prompts through the tokenizer's chat template
    rewards: tuple[str, ...] = ("experiments.tasks.haiku:haiku_reward",)  # the black boxes, each as module:function
    output: Path = Path("runs/haiku")  # the run folder: config, metrics, samples, curves, checkpoints, policy
    steps: int = 16  # iterations of rollout and update
    batch_size: int = 32  # completions sampled in an iteration
    eval_samples: int = 8  # completions of each held-out prompt in an evaluation
    eval_max_new_tokens: int | None = None  # the longest of them; None: max_new_tokens
    eval_every: int | None = None  # iterations between evaluations; None: before and after alone
    samples_every: int = 8  # iterations between tables of samples
    save_every: int = 8  # iterations between checkpoints
    keep_best: bool = False  # evaluate at each, keep the one of the best held-out score too, and save its policy


PRESETS = {
    "haiku": Config(held_out="experiments.tasks.haiku:held_out_rows"),
    "whole_haiku": Config(
        held_out="experiments.tasks.haiku:held_out_rows", reward_weights=(1.0, 0.0, 0.0), output=Path("runs/whole_haiku"),
        rewards=tuple(f"experiments.tasks.haiku:{name}" for name in ("whole_haiku_reward", "three_lines", "exact_haiku")),
        steps=45, batch_size=64, max_new_tokens=40, eval_max_new_tokens=128, algorithm="rloo", group_size=8, kl_coef=0.001,
        lora_rank=16, learning_rate=6e-4),
    "sentiment": Config(
        prompts="experiments.tasks.sentiment:train_rows", held_out="experiments.tasks.sentiment:held_out_rows", chat=False,
        rewards=("experiments.tasks.sentiment:sentiment_reward",), output=Path("runs/sentiment"), batch_size=64,
        max_new_tokens=20, kl_coef=0.02),
}  # fmt: skip
GOES_WITH: Any = {
    "prompts": {"held_out": None}, "rewards": {"reward_weights": ()}, "reward_model": {"rewards": (), "reward_weights": ()},
    "algorithm": {"kl_coef": None}}  # fmt: skip
# When a run goes on; digests say whether models and rows are the same, wherever they lie
MAY_CHANGE = INCIDENTAL | flags.CALLING | {"model", "reward_model", "prompts", "held_out"}
MAY_CHANGE |= {"steps", "eval_samples", "eval_every", "samples_every", "save_every"}


def main(config: Config) -> dict[str, float]:
    """Run PPO; return the held-out score before and after with its standard errors, and the last step's metrics."""
    check(config)
    with devices.on_devices(config) as mesh:
        return run(settled(config), mesh)


def run(config: Config, mesh: Mesh | None) -> dict[str, float]:
    """Do the work of `main` on the devices of a mesh, or on one; all processes of a run call this alike."""
    algorithm = flags.algorithm_of(config)
    group_size = algorithm.group_size
    options = flags.iteration_options(config, algorithm)
    flags.tell_schedule(config, options["minibatches"])
    parts = options["minibatches"] * options["microbatches"]  # that a batch is learned in
    devices.check_batch_divides(mesh, config.batch_size, parts=parts, group_size=group_size)
    judges, row_sets, places = read_task(config.rewards, config.prompts, config.held_out, config.held_out_rows)
    lm, params, tokenizer = pg.load(config.model, mesh=mesh, **load_options(config))
    tokenizer = set_stops(templated(tokenizer, config), config.stop_tokens, config.stop_strings)
    weight = config.reward_model_weight
    reward_model = load_judge(config.reward_model, weight, lm, tokenizer, chat=config.chat, mesh=mesh)
    task = make_task(
        lm, tokenizer, judges, config.reward_weights or None, row_sets, places=places, chat=config.chat, mesh=mesh,
        reward_model=reward_model, group_size=group_size, caller=flags.caller_of(config),
        eval_max_new_tokens=config.eval_max_new_tokens, attempts=flags.attempts_of(config), **flags.sampling_options(config),
    )  # fmt: skip
    processes.print_once(told_stops(tokenizer))
    train_prompts, held_out = task.prompt_sets
    fed = batch_rows.rows_to_feed(mesh, config.batch_size)
    deal = batches(train_prompts, config.batch_size, seed=config.seed, group_size=group_size)
    spare = batches(train_prompts, config.batch_size, seed=config.seed ^ 2**31, group_size=group_size)
    frozen, trained = freeze(params, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed, mesh=mesh)
    it = pg.iteration(
        lm, algorithm, flags.optimizer_of(config, config.steps, options["minibatches"]), reference=params, frozen=frozen,
        mesh=mesh, **task.ends(), **flags.sampling_options(config), **options,
    )  # fmt: skip
    key, timer = jax.random.key(config.seed), clock.DeviceClock()
    state = it.init(trained, key)._replace(key=None)  # a snapshot's config holds the seed
    policy = lambda state: pg.with_lora(frozen, state.learner.params["lm"])
    evaluated = lambda state: evaluate(
        task, policy(state), params, held_out, samples=config.eval_samples, batch_size=config.batch_size,
        key=fold_in(key, 2**32 - 1), parts=parts,
    )  # fmt: skip

    def drawn(state: pg.State, batch: Any, key: jax.Array) -> Any:
        return [batch[row] for row in fed], timer.queued(), it.sample(state._replace(key=key), *task.padded(batch))

    def step(state: pg.State, i: int, work: Any) -> tuple[pg.State, dict[str, Any], list[dict[str, Any]]]:
        """Judge on the host while the device works, then update."""
        prompts, rollout_seconds, rollout = work
        jax.block_until_ready(rollout.tokens)
        timing, begun = {"timing/rollout": rollout_seconds()}, time.perf_counter()

        def another(number: int) -> Any:
            prompts, _, more = drawn(state, spare[i * (config.resample_groups or 0) + number - 1], fold_in(key, number))
            return more, task.judge(prompts, more)

        refill: Any = {"most": config.resample_groups, "metric": config.resample_metric, "group_size": group_size}
        rollout, judged, keep, groups = refilled(rollout, task.judge(prompts, rollout), another, **refill)
        timing["timing/reward"] = time.perf_counter() - begun
        jax.block_until_ready(rollout)
        timing["timing/score"] = time.perf_counter() - begun
        timer.free()
        timing["timing/update"] = update_seconds = timer.queued()
        paid = learned(judged, keep=keep, **flags.learned_options(config))
        state, metrics = it.learn(state._replace(key=key), rollout, *paid)
        metrics |= {**judged.metrics(), **groups, **timing, "episode": (i + 1) * config.batch_size}
        if flags.evaluates(config, i + 1):
            jax.block_until_ready(state)
            metrics |= {"timing/update": update_seconds(), **stop.unless_stopped(lambda: evaluated(state))}
            timer.free()
        return state._replace(key=None), metrics, judged.samples()

    speed = functools.partial(
        policy_speed, arch=lm.arch, dtype=lm.dtype, mesh=mesh, batch_size=config.batch_size, adapters=frozen is not None,
        minibatches=options["minibatches"], parts=parts, group_size=group_size,
    )  # fmt: skip
    with open_session(
        config.output, state, **session_options(config), may_change=MAY_CHANGE, steps=config.steps,
        data=rows_digest([train_prompts, held_out]), reference=frozen_model(params),
        reward_model=reward_model and frozen_model(reward_model.params),
    ) as session:  # fmt: skip
        folder, state, start, checkpoints = session[:4]

        def report(done: int, metrics: dict[str, float], samples: Any = None) -> None:
            speeds = speed(metrics) if "timing/update" in metrics else {}
            session.report(done, metrics | speeds, samples, config.samples_every)

        if flags.evaluates(config, start):  # before the first step, and where a stop broke it off
            figures = lambda: check_start(evaluated(state), config.model, lm.dtype, start)
            session.evaluate(start, "eval/scores", figures, report)
        state = loop.run(
            state._replace(learner=revived(state.learner)), steps=config.steps, start=start, step=step, report=report,
            prepare=lambda state, i: drawn(state, deal[i], key), checkpoints=checkpoints, save_every=config.save_every,
            check=loop.check_finite, score=lambda metrics: metrics.get("eval/scores"),
        )  # fmt: skip
        session.evaluate(config.steps, "eval/scores", lambda: evaluated(state), session.writer.write)
        pg.save_pretrained(folder / "policy", lm, policy(state), tokenizer)
        if config.keep_best:
            state, best = to_best(checkpoints, state)
            pg.save_pretrained(folder / "policy_best", lm, policy(state), tokenizer)
            session.progress.print(f"policy_best is the policy after step {best}")
        return processes.on_process_0(lambda: before_and_after(folder, "eval/scores", last="objective/scores"))


def check(config: Config) -> None:
    """Refuse a run that cannot work, before anything is read or computed."""
    checks.check_run(config)
    checks.at_least_one(config, "eval_samples", "samples_every", "eval_every", "eval_max_new_tokens")
    flags.check_policy(config)


if __name__ == "__main__":
    with exits.plain_errors():
        figures = main(presets.parse(PRESETS, description=__doc__, goes_with=GOES_WITH))
    if processes.is_process_0():
        print(comparison(figures))
