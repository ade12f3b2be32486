"""Answers that are kept: equal arguments give the same functions, and so the same compiled programs."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")


def cached(function: Callable[_Arguments, _Answer]) -> Callable[_Arguments, _Answer]:
    """Keep a function's last 64 answers, as `functools.lru_cache`, behind which type checkers see no arguments.

    Args:
      function: of hashable arguments.

    Returns:
      The same function.

    Example:
      >>> cached(lambda x: [x])(1) is cached(lambda x: [x])(1)
      False
      >>> pair = cached(lambda x: [x])
      >>> pair(1) is pair(1)
      True
    """
    return cast(Callable[_Arguments, _Answer], functools.lru_cache(maxsize=64)(function))
