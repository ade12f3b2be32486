"""Black-box rewards: Python callables, found by name, called on a batch, checked to the last number.

A reward keeps the signature that users know: ``reward(prompts, completions, **columns) -> list[float | None]``,
where ``columns`` are the other columns of the prompt file, one value a row. None says that it does not apply to a row. In place
of a number it may give a list of them, one for each sampled token. It may be ``async def``: all those are awaited together.

One that names the parameter ``completion_ids`` gets the ids that were sampled in each row too (a list of ints, the id that ended
it included, no padding), and one that names ``raw_completions`` the completions with their special tokens
(``<think>no</think>yes``), but for the one that ended them. One that names ``ended`` is told of each whether it ended by itself,
before the longest length. One that annotates ``completions`` as lists of messages
(``list[list[dict]]``), as TRL's do, gets each as ``[{"role": "assistant", "content": text}]``.
"""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, cast

from pgjax.core.errors import UserError

Reward = Callable[..., Any]  # -> as many numbers as completions, None where it does not apply; or a coroutine of them
ON_REQUEST = ("completion_ids", "raw_completions", "ended")  # what only a reward that names it gets
RESERVED_COLUMNS = ("prompts", "completions", *ON_REQUEST)  # the names of a reward's own arguments
_NOT_BY_NAME = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


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


def takes_messages(reward: Reward) -> bool:
    """Say whether a reward asks for completions as messages, by what it annotates them as.

    Example:
      >>> def reward(completions: list[list[dict[str, str]]], **columns): ...
      >>> takes_messages(reward), takes_messages(max)
      (True, False)
    """
    try:
        parameter = inspect.signature(reward).parameters.get("completions")
    except (TypeError, ValueError):
        return False
    return parameter is not None and "dict" in str(parameter.annotation).lower()


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
        name.

    Example:
      >>> check_reward(lambda prompts, completions, **columns: [0.0], ["topic"])
    """
    columns = list(columns)
    check_column_names(columns)
    name = reward_names([reward])[0]
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
        raise UserError(f"reward {spec!r}: importing {module_name!r} raised {type(error).__name__}: {error}") from error


def check_column_names(names: Collection[str]) -> None:
    """Refuse columns with the names of a reward's own arguments.

    Example:
      >>> check_column_names(["topic"])
    """
    taken = [name for name in names if name in RESERVED_COLUMNS]
    if taken:
        raise UserError(f"a column may not be called {taken[0]!r}: a reward's own argument is; rename the column")


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
