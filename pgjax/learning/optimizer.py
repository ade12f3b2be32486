"""One optimizer step from a loss: microbatches that add up exactly, and a state that never takes in a non-finite number."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from pgjax.core.cached import cached
from pgjax.core.checks import check_whole
from pgjax.core.errors import MissingPackageError
from pgjax.core.masking import as_float
from pgjax.learning.labels import layer_axes, matrix_mask, parameter_labels
from pgjax.parallel.sharding import (
    ambient_mesh,
    check_batch,
    constrain,
    constrain_batch,
    constrain_params,
    init_sharded,
    mesh_of,
)

Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Any], tuple[jax.Array, Metrics]]  # (params, batch) -> scalar, metrics; means over batch


class Optimizer(optax.GradientTransformationExtraArgs):
    """A gradient transformation of optax that also tells the learning rate that it goes by."""

    learning_rate: optax.Schedule  # update number, from 0, -> rate

    @classmethod
    def at(cls, transformation: optax.GradientTransformation, learning_rate: optax.Schedule) -> Optimizer:
        """Add the rate to a transformation."""
        optimizer = cls(*optax.with_extra_args_support(transformation))
        optimizer.learning_rate = learning_rate
        return optimizer


Transformation: TypeAlias = optax.GradientTransformation  # whatever takes a gradient, an `Optimizer` too


class TrainState(NamedTuple):
    """What an update changes."""

    params: Any
    opt_state: Any
    updates: jax.Array  # [] int32, optimizer steps so far
    healthy: jax.Array  # [] bool, False from the first non-finite loss or gradient on: nothing changes any more


@cached  # equal arguments give the same functions, and so the same compiled programs
def adamw(
    learning_rate: float,
    *,
    updates: int,
    warmup: int = 0,
    decay: bool = False,
    max_grad_norm: float | None = 1.0,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
) -> Optimizer:
    """Build AdamW (Loshchilov & Hutter 2019) with linear warm-up, clipping by global norm and, if asked, linear decay.

    Adam goes on where a batch has no gradient, as one whose groups all tie: after a first step of one rate, ten batches of
    gradient zero move every parameter by 3.4 rates more.

    Args:
        learning_rate: the peak rate.
        updates: optimizer steps of the whole run; the end of the decay.
        warmup: optimizer steps from rate 0 to the peak; the first one already moves.
        decay: fall linearly to 0 at `updates`; otherwise stay at the peak.
        max_grad_norm: gradients are scaled down to this global norm; None does not clip.
        weight_decay: decoupled; on matrices alone, not on norms and biases, which are vectors in each layer (`matrix_mask`).
        eps: added to the root of the second moment: where gradients are small beside it, the steps shrink with them.

    Returns:
        The optimizer.

    Raises:
        ValueError: a number out of range.

    >>> optimizer = adamw(1e-3, updates=10, warmup=2)
    >>> [round(float(optimizer.learning_rate(i)), 4) for i in range(3)]
    [0.0005, 0.001, 0.001]
    >>> optimizer = adamw(1.0, updates=11)
    >>> state, moved = init_state(jnp.float32(0.0), optimizer), []
    >>> for gradient in [1.0] + 10 * [0.0]:
    ...     state, _ = apply_gradient(state, jnp.float32(gradient), jnp.float32(0.0), optimizer)
    ...     moved.append(-float(state.params))
    >>> round(moved[0], 1), round(moved[-1] - moved[0], 1)
    (1.0, 3.4)
    """
    if not (learning_rate >= 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate must be finite and not below 0, got {learning_rate}")
    if not 0 <= warmup <= updates:
        raise ValueError(f"warmup must be from 0 to the run's {updates} updates, got {warmup}")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be finite and above 0, got {eps}")  # 0 divides 0 by 0 where a gradient is 0
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ValueError(f"weight_decay must be finite and not below 0, got {weight_decay}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be above 0, or None, got {max_grad_norm}")

    def schedule(update: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.asarray(update, jnp.float32)
        rate = jnp.minimum(1.0, (done + 1) / max(warmup, 1))
        if decay:
            rate = rate * jnp.clip((updates - done) / max(updates - warmup, 1), 0.0, 1.0)
        return learning_rate * rate

    clip = optax.identity() if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm)
    chain = optax.chain(clip, optax.adamw(schedule, eps=eps, weight_decay=weight_decay, mask=matrix_mask))
    return Optimizer.at(chain, schedule)


def muon_dimensions(params: Any) -> Any:
    """Tell `optax.contrib.muon` (Jordan 2024) which parameters are matrices, and of which axes.

    Left alone, it orthogonalises what has two axes: embeddings and the stacked scales of norms, [L, D], but no stacked kernel,
    [L, D, F], which it leaves to Adam. With this every layer's kernel is orthogonalised by itself, and all else is Adam's.

    Args:
        params: as of `parameter_labels`. Kernels are read as [inputs, outputs], which decides the scale of their steps
            alone; those of more than two axes in their layer are Adam's.

    Returns:
        A tree like `params` of `optax.contrib.MuonDimensionNumbers`, and of None for Adam.

    Raises:
        MissingPackageError: optax is older than 0.2.6, whose muon takes such a tree.

    >>> layers = {"q": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}}
    >>> params = {"embed": {"tokens": jnp.ones((5, 2))}, "layers": layers}
    >>> muon_dimensions(params)["layers"]["q"]
    {'bias': None, 'kernel': MuonDimensionNumbers(reduction_axis=1, output_axis=2)}
    >>> optimizer = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=muon_dimensions)
    """

    if not hasattr(optax.contrib, "MuonDimensionNumbers"):
        raise MissingPackageError(f"muon on stacked kernels needs optax 0.2.6 or later, got {optax.__version__}")

    def of(path: tuple[Any, ...], x: Any, label: str) -> optax.contrib.MuonDimensionNumbers | None:
        kernel = label == "matrices" and layer_axes(path, x) == 2
        return optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1) if kernel else None

    return jax.tree_util.tree_map_with_path(of, params, parameter_labels(params))


def init_state(params: Any, optimizer: Transformation) -> TrainState:
    """Wrap parameters with a fresh optimizer state; where they lie on a mesh, so does it.

    >>> state = init_state({"w": jnp.ones(3)}, adamw(0.1, updates=1))
    >>> int(state.updates), bool(state.healthy)
    (0, True)
    """

    def fresh(params: Any) -> tuple[Any, jax.Array, jax.Array]:
        return optimizer.init(params), jnp.zeros((), jnp.int32), jnp.ones((), bool)

    return TrainState(params, *init_sharded(fresh, params, mesh=mesh_of(params)))


def revived(state: TrainState) -> TrainState:
    """Let a restored state learn again, after a number that was not finite had stopped it.

    >>> state = init_state(jnp.float32(1.0), adamw(0.1, updates=1))._replace(healthy=jnp.array(False))
    >>> bool(revived(state).healthy)
    True
    """
    return state._replace(healthy=state.healthy | True)  # not a new array: laid out as the old one


def accumulate(loss_fn: LossFn, params: Any, batch: Any, weight: jax.Array, microbatches: int) -> tuple[Any, Metrics]:
    """Compute the gradient of a mean over a whole batch, one microbatch at a time.

    grad = sum_m (W_m / W) grad_m, with W_m the sum of `weight` over microbatch m: where the loss is a mean over tokens and
    the weight counts each row's tokens, this is the gradient of the mean over the tokens of all microbatches, however
    unevenly they are spread. (With `reduce="sequence_mean"` or `"sequence_sum"`, give each row weight 1.)

    Args:
        loss_fn: (params, batch) -> loss, metrics, all means over the batch they are given.
        params: differentiated.
        batch: a tree of arrays [B, ...].
        weight: [B] what each row counts in the mean.
        microbatches: how many; divides B.

    Returns:
        The gradient, and the metrics with "loss" among them, as means over the whole batch: floats, summed in float32 at least.

    Raises:
        ValueError: B does not divide into so many microbatches.

    >>> loss = lambda w, x: (jnp.mean(w * x), {})
    >>> grad, metrics = accumulate(loss, jnp.float32(2.0), jnp.arange(4.0), jnp.ones(4), microbatches=2)
    >>> float(grad), float(metrics["loss"])
    (1.5, 3.0)
    """
    rows = weight.shape[0]
    check_whole("microbatches", microbatches, 1)
    if rows % microbatches:
        raise ValueError(f"{rows} rows do not divide into {microbatches} microbatches")
    part = _share_of(loss_fn, params, weight.sum())
    check_batch(ambient_mesh(), rows // microbatches, "each microbatch")
    if microbatches == 1:
        return _narrowed(params, *part(*constrain_batch((batch, weight))))
    split = jax.tree.map(lambda x: x.reshape(microbatches, rows // microbatches, *x.shape[1:]), (batch, weight))
    split = jax.tree.map(lambda x: constrain(x, None, "batch"), split)  # each part on all devices
    zeros = _zeros_of(part, batch, weight)
    summed = jax.lax.scan(lambda total, xs: (jax.tree.map(jnp.add, total, part(*xs)), None), zeros, split)[0]
    return _narrowed(params, *summed)


def accumulate_steps(
    loss_fn: LossFn, params: Any, take: Callable[[jax.Array], tuple[Any, jax.Array]], total: jax.Array, steps: jax.Array
) -> tuple[Any, Metrics]:
    """Compute the gradient of a mean over a whole batch in a number of steps that need not be known when it is compiled.

    grad = sum_m (W_m / W) grad_m, as of `accumulate`.

    Args:
        loss_fn, params: as of `accumulate`.
        take: number of a step -> what of the batch its loss is of, and what each row of that counts in the mean.
        total: W, what all of them count.
        steps: [] int32.

    Returns:
        As `accumulate`.

    >>> loss, x = lambda w, x: (jnp.mean(w * x), {}), jnp.arange(4.0)
    >>> take = lambda i: (jax.lax.dynamic_slice_in_dim(x, 2 * i, 2), jnp.ones(2))
    >>> grad, metrics = accumulate_steps(loss, jnp.float32(2.0), take, jnp.float32(4), jnp.int32(2))
    >>> float(grad), float(metrics["loss"])
    (1.5, 3.0)
    """
    part = _share_of(loss_fn, params, total)
    zeros = _zeros_of(lambda: part(*take(jnp.int32(0))))
    add = lambda number, summed: jax.tree.map(jnp.add, summed, part(*take(number)))
    return _narrowed(params, *jax.lax.fori_loop(0, steps, add, zeros))


def _share_of(loss_fn: LossFn, params: Any, total: jax.Array) -> Callable[[Any, jax.Array], tuple[Any, Metrics]]:
    """Make the function that gives a part's share of the gradient and of the metrics, of a batch that counts `total`."""
    weights = total.astype(jnp.float32)
    total = jnp.where(weights > 0, weights, 1.0)  # where nothing counts, the gradient is 0

    def part(batch: Any, weight: jax.Array) -> tuple[Any, Metrics]:
        (loss, metrics), grad = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        share = weight.sum().astype(jnp.float32) / total
        found = constrain_params(grad), {"loss": loss, **metrics}
        return jax.tree.map(lambda x: as_float(x) * share.astype(as_float(x).dtype), found)

    return part


def _zeros_of(function: Callable[..., Any], *args: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args))


def _narrowed(params: Any, grad: Any, metrics: Metrics) -> tuple[Any, Metrics]:
    return jax.tree.map(lambda x, of: x.astype(of.dtype), grad, params), metrics


def apply_gradient(
    state: TrainState, grad: Any, loss: jax.Array, optimizer: Transformation, counts: jax.Array | bool = True
) -> tuple[TrainState, Metrics]:
    """Take an optimizer step, unless the loss or the gradient is not finite, now or earlier.

    Args:
        state: before the step.
        grad: like `state.params`.
        loss: [] checked for being finite.
        optimizer: the one that made `state.opt_state`.
        counts: [] whether there was anything to learn from; where not, the state stays as it is, moments and all.

    Returns:
        The state after the step (the same parameters, with healthy=False, when something was not finite), and
        {"train/grad_norm", "train/healthy"}, and "lr" where the optimizer tells its rate.

    >>> optimizer = adamw(0.1, updates=1)
    >>> state = init_state(jnp.float32(1.0), optimizer)
    >>> state, metrics = apply_gradient(state, jnp.float32(jnp.nan), jnp.float32(0.0), optimizer)
    >>> float(state.params), bool(state.healthy)
    (1.0, False)
    """
    norm = optax.global_norm(grad)
    healthy = state.healthy & jnp.isfinite(norm) & jnp.isfinite(loss)
    step = optax.with_extra_args_support(optimizer).update  # some want the loss
    with jax.numpy_dtype_promotion("standard"):  # optax raises a Python float to the power of its int32 count
        updates, opt_state = step(grad, state.opt_state, state.params, value=loss)
    params = optax.apply_updates(state.params, updates)
    stepped = TrainState(params, opt_state, state.updates + 1, healthy)
    taken = healthy if counts is True else healthy & counts
    kept = jax.tree.map(lambda new, old: jnp.where(taken, new, old), stepped, state._replace(healthy=healthy))
    kept = constrain_params(kept)  # laid out as the state that came in, whose memory it takes
    metrics = {"train/grad_norm": norm, "train/healthy": healthy}
    if isinstance(optimizer, Optimizer):  # a plain optax transformation does not tell its rate
        metrics["lr"] = jnp.asarray(optimizer.learning_rate(state.updates), jnp.float32)
    return kept, metrics


@functools.partial(jax.jit, static_argnames=("rows", "count", "group_size"))
def minibatches(key: jax.Array, rows: int, count: int, group_size: int = 1) -> jax.Array:
    """Shuffle row numbers into `count` equal minibatches, rows of one group together: [count, rows / count] int32.

    >>> minibatches(jax.random.key(0), 6, 3).shape
    (3, 2)
    >>> minibatches(jax.random.key(0), 6, 1, group_size=2).tolist()
    [[0, 1, 2, 3, 4, 5]]
    """
    if count < 1 or group_size < 1 or rows % (count * group_size):
        groups = f" of whole groups of {group_size}" if group_size > 1 else ""
        raise ValueError(f"{rows} rows do not divide into {count} minibatches{groups}")
    order = jax.random.permutation(key, rows // group_size)[:, None] * group_size + jnp.arange(group_size)[None, :]
    return order.reshape(count, rows // count)
