"""Attention: under any mask, or causal by a fused kernel that does not store the scores."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.extend.backend
import jax.numpy as jnp

from pgjax.parallel.sharding import ambient_mesh, constrain, fitting

Kernel = Literal["xla", "cudnn"]  # the implementations of `jax.nn.dot_product_attention`


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Attend from query [B, H, T, hd] to key and value [B, Hkv, S, hd] where mask [B, T, S] is True.

    softmax(q k / sqrt(hd)) v, or with `scale` softmax(scale q k) v, with the softmax and the sums in float32. With `cap`, the
    scores are cap * tanh(scores / cap) (Gemma 2). The H / Hkv query heads that share a key head (grouped queries, Ainslie et
    al. 2023) are multiplied as one block of rows. A query whose mask is all False (padding) gets a finite value.

    >>> import jax.numpy as jnp
    >>> q, kv = jnp.ones((1, 4, 3, 8)), jnp.ones((1, 2, 3, 8))
    >>> attention(q, kv, kv, jnp.tril(jnp.ones((1, 3, 3), bool))).shape
    (1, 4, 3, 8)
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    rows = query.reshape(batch, kv_heads, -1, head_dim)
    scores = jnp.einsum("bnrd,bnsd->bnrs", rows, key, preferred_element_type=jnp.float32) / divisor(head_dim, scale)
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    scores = scores.reshape(batch, heads, length, slots)
    scores = jax.lax.platform_dependent(scores, mask, tpu=_lowered, default=_replaced)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype).reshape(batch, kv_heads, -1, slots)
    seen = jnp.einsum("bnrs,bnsd->bnrd", weights, value, preferred_element_type=jnp.float32)
    return seen.astype(query.dtype).reshape(query.shape)


_LOWEST = jnp.finfo(jnp.float32).min


def _replaced(scores: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask[:, None], scores, _LOWEST)


def _lowered(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Add half the lowest number instead: a TPU's compiler lays a mask out anew, head by head, in every layer."""
    return scores + jnp.where(mask, 0.0, _LOWEST / 2)[:, None]


def divisor(head_dim: int, scale: float | None) -> float:
    """Return what scores are divided by: sqrt(head_dim), or 1 / scale.

    >>> divisor(16, None), divisor(16, 0.5)
    (4.0, 2.0)
    """
    return math.sqrt(head_dim) if scale is None else 1 / scale


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    kernel: Kernel,
    scale: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """Attend from query [B, H, T, hd] to key and value [B, Hkv, T, hd] up to each query's own position.

    The same as `attention` with a lower triangular mask, in which a query sees `window` keys at most, its own included. "cudnn"
    never holds the [B, H, T, T] scores, forward or backward (FlashAttention-2, Dao 2023). The order of the sums in its backward
    pass is not fixed unless XLA_FLAGS has --xla_gpu_exclude_nondeterministic_ops=true: without it, two runs on one GPU differ
    by rounding.

    >>> import jax.numpy as jnp
    >>> q, kv = jnp.ones((1, 4, 3, 8)), jnp.ones((1, 2, 3, 8))
    >>> causal_attention(q, kv, kv, kernel="xla").shape
    (1, 4, 3, 8)
    """
    mesh, heads, kv_heads = ambient_mesh(), query.shape[1], key.shape[1]
    if mesh is not None and fitting(mesh, heads, "heads") != fitting(mesh, kv_heads, "heads"):
        # The kernel needs keys split over the devices as queries are. With too few key heads for that, each query head gets
        # a copy of its own.
        key, value = (jnp.repeat(x, heads // kv_heads, axis=1) for x in (key, value))
    rows = (constrain(x.swapaxes(1, 2), "batch", None, "heads") for x in (query, key, value))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # JAX's function needs both
        near = None if window is None else (window - 1, 0)
        options: dict[str, Any] = {"is_causal": True, "scale": scale, "local_window_size": near}
        seen = jax.nn.dot_product_attention(*rows, **options, implementation=kernel)
    return seen.swapaxes(1, 2)


def cudnn_takes(dtype: Any, head_dim: int, capability: tuple[int, int] | None) -> bool:
    """Return whether cuDNN's fused attention supports this dtype and head size on this GPU, forward and backward.

    Every version of cuDNN 9 supports 16-bit floats and head sizes up to 128 in steps of 8, from compute capability 8.0
    (Ampere) on.

    >>> cudnn_takes(jnp.bfloat16, 64, (8, 0)), cudnn_takes(jnp.float32, 64, (8, 0)), cudnn_takes(jnp.bfloat16, 64, None)
    (True, False, False)
    """
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return capability is not None and capability >= (8, 0) and half and head_dim <= 128 and head_dim % 8 == 0


def cuda_capability() -> tuple[int, int] | None:
    """Return the compute capability of the default device, or None if it is not an NVIDIA GPU.

    >>> cuda_capability() is None or jax.default_backend() == "gpu"
    True
    """
    # Not by jax.default_backend(), which is "gpu" for AMD too.
    if "cuda" not in jax.extend.backend.get_backend().platform_version:
        return None
    major, minor = jax.local_devices()[0].compute_capability.split(".")
    return int(major), int(minor)


def left_by_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Tell `jax.checkpoint` to save what cuDNN's forward pass leaves to its backward pass (a checkpoint policy).

    The primitive's name is internal to JAX. Should it change, the backward pass runs the forward pass again, with the same
    results.

    >>> left_by_cudnn(jax.lax.sin_p)
    False
    """
    return primitive.name == "dot_product_attention_fwd_wrapper"


def real_first(attention_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Find the order that moves the real tokens of each row to its front, in their order, and padding behind them.

    With padding last, causal attention alone keeps real tokens from attending to it.

    Args:
        attention_mask: [B, T] bool; padding may be on either side, and in between.

    Returns:
        Two [B, T] int32 orders for `permuted`: to the front, and back again.

    >>> there, back = real_first(jnp.array([[False, True, True, False]]))
    >>> there.tolist(), back.tolist()
    ([[1, 2, 0, 3]], [[2, 0, 1, 3]])
    """
    there = jnp.argsort(~attention_mask, axis=1, stable=True)
    return there.astype(jnp.int32), jnp.argsort(there, axis=1).astype(jnp.int32)


def permuted(x: jax.Array, order: jax.Array, axis: int = 1) -> jax.Array:
    """Permute each row of x [B, ..., T, ...] along `axis` by its own order [B, T].

    >>> permuted(jnp.array([[5, 6, 7]]), jnp.array([[2, 0, 1]])).tolist()
    [[7, 5, 6]]
    """
    # Unique indices: the backward pass writes each column once instead of adding up.
    take = functools.partial(jnp.take, axis=axis - 1, mode="clip", unique_indices=True)
    return jax.vmap(take)(x, order)
