"""Packed rows: what is scored and learned is that of rows padded to the longest, whatever the lengths, groups, parts and mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from pgjax.core.errors import UserError
from pgjax.learning import programs
from pgjax.parallel.sharding import make_mesh, param_shardings, place
from pgjax.rollout.packed_rows import pack_rows
from tests import ppo_on_mesh
from tests.compare import assert_close
from tests.sizes import campaign_but_for
from tests.test_iteration import LM, PROMPT_MASK, PROMPTS, SGD, odd, other_params, params

NEW, ENDS = 40, (3, 8, 12)
ALGORITHMS = {
    "token_mean": (pg.ppo(kl_coef=0.1), {"epochs": 2, "minibatches": 2}),
    "sequence_mean": (pg.grpo(group_size=2, kl_coef=0.1, entropy_coef=0.01), {"minibatches": 2}),
    "sequence_sum": (pg.rloo(group_size=2, kl_coef=0.1), {}),
    "of sequences": (pg.gspo(group_size=2), {"epochs": 2}),
}


def once(algorithm, pack_tokens, *, mesh=None, kept=None, start=None, reference=None, **options):
    """Take one iteration: the rollout, the state after it, and the metrics."""
    it = pg.iteration(
        LM, algorithm, SGD, reference=other_params() if reference is None else reference, max_new_tokens=NEW, eos_ids=ENDS,
        mesh=mesh, pack_tokens=pack_tokens, **options,
    )  # fmt: skip
    state = it.init(params() if start is None else start, jax.random.key(1))
    rollout = it.sample(state, PROMPTS, PROMPT_MASK)
    return rollout, *it.learn(state, rollout, odd(rollout), kept)


def assert_same_iteration(found, expected):
    (rollout, state, metrics), (other, wanted, of_other) = found, expected
    width = other.tokens.shape[1]  # without packing, columns that no completion reaches are cut off
    assert np.array_equal(rollout.tokens[:, :width], other.tokens) and not rollout.mask[:, width:].any()
    inside = np.asarray(other.mask)[:, 5 - 1 :]
    for x, y in zip(jax.tree.leaves(rollout[4:]), jax.tree.leaves(other[4:]), strict=True):
        assert_close(np.where(inside, x[:, : inside.shape[1]], 0), np.where(inside, y, 0), 2e-5)
    metrics, of_other = (
        {k: x for k, x in of.items() if k != "completions/padded_length"} for of in (metrics, of_other)
    )
    assert_close(state.learner.params, wanted.learner.params, 1e-6, of_max=1e-5)
    assert_close(metrics, of_other, 1e-5, rtol=2e-4)


@pytest.mark.parametrize("name", campaign_but_for(ALGORITHMS, "sequence_mean"))
@pytest.mark.parametrize("pack_tokens", campaign_but_for([45, 64, 200, 2000], 64))
def test_an_iteration_is_that_of_padded_rows(name, pack_tokens):
    algorithm, options = ALGORITHMS[name]
    expected = once(algorithm, None, **options)
    assert len(set(np.asarray(expected[0].mask).sum(1))) > 4, "uneven"
    assert np.abs(expected[1].learner.params["lm"]["embed"]["tokens"] - params()["embed"]["tokens"]).max() > 1e-3
    assert_same_iteration(once(algorithm, pack_tokens, **options), expected)


def test_rows_left_out_are_no_part_of_the_gradient():
    algorithm, kept = ALGORITHMS["sequence_mean"][0], np.arange(16) % 5 > 0
    assert_same_iteration(once(algorithm, 64, kept=kept), once(algorithm, None, kept=kept))


@pytest.mark.campaign
@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"data": 2, "fsdp": 2}, {"fsdp": 4}])
def test_a_mesh_learns_the_same_from_packed_rows(axes):
    mesh, algorithm = make_mesh(**axes), ALGORITHMS["sequence_sum"][0]
    lm = ppo_on_mesh.tiny_lm("llama")
    assert lm is LM
    spread = [place(x, param_shardings(mesh, x)) for x in (params(), other_params())]
    found = once(algorithm, 64, mesh=mesh, start=spread[0], reference=spread[1])
    assert_same_iteration(found, once(algorithm, None))


def gradient(packed: bool, reduce: str):
    """The gradient of one minibatch in float64, whose learning rate is 1."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        lm = pg.causal_lm(LM.arch, dtype=jnp.float64)
        policy = {
            "lm": jax.tree.map(lambda x: x.astype(jnp.float64), params()),
            "value": pg.init_value_head(LM.arch.width),
        }
        policy["value"]["kernel"] = jnp.linspace(-1, 1, LM.arch.width)
        rng = np.random.default_rng(0)
        new = rng.integers(1, 9, 16)
        sampled = np.arange(8)[None] < new[:, None]
        mask = np.concatenate([PROMPT_MASK, sampled], 1)
        tokens = np.concatenate([PROMPTS, rng.integers(0, 23, (16, 8))], 1).astype(np.int32)
        in_window = np.concatenate([np.zeros((16, 1), bool), sampled], 1)
        columns = [rng.normal(size=(16, 9)) * 0.1 for _ in range(4)]
        batch = programs.Batch(tokens, mask, in_window, columns[0] - 3, *columns[1:])
        algorithm = pg.ppo(kl_coef=0.0)._replace(reduce=reduce, entropy_coef=0.1, group_size=2)
        plan = pack_rows(PROMPT_MASK.sum(1), new, columns=13, prompt_columns=5, group_size=2, pack_tokens=26)
        assert plan.steps > 2
        state = pg.learning.optimizer.init_state(policy, optax.sgd(1.0))
        before = jax.tree.map(np.asarray, policy)
        state, metrics = programs.update(
            state, batch, np.arange(16)[None], np.int32(0), None, plan if packed else None,
            lm=lm, algorithm=algorithm, optimizer=optax.sgd(1.0), group_size=2,
        )  # fmt: skip
        return jax.tree.map(lambda x, y: np.asarray(x) - y, state.params, before), metrics


@pytest.mark.parametrize("reduce", campaign_but_for(["token_mean", "sequence_mean", "sequence_sum"], "sequence_mean"))
def test_the_gradient_of_packed_rows_is_exact(reduce):
    (found, metrics), (expected, of_expected) = gradient(True, reduce), gradient(False, reduce)
    assert_close(found, expected, of_max=1e-6)
    assert_close(metrics, of_expected, 1e-6, of_max=1e-6)


def test_every_token_has_one_place_and_prompts_are_shared():
    rng = np.random.default_rng(0)
    of_prompts, new = np.repeat(rng.integers(1, 7, 10), 4), rng.integers(1, 31, 40)
    plan = pack_rows(of_prompts, new, columns=36, prompt_columns=6, group_size=4, pack_tokens=100, parts=2)
    used = plan.source[plan.source >= 0]
    drawn = [i * 36 + 6 + np.arange(n) for i, n in enumerate(new)]
    assert sorted(used[used % 36 >= 6]) == sorted(np.concatenate(drawn)) == sorted(plan.sampled[plan.sampled >= 0])
    assert plan.source.shape[1:] == (2, 100) and (plan.source[plan.steps :] < 0).all()
    assert (used % 36 < 6).sum() < of_prompts.sum() / 2, "of four completions more than two share a prompt"
    for i in (0, 17, 39):
        at = plan.first[i] + np.arange(new[i])
        assert (plan.sampled[plan.step[i], plan.row[i], at] == drawn[i]).all()
        state = plan.source[plan.step[i], plan.row[i], plan.before[plan.step[i], plan.row[i], at - 1]]
        assert state[0] == i // 4 * 4 * 36 + 5 and (state[1:] == drawn[i][:-1]).all()


def test_equal_lengths_waste_no_column():
    plan = pack_rows(np.full(16, 16), np.full(16, 32), columns=48, prompt_columns=16, group_size=4, pack_tokens=576)
    assert plan.source.shape[1:] == (4, 144) and plan.steps == 1 and (plan.source[0] >= 0).all()


def test_other_lengths_compile_nothing_new():
    it = pg.iteration(
        LM,
        ALGORITHMS["sequence_sum"][0],
        SGD,
        reference=other_params(),
        max_new_tokens=NEW,
        eos_ids=ENDS,
        pack_tokens=64,
    )
    state, sizes, steps = it.init(params(), jax.random.key(1)), [], set()
    for _ in range(5):
        rollout = it.sample(state, PROMPTS, PROMPT_MASK)
        steps.add(int(np.asarray(rollout.mask).sum()))
        state, _ = it.learn(state, rollout, odd(rollout))
        sizes.append(sum(x._cache_size() for x in (programs.update, programs.reference_logprobs, programs.experience)))
    assert len(steps) > 3 and len(set(sizes)) == 1, (steps, sizes)


def test_a_prompt_that_is_not_its_groups_gives_no_wrong_number():
    tokens = np.concatenate([PROMPTS, np.ones((16, 8), np.int32)], 1)
    tokens[1, 4] += 1
    mask = np.concatenate([PROMPT_MASK, np.ones((16, 8), bool)], 1)
    plan = pack_rows(PROMPT_MASK.sum(1), np.full(16, 8), columns=13, prompt_columns=5, group_size=2, pack_tokens=64)
    found = programs.reference_logprobs(
        LM, params(), tokens, mask, jnp.float32(1), window=9, parts=1, group_size=2, packing=plan
    )
    assert np.isnan(found[1]).all() and np.isfinite(found[np.arange(16) != 1]).all()


def test_packing_that_cannot_be_is_refused():
    options = {"max_new_tokens": NEW, "reference": other_params()}
    make = functools.partial(pg.iteration, optimizer=SGD, algorithm=ALGORITHMS["sequence_sum"][0], **options)
    with pytest.raises(
        UserError, match=re.escape("pack_tokens=64 says how much is computed at once, and so does microbatches=2")
    ):
        make(LM, pack_tokens=64, microbatches=2)
    with pytest.raises(UserError, match="pack_tokens=12 holds no row of 13 tokens: make it at least 13"):
        pack_rows(np.ones(2), np.ones(2), columns=13, prompt_columns=5, group_size=1, pack_tokens=12)
    other = pg.bundle(lambda p, t: p[t], lambda p: p, vocab_size=23, max_positions=64)
    with pytest.raises(UserError, match=r"not for a model made by pg\.bundle"):
        make(other, pack_tokens=64)
