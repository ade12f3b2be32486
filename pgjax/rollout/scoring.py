"""Scores of a batch: what the rewards returned, taken whole or refused with its row, weighed and summed."""

import functools
import itertools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pgjax.core.errors import UserError
from pgjax.rollout.calling import Caller, Outcome, TooSlow, is_async
from pgjax.rollout.rewards import Reward, check_column_names, named_on_request, reward_names, takes_messages

_SHOWN_CHARACTERS = 600
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_LARGEST_SCORE = 1e18  # whose square float32 holds, summed over a batch: else advantages would be 0 without a word


class RewardError(UserError):
    """Say which reward failed, on which prompt and completion, and how.

    Attributes:
      reward: name of the reward function.
      row: row of the batch, counted from 0. The first row where the whole batch failed.
      prompt: the prompt of that row, whole.
      completion: the completion of that row, whole.
      value: what the reward returned for that row (or for the batch); None where it raised.
    """

    def keeps_traceback(self) -> bool:
        """Say whether the reward's own code raised: its traceback is what the user needs."""
        return self.__cause__ is not None

    def __init__(self, problem: str, *, reward: str, row: int, prompt: Any, completion: str, value: Any) -> None:
        super().__init__(f"reward {reward!r} {problem}\n  prompt: {_short(prompt)}\n  completion: {_short(completion)}")
        self.reward, self.row, self.prompt, self.completion, self.value = (
            reward,
            row,
            prompt,
            completion,
            value,
        )


def score(
    rewards: Sequence[Reward],
    weights: Sequence[float] | None,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
    on_request: Mapping[str, Sequence[Any]] | None = None,
    *,
    lengths: Sequence[int] | None = None,
    group_size: int = 1,
    caller: Caller | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Score a batch of completions as the weighted sum of black-box rewards.

    score_i = sum of weight_j * reward_j(prompts, completions, **columns)_i over the rewards j that apply to row i, in float32.
    Every reward gets lists and dicts of its own, so none can disturb another. It is called once for the batch; by several
    workers once for each of as many parts of it, which hold whole groups.

    Args:
      rewards: the functions, at least one.
      weights: a finite number for each reward; None is 1 for each. A reward of weight 0 is measured and counts for nothing.
      prompts: [B] the prompts as the user wrote them (text, or lists of messages).
      completions: [B] the texts to judge.
      columns: further columns of the prompt file, [B] values each.
      on_request: what rewards name of `ON_REQUEST`, [B] values each; a reward gets what it names.
      lengths: [B] sampled tokens of each completion, for rewards that give a number for each; None: no reward may.
      group_size: so many adjacent rows have one prompt, and one worker judges them.
      caller: calls the rewards; None: one after the other.

    Returns:
      scores [B] float32, NaN where no reward applies, and each reward's own values [B] float32 (without its weight, summed over
      tokens, NaN where it does not apply), by the names of `reward_names`. Where a reward gives numbers for single tokens, scores
      are [B, max(lengths)], 0 after the last token; the other rewards stand at the last one.

    Raises:
      RewardError: a reward raised, took too long, returned something else than B numbers, or a NaN, an infinity, or a number
        too large for float32; or a score is beyond 1e18, whose squares would be.
      GivenUp: the run is to stop, and a reward did not answer in the seconds that are left.
      ValueError: the lists or the weights don't fit together.

    Example:
      >>> def length(prompts, completions, **columns):
      ...     return [len(text) / 10 if text else None for text in completions]
      >>> scores, parts = score([length], [2.0], ["Hi", "Hi"], ["robots", ""])
      >>> scores.tolist(), list(parts)
      ([1.2000000476837158, nan], ['length'])
    """
    columns = {} if columns is None else columns
    weights = [1.0] * len(rewards) if weights is None else list(weights)
    on_request = {} if on_request is None else on_request
    _check_batch(rewards, weights, prompts, completions, columns)
    names = reward_names(rewards)
    returned = _called(rewards, names, prompts, completions, columns, on_request, group_size, caller or Caller())
    width = 1 if lengths is None else max(lengths)
    total, any_tokens = np.zeros((len(prompts), width), np.float64), False
    judged, parts = np.zeros(len(prompts), bool), {}
    counting = any(weight != 0 for weight in weights)
    for name, weight, values in zip(names, weights, returned, strict=True):
        rows = _numbers(name, values, prompts, completions, lengths)
        any_tokens |= any(isinstance(row, list) for row in rows)
        parts[name] = np.asarray([math.nan if x is None else float(np.sum(x)) for x in rows], np.float32)
        for i, x in enumerate(rows):
            if x is None or (counting and weight == 0):
                continue
            judged[i] = True
            if isinstance(x, list):
                total[i, : len(x)] += weight * np.asarray(x, np.float32).astype(np.float64)
            else:
                total[i, 0 if lengths is None else lengths[i] - 1] += weight * float(np.float32(x))
    too_large = np.flatnonzero(~(np.abs(total) <= _LARGEST_SCORE).all(1) | ~(np.abs(total.sum(1)) <= _LARGEST_SCORE))
    if too_large.size:
        row = int(too_large[0])
        problem = f"gives a weighted sum of {total[row].sum()} in row {row}, too large for learning in float32: lower the weights"
        raise _failure(" + ".join(names), problem, prompts, completions, float(total[row].sum()), row)
    total[~judged] = math.nan
    return (total if any_tokens else total.sum(1)).astype(np.float32), parts


def _check_batch(
    rewards: Sequence[Reward],
    weights: Sequence[float],
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> None:
    if len(rewards) == 0:
        raise UserError("no reward was given: name at least one")
    if len(weights) != len(rewards):
        raise UserError(f"{len(weights)} reward weights for {len(rewards)} rewards: give one a reward")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise UserError(f"reward weight {weight!r} is not a finite number (all weights: {list(weights)})")
    if len(prompts) == 0 or len(prompts) != len(completions):
        raise UserError(f"{len(prompts)} prompts and {len(completions)} completions: they pair up, at least one")
    check_column_names(columns.keys())
    for name, values in columns.items():
        if len(values) != len(prompts):
            raise UserError(f"column {name!r} holds {len(values)} values for {len(prompts)} prompts")


def _called(
    rewards: Sequence[Reward],
    names: Sequence[str],
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    on_request: Mapping[str, Sequence[Any]],
    group_size: int,
    caller: Caller,
) -> list[list[Any]]:
    """Call all rewards on the batch: what each returned for the rows."""
    groups = len(prompts) // group_size
    parts = min(max(caller.workers, 1), groups)
    bounds = [number * groups // parts * group_size for number in range(parts)] + [len(prompts)]
    spans = list(itertools.pairwise(bounds))
    jobs, meant = [], []
    for number, reward in enumerate(rewards):
        wanted = {key: on_request[key] for key in named_on_request([reward]) if key in on_request}
        texts: Sequence[Any] = completions
        if takes_messages(reward):
            texts = [[{"role": "assistant", "content": text}] for text in completions]
        given = {"prompts": prompts, "completions": texts, **columns, **wanted}
        for begin, end in [(0, len(prompts))] if is_async(reward) else spans:
            jobs.append((reward, {key: [_copy(value) for value in given[key][begin:end]] for key in given}))
            meant.append((number, begin, end))
    found: list[list[Any]] = [[] for _ in rewards]
    for (number, begin, end), outcome in zip(meant, caller(jobs), strict=True):
        refuse = functools.partial(_failure, names[number], prompts=prompts, completions=completions, row=begin)
        found[number] += _returned(outcome, end - begin, caller.timeout, refuse)
    return found


def _returned(outcome: Outcome, batch: int, timeout: float | None, refuse: Callable[..., RewardError]) -> list[Any]:
    """Take what a call gave for its rows, or say what is wrong with it as a whole."""
    values, error = outcome
    whole = f"(a batch of {batch}, whose first row follows)"
    try:
        if error is None and hasattr(values, "__array__"):
            values = list(values) if isinstance(values, np.ma.MaskedArray) else np.asarray(values)
    except Exception as failed:
        error = failed
    if isinstance(error, TooSlow):
        problem = f"gave no answer within reward_timeout={timeout:g} seconds {whole}: give it more, or mend the reward"
        raise refuse(problem=problem, value=None)
    if error is not None:
        # SystemExit would end the run in silence, maybe with exit status 0; a cancelled judge is one that failed.
        # A reward may have effects of its own, so it isn't called again row by row to find the culprit.
        raise refuse(problem=f"raised {_describe(error)} {whole}", value=None) from error
    if not _is_sequence(values):
        problem = f"returned {_describe_value(values)}, not a list of {batch} numbers {whole}"
        raise refuse(problem=problem, value=values)
    if len(values) != batch:
        raise refuse(problem=f"returned {len(values)} values for {batch} completions {whole}", value=values)
    return list(values)


def _numbers(
    name: str,
    values: Sequence[Any],
    prompts: Sequence[Any],
    completions: Sequence[str],
    lengths: Sequence[int] | None,
) -> list[float | list[float] | None]:
    """Convert what a reward returned for each row: a number, numbers for its tokens, or None."""
    rows: list[float | list[float] | None] = []
    for row, value in enumerate(values):
        number: float | list[float] | str | None
        if value is None:
            number = None
        elif lengths is not None and _is_sequence(value):
            number = _token_numbers(value, lengths[row])
        else:
            number = _number(value)
        if isinstance(number, str):
            problem = f"returned {_describe_value(value)} for row {row} of {len(values)}: {number}"
            raise _failure(name, problem, prompts, completions, value, row)
        rows.append(number)
    return rows


def _token_numbers(values: Sequence[Any], length: int) -> list[float] | str:
    """Convert the numbers of a completion's tokens, or say what is wrong with them."""
    if len(values) != length:
        return f"{len(values)} numbers for the {length} tokens of its completion_ids"
    found = [_number(value) for value in values]
    wrong = [(i, x) for i, x in enumerate(found) if isinstance(x, str)]
    return f"token {wrong[0][0]}: {wrong[0][1]}" if wrong else [x for x in found if not isinstance(x, str)]


def _copy(value: Any) -> Any:
    """Copy lists and dicts, as of messages, all the way down; anything else stays what it is."""
    if isinstance(value, dict):
        return {key: _copy(x) for key, x in value.items()}
    return [_copy(x) for x in value] if isinstance(value, list) else value


def _failure(
    name: str, problem: str, prompts: Sequence[Any], completions: Sequence[str], value: Any, row: int = 0
) -> RewardError:
    return RewardError(problem, reward=name, row=row, prompt=prompts[row], completion=completions[row], value=value)


def _is_sequence(values: Any) -> bool:
    if isinstance(values, np.ndarray):
        return values.ndim == 1
    return isinstance(values, Sequence) and not isinstance(values, (str, bytes))


def _number(value: Any) -> float | str:
    """Convert one returned value to a float, or say what is wrong with it."""
    not_a_number = "return a number"
    if isinstance(value, (str, bytes)) or value is np.ma.masked:  # of which NumPy would make 0
        return not_a_number
    try:
        if not isinstance(value, numbers.Real):
            value = np.asarray(value)  # NumPy, JAX and torch scalars; the kind V is that of bfloat16
            if value.shape != () or value.dtype.kind not in "biufV":
                return not_a_number
        number = float(value)
    except OverflowError:
        return "too large for a float"
    except (TypeError, ValueError, RuntimeError):
        return not_a_number
    if not math.isfinite(number):
        return "return a finite number"
    return number if abs(number) <= _FLOAT32_MAX else "too large for float32"


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _describe_value(value: Any) -> str:
    return f"{_short(value, 80)} of type {type(value).__name__}"


def _short(value: Any, limit: int = _SHOWN_CHARACTERS) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
