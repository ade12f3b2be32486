"""A causal language model as a bundle of pure functions, in the manner of `optax.GradientTransformation`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from pgjax.core.errors import UserError
from pgjax.models.architecture import Architecture, layer_kinds
from pgjax.models.attention import Kernel, attention, cuda_capability, cudnn_takes
from pgjax.models.cache import fill_slots, ring_slots, write_slot
from pgjax.models.decode_attention import slot_attention, takes
from pgjax.models.forward import embed, forward, rotary_tables, run
from pgjax.models.lora import merge_lora
from pgjax.models.shared_prompts import check_groups
from pgjax.models.transformer import Block, KeyValue, Norm, fuse, norm_of
from pgjax.parallel.sharding import constrain, gathered, splits

Params: TypeAlias = Any  # a tree of arrays, which the functions of a `CausalLM` alone read
Cache = tuple[KeyValue, ...]  # one pair per layer: separate buffers, so that a decode step writes each in place


def unchanged(params: Params) -> Params:
    """Return parameters as they are.

    >>> unchanged({"w": 1})
    {'w': 1}
    """
    return params


class CausalLM(NamedTuple):
    """The functions of one model; every one is pure, and all but `init_cache` take the parameters as their first argument.

    This is the contract for a model of another library; `pg.bundle` writes most of it. Parameters are any tree of
    floating-point arrays, and only these functions read it. A bundle is a static argument of compiled programs: make it once.
    A row's results must depend neither on the padding around it nor on other rows, and positions count from 0 at its first
    token: position = cumsum(attention_mask) - 1.

    Attributes:
        arch: the architecture; of another model, pgjax reads its vocab_size and max_positions alone (`bundle.Sizes`).
        dtype: of activations and of the cache; parameters keep their own.
        init: (key) -> params.
        apply: (params, tokens[B,T], attention_mask=None, segment_ids=None) -> logits[B,T,V] float32. segment_ids [B,T] int32 pack
            several texts into one row: a token attends to its own segment only, and positions start again with each. A segment
            is a run of one id, and a row uses no id twice. Without an attention_mask, 0 marks padding.
        hidden: (params, tokens, attention_mask=None, segment_ids=None, *, prompt_length=0, group_size=1, branch_ids=None) ->
            [B,T,D] after the last norm. With a group_size, adjacent rows of a group have the same first prompt_length entries,
            which may be computed once (`shared_prompts`); pgjax's own gives NaN to a row with another prompt than its group's
            first row, and with "cudnn" computes each by itself. branch_ids let texts of a packed row share their beginning
            (`forward.forward`); only pgjax's own takes them.
        unembedding: (params) -> [V,D].
        init_cache: (batch, length) -> any tree of arrays [batch, ...], whose shapes and dtypes prefill and decode keep. In
            pgjax's own, a layer with a window shorter than `length` has a ring of the window's size.
        prefill: (params, tokens[B,P], attention_mask[B,P], cache) -> last hidden[B,D], cache; prompts are padded on the left.
        decode: (params, token[B], position[B], index [], slots[B,S], cache) -> hidden[B,D], cache. The token stands in column
            index of its padded row, S columns long, and attends to the columns where slots is True, its own among them.
        decode_params: (params) -> what sampling gives to prefill, decode and unembedding; made once, before the first step.
    """

    arch: Architecture
    dtype: Any
    init: Callable[..., Params]
    apply: Callable[..., jax.Array]
    hidden: Callable[..., jax.Array]
    unembedding: Callable[..., jax.Array]
    init_cache: Callable[..., Any]
    prefill: Callable[..., tuple[jax.Array, Any]]
    decode: Callable[..., tuple[jax.Array, Any]]
    decode_params: Callable[[Params], Params] = unchanged


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

    Raises:
        UserError: a fused kernel for a model that caps the scores of attention.

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
    if arch.attention_cap is not None and kernel not in (None, "masked"):
        raise UserError(
            f"kernel={kernel!r} has no cap on the scores of attention, which {arch.family} needs: take 'masked'"
        )
    return _built(arch, jnp.dtype(dtype), jnp.dtype(param_dtype), remat, kernel)


@functools.lru_cache(maxsize=64)  # one architecture, one set of functions, so that compiled programs are shared
def _built(
    arch: Architecture, dtype: Any, param_dtype: Any, remat: bool, kernel: Literal["masked"] | Kernel | None
) -> CausalLM:
    block = Block(arch, dtype=dtype, param_dtype=param_dtype)
    norm = norm_of(arch, dtype, param_dtype)

    def chosen() -> Literal["masked"] | Kernel:  # decided while tracing: building a model must not start JAX's backend
        if kernel is not None:
            return kernel
        takes_it = arch.attention_cap is None and cudnn_takes(dtype, arch.head_dim, cuda_capability())
        return "cudnn" if takes_it else "masked"

    def last(params: Params, x: jax.Array) -> jax.Array:
        x = run(norm, params["norm"], x)
        return x if arch.logit_scale is None else x * jnp.asarray(arch.logit_scale, x.dtype)

    def hidden(
        params: Params,
        tokens: jax.Array,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        prompt_length: int = 0,
        group_size: int = 1,
        branch_ids: jax.Array | None = None,
    ) -> jax.Array:
        check_groups(tokens.shape, prompt_length, group_size)
        in_common = group_size > 1 and prompt_length > 0
        group: dict[str, Any] = {"prompt_length": prompt_length, "group_size": group_size} if in_common else {}
        ids = tokens, attention_mask, segment_ids
        x, _ = forward(block, params, *ids, branch_ids=branch_ids, kernel=chosen(), remat=remat, **group)
        return last(params, x)

    def unembedding(params: Params) -> jax.Array:
        return params["embed"]["tokens"] if arch.tied else params["head"]["kernel"]

    def apply(
        params: Params,
        tokens: jax.Array,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        states = hidden(params, tokens, attention_mask, segment_ids)
        return logits_of(states, unembedding(params), cap=arch.logit_cap, known_ids=arch.known_ids)

    def init_cache(batch: int, length: int) -> Cache:
        def one(window: int | None) -> KeyValue:
            shape = (batch, arch.kv_heads, length if window is None else window, arch.head_dim)
            return _split(jnp.zeros(shape, dtype)), _split(jnp.zeros(shape, dtype))

        kinds, of_layer = layer_kinds(arch, length)
        return tuple(one(kinds[kind].window) for kind in of_layer)

    def prefill(
        params: Params, tokens: jax.Array, attention_mask: jax.Array | None, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        whole = max(keys.shape[2] for keys, _ in cache)
        x, (keys, values) = forward(block, params, tokens, attention_mask, kernel=chosen(), remat=remat, whole=whole)
        cache = tuple(
            (_split(fill_slots(k, keys[i])), _split(fill_slots(v, values[i]))) for i, (k, v) in enumerate(cache)
        )
        return last(params, x[:, -1]), cache

    def decode(
        params: Params, token: jax.Array, position: jax.Array, index: jax.Array, slots: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        by_one_kernel = chosen() == "cudnn" and takes(arch.head_dim)
        x, cache = _decoded(block, params, token, position, index, slots, cache, by_one_kernel=by_one_kernel)
        return last(params, x), cache

    init = jax.jit(functools.partial(_initial, block, norm))  # one program, not one an operation
    ready = functools.partial(decode_params, dtype=dtype)
    return CausalLM(arch, dtype, init, apply, hidden, unembedding, init_cache, prefill, decode, ready)


def _initial(block: Block, norm: Norm, key: jax.Array) -> Params:
    """Draw parameters: matrices from N(0, 0.02^2), scales of norms 1, biases 0."""
    arch, dtype = block.arch, block.param_dtype
    token_key, position_key, layer_key, head_key = jax.random.split(key, 4)
    normal = nn.initializers.normal(0.02)
    x = jnp.zeros((1, 1, arch.width), block.dtype)
    table = rotary_tables(arch, layer_kinds(arch)[0], jnp.zeros((1, 1), jnp.int32), 1)[0]

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
    arch, (params, fused) = block.arch, (decode_params(params, block.dtype), block.clone(fused=True))
    positions = constrain(position[:, None], "batch")
    kinds, of_layer = layer_kinds(arch, slots.shape[1])
    tables = rotary_tables(arch, kinds, positions, slots.shape[1])
    x = constrain(embed(block, params, token[:, None], positions), "batch")
    marked = [slots if kind.window is None else ring_slots(slots, index, kind.window) for kind in kinds]
    written = []
    for layer_params, (keys, values), kind in zip(params["layers"], cache, of_layer, strict=True):
        window = kinds[kind].window

        def attend(query, key, value, keys=keys, values=values, marked=marked[kind], window=window):
            slot = index if window is None else index % window
            kv = _split(write_slot(keys, key, slot)), _split(write_slot(values, value, slot))
            if by_one_kernel:
                return slot_attention(query, *kv, marked, scale=arch.attention_scale), kv
            options = {"scale": arch.attention_scale, "cap": arch.attention_cap}
            return attention(query, *kv, marked[:, None, :], **options), kv

        x, kv = run(fused if "q_k_v" in layer_params else block, layer_params, x, tables[kind], attend)
        written.append(kv)
    return x[:, 0], tuple(written)


def logits_of(
    hidden: jax.Array, unembedding: jax.Array, *, cap: float | None = None, known_ids: int | None = None
) -> jax.Array:
    """Return hidden [..., D] @ unembedding[V, D].T in float32, multiplied in the dtype of `hidden`; then `bounded_logits`.

    >>> import jax.numpy as jnp
    >>> logits_of(jnp.ones((2, 3)), jnp.ones((5, 3))).shape
    (2, 5)
    """
    contract = (((hidden.ndim - 1,), (1,)), ((), ()))
    logits = jax.lax.dot_general(hidden, unembedding.astype(hidden.dtype), contract, preferred_element_type=jnp.float32)
    return bounded_logits(logits, cap=cap, known_ids=known_ids)


def bounded_logits(logits: jax.Array, *, cap: float | None, known_ids: int | None) -> jax.Array:
    """Cap logits softly, and put -inf where an id only pads the embedding: what `Architecture` says of them.

    >>> bounded_logits(jnp.array([0.0, 9.0, 9.0]), cap=2.0, known_ids=2).round(3).tolist()
    [0.0, 2.0, -inf]
    """
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    if known_ids is not None:
        known = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < known_ids
        logits = jnp.where(known, logits, -jnp.inf)
    return logits


def _split(cache: jax.Array) -> jax.Array:
    return constrain(cache, "batch", "heads")
