"""The shared arrays as float64 JAX arrays, and what the scripts of the JAX peers have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import shared

jax.config.update("jax_enable_x64", True)

X = SimpleNamespace(
    **{
        key: jnp.asarray(value, jnp.float64 if value.dtype.kind == "f" else None)
        for key, value in dataclasses.asdict(shared.inputs()).items()
    }
)
POSITIONS = slice(shared.PROMPT - 1, -1)  # those whose logits are of the completion's tokens


def value_and_gradient(function: Callable[[Any], Any], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Call a scalar function and differentiate it."""
    return jax.value_and_grad(function)(x)
