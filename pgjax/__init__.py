"""Policy gradients for language models in JAX and Flax.

`import pgjax as pg` gives the public names that `__init__.pyi` lists: the pure core (masking, log-probabilities,
advantages, KL, losses, the trust region), the causal LM as a bundle of pure functions, and the sampler. Each is imported
when it is first used, so that the losses need jax and chex only. The rooms that CONTRIBUTING.md lists are imported by
path: `pgjax.data.prompts`, `pgjax.rollout.rewards`, `pgjax.learning.optimizer`, `pgjax.run.loop`, ...

Example:
  >>> import pgjax as pg
  >>> float(pg.masked_mean([1.0, 3.0], [True, False]))
  1.0
"""

import ast
import importlib
import pkgutil
from typing import Any

__version__ = "0.1.0"


def _homes() -> dict[str, str]:
    """Read from the stub which module each public name comes from."""
    stub = ast.parse(pkgutil.get_data(__name__, "__init__.pyi") or b"")
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_HOMES = _homes()
__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
