"""Log-probabilities and entropies from hidden states, block by block of the vocabulary.

Neither the forward nor the backward pass ever holds logits [B, T, V]. A loop over the vocabulary keeps running sums
(online softmax: Milakov and Gimelshein 2018), and the backward pass computes each block of logits again.
"""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from pgjax.core.checks import check_number, check_whole
from pgjax.core.layouts import Axes, axes_of, explicit_axes, explicit_mesh, fitting, laid_out, spec_of
from pgjax.core.logprobs import next_tokens, token_frame
from pgjax.core.masking import as_float
from pgjax.core.vocabulary_blocks import Options, Outputs, linear_logprobs


class _Layout(NamedTuple):
    """Which axes of a mesh split what, where the rule runs."""

    mesh: Mesh | AbstractMesh
    names: frozenset[str]  # the axes that the rule takes over
    rows: Axes  # B
    time: Axes  # T
    vocab: Axes  # V of the unembedding
    width: Axes  # and its D
    typed: bool  # whether the mesh has Explicit axes, so that the arguments' types name the layout


def linear_token_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    tokens: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    chunk_size: int = 1024,
    mesh: Mesh | AbstractMesh | None = None,
    batch_axes: tuple[str, ...] | None = None,
    unembedding_axes: tuple[str | None, str | None] | None = None,
    logit_cap: float | None = None,
    vocab_size: int | None = None,
) -> jax.Array:
    """Compute the tokens' log-probabilities from hidden states, never holding the logits of the whole batch.

    The values and gradients of `token_logprobs(hidden @ unembedding.T, tokens, temperature=temperature)`. A loop over the
    vocabulary holds the logits of `chunk_size` entries at a time. The backward pass computes them again from the saved
    normalizer, log sum_v exp(logit_v / temperature). Memory: a few times B * T * chunk_size floats. Through whole logits
    it is a few times B * T * V.

    On a mesh with Explicit axes (jax's default), the layout is read off the arguments' types, under `jit` and outside: rows,
    and time, stay split as `hidden` has them. On a mesh with Auto axes (`pg.make_mesh`), pass `mesh`. In both, the unembedding
    is gathered over axes of the mesh that split rows once before the loop, and its gradient is reduced once after it, so the
    loop does no communication. A split of the vocabulary over other axes is kept: each device loops over its own part, and
    the sums are added up over devices after the loop.

    Reverse mode only, but the gradient can be differentiated again, in both modes. For `jax.jvp` and `jax.linearize` of the
    function itself, take `token_logprobs` of whole logits.

    Args:
      hidden: [B, T, D], the model's last hidden states, float32 or bfloat16 (products accumulate in float32).
      unembedding: [V, D]; the product is taken in the dtype of `hidden`.
      tokens: [B, T] integer ids in [0, V), or below `vocab_size`; another gives NaN at its place.
      temperature: [] above 0, the sampler's; may be traced; carries no gradient.
      chunk_size: how many entries of the vocabulary a step of the loop takes; V need not be a multiple of it.
      mesh: with Auto axes, to split the rows over, under `jit`. None: on a mesh with Explicit axes, inside the caller's own
        `shard_map` or `pmap`, or on one device.
      batch_axes: the axes of `mesh` that split B; the product of their sizes divides B. None: data and fsdp, where `mesh`
        has them.
      unembedding_axes: the axes of `mesh` that split V and D of the unembedding; None where it is not split. The axis of
        V must not be one of `batch_axes`. The axis of D must be one of them: its gradient comes back as a reduce-scatter.
      logit_cap: above 0; logits become logit_cap * tanh(logits / logit_cap) before the temperature (Gemma 2). None: no cap.
      vocab_size: how many of the V rows are ids, the first ones. The others pad the unembedding: their logits are -inf, and
        they get no gradient. None: all of them.

    Returns:
      [B, T] float32, in nats; entry 0 is 0. Gradients come back in the dtypes of `hidden` and `unembedding`.

    Raises:
      ValueError: `temperature` or `logit_cap` is a number not above 0, `chunk_size` is below 1, `vocab_size` is not in
        [1, V], or the axes do not fit the mesh.
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> hidden, unembedding = jnp.ones((1, 3, 2)), jnp.zeros((4, 2))
      >>> print(linear_token_logprobs(hidden, unembedding, jnp.array([[0, 1, 2]])))
      [[ 0.        -1.3862944 -1.3862944]]
    """
    logprobs, _ = _in_token_frame(
        hidden, unembedding, tokens, temperature, mesh, batch_axes, unembedding_axes,
        Options(chunk_size, False, logit_cap, vocab_size),
    )  # fmt: skip
    return logprobs


def linear_token_logprobs_and_entropy(
    hidden: jax.Array,
    unembedding: jax.Array,
    tokens: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    chunk_size: int = 1024,
    mesh: Mesh | AbstractMesh | None = None,
    batch_axes: tuple[str, ...] | None = None,
    unembedding_axes: tuple[str | None, str | None] | None = None,
    logit_cap: float | None = None,
    vocab_size: int | None = None,
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
      logit_cap: the bound of the logits; None: no cap.
      vocab_size: how many of the V rows are ids; None: all of them.

    Returns:
      (logprobs, entropy), each [B, T] float32, in nats; entry 0 is 0. entropy[:, t] is that of the distribution from which
      `tokens[:, t]` was drawn, and is not below 0.

    Raises:
      ValueError: `temperature` or `logit_cap` is a number not above 0, `chunk_size` is below 1, `vocab_size` is not in
        [1, V], or the axes do not fit the mesh.
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> hidden, unembedding = jnp.ones((1, 3, 2)), jnp.zeros((4, 2))
      >>> logprobs, entropy = linear_token_logprobs_and_entropy(hidden, unembedding, jnp.array([[0, 1, 2]]))
      >>> print(entropy)
      [[0.        1.3862944 1.3862944]]
    """
    logprobs, entropy = _in_token_frame(
        hidden, unembedding, tokens, temperature, mesh, batch_axes, unembedding_axes,
        Options(chunk_size, True, logit_cap, vocab_size),
    )  # fmt: skip
    assert entropy is not None
    return logprobs, entropy


def _in_token_frame(
    hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array, temperature: jax.typing.ArrayLike,
    mesh: Mesh | AbstractMesh | None, batch_axes: tuple[str, ...] | None,
    unembedding_axes: tuple[str | None, str | None] | None, options: Options,
) -> Outputs:  # fmt: skip
    """Check the arguments, run the rule on each device's rows, and shift its outputs to the tokens they speak of."""
    check_number("temperature", temperature, 0, strict=True)
    hidden, unembedding, tokens = jnp.asarray(hidden), jnp.asarray(unembedding), jnp.asarray(tokens)
    chex.assert_rank([hidden, unembedding, tokens], [3, 2, 2])
    chex.assert_equal_shape_prefix([hidden, tokens], 2)
    chex.assert_axis_dimension(unembedding, 1, hidden.shape[2])
    options = _checked(options, unembedding.shape[0])
    scale = jnp.asarray(temperature).astype(as_float(hidden).dtype)
    layout = _layout(hidden, unembedding, tokens, mesh, batch_axes, unembedding_axes)
    if layout is None:
        return _outputs(hidden, unembedding, tokens, scale, options)
    options = options._replace(vocab_axes=layout.vocab, width_axes=layout.width)
    return (_jitted_over_mesh if layout.typed else _over_mesh)(hidden, unembedding, tokens, scale, layout, options)


def _outputs(
    hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array, temperature: jax.Array, options: Options
) -> Outputs:
    found = _rows(hidden, unembedding, next_tokens(tokens), temperature, options=options)
    return jax.tree.map(token_frame, found)


def _rows(h: jax.Array, w: jax.Array, ids: jax.Array, t: jax.Array, *, options: Options) -> Outputs:
    return linear_logprobs(*_varying_alike(h, w, ids, t), options)


def _over_mesh(
    hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array, temperature: jax.Array,
    layout: _Layout, options: Options,
) -> Outputs:  # fmt: skip
    ids = next_tokens(tokens)
    if not layout.width:
        unembedding = unembedding.astype(hidden.dtype)  # gathered in the narrower type
    if layout.typed:
        hidden, ids = (laid_out(x, layout.mesh, layout.rows, layout.time) for x in (hidden, ids))
        unembedding = laid_out(unembedding, layout.mesh, layout.vocab, layout.width)
    by_row = spec_of(layout.rows, layout.time)
    specs = (by_row, spec_of(layout.vocab, layout.width), by_row, PartitionSpec())
    rows = partial(_rows, options=options)
    rows = jax.shard_map(rows, mesh=layout.mesh, in_specs=specs, out_specs=by_row, axis_names=layout.names)
    return jax.tree.map(token_frame, rows(hidden, unembedding, ids, temperature))


# Outside jit, and without `jax.set_mesh`, the gradient of an operation on a mesh with Explicit axes would not find its devices.
_jitted_over_mesh = jax.jit(_over_mesh, static_argnames=("layout", "options"))


def _checked(options: Options, rows: int) -> Options:
    check_whole("chunk_size", options.chunk_size, 1)
    cap, known = options.logit_cap, options.vocab_size
    if cap is not None:
        if isinstance(cap, jax.core.Tracer):
            raise ValueError("logit_cap must be a number that is known when the function is traced, got a traced one")
        check_number("logit_cap", cap, 0, jnp.inf, strict=True)
        options = options._replace(logit_cap=float(cap))
    if known is not None:
        check_whole("vocab_size", known, 1)
        if known > rows:
            raise ValueError(f"vocab_size={known} is more than the {rows} rows of the unembedding")
        options = options._replace(vocab_size=None if known == rows else int(known))
    return options


def _layout(
    hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array, mesh: Mesh | AbstractMesh | None,
    batch_axes: tuple[str, ...] | None, unembedding_axes: tuple[str | None, str | None] | None,
) -> _Layout | None:  # fmt: skip
    """Work out which axes split what: as the arguments' types say, or as told; None where nothing is split."""
    there = explicit_mesh(hidden, unembedding, tokens)
    if there is not None:
        if mesh is not None or batch_axes is not None or unembedding_axes is not None:
            raise ValueError(
                f"the arguments lie on a mesh with Explicit axes {explicit_axes(there)}, and their types name the layout: "
                "leave mesh, batch_axes and unembedding_axes out"
            )
        return _typed_layout(there, hidden, unembedding, tokens)
    if mesh is None:
        if batch_axes is not None or unembedding_axes is not None:
            raise ValueError("batch_axes and unembedding_axes name axes of a mesh: pass mesh too")
        return None
    rows = _default_rows(mesh) if batch_axes is None else tuple(batch_axes)
    vocab, width = (() if axis is None else (axis,) for axis in unembedding_axes or (None, None))
    _check_axes(mesh, rows, vocab, width)
    return _Layout(mesh, frozenset(mesh.axis_names), rows, (), vocab, width, typed=False)


def _typed_layout(mesh: AbstractMesh, hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array) -> _Layout:
    """Keep rows and time as `hidden` has them (else as `tokens` has), and split the vocabulary over what is left."""
    rows, time, _ = axes_of(hidden)
    if not rows and not time:
        rows, time = axes_of(tokens)
    held = axes_of(unembedding)
    vocab = tuple(axis for axis in (*held[0], *held[1]) if axis not in (*rows, *time))
    width = tuple(axis for axis in (*held[0], *held[1]) if axis in (*rows, *time))
    # An axis of the mesh that does not divide what it is to split here splits nothing: the unembedding is gathered over it.
    vocab = vocab if fitting(mesh, unembedding.shape[0], vocab) else ()
    width = width if fitting(mesh, unembedding.shape[1], width) else ()
    return _Layout(mesh, frozenset(explicit_axes(mesh)), rows, time, vocab, width, typed=True)


def _default_rows(mesh: Mesh | AbstractMesh) -> Axes:
    rows = tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names)
    if not rows and mesh.size > 1:
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names}, none of them data or fsdp: name those that split the rows by batch_axes"
        )
    return rows


def _check_axes(mesh: Mesh | AbstractMesh, rows: Axes, vocab: Axes, width: Axes) -> None:
    absent = [axis for axis in (*rows, *vocab, *width) if axis not in mesh.axis_names]
    if absent:
        raise ValueError(
            f"{absent} of batch_axes and unembedding_axes are not axes of the mesh, which has {mesh.axis_names}"
        )
    if set(vocab) & set(rows) or not set(width) <= set(rows):
        raise ValueError(
            f"unembedding_axes {(*vocab, *width)}: the axis of the vocabulary must not be one of batch_axes {rows}, and "
            "that of the width must be one"
        )


def _varying_alike(*xs: jax.Array) -> tuple[jax.Array, ...]:
    # Inside shard_map, all inputs of the custom rule must vary over the same axes. Its gradients then vary as its inputs do,
    # and shard_map itself sums the gradient of a replicated input. Adding a zero made of the other inputs marks an input as
    # varying, and compiles to nothing.
    zeros = [jnp.zeros_like(x, shape=(), dtype=jnp.int32) for x in xs]
    zero = sum(zeros[1:], zeros[0])
    return tuple(x + zero.astype(x.dtype) for x in xs)
