"""One decoder layer with options: Llama, Qwen2, Qwen3 and GPT-2 differ in the fields of `Architecture` alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pgjax.models.architecture import Architecture, Rope

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}

KeyValue = tuple[jax.Array, jax.Array]  # keys and values of one layer, each [B, kv_heads, S, head_dim]
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, KeyValue]]


def rope_frequencies(rope: Rope, head_dim: int) -> jax.Array:
    """Return the angle a position of every pair of a head, [head_dim / 2] in radians.

    >>> from pgjax.models.architecture import Rope
    >>> rope_frequencies(Rope(theta=100.0), 4).tolist()
    [1.0, 0.10000000149011612]
    """
    frequencies = rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.factor is None:
        return frequencies
    assert rope.low_freq_factor is not None and rope.high_freq_factor is not None
    assert rope.original_max_positions is not None
    turns = rope.original_max_positions * frequencies / (2 * math.pi)  # over the original context
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = jnp.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor


def rotary_table(rope: Rope, head_dim: int, positions: jax.Array) -> KeyValue:
    """Return cosine and sine, each [B, 1, T, head_dim / 2] float32, for positions [B, T].

    >>> import jax.numpy as jnp
    >>> from pgjax.models.architecture import Rope
    >>> [x.shape for x in rotary_table(Rope(theta=100.0), 4, jnp.zeros((2, 3), jnp.int32))]
    [(2, 1, 3, 2), (2, 1, 3, 2)]
    """
    frequencies = rope_frequencies(rope, head_dim)
    angles = positions.astype(jnp.float32)[:, None, :, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, table: KeyValue) -> jax.Array:
    """Turn the two halves of every head by the table's angles (the rotate-half convention of Hugging Face).

    >>> import jax.numpy as jnp
    >>> quarter_turn = jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1))
    >>> rotate(jnp.array([[[[1.0, 0.0]]]]), quarter_turn).tolist()
    [[[[0.0, 1.0]]]]
    """
    cosine, sine = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Attend from query [B, H, T, hd] to key and value [B, Hkv, S, hd] where mask [B, T, S] is True.

    softmax(q k / sqrt(hd)) v with the softmax in float32; the H / Hkv queries of a group share keys (Ainslie et al. 2023)
    and are multiplied as one block of rows. A query that may see nothing (padding) gets a finite value.

    >>> import jax.numpy as jnp
    >>> q, kv = jnp.ones((1, 4, 3, 8)), jnp.ones((1, 2, 3, 8))
    >>> attention(q, kv, kv, jnp.tril(jnp.ones((1, 3, 3), bool))).shape
    (1, 4, 3, 8)
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    rows = query.reshape(batch, kv_heads, -1, head_dim)
    scores = jnp.einsum("bnrd,bnsd->bnrs", rows, key, preferred_element_type=jnp.float32) / math.sqrt(head_dim)
    scores = scores.reshape(batch, heads, length, slots)
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype).reshape(batch, kv_heads, -1, slots)
    return jnp.einsum("bnrs,bnsd->bnrd", weights, value).reshape(query.shape)


def rows_dot(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """Multiply x [..., D] by kernel [D, F] as one matrix product of rows.

    XLA on CPU runs the backward products of the flattened form 1.5 times as fast as those of the batched one.

    >>> import jax.numpy as jnp
    >>> rows_dot(jnp.ones((2, 3, 4)), jnp.ones((4, 5))).shape
    (2, 3, 5)
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[1])


class Norm(nn.Module):
    """Scale x [..., D] to unit mean square ("rms") or to mean 0 and variance 1 ("layer"), in float32.

    RMS norm: x / sqrt(mean(x^2) + eps) * scale (Zhang & Sennrich 2019); layer norm subtracts the mean first and adds a
    bias (Ba et al. 2016).
    """

    kind: str
    epsilon: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        y = y * along_last(self.param("scale", nn.initializers.ones, shape, self.param_dtype), y)
        if self.kind == "layer":
            y = y + along_last(self.param("bias", nn.initializers.zeros, shape, self.param_dtype), y)
        return y.astype(self.dtype)


def along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Shape a vector [D] so that it multiplies x [..., D] without implicit rank promotion.

    >>> import jax.numpy as jnp
    >>> along_last(jnp.ones(4), jnp.ones((2, 3, 4))).shape
    (1, 1, 4)
    """
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)


class Block(nn.Module):
    """Map x [B, T, D] through attention and an MLP, each behind a norm and added to x (pre-norm residual layer).

    `attend(q, k, v)` decides what the queries see: the whole sequence, or a cache that it also writes.
    """

    arch: Architecture
    dtype: Any
    param_dtype: Any

    def norm(self, name: str, kind: str) -> nn.Module:
        """Build a norm of the given kind under the given name."""
        return Norm(kind, self.arch.norm_eps, self.dtype, self.param_dtype, name=name)

    def dense(self, name: str, features: int, bias: bool) -> nn.Module:
        """Build a linear map to `features` under the given name."""
        return nn.Dense(
            features,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(0.02),
            dot_general=rows_dot,
            name=name,
        )

    @nn.compact
    def __call__(self, x: jax.Array, table: KeyValue | None, attend: Attend) -> tuple[jax.Array, KeyValue]:
        arch = self.arch
        heads = (arch.heads, arch.kv_heads, arch.kv_heads)
        y = self.norm("attn_norm", arch.norm)(x)
        query, key, value = (
            self.dense(name, n * arch.head_dim, arch.qkv_bias)(y).reshape(*x.shape[:2], n, arch.head_dim).swapaxes(1, 2)
            for name, n in zip("qkv", heads, strict=True)
        )
        if arch.qk_norm:
            query, key = self.norm("q_norm", "rms")(query), self.norm("k_norm", "rms")(key)
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
        seen, kv = attend(query, key, value)
        x = x + self.dense("o", arch.width, arch.out_bias)(seen.swapaxes(1, 2).reshape(*x.shape[:2], -1))

        y = self.norm("mlp_norm", arch.norm)(x)
        activation = ACTIVATIONS[arch.activation]
        up = self.dense("up", arch.mlp_width, arch.mlp_bias)(y)
        if arch.gated_mlp:
            up = activation(self.dense("gate", arch.mlp_width, arch.mlp_bias)(y)) * up
        else:
            up = activation(up)
        return x + self.dense("down", arch.width, arch.mlp_bias)(up), kv
