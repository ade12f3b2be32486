"""The rule behind `linear_logprobs`: a loop over blocks of the vocabulary, forward and backward, on one device's part.

The forward pass keeps running sums (online softmax: Milakov and Gimelshein 2018); the backward pass computes each block of
logits again. Where the vocabulary is split over devices, the sums are added up after the loop; nothing is sent inside it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from pgjax.core.logprobs import picked_logits
from pgjax.core.masking import where_mask

_State = TypeVar("_State")
Outputs = tuple[jax.Array, jax.Array | None]  # logprobs and entropy [B, T]; None where the entropy is not wanted
Saved = tuple[
    jax.Array | None, ...
]  # for the backward pass: the arguments, then normalizer, known ids and entropy [B, T]
_Backward = tuple[jax.Array, jax.Array]  # gradients of hidden [B, T, D] and unembedding [V, D]


class Options(NamedTuple):
    """What is fixed when the rule is traced."""

    chunk_size: int
    with_entropy: bool
    logit_cap: float | None  # None: logits are not capped
    vocab_size: int | None  # ids from here on have probability 0; None: every row of the unembedding is an id
    vocab_axes: tuple[str, ...] = ()  # of the mesh, that split V where the rule runs
    width_axes: tuple[str, ...] = ()  # and D


class _Sums(NamedTuple):
    """Running sums over the vocabulary, each [B, T]; z are the logits over the temperature."""

    top: jax.Array  # largest z
    total: jax.Array  # sum of exp(z - top)
    weighted: jax.Array | None  # sum of exp(z - top) * (z - top); None where the entropy is not wanted
    picked: jax.Array  # the token's z


class _Part(NamedTuple):
    """The rows of the unembedding that this device loops over."""

    rows: jax.Array  # [V here, D], all columns
    ids: jax.Array  # [B, T], counted from the first of these rows
    total: int  # how many of the rows the loop takes
    known: jax.Array | None  # [] how many of those are ids; None: all of them


def _part(unembedding: jax.Array, ids: jax.Array, dtype: jnp.dtype, options: Options) -> _Part:
    here, known = unembedding.shape[0], None
    total = here if options.vocab_size is None else min(here, options.vocab_size)
    if options.vocab_axes:
        first = jax.lax.axis_index(options.vocab_axes) * here
        ids = ids - first
        if options.vocab_size is not None:
            total, known = here, options.vocab_size - first  # as many steps on every device
    if options.width_axes:  # gathered in the narrower type
        unembedding = jax.lax.all_gather(unembedding.astype(dtype), options.width_axes, axis=1, tiled=True)
    return _Part(unembedding, ids, total, known)


# XLA on CPU computes in 32 bits. Of 16-bit rows that a loop reads or writes it would keep a whole copy in 32 bits, or convert all
# of them at every block. It does not see through integers of the same bits, and a derivative needs rules of its own.
def _on_cpu_as_bits(function: Callable[..., jax.Array], start: jax.Array, *xs: jax.Array) -> jax.Array:
    if xs[0].dtype.itemsize != 2:
        return function(start, *xs)

    def by_bits(start: jax.Array, *xs: jax.Array) -> jax.Array:
        start, *xs = jax.lax.optimization_barrier((start, *xs))
        done = function(start, *(jax.lax.bitcast_convert_type(x, jnp.uint16) for x in xs))
        return jax.lax.bitcast_convert_type(done, xs[0].dtype)

    return jax.lax.platform_dependent(start, *xs, cpu=by_bits, default=function)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _taken(rows: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Return `size` rows from `start` on."""
    return _on_cpu_as_bits(lambda at, x: jax.lax.dynamic_slice_in_dim(x, at, size), start, rows)


@_taken.defjvp
def _taken_jvp(size: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _taken(*primals, size), jax.lax.dynamic_slice_in_dim(tangents[0], primals[1], size)


@jax.custom_jvp
def _put(rows: jax.Array, start: jax.Array, block: jax.Array) -> jax.Array:
    """Write a block of rows from `start` on."""
    write = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return _on_cpu_as_bits(lambda at, x, y: write(x, y, at), start, rows, block)


@_put.defjvp
def _put_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _put(*primals), jax.lax.dynamic_update_slice_in_dim(tangents[0], tangents[2], primals[1], axis=0)


def _block(
    hidden: jax.Array, part: _Part, start: jax.Array, size: int, temperature: jax.Array, cap: float | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Compute a block: its rows [size, D], z [B, T, size], and the slope of the cap (None without one)."""
    block = _taken(part.rows, start, size).astype(hidden.dtype)
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits = jnp.einsum("nd,vd->nv", rows, block, preferred_element_type=temperature.dtype)
    logits, slope = logits.reshape(*hidden.shape[:-1], size), None
    if cap is not None:
        bent = jnp.tanh(logits / cap)
        logits, slope = cap * bent, 1 - jnp.square(bent)
    z = logits / temperature
    if part.known is not None:
        z = jnp.where(jax.lax.broadcasted_iota(jnp.int32, z.shape, 2) + start < part.known, z, -jnp.inf)
    return block, z, slope


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


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_logprobs(
    hidden: jax.Array, unembedding: jax.Array, ids: jax.Array, temperature: jax.Array, options: Options
) -> Outputs:
    """Compute log p of one id at each position, and the entropy if it is wanted.

    Args:
      hidden: [B, T, D].
      unembedding: [V, D], this device's part of it.
      ids: [B, T] int32; one outside of the vocabulary gives NaN.
      temperature: [] in the dtype of the sums.
      options: what is fixed.

    Returns:
      Each [B, T] in the dtype of `temperature`.

    Example:
      >>> options = Options(2, True, None, None)
      >>> linear_logprobs(jnp.ones((1, 1, 2)), jnp.zeros((4, 2)), jnp.array([[3]]), jnp.float32(1.0), options)[0]
      Array([[-1.3862944]], dtype=float32)
    """
    return forward(hidden, unembedding, ids, temperature, options)[0]


def forward(
    hidden: jax.Array, unembedding: jax.Array, ids: jax.Array, temperature: jax.Array, options: Options
) -> tuple[Outputs, Saved]:
    """Run the forward pass of `linear_logprobs`, and keep what its backward pass needs."""
    dtype = temperature.dtype
    part = _part(unembedding, ids, hidden.dtype, options)

    def step(sums: _Sums, start: jax.Array, size: int) -> _Sums:
        _, logits, _ = _block(hidden, part, start, size, temperature, options.logit_cap)
        # The outputs do not depend on `top`. Held constant, it drops out of their second derivatives (pmax has none).
        top = jax.lax.stop_gradient(jnp.maximum(sums.top, jnp.max(logits, axis=-1)))
        shifted = logits - top[..., None]
        total, weighted = _rescaled(sums, top)
        total += jnp.sum(jnp.exp(shifted), axis=-1)
        if weighted is not None:
            weighted += jnp.sum(jnp.exp(shifted) * _without_infinities(shifted), axis=-1)
        return _Sums(top, total, weighted, sums.picked + picked_logits(logits, part.ids - start))

    zeros = jnp.zeros_like(ids, dtype=dtype)
    # From the lowest finite number, not from -inf: a block in which every logit is -inf then adds 0 and not NaN.
    first = _Sums(jnp.full_like(zeros, jnp.finfo(dtype).min), zeros, zeros if options.with_entropy else None, zeros)
    sums = _over_blocks(step, first, part.total, min(options.chunk_size, part.total))
    known = (part.ids >= 0) & (part.ids < (part.total if part.known is None else jnp.minimum(part.known, part.total)))
    if options.vocab_axes:  # each device has seen its own part of the vocabulary
        top = jax.lax.pmax(sums.top, options.vocab_axes)
        parts = (*_rescaled(sums, top), sums.picked, known.astype(jnp.int32))
        total, weighted, picked, found = jax.lax.psum(parts, options.vocab_axes)
        sums, known = _Sums(top, total, weighted, picked), found > 0
    log_total = jnp.log(sums.total)
    normalizer = sums.top + log_total
    logprobs = jnp.where(known, sums.picked - normalizer, jnp.nan)
    entropy = None if sums.weighted is None else log_total - sums.weighted / sums.total
    return (logprobs, entropy), (hidden, unembedding, ids, temperature, normalizer, known, entropy)


def backward(options: Options, saved: Any, cotangents: Outputs) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    """Run its backward pass: the gradients of the four arguments, from this device's part."""
    hidden, unembedding, ids, temperature, normalizer, known, entropy = saved
    part = _part(unembedding, ids, hidden.dtype, options)
    d_logprobs, d_entropy = cotangents
    # A position whose cotangent is 0 adds exactly nothing, whatever its hidden state holds. Where the state is
    # finite, the zero is computed all the same, because it may have a second derivative.
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
        block, logits, slope = _block(h, part, start, size, temperature, options.logit_cap)
        log_p = logits - normalizer[..., None]
        p = jnp.exp(log_p)
        hit = jax.lax.broadcasted_iota(ids.dtype, p.shape, 2) == (part.ids - start)[..., None]
        d_logits = weights[..., None] * (hit.astype(dtype) - p)
        if d_entropy is not None:
            d_logits -= entropy_weights[..., None] * p * (_without_infinities(log_p) + entropy[..., None])
        if slope is not None:
            d_logits *= slope
        d_logits = d_logits.astype(h.dtype)
        flat = d_logits.reshape(-1, size)
        d_hidden += jnp.einsum("nv,vd->nd", flat, block, preferred_element_type=dtype).reshape(h.shape)
        d_block = jnp.einsum("nv,nd->vd", flat, h.reshape(-1, h.shape[-1]), preferred_element_type=dtype)
        return d_hidden, _put(d_unembedding, start, d_block.astype(d_unembedding.dtype))

    # Each block of rows gets its whole gradient at once, so it is rounded right away, unless devices' gradients are still summed.
    narrow = dtype if options.width_axes else unembedding.dtype
    first = (jnp.zeros_like(hidden, dtype=dtype), jnp.zeros_like(part.rows, dtype=narrow))
    d_hidden, d_rows = _over_blocks(step, first, part.total, min(options.chunk_size, part.total))
    if options.width_axes:
        # Scattered along a new leading axis: inside a learner, XLA on TPU forms no reduce-scatter along columns.
        parts = d_rows.reshape(d_rows.shape[0], -1, unembedding.shape[1]).swapaxes(0, 1)
        d_rows = jax.lax.psum_scatter(parts, options.width_axes, scatter_dimension=0)
    return d_hidden.astype(hidden.dtype), d_rows.astype(unembedding.dtype), None, jnp.zeros_like(temperature)


linear_logprobs.defvjp(forward, backward)
