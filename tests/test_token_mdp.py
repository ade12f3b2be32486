"""The exact token MDP itself: its figures, pgjax's gradient of its tables, what the KL estimators average to, variances.

Gradients of the losses are in test_mdp_losses.py (loss x advantage x KL x reduction), test_mdp_baselines.py (batches of two),
test_mdp_lengths.py (sequences that end), test_mdp_off_policy.py and test_mdp_critics.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.laboratory import token_mdp as mdp
from pgjax.core.advantages import kl_shaped_rewards, monte_carlo_returns
from pgjax.core.kl import categorical_kl, kl_k1, kl_k2, kl_k3
from pgjax.core.logprobs import token_entropy
from pgjax.core.losses import clipped_surrogate_loss, policy_gradient_loss
from tests import expected_gradients as lab
from tests.compare import assert_close
from tests.expected_gradients import LOGP, LOGQ, PI, REF, in_both_precisions


def test_the_constants_of_the_mdp():
    assert abs(mdp.OPTIMUM - 1.0775825) < 1e-7
    assert mdp.exact_objective(mdp.REFERENCE) == pytest.approx(0.0986815, abs=1e-7)
    star = REF * np.exp(mdp.REWARD / mdp.BETA)
    star /= star.sum()
    assert_close(mdp.BEST, star, 1e-14)
    assert star @ (np.log(star) - LOGQ) == pytest.approx(3.34037, abs=1e-5)
    assert star @ (mdp.REWARD - mdp.BETA * (np.log(star) - LOGQ)) == pytest.approx(mdp.OPTIMUM, abs=1e-12)
    gap = mdp.BETA * PI @ (LOGP - np.log(star))  # J* - J(pi) = beta KL(pi || pi*)
    assert mdp.OPTIMUM - mdp.exact_objective(mdp.POLICY) == pytest.approx(gap, abs=1e-12)


def test_the_exact_gradient_is_that_of_the_exact_objective():
    exact = mdp.exact_gradient(mdp.POLICY)
    for row, column in ((0, 0), (0, 3), (3, 1), (17, 2), (60, 0), (84, 3)):
        h = np.zeros_like(mdp.POLICY)
        h[row, column] = 1e-5
        slope = (mdp.exact_objective(mdp.POLICY + h) - mdp.exact_objective(mdp.POLICY - h)) / 2e-5
        assert exact[row, column] == pytest.approx(slope, abs=1e-10)


@in_both_precisions
def test_logprobs_of_the_tables_and_their_gradient(atol):
    assert_close(lab.logprobs_of(mdp.POLICY)[:, 1:], lab.TOKEN_LOGP, atol)
    assert_close(lab.logprobs_of(mdp.POLICY)[:, 0], np.zeros(mdp.COUNT))
    weights = np.random.default_rng(6).standard_normal((256, 5))
    pulled = lab.pull(jnp.asarray(mdp.POLICY), jnp.asarray(weights))
    assert_close(pulled, lab.weighted_scores(weights[:, 1:]), 10 * atol)


def test_logprobs_are_the_laboratorys_own():
    assert_close(mdp.logprobs(jnp.asarray(mdp.POLICY)), lab.logprobs_of(mdp.POLICY), 1e-6)


@in_both_precisions
def test_k1_and_k3_are_unbiased_and_k2_is_not(atol):
    kl = PI @ (LOGP - LOGQ)
    logprobs, ref_logprobs = (jnp.asarray(lab.logprobs_of(table)) for table in (mdp.POLICY, mdp.REFERENCE))
    for estimator in (kl_k1, kl_k3):
        assert PI @ np.asarray(estimator(logprobs, ref_logprobs)).sum(1) == pytest.approx(kl, abs=atol)
        whole = estimator(logprobs.sum(1), ref_logprobs.sum(1))
        assert PI @ np.asarray(whole) == pytest.approx(kl, abs=atol)
    exact = categorical_kl(*(mdp.logits(jnp.asarray(t), lab.PREFIXES) for t in (mdp.POLICY, mdp.REFERENCE)))
    assert PI @ np.asarray(exact).sum(1) == pytest.approx(kl, abs=atol)
    d = lab.TOKEN_LOGP - lab.TOKEN_LOGQ
    half_square = PI @ np.asarray(kl_k2(logprobs, ref_logprobs)).sum(1)
    assert half_square == pytest.approx(PI @ (d**2 / 2).sum(1), abs=atol)
    assert half_square / kl == pytest.approx(1.449, abs=0.001)


@in_both_precisions
def test_entropy_is_the_mean_of_minus_the_logprobs(atol):
    entropy = np.asarray(token_entropy(mdp.logits(jnp.asarray(mdp.POLICY), lab.PREFIXES)))
    assert PI @ entropy.sum(1) == pytest.approx(-PI @ LOGP, abs=atol)


@in_both_precisions
def test_entropy_as_a_bonus_drops_what_a_token_does_to_later_entropy(atol):
    # Like categorical_kl as a loss: each token's own entropy, the prefixes held fixed.
    policy = np.asarray(mdp.logits(jnp.asarray(mdp.POLICY), lab.PREFIXES))
    found = np.asarray(jax.jit(jax.grad(lambda z: jnp.sum(token_entropy(z))))(jnp.asarray(policy)), np.float64)
    total = np.zeros_like(mdp.POLICY)
    np.add.at(total, mdp.PREFIXES, PI[:, None, None] * found[:, :-1])
    p = lab.softmax(mdp.POLICY)
    local = -lab.visits(PI)[:, None] * p * (np.log(p) - (p * np.log(p)).sum(1, keepdims=True))
    assert_close(total, local, atol)
    assert lab.cosine(local, lab.weighted_scores(-PI * LOGP)) == pytest.approx(0.951, abs=0.001)


def per_sequence_gradients(advantages):
    """The gradient of each sequence's own loss, times -1: [256, 340]."""

    def loss(table, rows, tokens, advantages, mask):
        logprobs = lab.token_logprobs(mdp.logits(table, rows), tokens)
        return -policy_gradient_loss(logprobs, advantages, mask, reduce="sequence_sum")

    arrays = (lab.PREFIXES, lab.TOKENS, np.asarray(lab.frame(advantages)), mdp.MASK)
    each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0, 0, 0)))
    found = each(jnp.asarray(mdp.POLICY), *(x[:, None] for x in arrays))
    return np.asarray(found, np.float64).reshape(256, -1)


def trace(advantages):
    """The trace of the covariance of one sequence's gradient; `advantages` [256, 4]."""
    found = per_sequence_gradients(advantages)
    return PI @ (found**2).sum(1) - ((PI @ found) ** 2).sum()


def test_what_a_baseline_does_to_the_variance():
    total = np.repeat(lab.TOTAL[:, None], 4, axis=1)  # the whole sequence's reward at each of its tokens
    assert trace(total) == pytest.approx(3.76, abs=0.01)
    assert trace(total - PI @ lab.TOTAL) == pytest.approx(2.985, abs=0.001)
    squares = (per_sequence_gradients(np.ones((256, 4))) ** 2).sum(1)
    optimal = (PI * squares) @ lab.TOTAL / (PI @ squares)
    assert trace(total - optimal) == pytest.approx(2.975, abs=0.001)
    assert trace(total + 10) == pytest.approx(239, abs=1)


def test_what_reward_to_go_and_a_right_value_do_to_the_variance():
    assert trace(lab.RETURNS) == pytest.approx(3.131, abs=0.001)
    assert trace(lab.RETURNS - lab.VALUES[0]) == pytest.approx(2.910, abs=0.001)
    assert trace(lab.RETURNS - lab.VALUES[mdp.PREFIXES]) == pytest.approx(2.504, abs=0.001)


@pytest.mark.campaign
def test_following_the_surrogate_reaches_the_optimum():
    def step(table, _):
        old = mdp.logprobs(table)
        weights = jnp.exp(old.sum(1))
        kl = kl_k1(old, mdp.logprobs(jnp.asarray(mdp.REFERENCE)))
        rewards = kl_shaped_rewards(jnp.asarray(mdp.REWARD), kl, mdp.MASK, kl_coef=mdp.BETA)
        returns = monte_carlo_returns(rewards, mdp.MASK)

        def one(logprobs, old, returns, mask):
            return clipped_surrogate_loss(logprobs, old, returns, mask, reduce="sequence_sum")

        def loss(table):
            return jnp.sum(
                weights * jax.vmap(one)(*(x[:, None] for x in (mdp.logprobs(table), old, returns, mdp.MASK)))
            )

        return table - 8.0 * jax.grad(loss)(table), None

    table, _ = jax.jit(lambda t: jax.lax.scan(step, t, length=3000))(jnp.asarray(mdp.REFERENCE))
    assert mdp.OPTIMUM - mdp.exact_objective(np.asarray(table)) < 0.01
