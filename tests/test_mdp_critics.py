"""What the fits fit: the value loss the conditional mean, cross-entropy the forward KL, preferences the true reward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.laboratory import token_mdp as mdp
from pgjax.core.losses import cross_entropy_loss, preference_loss, value_loss
from tests import expected_gradients as lab
from tests.compare import assert_close
from tests.expected_gradients import expected_gradient, in_both_precisions

VISITS = lab.visits(lab.PI)
WRONG = np.random.default_rng(4).standard_normal(85)


def value_gradient(table, **clip):
    """The expected gradient of the value loss by a table of values, one a prefix: [85], times the four tokens."""

    def loss(values, returns, old):
        options = {"old_values": old, **clip} if clip else {}
        return value_loss(values, returns, **options)

    rows = [np.asarray(jnp.asarray(x)) for x in (table[mdp.PREFIXES], lab.RETURNS, np.zeros(mdp.PREFIXES.shape))]
    found = np.asarray(jax.jit(jax.vmap(jax.grad(loss)))(*rows), np.float64)
    total = np.zeros(85)
    np.add.at(total, mdp.PREFIXES, mdp.HORIZON * lab.PI[:, None] * found)
    return total


@in_both_precisions
def test_the_value_loss_is_least_at_the_mean_return_of_each_prefix(atol):
    assert_close(value_gradient(lab.VALUES), np.zeros(85), atol)
    assert_close(value_gradient(WRONG), VISITS * (WRONG - lab.VALUES), atol)
    assert lab.VALUES[0] == pytest.approx(mdp.exact_objective(mdp.POLICY), abs=1e-12)


@in_both_precisions
def test_the_value_clip_pulls_the_value_towards_the_old_one(atol):
    # Beyond the bound an error counts only where it is the larger of the two: what would move the value on is left out.
    eps = 0.1
    values, returns = lab.VALUES[mdp.PREFIXES], lab.RETURNS
    held = np.clip(values, -eps, eps)
    counts = (values - returns) ** 2 >= (held - returns) ** 2
    known = np.zeros(85)
    np.add.at(known, mdp.PREFIXES, lab.PI[:, None] * counts * (values - returns))
    found = value_gradient(lab.VALUES, clip_eps=eps)
    assert_close(found, known, atol)
    beyond = np.abs(lab.VALUES) > eps
    assert beyond.sum() > 40
    assert np.all(found[beyond] * np.sign(lab.VALUES[beyond]) >= 0)  # descent goes back towards 0, the old value
    assert_close(found[~beyond], np.zeros((~beyond).sum()), atol)


@in_both_precisions
def test_cross_entropy_on_the_references_samples_is_the_forward_kl(atol):
    def loss(logprobs, mask):
        return cross_entropy_loss(logprobs, mask)

    found = expected_gradient(loss, mdp.MASK[lab.SINGLES], weights=lab.REF)
    assert_close(mdp.HORIZON * found, lab.FORWARD_GRADIENT, atol)


def preference_gradient(model, **options):
    """The expected gradient by the model's scores [256]: pairs of samples, labelled by Bradley-Terry of the true reward."""
    first, second = lab.PAIRS.T
    chances = lab.PI[lab.PAIRS].prod(1) / (1 + np.exp(mdp.REWARD[second] - mdp.REWARD[first]))
    chances *= 2  # either of the two may be the chosen one; the pair counts once

    def loss(pair):
        return preference_loss(pair[:1], pair[1:], **options)

    found = np.asarray(jax.jit(jax.vmap(jax.grad(loss)))(jnp.asarray(model)[lab.PAIRS]), np.float64)
    total = np.zeros(mdp.COUNT)
    np.add.at(total, lab.PAIRS, chances[:, None] * found)
    return total


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@in_both_precisions
def test_preferences_are_fitted_by_the_true_reward_up_to_a_constant(atol):
    assert_close(preference_gradient(mdp.REWARD), np.zeros(256), atol)
    assert_close(preference_gradient(mdp.REWARD + 5.0), np.zeros(256), atol)
    wrong = np.random.default_rng(5).standard_normal(256)
    gaps, true = (x[:, None] - x[None] for x in (wrong, mdp.REWARD))
    known = 2 * lab.PI * ((sigmoid(gaps) - sigmoid(true)) @ lab.PI)
    assert_close(preference_gradient(wrong), known, atol)


@in_both_precisions
def test_centring_picks_the_constant_and_costs_some_of_the_fit(atol):
    centred = mdp.REWARD - lab.PI @ mdp.REWARD
    found = preference_gradient(centred, center_coef=1 / 64)
    # d/dr of mean (r + r')^2: at mean zero only each score itself is left, pulled towards 0.
    assert_close(found, 4 / 64 * lab.PI * centred, atol)
    assert found.sum() == pytest.approx(0, abs=10 * atol)
    assert preference_gradient(centred + 1, center_coef=1 / 64).sum() > 0.01


@in_both_precisions
def test_a_margin_stretches_the_scores_beyond_the_true_reward(atol):
    margin = 0.5
    gaps = mdp.REWARD[:, None] - mdp.REWARD
    # Each order of a pair has its own gap: chosen over rejected by the margin more.
    lost = sigmoid(gaps) * sigmoid(margin - gaps) - sigmoid(-gaps) * sigmoid(margin + gaps)
    found = preference_gradient(mdp.REWARD, margin=margin)
    assert_close(found, -2 * lab.PI * (lost @ lab.PI), atol)
    assert -found @ mdp.REWARD > 0.01  # descent makes the gaps larger
