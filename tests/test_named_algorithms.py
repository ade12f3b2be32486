"""Algorithms by name beyond the classics: their losses and advantages, microbatches, options on the command line, weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax.core.errors import UserError
from pgjax.core.masking import masked_mean
from pgjax.learning import algorithms, group_algorithms, programs, ratio_algorithms
from pgjax.learning.algorithm import Batch, Experience, check_algorithm
from pgjax.learning.by_name import NAMED, load_algorithm
from pgjax.learning.flags import LearningFlags, algorithm_of, iteration_options
from pgjax.learning.iteration_checks import check_importance
from pgjax.learning.optimizer import accumulate
from pgjax.learning.policy_loss import token_weights
from tests import catalogue_in_numpy as plain
from tests.compare import assert_close
from tests.sizes import campaign_but_for
from tests.tiny import tiny_lm

RNG = np.random.default_rng(0)
ROWS, WINDOW, GROUP = 8, 6, 4
MASK = np.arange(WINDOW)[None] < np.array([6, 2, 3, 5, 4, 6, 1, 3])[:, None]
MASK[:, 0] = False
NEW, OLD, SAMPLED = (RNG.normal(-2, 0.4, (ROWS, WINDOW)).astype(np.float32) for _ in range(3))
SCORES = RNG.gamma(2.0, size=ROWS).astype(np.float32)
PENALTIES = np.where(MASK, RNG.normal(size=MASK.shape), 0).astype(np.float32)
TO_GO = np.where(MASK, np.cumsum(PENALTIES[:, ::-1], axis=1)[:, ::-1], 0)
RETURNS = np.where(MASK, SCORES[:, None] + TO_GO, 0)
KNOWN = Experience(*map(jnp.asarray, (SCORES, PENALTIES, RETURNS, 0 * RETURNS, OLD, OLD, MASK)))
GRPO = np.asarray(pg.grpo().advantages(KNOWN))
LOSSES = {  # an algorithm, and the loss of its tokens in NumPy
    "gspo": plain.gspo,
    "gmpo": plain.gmpo,
    "cispo": plain.cispo,
    "sapo": plain.sapo,
    "dppo": plain.dppo,
    "vespo": plain.vespo,
    "squared_log_ratio": plain.squared,
    "a3po": lambda new, at, old, a, mask: plain.decoupled(new, at, old, a, mask, prox=(old + at) / 2),
}


def batch_of(algorithm, advantages=GRPO):
    x = jnp.zeros(MASK.shape)
    chosen = None if algorithm.choose is None else algorithm.choose(KNOWN, jnp.asarray(advantages))
    ids = jnp.zeros(MASK.shape, jnp.int32)
    given = jnp.asarray(OLD), x, x, jnp.asarray(advantages)
    return Batch(ids, ids > 0, jnp.asarray(MASK), *given, chosen=chosen)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_named_algorithm_is_the_one_of_its_paper(name):
    algorithm = load_algorithm(name)
    assert algorithm == getattr(pg, name)() and hash(algorithm) == hash(getattr(pg, name)())
    assert algorithm.advantages == pg.grpo().advantages and not algorithm.on_policy
    found = jax.jit(algorithm.token_loss)(jnp.asarray(NEW), batch_of(algorithm))
    known = LOSSES[name](*(x.astype(np.float64) for x in (NEW, NEW, OLD, GRPO)), MASK)
    assert_close(found, known, 3e-6, rtol=3e-6)


def test_kl_cov_holds_the_tokens_that_the_whole_rollout_chooses():
    algorithm = pg.kl_cov(fraction=0.2, coef=0.5)
    batch = batch_of(algorithm)
    assert int(batch.chosen.sum()) == int(0.2 * MASK.sum())
    c = plain.covariance(OLD.astype(np.float64), GRPO, MASK)
    assert c[np.asarray(batch.chosen)].min() > c[~np.asarray(batch.chosen)].max()
    ratio = np.exp(NEW - OLD)
    known = np.where(MASK, -ratio * GRPO + 0.5 * np.where(batch.chosen, np.abs(NEW - OLD), 0), 0)
    assert_close(algorithm.token_loss(jnp.asarray(NEW), batch), known, 3e-6)


@pytest.mark.parametrize("name", ["gspo", "gmpo", "vespo", "kl_cov", "dapo"])
def test_microbatches_have_the_gradient_of_the_whole(name):
    """The bug: what is chosen or averaged among all rows is chosen in each part."""
    algorithm = load_algorithm(name, **({"fraction": 0.3} if name == "kl_cov" else {}))
    if name == "gspo":
        algorithm = pg.gspo(clip_eps=0.2, clip_eps_high=None)
    batch = batch_of(algorithm)
    batch = batch._replace(weights=token_weights(batch.mask, algorithm.reduce))

    def loss(shift, part):
        losses = algorithm.token_loss(part.old_logprobs + shift[None], part)
        return masked_mean(losses if part.weights is None else losses * part.weights, part.mask), {}

    gradient = functools.partial(accumulate, loss, jnp.linspace(-0.5, 0.5, WINDOW), batch, batch.mask.sum(1))
    whole, parts = (jax.jit(gradient, static_argnums=0)(count)[0] for count in (1, 4))
    assert np.abs(whole).max() > 1e-3
    assert_close(parts, whole, 1e-6)


def test_advantages_of_groups_compare_scores_and_charge_the_penalties_to_come():
    others = (TO_GO.reshape(-1, GROUP, WINDOW).sum(1, keepdims=True) - TO_GO.reshape(-1, GROUP, WINDOW)) / (GROUP - 1)
    charged = TO_GO - others.reshape(TO_GO.shape)
    lengths = MASK.sum(1)
    for algorithm, scores in {
        pg.maxrl(): plain.maxrl(SCORES.astype(np.float64), GROUP),
        pg.opo(): plain.opo(SCORES.astype(np.float64), lengths, GROUP),
        pg.pass_at_k(): plain.pass_at_k(SCORES.astype(np.float64), GROUP, 4),
        pg.pass_at_k(k=2): plain.pass_at_k(SCORES.astype(np.float64), GROUP, 2),
    }.items():
        check_algorithm(algorithm)
        assert_close(algorithm.advantages(KNOWN), np.where(MASK, scores[:, None] + charged, 0), 1e-5)


def test_reinforce_plus_plus_whitens_over_all_tokens():
    unpenalised = KNOWN._replace(penalties=0 * KNOWN.penalties, returns=jnp.where(MASK, SCORES[:, None], 0.0))
    for size in (1, 4):
        known = plain.reinforce_plus_plus(SCORES.astype(np.float64), size, MASK.sum(1))
        found = pg.reinforce_plus_plus(group_size=size).advantages(unpenalised)
        assert_close(found, np.where(MASK, known[:, None], 0), 1e-5)
        found = pg.reinforce_plus_plus(group_size=size).advantages(KNOWN)
        assert float(found[MASK].mean()) == pytest.approx(0, abs=1e-6) and float(found[MASK].std()) == pytest.approx(1)
        assert np.ptp(np.asarray(found)[0][MASK[0]]) > 0.1, "the penalties to come are part of it"


def test_dapo_is_grpo_with_its_bounds():
    assert pg.dapo() == pg.grpo(clip_eps_high=0.28, kl_loss_coef=0.0, reduce="token_mean")


def test_every_name_is_public_once():
    names = [function.__name__ for function in NAMED]
    assert len(set(names)) == len(names) == len(algorithms.NAMED + ratio_algorithms.NAMED + group_algorithms.NAMED)
    for name in names:
        check_algorithm(load_algorithm(name, kl_coef=0.1, entropy_coef=0.1))
        assert load_algorithm(name, kl_coef=0.1) == getattr(pg, name)(kl_coef=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pg.gspo(group_size=1), "group_size must be at least 2, got 1"),
        (lambda: pg.gspo(clip_eps=-1.0), "clip_eps must be at least 0, got -1.0"),
        (lambda: pg.sapo(tau_pos=0.0), "tau_pos must be above 0, got 0.0"),
        (lambda: pg.vespo(k_neg=-1.0), "k_neg must be above 0, got -1.0"),
        (lambda: pg.kl_cov(fraction=0.0), "fraction must be above 0, got 0.0"),
        (lambda: pg.dppo(delta=float("nan")), "delta must be above 0, got nan"),
        (lambda: pg.pass_at_k(k=1), "k must be from 2 to group_size=4, got 1"),
        (lambda: pg.reinforce_plus_plus(group_size=0), "group_size must be at least 1, got 0"),
        (lambda: pg.maxrl()._replace(discount=0.9), "leave discount at 1, got 0.9"),
        (lambda: load_algorithm("gspo", tau_pos=1.0), "the algorithm gspo has no option tau_pos"),
        (lambda: check_importance(2.0, "row", None), "importance_level must be one of token, sequence, .* got 'row'"),
        (lambda: check_importance(None, "token", 0.5), "importance_floor=0.5 .* needs importance_cap"),
        (lambda: check_importance(2.0, "token", 2.0), "importance_floor must be from 0 to below importance_cap=2.0"),
    ],
)
def test_numbers_that_cannot_work_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        check_algorithm(make())


def test_options_come_from_the_command_line():
    flags = LearningFlags(algorithm="dppo", algorithm_options=("delta=0.1", "divergence=kl"), group_size=8)
    assert algorithm_of(flags) == pg.dppo(delta=0.1, divergence="kl", group_size=8)
    assert algorithm_of(LearningFlags(algorithm="grpo", algorithm_options=("normalize=False",))) == pg.grpo(
        normalize=False
    )
    for option, message in {
        "delta": "algorithm_options are name=value, as delta=0.1, got 'delta'",
        "clip_eps=0.1": "clip_eps of algorithm_options is a flag of its own",
        "lam=1": "the algorithm dppo has no option lam",
    }.items():
        with pytest.raises(UserError, match=message):
            algorithm_of(LearningFlags(algorithm="dppo", algorithm_options=(option,)))
    flags = LearningFlags(importance_cap=2.0, importance_level="sequence", importance_floor=0.5)
    options = iteration_options(flags, algorithm_of(flags))
    assert (options["importance_level"], options["importance_floor"]) == ("sequence", 0.5)


@pytest.mark.parametrize(("level", "floor"), [("sequence", None), ("token", 0.6), ("geometric", 0.8)])
def test_an_iteration_weighs_by_level_and_floor(level, floor):
    mask, x = jnp.asarray(MASK), jnp.zeros(MASK.shape)
    rollout = pg.Rollout(jnp.zeros(MASK.shape, jnp.int32), mask, mask, jnp.asarray(SAMPLED))
    policy = pg.Scored(jnp.asarray(OLD), x, x)
    make = functools.partial(
        programs.experience, rollout, policy, None, jnp.asarray(SCORES), jnp.float32(0.0), algorithm=pg.kl_cov()
    )
    plainly, _, _ = make()
    weighed, _, metrics = make(importance_cap=1.5, importance_level=level, importance_floor=floor)
    weights = plain.importance(OLD.astype(np.float64), SAMPLED, MASK, 1.5, floor, level)
    assert_close(weighed.advantages, plainly.advantages * weights, 1e-5)
    assert (np.asarray(weighed.chosen) == np.asarray(plainly.chosen)).all() and weighed.chosen.sum() == 1
    raw = plain.importance(OLD.astype(np.float64), SAMPLED, MASK, np.inf, None, level)[MASK]
    cut = (raw > 1.5) | (raw < (floor or 0))
    assert float(metrics["val/importance_capped"]) == pytest.approx(cut.mean()) and 0 < cut.mean() < 1


@pytest.mark.campaign
@pytest.mark.parametrize("name", campaign_but_for([function.__name__ for function in NAMED], "kl_cov"))
def test_an_iteration_learns_with_it(name):
    """Every one, off its sampler and in parts: several updates, weights of whole sequences, microbatches."""
    lm = tiny_lm("llama")
    algorithm = load_algorithm(name, kl_coef=0.0, kl_loss_coef=0.0)
    it = pg.iteration(
        lm, algorithm, pg.adamw(1e-2, updates=2), max_new_tokens=4, top_k=5, importance_cap=2.0, importance_level="sequence",
        minibatches=1 if algorithm.on_policy else 2, microbatches=2,
    )  # fmt: skip
    state = it.init(lm.init(jax.random.key(0)), jax.random.key(1))
    prompts = np.ones((16, 2), np.int32)
    rollout = it.sample(state, prompts, prompts > 0)
    state, metrics = it.learn(state, rollout, (np.asarray(rollout.tokens)[:, -4:] % 2).mean(1))
    assert metrics["train/healthy"] and metrics["train/grad_norm"] > 0, name
