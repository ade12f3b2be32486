"""Log-probabilities from hidden states over a mesh: which of its axes split what, and the rule on each device's part."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from pgjax.core.layouts import Axes, axes_of, explicit_axes, explicit_mesh, fitting, laid_out, spec_of
from pgjax.core.vocabulary_blocks import Options, Outputs, Saved, backward, forward, linear_logprobs


class Layout(NamedTuple):
    """Which axes of a mesh split what, where the rule runs."""

    mesh: Mesh | AbstractMesh
    names: frozenset[str]  # the axes that the rule takes over
    rows: Axes  # B
    time: Axes  # T
    vocab: Axes  # V of the unembedding
    width: Axes  # and its D
    typed: bool  # whether the mesh has Explicit axes, so that the arguments' types name the layout


def layout_of(
    hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array, mesh: Mesh | AbstractMesh | None,
    batch_axes: tuple[str, ...] | None, unembedding_axes: tuple[str | None, str | None] | None,
) -> Layout | None:  # fmt: skip
    """Work out which axes of a mesh split what: as the arguments' types say, or as told.

    Args:
      hidden: [B, T, D].
      unembedding: [V, D].
      tokens: [B, T].
      mesh, batch_axes, unembedding_axes: as of `linear_token_logprobs`.

    Returns:
      The layout in which the rule runs; None where there is no mesh.

    Raises:
      ValueError: the axes do not fit the mesh, or are given where the types name them.

    Example:
      >>> layout_of(jnp.ones((1, 2, 2)), jnp.ones((4, 2)), jnp.array([[0, 1]]), None, None, None) is None
      True
    """
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
    return Layout(mesh, frozenset(mesh.axis_names), rows, (), vocab, width, typed=False)


def _typed_layout(mesh: AbstractMesh, hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array) -> Layout:
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
    # The other axes are left alone: a `vmap` around may be over what they split, such as policies.
    return Layout(mesh, frozenset((*rows, *time, *vocab, *width)), rows, time, vocab, width, typed=True)


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


def logprobs_by_layout(
    hidden: jax.Array, unembedding: jax.Array, ids: jax.Array, temperature: jax.Array,
    layout: Layout | None, options: Options,
) -> Outputs:  # fmt: skip
    """Compute log p of one id at each position, and the entropy if it is wanted, each device its own part.

    Args:
      hidden: [B, T, D].
      unembedding: [V, D].
      ids: [B, T] int32.
      temperature: [] in the dtype of the sums.
      layout: of `layout_of`.
      options: what is fixed; the axes in it are filled in here.

    Returns:
      Each [B, T] in the dtype of `temperature`, split as `hidden` is.

    Example:
      >>> options = Options(2, True, None, None)
      >>> logprobs_by_layout(jnp.ones((1, 1, 2)), jnp.zeros((4, 2)), jnp.array([[3]]), jnp.float32(1.0), None, options)[0]
      Array([[-1.3862944]], dtype=float32)
    """
    if layout is None:
        return _here(hidden, unembedding, ids, temperature, options=options)
    options = options._replace(vocab_axes=layout.vocab, width_axes=layout.width)
    if layout.typed:
        return _over_explicit_axes(hidden, unembedding, ids, temperature, layout, options)
    if not layout.width:
        unembedding = unembedding.astype(hidden.dtype)  # gathered in the narrower type
    by_row, of_unembedding = _specs(layout)
    specs = (by_row, of_unembedding, by_row, PartitionSpec())
    rows = jax.shard_map(partial(_here, options=options), mesh=layout.mesh, in_specs=specs, out_specs=by_row)
    return rows(hidden, unembedding, ids, temperature)


def _here(h: jax.Array, w: jax.Array, ids: jax.Array, t: jax.Array, *, options: Options) -> Outputs:
    return linear_logprobs(*_varying_alike(h, w, ids, t), options)


def _specs(layout: Layout) -> tuple[PartitionSpec, PartitionSpec]:
    return spec_of(layout.rows, layout.time), spec_of(layout.vocab, layout.width)


# Compiled, because outside jit, and without `jax.set_mesh`, an operation of the backward pass would not find the devices.
@partial(jax.jit, static_argnames=("layout", "options"))
def _over_explicit_axes(
    hidden: jax.Array, unembedding: jax.Array, ids: jax.Array, temperature: jax.Array, layout: Layout, options: Options
) -> Outputs:
    hidden, ids = (laid_out(x, layout.mesh, layout.rows, layout.time) for x in (hidden, ids))
    if not layout.width:
        unembedding = unembedding.astype(hidden.dtype)
    unembedding = laid_out(unembedding, layout.mesh, layout.vocab, layout.width)
    if not layout.names:
        return _here(hidden, unembedding, ids, temperature, options=options)
    return _split(*_varying_alike(hidden, unembedding, ids, temperature), layout, options)


# A rule around the two loops over devices: jax cannot yet differentiate one itself inside a `shard_map` over other axes.
@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _split(
    hidden: jax.Array, unembedding: jax.Array, ids: jax.Array, temperature: jax.Array, layout: Layout, options: Options
) -> Outputs:
    return _split_forward(hidden, unembedding, ids, temperature, layout, options)[0]


def _split_forward(
    hidden: jax.Array, unembedding: jax.Array, ids: jax.Array, temperature: jax.Array, layout: Layout, options: Options
) -> tuple[Outputs, Saved]:
    def here(h: jax.Array, w: jax.Array, ids: jax.Array, t: jax.Array) -> tuple[Outputs, Saved]:
        h, w, ids, t = _varying_alike(h, w, ids, t)
        outputs, saved = forward(h, w, ids, t, options)
        return outputs, saved[4:]

    by_row, of_unembedding = _specs(layout)
    specs = (by_row, of_unembedding, by_row, PartitionSpec())
    run = jax.shard_map(here, mesh=layout.mesh, in_specs=specs, out_specs=by_row, axis_names=layout.names)
    outputs, more = run(hidden, unembedding, ids, temperature)
    return outputs, (hidden, unembedding, ids, temperature, *more)


def _split_backward(
    layout: Layout, options: Options, saved: Any, cotangents: Outputs
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    across = tuple(axis for axis in (*layout.rows, *layout.time) if axis not in layout.width)

    def here(inputs: tuple[jax.Array, ...], more: Saved, cotangents: Outputs) -> tuple[jax.Array, jax.Array]:
        d_hidden, d_unembedding, _, _ = backward(options, (*_varying_alike(*inputs), *more), cotangents)
        return jax.lax.psum(d_hidden, layout.vocab), jax.lax.psum(d_unembedding, across)

    by_row, of_unembedding = _specs(layout)
    inputs = (by_row, of_unembedding, by_row, PartitionSpec())
    run = jax.shard_map(
        here, mesh=layout.mesh, in_specs=(inputs, by_row, by_row), out_specs=(by_row, of_unembedding),
        axis_names=layout.names,
    )  # fmt: skip
    d_hidden, d_unembedding = run(saved[:4], saved[4:], cotangents)
    return d_hidden, d_unembedding, None, jnp.zeros_like(saved[3])


_split.defvjp(_split_forward, _split_backward)


def _varying_alike(*xs: jax.Array) -> tuple[jax.Array, ...]:
    # Inside shard_map, all inputs of the custom rule must vary over the same axes. Its gradients then vary as its inputs do,
    # and shard_map itself sums the gradient of a replicated input. Adding a zero made of the other inputs marks an input as
    # varying, and compiles to nothing.
    zeros = [jnp.zeros_like(x, shape=(), dtype=jnp.int32) for x in xs]
    zero = sum(zeros[1:], zeros[0])
    return tuple(x + zero.astype(x.dtype) for x in xs)
