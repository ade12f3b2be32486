"""Low-rank adapters: small trained factors added to the frozen kernels of a model (Hu et al. 2021)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pgjax.core.checks import check_whole
from pgjax.models.leaf_lora import LeafAdapters, adapted_kernel, init_leaf_lora, merge_leaf_lora
from pgjax.parallel.sharding import fold_in, init_sharded

KERNELS = ("q", "k", "v", "o", "gate", "up", "down")
FACTORS = ("lora_a", "lora_b", "lora_scale")  # beside the "kernel" of a linear map


def init_lora(
    key: jax.Array, params: Any, *, rank: int, alpha: float = 32.0, targets: Collection[str] = KERNELS
) -> Any:
    """Draw adapters for the linear maps of every layer; the model with them computes the same as without.

    y = x W + (alpha / rank) (x A) B, with A ~ U(-1 / sqrt(D), 1 / sqrt(D)) and B = 0. The defaults (all maps, and an alpha of
    32 whatever the rank) follow Schulman et al. 2025 ("LoRA Without Regret"): with them the best learning rate hardly
    depends on the rank, and is about ten times the best one for training all parameters.

    Args:
        key: a typed key.
        params: of a causal LM, or any tree (`pg.bundle`); only their shapes are read.
        rank: r, the columns of A and rows of B.
        alpha: the adapters' weight times the rank; stored with them, and not trained.
        targets: which of q, k, v, o, gate, up and down get an adapter; maps that the model lacks are skipped. In any other
            tree, every matrix with one of them as a step of its name (as "attention" in "blocks.0.attention.weight"); leading
            axes, before the last two, are a stack of matrices.

    Returns:
        {"layers": {name: {"lora_a": [L, D, r], "lora_b": [L, r, F], "lora_scale": [L]}}}, float32; for any other tree
        `leaf_lora.LeafAdapters`. `with_lora` takes both.

    Raises:
        ValueError: a rank below 1, an alpha that is not finite or not above 0, or an unknown target.

    >>> import pgjax as pg
    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 32}
    >>> lm = pg.causal_lm(architecture_of(config))
    >>> adapters = init_lora(jax.random.key(1), lm.init(jax.random.key(0)), rank=2, targets=("q", "up"))
    >>> {name: x["lora_b"].shape for name, x in adapters["layers"].items()}
    {'q': (3, 2, 8), 'up': (3, 2, 32)}
    """
    check_whole("rank", rank, 1)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be finite and above 0, got {alpha}")
    if not _is_stacked(params):
        return init_leaf_lora(
            key, params, rank=rank, scale=alpha / rank, targets=targets, all_of_them=targets is not KERNELS
        )
    shapes = {name: x["kernel"].shape for name, x in params["layers"].items() if name in targets and "kernel" in x}
    if not shapes or not set(targets) <= set(KERNELS):
        raise ValueError(f"targets must be some of {', '.join(KERNELS)}, got {tuple(targets)}")
    return {"layers": _drawn(key, tuple(sorted(shapes.items())), rank, alpha / rank)}


def _is_stacked(params: Any) -> bool:
    """Say whether parameters are those of pgjax's transformer."""
    layers = params.get("layers") if isinstance(params, dict) else None
    return isinstance(layers, dict) and any(
        isinstance(x, dict) and "kernel" in x and x["kernel"].ndim == 3 for x in layers.values()
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))  # one program, not one an operation
def _drawn(
    key: jax.Array, shapes: tuple[tuple[str, tuple[int, int, int]], ...], rank: int, scale: float
) -> dict[str, dict[str, jax.Array]]:
    def one(key: jax.Array, shape: tuple[int, int, int]) -> dict[str, jax.Array]:
        depth, wide, out = shape
        bound = 1 / math.sqrt(wide)
        a = jax.random.uniform(key, (depth, wide, rank), jnp.float32, -bound, bound)
        b, scales = jnp.zeros((depth, rank, out), jnp.float32), jnp.full(depth, scale, jnp.float32)
        return dict(zip(FACTORS, (a, b, scales), strict=True))

    keys = jax.random.split(key, len(shapes))
    return {name: one(key, shape) for key, (name, shape) in zip(keys, shapes, strict=True)}


def with_lora(frozen: Any, trained: Any) -> Any:
    """Merge the trees of frozen and trained parameters, adapters beside their kernels, for any function of the model.

    No array is copied, but for the leaves of another model, to which `leaf_lora.LeafAdapters` are added here. Differentiate
    with respect to `trained` alone: then no gradient of a frozen parameter is computed.

    Args:
        frozen: parameters, alone or inside another tree; None if nothing is frozen.
        trained: adapters from `init_lora` at the same place in the tree, and all other trained parameters.

    Returns:
        The union of the two trees.

    Raises:
        ValueError: an adapter to a linear map that the model lacks.

    >>> frozen = {"lm": {"layers": {"q": {"kernel": 1}, "k": {"kernel": 2}}, "norm": {"scale": 3}}}
    >>> trained = {"lm": {"layers": {"q": {"lora_a": 4, "lora_b": 5, "lora_scale": 6}}}, "value": 7}
    >>> with_lora(frozen, trained)["lm"]["layers"]
    {'q': {'kernel': 1, 'lora_a': 4, 'lora_b': 5, 'lora_scale': 6}, 'k': {'kernel': 2}}
    """
    if frozen is None:
        return trained
    if isinstance(trained, LeafAdapters):
        return merge_leaf_lora(frozen, trained)
    union = dict(frozen)
    for name, x in trained.items():
        union[name] = with_lora(frozen.get(name, {}), x) if isinstance(x, dict | LeafAdapters) else x
        if isinstance(x, dict) and FACTORS[0] in x and "kernel" not in union[name]:
            raise ValueError(
                f"there is an adapter to {name}, but the model has no {name}: draw adapters from its parameters"
            )
    return union


def merge_lora(params: dict[str, Any]) -> dict[str, Any]:
    """Add adapters to their kernels: W + scale A B, in the kernel's dtype. The model computes the same with fewer products.

    Args:
        params: from `with_lora`, or parameters without adapters.

    Returns:
        Parameters without adapters; if there were none, `params` themselves.

    >>> one = {"kernel": jnp.ones((1, 2, 2)), "lora_a": jnp.ones((1, 2, 1)), "lora_b": jnp.ones((1, 1, 2))}
    >>> merge_lora({"layers": {"q": {**one, "lora_scale": jnp.full(1, 0.5)}}})["layers"]["q"]["kernel"].tolist()
    [[[1.5, 1.5], [1.5, 1.5]]]
    """
    merged = {name: merge_lora(x) if isinstance(x, dict) else x for name, x in params.items()}
    return _merged(merged) if set(FACTORS) <= params.keys() else merged


@jax.jit  # the arrays may be spread over processes
def _merged(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    kernel = adapted_kernel(leaves["kernel"], *(leaves[name] for name in FACTORS))
    return {**{name: x for name, x in leaves.items() if name not in FACTORS}, "kernel": kernel}


Product = Callable[[jax.Array, jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def adapted_dot(
    product: Product, x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array
) -> jax.Array:
    """Multiply x [..., D] by the kernel with its adapter added, as a merged model, and so the sampler, does.

    The gradients with respect to A and B are computed as for y = x W + scale (x A) B, by products with r columns. The
    gradient of the whole kernel is computed only if it is used. The gradient of the scale is 0.

    Args:
        product: the function that multiplies x and a kernel.
        x: [..., D].
        kernel: [D, F].
        a: [D, r].
        b: [r, F].
        scale: [].

    Returns:
        [..., F].

    >>> adapted_dot(jnp.matmul, jnp.ones((3, 2)), jnp.ones((2, 4)), jnp.ones((2, 1)), jnp.ones((1, 4)), jnp.float32(0.5)).shape
    (3, 4)
    """
    return _forward(product, x, kernel, a, b, scale)[0]


def _forward(product: Product, x: jax.Array, *leaves: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    # By the product's own forward rule, so that the names it gives for a policy of `jax.checkpoint` are kept.
    return jax.vjp(product, x, adapted_kernel(*leaves).astype(x.dtype))[0], (x, *leaves)


def _backward(product: Product, saved: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
    x, kernel, a, b, scale = saved
    weights = adapted_kernel(kernel, a, b, scale).astype(x.dtype)
    by_x, by_weights = jax.vjp(product, x, weights)[1](cotangent)
    rows, out = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    by_a = scale * dot(rows.T, dot(out, b.T.astype(x.dtype)).astype(x.dtype))
    by_b = scale * dot(dot(rows, a.astype(x.dtype)).astype(x.dtype).T, out)
    return by_x, by_weights.astype(kernel.dtype), by_a.astype(a.dtype), by_b.astype(b.dtype), jnp.zeros_like(scale)


adapted_dot.defvjp(_forward, _backward)


def freeze(
    params: dict[str, Any], *, rank: int | None, alpha: float, seed: int, mesh: Mesh | None = None
) -> tuple[Any | None, dict[str, Any]]:
    """Split parameters into frozen and trained ones, with new adapters among the trained; `with_lora` merges the two.

    Args:
      params: of a language model; or {"lm": them, ...} with a head, which is trained.
      rank: of the adapters; None: all parameters are trained, without adapters.
      alpha: the adapters' weight times the rank.
      seed: of the run.
      mesh: over which the parameters are placed, or None.

    Returns:
      (frozen, trained): the model's parameters, and the adapters with the head. Without a rank: (None, all parameters).

    Example:
      >>> freeze({"layers": {}}, rank=None, alpha=32.0, seed=0)
      (None, {'layers': {}})
    """
    if rank is None:
        return None, params
    init = functools.partial(init_lora, rank=rank, alpha=alpha)
    key = fold_in(jax.random.key(seed), 2**32 - 2)  # a number that no training step and no evaluation folds in
    adapters = init_sharded(init, key, params.get("lm", params), mesh=mesh)
    return ({"lm": params["lm"]}, {**params, "lm": adapters}) if "lm" in params else (params, adapters)
