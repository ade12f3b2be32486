"""Algorithms that differ in the advantages of a group: DAPO's clip on GRPO's, MaxRL, REINFORCE++, OPO and pass@k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from pgjax.core import group_advantages as advantages_of
from pgjax.core.advantages import group_advantages
from pgjax.core.errors import UserError
from pgjax.core.masking import masked_whiten, where_mask
from pgjax.learning.algorithm import Algorithm, Experience
from pgjax.learning.algorithms import bound, check_group, clipped, grpo, with_penalties


def score_advantages(
    experience: Experience, *, group_size: int, compare: Callable[..., jax.Array], **options: Any
) -> jax.Array:
    """Compare the scores of a group, and charge the penalties still to come in their own units.

    Args:
        experience: of the batch.
        group_size: completions a prompt, adjacent rows, at least 2.
        compare: (scores [B], group_size) -> [B].
        options: of it.

    Returns:
        [B, W] float32, 0 outside the mask.
    """
    scores = compare(experience.scores, group_size=group_size, **options)
    return with_penalties(scores, experience, group_size=group_size)


def length_advantages(experience: Experience, *, group_size: int) -> jax.Array:
    """Compare the scores with the group's mean by length, and charge the penalties still to come (`pg.opo_advantages`).

    Args:
        experience: of the batch.
        group_size: completions a prompt, adjacent rows, at least 2.

    Returns:
        [B, W] float32, 0 outside the mask.
    """
    scores = advantages_of.opo_advantages(experience.scores, experience.mask.sum(1), group_size=group_size)
    return with_penalties(scores, experience, group_size=group_size)


def whitened_advantages(experience: Experience, *, group_size: int) -> jax.Array:
    """Whiten the returns over all sampled tokens, after subtracting the mean score of each group: REINFORCE++.

    Args:
        experience: of the batch.
        group_size: completions a prompt, adjacent rows; 1: nothing is subtracted.

    Returns:
        [B, W] float32, in standard deviations, 0 outside the mask.
    """
    returns = experience.returns
    if group_size > 1:
        means = experience.scores - group_advantages(experience.scores, group_size=group_size, normalize=False)
        returns = where_mask(experience.mask, returns - means[:, None])
    return masked_whiten(returns, experience.mask)


def dapo(
    *, group_size: int = 4, clip_eps: float = 0.2, clip_eps_high: float | None = 0.28, dual_clip: float | None = None,
    normalize: bool = True, reduce: str = "token_mean", kl_coef: float = 0.0,
    kl_loss_coef: float = 0.0, entropy_coef: float = 0.0,
) -> Algorithm:  # fmt: skip
    """Build DAPO's loss (Yu et al. 2025): GRPO with a higher upper bound, the mean over tokens, and no penalty.

    Its overlong punishment is `pg.overlong_penalty` on the scores. It draws groups whose scores tie again, which this does not:
    here they count, with advantage 0.

    Args:
        group_size, clip_eps, clip_eps_high, dual_clip, normalize, reduce: as of `pg.grpo`.
        kl_coef, kl_loss_coef, entropy_coef: as in `Algorithm`.

    Returns:
        The algorithm.

    >>> dapo().clip_range
    (0.2, 0.28)
    """
    return grpo(
        group_size=group_size, clip_eps=clip_eps, clip_eps_high=clip_eps_high, dual_clip=dual_clip,
        normalize=normalize, reduce=reduce, kl_coef=kl_coef, kl_loss_coef=kl_loss_coef, entropy_coef=entropy_coef,
    )  # fmt: skip


def maxrl(
    *, group_size: int = 4, clip_eps: float = 0.2, clip_eps_high: float | None = None, dual_clip: float | None = None,
    reduce: str = "sequence_sum", kl_coef: float = 0.0,
    kl_loss_coef: float = 0.0, entropy_coef: float = 0.0,
) -> Algorithm:  # fmt: skip
    """Build MaxRL (Tajwar et al. 2026): scores in units of their group's mean (`pg.maxrl_advantages`). They must not be below 0.

    Args:
        group_size, clip_eps, clip_eps_high, dual_clip, reduce: as of `pg.grpo`.
        kl_coef, kl_loss_coef, entropy_coef: as in `Algorithm`.

    Returns:
        The algorithm.

    >>> maxrl().reduce
    'sequence_sum'
    """
    advantages = bound(score_advantages, group_size=check_group(group_size), compare=advantages_of.maxrl_advantages)
    return _clipped(
        advantages, group_size, reduce, (kl_coef, kl_loss_coef, entropy_coef), clip_eps, clip_eps_high, dual_clip
    )


def opo(
    *, group_size: int = 4, clip_eps: float = 0.2, clip_eps_high: float | None = None, dual_clip: float | None = None,
    reduce: str = "sequence_sum", kl_coef: float = 0.0,
    kl_loss_coef: float = 0.0, entropy_coef: float = 0.0,
) -> Algorithm:  # fmt: skip
    """Build OPO (Hao et al. 2025): the group's mean by length as the baseline (`pg.opo_advantages`).

    Args:
        group_size, clip_eps, clip_eps_high, dual_clip, reduce: as of `pg.grpo`.
        kl_coef, kl_loss_coef, entropy_coef: as in `Algorithm`.

    Returns:
        The algorithm.

    >>> opo(group_size=8).group_size
    8
    """
    advantages = bound(length_advantages, group_size=check_group(group_size))
    return _clipped(
        advantages, group_size, reduce, (kl_coef, kl_loss_coef, entropy_coef), clip_eps, clip_eps_high, dual_clip
    )


def pass_at_k(
    *, group_size: int = 4, k: int | None = None, clip_eps: float = 0.2, clip_eps_high: float | None = None,
    dual_clip: float | None = None, reduce: str = "sequence_sum", kl_coef: float = 0.0,
    kl_loss_coef: float = 0.0, entropy_coef: float = 0.0,
) -> Algorithm:  # fmt: skip
    """Build a policy gradient of the best of k (Tang et al. 2025; `pg.pass_at_k_advantages`).

    Args:
        group_size, clip_eps, clip_eps_high, dual_clip, reduce: as of `pg.grpo`.
        k: from 2 to group_size; None: group_size.
        kl_coef, kl_loss_coef, entropy_coef: as in `Algorithm`.

    Returns:
        The algorithm.

    >>> pass_at_k(k=8)
    Traceback (most recent call last):
    pgjax.UserError: k must be from 2 to group_size=4, got 8
    """
    size = check_group(group_size) if k is None else k
    if not 2 <= size <= group_size:
        raise UserError(f"k must be from 2 to group_size={group_size}, got {size}")
    compare = advantages_of.pass_at_k_advantages
    advantages = bound(score_advantages, group_size=group_size, compare=compare, k=size)
    return _clipped(
        advantages, group_size, reduce, (kl_coef, kl_loss_coef, entropy_coef), clip_eps, clip_eps_high, dual_clip
    )


def reinforce_plus_plus(
    *, group_size: int = 1, clip_eps: float = 0.2, clip_eps_high: float | None = None, dual_clip: float | None = None,
    reduce: str = "token_mean", kl_coef: float = 0.005,
    kl_loss_coef: float = 0.0, entropy_coef: float = 0.0,
) -> Algorithm:  # fmt: skip
    """Build REINFORCE++ (Hu et al. 2025): returns whitened over the batch; in groups, its baseline form.

    Args:
        group_size: completions of each prompt; from 2 on their mean score is subtracted first.
        clip_eps, clip_eps_high, dual_clip, reduce: as of `pg.grpo`.
        kl_coef, kl_loss_coef, entropy_coef: as in `Algorithm`.

    Returns:
        The algorithm.

    >>> reinforce_plus_plus().kl_coef
    0.005
    """
    if group_size < 1:
        raise UserError(f"group_size must be at least 1, got {group_size}")
    advantages = bound(whitened_advantages, group_size=group_size)
    return _clipped(
        advantages, group_size, reduce, (kl_coef, kl_loss_coef, entropy_coef), clip_eps, clip_eps_high, dual_clip
    )


def _clipped(
    advantages: Callable[[Experience], jax.Array], group_size: int, reduce: str, coefs: tuple[float, float, float],
    clip_eps: float, clip_eps_high: float | None, dual_clip: float | None,
) -> Algorithm:  # fmt: skip
    kl_coef, kl_loss_coef, entropy_coef = coefs
    return Algorithm(
        advantages, reduce=reduce, group_size=group_size, kl_coef=kl_coef, kl_loss_coef=kl_loss_coef,
        entropy_coef=entropy_coef, **clipped(clip_eps, clip_eps_high, dual_clip),
    )  # fmt: skip


NAMED = (dapo, maxrl, opo, pass_at_k, reinforce_plus_plus)
