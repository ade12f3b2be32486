"""The same to a tolerance, the same to the bit, and runs that logged the same: one assertion for each, on arrays and trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

CLOCKED = ("timing/", "perf/")  # the figures of a run that no two runs share


def assert_close(
    actual: Any,
    expected: Any,
    atol: float = 0.0,
    *,
    rtol: float = 0.0,
    of_max: float = 0.0,
    name: str = "",
    equal_nan: bool = False,
) -> None:
    """Assert that two trees have one structure and shapes, and that no entry x of a leaf differs from its y by more than

        atol + rtol |y| + of_max max |y| of the leaf.

    NaN is outside of any tolerance, unless `equal_nan` and both are NaN; dtypes may differ.
    """

    def check(path: Any, x: Any, y: Any) -> None:
        where = f"{name}{jax.tree_util.keystr(path)} ".lstrip()
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape, f"{where}has shape {x.shape}, expected {y.shape}"
        if equal_nan:
            x, y = (np.where(np.isnan(x) & np.isnan(y), 0.0, z) for z in (x, y))
        off, size = np.abs(x - y), np.abs(y)
        excess = off - (atol + rtol * size + of_max * size.max(initial=0))
        assert (excess <= 0).all(), f"{where}is off by {off.max()}, by {excess.max()} more than allowed"

    jax.tree_util.tree_map_with_path(check, actual, expected)


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Assert that two trees have one structure, and that each leaf has the other's dtype, shape and bytes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)

    def check(path: Any, x: Any, y: Any) -> None:
        where = jax.tree_util.keystr(path) or "it"
        assert (x.dtype, x.shape) == (y.dtype, y.shape), f"{where} is {x.dtype}{x.shape}, expected {y.dtype}{y.shape}"
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), f"{where} differs"

    jax.tree_util.tree_map_with_path(check, actual, expected)


def assert_same_metrics(
    actual: Sequence[Mapping[str, float]], expected: Sequence[Mapping[str, float]], *, rtol: float, atol: float = 1e-6
) -> None:
    """Assert that two runs logged the same rows, but for the figures that the clock decides."""
    assert actual and [row["step"] for row in actual] == [row["step"] for row in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if not name.startswith(CLOCKED):
                np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol, atol=atol, err_msg=name)
