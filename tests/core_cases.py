"""A call of each public function of the core, and the transformations that each has to stand: `transform_table` prints both."""

import inspect
from collections.abc import Mapping
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pgjax as pg

ROWS, LENGTH, VOCAB, WIDTH = 8, 5, 6, 3
PARTS = 4  # of the rows, one a device
_RNG = np.random.default_rng(0)


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(_RNG.standard_normal(shape), jnp.float32)


BATCH = {
    "theta": _normal(VOCAB, WIDTH),
    "kl": jnp.asarray(7.5, jnp.float32),
    "hidden": _normal(ROWS, LENGTH, WIDTH),
    "logits": _normal(ROWS, LENGTH, VOCAB),
    "ref_logits": _normal(ROWS, LENGTH, VOCAB),
    "tokens": jnp.asarray(_RNG.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32),
    "logprobs": _normal(ROWS, LENGTH) * 0.5 - 2,
    "old": _normal(ROWS, LENGTH) * 0.5 - 2,
    "ref": _normal(ROWS, LENGTH) * 0.5 - 2,
    "values": _normal(ROWS, LENGTH),
    "scores": _normal(ROWS),
    "others": _normal(ROWS),
    "rewards": _normal(ROWS, 2),
    "lengths": jnp.asarray([5, 5, 1, 2, 1, 3, 4, 2], jnp.int32),
    # As uneven as it gets: two of the four devices hold almost everything, one holds nothing.
    "mask": jnp.asarray(np.arange(LENGTH)[None] < np.array([5, 5, 0, 0, 1, 0, 4, 2])[:, None]),
}
WHOLE = ("theta", "kl")  # the same on every device


class Case(NamedTuple):
    """A call: the inputs' names in `BATCH`, in order, and keywords."""

    inputs: str
    options: Mapping[str, Any] = MappingProxyType({})
    reduces: bool = False  # to what all devices share; else row by row
    no_gradient: str = ""  # why, where there is none


def _logits_fn(hidden: jax.Array):
    return lambda theta: jnp.einsum("btd,vd->btv", hidden, theta)


def _fisher_vector_product(theta, hidden, mask, axis_name=None):
    return pg.fisher_vector_product(_logits_fn(hidden), theta, 0.5 + theta, mask, axis_name=axis_name)


def _trust_region_step(theta, hidden, tokens, values, mask, axis_name=None):
    def loss_fn(theta):
        logprobs = pg.token_logprobs(_logits_fn(hidden)(theta), tokens)
        return pg.policy_gradient_loss(logprobs, values, mask, axis_name=axis_name)

    return pg.trust_region_step(loss_fn, _logits_fn(hidden), theta, mask, cg_iterations=3, axis_name=axis_name)


def _finished_mask(tokens, mask):
    return pg.finished_mask(tokens, mask, eos_ids=(1, 2))


def _adaptive_kl_coef(kl):
    return pg.adaptive_kl_coef(0.1, kl, target=6.0, horizon=100, batch_size=8)


def _clip_cov_loss(logprobs, old, values, mask, axis_name=None):
    # All candidates are left out: which of them the draw takes differs between layouts.
    options = {"low": 0.1, "fraction": 1.0, "axis_name": axis_name}
    return pg.clip_cov_loss(logprobs, old, values, mask, key=jax.random.key(0), **options)


_CALLS = {
    "fisher_vector_product": _fisher_vector_product,
    "trust_region_step": _trust_region_step,
    "finished_mask": _finished_mask,
    "adaptive_kl_coef": _adaptive_kl_coef,
    "clip_cov_loss": _clip_cov_loss,
}
_BOOLEAN = "boolean"
_SURROGATE, _GROUP, _CHUNK = "logprobs old values mask", {"group_size": 2}, {"temperature": 0.7, "chunk_size": 4}

CASES = {
    "group_advantages": Case("scores", _GROUP),
    "kl_shaped_rewards": Case("scores old mask", {"kl_coef": 0.1}),
    "leave_one_out_baseline": Case("scores", _GROUP),
    "monte_carlo_advantages": Case("values old mask", {"discount": 0.9}),
    "monte_carlo_returns": Case("values mask", {"discount": 0.9}),
    "place_scores": Case("scores mask"),
    "clip_cov_loss": Case(_SURROGATE, reduces=True),
    "high_covariance_mask": Case("logprobs values mask", {"fraction": 0.3}, no_gradient=_BOOLEAN),
    "kl_cov_loss": Case(_SURROGATE, {"fraction": 0.3}, reduces=True),
    "a3po_logprobs": Case("logprobs old", {"alpha": 0.25}),
    "decoupled_ppo_loss": Case("logprobs ref old values mask", reduces=True),
    "gdpo_advantages": Case("rewards", {"weights": jnp.array([1.0, 0.5]), **_GROUP}),
    "maxrl_advantages": Case("scores", _GROUP),
    "opo_advantages": Case("scores lengths", _GROUP),
    "optimal_token_baseline": Case("values logprobs old mask", _GROUP),
    "overlong_penalty": Case("lengths", {"max_new_tokens": 5, "buffer": 3}),
    "pass_at_k_advantages": Case("scores", _GROUP),
    "reinforce_plus_plus_advantages": Case("scores lengths", _GROUP),
    "icepop_weights": Case("logprobs old mask"),
    "masked_importance_weights": Case("logprobs old mask", {"cap": 2.0, "floor": 0.5}),
    "truncated_importance_weights": Case("logprobs old mask", {"cap": 2.0, "level": "sequence"}),
    "adaptive_kl_coef": Case("kl", reduces=True),
    "categorical_kl": Case("logits ref_logits"),
    "distillation_advantages": Case("ref logprobs mask"),
    "kl_k1": Case("logprobs ref"),
    "kl_k2": Case("logprobs ref"),
    "kl_k3": Case("logprobs ref"),
    "kl_k3_unbiased": Case("logprobs ref old"),
    "linear_token_logprobs": Case("hidden theta tokens", _CHUNK),
    "linear_token_logprobs_and_entropy": Case("hidden theta tokens", _CHUNK),
    "aligned_token_logprobs": Case("logits tokens", {"temperature": 0.7}),
    "token_entropy": Case("logits", {"temperature": 0.7}),
    "token_frame": Case("values"),
    "token_logprobs": Case("logits tokens", {"temperature": 0.7}),
    "clipped_surrogate_loss": Case(_SURROGATE, {"dual_clip": 3.0, "reduce": "sequence_mean"}, reduces=True),
    "cross_entropy_loss": Case("logprobs mask", reduces=True),
    "policy_gradient_loss": Case("logprobs values mask", {"reduce": "sequence_sum"}, reduces=True),
    "preference_loss": Case("scores others", {"margin": 0.1, "center_coef": 0.01}, reduces=True),
    "surrogate_diagnostics": Case("logprobs old mask", reduces=True),
    "value_loss": Case("values ref mask", {"old_values": None}, reduces=True),
    "masked_mean": Case("values mask", reduces=True),
    "masked_whiten": Case("values mask"),
    "astar_po_loss": Case("logprobs ref scores others mask", {"beta": 0.5}, reduces=True),
    "gmpo_loss": Case(_SURROGATE, reduces=True),
    "gspo_loss": Case(_SURROGATE, reduces=True),
    "optimal_values": Case("scores", _GROUP),
    "vespo_loss": Case(_SURROGATE, reduces=True),
    "entropy_quantile_mask": Case("values mask", {"fraction": 0.4}, no_gradient=_BOOLEAN),
    "finished_mask": Case("tokens mask", no_gradient=_BOOLEAN),
    "m2po_mask": Case("logprobs old mask", {"threshold": 0.3}, no_gradient=_BOOLEAN),
    "opsm_mask": Case("logprobs old values mask", {"delta": 0.1}, no_gradient=_BOOLEAN),
    "fisher_vector_product": Case("theta hidden mask", reduces=True),
    "trust_region_step": Case("theta hidden tokens values mask", reduces=True, no_gradient="while loop"),
    "cispo_loss": Case(_SURROGATE, reduces=True),
    "dppo_loss": Case(_SURROGATE, reduces=True),
    "sapo_loss": Case(_SURROGATE, reduces=True),
    "squared_log_ratio_loss": Case(_SURROGATE, reduces=True),
}


def function(name, axis_name=None):
    """Return the call of a case as a function of its inputs; `axis_name` goes to those that take one."""
    call = _CALLS.get(name, getattr(pg, name))
    named = (
        {} if axis_name is None or "axis_name" not in inspect.signature(call).parameters else {"axis_name": axis_name}
    )
    return partial(call, **CASES[name].options, **named)


def inputs(name):
    """Return the inputs of a case."""
    return tuple(BATCH[field] for field in CASES[name].inputs.split())


def found(call, *args, differentiable=True):
    """Return what a call gives, and the gradient of one number made of it by each of its arguments that is not whole numbers."""

    def number(*args):
        given = call(*args)
        return sum(jnp.sum(jnp.sin(x)).astype(jnp.float32) for x in jax.tree.leaves(given)), given

    floats = tuple(i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating))
    if not differentiable or not floats:
        return call(*args), ()
    gradients, given = jax.grad(number, floats, has_aux=True)(*args)
    return given, gradients


def of(name, axis_name=None):
    """Return `found` of a case."""
    return partial(found, function(name, axis_name), differentiable=not CASES[name].no_gradient)


@cache
def eager(name):
    """Return what a case gives without any transformation."""
    return of(name)(*inputs(name))


@cache
def eager_by_part(name):
    """Return what a case gives for each part of the rows by itself, stacked."""
    each = [of(name)(*(x[i] for x in in_parts(name))) for i in range(PARTS)]
    return jax.tree.map(lambda *x: jnp.stack(x), *each)


def in_parts(name):
    """Cut a case's inputs into parts of its rows; the parameters differ between parts."""
    scales = jnp.linspace(0.8, 1.1, PARTS)
    return tuple(
        scales.reshape(-1, *[1] * x.ndim) * x[None] if field in WHOLE else x.reshape(PARTS, -1, *x.shape[1:])
        for field, x in zip(CASES[name].inputs.split(), inputs(name), strict=True)
    )
