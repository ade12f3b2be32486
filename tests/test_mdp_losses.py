"""Every policy loss x advantage x place of the KL x reduction against the exact gradient, on and off policy.

Read the tables: what stands beside a name is the gradient that it must have, in closed form. A gradient of J that is not
minus `SCORE_GRADIENT - BETA * KL_GRADIENT` is a bias, and the table says which.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.laboratory import token_mdp as mdp
from pgjax.core.advantages import kl_shaped_rewards, monte_carlo_advantages, monte_carlo_returns, place_scores
from pgjax.core.kl import categorical_kl, kl_k1, kl_k2, kl_k3
from pgjax.core.losses import clipped_surrogate_loss, policy_gradient_loss
from pgjax.core.masking import masked_mean
from tests import expected_gradients as lab
from tests.compare import assert_close
from tests.expected_gradients import expected_gradient, frame, in_both_precisions

MASK = mdp.MASK[lab.SINGLES]  # [256, 1, 5]
SCALE = {"token_mean": 1 / 4, "sequence_mean": 1 / 4, "sequence_sum": 1.0}  # every sequence has four tokens
NONE = np.zeros_like(mdp.POLICY)


def reinforce(logprobs, old, advantages, mask, reduce):
    return policy_gradient_loss(logprobs, advantages, mask, reduce=reduce)


def surrogate(**options):
    return lambda logprobs, old, advantages, mask, reduce: clipped_surrogate_loss(
        logprobs, old, advantages, mask, reduce=reduce, **options
    )


LOSSES = {  # on policy all are the same gradient
    "policy gradient": reinforce,
    "clipped": surrogate(),
    "clipped, a higher upper bound": surrogate(clip_eps=0.2, clip_eps_high=0.28),
    "clipped, dual": surrogate(dual_clip=3.0),
    "clipped at 0": surrogate(clip_eps=0.0),
    "not clipped": surrogate(clip_eps=np.inf),
}
ANY = np.random.default_rng(1).standard_normal(85)[mdp.PREFIXES]
ADVANTAGES = {  # from rewards [256, 5]; all leave the gradient as it is
    "returns": lambda rewards: monte_carlo_returns(rewards, mdp.MASK),
    "the whole sequence's reward": lambda rewards: monte_carlo_returns(
        place_scores(rewards.sum(1), mdp.MASK), mdp.MASK
    ),
    "returns - a wrong value": lambda rewards: monte_carlo_advantages(rewards, frame(ANY), mdp.MASK),
    "returns - the right value": lambda rewards: monte_carlo_advantages(
        rewards, frame(lab.VALUES[mdp.PREFIXES]), mdp.MASK
    ),
    "returns - a constant": lambda rewards: monte_carlo_returns(rewards, mdp.MASK) - 10.0,
}


def exact_kl(logits, ref_logits, logprobs, ref_logprobs):
    return categorical_kl(logits, ref_logits)


def tokens(estimator):
    return lambda logits, ref_logits, logprobs, ref_logprobs: estimator(logprobs, ref_logprobs)


def whole(estimator):
    return lambda logits, ref_logits, logprobs, ref_logprobs: estimator(logprobs.sum(1), ref_logprobs.sum(1))


CHARGES = {
    "k1": tokens(kl_k1),
    "k2": tokens(kl_k2),
    "k3": tokens(kl_k3),
    "categorical": exact_kl,
    "sequence k1": whole(kl_k1),
    "sequence k2": whole(kl_k2),
    "sequence k3": whole(kl_k3),
}
# E[k] moves through the samples (k in the reward) and through k itself (k as a loss): the two add up to its gradient.
IN_THE_REWARD = {
    "k1": lab.KL_GRADIENT,  # exact
    "k2": lab.K2_GRADIENT - lab.LOCAL_GRADIENT,
    "k3": lab.KL_GRADIENT - lab.LOCAL_FORWARD_GRADIENT,
    "categorical": lab.KL_GRADIENT - lab.LOCAL_GRADIENT,  # what a token does to the tokens after it, and no more
    "sequence k1": lab.KL_GRADIENT,  # exact
    "sequence k2": lab.WHOLE_K2_GRADIENT - lab.KL_GRADIENT,
    "sequence k3": lab.KL_GRADIENT - lab.FORWARD_GRADIENT,
}
AS_A_LOSS = {
    "k1": NONE,
    "k2": lab.LOCAL_GRADIENT,  # of each token's own KL, the prefixes held fixed
    "k3": lab.LOCAL_FORWARD_GRADIENT,
    "categorical": lab.LOCAL_GRADIENT,
    "sequence k1": NONE,
    "sequence k2": lab.KL_GRADIENT,  # exact
    "sequence k3": lab.FORWARD_GRADIENT,  # of KL(reference || policy)
}
PLACEMENTS = [(None, None)] + [(name, None) for name in CHARGES] + [(None, name) for name in CHARGES]
PLACEMENTS += [("k2", "k2"), ("k3", "k3"), ("categorical", "categorical"), ("k1", "k1")]  # all but k2: exact


def charge(name):
    """Compute a KL through pgjax: [256, 5] for tokens, [256] for sequences."""
    policy, reference = (mdp.logits(jnp.asarray(table), lab.PREFIXES) for table in (mdp.POLICY, mdp.REFERENCE))
    return CHARGES[name](policy, reference, lab.logprobs_of(mdp.POLICY), lab.logprobs_of(mdp.REFERENCE))


# `precision` is there for the caches below: what is kept from float64 must not be met in float32.
@functools.cache
def shaped(name, precision):
    """Charge a KL in the reward: a token's on its token, a sequence's in the score: [256, 5]."""
    scores, nothing = jnp.asarray(mdp.REWARD), jnp.zeros(mdp.MASK.shape)
    kl = nothing if name is None else charge(name)
    if kl.ndim == 1:
        return kl_shaped_rewards(scores - mdp.BETA * kl, nothing, mdp.MASK, kl_coef=0.0)
    return kl_shaped_rewards(scores, kl, mdp.MASK, kl_coef=mdp.BETA)


@functools.cache
def reduced(loss, reduce):
    return lambda logprobs, old, advantages, mask: loss(logprobs, old, advantages, mask, reduce)


@functools.cache
def kl_loss(name, reduce):
    """The gradient by a sequence's logits of a KL that stands in the loss: [256, 1, 5, 4] to the same."""

    def loss(logits, ref_logits, tokens):
        logprobs, ref_logprobs = lab.token_logprobs(logits, tokens), lab.token_logprobs(ref_logits, tokens)
        kl = CHARGES[name](logits, ref_logits, logprobs, ref_logprobs)
        if kl.ndim == 1:
            return SCALE[reduce] * masked_mean(kl)
        return masked_mean(kl, mdp.MASK[:1]) if reduce != "sequence_sum" else masked_mean(kl.sum(1))

    return lab.each_batch(loss)


@functools.cache
def kl_loss_gradient(name, reduce, precision):
    policy, reference = (np.asarray(mdp.logits(jnp.asarray(t), lab.PREFIXES)) for t in (mdp.POLICY, mdp.REFERENCE))
    found = kl_loss(name, reduce)(policy[lab.SINGLES], reference[lab.SINGLES], lab.TOKENS[lab.SINGLES])
    total = np.zeros_like(mdp.POLICY)
    np.add.at(total, mdp.PREFIXES, lab.PI[:, None, None] * np.asarray(found)[:, 0, :-1])
    return total


@functools.cache
def policy_gradient(loss, advantage, in_reward, reduce, precision):
    advantages = advantages_of(advantage, in_reward, precision)
    return expected_gradient(reduced(LOSSES[loss], reduce), old(precision), advantages, MASK)


@functools.cache
def advantages_of(advantage, in_reward, precision):
    return np.asarray(ADVANTAGES[advantage](shaped(in_reward, precision)))[lab.SINGLES]


@functools.cache
def old(precision):
    return lab.logprobs_of(mdp.POLICY)[lab.SINGLES]


@pytest.mark.parametrize("reduce", SCALE)
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda names: f"{names[0]} in reward, {names[1]} in loss")
@in_both_precisions
def test_every_loss_advantage_placement_and_reduction(placement, reduce, atol):
    in_reward, in_loss = placement
    kl = (NONE if in_reward is None else IN_THE_REWARD[in_reward]) + (NONE if in_loss is None else AS_A_LOSS[in_loss])
    known = -SCALE[reduce] * (lab.SCORE_GRADIENT - mdp.BETA * kl)
    added = NONE if in_loss is None else mdp.BETA * kl_loss_gradient(in_loss, reduce, atol)
    for advantage in ADVANTAGES:
        for loss in LOSSES:
            found = policy_gradient(loss, advantage, in_reward, reduce, atol) + added
            assert_close(found, known, atol, name=f"{loss}, {advantage}")


TURNS = [  # (place, estimator, length over that of the KL's gradient, cosine to it)
    ("reward", "k1", 1.0, 1.0),
    ("reward", "k2", 1.448, 0.488),
    ("reward", "k3", 0.831, 0.402),
    ("reward", "categorical", 0.757, -0.033),
    ("reward", "sequence k1", 1.0, 1.0),
    ("reward", "sequence k2", 2.658, 0.894),
    ("reward", "sequence k3", 1.382, 0.191),
    ("loss", "k2", 1.274, 0.805),
    ("loss", "k3", 1.011, 0.659),
    ("loss", "categorical", 1.274, 0.805),
    ("loss", "sequence k2", 1.0, 1.0),
    ("loss", "sequence k3", 1.544, 0.477),
]


@pytest.mark.parametrize(("place", "name", "length", "turn"), TURNS)
def test_how_far_each_place_of_the_kl_turns_its_gradient(place, name, length, turn):
    gradient = {"reward": IN_THE_REWARD, "loss": AS_A_LOSS}[place][name]
    assert np.linalg.norm(gradient) / np.linalg.norm(lab.KL_GRADIENT) == pytest.approx(length, abs=1e-3)
    assert lab.cosine(gradient, lab.KL_GRADIENT) == pytest.approx(turn, abs=1e-3)


@pytest.mark.parametrize("discount", [0.9, 0.5, 0.0])
@in_both_precisions
def test_a_discount_weighs_what_a_token_does_to_a_later_reward_by_its_distance(discount, atol):
    # No objective has this gradient: the share of reward u that comes through token t is discounted by u - t.
    known = np.zeros_like(mdp.POLICY)
    depths = np.repeat(np.arange(4), [1, 4, 16, 64])[:, None]
    for step in range(mdp.HORIZON):
        charge = mdp.BETA * (lab.TOKEN_LOGP - lab.TOKEN_LOGQ)[:, step]
        reward = (mdp.REWARD if step == mdp.HORIZON - 1 else 0) - charge
        part = lab.weighted_scores(lab.PI * reward)  # the gradient of this reward's mean
        known += np.where(depths <= step, discount ** (np.maximum(step - depths, 0)), 0) * part
    for name, values in (("returns", np.zeros(85)), ("returns - a wrong value", np.random.default_rng(3).random(85))):
        advantages = monte_carlo_advantages(
            shaped("k1", atol), frame(values[mdp.PREFIXES]), mdp.MASK, discount=discount
        )
        arrays = (old(atol), np.asarray(advantages)[lab.SINGLES], MASK)
        assert_close(-expected_gradient(reduced(reinforce, "sequence_sum"), *arrays), known, atol, name=name)


@in_both_precisions
def test_a_value_read_after_the_action_biases(atol):
    late = np.pad(ANY[:, 1:], ((0, 0), (0, 1)))  # what stands before token t, token t included, but for the last
    advantages = monte_carlo_advantages(shaped("k1", atol), frame(late), mdp.MASK)
    arrays = (old(atol), np.asarray(advantages)[lab.SINGLES], MASK)
    bias = -lab.weighted_scores(lab.PI[:, None] * late)
    exact = mdp.exact_gradient(mdp.POLICY)
    assert_close(-expected_gradient(reduced(reinforce, "sequence_sum"), *arrays), exact + bias, atol)
    assert np.linalg.norm(bias) > 0.5 * np.linalg.norm(exact)
