"""Low-rank adapters to any leaves of any tree: for models that are not pgjax's transformer (Hu et al. 2021)."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pgjax.core.errors import UserError


class LeafAdapters(NamedTuple):
    """Factors of the leaves of a tree by their names: {"blocks.0.q.weight": {"lora_a", "lora_b", "lora_scale"}}."""

    leaves: dict[str, dict[str, jax.Array]]


def init_leaf_lora(
    key: jax.Array, params: Any, *, rank: int, scale: float, targets: Collection[str], all_of_them: bool
) -> LeafAdapters:
    """Draw adapters for the matrices whose names hold one of the targets: W [..., m, n] becomes W + scale A B.

    Args:
        key: a typed key.
        params: any tree.
        rank: columns of A [..., m, rank] and rows of B [..., rank, n].
        scale: stored with them, and not trained.
        targets: steps of the names of leaves, as "q" of "blocks.0.q.weight".
        all_of_them: whether each target has to be found.

    Returns:
        A, uniform as for m inputs, and B = 0: the model with them computes the same as without.

    Raises:
        UserError: a target that no matrix has in its name.

    >>> params = {"blocks": [{"q": jnp.ones((3, 2)), "norm": jnp.ones(3)}]}
    >>> found = init_leaf_lora(jax.random.key(0), params, rank=1, scale=2.0, targets=["q"], all_of_them=True)
    >>> {name: x["lora_a"].shape for name, x in found.leaves.items()}
    {'blocks.0.q': (3, 1)}
    """
    named = {name: x for name, x in _named(params) if x.ndim > 1}
    steps = {name: set(re.split(r"[./]", name)) & set(targets) for name in named}
    chosen = [name for name, hits in steps.items() if hits]
    missing = sorted(set(targets) - set().union(*steps.values()))
    if not chosen or (all_of_them and missing):
        some = ", ".join(sorted(named)[:8]) or "none"
        raise UserError(
            f"no matrix of the parameters has {', '.join(missing)} in its name; targets are steps of {some}"
        )

    def one(key: jax.Array, x: Any) -> dict[str, jax.Array]:
        *stack, wide, out = x.shape
        bound = 1 / math.sqrt(wide)
        a = jax.random.uniform(key, (*stack, wide, rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*stack, rank, out), jnp.float32)
        return {"lora_a": a, "lora_b": b, "lora_scale": jnp.full(stack, scale, jnp.float32)}

    keys = jax.random.split(key, len(chosen))
    return LeafAdapters({name: one(key, named[name]) for key, name in zip(keys, chosen, strict=True)})


def merge_leaf_lora(params: Any, adapters: LeafAdapters) -> Any:
    """Add adapters to their leaves, in float32; the result has the leaves' dtypes. The scale gets no gradient.

    >>> one = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 2)), "lora_scale": jnp.float32(0.5)}
    >>> merge_leaf_lora({"q": jnp.ones((2, 2))}, LeafAdapters({"q": one}))["q"].tolist()
    [[1.5, 1.5], [1.5, 1.5]]
    """
    if missing := sorted(adapters.leaves.keys() - {name for name, _ in _named(params)}):
        raise UserError(f"there is an adapter to {missing[0]}, but the model has no {missing[0]}")

    def merged(path: tuple[Any, ...], x: Any) -> Any:
        factors = adapters.leaves.get(jax.tree_util.keystr(path, simple=True, separator="."))
        if factors is None:
            return x
        return adapted_kernel(x, factors["lora_a"], factors["lora_b"], jax.lax.stop_gradient(factors["lora_scale"]))

    return jax.tree_util.tree_map_with_path(merged, params)


def adapted_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """Compute W + scale A B in float32, for kernel [..., D, F], a [..., D, r], b [..., r, F] and scale [...]; in W's dtype.

    >>> adapted_kernel(jnp.ones((2, 2)), jnp.ones((2, 1)), jnp.ones((1, 2)), jnp.float32(0.5)).tolist()
    [[1.5, 1.5], [1.5, 1.5]]
    """
    change = jnp.matmul(scale[..., None, None] * a, b, precision="highest")  # a TPU would round the factors to 16 bits
    return (kernel.astype(jnp.float32) + change).astype(kernel.dtype)


def _named(params: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), x) for path, x in leaves]
