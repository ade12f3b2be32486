"""Black-box rewards: Python callables, found by name, called on a batch, checked to the last number.

A reward keeps the signature that users know: ``reward(prompts, completions, **columns) -> list[float]``,
where ``columns`` are the other columns of the prompt file, one value a row. One that names the parameter ``completion_ids`` gets
the ids that were sampled in each row too (a list of ints, the id that ended it included, no padding), and one that names
``raw_completions`` the completions with their special tokens (``<think>no</think>yes``), but for the one that ended them.
"""

import asyncio
import difflib
import importlib
import inspect
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from pgjax.core.errors import UserError

Reward = Callable[..., Sequence[float]]
ON_REQUEST = ("completion_ids", "raw_completions")  # what only a reward that names it gets
RESERVED_COLUMNS = ("prompts", "completions", *ON_REQUEST)  # the names of a reward's own arguments
_NOT_BY_NAME = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
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


def load_reward(spec: str) -> Reward:
    """Import the reward function that ``module:function`` names.

    Args:
      spec: where the function lives, as on the command line: ``"experiments.tasks.haiku:haiku_reward"``. The module
        is looked for where Python looks: the current folder under ``python -m``, and the installed packages.

    Returns:
      The function.

    Raises:
      ValueError: no colon, a module that can't be imported, no such function, or something that can't be
        called.

    Example:
      >>> load_reward("math:fsum")([0.5, 0.25])
      0.75
    """
    module_name, colon, name = spec.partition(":")
    if not (colon and name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise UserError(f"reward {spec!r}: write it as module:function, like experiments.tasks.haiku:haiku_reward")
    module = _import(module_name, spec)
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)[:8]
        raise UserError(
            f"reward {spec!r}: module {module_name!r} has no {name!r}; it has {', '.join(close) or 'no function'}"
        )
    function: Any = getattr(module, name)
    if not callable(function):
        raise UserError(f"reward {spec!r}: {name!r} is of type {type(function).__name__}, not a function")
    return cast(Reward, function)


def reward_names(rewards: Sequence[Reward]) -> list[str]:
    """Name each reward by its function, telling equal names apart with a number.

    Args:
      rewards: the functions.

    Returns:
      As many names, all different.

    Example:
      >>> reward_names([max, min, max])
      ['max', 'min', 'max_2']
    """
    names: list[str] = []
    for reward in rewards:
        base = reward.__name__ if hasattr(reward, "__name__") else type(reward).__name__
        base = base.strip("<>")
        name, copy = base, 2
        while name in names:
            name, copy = f"{base}_{copy}", copy + 1
        names.append(name)
    return names


def named_on_request(rewards: Iterable[Reward]) -> list[str]:
    """List what of `ON_REQUEST` some reward names as a parameter; ``**columns`` names nothing.

    Args:
      rewards: the functions.

    Returns:
      Names, none twice.

    Example:
      >>> named_on_request([lambda prompts, completions, completion_ids, **columns: [], max])
      ['completion_ids']
    """
    named = set().union(*map(_parameters, rewards))
    return [name for name in ON_REQUEST if name in named]


def _parameters(reward: Reward) -> set[str]:
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # a function written in C may have no signature
        return set()
    return {parameter.name for parameter in parameters if parameter.kind not in _NOT_BY_NAME}


def check_reward(reward: Reward, columns: Iterable[str] = ()) -> None:
    """Check, without calling it, that a reward takes the arguments that it will get.

    Args:
      reward: the function.
      columns: names of the columns that come beside prompts and completions, and beside what it names of `ON_REQUEST`.

    Raises:
      ValueError: the function's signature does not take ``prompts``, ``completions`` and these columns by
        name, or it is a coroutine, which nobody would await.

    Example:
      >>> check_reward(lambda prompts, completions, **columns: [0.0], ["topic"])
    """
    columns = list(columns)
    _check_columns(columns)
    name = reward_names([reward])[0]
    if inspect.iscoroutinefunction(reward):
        raise UserError(f"reward {name!r} is async: write a plain def that gives the scores")
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):  # a function written in C may have none: the call itself will tell
        return
    arguments = dict.fromkeys(["prompts", "completions", *columns, *named_on_request([reward])])
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(
            f"reward {name!r} has the signature {signature}, but it is called with "
            f"{', '.join(arguments)} ({error}): write def reward(prompts, completions, **columns)"
        ) from error


def score(
    rewards: Sequence[Reward],
    weights: Sequence[float] | None,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
    on_request: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Score a batch of completions as the weighted sum of black-box rewards.

    score_i = sum_j weight_j * reward_j(prompts, completions, **columns)_i, in float32. Every reward gets
    lists and dicts of its own, so none can disturb another, and is called once for the batch.

    Args:
      rewards: the functions, at least one.
      weights: a finite number for each reward; None is 1 for each.
      prompts: [B] the prompts as the user wrote them (text, or lists of messages).
      completions: [B] the texts to judge.
      columns: further columns of the prompt file, [B] values each.
      on_request: what rewards name of `ON_REQUEST`, [B] values each; a reward gets what it names.

    Returns:
      scores [B] float32, and each reward's own values [B] float32 (without its weight), by the names of
      `reward_names`.

    Raises:
      RewardError: a reward raised, returned something else than B numbers, or a NaN, an infinity, or a number
        too large for float32; or a score is beyond 1e18, whose squares would be.
      ValueError: the lists or the weights don't fit together.

    Example:
      >>> def length(prompts, completions, **columns):
      ...     return [len(text) / 10 for text in completions]
      >>> scores, parts = score([length], [2.0], ["Hi", "Hi"], ["robots", ""])
      >>> scores.tolist(), list(parts)
      ([1.2000000476837158, 0.0], ['length'])
    """
    columns = {} if columns is None else columns
    weights = [1.0] * len(rewards) if weights is None else list(weights)
    on_request = {} if on_request is None else on_request
    _check_batch(rewards, weights, prompts, completions, columns)
    names = reward_names(rewards)
    parts = {}
    for name, reward in zip(names, rewards, strict=True):
        wanted = {key: on_request[key] for key in named_on_request([reward]) if key in on_request}
        parts[name] = _call(reward, name, prompts, completions, {**columns, **wanted})
    total = np.zeros(len(prompts), np.float64)
    for name, weight in zip(names, weights, strict=True):
        total += weight * parts[name].astype(np.float64)
    too_large = np.flatnonzero(~(np.abs(total) <= _LARGEST_SCORE))
    if too_large.size:
        row = int(too_large[0])
        problem = (
            f"gives a weighted sum of {total[row]} in row {row}, too large for learning in float32: lower the weights"
        )
        raise _failure(" + ".join(names), problem, prompts, completions, float(total[row]), row)
    return total.astype(np.float32), parts


def _import(module_name: str, spec: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise UserError(
                f"reward {spec!r}: there is no module {missing!r}; run from the folder that holds it, or install it"
            ) from error
        raise UserError(f"reward {spec!r}: module {module_name!r} needs {missing!r}, which isn't installed") from error
    except Exception as error:
        raise UserError(f"reward {spec!r}: importing {module_name!r} raised {_describe(error)}") from error


def _check_columns(names: Collection[str]) -> None:
    taken = [name for name in names if name in RESERVED_COLUMNS]
    if taken:
        raise UserError(f"a column may not be called {taken[0]!r}: a reward's own argument is; rename the column")


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
    _check_columns(columns.keys())
    for name, values in columns.items():
        if len(values) != len(prompts):
            raise UserError(f"column {name!r} holds {len(values)} values for {len(prompts)} prompts")


def _call(
    reward: Reward,
    name: str,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> np.ndarray:
    batch = len(prompts)
    whole = f"(a batch of {batch}, whose first row follows)"
    own = {key: [_copy(value) for value in column] for key, column in columns.items()}
    try:
        values: Any = reward(prompts=[_copy(prompt) for prompt in prompts], completions=list(completions), **own)
        if hasattr(values, "__array__"):
            values = list(values) if isinstance(values, np.ma.MaskedArray) else np.asarray(values)
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        # SystemExit would end the run in silence, maybe with exit status 0; a cancelled judge is one that failed.
        # A reward may have effects of its own, so it isn't called again row by row to find the culprit.
        problem = f"raised {_describe(error)} {whole}"
        raise _failure(name, problem, prompts, completions, None) from error
    if not _is_sequence(values):
        problem = f"returned {_describe_value(values)}, not a list of {batch} numbers {whole}"
        raise _failure(name, problem, prompts, completions, values)
    if len(values) != batch:
        problem = f"returned {len(values)} values for {batch} completions {whole}"
        raise _failure(name, problem, prompts, completions, values)
    numbers_or_problems = [_number(value) for value in values]
    for row, number in enumerate(numbers_or_problems):
        if isinstance(number, str):
            problem = f"returned {_describe_value(values[row])} for row {row} of {batch}: {number}"
            raise _failure(name, problem, prompts, completions, values[row], row)
    return np.asarray(numbers_or_problems, np.float32)


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


def check_weights(
    specs: Sequence[str], weights: Sequence[float], reward_model: str | None, model_weight: float
) -> None:
    """Refuse rewards without a judge among them, and weights that do not go with them.

    Args:
        specs: the rewards, each as module:function.
        weights: one for each, or none.
        reward_model: source of a reward model beside them, or None.
        model_weight: its weight.

    Raises:
        UserError: with the values.

    Example:
        >>> check_weights(["a:b"], [1.0, 2.0], None, 1.0)
        Traceback (most recent call last):
        pgjax.UserError: reward_weights must be a finite number for each of ['a:b'], or left out, got [1.0, 2.0]
    """
    if not specs and reward_model is None:
        raise UserError("rewards is empty: name at least one module:function, or a reward model")
    if len(weights) not in (0, len(specs)) or not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"reward_weights must be a finite number for each of {specs}, or left out, got {weights}")
    if not math.isfinite(model_weight):
        raise UserError(f"reward_model_weight must be finite, got {model_weight}")
