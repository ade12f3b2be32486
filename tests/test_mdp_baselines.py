"""Baselines and normalisations that look at the batch, over every batch of two: which are unbiased, what the others climb."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.laboratory import token_mdp as mdp
from pgjax.core.advantages import (
    group_advantages,
    kl_shaped_rewards,
    leave_one_out_baseline,
    monte_carlo_returns,
    place_scores,
)
from pgjax.core.kl import kl_k1
from pgjax.core.losses import clipped_surrogate_loss, policy_gradient_loss
from pgjax.core.masking import masked_mean, masked_whiten
from pgjax.learning.algorithm import Experience
from pgjax.learning.algorithms import group_relative_advantages, leave_one_out_advantages
from tests import expected_gradients as lab
from tests.compare import assert_close
from tests.expected_gradients import expected_gradient, in_both_precisions
from tests.sizes import campaign_but_for

SCALE = {"token_mean": 1 / 4, "sequence_mean": 1 / 4, "sequence_sum": 1.0}
PAIR = mdp.MASK[:2]  # every sequence has the same mask
_GAPS = mdp.REWARD[:, None] - mdp.REWARD[None]
GROUPED = lab.weighted_scores(lab.PI * ((_GAPS / 2 / (np.abs(_GAPS) / np.sqrt(2) + 1e-4)) @ lab.PI))
WHITENED = lab.weighted_scores(lab.PI * ((_GAPS / 2 / np.sqrt(_GAPS**2 / 4 + 1e-8)) @ lab.PI))


def leave_one_out(scores):
    return scores - leave_one_out_baseline(scores, group_size=2)


def batch_mean(scores):
    return scores - masked_mean(scores).astype(scores.dtype)


def grouped(scores):
    return group_advantages(scores, group_size=2)


ADVANTAGES = {  # from the scores of a batch of two
    "scores": (lambda scores: scores, lab.SCORE_GRADIENT),
    "leave one out": (leave_one_out, lab.SCORE_GRADIENT),
    "batch mean": (batch_mean, lab.SCORE_GRADIENT / 2),  # 1 - 1/B
    "group, not normalised": (
        lambda scores: group_advantages(scores, group_size=2, normalize=False),
        lab.SCORE_GRADIENT / 2,
    ),
    "group": (grouped, GROUPED),
    "whitened": (lambda scores: masked_whiten(scores, None), WHITENED),
    "whitened, mean kept": (
        lambda scores: masked_whiten(scores, None, shift_mean=False),
        lab.SCORE_GRADIENT / 2 + WHITENED,
    ),
}


@functools.cache
def loss_of(kind, reduce):
    def loss(logprobs, old, advantages):
        if kind == "clipped":
            return clipped_surrogate_loss(logprobs, old, advantages, PAIR, reduce=reduce)
        return policy_gradient_loss(logprobs, advantages, PAIR, reduce=reduce)

    return loss


def pairs_gradient(advantages, kind="policy gradient", reduce="sequence_sum"):
    """Expect the gradient over all batches of two, times -1; `advantages` [65536, 2, 5]."""
    old = lab.logprobs_of(mdp.POLICY)[lab.PAIRS]
    return -expected_gradient(loss_of(kind, reduce), old, np.asarray(advantages), batches=lab.PAIRS)


def at_every_token(advantages):
    """Let every token of a sequence carry its advantage, as a score at the end and no discount do: [2] to [2, 5]."""
    return monte_carlo_returns(place_scores(advantages, PAIR), PAIR)


@functools.cache
def pairs_advantages(name, precision):
    function = ADVANTAGES[name][0]
    found = jax.jit(jax.vmap(lambda s: at_every_token(function(s))))(jnp.asarray(mdp.REWARD)[lab.PAIRS])
    return np.asarray(found)


@pytest.mark.parametrize("reduce", SCALE)
@pytest.mark.parametrize("name", ADVANTAGES)
@in_both_precisions
def test_every_loss_advantage_and_reduction_of_a_batch(name, reduce, atol):
    known, advantages = ADVANTAGES[name][1], pairs_advantages(name, atol)
    for kind in ("policy gradient", "clipped"):
        assert_close(pairs_gradient(advantages, kind, reduce), SCALE[reduce] * known, atol, name=kind)


def test_two_samples_normalised_climb_the_chance_to_win_whatever_the_rewards_are():
    # Up to the small constants under the division: the gradient of P(R > R') - P(R < R') against a copy held fixed.
    won = lab.weighted_scores(lab.PI * (np.sign(_GAPS) @ lab.PI))
    assert_close(WHITENED, won, 1e-5)
    assert_close(GROUPED * np.sqrt(2), won, 5e-5)
    assert lab.cosine(GROUPED, lab.SCORE_GRADIENT) == pytest.approx(0.980, abs=1e-3)


@pytest.mark.parametrize("place", ["in the score", "on the tokens", "from each token on"])
@in_both_precisions
def test_leave_one_out_with_k1_in_the_reward_is_exact(place, atol):
    kl = kl_k1(lab.logprobs_of(mdp.POLICY), lab.logprobs_of(mdp.REFERENCE))

    def advantages(scores, kl):
        if place == "in the score":
            return at_every_token(leave_one_out(scores - mdp.BETA * kl.sum(1)))
        if place == "from each token on":
            rewards = kl_shaped_rewards(scores, kl, PAIR, kl_coef=mdp.BETA)
            return leave_one_out_advantages(known(scores, kl, rewards), group_size=2)
        return monte_carlo_returns(kl_shaped_rewards(leave_one_out(scores), kl, PAIR, kl_coef=mdp.BETA), PAIR)

    found = jax.jit(jax.vmap(advantages))(jnp.asarray(mdp.REWARD)[lab.PAIRS], kl[lab.PAIRS])
    assert_close(pairs_gradient(found), mdp.exact_gradient(mdp.POLICY), atol)


def known(scores, kl, rewards):
    """What an algorithm is told of a pair of sequences."""
    returns, zeros = monte_carlo_returns(rewards, PAIR), jnp.zeros_like(kl)
    return Experience(scores, -mdp.BETA * kl, returns, zeros, zeros, zeros, PAIR)


SCORE_PARTS = {True: GROUPED, False: lab.SCORE_GRADIENT / 2}  # of the group's advantages, normalised or not


@pytest.mark.parametrize("normalize", SCORE_PARTS)
@in_both_precisions
def test_a_group_is_normalised_by_scores_alone_and_the_penalty_keeps_its_exact_gradient(normalize, atol):
    """The bug: the spread of scores and penalties together divided the penalty."""
    kl = kl_k1(lab.logprobs_of(mdp.POLICY), lab.logprobs_of(mdp.REFERENCE))

    def advantages(scores, kl):
        rewards = kl_shaped_rewards(scores, kl, PAIR, kl_coef=mdp.BETA)
        return group_relative_advantages(known(scores, kl, rewards), group_size=2, normalize=normalize)

    found = jax.jit(jax.vmap(advantages))(jnp.asarray(mdp.REWARD)[lab.PAIRS], kl[lab.PAIRS])
    assert_close(pairs_gradient(found), SCORE_PARTS[normalize] - mdp.BETA * lab.KL_GRADIENT, atol)


@pytest.mark.parametrize("normalize", SCORE_PARTS)
def test_equal_scores_leave_the_penalty_alone_which_is_no_larger_than_the_kl(normalize):
    kl = np.asarray(kl_k1(lab.logprobs_of(mdp.POLICY), lab.logprobs_of(mdp.REFERENCE)))[lab.PAIRS]
    scores = jnp.full(lab.PAIRS.shape, 3.7)

    def advantages(scores, kl, beta):
        experience = known(scores, kl, kl)._replace(penalties=-beta * kl)
        return group_relative_advantages(experience, group_size=2, normalize=normalize)

    found = jax.jit(jax.vmap(advantages, in_axes=(0, 0, None)))
    to_come = np.cumsum(kl[:, :, ::-1], axis=2)[:, :, ::-1] * mdp.MASK[0]
    assert_close(found(scores, kl, 0.005), -0.005 * (to_come - to_come[:, ::-1]), 1e-6)
    assert not np.any(found(scores, kl, 0.0))


@in_both_precisions
def test_whitening_the_returns_of_two_sequences(atol):
    # Mean and deviation come from the eight tokens of the batch, the token's own among them.
    returns = lab.RETURNS[lab.PAIRS]  # [65536, 2, 4]
    centred = returns - returns.mean((1, 2), keepdims=True)
    whitened = centred / np.sqrt((centred**2).mean((1, 2), keepdims=True) + 1e-8)
    chances = lab.PI[lab.PAIRS].prod(1)[:, None, None]
    weights = np.zeros((mdp.COUNT, mdp.HORIZON))
    np.add.at(weights, lab.PAIRS, chances * whitened)
    known = lab.weighted_scores(weights)
    framed = jnp.asarray(np.pad(returns, ((0, 0), (0, 0), (1, 0))))
    found = pairs_gradient(jax.jit(jax.vmap(lambda x: masked_whiten(x, PAIR)))(framed))
    assert_close(found, known / 2, atol)
    assert lab.cosine(known, mdp.exact_gradient(mdp.POLICY)) == pytest.approx(0.900, abs=0.001)


@in_both_precisions
def test_over_the_whole_distribution_normalising_only_divides_by_the_deviation(atol):
    # Under equal logits one batch of all 256 sequences is the distribution itself: a batch without end.
    exact = mdp.exact_gradient(lab.UNIFORM, beta=0.0)
    scores, deviation = jnp.asarray(mdp.REWARD), mdp.REWARD.std()
    cases = {
        "batch mean": (scores - masked_mean(scores).astype(scores.dtype), exact),
        "group": (group_advantages(scores, group_size=256), exact / (mdp.REWARD.std(ddof=1) + 1e-4)),
        "whitened": (masked_whiten(scores, None), exact / np.sqrt(deviation**2 + 1e-8)),
        "whitened, mean kept": (masked_whiten(scores, None, shift_mean=False), exact / np.sqrt(deviation**2 + 1e-8)),
    }

    def loss(logprobs, advantages):
        return policy_gradient_loss(logprobs, advantages, mdp.MASK, reduce="sequence_sum")

    for name, (advantages, known) in cases.items():
        everywhere = np.repeat(np.asarray(advantages)[None, :, None], 5, axis=2)
        found = -expected_gradient(loss, everywhere, batches=lab.EVERY, weights=np.ones(1), table=lab.UNIFORM)
        assert_close(
            found, known, max(atol, 1e-8) if name == "batch mean" else atol, name=name
        )  # a mean comes back as float32


def bandit(advantages_of, size):
    """Expect a batch's gradient by the logits of a bandit of four arms, over all its batches: [4] float64."""
    with jax.enable_x64(True):
        z, rewards = jnp.asarray(mdp.POLICY[0]), jnp.asarray(mdp.REWARD[:4])
        batches = np.array(list(itertools.product(range(4), repeat=size)), np.int32)

        def loss(logprobs, scores):
            return -policy_gradient_loss(logprobs, advantages_of(scores))  # one number a sequence: [B]

        logprobs, pull = jax.vjp(jax.nn.log_softmax, z)
        found = np.asarray(jax.jit(jax.vmap(jax.grad(loss)))(logprobs[batches], rewards[batches]))
        total = np.zeros(4)
        np.add.at(total, batches, np.exp(np.asarray(logprobs))[batches].prod(1)[:, None] * found)
        return np.asarray(pull(jnp.asarray(total))[0])


def exact_bandit():
    p = np.exp(mdp.POLICY[0]) / np.exp(mdp.POLICY[0]).sum()
    return p * (mdp.REWARD[:4] - p @ mdp.REWARD[:4])


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_leave_one_out_is_unbiased_and_a_batch_mean_shrinks_the_gradient(size):
    unbiased = bandit(lambda s: s - leave_one_out_baseline(s, group_size=size), size)
    assert_close(unbiased, exact_bandit(), 1e-12)
    shrunk = (1 - 1 / size) * exact_bandit()
    assert_close(bandit(lambda s: s - jnp.mean(s), size), shrunk, 1e-12)
    assert_close(bandit(lambda s: group_advantages(s, group_size=size, normalize=False), size), shrunk, 1e-12)


TURNED = [(2, 0.9891, 0.372), (4, 0.9998, 0.674), (8, 1.0, 0.818)]


@pytest.mark.parametrize(("size", "turn", "length"), campaign_but_for(TURNED, *TURNED[:2]))
def test_normalising_a_group_turns_the_gradient_and_forgets_its_length(size, turn, length):
    p, rewards = np.exp(mdp.POLICY[0]) / np.exp(mdp.POLICY[0]).sum(), mdp.REWARD[:4]
    known = np.zeros(4)
    for batch in itertools.product(range(4), repeat=size):
        scores = rewards[list(batch)]
        advantages = (scores - scores.mean()) / (scores.std(ddof=1) + 1e-4)
        score = np.eye(4)[list(batch)] - p
        known += p[list(batch)].prod() * advantages @ score / size
    found = bandit(lambda s: group_advantages(s, group_size=size), size)
    assert_close(found, known, 1e-9)
    assert lab.cosine(found, exact_bandit()) == pytest.approx(turn, abs=1e-4)
    assert np.linalg.norm(found) / np.linalg.norm(exact_bandit()) == pytest.approx(length, abs=1e-3)
    assert_close(bandit(lambda s: group_advantages(10 * s + 3, group_size=size), size), found, 1e-3)
