"""KL estimators: sign, floor, exactness, garbage; the adaptive coefficient. Placement is in test_mdp_losses.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pgjax.core.kl import adaptive_kl_coef, categorical_kl, kl_k1, kl_k2, kl_k3
from pgjax.core.masking import masked_mean
from tests import core_in_numpy

RNG = np.random.default_rng(0)
LOGPROBS = RNG.standard_normal((3, 4)).astype(np.float32) - 2
REF = RNG.standard_normal((3, 4)).astype(np.float32) - 2
LOGITS, REF_LOGITS = RNG.standard_normal((2, 2, 4, 5)).astype(np.float32) * 2
ESTIMATORS = {
    kl_k1: lambda d: d,
    kl_k2: lambda d: d**2 / 2,
    kl_k3: lambda d: np.exp(-d) - 1 + d,
}


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda f: f.__name__)
def test_sign_and_value(estimator):
    expected = ESTIMATORS[estimator](LOGPROBS.astype(np.float64) - REF)
    np.testing.assert_allclose(estimator(LOGPROBS, REF), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(estimator(LOGPROBS, LOGPROBS), 0)
    assert estimator(jnp.asarray(LOGPROBS, jnp.bfloat16), REF).dtype == jnp.float32


def test_k3_keeps_its_digits_near_zero():
    # exp(-d) - 1 + d in float32 is 0 or negative here.
    d = jnp.float32(1e-4)
    np.testing.assert_allclose(kl_k3(d, jnp.float32(0.0)), 5e-9, rtol=1e-2)
    assert jnp.all(kl_k3(jnp.linspace(-1e-3, 1e-3, 101), jnp.zeros(101)) >= 0)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda f: f.__name__)
def test_the_reference_gets_no_gradient(estimator):
    gradient = jax.grad(lambda r: estimator(jnp.asarray(LOGPROBS), r).sum())(jnp.asarray(REF))
    np.testing.assert_array_equal(gradient, 0)
    check_grads(jax.jit(lambda x: estimator(x, REF)), (jnp.asarray(LOGPROBS),), 1, ["rev"], rtol=1e-2)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, -1e30])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda f: f.__name__)
def test_garbage_does_not_leak_through_a_mask(estimator, garbage):
    mask = np.ones((3, 4), bool)
    mask[1, 2] = False
    dirty = jnp.asarray(np.where(mask, LOGPROBS, np.float32(garbage)))

    def loss(x):
        return masked_mean(estimator(x, REF), mask)

    run = jax.jit(jax.value_and_grad(loss))
    jax.tree.map(np.testing.assert_array_equal, run(dirty), run(LOGPROBS))
    assert not np.isfinite(estimator(dirty, REF)[1, 2]) or garbage == -1e30


def test_categorical_kl_against_numpy_in_the_token_frame():
    kl = categorical_kl(LOGITS, REF_LOGITS)
    np.testing.assert_allclose(kl, core_in_numpy.categorical_kl(LOGITS, REF_LOGITS), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(categorical_kl(LOGITS, LOGITS + 3.0), 0, atol=1e-6)
    half = categorical_kl(jnp.asarray(LOGITS, jnp.bfloat16), REF_LOGITS)
    assert half.dtype == jnp.float32


def test_categorical_kl_is_the_mean_of_k1_and_of_k3():
    logp, logq = core_in_numpy.log_softmax(LOGITS), core_in_numpy.log_softmax(REF_LOGITS)
    exact = np.asarray(categorical_kl(LOGITS, REF_LOGITS))[:, 1:]
    for estimator in (kl_k1, kl_k3):
        mean = (np.exp(logp) * np.asarray(estimator(logp, logq))).sum(-1)
        np.testing.assert_allclose(mean[:, :-1], exact, rtol=1e-4, atol=1e-6)


def test_categorical_kl_of_forbidden_tokens():
    forbidden = jnp.asarray(LOGITS).at[..., 1].set(-jnp.inf)
    both = categorical_kl(forbidden, jnp.asarray(REF_LOGITS).at[..., 1].set(-jnp.inf))
    without = core_in_numpy.categorical_kl(np.delete(LOGITS, 1, -1), np.delete(REF_LOGITS, 1, -1))
    np.testing.assert_allclose(both, without, rtol=1e-4, atol=1e-6)
    assert jnp.all(jnp.isposinf(categorical_kl(LOGITS, forbidden)[:, 1:]))
    gradient = jax.jit(jax.grad(lambda z: categorical_kl(z, REF_LOGITS).sum()))(forbidden)
    assert jnp.all(jnp.isfinite(gradient))


def test_categorical_kl_gradients():
    check_grads(jax.jit(lambda z: categorical_kl(z, REF_LOGITS)), (LOGITS,), 1, ["rev"], rtol=2e-2)
    gradient = jax.grad(lambda r: categorical_kl(jnp.asarray(LOGITS), r).sum())(jnp.asarray(REF_LOGITS))
    np.testing.assert_array_equal(gradient, 0)


def test_a_categorical_kl_of_infinity_outside_the_mask_stays_there():
    mask = np.ones((2, 4), bool)
    mask[0, 2] = False

    def run(ref_logits):
        return jax.jit(jax.value_and_grad(lambda z: masked_mean(categorical_kl(z, ref_logits), mask)))(LOGITS)

    ref_logits = jnp.asarray(REF_LOGITS)
    jax.tree.map(np.testing.assert_array_equal, run(ref_logits.at[0, 1, 2].set(-jnp.inf)), run(ref_logits))


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_categorical_kl_garbage_rows(garbage):
    mask = np.ones((2, 4), bool)
    mask[0, 2] = False
    dirty = jnp.asarray(LOGITS).at[0, 1].set(garbage).at[:, 3].set(garbage)

    def loss(z):
        return masked_mean(categorical_kl(z, jnp.asarray(REF_LOGITS)), mask)

    run = jax.jit(jax.value_and_grad(loss))
    jax.tree.map(np.testing.assert_array_equal, run(dirty), run(LOGITS))


def test_adaptive_coefficient_moves_the_right_way_and_saturates():
    def moved(kl):
        return float(adaptive_kl_coef(0.1, kl, target=6.0, horizon=10_000, batch_size=500))

    assert moved(6.0) == pytest.approx(0.1)
    assert moved(6.6) == pytest.approx(0.1 * (1 + 0.1 * 0.05))
    assert moved(600.0) == pytest.approx(0.1 * (1 + 0.2 * 0.05))
    assert moved(0.0) == moved(-50.0) == pytest.approx(0.1 * (1 - 0.2 * 0.05))


def test_adaptive_coefficient_wants_the_kl_of_sequences_not_of_tokens():
    with pytest.raises(AssertionError):
        adaptive_kl_coef(0.1, jnp.zeros(8), target=6.0, horizon=10_000, batch_size=8)
    coef = jax.jit(adaptive_kl_coef)(0.1, jnp.float32(9), target=6, horizon=10_000, batch_size=jnp.int32(8))
    assert coef.dtype == jnp.float32 and coef.shape == ()
    for bad in ({"target": 0.0, "horizon": 100}, {"target": -1.0, "horizon": 100}, {"target": 6.0, "horizon": 0}):
        with pytest.raises(ValueError, match=r"(target|horizon) must be above 0, got"):
            adaptive_kl_coef(0.1, 9.0, batch_size=8, **bad)


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError):
        kl_k1(LOGPROBS, REF[:1])
    with pytest.raises(AssertionError):
        categorical_kl(LOGITS, REF_LOGITS[:, :2])
