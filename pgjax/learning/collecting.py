"""What is learned from a rollout that was judged: which rows, for which scores; groups of equal scores are sampled anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.core.errors import UserError
from pgjax.learning.iteration import Sampled
from pgjax.parallel.sharding import constrain_batch, mesh_of, place, replicated
from pgjax.rollout.judged import Judged

Draw = Callable[[int], tuple[Sampled, Judged]]  # number from 1 -> another rollout like the first, of other prompts


def learned(
    judged: Judged, *, max_new_tokens: int, truncation_penalty: float = 0.0, overlong_tokens: int = 0,
    overlong_penalty: float = 1.0, mask_truncated: bool = False, keep: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """Give the scores to learn from, penalties for length taken off, and the rows that are kept.

        score - truncation_penalty [cut] - overlong_penalty * clip((length - (max - overlong_tokens)) / overlong_tokens, 0, 1)

    The last term is DAPO's soft punishment of overlong completions (Yu et al. 2025, eq. 13), the mask its overlong filter.

    Args:
        judged: of `Task.judge`.
        max_new_tokens: the longest completion.
        truncation_penalty: taken off the score of a completion that did not end by itself.
        overlong_tokens: over so many last tokens the overlong penalty rises; 0: none.
        overlong_penalty: what a completion of all the tokens loses.
        mask_truncated: leave completions out that did not end by themselves.
        keep: [B] bool, False for further rows that are left out; None: no more.

    Returns:
        [B] or [B, max_new_tokens] float32, and [B] bool of the rows that are kept: None where all are, and always will be.

    Example:
        >>> judged = Judged(np.float32([1, 2]), {}, np.array([True, False]), np.array([2, 4]), [])
        >>> learned(judged, max_new_tokens=4, overlong_tokens=2, mask_truncated=True)
        (array([1., 1.], dtype=float32), array([ True, False]))
    """
    off = np.float32(truncation_penalty) * ~judged.ended
    if overlong_tokens:
        over = (judged.lengths - (max_new_tokens - overlong_tokens)) / overlong_tokens
        off = off + np.float32(overlong_penalty) * np.clip(over, 0, 1).astype(np.float32)
    judged = judged.plus(-off)
    scores = judged.scores if judged.token_scores is None else judged.token_scores
    kept = ~np.isnan(judged.scores)
    if kept.all() and not mask_truncated and keep is None:
        return scores, None
    kept &= True if keep is None else keep
    kept &= judged.ended if mask_truncated else True
    return np.nan_to_num(scores), kept


def refilled(
    rollout: Sampled, judged: Judged, draw: Draw, *, most: int | None, group_size: int, metric: str = "scores"
) -> tuple[Sampled, Judged, np.ndarray | None, dict[str, float]]:
    """Put groups whose scores differ in the place of those that all score the same, as DAPO does (Yu et al. 2025).

    Args:
        rollout: [B] completions, those of a group in adjacent rows.
        judged: what the black box says of them.
        draw: gives another rollout of as many rows, and its judgement; called by all processes alike.
        most: how often it is called at most, while a group of equal scores is left; None: such groups stay.
        group_size: completions of each prompt.
        metric: "scores", or the reward whose own values must differ.

    Returns:
        The rollout, what is said of it, [B] bool of the rows that are kept, None where no group is ever left out, and metrics:
        "groups/zero_spread", the share of groups in the first rollout whose scores are all equal, and "groups/resampled", how
        many rollouts were drawn besides.

    Raises:
        UserError: no reward has the name `metric`.
    """
    if group_size < 2:
        return rollout, judged, None, {}
    if metric != "scores" and metric not in judged.parts:
        raise UserError(f"resample_metric={metric!r} is none of scores, {', '.join(judged.parts)}")
    good = judged.spread(group_size, metric)
    metrics = {"groups/zero_spread": float(1 - judged.spread(group_size).mean())}
    if most is None:
        return rollout, judged, None, metrics
    drawn = 0
    while drawn < most and not good.all():
        drawn += 1
        more, judged_more = draw(drawn)
        better = np.flatnonzero(judged_more.spread(group_size, metric))
        places = np.flatnonzero(~good)[: len(better)]
        groups = np.arange(len(good))
        groups[places] = len(good) + better[: len(places)]
        rows = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
        rollout, judged = take_rows(rollout, more, rows), judged.take(judged_more, rows)
        good[places] = True
    return rollout, judged, np.repeat(good, group_size), metrics | {"groups/resampled": float(drawn)}


def take_rows(rollout: Sampled, other: Sampled, rows: Sequence[int] | np.ndarray) -> Sampled:
    """Take rows of a rollout and, from number B on, of another one, padded on the left to the longer of both."""
    return _take_rows(rollout, other, place(np.asarray(rows, np.int32), replicated(mesh_of(rollout))))


@jax.jit
def _take_rows(rollout: Sampled, other: Sampled, rows: jax.Array) -> Sampled:
    def chosen(x: Any, y: Any) -> jax.Array:
        width = max(x.shape[1], y.shape[1])
        both = [jnp.pad(z, ((0, 0), (width - z.shape[1], 0))) for z in (x, y)]
        return constrain_batch(jnp.concatenate(both)[rows])

    return jax.tree.map(chosen, rollout, other)
