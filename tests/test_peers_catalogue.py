"""Goldens of verl, TRL, OpenRLHF and AReaL under the catalogue's names: the same arrays through pgjax, values and gradients.

Where a peer computes something else, its case says why and holds the exact relation, as in `test_peers`. Scripts, versions and
seed: tests/goldens/catalogue.
"""

from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from tests.goldens.peers import shared
from tests.test_peers import (
    SAMPLE_VARIANCE,
    SAMPLED,
    Case,
    assert_complete,
    assert_held,
    differentiated,
    golden,
    scaled,
    value,
)

GOLDENS = Path(__file__).parent / "goldens" / "catalogue"
X = shared.inputs()
CLIP, HIGH, GROUP = shared.CLIP, shared.CLIP_HIGH, shared.GROUP
LENGTHS, COUNT = X.mask.sum(1), X.mask.sum()
ROWS = np.broadcast_to(X.scores[:, None], X.mask.shape)
RANGE = {"clip_eps": CLIP, "clip_eps_high": HIGH}


def loss(function, advantages=X.advantages, **options):
    return differentiated(lambda x: function(x, X.old_logprobs, advantages, X.mask, **options), X.logprobs)


def spread(advantages):
    """Give every token its sequence's advantage."""
    return value(lambda: jnp.where(X.mask, advantages()[:, None], 0.0))


def corrected(weights, **options):
    """PPO's clipped loss, weighed by policy / sampler, of which the reference sampled."""

    def run(x):
        kept = weights(X.old_logprobs, X.ref_logprobs, X.mask, **options)
        return pg.clipped_surrogate_loss(x, X.old_logprobs, X.advantages * kept, X.mask, **RANGE)

    return differentiated(run, X.logprobs)


def geometric(found, *_, floor, cap, **__):
    """Weights of tokens in the sequences whose geometric mean lies in a range."""
    kept = pg.masked_importance_weights(found, X.ref_logprobs, X.mask, floor=floor, cap=cap, level="geometric") > 0
    return pg.truncated_importance_weights(found, X.ref_logprobs, X.mask & kept, cap=jnp.inf)


def unbiased_kl(x):
    losses = pg.clipped_surrogate_loss(x, X.old_logprobs, X.advantages, X.mask, **RANGE)
    return losses + shared.KL_COEF * pg.masked_mean(pg.kl_k3_unbiased(x, X.ref_logprobs, X.old_logprobs), X.mask)


def by_group(x, f):
    return np.repeat([f(g) for g in np.split(np.asarray(x, np.float64), len(x) // GROUP)], GROUP)


def gdpo(lengths):
    rewards = np.stack([X.scores, X.chosen], 1)
    return pg.gdpo_advantages(rewards, jnp.array([1.0, 0.5]), lengths, group_size=GROUP)


def gdpo_by_hand(eps, final):
    """GDPO with a peer's own constants."""
    z = sum(
        w * (r - by_group(r, np.mean)) / (by_group(r, lambda g: g.std(ddof=1)) + eps)
        for w, r in ((1.0, X.scores.astype(np.float64)), (0.5, X.chosen.astype(np.float64)))
    )
    return final(z)


def whitened_tokens(z):
    tokens = np.repeat(z, LENGTHS)
    return np.where(X.mask, ((z - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8))[:, None], 0)


def optimal_token():
    squares = 1 / (1 + np.exp(-X.values))
    returns = jnp.where(X.mask, ROWS, 0.0)
    baseline = pg.optimal_token_baseline(returns, X.old_logprobs, squares, X.mask, group_size=GROUP)
    return returns - baseline


MOVED = np.where(X.mask, np.abs(X.logprobs - X.old_logprobs), np.inf)
SAPO = loss(pg.sapo_loss)
BY_LENGTH = pg.reinforce_plus_plus_advantages
GSPO_ROWS = loss(pg.gspo_loss, ROWS, **RANGE)
CISPO_5 = loss(pg.cispo_loss, clip_eps_high=4.0)
CASES = {
    "verl": {
        "gspo": Case(loss(pg.gspo_loss, **RANGE)),
        "sapo": Case(SAPO),
        "dppo_tv": Case(loss(pg.dppo_loss, delta=0.1)),
        "dppo_kl": Case(loss(pg.dppo_loss, divergence="kl", delta=0.02)),
        "cispo": Case(loss(pg.cispo_loss, **RANGE)),
        "gmpo": Case(loss(pg.gmpo_loss, **RANGE)),
        "kl_cov": Case(loss(pg.kl_cov_loss, fraction=0.3, coef=0.5)),
        "dro": Case(loss(pg.squared_log_ratio_loss, coef=0.3)),
        "opo": Case(spread(lambda: pg.opo_advantages(X.scores, LENGTHS, group_size=GROUP))),
        "pass_at_k": Case(
            spread(lambda: pg.pass_at_k_advantages(X.scores, group_size=GROUP)),
            "gives 1 / G of it, and divides by the group's deviation unless told not to: its mean over rows is 1 / G of the "
            "gradient of E[max]",
            scaled(1 / GROUP),
        ),
        "reinforce_plus_plus": Case(spread(lambda: BY_LENGTH(X.scores, LENGTHS)), SAMPLE_VARIANCE, scaled(SAMPLED)),
        "reinforce_plus_plus_baseline": Case(
            spread(lambda: BY_LENGTH(X.scores, LENGTHS, group_size=GROUP)), SAMPLE_VARIANCE, scaled(SAMPLED)
        ),
        "gdpo": Case(
            spread(lambda: gdpo(LENGTHS)),
            "adds 1e-6 to a group's deviation where ours adds 1e-4, and divides the batch's variance by n - 1",
            lambda _: [gdpo_by_hand(1e-6, whitened_tokens)],
        ),
        "optimal_token_baseline": Case(value(optimal_token), inside=X.mask),
        "token_truncated": Case(value(partial(pg.truncated_importance_weights, cap=1.2), X.logprobs, X.old_logprobs, X.mask)),
        "sequence_truncated": Case(
            value(partial(pg.truncated_importance_weights, cap=1.2, level="sequence"), X.logprobs, X.old_logprobs, X.mask)
        ),
        "icepop": Case(value(partial(pg.icepop_weights, floor=0.8, cap=1.5), X.logprobs, X.old_logprobs, X.mask)),
    },
    "trl": {
        "gspo": Case(GSPO_ROWS),
        "gspo_bnpo": Case(
            GSPO_ROWS,
            "weighs sequences by their lengths; ours with token_mean likewise",
            lambda _: loss(pg.gspo_loss, ROWS, reduce="token_mean", **RANGE)(),
        ),
        "cispo": Case(
            CISPO_5,
            "takes epsilon_high, 0.2 unless told otherwise, for the largest weight itself: 0.2 of the gradient, as all "
            "weights are above it",
            lambda _: [x * np.float32(0.2) for x in loss(lambda x, old, a, m: pg.policy_gradient_loss(x, a, m))()],
        ),
        "cispo_5": Case(CISPO_5),
        "sapo": Case(SAPO),
        "vespo": Case(loss(pg.vespo_loss)),
        "unbiased_kl": Case(differentiated(unbiased_kl, X.logprobs)),
        "gmpo": Case(loss(pg.gmpo_loss, ROWS)),
        "opsm_mask": Case(
            value(lambda: pg.opsm_mask(X.logprobs, X.old_logprobs, ROWS, X.mask, delta=0.05)),
            "gives one number a sequence; ours every sampled token's",
            lambda found: [found[0].any(1, keepdims=True)],
        ),
        "entropy_mask": Case(value(lambda: pg.entropy_quantile_mask(np.exp(X.values), X.mask, fraction=0.3))),
        "gdpo": Case(
            value(lambda: gdpo(None)),
            "adds 1e-4 to the batch's deviation, and divides its variance by n - 1",
            lambda _: [gdpo_by_hand(1e-4, lambda z: (z - z.mean()) / (z.std(ddof=1) + 1e-4))],
        ),
    },
    "openrlhf": {
        "gspo": Case(
            loss(pg.gspo_loss, **RANGE),
            "gives each token the gradient of the whole sequence's ratio: with an advantage a token, the mean of those that the "
            "clip leaves",
            lambda found: [found[0], openrlhf_gspo()],
        ),
        "icepop": Case(corrected(pg.icepop_weights, floor=0.8, cap=1.5)),
        "truncated": Case(corrected(pg.truncated_importance_weights, cap=1.2)),
        "geometric_mask": Case(corrected(geometric, floor=0.9, cap=1.1)),
    },
    "areal": {
        "m2po_0.02": Case(value(partial(pg.m2po_mask, threshold=0.02), X.logprobs, X.old_logprobs, X.mask)),
        "m2po_0.1": Case(value(partial(pg.m2po_mask, threshold=0.1), X.logprobs, X.old_logprobs, X.mask)),
        "m2po_1e-09": Case(
            value(partial(pg.m2po_mask, threshold=1e-9), X.logprobs, X.old_logprobs, X.mask),
            "keeps the token that has moved least where even that one has moved too far; ours none",
            lambda _: [MOVED.min() == MOVED],
        ),
    },
}  # fmt: skip


def openrlhf_gspo():
    """Spread each token's gradient over its sequence."""
    gradient = loss(pg.gspo_loss, **RANGE)()[1]
    return np.where(X.mask, (gradient.sum(1) / LENGTHS)[:, None], 0)


@pytest.mark.parametrize(("peer", "name"), [(peer, name) for peer in CASES for name in CASES[peer]])
def test_pgjax_agrees_with_a_peer_or_differs_for_the_reason_given(peer, name):
    assert_held(CASES[peer][name], golden(GOLDENS, peer)["entries"][name])


def test_every_golden_has_its_case_and_every_file_its_script():
    assert_complete(GOLDENS, CASES)
