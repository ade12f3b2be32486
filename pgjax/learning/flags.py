"""Fields that scripts' configs share: which algorithm learns, and how its completions are sampled; with their checks."""

from __future__ import annotations

import ast
import dataclasses
import math
from typing import Any, Literal

from pgjax.learning.algorithm import Algorithm
from pgjax.learning.by_name import load_algorithm
from pgjax.learning.iteration_checks import check_importance, check_options
from pgjax.learning.optimizer import Optimizer, adamw
from pgjax.parallel.processes import print_once
from pgjax.rollout.attempts import Attempts
from pgjax.rollout.calling import Caller
from pgjax.rollout.judge import REWARD_MODEL
from pgjax.rollout.rewards import check_weights, load_reward
from pgjax.run.checks import above_zero, at_least_one, not_negative, require
from pgjax.run.session import recorded

_COLDEST = 1e-6  # the lowest temperature: far below it logits / temperature leave float32


@dataclasses.dataclass(frozen=True)
class LearningFlags:
    """Sampling, an algorithm with its options, and its optimizer; None leaves an option as the algorithm has it."""

    max_new_tokens: int = 32  # the longest completion, in tokens
    min_new_tokens: int = 0  # so many at least: before, no id is drawn that ends a completion
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
    pack_tokens: int | None = None  # sequences are packed into rows, so many tokens at once; None: microbatches
    learning_rate: float = 3e-5  # of AdamW, reached after the warm-up
    warmup_updates: int = 4  # updates over which the rate rises linearly
    decay: bool = False  # fall linearly to 0 over the run
    weight_decay: float = 0.0  # of AdamW, decoupled, on matrices only
    adam_eps: float = 1e-8  # of AdamW; larger ones damp what has small gradients
    max_grad_norm: float = 1.0  # clip the gradient to this global norm


@dataclasses.dataclass(frozen=True)
class RewardFlags:
    """How completions are judged, and which of them are learned from for which scores."""

    reward_weights: tuple[float, ...] = ()  # one for each reward; none given: 1 each; with 0 it is logged and no more
    reward_timeout: float | None = None  # seconds that a reward may take for a batch; None: as long as it likes
    reward_workers: int = 0  # calls of rewards at a time, each on some whole groups of the batch; 0: one on all of it
    reward_processes: bool = False  # the workers are processes in place of threads: for rewards that compute in Python
    reward_model: str | None = None  # a sequence classifier with one label, sources as for `model`; None: no such judge
    reward_model_weight: float = 1.0  # of the reward model's score beside the black boxes
    success_score: float | None = None  # evaluations report pass@k: the least score of a success; None: they do not
    success_metric: str = "scores"  # whose score that is: scores, or the name of one of the rewards
    answers: str | None = None  # module:function; the answers that completions vote for, majority@k; called as a reward
    truncation_penalty: float = 0.0  # taken off the score of a completion that did not end by itself
    mask_truncated: bool = False  # leave completions that did not end by themselves out of the update
    overlong_tokens: int = 0  # over so many last tokens of max_new_tokens a penalty rises (DAPO); 0: none
    overlong_penalty: float = 1.0  # what a completion of max_new_tokens loses by it
    resample_groups: int | None = None  # leave groups of equal scores out, after so many rollouts for others; None: no
    resample_metric: str = "scores"  # what must differ in a group then: scores, or the name of one of the rewards


CALLING = frozenset(  # on which nothing that is learned depends
    {"reward_timeout", "reward_workers", "reward_processes", "success_score", "success_metric", "answers"}
)
_ALGORITHM = (
    "group_size", "reduce", "clip_eps", "clip_eps_high", "dual_clip", "value_coef", "value_clip_eps", "entropy_coef",
    "discount", "kl_coef", "kl_loss_coef",
)  # fmt: skip
_ITERATION = (
    "kl_target", "kl_horizon", "importance_cap", "importance_level", "importance_floor", "max_approx_kl",
    "teacher_force", "epochs", "minibatches", "microbatches", "pack_tokens",
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
        {'max_new_tokens': 32, 'temperature': 1.0, 'top_k': None, 'top_p': None, 'lanes': None, 'min_new_tokens': 0}
    """
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "lanes", "min_new_tokens")
    return {name: getattr(config, name) for name in names}


def iteration_options(config: Any, algorithm: Algorithm) -> dict[str, Any]:
    """Give the arguments of `iteration` that a config holds.

    Args:
        config: with the fields of `LearningFlags`.
        algorithm: of `algorithm_of`.

    Returns:
        The arguments by name, the number of minibatches settled; of microbatches there is one where rows are packed.

    Example:
        >>> iteration_options(LearningFlags("rloo"), load_algorithm("rloo"))["minibatches"]
        1
    """
    options = {name: getattr(config, name) for name in _ITERATION}
    options |= {} if config.pack_tokens is None else {"microbatches": 1}
    return options | {"minibatches": config.minibatches or (1 if algorithm.on_policy else 2)}


def caller_of(config: Any) -> Caller:
    """Build what calls the rewards as a config says.

    Args:
        config: with the fields of `RewardFlags`.

    Returns:
        The caller.

    Example:
        >>> caller_of(RewardFlags(reward_workers=2)).workers
        2
    """
    return Caller(config.reward_timeout, config.reward_workers, config.reward_processes)


def attempts_of(config: Any) -> Attempts | None:
    """Say when a completion of an evaluation is a success, as a config does.

    Args:
        config: with the fields of `RewardFlags`.

    Returns:
        That; None where the config does not say.

    Raises:
        UserError: the function of the answers cannot be loaded.

    Example:
        >>> attempts_of(RewardFlags(success_score=0.5))
        Attempts(success=0.5, metric='scores', answers=None)
    """
    if config.success_score is None:
        return None
    answers = None if config.answers is None else load_reward(config.answers)
    return Attempts(config.success_score, config.success_metric, answers)


def evaluates(config: Any, done: int) -> bool:
    """Say whether a run evaluates after a step: the last one, each so many, and with keep_best those that are saved.

    Args:
        config: with the fields steps, eval_every, keep_best and save_every.
        done: steps done.

    Returns:
        Whether it does.
    """
    every = [config.steps, *([config.save_every] if config.keep_best else []), *filter(None, [config.eval_every])]
    return any(done % count == 0 for count in every)


def learned_options(config: Any) -> dict[str, Any]:
    """Give the arguments of `collecting.learned` that a config holds.

    Args:
        config: with the fields of `RewardFlags` and `LearningFlags`.

    Returns:
        The arguments by name.
    """
    names = ("max_new_tokens", "truncation_penalty", "overlong_tokens", "overlong_penalty", "mask_truncated")
    return {name: getattr(config, name) for name in names}


def tell_schedule(config: Any, minibatches: int) -> None:
    """Tell that a run which goes on with another number of steps leaves the course of its learning rate.

    Args:
        config: with the fields of `LearningFlags` and `RunFlags`, and steps.
        minibatches: updates in an epoch.
    """
    before = recorded(config, "steps")
    if before is None or before == config.steps or not config.decay:
        return
    both, shorter = (config.steps, before), min(before, config.steps)
    rates = [
        optimizer_of(config, steps, minibatches).learning_rate((shorter - 1) * config.epochs * minibatches)
        for steps in both
    ]
    now, then = map(float, rates)
    print_once(
        f"steps={config.steps} in place of {before}: with decay the learning rate falls to 0 at step {config.steps}, so that of "
        f"step {shorter} is {now:g}, and was {then:g}; --steps {before} keeps its course"
    )


def check_rewards(config: Any, group_size: int) -> None:
    """Refuse values of `RewardFlags` that cannot work, before anything is loaded.

    Args:
        config: with the fields of `RewardFlags`, rewards and max_new_tokens.
        group_size: completions of each prompt.

    Raises:
        UserError: with the field and its value.
    """
    check_weights(config.rewards, config.reward_weights, config.reward_model, config.reward_model_weight)
    not_negative(
        config, "truncation_penalty", "overlong_penalty", "reward_workers", "resample_groups", "overlong_tokens"
    )
    above_zero(config, "reward_timeout")
    require(
        config.overlong_tokens <= config.max_new_tokens,
        f"overlong_tokens={config.overlong_tokens} is more than max_new_tokens={config.max_new_tokens}",
    )
    require(
        not config.reward_processes or config.reward_workers > 0,
        f"reward_processes needs workers: reward_workers={config.reward_workers}",
    )
    require(
        config.resample_groups is None or group_size > 1,
        f"resample_groups={config.resample_groups} is for groups of completions of a prompt, and group_size is {group_size}",
    )
    known = [
        "scores",
        *(spec.rpartition(":")[2] for spec in config.rewards),
        *([REWARD_MODEL] if config.reward_model else []),
    ]
    for field in ("resample_metric", "success_metric"):
        require(
            getattr(config, field) in known or len(set(known)) < len(known),
            f"{field}={getattr(config, field)!r} is none of {', '.join(known)}",
        )
    require(
        config.success_score is None or math.isfinite(config.success_score),
        f"success_score must be finite, got {config.success_score}",
    )
    require(
        config.answers is None or config.success_score is not None,
        f"answers={config.answers!r} are voted on, and success_score=None does not say which of them are right: set it",
    )


def check_policy(config: Any) -> None:
    """Refuse values of a config that no sampler and no algorithm can use, before anything is loaded.

    Args:
        config: with the fields of `LearningFlags` and `RewardFlags`, steps, batch_size and rewards.

    Raises:
        UserError: with the field and its value.
    """
    at_least_one(config, "steps", "batch_size", "max_new_tokens", "lanes", "epochs", "minibatches", "microbatches")
    at_least_one(config, "pack_tokens")
    algorithm = algorithm_of(config)
    options = iteration_options(config, algorithm)
    parts = options["minibatches"] * options["microbatches"]
    require(
        config.batch_size % parts == 0,
        f"batch_size={config.batch_size} does not divide into minibatches={options['minibatches']} times "
        f"microbatches={options['microbatches']}: make it a multiple of {parts}",
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
    check_rewards(config, algorithm.group_size)
    require(
        0 <= config.min_new_tokens <= config.max_new_tokens and not (config.min_new_tokens and config.stop_strings),
        f"min_new_tokens must be from 0 to max_new_tokens={config.max_new_tokens}, and 0 with stop_strings, got "
        f"{config.min_new_tokens}",
    )
    above_zero(config, "importance_cap", "kl_target", "max_approx_kl", "kl_horizon", "adam_eps")
    require(
        config.kl_target is None or config.kl_horizon > 0.2 * config.batch_size,
        f"kl_horizon={config.kl_horizon:g} lets an iteration of batch_size={config.batch_size} turn kl_coef to 0 or below: "
        f"make it more than {0.2 * config.batch_size:g}",
    )
    check_importance(config.importance_cap, config.importance_level, config.importance_floor)
    check_options(
        algorithm, config.epochs, config.kl_target,
        plain=config.top_k is None and config.top_p is None and config.importance_cap is None
        and config.min_new_tokens == 0,
        teacher_force=config.teacher_force,
    )  # fmt: skip
