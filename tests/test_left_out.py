"""Rows that are left out of an update: exact in every algorithm, against the update of a batch that never had them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from pgjax.core.advantages import group_advantages, leave_one_out_baseline
from pgjax.learning import programs
from pgjax.learning.algorithm import Batch
from pgjax.learning.optimizer import init_state
from pgjax.rollout.sample import Rollout, Scored
from tests import ppo_on_mesh
from tests.compare import assert_close, assert_same_bits
from tests.sizes import campaign_but_for

LM = ppo_on_mesh.tiny_lm("llama")
SGD = optax.sgd(0.1, momentum=0.9)
ROWS, WINDOW, PROMPT = 8, 4, 3
KEPT = np.array([1, 1, 0, 1, 0, 0, 0, 1], bool)  # whole, two of three, none, and one alone, by groups of 2


def params():
    return jax.tree.map(jnp.copy, {"lm": LM.init(jax.random.key(0)), "value": pg.init_value_head(LM.arch.width)})


def experienced(algorithm, rows, scores, kept=None, kl_coef=0.1):
    """What is learned from some rows of one fixed rollout."""
    draw = np.random.default_rng(3)
    length = PROMPT + WINDOW - 1
    tokens = draw.integers(1, LM.arch.vocab_size, (ROWS, length)).astype(np.int32)
    ends = draw.integers(PROMPT + 1, length + 1, ROWS)
    places = np.arange(length)
    mask, attention = (places >= PROMPT) & (places < ends[:, None]), places < ends[:, None]
    logprobs = np.where(mask, draw.normal(-2, 0.5, (ROWS, length)), 0).astype(np.float32)
    window = lambda: draw.normal(-2, 0.5, (ROWS, WINDOW)).astype(np.float32)
    policy, ref = (logprobs[:, -WINDOW:], window(), window()), window()
    pick = lambda x: jnp.asarray(np.asarray(x)[rows])
    return programs.experience(
        Rollout(*map(pick, (tokens, attention, mask, logprobs))), Scored(*map(pick, policy)), pick(ref), pick(scores),
        jnp.float32(kl_coef), None if kept is None else pick(kept), algorithm=algorithm,
    )  # fmt: skip


def updated(algorithm, batch: Batch, rows: int, microbatches=1, left_out=False):
    state = init_state(params(), SGD)
    return programs.update(
        state, batch, jnp.arange(rows)[None], jnp.int32(0),
        lm=LM, algorithm=algorithm, optimizer=SGD, microbatches=microbatches, left_out=left_out,
    )  # fmt: skip


SCORES = np.float32([1.0, -0.5, 7.0, 0.25, 3.0, -9.0, 2.0, 0.5])
REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum")


def with_all_terms(reduce):
    return pg.ppo(reduce=reduce, entropy_coef=0.01, kl_loss_coef=0.01)


@pytest.mark.parametrize("reduce", campaign_but_for(REDUCTIONS, "sequence_sum"))
def test_an_update_is_that_of_the_rows_that_are_left(reduce):
    algorithm = with_all_terms(reduce)
    nonsense = np.where(KEPT, SCORES, np.nan).astype(np.float32)
    whole, _, metrics = experienced(algorithm, np.arange(ROWS), nonsense, KEPT)
    left, _, _ = experienced(algorithm, np.flatnonzero(KEPT), SCORES)
    state, of_update = updated(algorithm, whole, ROWS, microbatches=2)
    expected, of_expected = updated(algorithm, left, int(KEPT.sum()))
    assert_close(state.params, expected.params, 1e-6, of_max=1e-5)
    assert_close(of_update, of_expected, 1e-5, rtol=1e-4)
    assert int(metrics["completions/left_out"]) == 4 and np.isfinite([*map(float, metrics.values())]).all()
    assert "completions/left_out" not in experienced(algorithm, np.arange(ROWS), SCORES)[2]


@pytest.mark.parametrize("make", [pg.grpo, pg.dr_grpo, pg.rloo], ids=lambda make: make.__name__)
def test_a_group_is_compared_among_the_rows_that_are_left(make):
    algorithm = make(group_size=4, kl_coef=0.1)
    kept = np.array([1, 0, 1, 1, 0, 0, 1, 0], bool)
    batch = experienced(algorithm, np.arange(ROWS), np.where(kept, SCORES, np.nan).astype(np.float32), kept)[0]
    three = experienced(algorithm._replace(advantages=make(group_size=3, kl_coef=0.1).advantages), [0, 2, 3], SCORES)[0]
    assert_close(batch.advantages[np.array([0, 2, 3])], three.advantages, 1e-6)
    assert np.abs(three.advantages).max() > 0.1
    assert np.all(np.asarray(batch.advantages)[4:] == 0), "one alone has none to be compared with"
    assert not np.asarray(batch.mask)[~kept].any() and np.asarray(batch.mask)[kept].any(1).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_group_statistics_inside_a_mask_are_those_of_numpy(normalize):
    draw = np.random.default_rng(0)
    scores, mask = draw.normal(0, 2, (50, 5)), draw.random((50, 5)) < 0.6
    baseline, advantages = np.zeros((50, 5)), np.zeros((50, 5))
    for g, i in np.argwhere(mask):
        inside = scores[g][mask[g]]
        if len(inside) > 1:
            baseline[g, i] = (inside.sum() - scores[g, i]) / (len(inside) - 1)
            advantages[g, i] = (scores[g, i] - inside.mean()) / (inside.std(ddof=1) + 1e-4 if normalize else 1)
        else:
            baseline[g, i] = scores[g, i]
    given = np.where(mask, scores, np.nan).astype(np.float32).reshape(-1)
    found = group_advantages(given, group_size=5, normalize=normalize, mask=mask.reshape(-1))
    assert_close(found.reshape(50, 5), advantages, 1e-5)
    found = leave_one_out_baseline(given, group_size=5, mask=mask.reshape(-1)).reshape(50, 5)
    assert_close(np.asarray(found)[mask], baseline[mask], 1e-5)
    whole = np.ones(250, bool)
    once = functools.partial(group_advantages, scores.reshape(-1), group_size=5, normalize=normalize)
    assert_close(once(mask=whole), once(), 1e-6)
    equal = group_advantages([0.1] * 5, group_size=5, mask=[True, True, False, True, True])
    assert np.all(np.asarray(equal) == 0)


def test_an_algorithm_that_knows_nothing_of_rows_left_out_finds_the_mean_of_the_others():
    mean = lambda experience: experience.returns - experience.scores.reshape(-1, 4).mean(1).repeat(4)[:, None]
    own = pg.reinforce(kl_coef=0.0)._replace(advantages=mean, group_size=4)
    kept = np.array([1, 0, 1, 1, 0, 1, 1, 0], bool)
    batch = experienced(own, np.arange(ROWS), np.where(kept, SCORES, np.nan).astype(np.float32), kept, 0.0)[0]
    first = np.asarray(batch.advantages)[0][np.asarray(batch.mask)[0]]
    assert_close(first, (SCORES[0] - SCORES[[0, 2, 3]].mean()) * np.ones_like(first), 1e-6)


def test_where_nothing_is_left_no_step_is_taken():
    algorithm = with_all_terms("sequence_sum")
    batch = experienced(algorithm, np.arange(ROWS), SCORES, np.zeros(ROWS, bool))[0]
    state, metrics = updated(algorithm, batch, ROWS, microbatches=2, left_out=True)
    assert_same_bits(state.params, params())
    assert int(state.updates) == 0 and bool(state.healthy) and bool(metrics["train/healthy"])


def test_rewards_of_single_tokens_are_returns_from_their_token_on():
    algorithm = pg.reinforce(kl_coef=0.0, discount=0.5)
    draw = np.random.default_rng(1).normal(size=(ROWS, WINDOW - 1)).astype(np.float32)
    batch = experienced(algorithm, np.arange(ROWS), draw, kl_coef=0.0)[0]
    mask = np.asarray(batch.mask)
    expected = np.zeros((ROWS, WINDOW))
    for t in range(WINDOW - 1, 0, -1):
        later = expected[:, t + 1] if t + 1 < WINDOW else 0
        expected[:, t] = np.where(mask[:, t], draw[:, t - 1] + 0.5 * later, 0)
    assert_close(batch.returns, expected, 1e-5)
    last = np.zeros((ROWS, WINDOW - 1), np.float32)
    last[np.arange(ROWS), mask[:, 1:].sum(1) - 1] = SCORES
    at_the_end, placed = (experienced(algorithm, np.arange(ROWS), x)[0].returns for x in (last, SCORES))
    assert_close(at_the_end, placed, 1e-6)


@pytest.mark.campaign
def test_an_iteration_takes_both_and_refuses_other_shapes():
    it = pg.iteration(LM, pg.rloo(group_size=2, kl_coef=0.0), SGD, max_new_tokens=3)
    prompts, mask = np.repeat([[5, 6], [7, 8]], 2, axis=0), np.ones((4, 2), bool)
    state = it.init(params()["lm"], jax.random.key(1))
    rollout = it.sample(state, prompts, mask)
    with pytest.raises(pg.UserError, match=r"scores of shape \(4, 2\) for 4 completions: .*\[4, 3\]"):
        it.learn(state, rollout, np.zeros((4, 2)))
    scores = np.zeros((4, 3), np.float32)
    scores[:, 0] = [1, 0, 5, 0]
    state, metrics = it.learn(state, rollout, scores, np.array([True, True, True, False]))
    assert int(metrics["completions/left_out"]) == 1 and int(state.learner.updates) == 1
