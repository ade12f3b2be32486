"""Log-probabilities from hidden states, block by block of the vocabulary: [B, T, V] is never there, forward or backward."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from pgjax.core.checks import check_number, check_whole
from pgjax.core.logprobs import next_tokens, picked_logits, token_frame
from pgjax.core.masking import as_float, where_mask

_State = TypeVar("_State")
_Forward = tuple[jax.Array, jax.Array, jax.Array]  # largest logit, sum of exp, the tokens' logits: [B, T] each
_Backward = tuple[jax.Array, jax.Array]  # gradients of hidden [B, T, D] and unembedding [V, D]


class _Split(NamedTuple):
    """The axes of the mesh that split the unembedding where the rule below runs; None: it is whole there."""

    vocab: str | None
    width: str | None


def _block_logits(hidden: jax.Array, block: jax.Array, temperature: jax.Array) -> jax.Array:
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits = jnp.einsum("nd,vd->nv", rows, block, preferred_element_type=temperature.dtype)
    return logits.reshape(*hidden.shape[:-1], len(block)) / temperature


def _over_blocks(step: Callable[[_State, jax.Array, int], _State], state: _State, total: int, size: int) -> _State:
    """Run `step(state, start, size)` over blocks of `total` entries, a short last one after the loop."""
    count, rest = divmod(total, size)

    def body(carry: _State, start: jax.Array) -> tuple[_State, None]:
        return step(carry, start, size), None

    state, _ = jax.lax.scan(body, state, jnp.arange(count, dtype=jnp.int32) * size)
    return state if rest == 0 else step(state, jnp.asarray(count * size, jnp.int32), rest)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _linear_logprobs(
    hidden: jax.Array, unembedding: jax.Array, ids: jax.Array, temperature: jax.Array, chunk_size: int, split: _Split
) -> jax.Array:
    return _linear_forward(hidden, unembedding, ids, temperature, chunk_size, split)[0]


def _linear_forward(
    hidden: jax.Array, unembedding: jax.Array, ids: jax.Array, temperature: jax.Array, chunk_size: int, split: _Split
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    dtype = temperature.dtype
    whole = _whole_width(unembedding, hidden.dtype, split)
    here = _ids_here(ids, unembedding, split)

    def step(state: _Forward, start: jax.Array, size: int) -> _Forward:
        top, total, picked = state
        block = jax.lax.dynamic_slice_in_dim(whole, start, size).astype(hidden.dtype)
        logits = _block_logits(hidden, block, temperature)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        sums = jnp.sum(jnp.exp(logits - new_top[..., None]), axis=-1)
        picked += picked_logits(logits, here - start)
        return new_top, total * jnp.exp(top - new_top) + sums, picked

    nothing = jnp.zeros_like(ids, dtype=dtype)
    first = (jnp.full_like(nothing, -jnp.inf), nothing, nothing)
    top, total, picked = _over_blocks(step, first, unembedding.shape[0], min(chunk_size, unembedding.shape[0]))
    known = (here >= 0) & (here < unembedding.shape[0])
    if split.vocab is not None:  # each device saw its own part of the vocabulary
        highest = jax.lax.pmax(top, split.vocab)
        sums = total * jnp.exp(top - highest), picked, known.astype(jnp.int32)
        total, picked, found = jax.lax.psum(sums, split.vocab)
        top, known = highest, found > 0
    normalizer = top + jnp.log(total)
    return jnp.where(known, picked - normalizer, jnp.nan), (hidden, unembedding, ids, temperature, normalizer, known)


def _linear_backward(
    chunk_size: int, split: _Split, saved: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    hidden, unembedding, ids, temperature, normalizer, known = saved
    whole = _whole_width(unembedding, hidden.dtype, split)
    here = _ids_here(ids, unembedding, split)
    # A place without cotangent adds exactly nothing, whatever stands in its hidden state. A good one is computed all the
    # same: it may have a second derivative.
    live = ((cotangent != 0) | jnp.isfinite(normalizer)) & known
    h = where_mask(jnp.broadcast_to(live[..., None], hidden.shape), hidden)
    normalizer, weights = where_mask(live, normalizer), where_mask(live, cotangent) / temperature
    dtype = normalizer.dtype

    def step(state: _Backward, start: jax.Array, size: int) -> _Backward:
        d_hidden, d_unembedding = state
        block = jax.lax.dynamic_slice_in_dim(whole, start, size).astype(hidden.dtype)
        logits = _block_logits(h, block, temperature)
        hit = jax.lax.broadcasted_iota(ids.dtype, logits.shape, 2) == (here - start)[..., None]
        d_logits = weights[..., None] * (hit.astype(dtype) - jnp.exp(logits - normalizer[..., None]))
        d_logits = d_logits.astype(h.dtype)
        flat = d_logits.reshape(-1, size)
        d_hidden += jnp.einsum("nv,vd->nd", flat, block, preferred_element_type=dtype).reshape(h.shape)
        d_block = jnp.einsum("nv,nd->vd", flat, h.reshape(-1, h.shape[-1]), preferred_element_type=dtype)
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_unembedding, d_block, start, axis=0)

    # Both sums stay wide until the end: XLA on CPU would rewrite all of a 16-bit d_unembedding at every block.
    first = (jnp.zeros_like(hidden, dtype=dtype), jnp.zeros_like(whole, dtype=dtype))
    d_hidden, d_whole = _over_blocks(step, first, unembedding.shape[0], min(chunk_size, unembedding.shape[0]))
    if split.width is not None:
        # By a leading axis of its own: inside a learner, XLA on TPU forms no reduce-scatter of columns.
        parts = d_whole.reshape(d_whole.shape[0], -1, unembedding.shape[1]).swapaxes(0, 1)
        d_whole = jax.lax.psum_scatter(parts, split.width, scatter_dimension=0)
    return d_hidden.astype(hidden.dtype), d_whole.astype(unembedding.dtype), None, jnp.zeros_like(temperature)


_linear_logprobs.defvjp(_linear_forward, _linear_backward)


def _whole_width(unembedding: jax.Array, dtype: jnp.dtype, split: _Split) -> jax.Array:
    if split.width is None:
        return unembedding
    return jax.lax.all_gather(unembedding.astype(dtype), split.width, axis=1, tiled=True)  # in the narrower type


def _ids_here(ids: jax.Array, unembedding: jax.Array, split: _Split) -> jax.Array:
    """Count ids from the first row of this device's part of the vocabulary."""
    return ids if split.vocab is None else ids - jax.lax.axis_index(split.vocab) * unembedding.shape[0]


def _varying_alike(*xs: jax.Array) -> tuple[jax.Array, ...]:
    # Inside shard_map all inputs of the custom rule must vary over the same axes: its gradients then vary as
    # its inputs do, and shard_map itself sums them for an input that was replicated. Adding a zero made from
    # the others says so, and compiles to nothing.
    zeros = [jnp.zeros_like(x, shape=(), dtype=jnp.int32) for x in xs]
    zero = sum(zeros[1:], zeros[0])
    return tuple(x + zero.astype(x.dtype) for x in xs)


def linear_token_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    tokens: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    chunk_size: int = 1024,
    mesh: Mesh | AbstractMesh | None = None,
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    unembedding_axes: tuple[str | None, str | None] = (None, None),
) -> jax.Array:
    """Compute the tokens' log-probabilities from hidden states, never holding the logits of the whole batch.

    The values and gradients of `token_logprobs(hidden @ unembedding.T, tokens, temperature=temperature)`. A
    loop over the vocabulary holds the logits of `chunk_size` entries at one time; the backward pass computes
    them again from the saved log-normaliser. Memory: a few times B * T * chunk_size floats, where the plain
    way takes a few times B * T * V.

    With parameters sharded over a mesh, pass `mesh`: the unembedding is gathered once before the loop and its
    gradient reduced once after it, so the loop holds no communication. Where the vocabulary is split, it stays so: each
    device loops over its own part, and the sums are put together after the loop.

    Args:
      hidden: [B, T, D], the model's last hidden states, float32 or bfloat16 (products accumulate in float32).
      unembedding: [V, D]; the product is taken in the dtype of `hidden`.
      tokens: [B, T] integer ids in [0, V); an id outside gives NaN at its place.
      temperature: [] above 0, the sampler's; may be traced; carries no gradient.
      chunk_size: entries of the vocabulary a step of the loop; any, V need not be a multiple of it.
      mesh: devices to split the rows over, under `jit`; None inside the caller's own `shard_map` or `pmap`,
        or on one device.
      batch_axes: the axes of `mesh` that split B; their sizes' product divides B.
      unembedding_axes: the axes of `mesh` that split V and D of the unembedding, each None or dividing it; that of V is
        none of `batch_axes`, that of D is one of them. D's gradient comes back as a reduce-scatter.

    Returns:
      [B, T] float32, in nats; entry 0 is 0. Gradients come back in the dtypes of `hidden` and `unembedding`.

    Raises:
      ValueError: `temperature` is a number not above 0, `chunk_size` is below 1, or the axes are not those of `mesh`.
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> hidden, unembedding = jnp.ones((1, 3, 2)), jnp.zeros((4, 2))
      >>> print(linear_token_logprobs(hidden, unembedding, jnp.array([[0, 1, 2]])))
      [[ 0.        -1.3862944 -1.3862944]]
    """
    check_number("temperature", temperature, 0, strict=True)
    chex.assert_rank([hidden, unembedding, tokens], [3, 2, 2])
    chex.assert_equal_shape_prefix([hidden, tokens], 2)
    chex.assert_axis_dimension(unembedding, 1, hidden.shape[2])
    check_whole("chunk_size", chunk_size, 1)
    scale = jnp.asarray(temperature).astype(as_float(hidden).dtype)
    split = _Split(None, None) if mesh is None else _Split(*unembedding_axes)

    def rows(h: jax.Array, w: jax.Array, ids: jax.Array, t: jax.Array) -> jax.Array:
        return _linear_logprobs(*_varying_alike(h, w, ids, t), chunk_size, split)

    if mesh is not None:
        _check_axes(mesh, batch_axes, split)
        if split.width is None:
            unembedding = unembedding.astype(hidden.dtype)  # gathered in the narrower type
        by_row = PartitionSpec(batch_axes)
        specs = (by_row, PartitionSpec(*split), by_row, PartitionSpec())
        rows = jax.shard_map(rows, mesh=mesh, in_specs=specs, out_specs=by_row)
    return token_frame(rows(hidden, unembedding, next_tokens(tokens), scale))


def _check_axes(mesh: Mesh | AbstractMesh, batch_axes: tuple[str, ...], split: _Split) -> None:
    absent = [axis for axis in (*batch_axes, *split) if axis is not None and axis not in mesh.axis_names]
    if absent:
        raise ValueError(
            f"{absent} of batch_axes and unembedding_axes are not axes of the mesh, which has {mesh.axis_names}"
        )
    if split.vocab in batch_axes or (split.width is not None and split.width not in batch_axes):
        raise ValueError(
            f"unembedding_axes {tuple(split)}: the axis of the vocabulary must not be one of batch_axes {batch_axes}, and "
            "that of the width must be one"
        )
