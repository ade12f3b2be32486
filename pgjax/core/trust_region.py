"""TRPO: a natural-gradient step under a bound on the exact KL(old || new), the constraint that PPO's clip replaced.

The policy may be any pure function from a parameter tree to logits, such as `lambda params: lm.apply(params, tokens)`.
"""

from collections.abc import Callable
from typing import TypeVar

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pgjax.core.checks import check_number
from pgjax.core.kl import categorical_kl
from pgjax.core.logprobs import shifted_logits, token_frame
from pgjax.core.masking import AxisName, as_float, as_floats, as_mask, global_sum, masked_mean

_Tree = TypeVar("_Tree")
_Solver = tuple[_Tree, _Tree, _Tree, jax.Array, jax.Array]  # see `_solved`
_Search = tuple[jax.Array, jax.Array, _Tree, jax.Array, jax.Array, jax.Array]  # see `_line_search`


def _varying(tree: _Tree, axis_name: AxisName) -> _Tree:
    # In shard_map, JAX itself sums the gradient with respect to replicated parameters over the devices; in pmap and vmap it
    # does not. With respect to parameters that vary over the devices, the gradient is each device's own contribution in all
    # three, and one psum adds them up.
    if axis_name is None:
        return tree
    zero = 0 * jax.lax.axis_index(axis_name)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def _replicated(tree: _Tree, axis_name: AxisName) -> _Tree:
    # A mean over copies that are equal: its result counts as replicated in shard_map.
    return tree if axis_name is None else jax.lax.pmean(_varying(tree, axis_name), axis_name)


def _floats(tree: _Tree) -> _Tree:
    # One dtype for all leaves, float32 or wider, because the solver sums products over all of them.
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, as_floats(*leaves))


def _check_floats(params: _Tree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            name = f"params{jax.tree_util.keystr(path)}"
            raise ValueError(f"{name} must be of a floating type, got {jnp.result_type(leaf)}: leave it out of params")


def _dot(x: _Tree, y: _Tree) -> jax.Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda a, b: jnp.sum(a * b), x, y))


def _plus(x: _Tree, scale: ArrayLike, y: _Tree) -> _Tree:
    """Compute x + scale * y in the dtypes of x."""
    return jax.tree.map(lambda a, b: a + (jnp.asarray(scale).astype(b.dtype) * b).astype(a.dtype), x, y)


def _position_weights(mask: ArrayLike | None, normalizer: jax.Array, axis_name: AxisName) -> jax.Array:
    """Return the weight in the mean of the token that each position predicts: [B, T], 0 at the last position."""
    inside = as_mask(mask, normalizer).astype(normalizer.dtype)
    count = global_sum(inside, axis_name)
    share = inside / jnp.maximum(count, 1.0)
    (weights,) = jax.linear_transpose(token_frame, share)(share)
    return weights


def _fisher(
    logits_fn: Callable[[_Tree], jax.Array], params: _Tree, mask: ArrayLike | None, axis_name: AxisName
) -> tuple[jax.Array, Callable[[_Tree], _Tree]]:
    """Run the model forward once; return its logits, and a function that multiplies float32 trees by the Fisher matrix."""
    _check_floats(params)
    varying = _varying(params, axis_name)
    logits, pull = jax.vjp(logits_fn, varying)
    chex.assert_rank(logits, 3)
    # The transpose of the vjp is the jvp. It reuses the saved activations, and it exists where forward mode does not: for
    # functions with a hand-written backward pass (jax.custom_vjp), such as the matrix products of a bfloat16 CausalLM.
    push = jax.linear_transpose(pull, logits)
    z, usable = shifted_logits(as_float(logits))
    normalizer = jnp.sum(jnp.exp(z), axis=-1)
    weights = _position_weights(mask, normalizer, axis_name)[..., None]
    known = usable[..., None] | (weights == 0)
    p = jnp.exp(z) / normalizer[..., None]

    def product(vector: _Tree) -> _Tree:
        tangent = jax.tree.map(lambda v, x: v.astype(x.dtype), vector, params)
        (moved,) = push((_varying(tangent, axis_name),))
        moved = moved.astype(p.dtype)
        curved = weights * p * (moved - jnp.sum(p * moved, axis=-1, keepdims=True))
        curved = jnp.where(known, curved, jnp.nan)
        found = _floats(pull(curved.astype(logits.dtype))[0])
        return found if axis_name is None else jax.lax.psum(found, axis_name)

    return logits, product


def fisher_vector_product(
    logits_fn: Callable[[_Tree], jax.Array],
    params: _Tree,
    vector: _Tree,
    mask: ArrayLike | None = None,
    *,
    axis_name: AxisName = None,
) -> _Tree:
    """Multiply the Fisher matrix of the policy by a vector, never forming the matrix.

    F v = mean_t J_t^T (diag(p_t) - p_t p_t^T) J_t v, with J_t = d logits[:, t - 1] / d params and p_t the softmax of those
    logits. F is the Hessian of mean_t KL(old || new) at new = old, and also E[g g^T] with g = grad log p_t(a) and a drawn
    from p_t. It is exact: the sum runs over the vocabulary, not over sampled tokens. Schulman et al. (2015), "Trust Region
    Policy Optimization", appendix C; Pearlmutter (1994), "Fast Exact Multiplication by the Hessian".

    A product is a jvp (J v, computed as the transpose of the vjp), then a vjp. So `logits_fn` needs reverse mode only. It
    may use `jax.custom_vjp` if JAX can transpose the operations by which its backward pass depends on the cotangent.

    Args:
      logits_fn: params -> logits [B, T, V] of any floating type, on a batch that it closes over; divided by the
        sampler's temperature if that is not 1. -inf is fine (a forbidden token).
      params: any tree of floating arrays, of any dtypes; replicated over `axis_name`.
      vector: a tree like `params`.
      mask: [B, T] boolean in the token frame. True at t includes the distribution that `tokens[:, t]` was drawn from, at
        position t - 1 of the logits. Entry 0, which no position predicts, adds 0 to the sum and 1 to the count. None
        counts every entry. Logits of NaN outside the mask change nothing; inside it the product is NaN.
      axis_name: mapped axis or axes that split B, inside `shard_map` or `pmap`.

    Returns:
      A tree like `params`, in its dtypes: nats per squared unit of `params`, times the unit of `vector`.

    Raises:
      ValueError: a parameter is not of a floating type.
      AssertionError: the logits are not of rank 3, the mask is not [B, T], or the trees differ.

    Example:
      >>> import jax.numpy as jnp
      >>> logits_fn = lambda row: jnp.stack([row, row])[None]  # [1, 2, 3]: the second row predicts nothing
      >>> print(fisher_vector_product(logits_fn, jnp.zeros(3), jnp.array([9.0, 0.0, 0.0]), jnp.array([[False, True]])))
      [ 2. -1. -1.]
    """
    chex.assert_trees_all_equal_shapes(params, vector)
    found = _fisher(logits_fn, params, mask, axis_name)[1](vector)
    return jax.tree.map(lambda f, x: f.astype(x.dtype), found, params)


def _solved(product: Callable[[_Tree], _Tree], wanted: _Tree, iterations: ArrayLike) -> _Tree:
    """Solve product(x) = wanted by conjugate gradients from x = 0, until the residual is 1e-5 of what it was."""
    # Of jax's own solver the inner products have no layout on a mesh with Explicit axes, where those of parameters are split.

    def unsolved(state: _Solver[_Tree]) -> jax.Array:
        *_, square, count = state
        return (square > enough) & (count < iterations)

    def step(state: _Solver[_Tree]) -> _Solver[_Tree]:
        x, residual, along, square, count = state
        curved = product(along)
        length = square / _dot(along, curved)
        x, residual = _plus(x, length, along), _plus(residual, -length, curved)
        left = _dot(residual, residual)
        return x, residual, _plus(residual, left / square, along), left, count + 1

    square = _dot(wanted, wanted)
    enough = 1e-10 * square
    start = (jax.tree.map(jnp.zeros_like, wanted), wanted, wanted, square, jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(unsolved, step, start)[0]


def _natural_step(
    fisher: Callable[[_Tree], _Tree],
    gradient: _Tree,
    max_kl: ArrayLike,
    damping: ArrayLike,
    cg_iterations: int,
    axis_name: AxisName,
) -> tuple[_Tree, jax.Array]:
    """Solve for the natural gradient and scale it to the bound; return the step and the solver's relative residual."""
    # In shard_map, everything that the solver handles must vary over the devices, or the types of its loop don't agree.
    downhill, varying_damping = _varying((jax.tree.map(jnp.negative, gradient), as_float(damping)), axis_name)
    damped = lambda v: _varying(_plus(fisher(v), varying_damping, v), axis_name)
    direction = _replicated(_solved(damped, downhill, cg_iterations), axis_name)
    curved = fisher(direction)
    curvature = _dot(direction, curved)
    # If the curvature is 0 (a gradient of 0), the step is NaN, and the line search takes no step.
    scale = jnp.sqrt(2.0 * jnp.asarray(max_kl, curvature.dtype) / curvature)
    left = _plus(_plus(curved, damping, direction), 1.0, gradient)
    size = jnp.sqrt(_dot(gradient, gradient))
    residual = jnp.sqrt(_dot(left, left)) / jnp.where(size > 0, size, 1.0)
    return jax.tree.map(lambda x: scale * x, direction), residual


def _line_search(
    measure: Callable[[_Tree], tuple[jax.Array, jax.Array]],
    params: _Tree,
    step: _Tree,
    loss_before: jax.Array,
    descends: jax.Array,
    *,
    max_kl: ArrayLike,
    backtracks: ArrayLike,
    shrink: ArrayLike,
) -> _Search[_Tree]:
    """Shorten the step until it meets the bound and lowers the loss: (backtracks, fraction, params, kl, loss, accepted)."""

    def searching(state: _Search[_Tree]) -> jax.Array:
        count, *_, accepted = state
        return descends & ~accepted & (count <= backtracks)

    def attempt(state: _Search[_Tree]) -> _Search[_Tree]:
        count, fraction, *_ = state
        trial = _plus(params, fraction, step)
        kl, loss = measure(trial)
        # False if either is NaN.
        accepted = (kl <= max_kl) & (loss < loss_before)
        shorter = jnp.where(accepted, fraction, fraction * jnp.asarray(shrink, fraction.dtype))
        return jnp.where(accepted, count, count + 1), shorter, trial, kl, loss, accepted

    zero = jnp.zeros((), jnp.float32)
    start = (jnp.zeros((), jnp.int32), zero + 1, params, zero, loss_before, jnp.zeros((), bool))
    count, fraction, trial, kl, loss, accepted = jax.lax.while_loop(searching, attempt, start)
    kept = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), trial, params)
    fraction, kl = jnp.where(accepted, fraction, zero), jnp.where(accepted, kl, zero)
    return jnp.minimum(count, backtracks), fraction, kept, kl, jnp.where(accepted, loss, loss_before), accepted


def trust_region_step(
    loss_fn: Callable[[_Tree], jax.Array],
    logits_fn: Callable[[_Tree], jax.Array],
    params: _Tree,
    mask: ArrayLike | None = None,
    *,
    max_kl: ArrayLike = 0.01,
    damping: ArrayLike = 0.01,
    cg_iterations: int = 10,
    backtracks: int = 10,
    shrink: ArrayLike = 0.5,
    axis_name: AxisName = None,
) -> tuple[_Tree, dict[str, jax.Array]]:
    """Take one step of TRPO: along minus the natural gradient, as far as the bound on the KL allows.

    x = -(F + damping I)^-1 grad L by conjugate gradients; step = sqrt(2 max_kl / x^T F x) x. The step taken is the first of
    step, shrink step, shrink^2 step, ... with mean_t KL(old || new) <= max_kl, exact over the vocabulary, and
    L(new) < L(old). If there is none, if the gradient is 0 or if anything is NaN, `params` are returned bit for bit.
    Schulman et al. (2015), "Trust Region Policy Optimization", appendix C.

    L is typically `clipped_surrogate_loss(..., clip_eps=jnp.inf)`, the unclipped ratio times the advantage. Parameters that
    change L but not the logits (a value head) need a step of their own: F is 0 there.

    Args:
      loss_fn: params -> [], the loss to minimise. With `axis_name` it must be the global batch's: pass `axis_name` to it too.
      logits_fn: params -> logits [B, T, V], as in `fisher_vector_product`.
      params: any tree of floating arrays, of any dtypes; replicated over `axis_name`. On a mesh they and the logits may be split
        as `logits_fn` has them; where its axes are Explicit, all have to lie on it (`jax.device_put`).
      mask: [B, T] boolean in the token frame, the tokens that F and the KL are averaged over; None counts every entry.
      max_kl: [] above 0, nats per token.
      damping: [] not below 0, in the unit of F. With 0, a singular F can give a wrong direction, which the line search rejects.
      cg_iterations: at least 1, the products with F that the solver may use; one more product gives x^T F x.
      backtracks: not below 0, how many times the step may be shortened; each attempt costs a forward pass and a loss.
      shrink: [] between 0 and 1.
      axis_name: mapped axis or axes that split B, inside `shard_map` or `pmap`.

    Returns:
      The new parameters and a dict of [] float32: kl (of the step taken, nats per token), loss_before, loss_after,
      expected_improvement (-grad L . step, of the step taken), step_scale (shrink^backtracks, 0 if no step was taken),
      backtracks, accepted (1 or 0), cg_residual (|(F + damping I) x + grad L| / |grad L|).

    Raises:
      ValueError: a number is out of its range, or a parameter is not of a floating type.
      AssertionError: the logits are not of rank 3, or the mask is not [B, T].

    Example:
      >>> import jax.numpy as jnp
      >>> logits_fn = lambda row: jnp.stack([row, row])[None]
      >>> loss_fn = lambda row: -jax.nn.softmax(row)[0]
      >>> row, info = trust_region_step(loss_fn, logits_fn, jnp.zeros(3), jnp.array([[False, True]]), max_kl=0.01)
      >>> print(info["accepted"], info["kl"] <= 0.01, info["loss_after"] < info["loss_before"])
      1.0 True True
    """
    check_number("max_kl", max_kl, 0, jnp.inf, strict=True)
    check_number("damping", damping, 0, jnp.inf)
    check_number("cg_iterations", cg_iterations, 1, jnp.inf)
    check_number("backtracks", backtracks, 0, jnp.inf)
    check_number("shrink", shrink, 0, 1, strict=True)
    _check_floats(params)
    loss_before, gradient = jax.value_and_grad(loss_fn)(params)
    # In pmap the devices' gradients differ, and their mean is the global gradient (see `masking.masked_mean`).
    gradient = _replicated(_floats(gradient), axis_name)
    logits, fisher = _fisher(logits_fn, params, mask, axis_name)
    step, residual = _natural_step(fisher, gradient, max_kl, damping, cg_iterations, axis_name)
    expected = -_dot(gradient, step)

    def measure(trial: _Tree) -> tuple[jax.Array, jax.Array]:
        kl = categorical_kl(logits, logits_fn(trial))
        return masked_mean(kl, mask, axis_name=axis_name), loss_fn(trial)

    options = {"max_kl": max_kl, "backtracks": backtracks, "shrink": shrink}
    count, fraction, params, kl, loss, accepted = _line_search(
        measure, params, step, loss_before, expected > 0, **options
    )
    found = {
        "kl": kl,
        "loss_before": loss_before,
        "loss_after": loss,
        "expected_improvement": jnp.where(accepted, fraction.astype(expected.dtype) * expected, 0.0),
        "step_scale": fraction,
        "backtracks": count,
        "accepted": accepted,
        "cg_residual": residual,
    }
    return params, {name: x.astype(jnp.float32) for name, x in found.items()}
