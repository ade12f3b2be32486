"""Values of the host in JSON: exactly, as processes exchange them, with arrays and paths; and as plain text, to be read."""

from __future__ import annotations

import base64
import datetime
import json
import math
import re
from collections.abc import Mapping
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


def plain(value: Any, *, finite: bool = False) -> Any:
    """Write whatever a user's row holds in what JSON has, alike in every process and every run.

    Dates and times become text as in ISO 8601, bytes base64, arrays and tuples lists, sets lists in a fixed order, keys text, and
    any other object (a decimal, a path) its text, without addresses in memory.

    Args:
      value: any.
      finite: write NaN and infinities, which JSON has not, as None.

    Returns:
      The value, of dicts, lists, texts, numbers, booleans and None.

    Example:
      >>> plain({"day": datetime.date(2026, 11, 30), "tags": {"b", "a"}, "x": float("nan")}, finite=True)
      {'day': '2026-11-30', 'tags': ['a', 'b'], 'x': None}
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) or not finite else None
    if isinstance(value, Mapping):
        return {str(key): plain(x, finite=finite) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x, finite=finite) for x in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(x, finite=finite) for x in value), key=lambda x: json.dumps(x, sort_keys=True))
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "mM":
        return value.astype(str).tolist()
    if hasattr(value, "tolist"):  # an array's, or that of a number of an array's kind
        return plain(value.tolist(), finite=finite)
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", str(value))


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
