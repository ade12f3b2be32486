"""Fields that scripts' configs share: which algorithm learns, and how its completions are sampled; with their checks."""

from __future__ import annotations

import ast
import dataclasses
import math
from typing import Any, Literal

from pgjax.learning.algorithm import Algorithm
from pgjax.learning.by_name import load_algorithm
from pgjax.learning.iteration import check_importance, check_options
from pgjax.learning.optimizer import Optimizer, adamw
from pgjax.run.checks import above_zero, at_least_one, not_negative, require

_COLDEST = 1e-6  # the lowest temperature: far below it logits / temperature leave float32


@dataclasses.dataclass(frozen=True)
class LearningFlags:
    """Sampling, an algorithm with its options, and its optimizer; None leaves an option as the algorithm has it."""

    max_new_tokens: int = 32  # the longest completion, in tokens
    temperature: float = 1.0  # of the policy: in sampling and in every log-probability
    top_k: int | None = None  # sample from this many likeliest tokens; None: from all, as on-policy learning asks
    top_p: float | None = None  # sample from the likeliest tokens up to this probability; None: from all, likewise
    lanes: int | None = None  # completions sampled at once: where one ends, the next prompt begins; None: all
    stop_tokens: tuple[str, ...] = ()  # texts or ids of the tokens that end a completion; none given: the model's own
    stop_strings: tuple[str, ...] = ()  # texts, of any number of tokens, at which a completion ends too
    algorithm: str = "ppo"  # ppo, rloo, grpo, dr_grpo, reinforce, gspo, ... (README), or your own as module:name
    algorithm_options: tuple[str, ...] = ()  # what else it takes, as name=value: delta=0.1 divergence=kl
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
    kl_target: float | None = None  # nats a sequence; adapts kl_coef towards it (Ziegler et al. 2019); None: fixed
    kl_horizon: float = 10_000.0  # completions; how slowly kl_coef adapts
    importance_cap: float | None = None  # bound of the weights policy / sampler where they differ; None: no weights
    importance_level: Literal["token", "sequence", "geometric"] = "token"  # weights of single tokens, or of sequences
    importance_floor: float | None = None  # weights out of floor to cap are set to 0; None: those above it to the cap
    max_approx_kl: float | None = None  # stop an iteration's epochs when the policy has moved further, nats a token
    teacher_force: bool | None = None  # a pass for the policy's log-probabilities; None: where one is needed
    epochs: int = 1  # passes over an iteration's completions
    minibatches: int | None = None  # optimizer updates in an epoch; None: 2, or 1 where the loss is for on-policy data
    microbatches: int = 2  # parts of a minibatch, for memory; the gradient is the same
    learning_rate: float = 3e-5  # of AdamW, reached after the warm-up
    warmup_updates: int = 4  # updates over which the rate rises linearly
    decay: bool = False  # fall linearly to 0 over the run
    weight_decay: float = 0.0  # of AdamW, decoupled, on matrices only
    adam_eps: float = 1e-8  # of AdamW; larger ones damp what has small gradients
    max_grad_norm: float = 1.0  # clip the gradient to this global norm


_ALGORITHM = (
    "group_size", "reduce", "clip_eps", "clip_eps_high", "dual_clip", "value_coef", "value_clip_eps", "entropy_coef",
    "discount", "kl_coef", "kl_loss_coef",
)  # fmt: skip
_ITERATION = (
    "kl_target", "kl_horizon", "importance_cap", "importance_level", "importance_floor", "max_approx_kl",
    "teacher_force", "epochs", "minibatches", "microbatches",
)  # fmt: skip


def algorithm_of(config: Any) -> Algorithm:
    """Build the algorithm that a config asks for.

    Args:
        config: with the fields of `LearningFlags`.

    Returns:
        The algorithm.

    Raises:
        UserError: as `load_algorithm`.

    Example:
        >>> algorithm_of(LearningFlags(algorithm="rloo", kl_coef=0.0)).kl_coef
        0.0
        >>> algorithm_of(LearningFlags(algorithm="dppo", algorithm_options=("delta=-1",)))
        Traceback (most recent call last):
        pgjax.UserError: delta must be above 0, got -1
    """
    given = {name: getattr(config, name) for name in _ALGORITHM}
    for option in config.algorithm_options:
        name, equals, value = option.partition("=")
        require(bool(name and equals), f"algorithm_options are name=value, as delta=0.1, got {option!r}")
        require(name not in given, f"{name} of algorithm_options is a flag of its own: give it there")
        given[name] = _value(value)
    return load_algorithm(config.algorithm, **given)


def _value(text: str) -> Any:
    """Read a number, True, False or None; anything else is a word."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def optimizer_of(config: Any, steps: int, minibatches: int) -> Optimizer:
    """Build the AdamW that a config asks for.

    Args:
        config: with the fields of `LearningFlags`.
        steps: iterations of the whole run.
        minibatches: updates in an epoch.

    Returns:
        The optimizer.

    Example:
        >>> round(float(optimizer_of(LearningFlags(learning_rate=1e-3), 10, 2).learning_rate(100)), 6)
        0.001
    """
    updates = steps * config.epochs * minibatches
    return adamw(
        config.learning_rate, updates=updates, warmup=min(config.warmup_updates, updates), decay=config.decay,
        max_grad_norm=config.max_grad_norm, weight_decay=config.weight_decay, eps=config.adam_eps,
    )  # fmt: skip


def sampling_options(config: Any) -> dict[str, Any]:
    """Give the arguments of `pg.sample` that a config holds.

    Args:
        config: with the fields of `LearningFlags`.

    Returns:
        The arguments by name.

    Example:
        >>> sampling_options(LearningFlags())
        {'max_new_tokens': 32, 'temperature': 1.0, 'top_k': None, 'top_p': None, 'lanes': None}
    """
    return {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "lanes")}


def iteration_options(config: Any, algorithm: Algorithm) -> dict[str, Any]:
    """Give the arguments of `iteration` that a config holds.

    Args:
        config: with the fields of `LearningFlags`.
        algorithm: of `algorithm_of`.

    Returns:
        The arguments by name, the number of minibatches settled.

    Example:
        >>> iteration_options(LearningFlags("rloo"), load_algorithm("rloo"))["minibatches"]
        1
    """
    options = {name: getattr(config, name) for name in _ITERATION}
    return options | {"minibatches": config.minibatches or (1 if algorithm.on_policy else 2)}


def check_policy(config: Any) -> None:
    """Refuse values of a config that no sampler and no algorithm can use, before anything is loaded.

    Args:
        config: with the fields of `LearningFlags`, steps, batch_size and truncation_penalty.

    Raises:
        UserError: with the field and its value.
    """
    at_least_one(config, "steps", "batch_size", "max_new_tokens", "lanes", "epochs", "minibatches", "microbatches")
    algorithm = algorithm_of(config)
    options = iteration_options(config, algorithm)
    parts = options["minibatches"] * config.microbatches
    require(
        config.batch_size % parts == 0,
        f"batch_size={config.batch_size} does not divide into minibatches={options['minibatches']} times "
        f"microbatches={config.microbatches}: make it a multiple of {parts}",
    )
    require(
        config.batch_size % algorithm.group_size == 0,
        f"batch_size={config.batch_size} does not divide into groups of group_size={algorithm.group_size}: make it a "
        f"multiple of {algorithm.group_size}",
    )
    require(
        _COLDEST <= config.temperature < math.inf,
        f"temperature must be above 0 (a greedy policy has no gradient), from {_COLDEST:g} on, got {config.temperature}",
    )
    require(
        config.top_k is None or 1 <= config.top_k < 2**31,
        f"top_k must be from 1 to 2^31 - 1, or None, got {config.top_k}",
    )
    require(config.top_p is None or 0 < config.top_p <= 1, f"top_p must be above 0 and at most 1, got {config.top_p}")
    not_negative(config, "truncation_penalty")
    above_zero(config, "importance_cap", "kl_target", "max_approx_kl", "kl_horizon", "adam_eps")
    require(
        config.kl_target is None or config.kl_horizon > 0.2 * config.batch_size,
        f"kl_horizon={config.kl_horizon:g} lets an iteration of batch_size={config.batch_size} turn kl_coef to 0 or below: "
        f"make it more than {0.2 * config.batch_size:g}",
    )
    check_importance(config.importance_cap, config.importance_level, config.importance_floor)
    check_options(
        algorithm, config.epochs, config.kl_target,
        plain=config.top_k is None and config.top_p is None and config.importance_cap is None,
        teacher_force=config.teacher_force,
    )  # fmt: skip
