"""Packages that only training scripts need: `pip install 'pgjax[scripts]'` brings them."""

from __future__ import annotations

import importlib
from typing import Any

from pgjax.core.errors import MissingPackageError


def of_scripts(module: str) -> Any:
    """Import a module of a package that the extra `scripts` brings.

    Args:
        module: its dotted name.

    Returns:
        The module.

    Raises:
        MissingPackageError: it is not installed.

    >>> of_scripts("no_such_package.part")
    Traceback (most recent call last):
    pgjax.MissingPackageError: training scripts need no_such_package: pip install 'pgjax[scripts]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise MissingPackageError(f"training scripts need {package}: pip install 'pgjax[scripts]'") from error
