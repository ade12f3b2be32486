"""Algorithms as values: a few pure functions and numbers each, which `iteration` composes with a model.

As an `optax.GradientTransformation` is a pair of functions, an `Algorithm` is how advantages are made and what a token's
loss is. The five below are the classics; `ratio_algorithms` has other losses, `group_algorithms` other advantages. An
algorithm of your own is another value of the same type.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from pgjax.core.advantages import group_advantages, leave_one_out_baseline, monte_carlo_returns
from pgjax.core.errors import UserError
from pgjax.core.losses import clipped_surrogate_loss, policy_gradient_loss
from pgjax.core.masking import masked_whiten, where_mask
from pgjax.learning.algorithm import Algorithm, Batch, Experience


def value_advantages(experience: Experience, *, whiten: bool = True) -> jax.Array:
    """Compare each return with the critic's value: returns - values, by default whitened over all sampled tokens.

    Schulman et al. (2017), with Monte Carlo returns in place of GAE.

    Args:
        experience: of the batch.
        whiten: whether to bring them to mean 0 and variance 1.

    Returns:
        [B, W] float32, 0 outside the mask; in standard deviations, or in reward units without `whiten`.
    """
    advantages = experience.returns - experience.values
    return masked_whiten(advantages, experience.mask) if whiten else where_mask(experience.mask, advantages)


def leave_one_out_advantages(experience: Experience, *, group_size: int) -> jax.Array:
    """Compare each return with the mean of the prompt's other completions: RLOO, token by token.

    The others count with what they still earn from the same token on: their score, and the penalties still to come.
    Unbiased, as the baseline does not depend on its own row. Ahmadian et al. (2024), "Back to Basics".

    Args:
        experience: of the batch.
        group_size: completions a prompt, adjacent rows, at least 2.

    Returns:
        [B, W] float32, reward units, 0 outside the mask.
    """
    scores, mask = experience.scores[:, None], experience.mask
    to_come = scores + where_mask(mask, experience.returns - scores)  # after its end a row has earned its score
    return where_mask(mask, experience.returns - _of_others(to_come, group_size, experience.kept))


def group_relative_advantages(experience: Experience, *, group_size: int, normalize: bool = True) -> jax.Array:
    """Compare each score with its group's mean, and charge the penalties still to come in their own units.

    A_t = (s - mean) / (std + 1e-4) + P_t - mean of the other rows' P_t,    P_t = sum_{u >= t} penalty_u

    GRPO (Shao et al. 2024); `normalize=False` leaves out the division: Dr. GRPO (Liu et al. 2025). Only scores are
    normalised: were the penalty divided by the group's spread too, a group of equal scores would learn from the noise of its
    own KL, at full size. The penalty's part is unbiased, `group_advantages` says what the score's part is.

    Args:
        experience: of the batch.
        group_size: completions a prompt, adjacent rows, at least 2.
        normalize: whether to divide the scores by the group's standard deviation.

    Returns:
        [B, W] float32, 0 outside the mask.
    """
    scores = group_advantages(experience.scores, group_size=group_size, normalize=normalize, mask=experience.kept)
    return with_penalties(scores, experience, group_size=group_size)


def with_penalties(advantages: jax.Array, experience: Experience, *, group_size: int) -> jax.Array:
    """Give each token its sequence's advantage, and charge the penalties still to come, less those of the group's others.

    Args:
        advantages: [B] of the scores.
        experience: of the batch.
        group_size: completions a prompt, adjacent rows, at least 2.

    Returns:
        [B, W] float32, 0 outside the mask.
    """
    to_come = monte_carlo_returns(experience.penalties, experience.mask)
    return where_mask(experience.mask, advantages[:, None] + to_come - _of_others(to_come, group_size, experience.kept))


def return_advantages(experience: Experience) -> jax.Array:
    """Take the returns themselves, without a baseline. Williams (1992).

    Args:
        experience: of the batch.

    Returns:
        [B, W] float32, reward units, 0 outside the mask.
    """
    return experience.returns


def clipped_token_loss(
    logprobs: jax.Array, batch: Batch, *, clip_eps: float, clip_eps_high: float | None, dual_clip: float | None
) -> jax.Array:
    """Give PPO's clipped surrogate of each token (`pg.clipped_surrogate_loss`).

    Args:
        logprobs: [B, W] nats, of the present policy.
        batch: with `old_logprobs` and `advantages`.
        clip_eps, clip_eps_high, dual_clip: as in `pg.clipped_surrogate_loss`.

    Returns:
        [B, W] float32.
    """
    return clipped_surrogate_loss(
        logprobs, batch.old_logprobs, batch.advantages, batch.mask,
        clip_eps=clip_eps, clip_eps_high=clip_eps_high, dual_clip=dual_clip, reduce="none",
    )  # fmt: skip


def policy_gradient_token_loss(logprobs: jax.Array, batch: Batch) -> jax.Array:
    """Give -advantage * log pi of each token (`pg.policy_gradient_loss`).

    Args:
        logprobs: [B, W] nats, of the present policy.
        batch: with `advantages`.

    Returns:
        [B, W] float32.
    """
    return policy_gradient_loss(logprobs, batch.advantages, batch.mask, reduce="none")


def ppo(
    *, clip_eps: float = 0.2, clip_eps_high: float | None = None, dual_clip: float | None = None,
    value_coef: float = 0.5, value_clip_eps: float | None = None, whiten: bool = True, entropy_coef: float = 0.0,
    kl_coef: float = 0.005, kl_loss_coef: float = 0.0, discount: float = 1.0, reduce: str = "token_mean",
) -> Algorithm:  # fmt: skip
    """Build PPO with a critic (Schulman et al. 2017): the clipped ratio on Monte Carlo returns less values, whitened.

    min(r A, clip(r, 1 - clip_eps, 1 + clip_eps_high) A),    r = pi / pi_old,    A = whitened(returns - values)

    Args:
        clip_eps, clip_eps_high, dual_clip: range of the ratio, as in `pg.clipped_surrogate_loss`.
        value_coef, value_clip_eps, entropy_coef, kl_coef, kl_loss_coef, discount, reduce: as in `Algorithm`.
        whiten: whether advantages are brought to mean 0 and variance 1.

    Returns:
        The algorithm.

    >>> ppo(clip_eps=0.3).clip_range
    (0.3, 0.3)
    """
    return Algorithm(
        bound(value_advantages, whiten=whiten), reduce=reduce, value_coef=value_coef, kl_coef=kl_coef,
        kl_loss_coef=kl_loss_coef, entropy_coef=entropy_coef, discount=discount, value_clip_eps=value_clip_eps,
        **clipped(clip_eps, clip_eps_high, dual_clip),
    )  # fmt: skip


def rloo(
    *, group_size: int = 4, clip_eps: float | None = None, clip_eps_high: float | None = None,
    dual_clip: float | None = None, entropy_coef: float = 0.0, kl_coef: float = 0.005, kl_loss_coef: float = 0.0,
    reduce: str = "sequence_sum",
) -> Algorithm:  # fmt: skip
    """Build RLOO (Ahmadian et al. 2024): REINFORCE against the mean of the prompt's other completions.

    Args:
        group_size: completions of each prompt, at least 2.
        clip_eps, clip_eps_high, dual_clip: with `clip_eps` PPO's clipped ratio, for several updates a rollout; None:
            REINFORCE's loss, for one.
        entropy_coef, kl_coef, kl_loss_coef, reduce: as in `Algorithm`.

    Returns:
        The algorithm.

    >>> rloo(group_size=8).group_size, rloo().on_policy, rloo(clip_eps=0.2).on_policy
    (8, True, False)
    """
    for name, x in {"clip_eps_high": clip_eps_high, "dual_clip": dual_clip}.items():
        if clip_eps is None and x is not None:
            raise UserError(
                f"{name}={x} belongs to a clipped ratio, which needs clip_eps: without it the loss is REINFORCE's"
            )
    advantages = bound(leave_one_out_advantages, group_size=check_group(group_size))
    loss = _plain() if clip_eps is None else clipped(clip_eps, clip_eps_high, dual_clip)
    return Algorithm(
        advantages, reduce=reduce, group_size=group_size, kl_coef=kl_coef, kl_loss_coef=kl_loss_coef,
        entropy_coef=entropy_coef, **loss,
    )  # fmt: skip


def grpo(
    *, group_size: int = 4, clip_eps: float = 0.2, clip_eps_high: float | None = None, dual_clip: float | None = None,
    normalize: bool = True, entropy_coef: float = 0.0, kl_coef: float = 0.0, kl_loss_coef: float = 0.04,
    reduce: str = "sequence_mean",
) -> Algorithm:  # fmt: skip
    """Build GRPO (Shao et al. 2024): scores in their group's standard deviations, the clipped ratio, k3 in the loss.

    Args:
        group_size: completions of each prompt, at least 2.
        clip_eps, clip_eps_high, dual_clip: range of the ratio, as in `pg.clipped_surrogate_loss`.
        normalize: whether scores are divided by their group's standard deviation.
        entropy_coef, kl_coef, kl_loss_coef, reduce: as in `Algorithm`.

    Returns:
        The algorithm.

    >>> grpo(group_size=8).kl_loss_coef
    0.04
    """
    advantages = bound(group_relative_advantages, group_size=check_group(group_size), normalize=normalize)
    return Algorithm(
        advantages, reduce=reduce, group_size=group_size, kl_coef=kl_coef, kl_loss_coef=kl_loss_coef,
        entropy_coef=entropy_coef, **clipped(clip_eps, clip_eps_high, dual_clip),
    )  # fmt: skip


def dr_grpo(
    *, group_size: int = 4, clip_eps: float = 0.2, clip_eps_high: float | None = None, dual_clip: float | None = None,
    entropy_coef: float = 0.0, kl_coef: float = 0.0, kl_loss_coef: float = 0.0, reduce: str = "sequence_sum",
) -> Algorithm:  # fmt: skip
    """Build Dr. GRPO (Liu et al. 2025): GRPO without its two divisions, by the spread and by the length.

    Args:
        group_size: completions of each prompt, at least 2.
        clip_eps, clip_eps_high, dual_clip: range of the ratio, as in `pg.clipped_surrogate_loss`.
        entropy_coef, kl_coef, kl_loss_coef, reduce: as in `Algorithm`.

    Returns:
        The algorithm.

    >>> dr_grpo().reduce
    'sequence_sum'
    """
    return grpo(
        group_size=group_size, clip_eps=clip_eps, clip_eps_high=clip_eps_high, dual_clip=dual_clip, normalize=False,
        entropy_coef=entropy_coef, kl_coef=kl_coef, kl_loss_coef=kl_loss_coef, reduce=reduce,
    )  # fmt: skip


def reinforce(
    *, entropy_coef: float = 0.0, kl_coef: float = 0.005, kl_loss_coef: float = 0.0, discount: float = 1.0,
    reduce: str = "sequence_sum",
) -> Algorithm:  # fmt: skip
    """Build REINFORCE (Williams 1992): returns times log-probabilities, without a baseline.

    Args:
        entropy_coef, kl_coef, kl_loss_coef, discount, reduce: as in `Algorithm`.

    Returns:
        The algorithm.

    >>> reinforce().advantages is return_advantages
    True
    """
    return Algorithm(
        return_advantages, reduce=reduce, kl_coef=kl_coef, kl_loss_coef=kl_loss_coef, entropy_coef=entropy_coef,
        discount=discount, **_plain(),
    )  # fmt: skip


def _of_others(x: jax.Array, group_size: int, kept: jax.Array | None) -> jax.Array:
    """Average each entry over the group's other rows that are kept, [B, W]."""
    baseline = functools.partial(leave_one_out_baseline, group_size=group_size, mask=kept)
    return jax.vmap(baseline, in_axes=1, out_axes=1)(x)


@functools.lru_cache(maxsize=256)
def bound(function: Callable, **options: Any) -> Callable:
    """Bind options; equal ones give the same function, so that equal algorithms share their compiled programs.

    >>> bound(max, key=abs) is bound(max, key=abs)
    True
    """
    return functools.partial(function, **options)


def check_group(size: int) -> int:
    """Refuse a group in which nothing can be compared.

    >>> check_group(4)
    4
    """
    if size < 2:
        raise UserError(f"completions of one prompt are compared: group_size must be at least 2, got {size}")
    return size


def clipped(clip_eps: float, clip_eps_high: float | None = None, dual_clip: float | None = None) -> dict[str, Any]:
    """Give the fields of an algorithm with PPO's clipped loss.

    >>> clipped(0.2, 0.28)["clip_range"]
    (0.2, 0.28)
    """
    return {
        "token_loss": bound(clipped_token_loss, clip_eps=clip_eps, clip_eps_high=clip_eps_high, dual_clip=dual_clip),
        "clip_range": check_range(clip_eps, clip_eps_high, dual_clip),
    }


def check_range(clip_eps: float, clip_eps_high: float | None, dual_clip: float | None = None) -> tuple[float, float]:
    """Refuse bounds that cannot work, and give both ends.

    >>> check_range(0.2, None)
    (0.2, 0.2)
    """
    for name, eps in {"clip_eps": clip_eps, "clip_eps_high": clip_eps_high}.items():
        if eps is not None and not eps >= 0:
            raise UserError(f"{name} must be at least 0, got {eps}")
    if dual_clip is not None and not 1 < dual_clip < math.inf:
        raise UserError(f"dual_clip must be above 1, got {dual_clip} (None sets no bound)")
    return clip_eps, clip_eps if clip_eps_high is None else clip_eps_high


def _plain() -> dict:
    return {"token_loss": policy_gradient_token_loss, "on_policy": True}


NAMED = (ppo, rloo, grpo, dr_grpo, reinforce)  # those of this file that `by_name.load_algorithm` finds by their names
