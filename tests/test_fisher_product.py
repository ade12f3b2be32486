"""The Fisher product against the matrix written out in NumPy, the Hessian of the KL, and jvp and vjp as they are written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from pgjax.core.kl import categorical_kl
from pgjax.core.logprobs import token_frame, token_logprobs
from pgjax.core.losses import clipped_surrogate_loss
from pgjax.core.masking import masked_mean
from pgjax.core.trust_region import fisher_vector_product, trust_region_step
from tests import tiny
from tests.compare import assert_close, assert_same_bits
from tests.sizes import campaign_but_for
from tests.tanh_policy import (
    LENGTH,
    MASK,
    OLD,
    VOCAB,
    draw,
    fisher_matrix,
    logits_of,
    product,
    surrogate,
)


def matrix_of(params, batch):
    flat, unravel = ravel_pytree(params)
    return jax.vmap(lambda v: ravel_pytree(product(params, unravel(v), batch))[0])(jnp.eye(flat.size, dtype=flat.dtype))


@pytest.mark.parametrize("mask", [MASK, None, MASK[::-1]], ids=["ragged", "none", "turned"])
def test_the_product_is_that_of_the_explicit_matrix(mask):
    with jax.enable_x64(True):
        params, batch = draw(0, np.float64)
        found = np.asarray(matrix_of(params, batch | {"mask": mask}))
        exact = fisher_matrix(params, batch, np.ones_like(MASK) if mask is None else mask)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, exact, atol=1e-13)
    np.testing.assert_allclose(found, found.T, atol=1e-13)
    assert np.linalg.eigvalsh(found).min() > -1e-13 and np.linalg.eigvalsh(found).max() > 0.1


@pytest.mark.campaign
def test_it_is_the_hessian_of_either_kl():
    with jax.enable_x64(True):
        params, batch = draw(1, np.float64)
        flat, unravel = ravel_pytree(params)
        old = logits_of(params, batch)

        def from_old(v):
            new, logp = jax.nn.log_softmax(logits_of(unravel(v), batch)), jax.nn.log_softmax(old)
            return masked_mean(token_frame(jnp.sum(jnp.exp(logp) * (logp - new), axis=-1)), MASK)

        def from_new(v):
            return masked_mean(categorical_kl(logits_of(unravel(v), batch), old), MASK)

        found = matrix_of(params, batch)
        for kl in (from_old, from_new):
            np.testing.assert_allclose(found, jax.jit(jax.hessian(kl))(flat), atol=1e-12)


@pytest.mark.campaign
def test_float32_agrees_with_float64():
    params, batch = draw(0)
    with jax.enable_x64(True):
        exact = fisher_matrix(*draw(0, np.float64), MASK)
    np.testing.assert_allclose(matrix_of(params, batch), exact, atol=1e-6)


def test_garbage_under_the_mask_stays_there():
    params, batch = draw(2)
    predicts = np.roll(MASK, -1, axis=1) & (np.arange(LENGTH) < LENGTH - 1)  # positions of the tokens inside
    garbage = jnp.where(jnp.asarray(predicts)[..., None], 0.0, jnp.nan)

    def dirty(p):
        return logits_of(p, batch) + garbage

    found = jax.jit(lambda p: fisher_vector_product(dirty, p, p, MASK))(params)
    assert_close(found, product(params, params, batch), rtol=1e-6, atol=1e-7)
    moved, info = jax.jit(lambda p: trust_region_step(lambda p: surrogate(p, OLD, batch), dirty, p, MASK))(params)
    assert info["accepted"] == 1 and all(np.isfinite(x).all() for x in jax.tree.leaves((moved, info)))
    inside = jax.jit(lambda p: fisher_vector_product(lambda p: logits_of(p, batch) + jnp.nan, p, p, MASK))(params)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(inside))  # inside the mask it is not passed over


def test_a_forbidden_token_counts_for_nothing():
    params, batch = draw(3)
    barred = jnp.where(jnp.arange(VOCAB) == 2, -jnp.inf, 0.0)[None, None]
    found = fisher_vector_product(lambda p: logits_of(p, batch) + barred, params, params, MASK)
    keep = np.array([0, 1, 3, 4, 5])
    assert_close(
        found, fisher_vector_product(lambda p: logits_of(p, batch)[..., keep], params, params, MASK), 2e-6, rtol=2e-5
    )


def test_an_empty_mask_has_no_curvature_and_no_step():
    params, batch = draw(4)
    assert all((x == 0).all() for x in jax.tree.leaves(product(params, params, batch | {"mask": 0 * MASK})))
    loss = lambda p: surrogate(p, OLD, batch)
    moved, info = jax.jit(lambda p: trust_region_step(loss, lambda p: logits_of(p, batch), p, 0 * MASK))(params)
    assert info["accepted"] == 0
    assert_same_bits(moved, params)


def test_shapes_that_do_not_fit_are_refused():
    params, batch = draw(0)
    with pytest.raises(AssertionError):
        fisher_vector_product(lambda p: logits_of(p, batch)[0], params, params)
    with pytest.raises(AssertionError):
        product(params, params, batch | {"mask": MASK[:, 1:]})
    with pytest.raises(AssertionError):
        product(params, params | {"b": params["b"][:2]}, batch)


@pytest.mark.campaign
def test_parameters_of_mixed_types_keep_them():
    params, batch = draw(5)
    mixed = params | {"b": params["b"].astype(jnp.bfloat16)}

    def widened(p):
        return p | {"b": p["b"].astype(jnp.float32)}

    def logits_fn(p):
        return logits_of(widened(p), batch)

    found = jax.jit(lambda p: fisher_vector_product(logits_fn, p, params, MASK))(mixed)
    assert found["b"].dtype == jnp.bfloat16 and found["w"].dtype == jnp.float32
    assert_close(widened(found), product(widened(mixed), params, batch), rtol=0.02, atol=2e-3)
    loss = lambda p: surrogate(widened(p), OLD, batch)
    moved, info = jax.jit(lambda p: trust_region_step(loss, logits_fn, p, MASK))(mixed)
    assert info["accepted"] == 1 and moved["b"].dtype == jnp.bfloat16


@pytest.mark.campaign
@pytest.mark.parametrize("dtype", campaign_but_for(["float32", "bfloat16"], "bfloat16"))
def test_a_language_model_takes_a_step(dtype):
    # The bfloat16 model's products have a custom_vjp and so no forward mode.
    lm, params = tiny.tiny_lm("llama", dtype), tiny.tiny_params("llama")
    tokens, attention_mask = tiny.left_padded([6, 3], 6)
    mask = attention_mask & (np.arange(6) > 3)
    advantages = np.random.default_rng(0).standard_normal(mask.shape).astype(np.float32)

    def logprobs(p):
        return token_logprobs(lm.apply(p, tokens, attention_mask), tokens)

    @jax.jit
    def both(params):
        def logits_fn(p):
            return lm.apply(p, tokens, attention_mask)

        def loss_fn(p):
            return clipped_surrogate_loss(logprobs(p), old, advantages, mask, clip_eps=jnp.inf)

        old = logprobs(params)
        vector = fisher_vector_product(logits_fn, params, params, mask)
        return vector, trust_region_step(loss_fn, logits_fn, params, mask, max_kl=0.01)

    found, (moved, info) = both(params)
    assert info["accepted"] == 1 and 0.001 < info["kl"] <= np.float32(0.01) and info["loss_after"] < info["loss_before"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(moved))
    exact = literal_product(tiny.tiny_lm("llama"), params, tokens, attention_mask, mask)
    error, size = (ravel_pytree(jax.tree.map(f, found, exact))[0] for f in (lambda x, y: x - y, lambda x, y: y))
    assert jnp.linalg.norm(error) < {"float32": 1e-5, "bfloat16": 0.1}[dtype] * jnp.linalg.norm(size)


@functools.partial(jax.jit, static_argnums=0)
def literal_product(lm, params, tokens, attention_mask, mask):
    """J^T (diag(p) - p p^T) J params by jvp and vjp as they are written."""

    def framed(p):
        return token_frame(lm.apply(p, tokens, attention_mask))

    logits, tangent = jax.jvp(framed, (params,), (params,))
    p, weights = jax.nn.softmax(logits), mask.astype(jnp.float32) / mask.sum(dtype=jnp.float32)
    cotangent = p * tangent - p * jnp.sum(p * tangent, axis=-1, keepdims=True)
    return jax.vjp(framed, params)[1](cotangent * weights[..., None])[0]
