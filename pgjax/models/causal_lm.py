"""A causal language model as a bundle of pure functions, in the manner of `optax.GradientTransformation`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pgjax.models.architecture import Architecture
from pgjax.models.attention import Kernel, attention, cuda_capability, cudnn_takes
from pgjax.models.decode_attention import slot_attention, takes
from pgjax.models.forward import Params, embed, forward, rotary, run
from pgjax.models.lora import merge_lora
from pgjax.models.shared_prompts import check_groups
from pgjax.models.transformer import Block, KeyValue, Norm, fuse
from pgjax.parallel.sharding import constrain, gathered, splits

Cache = tuple[KeyValue, ...]  # one pair per layer: separate buffers, so that a decode step writes each in place


class CausalLM(NamedTuple):
    """The functions of one architecture; every one is pure and takes the parameters as its first argument."""

    arch: Architecture
    dtype: Any  # of activations and of the cache; parameters keep their own
    init: Callable[..., Params]  # (key) -> params
    # apply: (params, tokens[B,T], attention_mask=None, segment_ids=None) -> logits[B,T,V] float32. segment_ids [B,T] int32
    # pack several texts into one row: a token attends to its own segment only, and positions start again with each. A
    # segment is a run of one id, and a row uses no id twice. Without an attention_mask, 0 marks padding.
    apply: Callable[..., jax.Array]
    # hidden: (params, tokens, attention_mask=None, segment_ids=None, *, prompt_length=0, group_size=1) -> [B,T,D] after the
    # last norm. With a group_size, adjacent rows of a group have the same first prompt_length entries, which are computed
    # once (`shared_prompts`). A row with another prompt than its group's first row is NaN. With "cudnn" it has no effect.
    hidden: Callable[..., jax.Array]
    unembedding: Callable[..., jax.Array]  # (params) -> [V,D]
    init_cache: Callable[..., Cache]  # (batch, length) -> zeros
    # prefill: (params, tokens[B,P], attention_mask, cache) -> last hidden[B,D], cache
    prefill: Callable[..., tuple[jax.Array, Cache]]
    # decode: (params, token[B], position[B], index, slots[B,S], cache) -> hidden[B,D], cache
    decode: Callable[..., tuple[jax.Array, Cache]]


def per_layer(params: Params) -> Params:
    """Split the stacked layers into a list with one tree per layer.

    A decode loop reads every layer's weights at every step: splitting them before the loop keeps the copies out of it.

    >>> import jax.numpy as jnp
    >>> split = per_layer({"layers": {"q": {"kernel": jnp.zeros((3, 2, 2))}}})
    >>> len(split["layers"]), split["layers"][0]["q"]["kernel"].shape
    (3, (2, 2))
    """
    layers = params["layers"]
    depth = jax.tree.leaves(layers)[0].shape[0]
    return {**params, "layers": [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(depth)]}


def decode_params(params: Params, dtype: Any) -> Params:
    """Prepare parameters for a decode loop: split by layer, and cast to `dtype`.

    Otherwise the layers would cast the kernels at every step. Norms keep their own dtype, because they multiply in float32,
    so that a decode step computes the same as a whole forward pass. Embeddings keep theirs, because only single rows are
    looked up. The kernels are also laid out as a decode step reads them fastest (`transformer.fuse`), unless the axis tensor
    splits them: joined kernels would no longer be split by heads. Parameters split over fsdp are cast whole,
    then gathered here, once. Adapters are added to their kernels (`lora`). Prepared parameters are returned as they are.

    >>> import jax.numpy as jnp
    >>> stacked = {"layers": {name: {"kernel": jnp.zeros((1, 2, 3))} for name in ("q", "k", "v", "o", "up", "down")}}
    >>> ready = decode_params(stacked, jnp.bfloat16)["layers"][0]["q_k_v"]["kernel"]
    >>> ready.dtype.name, ready.shape
    ('bfloat16', (9, 2))
    """

    def cast(params: Params, kept: Sequence[str]) -> Params:
        keeps = lambda path: any(name in str(step) for step in path for name in kept)
        return jax.tree_util.tree_map_with_path(lambda path, x: x if keeps(path) else x.astype(dtype), params)

    if isinstance(params["layers"], list):
        return params
    params = merge_lora(params)
    whole = gathered(cast(params, ("norm",))) if splits("width") else params
    split = cast(per_layer(whole), ("norm", "embed"))
    return split if splits("heads") else {**split, "layers": [fuse(layer) for layer in split["layers"]]}


def write_slot(cache: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
    """Write x [B, heads, 1, hd] into slot `index` of cache [B, heads, S, hd], in place where XLA may.

    On a CPU as integers of the same bits: XLA would convert a whole 16-bit float buffer to 32 bits and back at every step. On a
    TPU that trick would copy the buffer twice.

    >>> write_slot(jnp.zeros((1, 1, 3, 1), jnp.bfloat16), jnp.ones((1, 1, 1, 1), jnp.bfloat16), jnp.int32(1)).ravel().tolist()
    [0.0, 1.0, 0.0]
    """
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=2)
    bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=f"uint{8 * cache.dtype.itemsize}")

    def as_bits(cache: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(write(bits(cache), bits(x), index), cache.dtype)

    return jax.lax.platform_dependent(cache, x, index, cpu=as_bits, default=write)


def causal_lm(
    arch: Architecture,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
    kernel: Literal["masked"] | Kernel | None = None,
) -> CausalLM:
    """Build the pure functions of a decoder-only transformer.

    Args:
        arch: the network's shape and options.
        dtype: of activations; bfloat16 on TPU and GPU, float32 where it must be exact.
        param_dtype: of the parameters that `init` makes. Keep float32 for training: bfloat16 loses small updates.
        remat: recompute each layer in the backward pass, so that only one layer's activations are in memory at a time.
        kernel: the attention over whole sequences: "cudnn" or "xla" (`attention.causal_attention`), or "masked"
            (`attention.attention`). None: cuDNN if the default device and the sizes allow it, otherwise masked. Rows with
            segment_ids are always masked. With "cudnn", a decode step attends to its cache by `slot_attention`.

    Returns:
        A `CausalLM`. Parameters are nested dicts; leaves under "layers" are stacked over depth.

    >>> import jax
    >>> from pgjax.models.architecture import Architecture, Rope
    >>> arch = Architecture(family="llama", vocab_size=11, width=8, depth=2, heads=2, kv_heads=1, head_dim=4, mlp_width=16,
    ...     max_positions=32, activation="silu", norm="rms", norm_eps=1e-5, rope=Rope(theta=10000.0), gated_mlp=True,
    ...     qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=False, tied=True)
    >>> lm = causal_lm(arch)
    >>> params = lm.init(jax.random.key(0))
    >>> lm.apply(params, jax.numpy.array([[1, 2, 3]])).shape
    (1, 3, 11)
    """
    return _built(arch, jnp.dtype(dtype), jnp.dtype(param_dtype), remat, kernel)


@functools.lru_cache(maxsize=64)  # one architecture, one set of functions, so that compiled programs are shared
def _built(
    arch: Architecture, dtype: Any, param_dtype: Any, remat: bool, kernel: Literal["masked"] | Kernel | None
) -> CausalLM:
    block = Block(arch, dtype=dtype, param_dtype=param_dtype)
    norm = Norm(arch.norm, arch.norm_eps, dtype, param_dtype)

    def chosen() -> Literal["masked"] | Kernel:  # decided while tracing: building a model must not start JAX's backend
        if kernel is not None:
            return kernel
        return "cudnn" if cudnn_takes(dtype, arch.head_dim, cuda_capability()) else "masked"

    def hidden(
        params: Params,
        tokens: jax.Array,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        prompt_length: int = 0,
        group_size: int = 1,
    ) -> jax.Array:
        check_groups(tokens.shape, prompt_length, group_size)
        in_common = group_size > 1 and prompt_length > 0
        group = {"prompt_length": prompt_length, "group_size": group_size} if in_common else {}
        x, _ = forward(block, params, tokens, attention_mask, segment_ids, kernel=chosen(), remat=remat, **group)
        return run(norm, params["norm"], x)

    def unembedding(params: Params) -> jax.Array:
        return params["embed"]["tokens"] if arch.tied else params["head"]["kernel"]

    def apply(
        params: Params,
        tokens: jax.Array,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        return logits_of(hidden(params, tokens, attention_mask, segment_ids), unembedding(params))

    def init_cache(batch: int, length: int) -> Cache:
        shape = (batch, arch.kv_heads, length, arch.head_dim)
        return tuple((_split(jnp.zeros(shape, dtype)), _split(jnp.zeros(shape, dtype))) for _ in range(arch.depth))

    def prefill(
        params: Params, tokens: jax.Array, attention_mask: jax.Array | None, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        x, (keys, values) = forward(block, params, tokens, attention_mask, kernel=chosen(), remat=remat)
        write = jax.lax.dynamic_update_slice_in_dim
        cache = tuple(
            (_split(write(k, keys[i], 0, axis=2)), _split(write(v, values[i], 0, axis=2)))
            for i, (k, v) in enumerate(cache)
        )
        return run(norm, params["norm"], x[:, -1]), cache

    def decode(
        params: Params, token: jax.Array, position: jax.Array, index: jax.Array, slots: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        by_one_kernel = chosen() == "cudnn" and takes(arch.head_dim)
        x, cache = _decoded(block, params, token, position, index, slots, cache, by_one_kernel=by_one_kernel)
        return run(norm, params["norm"], x), cache

    init = jax.jit(functools.partial(_initial, block, norm))  # one program, not one an operation
    return CausalLM(arch, dtype, init, apply, hidden, unembedding, init_cache, prefill, decode)


def _initial(block: Block, norm: Norm, key: jax.Array) -> Params:
    """Draw parameters: matrices from N(0, 0.02^2), scales of norms 1, biases 0."""
    arch, dtype = block.arch, block.param_dtype
    token_key, position_key, layer_key, head_key = jax.random.split(key, 4)
    normal = nn.initializers.normal(0.02)
    x = jnp.zeros((1, 1, arch.width), block.dtype)
    table = rotary(arch, jnp.zeros((1, 1), jnp.int32))

    def init_layer(layer_key: jax.Array) -> Params:
        return block.init(layer_key, x, table, lambda q, k, v: (q, (k, v)))["params"]

    params: Params = {
        "embed": {"tokens": normal(token_key, (arch.vocab_size, arch.width), dtype)},
        "layers": jax.vmap(init_layer)(jax.random.split(layer_key, arch.depth)),
        "norm": norm.init(key, x)["params"],
    }
    if arch.rope is None:
        params["embed"]["positions"] = normal(position_key, (arch.max_positions, arch.width), dtype)
    if not arch.tied:
        params["head"] = {"kernel": normal(head_key, (arch.vocab_size, arch.width), dtype)}
    return params


def _decoded(
    block: Block,
    params: Params,
    token: jax.Array,
    position: jax.Array,
    index: jax.Array,
    slots: jax.Array,
    cache: Cache,
    *,
    by_one_kernel: bool,
) -> tuple[jax.Array, Cache]:
    """Run one token per row through all layers, and write its keys and values into slot `index`: [B, D], cache."""
    params, fused = decode_params(params, block.dtype), block.clone(fused=True)
    positions = constrain(position[:, None], "batch")
    table = rotary(block.arch, positions)
    x = constrain(embed(block, params, token[:, None], positions), "batch")
    written = []
    for layer_params, (keys, values) in zip(params["layers"], cache, strict=True):

        def attend(query, key, value, keys=keys, values=values):
            kv = _split(write_slot(keys, key, index)), _split(write_slot(values, value, index))
            if by_one_kernel:
                return slot_attention(query, *kv, slots, index), kv
            return attention(query, *kv, slots[:, None, :]), kv

        x, kv = run(fused if "q_k_v" in layer_params else block, layer_params, x, table, attend)
        written.append(kv)
    return x[:, 0], tuple(written)


def logits_of(hidden: jax.Array, unembedding: jax.Array) -> jax.Array:
    """Return hidden [..., D] @ unembedding[V, D].T in float32, multiplied in the dtype of `hidden`.

    >>> import jax.numpy as jnp
    >>> logits_of(jnp.ones((2, 3)), jnp.ones((5, 3))).shape
    (2, 5)
    """
    contract = (((hidden.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(hidden, unembedding.astype(hidden.dtype), contract, preferred_element_type=jnp.float32)


def _split(cache: jax.Array) -> jax.Array:
    return constrain(cache, "batch", "heads")
