"""Scores to advantages: the score at the last sampled token, no bootstrap, baselines that do not bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.core.advantages import (
    group_advantages,
    kl_shaped_rewards,
    leave_one_out_baseline,
    monte_carlo_advantages,
    monte_carlo_returns,
    place_scores,
)
from tests import core_in_numpy

RNG = np.random.default_rng(0)
# An EOS before the end, a row cut at the length limit, a hole (a tool's tokens), one token, none.
MASK = np.array(
    [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool
)
SCORES = np.array([0.9, -1.5, 2.25, 0.3, 7.0], np.float32)
KL = RNG.standard_normal(MASK.shape).astype(np.float32)


def test_the_score_is_at_the_last_sampled_token_not_on_padding():
    placed = np.asarray(place_scores(SCORES, MASK))
    assert np.argwhere(placed).tolist() == [[0, 3], [1, 5], [2, 4], [3, 3]]
    np.testing.assert_array_equal(placed.sum(1), [*SCORES[:4], 0.0])


def test_a_score_of_nan_without_tokens_does_not_spread():
    placed = place_scores(jnp.array([1.0, jnp.nan]), jnp.array([[True, False], [False, False]]))
    np.testing.assert_array_equal(placed, [[1, 0], [0, 0]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fractional_rewards_survive(dtype):
    # Rewards built with the dtype of the token ids turn 0.9 into 0.
    rewards = kl_shaped_rewards(jnp.array([0.9], dtype), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2)), kl_coef=1)
    assert rewards.dtype == jnp.float32
    np.testing.assert_allclose(rewards, [[0.0, 0.9]], rtol=4e-3)


def test_integer_scores_are_welcome():
    returns = monte_carlo_returns(place_scores(jnp.array([2, -1]), jnp.ones((2, 3), jnp.int32)), None)
    np.testing.assert_array_equal(returns, [[2.0] * 3, [-1.0] * 3])


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_shaped_rewards(kl_coef):
    rewards = kl_shaped_rewards(SCORES, KL, MASK, kl_coef=kl_coef)
    np.testing.assert_allclose(rewards, core_in_numpy.shaped_rewards(SCORES, KL, MASK, kl_coef), atol=1e-6)


def test_with_zero_values_each_return_is_the_score_minus_the_remaining_kl():
    rewards = kl_shaped_rewards(SCORES, KL, MASK, kl_coef=0.3)
    advantages = np.asarray(monte_carlo_advantages(rewards, jnp.zeros_like(rewards), MASK))
    for b, t in np.argwhere(MASK):
        remaining = (KL[b, t:] * MASK[b, t:]).sum()
        np.testing.assert_allclose(advantages[b, t], SCORES[b] - 0.3 * remaining, rtol=1e-5)


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
def test_returns_against_a_loop(discount):
    returns = monte_carlo_returns(KL, MASK, discount=discount)
    np.testing.assert_allclose(returns, core_in_numpy.returns(KL, MASK, discount), rtol=1e-5, atol=1e-6)


def test_long_returns_stay_exact():
    rewards = RNG.standard_normal((2, 1000)).astype(np.float32)
    returns = jax.jit(monte_carlo_returns)(rewards, None)
    np.testing.assert_allclose(returns, core_in_numpy.returns(rewards, np.ones_like(rewards)), atol=1e-4)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_nothing_is_bootstrapped_from_past_the_end(garbage):
    values = RNG.standard_normal(MASK.shape).astype(np.float32)
    clean = monte_carlo_advantages(KL, values, MASK)
    dirty = [np.where(MASK, x, np.float32(garbage)) for x in (KL, values)]
    np.testing.assert_array_equal(monte_carlo_advantages(*dirty, MASK), clean)
    np.testing.assert_array_equal(np.asarray(clean)[~MASK], 0)
    shaped = kl_shaped_rewards(SCORES, dirty[0], MASK, kl_coef=0.3)
    np.testing.assert_array_equal(shaped, kl_shaped_rewards(SCORES, KL, MASK, kl_coef=0.3))

    def total(values):
        return jnp.sum(jnp.square(monte_carlo_advantages(dirty[0], values, MASK)))

    gradient = np.asarray(jax.jit(jax.grad(total))(dirty[1]))
    assert np.isfinite(gradient).all() and (gradient[~MASK] == 0).all()


def test_returns_have_no_gradient_to_places_outside():
    gradient = jax.jit(jax.grad(lambda r: monte_carlo_returns(r, MASK, discount=0.5)[1, 2]))(KL)
    np.testing.assert_allclose(gradient[1], [0, 0, 1, 0.5, 0.25, 0.125])
    np.testing.assert_array_equal(gradient.at[1].set(0.0), 0)


def test_leave_one_out_equals_a_loop():
    scores = RNG.standard_normal(12).astype(np.float32)
    baseline = leave_one_out_baseline(scores, group_size=4)
    expected = [np.delete(scores[i // 4 * 4 : i // 4 * 4 + 4], i % 4).mean() for i in range(12)]
    np.testing.assert_allclose(baseline, expected, rtol=1e-5)
    rloo = scores - np.asarray(baseline)
    np.testing.assert_allclose(
        group_advantages(scores, group_size=4, normalize=False), rloo * 3 / 4, rtol=1e-4, atol=1e-6
    )


def test_a_sample_is_not_in_its_own_baseline():
    jacobian = jax.jit(jax.jacobian(lambda s: leave_one_out_baseline(s, group_size=3)))(jnp.arange(6.0))
    np.testing.assert_array_equal(np.diag(jacobian), 0)
    np.testing.assert_allclose(jacobian.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(jacobian[:3, 3:], 0)


def test_group_advantages_against_numpy():
    scores = RNG.standard_normal(12).astype(np.float32)
    groups = scores.astype(np.float64).reshape(3, 4)
    centred = groups - groups.mean(1, keepdims=True)
    np.testing.assert_allclose(
        group_advantages(scores, group_size=4),
        (centred / (groups.std(1, ddof=1, keepdims=True) + 1e-4)).ravel(),
        rtol=1e-5,
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [0.1, 1e6 + 0.3])
def test_a_group_of_equal_scores_gets_exactly_zero(normalize, value):
    advantages = group_advantages(jnp.full(3, value), group_size=3, normalize=normalize)
    np.testing.assert_array_equal(advantages, 0)
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(group_advantages(s, group_size=3))))(jnp.full(3, value))
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("function", [leave_one_out_baseline, group_advantages])
def test_groups_that_do_not_fit_are_refused(function):
    with pytest.raises(ValueError, match="6 scores do not divide into groups of group_size 4"):
        function(jnp.zeros(6), group_size=4)
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        function(jnp.zeros(6), group_size=1)
    with pytest.raises(ValueError, match=r"group_size must be a whole number, got 2\.0"):
        function(jnp.zeros(6), group_size=2.0)


def test_sequences_without_tokens_have_no_rewards():
    assert place_scores(jnp.zeros(2), jnp.zeros((2, 0), bool)).shape == (2, 0)
    assert place_scores(jnp.zeros(0), jnp.zeros((0, 3), bool)).shape == (0, 3)


def test_wrong_shapes_are_refused():
    for call in (
        lambda: place_scores(SCORES[:3], MASK),
        lambda: kl_shaped_rewards(SCORES, KL[:, :3], MASK, kl_coef=0.1),
        lambda: monte_carlo_returns(KL, MASK[:, :3]),
        lambda: monte_carlo_advantages(KL, KL[:, :3], MASK),
    ):
        with pytest.raises(AssertionError):
            call()
    with pytest.raises(ValueError, match=r"discount must be at least 0, got -0\.5"):
        monte_carlo_returns(KL, MASK, discount=-0.5)
