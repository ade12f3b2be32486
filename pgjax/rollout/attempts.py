"""What a policy reaches in several attempts at a prompt: pass@k and majority@k of an evaluation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pgjax.data.tables import Row
from pgjax.rollout import rewards
from pgjax.rollout.scoring import RewardError
from pgjax.run.statistics import clustered_stderr

NO_VOTE = -1  # of a completion without an answer


class Attempts(NamedTuple):
    """When an attempt is a success, and what it votes for."""

    success: float  # the least score of a success
    metric: str = "scores"  # whose score that is: the sum's, or one reward's own
    answers: rewards.Reward | None = None  # called as rewards are; a text for each completion, None: it has no answer


def pass_at(attempts: int, successes: int, k: int) -> float:
    """Estimate the probability that one of k attempts is a success, from n of which c are, without bias.

        1 - C(n - c, k) / C(n, k)

    Args:
      attempts: n, at least k.
      successes: c.
      k: at least 1.

    Returns:
      The estimate; its expectation over n independent attempts, each a success with probability p, is 1 - (1 - p)^k (Chen et al.
      2021, arXiv 2107.03374).

    Raises:
      ValueError: 1 <= k <= n and 0 <= c <= n do not hold.

    Example:
      >>> pass_at(4, 1, 2), pass_at(4, 3, 2), pass_at(4, 1, 1)
      (0.5, 1.0, 0.25)
    """
    if not (1 <= k <= attempts and 0 <= successes <= attempts):
        raise ValueError(
            f"{k} of {attempts} attempts with {successes} successes: 1 <= k <= n and 0 <= c <= n are needed"
        )
    return 1 - math.comb(attempts - successes, k) / math.comb(attempts, k)


def majority_at(votes: npt.ArrayLike, successes: npt.ArrayLike, k: int) -> float:
    """Estimate how often the commonest answer of k attempts is a success, from n, without bias.

    The first k attempts vote, then the next k, and so on; attempts that are left over do not count. Of a vote, the answer that
    most attempts give wins. It is worth the share of successes among the attempts that gave it. Where several answers are
    commonest, it is the mean over them; where no attempt has an answer, 0.

    Args:
      votes: [n] whole numbers, equal where answers are; negative: no answer.
      successes: [n] True where the attempt is a success.
      k: from 1 to n.

    Returns:
      The mean over the votes (Wang et al. 2022, arXiv 2203.11171, vote so).

    Raises:
      ValueError: k is not from 1 to n.

    Example:
      >>> majority_at([7, 7, 2], [True, True, False], 3), majority_at([7, 2], [True, False], 2), majority_at([-1], [True], 1)
      (1.0, 0.5, 0.0)
    """
    votes, successes = np.asarray(votes), np.asarray(successes, bool)
    if not 1 <= k <= len(votes):
        raise ValueError(f"majority of {k} attempts out of {len(votes)}: 1 <= k <= n is needed")
    worth = []
    for begin in range(0, len(votes) - k + 1, k):
        given, right = votes[begin : begin + k], successes[begin : begin + k]
        answers, counts = np.unique(given[given >= 0], return_counts=True)
        commonest = answers[counts == counts.max()] if len(answers) else []
        worth.append(float(np.mean([right[given == answer].mean() for answer in commonest])) if len(answers) else 0.0)
    return float(np.mean(worth))


def attempt_sizes(samples: int) -> list[int]:
    """List the k of pass@k that a number of attempts is reported at: powers of 2, and all.

    Example:
      >>> attempt_sizes(6)
      [1, 2, 4, 6]
    """
    return sorted({2**power for power in range(samples.bit_length())} | {samples})


def attempt_figures(scores: npt.ArrayLike, votes: npt.ArrayLike | None, success: float) -> dict[str, float]:
    """Average pass@k and majority@k over prompts, with standard errors: prompts are independent, attempts at one need not be.

    Args:
      scores: [prompts, n] of the attempts; NaN where an attempt could not be judged: it counts as none.
      votes: [prompts, n] as of `majority_at`; None: no majorities.
      success: the least score of a success.

    Returns:
      "pass@k" for each k of `attempt_sizes`, "majority@k" for those above 1, means over the prompts with k judged attempts, and
      NAME_stderr of each, where there are two such prompts or more. A k that no prompt reaches is left out.

    Example:
      >>> attempt_figures([[1.0, 0.0], [0.0, 0.0]], None, success=1.0)
      {'pass@1': 0.25, 'pass@1_stderr': 0.25, 'pass@2': 0.5, 'pass@2_stderr': 0.5}
    """
    scores = np.asarray(scores, np.float64)
    judged = ~np.isnan(scores)
    figures: dict[str, float] = {}
    for k in attempt_sizes(scores.shape[1]):
        enough = [row for row in range(len(scores)) if judged[row].sum() >= k]
        found = {"pass": [pass_at(int(judged[i].sum()), int((scores[i] >= success).sum()), k) for i in enough]}
        if votes is not None and k > 1:
            kept = [(np.asarray(votes)[i][judged[i]], scores[i][judged[i]] >= success) for i in enough]
            found["majority"] = [majority_at(vote, right, k) for vote, right in kept]
        for name, values in found.items():
            if values:
                figures[f"{name}@{k}"] = float(np.mean(values))
                error = clustered_stderr(values, enough)
                figures |= {} if error is None else {f"{name}@{k}_stderr": error}
    return figures


def votes_of(
    answers: rewards.Reward, rows: Sequence[Row], completions: Sequence[str], more: dict[str, list[Any]]
) -> np.ndarray:
    """Ask what each completion votes for.

    Args:
      answers: called as rewards are, with prompts, completions, the other columns, and what it names of `more`.
      rows: [B] the rows of the prompt file.
      completions: [B] texts.
      more: [B] values for each name of `rewards.ON_REQUEST` that it may name.

    Returns:
      [B] int64, equal where the answers are equal after surrounding space is removed, `NO_VOTE` where it gives None.

    Raises:
      RewardError: it raised, or gave something else than B texts and Nones.

    Example:
      >>> last = lambda prompts, completions: [text.split()[-1] if text else None for text in completions]
      >>> first, second, none = votes_of(last, [{"prompt": "a"}] * 3, ["it is 5", "5 ", ""], {})
      >>> bool(first == second), int(none)
      (True, -1)
    """
    if not rows:
        return np.zeros(0, np.int64)
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
    prompts = columns.pop("prompt")
    (name,) = rewards.reward_names([answers])

    def failure(problem: str, value: Any, row: int = 0) -> RewardError:
        return RewardError(problem, reward=name, row=row, prompt=prompts[row], completion=completions[row], value=value)

    named = {key: more[key] for key in rewards.named_on_request([answers])}
    try:
        given = answers(prompts=list(prompts), completions=list(completions), **columns, **named)
    except Exception as error:
        raise failure(f"raised {type(error).__name__}: {error}", None) from error
    if not isinstance(given, (list, tuple)) or len(given) != len(rows):
        raise failure(f"must return a list of {len(rows)} answers, a text or None each", given)
    for row, answer in enumerate(given):
        if not (answer is None or isinstance(answer, str)):
            raise failure("must give a text or None for each completion", answer, row)
    return np.asarray([NO_VOTE if answer is None else _number(answer) for answer in given], np.int64)


def _number(answer: str) -> int:
    """Give a text a number that is the same on every process."""
    return int.from_bytes(hashlib.blake2b(answer.strip().encode(), digest_size=7).digest(), "big")
