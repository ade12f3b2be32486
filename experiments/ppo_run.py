"""What surrounds the story of `experiments.ppo`: the checks of its config, its speed, and the summary of a run."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import pgjax as pg
from pgjax.core.errors import UserError
from pgjax.run import checks, logs
from pgjax.run.checks import check_lora, require
from pgjax.run.flops import adapter_flops, decode_bytes, mbu, mfu, sequence_sizes, training_flops
from pgjax.run.peaks import Peaks, measured_peaks

if TYPE_CHECKING:
    from experiments.ppo import Config


_COLDEST = 1e-6  # the lowest temperature: far below it logits / temperature leave float32


@functools.cache
def machine_peaks(dtype: str) -> Peaks:
    """Measure the limits of one device, once a process."""
    with jax.set_mesh(Mesh(np.empty((), object), ())):  # off the mesh, for the time being
        return measured_peaks(dtype, device=jax.local_devices()[0])


def speed(
    lm: pg.CausalLM,
    config: Config,
    peaks: Peaks,
    metrics: dict[str, float],
    mesh: Mesh | None = None,
    shared: int = 1,
) -> dict[str, float]:
    """Work out tokens a second, and the share of the devices' measured peaks that learner and sampler reach.

    `shared` rows have their prompt computed once.
    """
    devices, tensor = (1, 1) if mesh is None else (mesh.size, dict(mesh.shape).get("tensor", 1))
    replicas = devices // tensor  # each reads the parameters for itself while it decodes
    length, completion = metrics["completions/padded_length"], metrics["completions/mean_length"]
    seconds = metrics["timing/rollout"] + metrics["timing/score"] + metrics["timing/update"]
    rows, window = config.batch_size * metrics["train/updates"] / config.minibatches, config.max_new_tokens + 1
    new = config.max_new_tokens
    sizes = sequence_sizes(rows, prompt_length=length - new, new_tokens=new, group_size=shared)
    work = training_flops if config.lora_rank is None else adapter_flops
    flops = work(lm.arch, **sizes, head_tokens=rows * window)
    size = jnp.dtype(lm.dtype).itemsize
    context = length - new + completion / 2
    a_step = replicas * decode_bytes(
        lm.arch, batch=config.batch_size / replicas, context=context, weight_bytes=size, cache_bytes=size
    )
    return {
        "perf/tokens_per_second": config.batch_size * completion / seconds,
        "perf/mfu": mfu(flops, metrics["timing/update"], devices * peaks.matmul_flops),
        "perf/decode_mbu": mbu(
            a_step * metrics["completions/max_length"], metrics["timing/rollout"], devices * peaks.read_bytes
        ),
    }


def summary(folder: Path) -> dict[str, float]:
    """Read off a finished run what changed on the held-out prompts, in standard errors of the difference.

    Beside that: all figures of the last evaluation (eval/...) and of the last step.
    """
    rows = logs.read_metrics(folder)
    evaluations = [row for row in rows if "eval/scores" in row]
    if len(evaluations) < 2:
        raise UserError(
            f"{folder / logs.METRICS} holds {len(evaluations)} of the run's evaluations, and the first and the last are "
            "compared: it was cut or removed"
        )
    before, after = evaluations[0], evaluations[-1]
    error = math.hypot(before["eval/scores_stderr"], after["eval/scores_stderr"])
    last = [row for row in rows if "objective/scores" in row][-1]
    rise = after["eval/scores"] - before["eval/scores"]
    in_errors = (
        rise / error if error else math.copysign(math.inf, rise) if rise else 0.0
    )  # NaN where one sample has no error
    return {
        "eval/before": before["eval/scores"],
        "eval/after": after["eval/scores"],
        "eval/rise_in_stderr": in_errors,
        **last,
        **after,
    }


def check_steps(steps: int, done: int, folder: Path) -> None:
    """Refuse to go on to a step that lies behind the run."""
    if done > steps:
        raise UserError(f"steps={steps} lies below the {done} steps that {folder} has done already")


def check(config: Config) -> None:
    """Refuse a run that cannot work, before anything is read or computed."""
    checks.at_least_one(
        config, "steps", "batch_size", "max_new_tokens", "held_out_rows", "epochs", "minibatches", "microbatches",
        "eval_samples", "samples_every", "save_every", "keep", "group_size",
    )  # fmt: skip
    parts = config.minibatches * config.microbatches
    require(
        config.batch_size % parts == 0,
        f"batch_size={config.batch_size} does not divide into minibatches={config.minibatches} times "
        f"microbatches={config.microbatches}: make it a multiple of {parts}",
    )
    require(
        _COLDEST <= config.temperature < math.inf,
        f"temperature must be above 0 (a greedy policy has no gradient), from {_COLDEST:g} on, got {config.temperature}",
    )
    require(config.top_k is None or config.top_k >= 1, f"top_k must be at least 1, or None, got {config.top_k}")
    require(config.top_k is None or config.top_k < 2**31, f"top_k must be below 2^31, or None, got {config.top_k}")
    require(0 < config.top_p <= 1, f"top_p must be above 0 and at most 1, got {config.top_p}")
    if config.eval_every is not None:
        checks.at_least_one(config, "eval_every")
    require(0 < config.clip_eps < 1, f"clip_eps must be between 0 and 1, got {config.clip_eps}")
    require(
        config.dual_clip is None or 1 < config.dual_clip < math.inf,
        f"dual_clip must be above 1, got {config.dual_clip} (None sets no bound)",
    )
    require(0 < config.discount <= 1, f"discount must be above 0 and at most 1, got {config.discount}")
    checks.not_negative(
        config, "kl_coef", "value_coef", "entropy_coef", "kl_loss_coef", "truncation_penalty", "weight_decay",
        "learning_rate", "warmup_updates",
    )  # fmt: skip
    require(
        config.kl_target is None or config.kl_coef > 0, "kl_target adapts kl_coef by factors: it must start above 0"
    )
    checks.above_zero(
        config, "clip_eps_high", "importance_cap", "value_clip_eps", "kl_target", "max_approx_kl", "kl_horizon",
        "max_grad_norm", "adam_eps",
    )  # fmt: skip
    require(
        config.kl_target is None or config.kl_horizon > 0.2 * config.batch_size,
        f"kl_horizon={config.kl_horizon:g} lets an iteration of batch_size={config.batch_size} turn kl_coef to 0 or below: "
        f"make it more than {0.2 * config.batch_size:g}",
    )
    checks.seed_fits(config)
    check_lora(config)
    check_algorithm(config)
    require(
        config.score_samples is not False or samples_itself(config),
        f"top_k={config.top_k}, top_p={config.top_p} and importance_cap={config.importance_cap} make the sampler's "
        "log-probabilities others than the policy's: leave out --no-score-samples",
    )
    weights = config.reward_weights
    require(
        len(config.rewards) >= 1 or config.reward_model is not None,
        "rewards is empty: name at least one module:function, or a reward model",
    )
    require(
        len(weights) in (0, len(config.rewards)) and all(math.isfinite(weight) for weight in weights),
        f"reward_weights must be a finite number for each of {config.rewards}, or left out, got {weights}",
    )
    require(
        math.isfinite(config.reward_model_weight),
        f"reward_model_weight must be finite, got {config.reward_model_weight}",
    )


def scores_samples(config: Config) -> bool:
    """Say whether the policy scores its completions by a pass of their own, or what the sampler said of them will do.

    With one update a rollout it will: the ratio is 1 by definition. With more, the sampler's rounding would enter the ratio.
    """
    if config.score_samples is None:
        return not samples_itself(config) or config.epochs * config.minibatches > 1
    return config.score_samples


def samples_itself(config: Config) -> bool:
    """Say whether the sampler draws from the policy as it is, so that its log-probabilities are the policy's."""
    return config.top_k is None and config.top_p == 1 and config.importance_cap is None


def check_algorithm(config: Config) -> None:
    """Refuse values of algorithm, advantage and reduce that do not exist or do not go together."""
    choices = {
        "algorithm": ("ppo", "reinforce"),
        "advantage": ("value", "leave-one-out", "group", "none"),
        "reduce": ("token_mean", "sequence_mean", "sequence_sum"),
    }
    for name, known in choices.items():
        value = vars(config)[name]
        require(value in known, f"{name} must be one of {', '.join(known)}, got {value!r}")
    require(
        config.algorithm != "reinforce" or config.epochs <= 1,
        f"epochs={config.epochs} with algorithm=reinforce learns from samples of an older policy as if they were the "
        "present one's: leave epochs at 1, or use ppo",
    )
    if config.advantage not in ("leave-one-out", "group"):
        return
    require(
        config.group_size >= 2,
        f"advantage={config.advantage} compares completions of one prompt: group_size must be at least 2, got "
        f"{config.group_size}",
    )
    require(
        config.batch_size % config.group_size == 0,
        f"batch_size={config.batch_size} does not divide into groups of group_size={config.group_size}: make it a "
        f"multiple of {config.group_size}",
    )
    require(
        config.discount == 1,
        f"advantage={config.advantage} compares whole sequences: leave discount at 1, got {config.discount}",
    )
