"""A mixture of experts: every token through the MLPs that its router chooses, all of them, in one product a map."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pgjax.models.architecture import Architecture, Experts
from pgjax.parallel.sharding import ambient_mesh, fitting

Activation = Callable[[jax.Array], jax.Array]
MAPS = ("expert_gate", "expert_up", "expert_down")


def init_experts(key: jax.Array, arch: Architecture, dtype: Any) -> dict[str, dict[str, jax.Array]]:
    """Draw the router and the experts' maps from N(0, 0.02^2).

    Returns:
        {"router": {"kernel": [D, E]}}, and the same of expert_gate and expert_up [E, D, F] and expert_down [E, F, D].

    >>> import dataclasses
    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    >>> arch = dataclasses.replace(architecture_of(config), experts=Experts(number=3, per_token=2))
    >>> init_experts(jax.random.key(0), arch, jnp.float32)["expert_down"]["kernel"].shape
    (3, 64, 16)
    """
    assert arch.experts is not None
    number, width, inner = arch.experts.number, arch.width, arch.mlp_width
    shapes = {
        "router": (width, number),
        **dict.fromkeys(MAPS[:2], (number, width, inner)),
        MAPS[2]: (number, inner, width),
    }
    normal, keys = nn.initializers.normal(0.02), jax.random.split(key, len(shapes))
    return {
        name: {"kernel": normal(key, shape, dtype)} for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def through_experts(
    x: jax.Array, weights: Mapping[str, Mapping[str, jax.Array]], experts: Experts, activation: Activation
) -> jax.Array:
    """Map x [B, T, D] through the chosen experts: y = sum_e p_e down_e(act(gate_e x) * up_e x).

    No token is dropped, however many choose one expert: the (token, expert) pairs are sorted by expert, and one ragged product
    multiplies each run of them by its expert's kernel. Under a mesh, every device does so for its own rows and its own part of
    each expert's width, and the parts are summed over tensor.

    >>> from pgjax.models.architecture import Experts
    >>> kernels = {"router": jnp.zeros((2, 3)), "expert_gate": jnp.ones((3, 2, 4)), "expert_up": jnp.ones((3, 2, 4))}
    >>> weights = {name: {"kernel": x} for name, x in kernels.items()} | {"expert_down": {"kernel": jnp.ones((3, 4, 2))}}
    >>> through_experts(jnp.ones((1, 1, 2)), weights, Experts(3, 2), nn.relu).tolist()
    [[[16.0, 16.0]]]
    """
    kernels = [weights[name]["kernel"].astype(x.dtype) for name in ("router", *MAPS)]
    run = functools.partial(_run, experts=experts, activation=activation)
    mesh = ambient_mesh()
    if mesh is None:
        return run(x, *kernels)
    rows, split = fitting(mesh, x.shape[0], "batch"), fitting(mesh, kernels[1].shape[2], "mlp")
    wide = PartitionSpec(None, None, split)
    specs = (PartitionSpec(rows), PartitionSpec(), wide, wide, PartitionSpec(None, split))
    run = functools.partial(run, summed_over=split)
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(rows))(x, *kernels)


def routed(logits: jax.Array, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """Choose experts from a router's logits [N, E]: their weights [N, K] float32 and their numbers [N, K], the best first.

    >>> from pgjax.models.architecture import Experts
    >>> routed(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), Experts(3, 2))[1].tolist()
    [[1, 2]]
    """
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), experts.per_token)
    return weights / weights.sum(-1, keepdims=True) if experts.normalized else weights, chosen


def _run(
    x: jax.Array,
    router: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    experts: Experts,
    activation: Activation,
    summed_over: tuple[str, ...] = (),
) -> jax.Array:
    tokens = x.reshape(-1, x.shape[-1])
    logits = jnp.matmul(tokens, router, preferred_element_type=jnp.float32).astype(x.dtype)
    weights, chosen = routed(logits, experts)
    order = jnp.argsort(chosen.ravel(), stable=True)  # of (token, expert) pairs
    sizes = jnp.bincount(chosen.ravel(), length=experts.number).astype(jnp.int32)
    product = functools.partial(jax.lax.ragged_dot, group_sizes=sizes, preferred_element_type=jnp.float32)
    pairs = tokens[order // experts.per_token]
    inner = (activation(product(pairs, gate)) * product(pairs, up)).astype(x.dtype)
    out = product(inner, down)[jnp.argsort(order)].reshape(*chosen.shape, -1)
    y = jnp.sum(out * weights[:, :, None], axis=1)
    y = jax.lax.psum(y, summed_over) if summed_over else y
    return y.astype(x.dtype).reshape(x.shape)
