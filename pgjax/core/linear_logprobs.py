"""Log-probabilities and entropies from hidden states, block by block of the vocabulary.

Neither the forward nor the backward pass ever holds logits [B, T, V]. A loop over the vocabulary keeps running sums
(online softmax: Milakov and Gimelshein 2018), and the backward pass computes each block of logits again.
"""

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
_Outputs = tuple[jax.Array, jax.Array | None]  # logprobs and entropy [B, T]; None where the entropy is not wanted
_Backward = tuple[jax.Array, jax.Array]  # gradients of hidden [B, T, D] and unembedding [V, D]


class _Sums(NamedTuple):
    """Running sums over the vocabulary, each [B, T]; z are the logits over the temperature."""

    top: jax.Array  # largest z
    total: jax.Array  # sum of exp(z - top)
    weighted: jax.Array | None  # sum of exp(z - top) * (z - top); None where the entropy is not wanted
    picked: jax.Array  # the token's z


class _Split(NamedTuple):
    """The mesh axes that split V and D of the unembedding where the rule below runs; None where it is not split."""

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


def _without_infinities(log_weights: jax.Array) -> jax.Array:
    """Replace -inf by 0: exp(-inf) * -inf is NaN, where the limit of exp(x) * x is 0."""
    return jnp.where(jnp.isneginf(log_weights), 0.0, log_weights)


def _rescaled(sums: _Sums, top: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Measure `total` and `weighted` from a larger `top`: sum w becomes c sum w, sum w x becomes c (sum w x + log c sum w)."""
    factor = jnp.exp(sums.top - top)
    if sums.weighted is None:
        return sums.total * factor, None
    drop = jnp.where(factor > 0, sums.top - top, 0.0)  # -inf * 0 would be NaN
    return sums.total * factor, factor * (sums.weighted + drop * sums.total)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _linear_logprobs(
    hidden: jax.Array, unembedding: jax.Array, ids: jax.Array, temperature: jax.Array,
    chunk_size: int, split: _Split, with_entropy: bool,
) -> _Outputs:  # fmt: skip
    return _linear_forward(hidden, unembedding, ids, temperature, chunk_size, split, with_entropy)[0]


def _linear_forward(
    hidden: jax.Array, unembedding: jax.Array, ids: jax.Array, temperature: jax.Array,
    chunk_size: int, split: _Split, with_entropy: bool,
) -> tuple[_Outputs, tuple[jax.Array | None, ...]]:  # fmt: skip
    dtype = temperature.dtype
    whole = _whole_width(unembedding, hidden.dtype, split)
    here = _ids_here(ids, unembedding, split)

    def step(sums: _Sums, start: jax.Array, size: int) -> _Sums:
        block = jax.lax.dynamic_slice_in_dim(whole, start, size).astype(hidden.dtype)
        logits = _block_logits(hidden, block, temperature)
        # The outputs do not depend on `top`. Held constant, it drops out of their second derivatives (pmax has none).
        top = jax.lax.stop_gradient(jnp.maximum(sums.top, jnp.max(logits, axis=-1)))
        shifted = logits - top[..., None]
        total, weighted = _rescaled(sums, top)
        total += jnp.sum(jnp.exp(shifted), axis=-1)
        if weighted is not None:
            weighted += jnp.sum(jnp.exp(shifted) * _without_infinities(shifted), axis=-1)
        return _Sums(top, total, weighted, sums.picked + picked_logits(logits, here - start))

    zeros = jnp.zeros_like(ids, dtype=dtype)
    # From the lowest finite number, not from -inf: a block in which every logit is -inf then adds 0 and not NaN.
    first = _Sums(jnp.full_like(zeros, jnp.finfo(dtype).min), zeros, zeros if with_entropy else None, zeros)
    sums = _over_blocks(step, first, unembedding.shape[0], min(chunk_size, unembedding.shape[0]))
    known = (here >= 0) & (here < unembedding.shape[0])
    if split.vocab is not None:  # each device has seen its own part of the vocabulary
        top = jax.lax.pmax(sums.top, split.vocab)
        parts = (*_rescaled(sums, top), sums.picked, known.astype(jnp.int32))
        total, weighted, picked, found = jax.lax.psum(parts, split.vocab)
        sums, known = _Sums(top, total, weighted, picked), found > 0
    log_total = jnp.log(sums.total)
    normalizer = sums.top + log_total
    logprobs = jnp.where(known, sums.picked - normalizer, jnp.nan)
    entropy = None if sums.weighted is None else log_total - sums.weighted / sums.total
    return (logprobs, entropy), (hidden, unembedding, ids, temperature, normalizer, known, entropy)


def _linear_backward(
    chunk_size: int, split: _Split, with_entropy: bool, saved: tuple[jax.Array, ...], cotangents: _Outputs
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    hidden, unembedding, ids, temperature, normalizer, known, entropy = saved
    whole = _whole_width(unembedding, hidden.dtype, split)
    here = _ids_here(ids, unembedding, split)
    d_logprobs, d_entropy = cotangents
    # A position whose cotangent is 0 adds exactly nothing, whatever its hidden state holds. Where that is finite, the zero
    # is computed all the same: it may have a second derivative.
    finite = jnp.isfinite(normalizer)
    picked = live = ((d_logprobs != 0) | finite) & known
    if d_entropy is not None:
        live = picked | (d_entropy != 0) | finite
        entropy, entropy_weights = where_mask(live, entropy), where_mask(live, d_entropy) / temperature
    h = where_mask(jnp.broadcast_to(live[..., None], hidden.shape), hidden)
    normalizer, weights = where_mask(live, normalizer), where_mask(picked, d_logprobs) / temperature
    dtype = normalizer.dtype

    def step(state: _Backward, start: jax.Array, size: int) -> _Backward:
        d_hidden, d_unembedding = state
        block = jax.lax.dynamic_slice_in_dim(whole, start, size).astype(hidden.dtype)
        log_p = _block_logits(h, block, temperature) - normalizer[..., None]
        p = jnp.exp(log_p)
        hit = jax.lax.broadcasted_iota(ids.dtype, p.shape, 2) == (here - start)[..., None]
        d_logits = weights[..., None] * (hit.astype(dtype) - p)
        if d_entropy is not None:
            d_logits -= entropy_weights[..., None] * p * (_without_infinities(log_p) + entropy[..., None])
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

    The values and gradients of `token_logprobs(hidden @ unembedding.T, tokens, temperature=temperature)`. A loop over the
    vocabulary holds the logits of `chunk_size` entries at a time. The backward pass computes them again from the saved
    normalizer, log sum_v exp(logit_v / temperature). Memory: a few times B * T * chunk_size floats. Through whole logits
    it is a few times B * T * V.

    With parameters sharded over a mesh, pass `mesh`. The unembedding is gathered once before the loop and its gradient is
    reduced once after it, so the loop does no communication. A split of the vocabulary is kept: each device loops over its
    own part, and the sums are added up over devices after the loop.

    Args:
      hidden: [B, T, D], the model's last hidden states, float32 or bfloat16 (products accumulate in float32).
      unembedding: [V, D]; the product is taken in the dtype of `hidden`.
      tokens: [B, T] integer ids in [0, V); an id outside gives NaN at its place.
      temperature: [] above 0, the sampler's; may be traced; carries no gradient.
      chunk_size: how many entries of the vocabulary a step of the loop takes; V need not be a multiple of it.
      mesh: devices to split the rows over, under `jit`; None inside the caller's own `shard_map` or `pmap`, or on one
        device.
      batch_axes: the axes of `mesh` that split B; the product of their sizes divides B.
      unembedding_axes: the axes of `mesh` that split V and D of the unembedding; None where it is not split. The axis of
        V must not be one of `batch_axes`. The axis of D must be one of them: its gradient comes back as a reduce-scatter.

    Returns:
      [B, T] float32, in nats; entry 0 is 0. Gradients come back in the dtypes of `hidden` and `unembedding`.

    Raises:
      ValueError: `temperature` is a number not above 0, `chunk_size` is below 1, or the axes do not fit `mesh`.
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> hidden, unembedding = jnp.ones((1, 3, 2)), jnp.zeros((4, 2))
      >>> print(linear_token_logprobs(hidden, unembedding, jnp.array([[0, 1, 2]])))
      [[ 0.        -1.3862944 -1.3862944]]
    """
    logprobs, _ = _in_token_frame(
        hidden, unembedding, tokens, temperature, chunk_size, mesh, batch_axes, unembedding_axes, with_entropy=False
    )
    return logprobs


def linear_token_logprobs_and_entropy(
    hidden: jax.Array,
    unembedding: jax.Array,
    tokens: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    chunk_size: int = 1024,
    mesh: Mesh | AbstractMesh | None = None,
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    unembedding_axes: tuple[str | None, str | None] = (None, None),
) -> tuple[jax.Array, jax.Array]:
    """Compute the tokens' log-probabilities and the entropies of their distributions in one pass over the vocabulary.

    With z = logits / temperature, top = max_v z_v and S = sum_v exp(z_v - top):

      entropy = log S - sum_v exp(z_v - top) (z_v - top) / S,    d entropy / d z_v = -p_v (log p_v + entropy).

    The values and gradients of `token_logprobs` and `token_entropy` of `hidden @ unembedding.T`, in the memory of
    `linear_token_logprobs`. Use that one where the entropy is not needed: it does less work.

    Args:
      hidden: [B, T, D], as in `linear_token_logprobs`, and so are the arguments that follow.
      unembedding: [V, D].
      tokens: [B, T] integer ids in [0, V); an id outside gives a log-probability of NaN, and an entropy all the same.
      temperature: [] above 0, the sampler's; may be traced; carries no gradient.
      chunk_size: how many entries of the vocabulary a step of the loop takes.
      mesh: devices to split the rows over, under `jit`.
      batch_axes: the axes of `mesh` that split B.
      unembedding_axes: the axes of `mesh` that split V and D of the unembedding.

    Returns:
      (logprobs, entropy), each [B, T] float32, in nats; entry 0 is 0. entropy[:, t] is that of the distribution from which
      `tokens[:, t]` was drawn, and is not below 0.

    Raises:
      ValueError: `temperature` is a number not above 0, `chunk_size` is below 1, or the axes do not fit `mesh`.
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> hidden, unembedding = jnp.ones((1, 3, 2)), jnp.zeros((4, 2))
      >>> logprobs, entropy = linear_token_logprobs_and_entropy(hidden, unembedding, jnp.array([[0, 1, 2]]))
      >>> print(entropy)
      [[0.        1.3862944 1.3862944]]
    """
    logprobs, entropy = _in_token_frame(
        hidden, unembedding, tokens, temperature, chunk_size, mesh, batch_axes, unembedding_axes, with_entropy=True
    )
    assert entropy is not None
    return logprobs, entropy


def _in_token_frame(
    hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array, temperature: jax.typing.ArrayLike, chunk_size: int,
    mesh: Mesh | AbstractMesh | None, batch_axes: tuple[str, ...], unembedding_axes: tuple[str | None, str | None],
    *, with_entropy: bool,
) -> _Outputs:  # fmt: skip
    """Check the arguments, run the rule on each device's rows, and shift its outputs to the tokens they speak of."""
    check_number("temperature", temperature, 0, strict=True)
    chex.assert_rank([hidden, unembedding, tokens], [3, 2, 2])
    chex.assert_equal_shape_prefix([hidden, tokens], 2)
    chex.assert_axis_dimension(unembedding, 1, hidden.shape[2])
    check_whole("chunk_size", chunk_size, 1)
    scale = jnp.asarray(temperature).astype(as_float(hidden).dtype)
    split = _Split(None, None) if mesh is None else _Split(*unembedding_axes)

    def rows(h: jax.Array, w: jax.Array, ids: jax.Array, t: jax.Array) -> _Outputs:
        return _linear_logprobs(*_varying_alike(h, w, ids, t), chunk_size, split, with_entropy)

    if mesh is not None:
        _check_axes(mesh, batch_axes, split)
        if split.width is None:
            unembedding = unembedding.astype(hidden.dtype)  # gathered in the narrower type
        by_row = PartitionSpec(batch_axes)
        specs = (by_row, PartitionSpec(*split), by_row, PartitionSpec())
        rows = jax.shard_map(rows, mesh=mesh, in_specs=specs, out_specs=by_row)
    return jax.tree.map(token_frame, rows(hidden, unembedding, next_tokens(tokens), scale))


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
