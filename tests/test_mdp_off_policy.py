"""The surrogate after the policy has moved: what its gradient is then, with and without the clip, per token and whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.laboratory import token_mdp as mdp
from pgjax.core.losses import clipped_surrogate_loss, surrogate_diagnostics
from tests import expected_gradients as lab
from tests.compare import assert_close
from tests.expected_gradients import expected_gradient, frame, in_both_precisions

NEW = mdp.POLICY + 0.5 * np.random.default_rng(2).standard_normal(mdp.POLICY.shape)
NEW_LOGP = mdp.exact_logprobs(NEW)
RATIO = np.exp(NEW_LOGP - lab.TOKEN_LOGP)  # [256, 4]
MASK = mdp.MASK[lab.SINGLES]


def gradient(advantages, **options):
    """The expected gradient at NEW of the surrogate on samples of POLICY, times -1; `advantages` [256, 4]."""

    def loss(logprobs, old, advantages, mask):
        return clipped_surrogate_loss(logprobs, old, advantages, mask, reduce="sequence_sum", **options)

    arrays = (lab.logprobs_of(mdp.POLICY)[lab.SINGLES], np.asarray(frame(advantages))[lab.SINGLES], MASK)
    return -expected_gradient(loss, *arrays, table=NEW)


@in_both_precisions
def test_token_ratios_give_the_gradient_of_the_local_objective_not_of_j(atol):
    # sum over prefixes of P_old(prefix) sum over tokens of pi(token | prefix) Q_old(prefix, token): Kakade & Langford
    # (2002). The prefixes, and what comes after the token, are the old policy's.
    values, q = lab.conditional(lab.RETURNS)
    new = lab.softmax(NEW)
    known = lab.visits(lab.PI)[:, None] * new * (q - (new * q).sum(1, keepdims=True))
    for advantages in (lab.RETURNS, lab.RETURNS - values[mdp.PREFIXES], lab.RETURNS[:, :1] + np.zeros((1, 4))):
        assert_close(gradient(advantages, clip_eps=np.inf), known, atol)
    exact = mdp.exact_gradient(NEW)
    assert lab.cosine(known, exact) == pytest.approx(0.890, abs=1e-3)


@pytest.mark.parametrize("kl", [False, True])
@in_both_precisions
def test_ratios_of_whole_sequences_are_exact(kl, atol):
    # Importance sampling. With the KL in the reward its log-probabilities must be those of the new policy.
    total = mdp.REWARD - mdp.BETA * kl * (NEW_LOGP.sum(1) - lab.LOGQ)

    def loss(logprobs, old, total):
        return clipped_surrogate_loss(logprobs.sum(1), old.sum(1), total, clip_eps=np.inf)

    arrays = (lab.logprobs_of(mdp.POLICY)[lab.SINGLES], jnp.asarray(total)[lab.SINGLES])
    assert_close(-expected_gradient(loss, *arrays, table=NEW), mdp.exact_gradient(NEW, beta=mdp.BETA * kl), atol)


@in_both_precisions
def test_old_logprobs_in_the_reward_leave_out_how_the_kl_has_changed(atol):
    def loss(logprobs, old, total):
        return clipped_surrogate_loss(logprobs.sum(1), old.sum(1), total, clip_eps=np.inf)

    arrays = (lab.logprobs_of(mdp.POLICY)[lab.SINGLES], jnp.asarray(lab.TOTAL)[lab.SINGLES])
    found = -expected_gradient(loss, *arrays, table=NEW)
    # KL(new || reference) = E_new[log old - log reference] + KL(new || old): the second is not charged.
    moved = lab.weighted_scores(np.exp(NEW_LOGP.sum(1)) * (NEW_LOGP.sum(1) - lab.LOGP), NEW)
    assert_close(found, mdp.exact_gradient(NEW) + mdp.BETA * moved, atol)


@pytest.mark.parametrize(
    ("options", "low", "high", "dual"),
    [
        ({"clip_eps": 0.2}, 0.8, 1.2, np.inf),
        ({"clip_eps": 0.2, "clip_eps_high": 0.28}, 0.8, 1.28, np.inf),
        ({"clip_eps": 0.2, "dual_clip": 1.5}, 0.8, 1.2, 1.5),
        ({"clip_eps": 0.0}, 1.0, 1.0, np.inf),
    ],
    ids=["0.2", "higher above", "dual", "0"],
)
@in_both_precisions
def test_the_clip_leaves_out_exactly_the_tokens_that_have_gone_far_enough(options, low, high, dual, atol):
    advantages = lab.RETURNS - lab.VALUES[mdp.PREFIXES]
    ratio = RATIO
    gone = (advantages > 0) & (ratio > high) | (advantages < 0) & ((ratio < low) | (ratio > dual))
    known = lab.weighted_scores(lab.PI[:, None] * np.where(gone, 0, ratio * advantages), NEW)
    assert_close(gradient(advantages, **options), known, atol)
    assert 0.1 < lab.PI @ gone.mean(1) < 0.9


def test_diagnostics_measure_the_old_policys_kl_to_the_new_without_bias():
    old, new = lab.logprobs_of(mdp.POLICY), lab.logprobs_of(NEW)
    each = jax.jit(jax.vmap(surrogate_diagnostics))(new[lab.SINGLES], old[lab.SINGLES], MASK)
    mean = {name: lab.PI @ np.asarray(values, np.float64) for name, values in each.items()}
    assert 4 * mean["approx_kl"] == pytest.approx(lab.PI @ (lab.LOGP - NEW_LOGP.sum(1)), rel=1e-5)
    assert mean["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert mean["clip_fraction"] == pytest.approx(lab.PI @ (np.abs(RATIO - 1) > 0.2).mean(1), abs=1e-6)
