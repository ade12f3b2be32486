"""Whole sequences through a model's layers: padded, packed, or in groups with one prompt."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from pgjax.models.architecture import Architecture
from pgjax.models.attention import Kernel, attention, causal_attention, left_by_cudnn, permuted, real_first
from pgjax.models.shared_prompts import group_attention, packed, same_prompts, unpacked
from pgjax.models.transformer import PRODUCT, Block, KeyValue, rotary_table
from pgjax.parallel.sharding import constrain

Params = dict[str, Any]
Seeing = Callable[
    [jax.Array, jax.Array, jax.Array], jax.Array
]  # (query, key, value) -> what each query sees of the values
# Without `remat` the backward pass reads the products of weights and computes what lies between them again: a third of the
# memory, and less time too on a CPU, where storing the activations of a scan costs more than computing them (benchmarks/).
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
    kernel: Literal["masked"] | Kernel = "masked",
    remat: bool = False,
    **group: Any,
) -> tuple[jax.Array, KeyValue]:
    """Map tokens [B, T] to what the last layer gives, before the last norm, and to all layers' keys and values.

    Args:
        block: one layer; it knows the architecture and the dtype of activations.
        params: of the model.
        tokens: [B, T] int32.
        attention_mask: [B, T] True on real tokens; None: all are.
        segment_ids: [B, T] int32 of texts packed into one row, 0 on padding where there is no mask; None: a text a row.
        kernel: what computes attention (`causal_lm.causal_lm`); rows with segment_ids are always masked.
        remat: keep nothing of a layer for the backward pass but its input.
        group: prompt_length and group_size of rows whose prompts are alike (`groups`), computed once.

    Returns:
        [B, T, D], and (keys, values), each [depth, B, kv_heads, T, head_dim]; of a group as `groups.packed` lays it out.

    Raises:
        ValueError: more tokens than a model with learned positions has.
    """
    arch, length = block.arch, tokens.shape[1]
    if attention_mask is None:
        if arch.rope is None and length > arch.max_positions and segment_ids is None:
            raise ValueError(f"{length} tokens, but the model has {arch.max_positions} positions: shorten the input")
        attention_mask = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0
    attention_mask, through = attention_mask.astype(bool), functools.partial(layers, block, params, remat=remat)
    if kernel != "masked" and segment_ids is None:
        return _by_kernel(through, tokens, attention_mask, kernel)
    positions = positions_of(attention_mask)
    mask = jnp.tril(jnp.ones((1, length, length), bool)) & attention_mask[:, None, :]
    if segment_ids is not None:
        positions = segment_positions(attention_mask, segment_ids)
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
    if not group:
        return through(tokens, positions, lambda q, k, v: attention(q, k, v, mask))
    seeing = functools.partial(group_attention, mask=mask, **group)
    x, kv = through(packed(tokens, **group), packed(positions, **group), seeing)
    alike = same_prompts(tokens, attention_mask, **group)
    return jnp.where(alike[:, None, None], unpacked(x, **group), jnp.nan), kv  # never wrong in silence


def _by_kernel(
    through: Callable[..., tuple[jax.Array, KeyValue]], tokens: jax.Array, attention_mask: jax.Array, kernel: Kernel
) -> tuple[jax.Array, KeyValue]:
    """Let a fused kernel see rows whose real tokens come first, and put what it gives back where they were."""
    length = tokens.shape[1]
    even = ((0, 0), (0, length % 2))  # what JAX demands of cuDNN's backward pass
    tokens, attention_mask = jnp.pad(tokens, even), jnp.pad(attention_mask, even)
    there, back = real_first(attention_mask)
    positions = positions_of(permuted(attention_mask, there))
    x, kv = through(permuted(tokens, there), positions, functools.partial(causal_attention, kernel=kernel))
    put_back = functools.partial(permuted, order=back[:, :length])
    return put_back(x), jax.tree.map(jax.vmap(functools.partial(put_back, axis=2)), kv)


def layers(
    block: Block, params: Params, tokens: jax.Array, positions: jax.Array, seeing: Seeing, *, remat: bool
) -> tuple[jax.Array, KeyValue]:
    """Scan tokens [B, T] at these positions [B, T] through all layers: [B, T, D], and their keys and values, stacked."""
    table = rotary(block.arch, positions)

    def layer(x: jax.Array, layer_params: Params) -> tuple[jax.Array, KeyValue]:
        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, KeyValue]:
            return seeing(query, key, value), (key, value)

        x, kv = run(block, layer_params, x.astype(block.dtype), table, attend)
        return constrain(x.astype(jnp.float32), "batch"), kv

    # The carry holds values of the block's dtype in 32 bits: XLA on CPU rewrites the whole stack of carries that the
    # backward pass needs, layer after layer, where they are 16-bit floats.
    layer = jax.checkpoint(layer, prevent_cse=False, policy=None if remat else PRODUCTS)
    # Each device of fsdp looks up its part of the width for all of their rows; then rows are exchanged for width.
    x = constrain(embed(block, params, tokens, positions), "lookup", None, "width")
    x, stacked = jax.lax.scan(layer, constrain(x, "batch").astype(jnp.float32), params["layers"])
    return x.astype(block.dtype), stacked


def embed(block: Block, params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Look up tokens [B, T], and their positions where these are learned: [B, T, D]."""
    x = params["embed"]["tokens"][tokens].astype(block.dtype)
    if block.arch.rope is None:
        # A position beyond the table is NaN: clamped to the last one, it would be wrong in silence.
        x = x + params["embed"]["positions"].at[positions].get(mode="fill", fill_value=jnp.nan).astype(block.dtype)
    return x


def rotary(arch: Architecture, positions: jax.Array) -> KeyValue | None:
    """Return the rotary table of positions [B, T]; None where positions are learned."""
    return None if arch.rope is None else rotary_table(arch.rope, arch.head_dim, positions)


def positions_of(attention_mask: jax.Array) -> jax.Array:
    """Count the real tokens before each token: [B, T] int32, so that padding on the left shifts nothing.

    >>> import jax.numpy as jnp
    >>> positions_of(jnp.array([[False, False, True, True]])).tolist()
    [[0, 0, 0, 1]]
    """
    return jnp.maximum(jnp.cumsum(attention_mask.astype(jnp.int32), axis=1) - 1, 0)


def segment_positions(attention_mask: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Count the real tokens before each token in its own segment: [B, T] int32.

    >>> import jax.numpy as jnp
    >>> segment_positions(jnp.ones((1, 5), bool), jnp.array([[1, 1, 1, 2, 2]])).tolist()
    [[0, 1, 2, 0, 1]]
    """
    seen = jnp.cumsum(attention_mask.astype(jnp.int32), axis=1)
    starts = segment_ids != jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, : segment_ids.shape[1]]
    before = jax.lax.cummax(jnp.where(starts, seen - attention_mask.astype(jnp.int32), 0), axis=1)
    return jnp.maximum(seen - before - 1, 0)


def run(module: nn.Module, params: Params, *args: Any) -> Any:
    """Apply a module to its parameters.

    >>> run(nn.Dense(2), {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, jnp.ones(3)).tolist()
    [3.0, 3.0]
    """
    return module.apply({"params": params}, *args)
