"""Estimators against the exact gradient, by enumeration: where the KL goes, which baselines bias, how much they vary.

The expected gradient of a loss is that of the sum over all sequences of their fixed probability times their loss.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.advantages import (
    group_advantages,
    kl_shaped_rewards,
    leave_one_out_baseline,
    monte_carlo_advantages,
    monte_carlo_returns,
)
from pgjax.kl import categorical_kl, kl_k1, kl_k2, kl_k3
from pgjax.logprobs import token_entropy
from pgjax.losses import clipped_surrogate_loss, policy_gradient_loss
from tests import token_mdp as mdp

LOGP, LOGQ = mdp.exact_logprobs(mdp.POLICY).sum(1), mdp.exact_logprobs(mdp.REFERENCE).sum(1)
PI, REF = np.exp(LOGP), np.exp(LOGQ)


def gradients(table_loss):
    """The gradient [256, 85, 4] of each sequence's own loss; `table_loss(table) -> [256]`."""
    return jax.jit(jax.jacrev(table_loss))(mdp.THETA)


def expected_gradient(table_loss):
    """The gradient [85, 4] expected under the policy; `table_loss(table) -> [256]`, one loss a sequence."""
    return jax.jit(jax.grad(lambda table: jnp.sum(mdp.PROBABILITY * table_loss(table))))(mdp.THETA)


def each(loss, *arrays):
    """Call a loss once a sequence: [256, 5] arrays in, [256] losses out."""
    return jax.vmap(lambda *rows: loss(*(row[None] for row in rows), reduce="sequence_sum"))(*arrays)


def policy_losses(table, advantages):
    return each(policy_gradient_loss, mdp.logprobs(table), advantages, mdp.MASK)


@jax.jit
def shaped_returns(table=mdp.THETA):
    kl = kl_k1(mdp.logprobs(table), mdp.REF_LOGPROBS)
    return monte_carlo_returns(kl_shaped_rewards(mdp.SCORES, kl, mdp.MASK, kl_coef=mdp.BETA), mdp.MASK)


def close(x, y, atol=1e-5):
    np.testing.assert_allclose(x, y, atol=atol)


def cosine(x, y):
    x, y = np.ravel(x).astype(np.float64), np.ravel(y)
    return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


def kl_gradient(forward=False):
    """The gradient of KL(policy || reference), or of KL(reference || policy)."""

    def kl(table):
        logp = jax.nn.log_softmax(table)[mdp.PREFIXES, mdp.SEQUENCES].sum(1)
        if forward:
            return jnp.sum(jnp.asarray(REF, jnp.float32) * (jnp.asarray(LOGQ, jnp.float32) - logp))
        return jnp.sum(jnp.exp(logp) * (logp - jnp.asarray(LOGQ, jnp.float32)))

    return jax.jit(jax.grad(kl))(mdp.THETA)


def test_the_constants_of_the_mdp():
    star = REF * np.exp(mdp.REWARD / mdp.BETA)
    best = mdp.BETA * np.log(star.sum())
    star /= star.sum()
    assert best == pytest.approx(1.0775825, abs=1e-7)
    assert mdp.objective(jnp.asarray(mdp.REFERENCE, jnp.float32)) == pytest.approx(0.0986815, abs=1e-6)
    assert star @ (np.log(star) - LOGQ) == pytest.approx(3.34037, abs=1e-5)
    gap = mdp.BETA * PI @ (LOGP - np.log(star))
    assert best - float(mdp.objective(mdp.THETA)) == pytest.approx(gap, abs=1e-5)


def test_logprobs_of_the_tables():
    close(np.asarray(mdp.logprobs(mdp.THETA))[:, 1:], mdp.exact_logprobs(mdp.POLICY), 1e-6)


def test_k1_in_the_reward_with_reward_to_go_is_exact():
    returns = shaped_returns()
    close(-expected_gradient(lambda t: policy_losses(t, returns)), mdp.EXACT_GRADIENT)


def test_any_value_read_before_the_action_leaves_it_exact():
    rows = np.random.default_rng(1).standard_normal(85).astype(np.float32)[mdp.PREFIXES]
    values = jnp.pad(rows, ((0, 0), (1, 0)))  # entry t: the value of what stands before token t
    kl = kl_k1(mdp.logprobs(mdp.THETA), mdp.REF_LOGPROBS)
    rewards = kl_shaped_rewards(mdp.SCORES, kl, mdp.MASK, kl_coef=mdp.BETA)
    advantages = monte_carlo_advantages(rewards, values, mdp.MASK)
    close(-expected_gradient(lambda t: policy_losses(t, advantages)), mdp.EXACT_GRADIENT)
    late = monte_carlo_advantages(rewards, jnp.roll(values, -1, axis=1), mdp.MASK)  # read after the action
    assert np.abs(-expected_gradient(lambda t: policy_losses(t, late)) - mdp.EXACT_GRADIENT).max() > 0.01


def test_the_clipped_surrogate_is_exact_on_policy():
    returns, old = shaped_returns(), mdp.logprobs(mdp.THETA)

    def losses(table):
        return each(clipped_surrogate_loss, mdp.logprobs(table), old, returns, mdp.MASK)

    close(-expected_gradient(losses), mdp.EXACT_GRADIENT)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    kl = PI @ (LOGP - LOGQ)
    logprobs = mdp.logprobs(mdp.THETA)
    for estimator in (kl_k1, kl_k3):
        assert PI @ np.asarray(estimator(logprobs, mdp.REF_LOGPROBS)).sum(1) == pytest.approx(kl, rel=1e-5)
        whole = estimator(logprobs.sum(1), mdp.REF_LOGPROBS.sum(1))
        assert PI @ np.asarray(whole) == pytest.approx(kl, rel=1e-5)
    exact = categorical_kl(mdp.logits(mdp.THETA), mdp.logits(jnp.asarray(mdp.REFERENCE, jnp.float32)))
    assert PI @ np.asarray(exact).sum(1) == pytest.approx(kl, rel=1e-5)
    assert abs(PI @ np.asarray(kl_k2(logprobs, mdp.REF_LOGPROBS)).sum(1) - kl) > 0.1


def test_entropy_is_the_mean_of_minus_the_logprobs():
    entropy = np.asarray(token_entropy(mdp.logits(mdp.THETA)))
    assert PI @ entropy.sum(1) == pytest.approx(-PI @ LOGP, rel=1e-5)


def test_k1_as_a_loss_does_nothing():
    close(expected_gradient(lambda t: kl_k1(mdp.logprobs(t), mdp.REF_LOGPROBS).sum(1)), 0)


def test_k2_as_a_loss_is_exact_for_sequences_and_not_for_tokens():
    exact = kl_gradient()
    close(expected_gradient(lambda t: kl_k2(mdp.logprobs(t).sum(1), mdp.REF_LOGPROBS.sum(1))), exact, atol=3e-5)
    tokens = expected_gradient(lambda t: kl_k2(mdp.logprobs(t), mdp.REF_LOGPROBS).sum(1))
    assert cosine(tokens, exact) == pytest.approx(0.80, abs=0.01)


def test_k3_as_a_loss_is_the_forward_kl():
    whole = expected_gradient(lambda t: kl_k3(mdp.logprobs(t).sum(1), mdp.REF_LOGPROBS.sum(1)))
    close(whole, kl_gradient(forward=True), atol=3e-5)
    tokens = expected_gradient(lambda t: kl_k3(mdp.logprobs(t), mdp.REF_LOGPROBS).sum(1))

    def forward(table):  # of each token's distribution, at prefixes drawn from the fixed policy
        reference = mdp.logits(jnp.asarray(mdp.REFERENCE, jnp.float32))
        p, q = (jax.nn.log_softmax(z)[:, :-1] for z in (mdp.logits(table), reference))
        return jnp.sum(mdp.PROBABILITY * jnp.sum(jnp.exp(q) * (q - p), axis=(1, 2)))

    close(tokens, jax.jit(jax.grad(forward))(mdp.THETA))


def test_categorical_kl_as_a_loss_drops_later_tokens_like_token_k2():
    reference = mdp.logits(jnp.asarray(mdp.REFERENCE, jnp.float32))
    exact = expected_gradient(lambda t: categorical_kl(mdp.logits(t), reference).sum(1))
    tokens = expected_gradient(lambda t: kl_k2(mdp.logprobs(t), mdp.REF_LOGPROBS).sum(1))
    close(exact, tokens)


def _bandit(advantages_of):
    """Expected gradient over all batches of 4 samples of a one-step bandit, over that without a baseline."""
    p = jax.nn.softmax(jnp.asarray(mdp.POLICY[0], jnp.float32))
    scores = jnp.asarray(mdp.REWARD[:4], jnp.float32)
    batches = np.array(list(itertools.product(range(4), repeat=4)))
    weights = jnp.prod(p[batches], axis=1)

    def expected(advantages_of):
        def loss(z):
            logprobs = jax.nn.log_softmax(z)[batches]
            losses = jax.vmap(lambda lp, s: policy_gradient_loss(lp, advantages_of(s)))(logprobs, scores[batches])
            return jnp.sum(weights * losses)

        return jax.jit(jax.grad(loss))(jnp.asarray(mdp.POLICY[0], jnp.float32))

    plain = expected(lambda s: s)
    found = expected(advantages_of)
    assert cosine(found, plain) == pytest.approx(1, abs=1e-5)
    return float(jnp.linalg.norm(found) / jnp.linalg.norm(plain))


def test_leave_one_out_is_unbiased_and_a_batch_mean_shrinks_the_gradient():
    assert _bandit(lambda s: s - leave_one_out_baseline(s, group_size=4)) == pytest.approx(1, abs=1e-5)
    assert _bandit(lambda s: s - jnp.mean(s)) == pytest.approx(0.75, abs=1e-5)
    assert _bandit(lambda s: group_advantages(s, group_size=4, normalize=False)) == pytest.approx(0.75, abs=1e-5)


def test_what_a_baseline_does_to_the_variance():
    scores = gradients(lambda t: -policy_losses(t, jnp.ones_like(mdp.REF_LOGPROBS)))
    scores = np.asarray(scores, np.float64).reshape(256, -1)
    total = mdp.REWARD - mdp.BETA * (LOGP - LOGQ)

    def trace(baseline):
        samples = scores * (total - baseline)[:, None]
        return PI @ (samples**2).sum(1) - ((PI @ samples) ** 2).sum()

    weight = PI * (scores**2).sum(1)
    assert trace(0) == pytest.approx(3.76, abs=0.01)
    assert trace(PI @ total) == pytest.approx(2.985, abs=0.001)
    assert trace(weight @ total / weight.sum()) == pytest.approx(2.975, abs=0.001)
    assert trace(-10) == pytest.approx(239, abs=1)


def test_following_the_surrogate_reaches_the_optimum():
    def step(table, _):
        old = mdp.logprobs(table)
        weights = jnp.exp(old.sum(1))
        returns = shaped_returns(table)

        def loss(t):
            return jnp.sum(weights * each(clipped_surrogate_loss, mdp.logprobs(t), old, returns, mdp.MASK))

        return table - 8.0 * jax.grad(loss)(table), None

    table, _ = jax.jit(lambda t: jax.lax.scan(step, t, length=3000))(jnp.asarray(mdp.REFERENCE, jnp.float32))
    assert 1.0775825 - float(mdp.objective(table)) < 0.01
