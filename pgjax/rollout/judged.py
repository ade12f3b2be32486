"""What the black box says of a rollout, and what a row earns besides; on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pgjax.data.tables import Row

SHOWN = 8  # rows of a batch that its samples show


class Judged(NamedTuple):
    """What the black box says of a rollout, whole; on the host of every process."""

    scores: np.ndarray  # [B] float32, weighted sum; NaN where no reward applies
    parts: dict[str, np.ndarray]  # each reward's own, [B]; NaN where it does not apply
    ended: np.ndarray  # [B] True where the completion ended by itself
    lengths: np.ndarray  # [B] sampled tokens
    shown: list[tuple[int, Any, str]]  # row, prompt and completion of the first few
    token_scores: np.ndarray | None = None  # [B, max_new_tokens], whose sums the scores are, where a reward gives such
    votes: np.ndarray | None = None  # [B] int64 of the answers of an evaluation's completions (`attempts.votes_of`)

    def metrics(self) -> dict[str, float]:
        """Average what was judged, under the names of the logs; what does not apply to a row does not count it."""
        scores = judged_only(self.scores)
        return {
            "objective/scores": mean(scores),
            "objective/scores_std": scores.std() if scores.size else np.nan,
            **{f"rewards/{name}": mean(judged_only(part)) for name, part in self.parts.items()},
            "val/num_eos_tokens": self.ended.sum(),
            "completions/clipped_ratio": 1 - self.ended.mean(),
            "completions/not_judged": len(self.scores) - scores.size,
        }

    def plus(self, more: np.ndarray, *, applies: bool = False) -> Judged:
        """Add what each completion earns besides, [B], at its last token; with `applies` also where nothing else applies."""
        scores, of_tokens = self.scores, self.token_scores
        if applies:
            scores = np.nan_to_num(scores)
            of_tokens = None if of_tokens is None else np.nan_to_num(of_tokens)
        if of_tokens is not None:
            of_tokens = of_tokens + at_last(more, self.lengths, of_tokens.shape[1])
        return self._replace(scores=scores + more, token_scores=of_tokens)

    def spread(self, group_size: int, metric: str = "scores") -> np.ndarray:
        """Tell which groups of adjacent rows have different scores, by the sum or by one reward's own, [groups]."""
        groups = (self.scores if metric == "scores" else self.parts[metric]).reshape(-1, group_size)
        known = ~np.isnan(groups)
        high = np.where(known, groups, -np.inf).max(1)
        low = np.where(known, groups, np.inf).min(1)
        return known.any(1) & (high > low)

    def take(self, other: Judged, rows: np.ndarray) -> Judged:
        """Take rows of this one and, from number B on, of another: what is shown stays that of this one's rows that stay."""
        pair = [x._replace(shown=[]) for x in (self, other)]
        if (self.token_scores is None) != (other.token_scores is None):
            width = next(x.token_scores.shape[1] for x in pair if x.token_scores is not None)
            pair = [
                x._replace(token_scores=at_last(x.scores, x.lengths, width)) if x.token_scores is None else x
                for x in pair
            ]
        chosen = jax.tree.map(lambda x, y: np.concatenate([x, y])[rows], *pair)
        place = {int(row): i for i, row in enumerate(rows)}
        shown = [(place[row], *rest) for row, *rest in self.shown if row in place]
        size = len(self.scores)
        shown += [(place[row + size], *rest) for row, *rest in other.shown if row + size in place]
        return chosen._replace(shown=sorted(shown, key=lambda x: x[0])[:SHOWN])

    def samples(self) -> list[Row]:
        """Say what became of the first few prompts."""
        return [
            {
                "prompt": prompt,
                "completion": completion,
                "score": float(self.scores[row]),
                **{f"rewards/{name}": float(part[row]) for name, part in self.parts.items()},
            }
            for row, prompt, completion in self.shown
        ]


def judged_only(scores: np.ndarray) -> np.ndarray:
    """Take the scores of the rows to which a reward applies.

    Example:
      >>> judged_only(np.array([1.0, np.nan]))
      array([1.])
    """
    return scores[~np.isnan(scores)]


def mean(x: np.ndarray) -> float:
    """Average; NaN of nothing.

    Example:
      >>> mean(np.array([1.0, 2.0])), mean(np.zeros(0))
      (1.5, nan)
    """
    return float(x.mean()) if x.size else np.nan


def joined(pieces: Sequence[tuple[list[int], Judged]], max_new_tokens: int) -> Judged:
    """Put what the processes judged together, row by row in the order of the batch."""
    rows, found = zip(*pieces, strict=True)
    judged = [Judged(*piece) for piece in found]  # between processes they were lists
    if any(piece.token_scores is not None for piece in judged):
        judged = [
            piece._replace(token_scores=at_last(piece.scores, piece.lengths, max_new_tokens))
            if piece.token_scores is None
            else piece
            for piece in judged
        ]
    order = np.argsort(np.concatenate(rows))
    shown = sorted((x for piece in judged for x in piece.shown), key=lambda x: x[0])
    arrays = [piece._replace(shown=[]) for piece in judged]
    return jax.tree.map(lambda *x: np.concatenate(x)[order], *arrays)._replace(shown=shown)


def at_last(scores: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """Put each row's number at its last token, [B, width]; a NaN everywhere.

    Example:
      >>> at_last(np.array([5.0]), np.array([2]), 3).tolist()
      [[0.0, 5.0, 0.0]]
    """
    placed = np.where(np.arange(width) == lengths[:, None] - 1, scores[:, None], 0)
    return np.where(np.isnan(scores)[:, None], np.nan, placed).astype(np.float32)
