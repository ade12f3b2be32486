"""Means and whitening: masked, and blind to what stands outside the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pgjax.core.masking import masked_mean, masked_whiten
from tests import core_in_numpy

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 5)).astype(np.float32) * 2 + 1
MASK = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
GARBAGE = [np.nan, np.inf, -np.inf, 1e38]


def test_mean_counts_only_the_mask():
    np.testing.assert_allclose(masked_mean(X, MASK), X.astype(np.float64)[MASK].mean(), rtol=1e-6)
    np.testing.assert_allclose(masked_mean(X), X.astype(np.float64).mean(), rtol=1e-6)
    assert masked_mean(jnp.float32(3.0)) == 3.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32, jnp.bool_])
def test_scalars_are_float32_whatever_comes_in(dtype):
    x = jnp.array([1, 0, 1, 1]).astype(dtype)
    mean = masked_mean(x, jnp.array([1.0, 1.0, 1.0, 0.0]))
    assert mean.dtype == jnp.float32 and mean.shape == ()
    np.testing.assert_allclose(mean, 2 / 3, rtol=1e-6)


def test_a_bfloat16_sum_is_taken_in_float32():
    # Summed in bfloat16, 1 + 1 + ... stops at 256.
    assert masked_mean(jnp.ones(1000, jnp.bfloat16)) == 1.0


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, list, lambda x: jnp.asarray(x, jnp.bfloat16)])
def test_a_mask_of_weights_is_refused(kind):
    # The bug: it was rounded to a mask, so that the mean of 1 and 3 by weights 0.75 and 0.25 was 2.
    weights = kind([0.75, 0.25])
    with pytest.raises(ValueError, match=r"mask must hold only 0 and 1, got 0\.75, 0\.25 in 2 of 2 entries"):
        masked_mean([1.0, 3.0], weights)
    with pytest.raises(ValueError, match=r"got 0\.75, 0\.25"):  # a constant of a compiled function
        jax.jit(lambda x: masked_mean(x, weights))(jnp.array([1.0, 3.0]))
    assert masked_mean([1.0, 3.0], kind([0.0, 1.0])) == 3.0


@pytest.mark.parametrize("others", [[2, 0], [np.nan, 1.0], [-1.0, 1.0]])
def test_every_number_but_0_and_1_is_refused(others):
    with pytest.raises(ValueError, match="mask must hold only 0 and 1"):
        masked_whiten(jnp.ones(2), jnp.array(others))
    with pytest.raises(ValueError, match="in 5 of 5 entries"):
        masked_mean(jnp.ones(5), jnp.full(5, 2))


def test_a_traced_mask_of_zeros_and_ones_is_taken_and_a_boolean_one_costs_nothing():
    x, mask = jnp.array([1.0, 3.0]), jnp.array([0, 1])
    assert jax.jit(masked_mean)(x, mask) == 3.0
    assert jax.jit(jax.grad(masked_mean))(x, mask).tolist() == [0.0, 1.0]
    text = str(jax.make_jaxpr(masked_mean)(x, mask > 0))
    assert "callback" not in text and " ne " not in text


def test_an_empty_mask_gives_zero_and_zero_gradient():
    mask = jnp.zeros((3, 5), bool)
    value, gradient = jax.value_and_grad(lambda x: masked_mean(x, mask) + masked_whiten(x, mask).sum())(X)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_outside_the_mask_stays_there(garbage):
    dirty = np.where(MASK, X, np.float32(garbage))

    def loss(x):
        whitened = masked_whiten(x, MASK)
        return masked_mean(x, MASK) + jnp.sum(whitened * jnp.cos(jnp.where(MASK, x, 0.0)))

    run = jax.jit(jax.value_and_grad(loss))
    (clean_value, clean_gradient), (value, gradient) = run(X), run(dirty)
    assert value == clean_value
    np.testing.assert_array_equal(gradient, clean_gradient)
    np.testing.assert_array_equal(np.asarray(gradient)[~MASK], 0)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_masked(shift_mean):
    whitened = masked_whiten(X, MASK, shift_mean=shift_mean)
    np.testing.assert_allclose(whitened, core_in_numpy.whiten(X, MASK, shift_mean), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(whitened)[~MASK], 0)


def test_more_padding_whitens_the_same():
    padded = np.pad(X, ((0, 2), (3, 1)), constant_values=99.0)
    padded_mask = np.pad(MASK, ((0, 2), (3, 1)))
    whitened = masked_whiten(padded, padded_mask)[:3, 3:8]
    np.testing.assert_allclose(whitened, masked_whiten(X, MASK), rtol=1e-6, atol=1e-6)


def test_whitening_constants_gives_zero_not_nan():
    np.testing.assert_array_equal(masked_whiten(jnp.full((2, 3), 0.1), None), 0)


@pytest.mark.parametrize("value", [10.3, 100.3, 1000.1])
def test_the_rounding_of_a_mean_is_not_taken_for_a_spread(value):
    """The bug: the float32 mean of equal entries is off by an ulp, which their standard deviation blew up to almost 1."""
    for size in (3, 7, 1000):
        np.testing.assert_array_equal(jax.jit(masked_whiten)(jnp.full((3, size), value), jnp.ones((3, size), bool)), 0)


def test_gradients():
    check_grads(jax.jit(lambda x: masked_mean(x, MASK)), (jnp.asarray(X),), order=1, modes=["rev"], rtol=1e-2)
    check_grads(jax.jit(lambda x: masked_whiten(x, MASK)), (jnp.asarray(X),), order=1, modes=["rev"], rtol=1e-2)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(AssertionError):
        masked_mean(X, MASK[:, :1])
    with pytest.raises(AssertionError):
        masked_whiten(X, MASK[0])
