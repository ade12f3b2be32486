"""What one new token sees of a cache, by one kernel on an NVIDIA GPU: XLA's own five or six take as many launches a layer."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec

from pgjax.parallel.sharding import ambient_mesh, fitting

# Slots that a program reads at a time, and how: the best of fourteen on an H200, all in all.
BLOCK, WARPS, STAGES = 64, 4, 3
LEAST_ROWS = 16  # of a product on tensor cores


def slot_attention(
    query: jax.Array, keys: jax.Array, values: jax.Array, slots: jax.Array, index: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Attend from query [B, H, 1, hd] to those of the first index + 1 slots of a cache that are marked.

    As `attention.attention` under slots[:, None, :], but scores never leave the chip: one program a row and key head goes
    through its slots in blocks, with a running maximum and sum (online softmax: Milakov & Gimelshein 2018). Blocks beyond
    `index` are not read. Under a mesh every device runs it on its own rows and heads.

    Args:
        query: a 16-bit float; hd a power of two.
        keys, values: [B, Hkv, S, hd].
        slots: [B, S] boolean; one of the first index + 1 at least is True.
        index: [] int32, the last slot that is written.
        interpret: run it as plain JAX, slowly, on any device.

    Returns:
        [B, H, 1, hd].

    >>> q, kv = jnp.ones((1, 4, 1, 16), jnp.bfloat16), jnp.ones((1, 2, 3, 16), jnp.bfloat16)
    >>> slot_attention(q, kv, kv, jnp.array([[False, True, True]]), jnp.int32(2), interpret=True).shape
    (1, 4, 1, 16)
    """
    batch, heads, _, head_dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    run = functools.partial(_attend, interpret=interpret)
    mesh = ambient_mesh()
    if mesh is not None:
        rows, split = fitting(mesh, batch, "batch"), fitting(mesh, kv_heads, "heads")
        by_head = PartitionSpec(rows, split)
        specs = (by_head, by_head, by_head, PartitionSpec(rows), PartitionSpec())
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=by_head, check_vma=False)
    return run(grouped, keys, values, slots, index).reshape(query.shape)


def takes(head_dim: int) -> bool:
    """Say whether the kernel computes heads of that size: a power of two, of 16 to 256.

    >>> takes(64), takes(96)
    (True, False)
    """
    return 16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0


def _attend(
    query: jax.Array, keys: jax.Array, values: jax.Array, slots: jax.Array, index: jax.Array, *, interpret: bool
) -> jax.Array:
    batch, kv_heads, group, head_dim = query.shape
    rows = max(LEAST_ROWS, pl.next_power_of_2(group))
    per_head = lambda length: pl.BlockSpec((None, None, length, head_dim), lambda b, h: (b, h, 0, 0))
    return pl.pallas_call(
        functools.partial(_kernel, group=group, rows=rows),
        grid=(batch, kv_heads),
        in_specs=[
            per_head(rows),
            per_head(keys.shape[2]),
            per_head(keys.shape[2]),
            pl.BlockSpec((None, keys.shape[2]), lambda b, h: (b, 0)),
            pl.BlockSpec((), lambda b, h: ()),
        ],
        out_specs=per_head(rows),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="slot_attention",
    )(query, keys, values, slots.astype(jnp.int8), index)


def _kernel(q_ref: Any, k_ref: Any, v_ref: Any, slots_ref: Any, index_ref: Any, out_ref: Any, *, group: int, rows: int):
    """Go through one row's slots for the queries that share one head of keys; rows beyond the group are padding."""
    length, head_dim = k_ref.shape
    real = jnp.broadcast_to((jnp.arange(rows) < group)[:, None], (rows, head_dim))
    query = triton.load(q_ref, mask=real, other=0.0)
    lowest = jnp.finfo(jnp.float32).min

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, seen = carry
        span = pl.ds(i * BLOCK, BLOCK)
        inside = i * BLOCK + jnp.arange(BLOCK) < length
        whole = jnp.broadcast_to(inside[:, None], (BLOCK, head_dim))
        marked = triton.load(slots_ref.at[span], mask=inside, other=0) > 0
        key = triton.load(k_ref.at[span, :], mask=whole, other=0.0)
        value = triton.load(v_ref.at[span, :], mask=whole, other=0.0)
        scores = triton.dot(query, key.T) / math.sqrt(head_dim)
        scores = jnp.where(jnp.broadcast_to(marked[None, :], scores.shape), scores, lowest)
        new_top = jnp.maximum(top, scores.max(axis=1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top[:, None])
        seen = seen * shrink[:, None] + triton.dot(weights.astype(value.dtype), value)
        return new_top, total * shrink + weights.sum(axis=1), seen

    first = jnp.full(rows, lowest), jnp.zeros(rows), jnp.zeros((rows, head_dim))
    blocks = (jnp.minimum(index_ref[()] + 1, length) + BLOCK - 1) // BLOCK
    _, total, seen = jax.lax.fori_loop(0, blocks, step, first)
    triton.store(out_ref, (seen / total[:, None]).astype(out_ref.dtype), mask=real)
