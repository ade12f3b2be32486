"""An algorithm by its name, or by module:function for one of your own, with single options overridden."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from pgjax.core.errors import UserError
from pgjax.learning import algorithms, group_algorithms, ratio_algorithms
from pgjax.learning.algorithm import Algorithm

NAMED = (*algorithms.NAMED, *ratio_algorithms.NAMED, *group_algorithms.NAMED)


def load_algorithm(spec: str, **options: Any) -> Algorithm:
    """Find an algorithm and override some of its options.

    Args:
        spec: one of `NAMED`: "ppo", "rloo", "grpo", "gspo", ...; or module:name, an `Algorithm` or a function that gives one.
        options: arguments of that function, or fields of `Algorithm`; None leaves an option as it is.

    Returns:
        The algorithm.

    Raises:
        UserError: there is no such algorithm, it is no `Algorithm`, it lacks an option that is given, or a value is out of range.

    Example:
        >>> load_algorithm("grpo", group_size=8, kl_coef=None).group_size
        8
        >>> load_algorithm("rloo", value_clip_eps=0.2, epochs=3)
        Traceback (most recent call last):
        pgjax.UserError: the algorithm rloo has no option epochs
    """
    found = _find(spec)
    given = {name: value for name, value in options.items() if value is not None}
    takes = {} if isinstance(found, Algorithm) else inspect.signature(found).parameters
    unknown = [name for name in given if name not in takes and name not in Algorithm._fields]
    if unknown:
        raise UserError(f"the algorithm {spec} has no option {', '.join(unknown)}")
    if isinstance(found, Algorithm):
        return _replaced(spec, found, given)
    arguments = {name: value for name, value in given.items() if name in takes}
    made = found(**arguments)
    if not isinstance(made, Algorithm):
        raise UserError(
            f"the algorithm {spec} must be a pgjax.Algorithm or a function that gives one, and gives {made!r}"
        )
    return _replaced(spec, made, {name: value for name, value in given.items() if name not in takes})


def _replaced(spec: str, algorithm: Algorithm, fields: dict[str, Any]) -> Algorithm:
    size, wanted = algorithm.group_size, fields.get("group_size", algorithm.group_size)
    if size > 1 and wanted != size:  # `advantages` would go on to compare groups of the old size
        raise UserError(
            f"the algorithm {spec} compares groups of {size} in its advantages, not of group_size={wanted}: make it a "
            "function of group_size"
        )
    return algorithm._replace(**fields)


def _find(spec: str) -> Any:
    module, colon, name = spec.rpartition(":")
    if not colon:
        named = {function.__name__: function for function in NAMED}
        if name not in named:
            raise UserError(
                f"there is no algorithm {spec!r}: it is one of {', '.join(named)}, or module:name for your own"
            )
        return named[name]
    try:
        found = vars(importlib.import_module(module))[name]
    except ModuleNotFoundError as error:
        raise UserError(f"{spec!r}: there is no module {error.name!r}") from error
    except KeyError:
        raise UserError(f"{spec!r}: module {module!r} has no {name!r}") from None
    if not (isinstance(found, Algorithm) or callable(found)):
        raise UserError(f"{spec!r} must be a pgjax.Algorithm or a function that gives one, and is {found!r}")
    return found
