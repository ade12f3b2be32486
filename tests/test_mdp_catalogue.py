"""What the catalogue's names estimate, by enumeration of the token MDP: exactly the gradient of J, of something else, or biased.

On policy, off policy, and the tables of experiments/README.md against the command that writes them.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from experiments.laboratory import catalogue
from experiments.laboratory import exact_moments as em
from experiments.laboratory import token_mdp as mdp
from tests import expected_gradients as lab
from tests.compare import assert_close

NEW = mdp.POLICY + 0.5 * np.random.default_rng(2).standard_normal(mdp.POLICY.shape)
PROX = mdp.POLICY + 0.4 * (NEW - mdp.POLICY)
LOGP, PROX_LOGP = mdp.exact_logprobs(NEW), mdp.exact_logprobs(PROX)
A = np.broadcast_to((mdp.REWARD - 0.3)[:, None], (256, 4))
D = LOGP - lab.TOKEN_LOGP
R, S, W = np.exp(D), np.exp(D.mean(1, keepdims=True)), np.exp(D.sum(1, keepdims=True))
GATE = 1 / (1 + np.exp(-np.where(A > 0, 1.0, 1.05) * (R - 1)))
STOPPED = np.where(A > 0, R > 1.2, R < 0.8)
FAR = np.abs(np.exp(LOGP) - np.exp(lab.TOKEN_LOGP)) > 0.2
HELD = np.where(A > 0, np.minimum(D, 0.4), np.maximum(D, -0.4))
K, RATE = np.where(A >= 0, 2, 3), np.where(A >= 0, 3, 2)
U, V = np.exp(LOGP - PROX_LOGP), np.exp(PROX_LOGP - lab.TOKEN_LOGP)
LOSSES = {  # what weighs the gradient of a token's log pi once the policy has moved, in closed form
    "no correction": (lambda x, old, prox, a, m, **o: pg.policy_gradient_loss(x, a, m, **o), A),
    "no clip": (lambda x, old, prox, a, m, **o: pg.clipped_surrogate_loss(x, old, a, m, clip_eps=jnp.inf, **o), R * A),
    "sequence weights": (
        lambda x, old, prox, a, m, **o: pg.policy_gradient_loss(
            x, a * pg.truncated_importance_weights(x, old, m, cap=jnp.inf, level="sequence"), m, **o
        ),
        W * A,
    ),
    "gspo": (
        lambda x, old, prox, a, m, **o: pg.gspo_loss(x, old, a, m, clip_eps=0.2, clip_eps_high=None, **o),
        np.where(np.where(A > 0, S > 1.2, S < 0.8), 0, S * A),
    ),
    "gmpo": (
        lambda x, old, prox, a, m, **o: pg.gmpo_loss(x, old, a, m, **o),
        np.exp(HELD.mean(1, keepdims=True)) * A * (HELD == D),
    ),
    "vespo": (lambda x, old, prox, a, m, **o: pg.vespo_loss(x, old, a, m, **o), W**K * np.exp(RATE * (1 - W)) * A),
    "cispo": (
        lambda x, old, prox, a, m, **o: pg.cispo_loss(x, old, a, m, clip_eps_high=0.5, **o), np.minimum(R, 1.5) * A,
    ),
    "sapo": (lambda x, old, prox, a, m, **o: pg.sapo_loss(x, old, a, m, **o), 4 * GATE * (1 - GATE) * R * A),
    "dppo": (
        lambda x, old, prox, a, m, **o: pg.dppo_loss(x, old, a, m, **o), np.where(FAR & ((A > 0) == (R > 1)), 0, R * A),
    ),
    "decoupled": (
        lambda x, old, prox, a, m, **o: pg.decoupled_ppo_loss(x, prox, old, a, m, **o),
        np.where(np.where(A > 0, U > 1.2, U < 0.8), 0, U * V * A),
    ),
    "squared": (lambda x, old, prox, a, m, **o: pg.squared_log_ratio_loss(x, old, a, m, coef=0.2, **o), A - 0.4 * D),
    "kl_cov": (lambda x, old, prox, a, m, **o: pg.kl_cov_loss(x, old, a, m, **o), None),
}  # fmt: skip


@pytest.fixture(scope="module")
def gradients():
    """The expected gradient of every loss on samples of `mdp.POLICY`: at it, and at NEW."""
    losses = {name: loss for name, (loss, _) in LOSSES.items()}

    def each(x, *known):
        return {
            name: jax.grad(lambda x: loss(x, *known, reduce="sequence_sum"))(x)  # noqa: B023
            for name, loss in losses.items()
        }

    def at(table, prox):
        given = (mdp.exact_logprobs(table), lab.TOKEN_LOGP, mdp.exact_logprobs(prox), A)
        arrays = [em.framed(x)[:, None] for x in given]
        return {
            name: lab.weighted_scores(-lab.PI[:, None] * np.asarray(x)[:, 0, 1:], table)
            for name, x in run(*arrays, mdp.MASK[:, None]).items()
        }

    with jax.enable_x64(True):
        run = jax.jit(jax.vmap(each))
        return at(mdp.POLICY, mdp.POLICY), at(NEW, PROX)


def test_on_policy_every_loss_has_the_exact_gradient(gradients):
    assert_close(gradients[0], dict.fromkeys(LOSSES, lab.SCORE_GRADIENT), 1e-12)


def test_off_policy_each_is_biased_as_its_docstring_says(gradients):
    for name, (_, weights) in LOSSES.items():
        if weights is not None:
            known = lab.weighted_scores(lab.PI[:, None] * weights, NEW)
            assert_close(gradients[1][name], known, 1e-12, name=name)
    exact = mdp.exact_gradient(NEW, beta=0.0)
    assert_close(gradients[1]["sequence weights"], exact, 1e-10)
    biases = {name: np.linalg.norm(x - exact) / np.linalg.norm(exact) for name, x in gradients[1].items()}
    assert min(bias for name, bias in biases.items() if name != "sequence weights") > 0.2, biases


def test_each_loss_of_the_table_above_acts_on_some_tokens():
    for stopped in (STOPPED, FAR & ((A > 0) == (R > 1)), HELD != D, R > 1.5, np.where(A > 0, U > 1.2, U < 0.8)):
        assert 1e-4 < lab.PI @ stopped.mean(1) < 0.9


def expected(charge, table):
    """The expected gradient of a charge on samples of `mdp.POLICY`: charge(logprobs [4]) -> []."""
    with jax.enable_x64(True):
        found = jax.jit(jax.vmap(jax.grad(charge)))(mdp.exact_logprobs(table), mdp.REF_LOGPROBS, lab.TOKEN_LOGP)
    return lab.weighted_scores(lab.PI[:, None] * np.asarray(found), table)


def test_the_unbiased_kl_is_each_tokens_own_kl_at_the_samplers_prefixes_and_of_sequences_exact():
    p, q = lab.softmax(NEW), lab.softmax(mdp.REFERENCE)
    d = np.log(p) - np.log(q)
    local = lab.visits(lab.PI)[:, None] * p * (d - (p * d).sum(1, keepdims=True))
    tokens = lambda x, ref, old: pg.kl_k3_unbiased(x, ref, old).sum()
    whole = lambda x, ref, old: pg.kl_k3_unbiased(x.sum(), ref.sum(), old.sum())
    assert_close(expected(tokens, NEW), local, 1e-12)
    assert_close(expected(tokens, mdp.POLICY), lab.LOCAL_GRADIENT, 1e-12)
    exact = mdp.exact_gradient(NEW, beta=0.0) - mdp.exact_gradient(NEW, beta=1.0)
    assert_close(expected(whole, NEW), exact, 1e-10)


def test_distillation_is_each_tokens_own_reverse_kl_and_exact_with_reward_to_go():
    with jax.enable_x64(True):
        found = np.asarray(pg.distillation_advantages(mdp.REF_LOGPROBS, lab.TOKEN_LOGP))
        to_go = np.asarray(pg.monte_carlo_returns(found, None))
    assert_close(lab.weighted_scores(lab.PI[:, None] * found), -lab.LOCAL_GRADIENT, 1e-12)
    assert_close(lab.weighted_scores(lab.PI[:, None] * to_go), -lab.KL_GRADIENT, 1e-12)


def test_astar_po_climbs_j_on_policy_and_rests_at_its_optimum_on_any_samples():
    def gradient(logp, value):
        with jax.enable_x64(True):
            run = jax.vmap(jax.grad(lambda x, ref, r: pg.astar_po_loss(x[None], ref[None], r, value, beta=mdp.BETA)))
            return np.asarray(run(jnp.asarray(logp), mdp.REF_LOGPROBS, mdp.REWARD[:, None]))

    for value in (0.0, mdp.OPTIMUM):
        found = gradient(lab.TOKEN_LOGP, np.full(1, value))
        known = -2 * mdp.BETA * mdp.exact_gradient(mdp.POLICY)
        assert_close(lab.weighted_scores(lab.PI[:, None] * found), known, 1e-12)
    best = mdp.REF_LOGPROBS + (np.log(mdp.BEST) - mdp.REF_LOGPROBS.sum(1))[:, None] / 4  # its sums are the optimum's
    assert_close(gradient(best, np.full(1, mdp.OPTIMUM)), np.zeros((256, 4)), 1e-12)


@pytest.mark.parametrize("group", [2, 4, 5])
def test_maxrl_and_pass_at_k_with_scores_of_0_and_1(group):
    # E[A_i grad log pi_i] is (E[A_i | success] - E[A_i | failure]) grad p.
    outcomes = np.array(list(itertools.product([0.0, 1.0], repeat=group)))
    k = max(2, group - 1)
    with jax.enable_x64(True):
        given = jnp.asarray(outcomes.reshape(-1))
        maxrl = pg.maxrl_advantages(given, group_size=group, eps=1e-15).reshape(outcomes.shape)[:, 0]
        best = pg.pass_at_k_advantages(given, group_size=group, k=k).reshape(outcomes.shape)[:, 0]
    for p in (0.05, 0.3, 0.9):
        of_others = (p ** outcomes[:, 1:] * (1 - p) ** (1 - outcomes[:, 1:])).prod(1) * (2 * outcomes[:, 0] - 1)
        assert of_others @ np.asarray(maxrl) == pytest.approx((1 - (1 - p) ** (group - 1)) / p, rel=1e-10)
        assert of_others @ np.asarray(best) == pytest.approx(k * (1 - p) ** (k - 1), rel=1e-10)


def test_the_best_of_two_and_opo_in_pairs():
    """Graded scores: E[A | a sequence] over all partners, then over the sequence."""
    scores, chances = mdp.REWARD[em.PAIRS], lab.PI[em.PAIRS[:, 1]]

    def gradient(advantages):
        with jax.enable_x64(True):
            found = np.asarray(jax.jit(jax.vmap(advantages))(scores))[:, 0]
        return lab.weighted_scores(lab.PI * (chances * found).reshape(256, 256).sum(1))

    best = np.maximum(mdp.REWARD[:, None], mdp.REWARD[None]) @ lab.PI
    assert_close(
        gradient(lambda x: pg.pass_at_k_advantages(x, group_size=2)), lab.weighted_scores(2 * lab.PI * best), 1e-10
    )
    lengths = jnp.array([4, 4])
    assert_close(gradient(lambda x: pg.opo_advantages(x, lengths, group_size=2)), lab.SCORE_GRADIENT / 2, 1e-10)


def test_moments_are_those_of_the_plain_sums():
    """The variance of whole returns without a baseline is the 3.76 that the sums over sequences give."""

    def loss(logprobs, returns, mask):
        return pg.policy_gradient_loss(logprobs, returns, mask, reduce="sequence_sum")

    returns = np.broadcast_to(lab.TOTAL[:, None], (256, 4))
    arrays = em.framed(returns), mdp.MASK
    found = em.moments(loss, arrays, mdp.POLICY, mdp.POLICY, lab.SINGLES)
    assert_close(found.mean, mdp.exact_gradient(mdp.POLICY).ravel(), 1e-12)
    terms = np.einsum("nt,ntij->nij", returns, mdp.exact_scores(mdp.POLICY)).reshape(256, -1)
    assert found.variance == pytest.approx(lab.PI @ (terms**2).sum(1) - found.mean @ found.mean)
    assert found.variance == pytest.approx(3.76, abs=5e-3)


def test_the_tables_of_the_page_are_those_of_the_command():
    for which, rows, names in (
        ("losses", catalogue.LOSSES, {"gspo_loss"}),
        ("advantages", catalogue.ADVANTAGES, {"optimal_token_baseline"}),
    ):
        page = catalogue.of_page(which)
        assert catalogue.table_of(rows, names) in page
        assert page.count("\n") == len(rows) + 2, "a row that is not in the page"
    assert catalogue.of_page("corrections").count("\n") == len(catalogue.CORRECTIONS) + 2


@pytest.mark.campaign
def test_the_whole_tables_of_the_page_are_those_of_the_command():
    assert catalogue.of_page("losses") == catalogue.table_of(catalogue.LOSSES)
    assert catalogue.of_page("advantages") == catalogue.table_of(catalogue.ADVANTAGES)
    assert catalogue.of_page("corrections") == catalogue.table_of_corrections(catalogue.correct())
