"""Token log-probabilities and entropies: one shift, one temperature, float32, no NaN that a mask can't hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pgjax.core.logprobs import token_entropy, token_frame, token_logprobs
from pgjax.core.masking import masked_mean
from tests import core_in_numpy

RNG = np.random.default_rng(0)
LOGITS = (RNG.standard_normal((2, 5, 7)) * 3).astype(np.float32)
TOKENS = RNG.integers(0, 7, (2, 5))


def test_the_frame_moves_a_position_to_the_token_it_predicts():
    x = jnp.arange(12.0).reshape(1, 4, 3)
    np.testing.assert_array_equal(token_frame(x)[0, 0], 0)
    np.testing.assert_array_equal(token_frame(x)[0, 1:], x[0, :3])
    assert token_frame(jnp.ones((2, 1))).tolist() == [[0.0], [0.0]]


def test_off_by_one():
    # Logits at position t say "the next token is t + 1", so the text 0, 1, 2, 3 is certain.
    logits = 100.0 * jax.nn.one_hot(jnp.arange(1, 5), 6)[None]
    logprobs = token_logprobs(logits, jnp.arange(4)[None])
    np.testing.assert_allclose(logprobs, 0, atol=1e-6)
    assert token_logprobs(logits, jnp.arange(1, 5)[None])[0, 1] < -50


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3])
def test_against_numpy_at_each_temperature(temperature):
    logprobs = token_logprobs(LOGITS, TOKENS, temperature=temperature)
    np.testing.assert_allclose(logprobs, core_in_numpy.token_logprobs(LOGITS, TOKENS, temperature), atol=2e-6)
    entropy = token_entropy(LOGITS, temperature=temperature)
    np.testing.assert_allclose(entropy, core_in_numpy.token_entropy(LOGITS, temperature), atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_are_normalised_in_float32(dtype):
    logits = jnp.asarray(LOGITS, dtype)
    logprobs, entropy = token_logprobs(logits, TOKENS), token_entropy(logits)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    exact = np.asarray(logits.astype(jnp.float32))
    np.testing.assert_allclose(logprobs, core_in_numpy.token_logprobs(exact, TOKENS), atol=2e-6)
    np.testing.assert_allclose(entropy, core_in_numpy.token_entropy(exact), atol=2e-6)


def test_huge_logits_do_not_overflow():
    logits = jnp.asarray(LOGITS) + 1e4 * jnp.ones_like(LOGITS)
    exact = core_in_numpy.token_logprobs(np.asarray(logits), TOKENS)
    np.testing.assert_allclose(token_logprobs(logits, TOKENS), exact, atol=1e-5)
    one_sided = jnp.zeros((1, 2, 3)).at[:, :, 0].set(3e38)
    np.testing.assert_array_equal(token_entropy(one_sided), 0)


def test_forbidden_tokens_give_no_nan():
    logits = jnp.asarray(LOGITS).at[:, :, 2].set(-jnp.inf)
    tokens = jnp.where(TOKENS == 2, 3, TOKENS)
    without = np.delete(LOGITS, 2, axis=2)
    shifted = np.where(np.asarray(tokens) > 2, np.asarray(tokens) - 1, np.asarray(tokens))
    np.testing.assert_allclose(
        token_logprobs(logits, tokens), core_in_numpy.token_logprobs(without, shifted), atol=2e-6
    )
    np.testing.assert_allclose(token_entropy(logits), core_in_numpy.token_entropy(without), atol=2e-6)
    gradient = jax.jit(jax.grad(lambda z: token_logprobs(z, tokens).sum() + token_entropy(z).sum()))(logits)
    assert jnp.all(jnp.isfinite(gradient))
    np.testing.assert_array_equal(gradient[:, :, 2], 0)
    assert token_logprobs(logits, jnp.full((2, 5), 2))[0, 1] == -jnp.inf


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_garbage_rows_do_not_leak_through_a_mask(garbage):
    mask = np.ones((2, 5), bool)
    mask[:, 0], mask[0, 2] = False, False
    dirty = LOGITS.copy()
    dirty[0, 1], dirty[:, 4] = garbage, garbage  # position 1 predicts token 2; position 4 predicts none

    def loss(logits):
        entropy = masked_mean(token_entropy(logits), mask)
        return masked_mean(token_logprobs(logits, TOKENS), mask) + 0.1 * entropy

    run = jax.jit(jax.value_and_grad(loss))
    (clean_value, clean_gradient), (value, gradient) = run(LOGITS), run(dirty)
    assert value == clean_value
    np.testing.assert_array_equal(gradient, clean_gradient)


def test_nan_inside_is_not_hidden():
    logits = jnp.asarray(LOGITS).at[1, 2, 0].set(jnp.nan)
    assert np.isnan(token_logprobs(logits, TOKENS)).tolist() == np.isnan(token_entropy(logits)).tolist()
    assert np.flatnonzero(np.isnan(token_logprobs(logits, TOKENS)).ravel()).tolist() == [5 + 3]


@pytest.mark.parametrize("bad", [7, 1000, -1, -100])
def test_an_id_outside_the_vocabulary_is_nan_not_another_token(bad):
    tokens = jnp.asarray(TOKENS).at[0, 3].set(bad)
    logprobs = np.asarray(token_logprobs(LOGITS, tokens))
    assert np.isnan(logprobs[0, 3]) and np.isfinite(np.delete(logprobs.ravel(), 3)).all()


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int16, jnp.uint32])
def test_any_integer_type_of_ids(dtype):
    np.testing.assert_array_equal(token_logprobs(LOGITS, jnp.asarray(TOKENS, dtype)), token_logprobs(LOGITS, TOKENS))


def test_entropy_is_between_zero_and_that_of_the_uniform():
    flat, peaked = jnp.zeros((1, 2, 7)), jnp.zeros((1, 2, 7)).at[:, :, 0].set(50.0)
    np.testing.assert_allclose(token_entropy(flat)[0], [0, np.log(7)], rtol=1e-6)
    assert 0 <= token_entropy(peaked)[0, 1] < 1e-6


def test_gradients():
    logits = jnp.asarray(LOGITS[:, :3])
    logprobs = jax.jit(lambda z: token_logprobs(z, TOKENS[:, :3], temperature=0.7))
    check_grads(logprobs, (logits,), 1, rtol=1e-2)
    check_grads(jax.jit(lambda z: token_entropy(z, temperature=0.7)), (logits,), 1, rtol=1e-2)


def test_a_traced_temperature_traces_once_and_carries_no_gradient():
    traces = []

    @jax.jit
    def total(temperature):
        traces.append(temperature)
        return token_logprobs(LOGITS, TOKENS, temperature=temperature).sum()

    for temperature in (0.5, 0.7, 1.0):
        exact = core_in_numpy.token_logprobs(LOGITS, TOKENS, temperature).sum()
        np.testing.assert_allclose(total(temperature), exact, rtol=1e-5)
    assert len(traces) == 1
    assert jax.grad(total)(0.7) == 0.0


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan")])
def test_a_temperature_not_above_zero_is_refused(temperature):
    with pytest.raises(ValueError, match=r"temperature must be above 0, got"):
        token_logprobs(LOGITS, TOKENS, temperature=temperature)
    with pytest.raises(ValueError, match=r"temperature must be above 0, got"):
        token_entropy(LOGITS, temperature=temperature)


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError):
        token_logprobs(LOGITS, TOKENS[:, :4])
    with pytest.raises(AssertionError):
        token_logprobs(LOGITS[0], TOKENS[0])
