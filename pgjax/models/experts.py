"""A mixture of experts: every token through the MLPs that its router chooses, all of them, in one product a map."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from pgjax.models.architecture import Architecture, Experts
from pgjax.parallel.sharding import ambient_mesh, fitting

Activation = Callable[[jax.Array], jax.Array]
BLOCK, SMALL = 128, 32  # rows that a CPU multiplies at a time: whole blocks of an expert, and of what is left
PRODUCT = "product"  # the checkpoint name of the results of products with weights
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

    No token is dropped, however many choose one expert: the (token, expert) pairs are sorted by expert, and each run of them is
    multiplied by its expert's kernel (`expert_dot`). Under a mesh, every device does so for its own rows and its own part of
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
    width = fitting(mesh, x.shape[2], "width")

    def gathered_run(x: jax.Array, router: jax.Array, *maps: jax.Array) -> jax.Array:
        # Gathered in here, so that the transpose scatters the sum of gradients: outside it would be summed whole.
        axes = (1, 1, 2)
        whole = (
            [jax.lax.all_gather(w, width, axis=i, tiled=True) for w, i in zip(maps, axes, strict=True)]
            if width
            else maps
        )
        return run(x, router, *whole, summed_over=split)

    into, out = PartitionSpec(None, width, split), PartitionSpec(None, split, width)
    specs = (PartitionSpec(rows), PartitionSpec(), into, into, out)
    return jax.shard_map(gathered_run, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(rows), check_vma=False)(
        x, *kernels
    )


def routed(logits: jax.Array, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """Choose experts from a router's logits [N, E]: their weights [N, K] float32 and their numbers [N, K], the best first.

    >>> from pgjax.models.architecture import Experts
    >>> routed(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), Experts(3, 2))[1].tolist()
    [[1, 2]]
    """
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), experts.per_token)
    return weights / weights.sum(-1, keepdims=True) if experts.normalized else weights, chosen


@jax.custom_vjp
def expert_dot(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiply rows that are sorted by expert by each one's kernel, in time in proportion to the rows.

    On a GPU and a TPU it is `jax.lax.ragged_dot`. On a CPU that multiplies every row by every expert; here a loop goes over the
    experts that have rows, and over blocks of their rows.

    Args:
        x: [M, D], first the rows of expert 0, then those of expert 1, ...
        kernels: [E, D, F].
        sizes: [E] int32, the rows of each, M in all.

    Returns:
        [M, F] float32.

    >>> expert_dot(jnp.ones((3, 1)), jnp.array([[[2.0]], [[5.0]]]), jnp.array([1, 2])).ravel().tolist()
    [2.0, 5.0, 5.0]
    """
    return jax.lax.platform_dependent(x, kernels, sizes, cpu=_looped, default=_ragged)


def _ragged(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, kernels, sizes, preferred_element_type=jnp.float32)


def _ragged_transposed(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    return _ragged(x, kernels.swapaxes(1, 2), sizes)


# (expert, first row, row past the expert's last, rows at a time, carry) -> carry
Use = Callable[[jax.Array, jax.Array, jax.Array, int, Any], Any]


def _by_block(sizes: jax.Array, rows: int, carry: Any, use: Use) -> Any:
    """Fold `use` over the blocks of rows of each expert that has some."""
    ends, large = jnp.cumsum(sizes), BLOCK if rows >= BLOCK else SMALL

    def one(expert: jax.Array, carry: Any) -> Any:
        first, end = ends[expert] - sizes[expert], ends[expert]
        whole = sizes[expert] // large
        rest, left = first + whole * large, sizes[expert] - whole * large
        carry = jax.lax.fori_loop(0, whole, lambda i, carry: use(expert, first + i * large, end, large, carry), carry)
        count = (left + SMALL - 1) // SMALL
        return jax.lax.fori_loop(0, count, lambda i, carry: use(expert, rest + i * SMALL, end, SMALL, carry), carry)

    return jax.lax.fori_loop(0, len(sizes), one, carry)


def _looped(x: jax.Array, kernels: jax.Array, sizes: jax.Array, axis: int = 0) -> jax.Array:
    """Multiply by block; `axis` of a kernel is summed over."""
    rows, past = x.shape[0], ((0, SMALL), (0, 0))
    x = jnp.pad(x, past)

    def use(expert: jax.Array, first: jax.Array, _: jax.Array, count: int, out: jax.Array) -> jax.Array:
        block, contract = jax.lax.dynamic_slice_in_dim(x, first, count), (((1,), (axis,)), ((), ()))
        product = jax.lax.dot_general(block, kernels[expert], contract, preferred_element_type=jnp.float32)
        # Rows past the expert's last belong to later ones, which write them again.
        return jax.lax.dynamic_update_slice_in_dim(out, product, first, axis=0)

    return _by_block(sizes, rows, jnp.zeros((rows + SMALL, kernels.shape[2 - axis]), jnp.float32), use)[:rows]


def _looped_by_kernel(x: jax.Array, cotangent: jax.Array, sizes: jax.Array) -> jax.Array:
    rows, past = x.shape[0], ((0, SMALL), (0, 0))
    x, cotangent = jnp.pad(x, past), jnp.pad(cotangent, past)

    def use(expert: jax.Array, first: jax.Array, end: jax.Array, count: int, out: jax.Array) -> jax.Array:
        theirs = (first + jnp.arange(count) < end)[:, None]
        left = jnp.where(theirs, jax.lax.dynamic_slice_in_dim(x, first, count), 0)
        right = jax.lax.dynamic_slice_in_dim(cotangent, first, count)
        return out.at[expert].add(jnp.matmul(left.T, right, preferred_element_type=jnp.float32))

    shape = len(sizes), x.shape[1], cotangent.shape[1]
    return _by_block(sizes, rows, jnp.zeros(shape, jnp.float32), use)


def _ragged_by_kernel(x: jax.Array, cotangent: jax.Array, sizes: jax.Array) -> jax.Array:
    over_rows = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return jax.lax.ragged_dot_general(x, cotangent, sizes, over_rows, preferred_element_type=jnp.float32)


def _forward(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return checkpoint_name(expert_dot(x, kernels, sizes), PRODUCT), (x, kernels, sizes)


def _backward(saved: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, kernels, sizes = saved
    cotangent = cotangent.astype(x.dtype)
    by_x = jax.lax.platform_dependent(
        cotangent, kernels, sizes, cpu=functools.partial(_looped, axis=1), default=_ragged_transposed
    ).astype(x.dtype)
    by_kernel = jax.lax.platform_dependent(x, cotangent, sizes, cpu=_looped_by_kernel, default=_ragged_by_kernel)
    return by_x, by_kernel.astype(kernels.dtype), None


expert_dot.defvjp(_forward, _backward)


@jax.custom_vjp
def permuted_rows(x: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """Take the rows of x [M, D] in an order [M], whose inverse is `back`: its transpose takes rows too, and adds nothing up.

    >>> permuted_rows(jnp.array([[5.0], [6.0]]), jnp.array([1, 0]), jnp.array([1, 0])).ravel().tolist()
    [6.0, 5.0]
    """
    return x[order]


permuted_rows.defvjp(
    lambda x, order, back: (x[order], (order, back)),
    lambda saved, cotangent: (permuted_rows(cotangent, saved[1], saved[0]), None, None),
)


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
    back = jnp.argsort(order)
    sizes = jnp.bincount(chosen.ravel(), length=experts.number).astype(jnp.int32)
    pairs = permuted_rows(jnp.repeat(tokens, experts.per_token, axis=0), order, back)
    inner = activation(expert_dot(pairs, gate, sizes)) * expert_dot(pairs, up, sizes)
    # Weighed before the last map, which is linear: then the backward pass does not need what it returns.
    inner = inner * permuted_rows(weights.reshape(-1, 1), order, back)
    out = permuted_rows(expert_dot(inner.astype(x.dtype), down, sizes), back, order)
    y = jnp.sum(out.reshape(*chosen.shape, -1), axis=1)
    y = jax.lax.psum(y, summed_over) if summed_over else y
    return y.astype(x.dtype).reshape(x.shape)
