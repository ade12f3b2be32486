"""The forward pass over whole sequences: padded, packed, or in groups that share a prompt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from pgjax.models.architecture import Architecture, LayerKind, layer_kinds
from pgjax.models.attention import Kernel, attention, causal_attention, left_by_cudnn, permuted, real_first
from pgjax.models.rope import Table, rotary_table
from pgjax.models.shared_prompts import group_attention, packed, same_prompts, unpacked
from pgjax.models.transformer import PRODUCT, Block, KeyValue
from pgjax.parallel.sharding import constrain

Params = dict[str, Any]
# (query, key, value, kind) -> the attention's output; kind [] int32 is the layer's, or None where all layers are of one
Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]
# Without `remat`, the forward pass saves the products with weights, and the backward pass computes again what lies between
# them. That takes a third of the memory, and less time on a CPU, where storing the activations of a scan costs more than
# computing them (benchmarks/).
PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(PRODUCT), left_by_cudnn
)


def forward(
    block: Block,
    params: Params,
    tokens: jax.Array,
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    branch_ids: jax.Array | None = None,
    kernel: Literal["masked"] | Kernel = "masked",
    remat: bool = False,
    whole: int | None = None,
    **group: Any,
) -> tuple[jax.Array, KeyValue]:
    """Run tokens [B, T] through all layers; return the last layer's output, before the last norm, and all keys and values.

    Args:
        block: one layer, with the architecture and the dtype of activations.
        params: of the model.
        tokens: [B, T] int32.
        attention_mask: [B, T] True on real tokens; None: all tokens are real.
        segment_ids: [B, T] int32 of texts packed into one row, 0 on padding if there is no mask; None: one text per row.
        branch_ids: [B, T] int32 of texts that go on from one beginning, within a segment: 0 on the beginning, which all of them
            see, then 1, 2, ..., which do not see each other; None: no segment has branches.
        kernel: the implementation of attention (`causal_lm.causal_lm`); rows with segment_ids are always masked.
        remat: save only each layer's input for the backward pass.
        whole: the length of the rows with what will be decoded behind them; None: tokens are all.
        group: prompt_length and group_size of rows that share prompts, each of which is computed once (`shared_prompts`).

    Returns:
        [B, T, D], and (keys, values), each [depth, B, kv_heads, T, head_dim]; with a group, laid out as by
        `shared_prompts.packed`.

    Raises:
        ValueError: more tokens than a model with learned positions has.
    """
    arch, length = block.arch, tokens.shape[1]
    if attention_mask is None:
        if arch.rope is None and length > arch.max_positions and segment_ids is None:
            raise ValueError(f"{length} tokens, but the model has {arch.max_positions} positions: shorten the input")
        attention_mask = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0
    kinds, of_layer = layer_kinds(arch, length)
    tables = functools.partial(rotary_tables, arch, kinds, length=length if whole is None else whole)
    attention_mask = attention_mask.astype(bool)
    run_layers = functools.partial(layers, block, params, tables=tables, of_layer=of_layer, remat=remat)
    if kernel != "masked" and segment_ids is None:
        by_window = functools.partial(causal_attention, kernel=kernel, scale=arch.attention_scale)
        attends = [functools.partial(by_window, window=kind.window) for kind in kinds]
        return _by_kernel(run_layers, tokens, attention_mask, attends)
    positions = positions_of(attention_mask)
    mask = jnp.tril(jnp.ones((1, length, length), bool)) & attention_mask[:, None, :]
    if segment_ids is not None:
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
        if branch_ids is not None:
            mask &= (branch_ids[:, None, :] == 0) | (branch_ids[:, :, None] == branch_ids[:, None, :])
        positions = jnp.maximum(mask.sum(2, dtype=jnp.int32) - 1, 0)  # a token sees itself and those before it
    masks = [mask if kind.window is None else mask & near(positions, kind.window) for kind in kinds]

    def masked(query: jax.Array, key: jax.Array, value: jax.Array, kind: jax.Array | None, **group: Any) -> jax.Array:
        chosen = masks[0] if kind is None else jnp.stack(masks)[kind]
        attend = functools.partial(attention, scale=arch.attention_scale, cap=arch.attention_cap)
        return (
            group_attention(query, key, value, chosen, attend, **group) if group else attend(query, key, value, chosen)
        )

    if not group:
        return run_layers(tokens, positions, masked)
    x, kv = run_layers(packed(tokens, **group), packed(positions, **group), functools.partial(masked, **group))
    alike = same_prompts(tokens, attention_mask, **group)
    return jnp.where(alike[:, None, None], unpacked(x, **group), jnp.nan), kv  # rather than a wrong number


def near(positions: jax.Array, window: int) -> jax.Array:
    """Mark the keys that are among the last `window` up to a query, itself included: positions [B, T] to [B, T, T].

    >>> near(jnp.array([[0, 1, 2]]), 2)[0].astype(int).tolist()
    [[1, 1, 1], [1, 1, 1], [0, 1, 1]]
    """
    return positions[:, :, None] - positions[:, None, :] < window


def _by_kernel(
    run_layers: Callable[..., tuple[jax.Array, KeyValue]],
    tokens: jax.Array,
    attention_mask: jax.Array,
    attends: Sequence[Callable[..., jax.Array]],
) -> tuple[jax.Array, KeyValue]:
    """Run a fused kernel a kind of layer on rows permuted so that real tokens come first, and permute its output back."""
    length = tokens.shape[1]
    even = ((0, 0), (0, length % 2))  # JAX requires an even length for cuDNN's backward pass
    tokens, attention_mask = jnp.pad(tokens, even), jnp.pad(attention_mask, even)
    there, back = real_first(attention_mask)
    positions = positions_of(permuted(attention_mask, there))

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, kind: jax.Array | None) -> jax.Array:
        return attends[0](query, key, value) if kind is None else jax.lax.switch(kind, attends, query, key, value)

    x, kv = run_layers(permuted(tokens, there), positions, attend)
    put_back = functools.partial(permuted, order=back[:, :length])
    return put_back(x), jax.tree.map(jax.vmap(functools.partial(put_back, axis=2)), kv)


def layers(
    block: Block,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    attend_all: Attention,
    *,
    tables: Callable[[jax.Array], list[Table | None]],
    of_layer: Sequence[int],
    remat: bool,
) -> tuple[jax.Array, KeyValue]:
    """Scan tokens [B, T] at positions [B, T] through all layers: [B, T, D], and the stacked keys and values.

    Layers of several kinds run the same program: each finds its mask and its rotary table by the number of its kind,
    which `of_layer` lists.
    """
    by_kind = tables(positions)
    one_kind = len(by_kind) == 1
    each = params["layers"] if one_kind else (params["layers"], jnp.array(of_layer, jnp.int32))

    def layer(x: jax.Array, one: Any) -> tuple[jax.Array, KeyValue]:
        layer_params, kind = (one, None) if one_kind else one

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, KeyValue]:
            return attend_all(query, key, value, kind), (key, value)

        table = by_kind[0] if kind is None else jax.tree.map(lambda *each: jnp.stack(each)[kind], *by_kind)
        x, kv = run(block, layer_params, x.astype(block.dtype), table, attend)
        return constrain(x.astype(jnp.float32), "batch"), kv

    # The carry holds values of the block's dtype, but in 32 bits. The backward pass needs a stack of all layers' carries; if
    # they were 16-bit floats, XLA on CPU would rewrite the whole stack at every layer.
    layer = jax.checkpoint(layer, prevent_cse=False, policy=None if remat else PRODUCTS)
    # Each device of fsdp looks up its part of the width for the rows of all of them. Then they exchange: each gets the whole
    # width of its own rows.
    x = constrain(embed(block, params, tokens, positions), "lookup", None, "width")
    x, stacked = jax.lax.scan(layer, constrain(x, "batch").astype(jnp.float32), each)
    return x.astype(block.dtype), stacked


def embed(block: Block, params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Embed tokens [B, T], and add the embedding of their positions if it is learned: [B, T, D]."""
    x = params["embed"]["tokens"][tokens].astype(block.dtype)
    if block.arch.embedding_scale is not None:
        x = x * jnp.asarray(block.arch.embedding_scale, block.dtype)
    if block.arch.rope is None:
        # A position beyond the table gives NaN. Clamped to the last position, it would give a wrong number.
        x = x + params["embed"]["positions"].at[positions].get(mode="fill", fill_value=jnp.nan).astype(block.dtype)
    return x


def rotary_tables(
    arch: Architecture, kinds: Sequence[LayerKind], positions: jax.Array, length: int
) -> list[Table | None]:
    """Return a rotary table of positions [B, T] for each kind of layer; None if the model's positions are learned.

    Where some layers rotate and others do not, the latter get a table that turns by nothing. `length` is that of the rows with
    what will be decoded behind them.
    """
    found = {
        rope: rotary_table(rope, arch.head_dim, positions, length) for rope in (kind.rope for kind in kinds) if rope
    }
    if not found:
        return [None] * len(kinds)
    cosine, sine = next(iter(found.values()))
    return [found[kind.rope] if kind.rope else (jnp.ones_like(cosine), jnp.zeros_like(sine)) for kind in kinds]


def positions_of(attention_mask: jax.Array) -> jax.Array:
    """Count the real tokens before each token: [B, T] int32, so that padding on the left shifts nothing.

    >>> import jax.numpy as jnp
    >>> positions_of(jnp.array([[False, False, True, True]])).tolist()
    [[0, 0, 0, 1]]
    """
    return jnp.maximum(jnp.cumsum(attention_mask.astype(jnp.int32), axis=1) - 1, 0)


def run(module: nn.Module, params: Params, *args: Any) -> Any:
    """Apply a module to its parameters.

    >>> run(nn.Dense(2), {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, jnp.ones(3)).tolist()
    [3.0, 3.0]
    """
    return module.apply({"params": params}, *args)
