"""Algorithms that differ in the loss of a token: GSPO, GMPO, CISPO, SAPO, DPPO, VESPO, A-3PO, KL-Cov and a squared log-ratio.

Each has GRPO's advantages (`normalize=False`: Dr. GRPO's) and no penalty to the reference, unless it is asked for. What its
gradient is an estimate of stands in the docstring of its loss. Every one is exact under microbatches: a row is in one of them,
and what is chosen among all tokens (KL-Cov) is chosen before. For their papers see the losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from pgjax.core import covariance_losses, sequence_losses, weighted_losses
from pgjax.core.decoupled_losses import a3po_logprobs, decoupled_ppo_loss
from pgjax.core.errors import UserError
from pgjax.learning.algorithm import Algorithm, Batch, Experience
from pgjax.learning.algorithms import bound, check_group, check_range, group_relative_advantages


def ratio_token_loss(logprobs: jax.Array, batch: Batch, *, loss: Callable[..., jax.Array], **options: Any) -> jax.Array:
    """Give a loss of the core, token by token.

    Args:
        logprobs: [B, W] nats, of the present policy.
        batch: with `old_logprobs` and `advantages`.
        loss: called as `pg.clipped_surrogate_loss` is.
        options: of it.

    Returns:
        [B, W] float32.
    """
    return loss(logprobs, batch.old_logprobs, batch.advantages, batch.mask, reduce="none", **options)


def gspo(
    *, group_size: int = 4, clip_eps: float = 3e-4, clip_eps_high: float | None = 4e-4, normalize: bool = True,
    reduce: str = "sequence_mean", kl_coef: float = 0.0,
    kl_loss_coef: float = 0.0, entropy_coef: float = 0.0,
) -> Algorithm:  # fmt: skip
    """Build GSPO (Zheng et al. 2025): the geometric mean of a sequence's ratios, clipped (`pg.gspo_loss`).

    Args:
        group_size: completions of each prompt, at least 2.
        clip_eps, clip_eps_high: range of that mean, far smaller than a token's ratio has.
        normalize: whether scores are divided by their group's standard deviation.
        reduce: as in `Algorithm`; "sequence_mean" is the paper's.
        kl_coef, kl_loss_coef, entropy_coef: as in `Algorithm`.

    Returns:
        The algorithm.

    >>> gspo(clip_eps=0.01, clip_eps_high=None) == gspo(clip_eps=0.01, clip_eps_high=0.01)
    True
    """
    ends = check_range(clip_eps, clip_eps_high)
    return _with(
        sequence_losses.gspo_loss, group_size, normalize, reduce, (kl_coef, kl_loss_coef, entropy_coef),
        {"clip_eps": ends[0], "clip_eps_high": ends[1]},
    )  # fmt: skip


def gmpo(
    *, group_size: int = 4, clip_eps: float = 0.4, clip_eps_high: float | None = None, normalize: bool = True,
    reduce: str = "sequence_mean", kl_coef: float = 0.0,
    kl_loss_coef: float = 0.0, entropy_coef: float = 0.0,
) -> Algorithm:  # fmt: skip
    """Build GMPO (Zhao et al. 2025): the geometric mean of a sequence's clipped ratios (`pg.gmpo_loss`).

    Args:
        group_size, normalize, reduce, kl_coef, kl_loss_coef, entropy_coef: as of `gspo`.
        clip_eps, clip_eps_high: range of a token's log-ratio, nats.

    Returns:
        The algorithm.

    >>> gmpo().reduce
    'sequence_mean'
    """
    ends = check_range(clip_eps, clip_eps_high)
    of_ratio = (1 - math.exp(-ends[0]), math.exp(ends[1]) - 1)
    return _with(
        sequence_losses.gmpo_loss, group_size, normalize, reduce, (kl_coef, kl_loss_coef, entropy_coef),
        {"clip_eps": ends[0], "clip_eps_high": ends[1]}, of_ratio,
    )  # fmt: skip


def cispo(
    *, group_size: int = 4, clip_eps: float = 1.0, clip_eps_high: float | None = 4.0, normalize: bool = True,
    reduce: str = "token_mean", kl_coef: float = 0.0,
    kl_loss_coef: float = 0.0, entropy_coef: float = 0.0,
) -> Algorithm:  # fmt: skip
    """Build CISPO (MiniMax 2025): the clipped ratio as a weight, so that every token learns (`pg.cispo_loss`).

    Args:
        group_size, normalize, reduce, kl_coef, kl_loss_coef, entropy_coef: as of `gspo`.
        clip_eps, clip_eps_high: range of the weight; from 1 on, `clip_eps` sets no lower bound.

    Returns:
        The algorithm.

    >>> cispo().reduce
    'token_mean'
    """
    ends = check_range(clip_eps, clip_eps_high)
    return _with(
        weighted_losses.cispo_loss, group_size, normalize, reduce, (kl_coef, kl_loss_coef, entropy_coef),
        {"clip_eps": ends[0], "clip_eps_high": ends[1]}, ends,
    )  # fmt: skip


def sapo(
    *, group_size: int = 4, tau_pos: float = 1.0, tau_neg: float = 1.05, normalize: bool = True,
    reduce: str = "sequence_mean", kl_coef: float = 0.0,
    kl_loss_coef: float = 0.0, entropy_coef: float = 0.0,
) -> Algorithm:  # fmt: skip
    """Build SAPO (Gao et al. 2025): gradients that fade as the ratio leaves 1 (`pg.sapo_loss`).

    Args:
        group_size, normalize, reduce, kl_coef, kl_loss_coef, entropy_coef: as of `gspo`.
        tau_pos, tau_neg: how fast they fade, above 0.

    Returns:
        The algorithm.

    >>> sapo() == sapo(tau_neg=1.05)
    True
    """
    options = _above_zero(tau_pos=tau_pos, tau_neg=tau_neg)
    return _with(
        weighted_losses.sapo_loss, group_size, normalize, reduce, (kl_coef, kl_loss_coef, entropy_coef),
        options,
    )  # fmt: skip


def dppo(
    *, group_size: int = 4, divergence: str = "tv", delta: float = 0.2, cap: float = 20.0, normalize: bool = True,
    reduce: str = "token_mean", kl_coef: float = 0.0,
    kl_loss_coef: float = 0.0, entropy_coef: float = 0.0,
) -> Algorithm:  # fmt: skip
    """Build DPPO (Qi et al. 2026): tokens stop where their probability has moved far (`pg.dppo_loss`).

    Args:
        group_size, normalize, reduce, kl_coef, kl_loss_coef, entropy_coef: as of `gspo`.
        divergence, delta, cap: as of `pg.dppo_loss`.

    Returns:
        The algorithm.

    >>> dppo(divergence="js")
    Traceback (most recent call last):
    pgjax.UserError: divergence must be one of tv, kl, got 'js'
    """
    if divergence not in weighted_losses.DIVERGENCES:
        raise UserError(f"divergence must be one of {', '.join(weighted_losses.DIVERGENCES)}, got {divergence!r}")
    options = {"divergence": divergence, **_above_zero(delta=delta, cap=cap)}
    return _with(
        weighted_losses.dppo_loss, group_size, normalize, reduce, (kl_coef, kl_loss_coef, entropy_coef),
        options,
    )  # fmt: skip


def vespo(
    *, group_size: int = 4, k_pos: float = 2.0, lambda_pos: float = 3.0, k_neg: float = 3.0, lambda_neg: float = 2.0,
    normalize: bool = True, reduce: str = "token_mean", kl_coef: float = 0.0,
    kl_loss_coef: float = 0.0, entropy_coef: float = 0.0,
) -> Algorithm:  # fmt: skip
    """Build VESPO (Shen et al. 2026): a soft function of the sequence's whole importance weight (`pg.vespo_loss`).

    Args:
        group_size, normalize, reduce, kl_coef, kl_loss_coef, entropy_coef: as of `gspo`.
        k_pos, lambda_pos, k_neg, lambda_neg: as of `pg.vespo_loss`.

    Returns:
        The algorithm.

    >>> vespo().on_policy
    False
    """
    options = _above_zero(k_pos=k_pos, lambda_pos=lambda_pos, k_neg=k_neg, lambda_neg=lambda_neg)
    return _with(
        sequence_losses.vespo_loss, group_size, normalize, reduce, (kl_coef, kl_loss_coef, entropy_coef),
        options,
    )  # fmt: skip


def a3po(
    *, group_size: int = 4, alpha: float = 0.5, clip_eps: float = 0.2, clip_eps_high: float | None = None,
    normalize: bool = True, reduce: str = "token_mean", kl_coef: float = 0.0,
    kl_loss_coef: float = 0.0, entropy_coef: float = 0.0,
) -> Algorithm:  # fmt: skip
    """Build A-3PO (Li et al. 2025): PPO's clip around a policy between the old and the present one (`pg.a3po_logprobs`).

    Decoupled PPO itself is any algorithm with a clip and `importance_cap=inf` of `pg.iteration`: its proximal policy is the
    one that began the iteration.

    Args:
        group_size, normalize, reduce, kl_coef, kl_loss_coef, entropy_coef: as of `gspo`.
        alpha: where between them, 0 to 1.
        clip_eps, clip_eps_high: range of the ratio to it.

    Returns:
        The algorithm.

    >>> a3po(alpha=2.0)
    Traceback (most recent call last):
    pgjax.UserError: alpha must be from 0 to 1, got 2.0
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha must be from 0 to 1, got {alpha}")
    ends = check_range(clip_eps, clip_eps_high)
    return _with(
        _a3po_loss, group_size, normalize, reduce, (kl_coef, kl_loss_coef, entropy_coef),
        {"alpha": alpha, "clip_eps": ends[0], "clip_eps_high": ends[1]},
    )  # fmt: skip


def kl_cov(
    *, group_size: int = 4, fraction: float = 2e-4, coef: float = 1.0, normalize: bool = True,
    reduce: str = "token_mean", kl_coef: float = 0.0,
    kl_loss_coef: float = 0.0, entropy_coef: float = 0.0,
) -> Algorithm:  # fmt: skip
    """Build KL-Cov (Cui et al. 2025): the few tokens that lower the entropy most are held to the old policy (`pg.kl_cov_loss`).

    They are chosen once an iteration, among all its tokens, by the log-probabilities of the policy that sampled.

    Args:
        group_size, normalize, reduce, kl_coef, kl_loss_coef, entropy_coef: as of `gspo`.
        fraction: of all tokens, above 0.
        coef: advantage units a nat.

    Returns:
        The algorithm.

    >>> kl_cov().choose is not None
    True
    """
    _above_zero(fraction=fraction, coef=coef)
    coefs = kl_coef, kl_loss_coef, entropy_coef
    unheld = _with(covariance_losses.kl_cov_loss, group_size, normalize, reduce, coefs, {})
    choose = bound(_high_covariance, fraction=fraction)
    return unheld._replace(token_loss=bound(_kl_cov_loss, coef=coef), choose=choose)


def squared_log_ratio(
    *,
    group_size: int = 4,
    coef: float = 1e-3,
    normalize: bool = True,
    reduce: str = "sequence_sum",
    kl_coef: float = 0.0,
    kl_loss_coef: float = 0.0,
    entropy_coef: float = 0.0,
) -> Algorithm:
    """Build the policy gradient of Kimi k1.5 (2025): a pull to the old policy in place of a clip (`pg.squared_log_ratio_loss`).

    Args:
        group_size, normalize, reduce, kl_coef, kl_loss_coef, entropy_coef: as of `gspo`.
        coef: reward units a nat squared.

    Returns:
        The algorithm.

    >>> squared_log_ratio().reduce
    'sequence_sum'
    """
    options = _above_zero(coef=coef)
    return _with(
        weighted_losses.squared_log_ratio_loss, group_size, normalize, reduce, (kl_coef, kl_loss_coef, entropy_coef),
        options,
    )  # fmt: skip


def _with(
    loss: Callable[..., jax.Array], group_size: int, normalize: bool, reduce: str, coefs: tuple[float, float, float],
    options: dict[str, Any], clip_range: tuple[float, float] = (math.inf, math.inf),
) -> Algorithm:  # fmt: skip
    advantages = bound(group_relative_advantages, group_size=check_group(group_size), normalize=normalize)
    kl_coef, kl_loss_coef, entropy_coef = coefs
    return Algorithm(
        advantages, bound(ratio_token_loss, loss=loss, **options), reduce, group_size=group_size, kl_coef=kl_coef,
        kl_loss_coef=kl_loss_coef, entropy_coef=entropy_coef, clip_range=clip_range,
    )  # fmt: skip


def _a3po_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    alpha: float,
    **options: Any,
) -> jax.Array:
    prox = a3po_logprobs(logprobs, old_logprobs, alpha=alpha)
    return decoupled_ppo_loss(logprobs, prox, old_logprobs, advantages, mask, **options)


def _high_covariance(experience: Experience, advantages: jax.Array, *, fraction: float) -> jax.Array:
    return covariance_losses.high_covariance_mask(experience.logprobs, advantages, experience.mask, fraction=fraction)


def _kl_cov_loss(logprobs: jax.Array, batch: Batch, *, coef: float) -> jax.Array:
    return ratio_token_loss(logprobs, batch, loss=covariance_losses.kl_cov_loss, coef=coef, chosen=batch.chosen)


def _above_zero(**numbers: float) -> dict[str, float]:
    for name, x in numbers.items():
        if not x > 0:
            raise UserError(f"{name} must be above 0, got {x}")
    return numbers


NAMED = (gspo, gmpo, cispo, sapo, dppo, vespo, a3po, kl_cov, squared_log_ratio)
