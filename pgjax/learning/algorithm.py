"""What an algorithm is: a few pure functions and numbers, what they are given, and what they must hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pgjax.core.errors import UserError
from pgjax.core.reductions import REDUCTIONS


class Experience(NamedTuple):
    """What is known of a batch of completions before anything is learned: W = max_new_tokens + 1 entries a row.

    rewards_t = [t is the last token] score - kl_coef * (log pi - log ref)_t; returns_t = the discounted sum from t on. Where the
    black box rewards single tokens, those stand in place of the score at the last one, and the score is their sum.
    """

    scores: (
        jax.Array
    )  # [B] reward units; rows of one prompt are adjacent; of a row left out the mean of its group's others
    penalties: jax.Array  # [B, W] reward units, -kl_coef * (log pi - log ref) of each token
    returns: jax.Array  # [B, W] reward units, score and penalties still to come
    values: jax.Array  # [B, W] reward units, the critic's estimate of the return before each token
    logprobs: jax.Array  # [B, W] nats, of the policy that sampled
    sampler_logprobs: jax.Array  # [B, W] nats, as the sampler computed them, filters included
    mask: jax.Array  # [B, W] bool, True on sampled tokens that are learned from
    kept: jax.Array | None = None  # [B] bool, True for rows that are learned from; None: all


class Batch(NamedTuple):
    """What an update learns from; W as in `Experience`: the window from the last prompt token on."""

    tokens: jax.Array  # [B, T] int32
    attention_mask: jax.Array  # [B, T]
    mask: jax.Array  # [B, W] bool, True on sampled tokens that are learned from; all that follow are [B, W] float32
    old_logprobs: Any  # of the policy that sampled; None (to `policy_loss` alone): the present one, whose ratio is 1
    old_values: jax.Array
    returns: jax.Array
    advantages: jax.Array
    ref_logprobs: jax.Array | None = None  # of the frozen reference, for a KL in the loss
    weights: jax.Array | None = None  # what each token counts in the policy's losses; None: 1
    chosen: jax.Array | None = None  # [B, W] bool, of `Algorithm.choose`


class Algorithm(NamedTuple):
    """A policy-gradient algorithm: loss = sum of its terms, each token weighed as `reduce` says.

        policy + value_coef * value - entropy_coef * entropy + kl_loss_coef * k3

    Example:
      >>> import pgjax as pg
      >>> centred = pg.reinforce()._replace(advantages=lambda experience: experience.returns - experience.scores.mean())
      >>> centred.reduce
      'sequence_sum'
    """

    advantages: Callable[[Experience], jax.Array]  # -> [B, W] the advantage of each token
    token_loss: Callable[[jax.Array, Batch], jax.Array]  # (logprobs [B, W], batch) -> [B, W], before any reduction
    reduce: str  # "token_mean", "sequence_mean" or "sequence_sum", as in `pg.policy_gradient_loss`
    group_size: int = 1  # completions of each prompt, in adjacent rows
    value_coef: float = 0.0  # of the critic's squared error; 0: there is no critic
    kl_coef: float = 0.0  # reward units a nat, of the penalty in the reward
    kl_loss_coef: float = 0.0  # of k3 to the reference in the loss
    entropy_coef: float = 0.0  # of the entropy bonus
    discount: float = 1.0  # of a reward one token later
    value_clip_eps: float | None = None  # range of the value around its old one; None: no clipping
    clip_range: tuple[float, float] = (math.inf, math.inf)  # below and above 1: what the clip fraction counts
    on_policy: bool = False  # the loss holds for the policy that sampled alone: one update a rollout
    choose: Callable[[Experience, jax.Array], jax.Array] | None = None  # (experience, advantages) -> `Batch.chosen`


def check_algorithm(algorithm: Algorithm) -> None:
    """Refuse an algorithm whose numbers cannot work.

    Args:
        algorithm: any.

    Raises:
        UserError: with the field, its value and its range.

    Example:
        >>> import pgjax as pg
        >>> check_algorithm(pg.reinforce(kl_coef=-1.0))
        Traceback (most recent call last):
        pgjax.UserError: kl_coef must be finite and at least 0, got -1.0
    """
    if algorithm.reduce not in REDUCTIONS:
        raise UserError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {algorithm.reduce!r}")
    for name in ("value_coef", "kl_coef", "kl_loss_coef", "entropy_coef"):
        number = getattr(algorithm, name)
        if not 0 <= number < math.inf:
            raise UserError(f"{name} must be finite and at least 0, got {number}")
    if not 0 < algorithm.discount <= 1:
        raise UserError(f"discount must be above 0 and at most 1, got {algorithm.discount}")
    if algorithm.value_clip_eps is not None and not 0 < algorithm.value_clip_eps < math.inf:
        raise UserError(f"value_clip_eps must be above 0, got {algorithm.value_clip_eps}")
    if algorithm.group_size < 1:
        raise UserError(f"group_size must be at least 1, got {algorithm.group_size}")
    if algorithm.group_size > 1 and algorithm.discount != 1:
        raise UserError(
            f"groups of {algorithm.group_size} compare whole sequences: leave discount at 1, got {algorithm.discount}"
        )
