"""Truncated importance weights: against float64 NumPy, and against what they are for, by enumeration of the token MDP."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.laboratory import token_mdp as mdp
from pgjax.core.advantages import truncated_importance_weights
from pgjax.core.losses import policy_gradient_loss
from tests import expected_gradients as lab
from tests.compare import assert_close
from tests.expected_gradients import expected_gradient, frame, in_both_precisions

POLICY = mdp.POLICY + 0.5 * np.random.default_rng(2).standard_normal(mdp.POLICY.shape)  # the sampler is mdp.POLICY
TOKEN_LOGP = mdp.exact_logprobs(POLICY)  # [256, 4]
LOG_RATIO = TOKEN_LOGP - lab.TOKEN_LOGP
MASK = mdp.MASK[lab.SINGLES]
CAPS = (0.5, 1.0, 2.0, 4.0, np.inf)


def of_sequences(cap):
    """The expected gradient at POLICY, whole sequences weighed; samples and old log-probabilities are the sampler's."""

    def loss(logprobs, old, rewards):
        new = logprobs.sum(1)
        return policy_gradient_loss(new, rewards * truncated_importance_weights(new, old.sum(1), cap=cap))

    arrays = (lab.logprobs_of(mdp.POLICY)[lab.SINGLES], jnp.asarray(mdp.REWARD)[lab.SINGLES])
    return -expected_gradient(loss, *arrays, table=POLICY)


def of_tokens(cap):
    def loss(logprobs, old, rewards, mask):
        weights = truncated_importance_weights(logprobs, old, mask, cap=cap)
        return policy_gradient_loss(logprobs, rewards * weights, mask, reduce="sequence_sum")

    rewards = np.asarray(frame(np.broadcast_to(mdp.REWARD[:, None], (256, 4))))[lab.SINGLES]
    return -expected_gradient(loss, lab.logprobs_of(mdp.POLICY)[lab.SINGLES], rewards, MASK, table=POLICY)


@in_both_precisions
def test_weights_of_whole_sequences_give_the_policys_own_gradient(atol):
    assert_close(of_sequences(np.inf), mdp.exact_gradient(POLICY, beta=0.0), atol)


def test_the_bias_falls_as_the_cap_rises():
    exact = mdp.exact_gradient(POLICY, beta=0.0)
    with jax.enable_x64(True):
        biases = [np.linalg.norm(of_sequences(cap) - exact) for cap in CAPS]
    assert all(low < 0.9 * high for high, low in itertools.pairwise(biases)), biases
    assert biases[-1] < 1e-12 < 1e-3 < biases[-2]


@pytest.mark.campaign
def test_the_variance_rises_with_the_cap():
    scores = mdp.exact_scores(POLICY).sum(1).reshape(256, -1)
    ratio = np.exp(LOG_RATIO.sum(1))
    spreads = []
    for cap in CAPS:
        found = of_sequences(cap).ravel()
        terms = (np.minimum(ratio, cap) * mdp.REWARD)[:, None] * scores
        spreads.append(lab.PI @ (terms**2).sum(1) - found @ found)
    assert all(low < high for low, high in itertools.pairwise(spreads)), spreads


@pytest.mark.parametrize("cap", CAPS)
@in_both_precisions
def test_weights_of_tokens_correct_each_draw_at_the_samplers_prefixes(cap, atol):
    weights = lab.PI[:, None] * np.minimum(np.exp(LOG_RATIO), cap) * mdp.REWARD[:, None]
    assert_close(of_tokens(cap), lab.weighted_scores(weights, POLICY), atol)


def test_weights_of_tokens_without_a_cap_give_the_gradient_of_the_local_objective_not_of_j():
    _, q = lab.conditional(np.broadcast_to(mdp.REWARD[:, None], (256, 4)))
    new = lab.softmax(POLICY)
    known = lab.visits(lab.PI)[:, None] * new * (q - (new * q).sum(1, keepdims=True))
    with jax.enable_x64(True):
        assert_close(of_tokens(np.inf), known, 1e-12)
    assert np.abs(known - mdp.exact_gradient(POLICY, beta=0.0)).max() > 1e-2


@pytest.mark.parametrize("cap", [0.3, 1.0, 5.0, np.inf])
def test_weights_match_numpy(cap):
    draw = np.random.default_rng(0)
    new, old, mask = draw.normal(-2, 1, (5, 7)), draw.normal(-2, 1, (5, 7)), draw.random((5, 7)) < 0.7
    with jax.enable_x64(True):
        found = truncated_importance_weights(new, old, mask, cap=cap)
    assert_close(found, np.where(mask, np.minimum(np.exp(new - old), cap), 0), 1e-14)


def test_neither_a_huge_ratio_nor_what_stands_outside_the_mask_makes_infinity_or_nan():
    new, old = jnp.array([-1.0, jnp.nan, 0.0]), jnp.array([-900.0, 0.0, jnp.inf])
    found = truncated_importance_weights(new, old, jnp.array([True, False, True]), cap=2.0)
    assert found.tolist() == pytest.approx([2.0, 0.0, 0.0])


def test_weights_carry_no_gradient():
    gradient = jax.grad(lambda x: truncated_importance_weights(x, jnp.array([-1.0, -2.0]), cap=2.0).sum())
    assert not np.any(gradient(jnp.array([-1.2, -1.0])))


@pytest.mark.parametrize("cap", [0, -1.0, float("nan")])
def test_a_cap_that_is_not_above_0_is_refused(cap):
    with pytest.raises(ValueError, match="cap must be above 0, got"):
        truncated_importance_weights(jnp.zeros(2), jnp.zeros(2), cap=cap)
