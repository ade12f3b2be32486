"""Values of the host as bytes, which processes exchange: JSON, with arrays and paths in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def encode(value: Any) -> bytes:
    """Write a value of the host as JSON, exactly: every float as the shortest text that reads back as it, NaN included.

    Args:
      value: of dicts with texts as keys, lists, tuples (they become lists), texts, numbers, None, NumPy arrays and paths.

    Returns:
      UTF-8.

    Raises:
      TypeError: it holds something else.

    Example:
      >>> decode(encode({"scores": np.float32([0.1, np.nan])}))
      {'scores': array([0.1, nan], dtype=float32)}
    """
    return json.dumps(value, default=_tagged).encode()


def decode(text: bytes) -> Any:
    """Read what `encode` wrote.

    Args:
      text: UTF-8.

    Returns:
      The value.

    Example:
      >>> decode(encode([1, ("a", None)]))
      [1, ['a', None]]
    """
    return json.loads(text, object_hook=_untagged)


def _tagged(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"__array__": value.dtype.name, "shape": value.shape, "values": value.ravel().tolist()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return {"__path__": str(value)}
    raise TypeError(f"processes exchange JSON, arrays and paths, not a {type(value).__name__}")


def _untagged(found: dict[str, Any]) -> Any:
    if "__array__" in found:
        return np.array(found["values"], found["__array__"]).reshape(found["shape"])
    return Path(found["__path__"]) if "__path__" in found else found
