"""Reductions, where sequences end at different lengths: the token MDP in which token 3 ends the sequence.

All 256 sequences are still drawn, and the mask leaves out what comes after the end: a sequence that ends early stands for all
those it could have gone on to, whose probabilities add up to its own. `expected(f)` is the gradient of E[f(sequence)].
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.laboratory import token_mdp as mdp
from pgjax.core.advantages import kl_shaped_rewards, monte_carlo_returns, place_scores
from pgjax.core.kl import kl_k1, kl_k2
from pgjax.core.losses import cross_entropy_loss, policy_gradient_loss
from pgjax.core.masking import masked_mean
from tests import expected_gradients as lab
from tests.compare import assert_close
from tests.expected_gradients import expected_gradient, in_both_precisions

STOP = 3
ENDED = np.cumsum(mdp.SEQUENCES == STOP, axis=1) - (mdp.SEQUENCES == STOP) > 0  # [256, 4] past the end
INSIDE = ~ENDED
MASK = np.pad(INSIDE, ((0, 0), (1, 0)))
LENGTH = INSIDE.sum(1)  # 1 to 4
FIRST = np.where(ENDED, 0, mdp.SEQUENCES) @ 4 ** np.arange(4)[::-1]  # one number for all that end alike
REWARD = mdp.REWARD[FIRST]
KL = np.where(INSIDE, lab.TOKEN_LOGP - lab.TOKEN_LOGQ, 0)
TO_GO = np.cumsum(KL[:, ::-1], axis=1)[:, ::-1]  # [256, 4]
TOTAL = REWARD - mdp.BETA * KL.sum(1)


def expected(f, table=mdp.POLICY):
    return lab.weighted_scores(lab.chance(table) * f, table)


def at_every_token(scores):
    return monte_carlo_returns(place_scores(jnp.asarray(scores), MASK), MASK)


def with_reward_to_go(scores):
    kl = kl_k1(lab.logprobs_of(mdp.POLICY), lab.logprobs_of(mdp.REFERENCE))
    return monte_carlo_returns(kl_shaped_rewards(jnp.asarray(scores), kl, MASK, kl_coef=mdp.BETA), MASK)


@functools.cache
def loss_of(reduce):
    return lambda logprobs, advantages, mask: policy_gradient_loss(logprobs, advantages, mask, reduce=reduce)


def gradient(advantages, reduce, batches=lab.SINGLES, **options):
    """The expected gradient, times -1, of batches of what `advantages` [256, 5] belongs to."""
    return -expected_gradient(
        loss_of(reduce), np.asarray(advantages)[batches], MASK[batches], batches=batches, **options
    )


TABLE = [  # (reduce, batch, what weighs a sequence's whole reward)
    ("sequence_sum", 1, np.ones(256)),
    ("sequence_sum", 2, np.ones(256)),
    ("sequence_mean", 1, 1 / LENGTH),
    ("sequence_mean", 2, 1 / LENGTH),
    ("token_mean", 1, 1 / LENGTH),
    ("token_mean", 2, (2 / (LENGTH[:, None] + LENGTH)) @ lab.PI),
]


def test_lengths_vary():
    assert np.bincount(LENGTH, weights=lab.PI)[1:].min() > 0.03
    assert lab.PI.sum() == pytest.approx(1)


@pytest.mark.parametrize(("reduce", "size", "weight"), TABLE, ids=lambda x: str(x) if np.ndim(x) == 0 else "")
@in_both_precisions
def test_a_reduction_climbs_the_reward_times_its_weight_of_a_length(reduce, size, weight, atol):
    batches = lab.SINGLES if size == 1 else lab.PAIRS
    assert_close(gradient(at_every_token(REWARD), reduce, batches), expected(REWARD * weight), atol)
    assert_close(gradient(at_every_token(TOTAL), reduce, batches), expected(TOTAL * weight), atol)


@in_both_precisions
def test_sequence_sum_is_the_exact_gradient(atol):
    exact = expected(TOTAL)
    assert_close(gradient(with_reward_to_go(REWARD), "sequence_sum"), exact, atol)
    any_value = np.pad(np.random.default_rng(1).standard_normal(85)[mdp.PREFIXES], ((0, 0), (1, 0)))
    assert_close(gradient(with_reward_to_go(REWARD) - jnp.asarray(any_value), "sequence_sum"), exact, atol)


@pytest.mark.parametrize(("reduce", "size", "weight"), TABLE[2:], ids=lambda x: str(x) if np.ndim(x) == 0 else "")
@in_both_precisions
def test_a_mean_over_tokens_makes_a_constant_advantage_pull_at_the_length(reduce, size, weight, atol):
    # No baseline is free any more: more than the mean pulls towards short sequences, less towards long ones.
    found = gradient(np.ones((256, 5)), reduce, lab.SINGLES if size == 1 else lab.PAIRS)
    assert_close(found, expected(weight), atol)
    shorter = lab.weighted_scores(-lab.PI * LENGTH)
    assert lab.cosine(found, shorter) > 0.9


@in_both_precisions
def test_sequence_mean_of_rewards_to_go(atol):
    weights = (REWARD[:, None] - mdp.BETA * TO_GO) * INSIDE / LENGTH[:, None]
    assert_close(
        gradient(with_reward_to_go(REWARD), "sequence_mean"), lab.weighted_scores(lab.PI[:, None] * weights), atol
    )


@in_both_precisions
def test_token_mean_of_a_batch_without_end_is_the_exact_gradient_over_the_mean_length(atol):
    options = {"batches": lab.EVERY, "weights": np.ones(1), "table": lab.UNIFORM}  # the distribution in one batch
    exact = expected(REWARD, lab.UNIFORM)
    assert_close(gradient(at_every_token(REWARD), "token_mean", **options), exact / LENGTH.mean(), atol)
    assert_close(gradient(at_every_token(REWARD), "sequence_sum", **options), exact, atol)
    assert_close(
        gradient(at_every_token(REWARD), "sequence_mean", **options), expected(REWARD / LENGTH, lab.UNIFORM), atol
    )
    constant = gradient(np.ones((256, 5)), "token_mean", **options)
    assert_close(constant, np.zeros((85, 4)), atol)  # and there a constant is free again


def kl_gradient(loss):
    ref_logprobs = lab.logprobs_of(mdp.REFERENCE)[lab.SINGLES]
    return expected_gradient(loss, ref_logprobs, MASK[lab.SINGLES])


@in_both_precisions
def test_a_kl_in_the_loss_needs_its_sum_over_tokens_too(atol):
    def summed(estimator):
        return lambda logprobs, ref, mask: masked_mean(jnp.sum(jnp.where(mask, estimator(logprobs, ref), 0.0), axis=1))

    def of_sequences(logprobs, ref, mask):
        return masked_mean(kl_k2(*(jnp.sum(jnp.where(mask, x, 0.0), axis=1) for x in (logprobs, ref))))

    def averaged(logprobs, ref, mask):
        return masked_mean(kl_k1(logprobs, ref), mask)

    assert_close(kl_gradient(summed(kl_k1)), np.zeros((85, 4)), atol)
    assert_close(kl_gradient(of_sequences), expected(KL.sum(1)), atol)  # exact
    assert_close(
        kl_gradient(averaged), expected(1 / LENGTH), atol
    )  # k1 does nothing to the KL, and shortens or lengthens


@in_both_precisions
def test_cross_entropy_on_the_policys_own_samples_moves_only_the_length(atol):
    found = -expected_gradient(lambda logprobs, mask: cross_entropy_loss(logprobs, mask), MASK[lab.SINGLES])
    assert_close(found, expected(1 / LENGTH), atol)
