"""One decoder layer with options: Llama, Qwen2, Qwen3 and GPT-2 differ only in the fields of `Architecture`."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pgjax.models.architecture import Architecture, Rope
from pgjax.models.lora import FACTORS, adapted_dot
from pgjax.parallel.sharding import constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}

KeyValue = tuple[jax.Array, jax.Array]  # keys and values of one layer, each [B, kv_heads, S, head_dim]
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, KeyValue]]


def rope_frequencies(rope: Rope, head_dim: int) -> jax.Array:
    """Return the rotation angle per position of every pair of a head, [head_dim / 2] in radians.

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
    """Rotate every head by the table's angles, pairing its two halves (the rotate-half convention of Hugging Face).

    >>> import jax.numpy as jnp
    >>> quarter_turn = jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1))
    >>> rotate(jnp.array([[[[1.0, 0.0]]]]), quarter_turn).tolist()
    [[[[0.0, 1.0]]]]
    """
    cosine, sine = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)


PRODUCT = "product"  # the checkpoint name of the results of products with weights


def rows_dot(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """Multiply x [..., D] by kernel [D, F] as one matrix product of rows.

    XLA on CPU runs the backward products of this flattened form 1.5 times as fast as of the batched form. The result has the
    checkpoint name `PRODUCT`, by which a policy of `jax.checkpoint` finds it.

    >>> import jax.numpy as jnp
    >>> rows_dot(jnp.ones((2, 3, 4)), jnp.ones((4, 5))).shape
    (2, 3, 5)
    """
    product = half_matmul if x.dtype.itemsize == 2 else lambda x, kernel: checkpoint_name(x @ kernel, PRODUCT)
    return product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[1])


@jax.custom_vjp
def half_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply x [R, D] by kernel [D, F] of a 16-bit type, with all sums in float32, forward and backward.

    The backward pass is written by hand for two reasons. Autodiff would multiply float32 cotangents by 16-bit factors, for
    which there is no fast kernel. And XLA on CPU multiplies a transposed 16-bit left side at a third of the speed of a
    copied one. On a CPU, a 16-bit result has no fast kernel either, so the product is computed in float32 and then rounded.
    A GPU and a TPU round the float32 sums within the product.

    >>> import jax.numpy as jnp
    >>> half_matmul(jnp.ones((2, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.bfloat16)).dtype.name
    'bfloat16'
    """
    return _half_forward(x, kernel)[0]


def _half_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Saved as integers of the same bits: XLA on CPU would rewrite the whole stack of 16-bit floats at every layer.
    bits = jax.lax.bitcast_convert_type(_product(x, kernel, 1, 0), jnp.uint16)
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, PRODUCT), x.dtype), (x, kernel)


def _product(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    rounded_later = functools.partial(_dot, over_a=over_a, over_b=over_b)
    at_once = functools.partial(rounded_later, result=a.dtype)
    return jax.lax.platform_dependent(a, b, cpu=rounded_later, default=at_once)


def _dot(a: jax.Array, b: jax.Array, over_a: int, over_b: int, result: Any = jnp.float32) -> jax.Array:
    contract = (((over_a,), (over_b,)), ((), ()))
    return jax.lax.dot_general(a, b, contract, preferred_element_type=result).astype(a.dtype)


def _half_backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved

    def copied(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        # Copy the narrower factor. A row of padding keeps XLA from folding the copy into the product.
        left, right = (x, cotangent) if x.shape[1] <= cotangent.shape[1] else (cotangent, x)
        product = _dot(jnp.pad(left.T, ((0, 1), (0, 0))), right, 1, 0)[:-1]
        return product if left is x else product.T

    # Rounded only after the sum over devices: XLA on TPU forms a reduce-scatter of float32 sums, but an all-reduce of 16-bit
    # ones.
    plain = functools.partial(_dot, over_a=0, over_b=0)
    by_kernel = jax.lax.platform_dependent(x, cotangent, cpu=copied, default=plain)
    return _product(cotangent, kernel, 1, 1), by_kernel


half_matmul.defvjp(_half_forward, _half_backward)


def columns_dot(kernel: jax.Array, x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Multiply kernel [F, D] by the few rows of x [..., D]: [..., F] in `dtype`, summed in float32.

    A decode step reads its weights fastest in this layout, in which the summed axis is contiguous. On a CPU the kernel is also
    the left side of the product, and the result is rounded afterwards. The barrier keeps XLA from swapping the sides back:
    its CPU kernel repacks the right side, which would be the weights, at every step.

    >>> import jax.numpy as jnp
    >>> columns_dot(jnp.ones((5, 4)), jnp.ones((2, 3, 4))).shape
    (2, 3, 5)
    """
    contract = (((1,), (1,)), ((), ()))

    def on_the_left(kernel: jax.Array, rows: jax.Array) -> jax.Array:
        product = jax.lax.dot_general(kernel, rows, contract, preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(product).T.astype(dtype)

    def on_the_right(kernel: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.lax.dot_general(rows, kernel, contract, preferred_element_type=dtype)

    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.platform_dependent(kernel, rows, cpu=on_the_left, default=on_the_right)
    return y.reshape(*x.shape[:-1], kernel.shape[0])


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

    `attend(q, k, v)` computes attention, over the whole sequence or over a cache that it also writes. `fused` blocks read
    parameters made by `fuse`, in which linear maps with the same input are one product.
    """

    arch: Architecture
    dtype: Any
    param_dtype: Any
    fused: bool = False

    def norm(self, name: str, kind: str) -> nn.Module:
        """Build a norm of the given kind under the given name."""
        return Norm(kind, self.arch.norm_eps, self.dtype, self.param_dtype, name=name)

    def dense(self, name: str, features: int, bias: bool) -> nn.Module:
        """Build a linear map to `features` under the given name."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.fused:
            return FusedDense(features, bias, **options, name=name)
        init = nn.initializers.normal(0.02)
        return Dense(features, use_bias=bias, **options, kernel_init=init, dot_general=rows_dot, name=name)

    def dense_each(self, y: jax.Array, names: Sequence[str], features: Sequence[int], bias: bool) -> list[jax.Array]:
        """Map y [B, T, D] by several linear maps, in one product if they are fused."""
        if not self.fused:
            return [self.dense(name, n, bias)(y) for name, n in zip(names, features, strict=True)]
        joined = self.dense("_".join(names), sum(features), bias)(y)
        return jnp.split(joined, list(itertools.accumulate(features))[:-1], axis=-1)

    @nn.compact
    def __call__(self, x: jax.Array, table: KeyValue | None, attend: Attend) -> tuple[jax.Array, KeyValue]:
        arch = self.arch
        heads = (arch.heads, arch.kv_heads, arch.kv_heads)
        y = self.norm("attn_norm", arch.norm)(x)
        query, key, value = (
            constrain(projected.reshape(*x.shape[:2], -1, arch.head_dim).swapaxes(1, 2), "batch", "heads")
            for projected in self.dense_each(y, QKV, [n * arch.head_dim for n in heads], arch.qkv_bias)
        )
        if arch.qk_norm:
            query, key = self.norm("q_norm", "rms")(query), self.norm("k_norm", "rms")(key)
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
        seen, kv = attend(query, key, value)
        x = x + self.dense("o", arch.width, arch.out_bias)(seen.swapaxes(1, 2).reshape(*x.shape[:2], -1))

        y = self.norm("mlp_norm", arch.norm)(x)
        names = GATE_UP if arch.gated_mlp else GATE_UP[1:]
        *gate, up = self.dense_each(y, names, [arch.mlp_width] * len(names), arch.mlp_bias)
        activation = ACTIVATIONS[arch.activation]
        *gate, up = (y.astype(jnp.float32) for y in (*gate, up))  # rounded once, after their product
        up = activation(gate[0]) * up if gate else activation(up)
        up = constrain(up.astype(x.dtype), "batch", None, "mlp")
        return x + self.dense("down", arch.width, arch.mlp_bias)(up), kv


QKV, GATE_UP = ("q", "k", "v"), ("gate", "up")


class Dense(nn.Dense):
    """Map x [..., D] by a kernel [D, F], with its low-rank adapter added if there is one (`lora`)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.has_variable("params", FACTORS[0]):
            return super().__call__(x)
        leaves: list[jax.Array] = [self.get_variable("params", name) for name in ("kernel", *FACTORS)]
        y = adapted_dot(rows_dot, x.astype(self.dtype), *leaves)
        return y + along_last(self.get_variable("params", "bias"), y) if self.use_bias else y


class FusedDense(nn.Module):
    """Map x [..., D] by a kernel stored as [F, D], for decoding."""

    features: int
    use_bias: bool
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.features, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.param_dtype)
        y = columns_dot(kernel.astype(self.dtype), x.astype(self.dtype), self.dtype)
        if not self.use_bias:
            return y
        return y + along_last(self.param("bias", nn.initializers.zeros, shape[:1], self.param_dtype), y)


def fuse(layer: dict[str, Any]) -> dict[str, Any]:
    """Convert one layer's parameters for a fused block: q, k and v joined, gate and up joined, kernels [F, D].

    >>> import jax.numpy as jnp
    >>> one = {name: {"kernel": jnp.ones((4, 2))} for name in ("q", "k", "v", "o", "up", "down")}
    >>> {name: x["kernel"].shape for name, x in fuse(one).items()}
    {'o': (2, 4), 'up': (2, 4), 'down': (2, 4), 'q_k_v': (6, 4)}
    """
    groups = [names for names in (QKV, GATE_UP) if names[0] in layer]
    joined = {name for names in groups for name in names}
    fused = {
        name: {**x, "kernel": x["kernel"].T} if "kernel" in x else x for name, x in layer.items() if name not in joined
    }
    for names in groups:
        fused["_".join(names)] = {"kernel": jnp.concatenate([layer[name]["kernel"].T for name in names])}
        if "bias" in layer[names[0]]:
            fused["_".join(names)]["bias"] = jnp.concatenate([layer[name]["bias"] for name in names])
    return fused
