"""Goldens of TRL, OpenRLHF, rlax and Tunix: the same arrays through pgjax, values and gradients.

Where a peer computes something else, its case says why and holds the exact relation; that the plain numbers differ is
asserted too. Scripts, versions and seed: tests/goldens/peers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from tests.goldens.peers import shared

GOLDENS = Path(__file__).parent / "goldens" / "peers"
X = shared.inputs()
COUNT, PLACES = int(X.mask.sum()), X.mask.size
SAMPLED = np.sqrt(np.float32((COUNT - 1) / COUNT))  # a population's standard deviation in samples' ones
PROMPT, CLIP, COEF, GROUP = shared.PROMPT, shared.CLIP, np.float32(shared.KL_COEF), shared.GROUP
DEVIATIONS = np.repeat(X.scores.reshape(-1, GROUP).std(axis=1, ddof=1), GROUP)
ADVANTAGES = np.broadcast_to(X.scores[:, None], X.mask.shape)
WHOLE_MASK = np.pad(X.mask, ((0, 0), (PROMPT, 0)))
FAR = np.array([12.0, -12.0, 3.0], np.float32)
KL = X.logprobs - X.ref_logprobs

Found = list[np.ndarray]  # a value, or a value and its gradient


@dataclass(frozen=True)
class Case:
    ours: Callable[[], Found]
    why: str = ""  # what the peer does otherwise
    relation: Callable[[Found], Found] | None = None  # from our numbers to the peer's
    inside: np.ndarray | None = None  # compared here only: what a peer leaves outside its mask is read by nobody


def value(function, *args, **kwargs):
    return cache(lambda: [np.asarray(jax.jit(partial(function, **kwargs))(*args))])


def differentiated(function, x):
    """Value and gradient of a scalar function."""
    return cache(lambda: [np.asarray(y) for y in jax.jit(jax.value_and_grad(function))(jnp.asarray(x))])


def summed(function, x):
    """Values and the gradient of their sum."""
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(function(x))))
    return cache(lambda: [np.asarray(function(x)), np.asarray(gradient(jnp.asarray(x)))])


def scaled(factor):
    return lambda found: [np.float32(factor) * x for x in found]


def logprobs(logits, temperature=1.0):
    return pg.token_logprobs(logits, X.tokens, temperature=temperature)[:, PROMPT:]


def at_positions(gradient):
    return gradient[:, PROMPT - 1 : -1]


def weighted_logprobs():
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(X.advantages * logprobs(z, shared.TEMPERATURE))))
    return [*COOLED_LOGPROBS(), np.asarray(at_positions(gradient(jnp.asarray(X.logits))))]


def entropy(temperature=1.0):
    return pg.token_entropy(X.logits, temperature=temperature)[:, PROMPT:]


def clipped(mask=X.mask, advantages=X.advantages, high=shared.CLIP_HIGH, **options):
    loss = lambda x: pg.clipped_surrogate_loss(
        x, X.old_logprobs, advantages, mask, clip_eps=CLIP, clip_eps_high=high, **options
    )
    return differentiated(loss, X.logprobs)


def clipped_and_k3(advantages):
    def loss(x):
        surrogate = pg.clipped_surrogate_loss(
            x, X.old_logprobs, advantages, X.mask, clip_eps=CLIP, clip_eps_high=shared.CLIP_HIGH
        )
        return surrogate + COEF * pg.masked_mean(pg.kl_k3(x, X.ref_logprobs), X.mask)

    return differentiated(loss, X.logprobs)


def sequence_ratio():
    def loss(x):
        sums = (jnp.sum(jnp.where(X.mask, y, jnp.zeros_like(y)), axis=1) for y in (x, jnp.asarray(X.old_logprobs)))
        return pg.clipped_surrogate_loss(*sums, X.scores, clip_eps=CLIP, clip_eps_high=shared.CLIP_HIGH)

    return differentiated(loss, X.logprobs)


def ratio_clipped():
    loss = lambda r: pg.clipped_surrogate_loss(jnp.log(r), jnp.zeros_like(r), X.advantages, clip_eps=CLIP)
    return differentiated(loss, np.exp(X.logprobs - X.old_logprobs))


def diagnostic(name):
    return value(lambda: pg.surrogate_diagnostics(X.logprobs, X.old_logprobs, X.mask, clip_eps=CLIP)[name])


def share_without_gradient(loss):
    return lambda _: [np.mean(loss()[1][X.mask] == 0)]


def from_logits(loss, mend=lambda gradient: gradient):
    """A loss of the logits, with the gradient to them."""

    def run():
        found, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(X.logits))
        return [np.asarray(found), np.asarray(mend(gradient))]

    return run


def value_loss(**clip):
    return differentiated(lambda x: pg.value_loss(x, X.returns, X.mask, **clip), X.values)


def preference(**options):
    return differentiated(lambda x: pg.preference_loss(x[0], x[1], **options), np.stack([X.chosen, X.rejected]))


def returns(mask=X.mask, rewards=X.rewards, discount=shared.DISCOUNT):
    return value(pg.monte_carlo_returns, rewards, mask, discount=discount)


def advantages():
    return pg.monte_carlo_advantages(X.rewards, X.values, X.mask, discount=shared.DISCOUNT)


def leave_one_out(scores=X.scores):
    return scores - pg.leave_one_out_baseline(scores, group_size=GROUP)


def shaped_returns(scores, discount=1.0):
    """Scores, or advantages of whole sequences, with the KL in the reward."""
    rewards = pg.kl_shaped_rewards(scores, KL, X.mask, kl_coef=shared.KL_COEF)
    return pg.monte_carlo_returns(rewards, X.mask, discount=discount)


def actor_critic():
    return pg.masked_whiten(shaped_returns(X.scores, shared.DISCOUNT) - X.values, X.mask)


def coefficients():
    return jnp.stack(
        [
            pg.adaptive_kl_coef(
                shared.KL_COEF, kl, target=shared.TARGET_KL, horizon=shared.HORIZON, batch_size=shared.ROWS
            )
            for kl in shared.CONTROLLER_KLS
        ]
    )


def k1(x):
    return pg.kl_k1(x, X.ref_logprobs)


def k2(x):
    return pg.kl_k2(x, X.ref_logprobs)


def k3(x):
    return pg.kl_k3(x, X.ref_logprobs)


def without_epsilon(theirs):
    return (DEVIATIONS + np.float32(1e-4)) / (DEVIATIONS + np.float32(theirs))


def kl_everywhere(found):
    return [found[0] - np.where(X.mask, 0, COEF * KL)]


CLIPPED = clipped()
CLIPPED_DUAL = clipped(dual_clip=shared.DUAL_CLIP)
CLIPPED_SEQUENCES = clipped(reduce="sequence_mean")
CLIPPED_SEQUENCES_EMPTY_ROW = clipped(X.mask_empty_row, reduce="sequence_mean")
CLIPPED_SUMS = clipped(reduce="sequence_sum")
CLIPPED_ONE_EPSILON = clipped(high=None)
GRPO_SUMS = clipped(advantages=ADVANTAGES, reduce="sequence_sum")
CLIP_FRACTION = diagnostic("clip_fraction")
CLIPPED_VALUES = value_loss(old_values=X.old_values, clip_eps=shared.VALUE_CLIP)
PREFERENCE = preference()
PREFERENCE_MARGIN = preference(margin=X.margin)
RETURNS = returns()
RETURNS_HOLES = returns(X.mask_holes)
ADVANTAGES_OF_VALUES = value(advantages)
LEAVE_ONE_OUT = value(leave_one_out)
LOGPROBS = value(logprobs, X.logits)
COOLED_LOGPROBS = value(logprobs, X.logits, shared.TEMPERATURE)
ENTROPY = value(entropy)
MEAN = value(pg.masked_mean, X.rewards, X.mask)
COEFFICIENTS = value(coefficients)
K2 = summed(k2, X.logprobs)
K3 = summed(k3, X.logprobs)
K1 = summed(k1, X.logprobs)
EXACT_KL = value(lambda z, ref: pg.categorical_kl(z, ref)[:, PROMPT:], X.logits, X.ref_logits)
WHITENED_ADVANTAGES = value(lambda: pg.masked_whiten(advantages(), X.mask))
GROUP_NORMALIZED = value(pg.group_advantages, X.scores, group_size=GROUP)
GROUP_CENTRED = value(pg.group_advantages, X.scores, group_size=GROUP, normalize=False)
SHAPED = value(pg.kl_shaped_rewards, X.scores, KL, X.mask, kl_coef=shared.KL_COEF)
WHITENED = value(pg.masked_whiten, X.rewards, X.mask)
BINDING = "counts a token only where the clip takes its gradient; ours counts every ratio out of the range"
SAMPLE_VARIANCE = "divides the variance by n - 1; ours is the population's"
OUTSIDE = "leaves the KL's charge on tokens that nobody sampled; ours is 0 there"
PER_PLACE = "averages over every place, masked ones too; ours over the masked-in ones"

CASES = {
    "trl": {
        "token_logprobs": Case(weighted_logprobs),
        "token_entropy": Case(ENTROPY),
        "clipped_bnpo": Case(CLIPPED),
        "clipped_dapo": Case(CLIPPED),
        "clipped_grpo": Case(CLIPPED_SEQUENCES),
        "clipped_grpo_empty_row": Case(
            CLIPPED_SEQUENCES_EMPTY_ROW,
            "counts a sequence without tokens as one of loss 0; ours leaves it out of the mean",
            scaled((shared.ROWS - 1) / shared.ROWS),
        ),
        "clipped_dr_grpo": Case(
            CLIPPED_SUMS,
            "divides by the completion limit too, a constant for the learning rate to absorb",
            scaled(1 / shared.COMPLETION),
        ),
        "clipped_luspo": Case(CLIPPED_SUMS),
        "clipped_delta": Case(CLIPPED_DUAL),
        "clipped_with_k3": Case(clipped_and_k3(X.advantages)),
        "clip_fraction": Case(CLIP_FRACTION, BINDING, share_without_gradient(CLIPPED)),
        "sequence_ratio": Case(sequence_ratio()),
        "group_normalized": Case(GROUP_NORMALIZED),
        "group_centred": Case(GROUP_CENTRED),
        "leave_one_out": Case(LEAVE_ONE_OUT),
        "leave_one_out_with_kl": Case(value(leave_one_out, X.scores - COEF * np.where(X.mask, KL, 0).sum(axis=1))),
        "preference": Case(PREFERENCE),
        "preference_margin": Case(PREFERENCE_MARGIN),
        "preference_centred": Case(preference(center_coef=shared.CENTER)),
    },
    "trl_ppo": {
        "token_logprobs": Case(LOGPROBS),
        "token_entropy": Case(ENTROPY),
        "masked_mean": Case(MEAN),
        "masked_whiten": Case(WHITENED, SAMPLE_VARIANCE, scaled(SAMPLED), X.mask),
        "masked_whiten_keep_mean": Case(
            value(pg.masked_whiten, X.rewards, X.mask, shift_mean=False),
            SAMPLE_VARIANCE,
            lambda found: [SAMPLED * found[0] + (1 - SAMPLED) * X.rewards[X.mask].mean()],
            X.mask,
        ),
        "kl_k1": Case(value(k1, X.logprobs)),
        "kl_k2": Case(value(k2, X.logprobs)),
        "categorical_kl": Case(EXACT_KL),
        "kl_shaped_rewards": Case(SHAPED, OUTSIDE, kl_everywhere),
        "returns": Case(RETURNS),
        "whitened_advantages": Case(WHITENED_ADVANTAGES, SAMPLE_VARIANCE, scaled(SAMPLED), X.mask),
        "policy_loss": Case(CLIPPED_ONE_EPSILON),
        "value_loss": Case(CLIPPED_VALUES),
        "approx_kl": Case(
            diagnostic("approx_kl"),
            "estimates by k2, which is biased; ours by r - 1 - log r, which isn't",
            lambda _: [np.asarray(pg.masked_mean(pg.kl_k2(X.logprobs, X.old_logprobs), X.mask))],
        ),
        "clip_fraction": Case(CLIP_FRACTION, BINDING, share_without_gradient(CLIPPED_ONE_EPSILON)),
        "entropy": Case(value(lambda: pg.masked_mean(entropy(), X.mask))),
        "adaptive_kl_coef": Case(COEFFICIENTS),
    },
    "openrlhf": {
        "token_logprobs": Case(COOLED_LOGPROBS),
        "token_entropy": Case(ENTROPY),
        "masked_mean": Case(MEAN),
        "masked_whiten_rows": Case(value(jax.vmap(pg.masked_whiten), X.rewards, X.mask)),
        "clipped_token_mean": Case(CLIPPED),
        "clipped_dual": Case(CLIPPED_DUAL),
        "clipped_sequence_mean": Case(CLIPPED_SEQUENCES),
        "clipped_sequence_mean_empty_row": Case(CLIPPED_SEQUENCES_EMPTY_ROW),
        "clip_fraction": Case(CLIP_FRACTION, BINDING, share_without_gradient(CLIPPED)),
        "ppo_kl": Case(value(lambda: pg.masked_mean(pg.kl_k1(X.old_logprobs, X.logprobs), X.mask))),
        "value_loss": Case(value_loss()),
        "value_loss_clipped": Case(CLIPPED_VALUES),
        "cross_entropy_logprobs": Case(differentiated(lambda x: pg.cross_entropy_loss(x, X.mask), X.logprobs)),
        "cross_entropy_logits": Case(
            from_logits(lambda z: pg.cross_entropy_loss(pg.token_logprobs(z, X.tokens), WHOLE_MASK))
        ),
        "preference": Case(PREFERENCE),
        "preference_margin": Case(PREFERENCE_MARGIN),
        "kl_k1": Case(K1),
        "kl_k2": Case(K2),
        "kl_k3": Case(K3),
        "kl_k3_unbiased_gradient": Case(
            K3,
            "keeps k3's value and takes k2's gradient, a token's own share of KL(policy || reference)",
            lambda found: [found[0], summed(k2, X.logprobs)()[1]],
        ),
        "kl_k1_far": Case(
            value(pg.kl_k1, FAR, np.zeros_like(FAR)),
            "bounds every estimate by 10; ours is the estimate",
            lambda found: [np.clip(found[0], -10, 10)],
        ),
        "kl_k3_far": Case(
            value(pg.kl_k3, FAR, np.zeros_like(FAR)),
            "bounds every estimate by 10; ours is the estimate",
            lambda found: [np.clip(found[0], -10, 10)],
        ),
        "kl_shaped_rewards": Case(SHAPED, OUTSIDE, kl_everywhere),
        "returns": Case(RETURNS),
        "returns_holes": Case(
            RETURNS_HOLES,
            "discounts once a place, holes too; ours once a sampled token",
            lambda _: returns(None, np.where(X.mask_holes, X.rewards, np.float32(0)))(),
        ),
        "gae_advantages": Case(ADVANTAGES_OF_VALUES),
        "gae_returns": Case(RETURNS),
        "experience_rloo": Case(value(lambda: shaped_returns(leave_one_out()))),
        "experience_dr_grpo": Case(lambda: value(shaped_returns, GROUP_CENTRED()[0])()),
        "experience_group_norm": Case(
            lambda: value(shaped_returns, GROUP_NORMALIZED()[0])(),
            "adds 1e-9 to the group's deviation; ours adds 1e-4",
            lambda _: value(shaped_returns, GROUP_NORMALIZED()[0] * without_epsilon(1e-9))(),
        ),
        "experience_gae": Case(value(actor_critic), inside=X.mask),
        "adaptive_kl_coef": Case(COEFFICIENTS),
    },
    "rlax": {
        "token_logprobs": Case(COOLED_LOGPROBS),
        "token_entropy": Case(value(entropy, shared.TEMPERATURE)),
        "categorical_kl": Case(EXACT_KL),
        "policy_gradient": Case(
            from_logits(
                lambda z: pg.policy_gradient_loss(logprobs(z), X.advantages, X.mask),
                lambda gradient: at_positions(gradient).reshape(PLACES, -1),
            ),
            PER_PLACE,
            scaled(COUNT / PLACES),
        ),
        "clipped": Case(ratio_clipped()),
        "entropy_loss": Case(value(lambda: -pg.masked_mean(entropy(), X.mask)), PER_PLACE, scaled(COUNT / PLACES)),
        "returns": Case(RETURNS),
        "advantages": Case(ADVANTAGES_OF_VALUES),
        "value_loss": Case(differentiated(lambda v: pg.value_loss(v, X.returns), X.values)),
    },
    "tunix": {
        "token_logprobs": Case(LOGPROBS),
        "token_entropy": Case(ENTROPY),
        "masked_mean": Case(MEAN),
        "masked_whiten": Case(WHITENED, SAMPLE_VARIANCE, scaled(SAMPLED), X.mask),
        "kl_k1": Case(K1),
        "kl_k2": Case(K2),
        "kl_k3": Case(K3),
        "ppo": Case(CLIPPED),
        "ppo_dual_clip": Case(CLIPPED_DUAL),
        "ppo_clip_fraction": Case(CLIP_FRACTION, BINDING, share_without_gradient(CLIPPED)),
        "value_loss": Case(CLIPPED_VALUES),
        "grpo_token_mean": Case(clipped(advantages=ADVANTAGES)),
        "grpo_sequence_mean": Case(clipped(advantages=ADVANTAGES, reduce="sequence_mean")),
        "grpo_sequence_sum": Case(GRPO_SUMS),
        "grpo_sequence_scale": Case(
            GRPO_SUMS,
            "divides by the longest completion too, a constant for the learning rate to absorb",
            scaled(1 / shared.COMPLETION),
        ),
        "grpo_sequence_sum_norm": Case(GRPO_SUMS),
        "grpo_sequence_mean_empty_row": Case(clipped(X.mask_empty_row, ADVANTAGES, reduce="sequence_mean")),
        "grpo_with_k3": Case(clipped_and_k3(ADVANTAGES)),
        "gae_returns": Case(RETURNS, inside=X.mask),
        "gae_advantages": Case(WHITENED_ADVANTAGES, SAMPLE_VARIANCE, scaled(SAMPLED), X.mask),
        "gae_returns_holes": Case(RETURNS_HOLES, inside=X.mask_holes),
        "group_normalized": Case(
            GROUP_NORMALIZED,
            "adds 1e-6 to the group's deviation; ours adds 1e-4",
            lambda found: [found[0] * without_epsilon(1e-6)],
        ),
        "group_centred": Case(GROUP_CENTRED),
        "leave_one_out": Case(LEAVE_ONE_OUT),
    },
}


def golden(folder, peer):
    return json.loads((folder / f"{peer}.json").read_text())


def agree(found, theirs, inside):
    """Equal to 1e-5 of each number, or to 1e-6 near zero, in shape too."""
    if [x.shape for x in found] != [x.shape for x in theirs]:
        return False
    seen = [(x, y) if inside is None else (x[inside], y[inside]) for x, y in zip(found, theirs, strict=True)]
    return all(np.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in seen)


def assert_held(case, entry):
    """Hold pgjax's answer to a peer's, or to its relation where the peer differs."""
    theirs = [np.asarray(entry[part]) for part in ("value", "gradient") if part in entry]
    found = case.ours()
    if case.relation is not None:
        assert case.why
        assert not agree(found, theirs, case.inside), "the peer no longer differs: the relation has nothing to explain"
        found = case.relation(found)
    assert agree(found, theirs, case.inside), (found, theirs)


def assert_complete(folder, cases):
    """Each golden has its case, and each file its script, version and seed."""
    assert {path.stem for path in folder.glob("*.json")} == set(cases)
    for peer, entries in cases.items():
        made = golden(folder, peer)
        assert set(made["entries"]) == set(entries)
        assert made["seed"] == shared.SEED
        assert made["version"]
        assert (folder.parents[2] / made["made_by"]).is_file()
        assert all(entry["function"] for entry in made["entries"].values())


@pytest.mark.parametrize(("peer", "name"), [(peer, name) for peer in CASES for name in CASES[peer]])
def test_pgjax_agrees_with_a_peer_or_differs_for_the_reason_given(peer, name):
    assert_held(CASES[peer][name], golden(GOLDENS, peer)["entries"][name])


def test_every_golden_has_its_case_and_every_file_its_script():
    assert_complete(GOLDENS, CASES)


def test_the_arrays_reach_every_branch_of_the_losses():
    ratio = np.exp(X.logprobs - X.old_logprobs)[X.mask]
    sign = X.advantages[X.mask]
    branches = [
        (sign > 0) & (ratio > 1 + shared.CLIP_HIGH),
        (sign > 0) & (ratio > 1 + CLIP) & (ratio < 1 + shared.CLIP_HIGH),
        (sign > 0) & (ratio < 1 - CLIP),
        (sign < 0) & (ratio < 1 - CLIP),
        (sign < 0) & (ratio > 1 + shared.CLIP_HIGH) & (ratio < shared.DUAL_CLIP),
        (sign < 0) & (ratio > shared.DUAL_CLIP),
        np.abs(ratio - 1) < CLIP,
    ]
    whole = np.exp(((X.logprobs - X.old_logprobs) * X.mask).sum(axis=1))
    branches += [(X.scores > 0) & (whole > 1 + shared.CLIP_HIGH) | (X.scores < 0) & (whole < 1 - CLIP)]
    step = (X.values - X.old_values)[X.mask]
    held = (X.old_values[X.mask] + np.clip(step, -shared.VALUE_CLIP, shared.VALUE_CLIP) - X.returns[X.mask]) ** 2
    error = (X.values - X.returns)[X.mask] ** 2
    branches += [held > error, held < error, np.abs(step) < shared.VALUE_CLIP]
    assert [bool(branch.any()) for branch in branches] == [True] * len(branches)
    assert len(set(X.mask.sum(axis=1).tolist())) > 3
