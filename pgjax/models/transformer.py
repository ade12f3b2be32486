"""One decoder layer with options: the families of models differ only in the fields of `Architecture`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pgjax.models.architecture import Architecture
from pgjax.models.experts import PRODUCT, init_experts, through_experts
from pgjax.models.lora import FACTORS, adapted_dot
from pgjax.models.rope import Table, rotate
from pgjax.parallel.sharding import constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}

KeyValue = tuple[jax.Array, jax.Array]  # keys and values of one layer, each [B, kv_heads, S, head_dim]
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, KeyValue]]


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

    RMS norm: x / sqrt(mean(x^2) + eps) * (offset + scale) (Zhang & Sennrich 2019); layer norm subtracts the mean first and
    adds a bias (Ba et al. 2016).
    """

    kind: str
    epsilon: float
    dtype: Any
    param_dtype: Any
    offset: float = 0.0  # added to the scale, which starts at 1 - offset
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        scale = along_last(self.param("scale", nn.initializers.constant(1 - self.offset), shape, self.param_dtype), y)
        y = y * (scale + self.offset if self.offset else scale)
        if self.kind == "layer" and self.use_bias:
            y = y + along_last(self.param("bias", nn.initializers.zeros, shape, self.param_dtype), y)
        return y.astype(self.dtype)


def norm_of(arch: Architecture, dtype: Any, param_dtype: Any, kind: str | None = None, name: str | None = None) -> Norm:
    """Build a norm as the architecture has it; `kind` if it is another one than most of them are."""
    return Norm(kind or arch.norm, arch.norm_eps, dtype, param_dtype, arch.norm_offset, arch.norm_bias, name=name)


def along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Shape a vector [D] so that it multiplies x [..., D] without implicit rank promotion.

    >>> import jax.numpy as jnp
    >>> along_last(jnp.ones(4), jnp.ones((2, 3, 4))).shape
    (1, 1, 4)
    """
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)


class Block(nn.Module):
    """Map x [B, T, D] through attention and an MLP, each behind a norm and added to x.

    `attend(q, k, v)` computes attention, over the whole sequence or over a cache that it also writes. `fused` blocks read
    parameters made by `fuse`, in which linear maps with the same input are one product.
    """

    arch: Architecture
    dtype: Any
    param_dtype: Any
    fused: bool = False

    def norm(self, name: str, kind: str | None = None) -> Norm:
        """Build a norm under the given name."""
        return norm_of(self.arch, self.dtype, self.param_dtype, kind, name)

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
    def __call__(self, x: jax.Array, table: Table | None, attend: Attend) -> tuple[jax.Array, KeyValue]:
        arch = self.arch
        y = self.norm("attn_norm")(x) if arch.pre_norms else x
        seen, kv = self.attention(y, table, attend)
        if not arch.parallel:
            x = x + self.residual("attn_post_norm", seen)
            y = self.norm("mlp_norm")(x) if arch.pre_norms else x
            return x + self.residual("mlp_post_norm", self.mlp(y)), kv
        y = y if arch.one_norm else self.norm("mlp_norm")(x)
        return x + seen + self.mlp(y), kv

    def residual(self, name: str, y: jax.Array) -> jax.Array:
        """Finish what is added to the residual stream."""
        y = self.norm(name)(y) if self.arch.post_norms else y
        return y if self.arch.residual_scale is None else y * jnp.asarray(self.arch.residual_scale, y.dtype)

    def attention(self, y: jax.Array, table: Table | None, attend: Attend) -> tuple[jax.Array, KeyValue]:
        """Project y [B, T, D] to heads, attend, and project back."""
        arch = self.arch
        heads = (arch.heads, arch.kv_heads, arch.kv_heads)
        projected = self.dense_each(y, QKV, [n * arch.head_dim for n in heads], arch.qkv_bias)
        if arch.qk_norm_whole:
            projected[:2] = [self.norm(f"{n}_norm", "rms")(x) for n, x in zip("qk", projected[:2], strict=True)]
        query, key, value = (
            constrain(one.reshape(*y.shape[:2], -1, arch.head_dim).swapaxes(1, 2), "batch", "heads")
            for one in projected
        )
        if arch.qk_norm:
            query, key = self.norm("q_norm", "rms")(query), self.norm("k_norm", "rms")(key)
        if table is not None:
            assert arch.rope is not None
            query, key = (rotate(x, table, arch.rope.interleaved) for x in (query, key))
        seen, kv = attend(query, key, value)
        return self.dense("o", arch.width, arch.out_bias)(seen.swapaxes(1, 2).reshape(*y.shape[:2], -1)), kv

    def mlp(self, y: jax.Array) -> jax.Array:
        """Map y [B, T, D] through the MLP, or through the experts that each token chooses."""
        arch = self.arch
        activation = ACTIVATIONS[arch.activation]
        if arch.experts is not None:
            weights = self.param("experts", init_experts, arch, self.param_dtype)
            return through_experts(y, weights, arch.experts, activation)
        names = GATE_UP if arch.gated_mlp else GATE_UP[1:]
        *gate, up = self.dense_each(y, names, [arch.mlp_width] * len(names), arch.mlp_bias)
        *gate, up = (x.astype(jnp.float32) for x in (*gate, up))  # rounded once, after their product
        up = activation(gate[0]) * up if gate else activation(up)
        up = constrain(up.astype(y.dtype), "batch", None, "mlp")
        return self.dense("down", arch.width, arch.mlp_bias)(up)


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
