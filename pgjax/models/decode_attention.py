"""Attention of one new token to the cache as one kernel on an NVIDIA GPU, where XLA launches five or six kernels per layer."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec

from pgjax.models.attention import divisor
from pgjax.parallel.sharding import ambient_mesh, fitting

# Slots that a program reads at a time, warps and pipeline stages: the fastest of fourteen settings on an H200, overall.
BLOCK, WARPS, STAGES = 64, 4, 3
LEAST_ROWS = 16  # that a matrix product on tensor cores takes


def slot_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    slots: jax.Array,
    *,
    scale: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attend from query [B, H, 1, hd] to the marked slots of a cache.

    The same as `attention.attention` with the mask slots[:, None, :], but the scores are not written to memory. There is one
    program per row and key head. It loops over blocks of slots with a running maximum and sum (online softmax: Milakov &
    Gimelshein 2018), and reads no block beyond the row's last marked slot. Under a mesh, every device runs it on its own rows
    and heads.

    Args:
        query: [B, H, 1, hd] of a 16-bit float type; hd is a power of two.
        keys, values: [B, Hkv, S, hd].
        slots: [B, S] boolean; at least one of a row must be True.
        scale: of scores; None: 1 / sqrt(hd).
        interpret: run it as ordinary JAX operations, slowly, on any device.

    Returns:
        [B, H, 1, hd].

    >>> q, kv = jnp.ones((1, 4, 1, 16), jnp.bfloat16), jnp.ones((1, 2, 3, 16), jnp.bfloat16)
    >>> slot_attention(q, kv, kv, jnp.array([[False, True, True]]), interpret=True).shape
    (1, 4, 1, 16)
    """
    batch, heads, _, head_dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    run = functools.partial(_attend, divided_by=divisor(head_dim, scale), interpret=interpret)
    mesh = ambient_mesh()
    if mesh is not None:
        rows, split = fitting(mesh, batch, "batch"), fitting(mesh, kv_heads, "heads")
        by_head = PartitionSpec(rows, split)
        specs = (by_head, by_head, by_head, PartitionSpec(rows))
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=by_head, check_vma=False)
    return run(grouped, keys, values, slots).reshape(query.shape)


def takes(head_dim: int) -> bool:
    """Return whether the kernel supports that head size: a power of two from 16 to 256.

    >>> takes(64), takes(96)
    (True, False)
    """
    return 16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0


def _attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    slots: jax.Array,
    *,
    divided_by: float,
    interpret: bool,
) -> jax.Array:
    batch, kv_heads, group, head_dim = query.shape
    rows = max(LEAST_ROWS, pl.next_power_of_2(group))
    last = jnp.max(
        jnp.where(slots, jnp.arange(slots.shape[1], dtype=jnp.int32)[None], 0), axis=1
    )  # marked, of each row
    per_head = lambda length: pl.BlockSpec((None, None, length, head_dim), lambda b, h: (b, h, 0, 0))
    return pl.pallas_call(
        functools.partial(_kernel, group=group, rows=rows, divided_by=divided_by),
        grid=(batch, kv_heads),
        in_specs=[
            per_head(rows),
            per_head(keys.shape[2]),
            per_head(keys.shape[2]),
            pl.BlockSpec((None, keys.shape[2]), lambda b, h: (b, 0)),
            pl.BlockSpec((None,), lambda b, h: (b,)),
        ],
        out_specs=per_head(rows),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="slot_attention",
    )(query, keys, values, slots.astype(jnp.int8), last)


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    slots_ref: Any,
    last_ref: Any,
    out_ref: Any,
    *,
    group: int,
    rows: int,
    divided_by: float,
) -> None:
    """Attend over one row's slots, for the query heads that share one key head; query rows beyond the group are padding."""
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
        scores = jax.lax.dot(query, key.T, preferred_element_type=jnp.float32) / divided_by
        scores = jnp.where(jnp.broadcast_to(marked[None, :], scores.shape), scores, lowest)
        new_top = jnp.maximum(top, scores.max(axis=1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top[:, None])
        seen = seen * shrink[:, None] + jax.lax.dot(
            weights.astype(value.dtype), value, preferred_element_type=jnp.float32
        )
        return new_top, total * shrink + weights.sum(axis=1), seen

    first = jnp.full(rows, lowest), jnp.zeros(rows), jnp.zeros((rows, head_dim))
    blocks = (last_ref[()] + BLOCK) // BLOCK
    _, total, seen = jax.lax.fori_loop(0, blocks, step, first)
    triton.store(out_ref, (seen / total[:, None]).astype(out_ref.dtype), mask=real)
