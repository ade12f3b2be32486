"""Models of other libraries as the policy: they learn, sampler and learner agree, snapshots and adapters take any tree."""

import functools
import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from experiments.other_models import dict_model
from experiments.other_models.odd_ids import PROMPT_MASK, PROMPTS, odd_ids, train
from pgjax.core.logprobs import token_logprobs
from pgjax.parallel.sharding import make_mesh, replicated
from pgjax.run.checkpoint.checkpoints import Checkpoints
from tests.compare import assert_close, assert_same_bits
from tests.sizes import campaign_but_for

PACKAGES = {
    "dict": "jax",
    "nnx": "flax.nnx",
    "equinox": "equinox",
    "haiku": "haiku",
    "tunix": "tunix.models.qwen3.model",
}
MATRICES = {  # steps of the names of what gets adapters
    "dict": ("q", "v", "up", "down"),
    "nnx": ("up", "down"),
    "equinox": ("weight_hh", "weight_ih"),
    "haiku": ("up_0", "down_0", "up_1", "down_1"),
    "tunix": ("input_embedding",),  # its MLPs start at 0, where they have no gradient
}
NEW = 4


@pytest.fixture(autouse=True)
def promotion_of_jax():
    """Other libraries rely on jax's own rules of promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this model has no cache")
        yield


@functools.cache
def built(name):
    pytest.importorskip(PACKAGES[name])
    return importlib.import_module(f"experiments.other_models.{name}_model").build(jax.random.key(0))


@pytest.mark.parametrize("name", campaign_but_for(PACKAGES, "nnx"))
def test_it_learns_and_the_sampler_agrees_with_the_learner_and_a_snapshot_gives_it_back(name, tmp_path):
    lm, params = built(name)
    learned = train(lm, params, steps=6, learning_rate=2e-2)
    assert np.mean(learned.means[-2:]) > learned.means[0] + 0.2, learned.means
    assert learned.gap <= 1e-5
    state = learned.state.learner
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same_bits(restored, state)


@pytest.mark.campaign
@pytest.mark.parametrize("name", campaign_but_for(PACKAGES, "dict"))
def test_adapters_to_chosen_leaves_learn_alone(name):
    lm, params = built(name)
    adapters = pg.init_lora(jax.random.key(1), params, rank=4, targets=MATRICES[name])
    before = jax.device_get(params)
    learned = train(lm, adapters, frozen=params, steps=12, learning_rate=2e-2)
    assert np.mean(learned.means[-2:]) > learned.means[0] + 0.1, learned.means
    assert learned.gap <= 1e-5
    assert_same_bits(params, before)
    trained = learned.state.learner.params["lm"]
    for found, start in zip(trained.leaves.values(), adapters.leaves.values(), strict=True):
        assert np.array_equal(found["lora_scale"], start["lora_scale"]) and np.abs(found["lora_b"]).max() > 0
    merged = pg.with_lora(params, trained)
    changed = jax.tree.map(lambda x, y: bool(np.any(x != y)), params, merged)
    assert sum(jax.tree.leaves(changed)) == len(trained.leaves)


def test_with_a_cache_and_without_one_a_row_is_the_same_whatever_its_padding():
    """The bundle's positions are those of an unpadded row, and the model never gets more columns than it has positions."""
    lm, params = built("dict")
    limit = PROMPTS.shape[1] + NEW
    params = {**params, "positions": params["positions"][:limit]}
    widths = []

    def hidden(params, tokens):
        widths.append(tokens.shape[1])
        return dict_model.hidden(params, tokens)

    bare = pg.bundle(hidden, lm.unembedding, vocab_size=lm.arch.vocab_size, max_positions=limit)
    cached = pg.CausalLM(*lm[:9])  # as one writes it by hand: parameters need no preparing
    found = []
    for one in (cached, bare):
        rollout = pg.sample(one, params, PROMPTS, PROMPT_MASK, jax.random.key(3), max_new_tokens=NEW, eos_ids=(5,))
        found.append(jax.device_get(rollout))
    assert np.array_equal(found[0].tokens, found[1].tokens) and len(set(found[0].mask.sum(1))) > 1
    np.testing.assert_allclose(found[0].logprobs, found[1].logprobs, atol=1e-5)
    assert max(widths) == limit
    read = token_logprobs(bare.apply(params, found[1].tokens, found[1].attention_mask), found[1].tokens)
    np.testing.assert_allclose(np.where(found[1].mask, read, 0), found[1].logprobs, atol=1e-5)


@pytest.mark.campaign
def test_rows_over_a_mesh_give_the_numbers_of_one_device():
    lm, params = built("dict")
    found = []
    for mesh in (None, make_mesh(data=4)):
        start = jax.device_put(jax.device_get(params), replicated(mesh))
        it = pg.iteration(
            lm, pg.grpo(group_size=4), optax.sgd(0.1), reference=start, max_new_tokens=NEW, minibatches=2, mesh=mesh
        )
        rollout = it.sample(it.init(start, jax.random.key(0)), PROMPTS, PROMPT_MASK)
        state, _ = it.learn(it.init(start, jax.random.key(0)), rollout, odd_ids(rollout))
        found.append(jax.device_get((rollout.tokens, state.learner.params)))
    assert np.array_equal(found[0][0], found[1][0])
    assert_close(found[1][1], found[0][1], 1e-5)


def test_past_the_last_position_there_is_no_number():
    lm, params = built("dict")
    short = lm._replace(hidden=pg.bundle(dict_model.hidden, lm.unembedding, vocab_size=16, max_positions=3).hidden)
    states = np.asarray(short.hidden(params, jnp.ones((1, 5), jnp.int32), jnp.array([[False, True, True, True, True]])))
    assert np.isfinite(states[0, 1:4]).all() and np.isnan(states[0, 4]).all()


def test_it_warns_once_that_there_is_no_cache():
    lm = built("dict")[0]
    bare = pg.bundle(dict_model.hidden, lm.unembedding, vocab_size=16, max_positions=32)
    with pytest.warns(UserWarning, match="has no cache"):
        bare.init_cache(2, 3)
    with warnings.catch_warnings(action="error"):
        bare.init_cache(2, 4)


def test_arrays_that_are_both_the_state_and_the_reference_are_not_given_away():
    lm, params = built("dict")
    first = pg.iteration(lm, pg.reinforce(kl_coef=0.1), optax.sgd(0.1), reference=params, max_new_tokens=2)
    state = first.init(params, jax.random.key(0))
    same = state.learner.params["lm"]
    for kept in (same, jax.device_put(same, jax.devices()[0])):
        it = pg.iteration(lm, pg.reinforce(kl_coef=0.1), optax.sgd(0.1), reference=kept, max_new_tokens=2)
        rollout = it.sample(state, PROMPTS, PROMPT_MASK)
        with pytest.raises(pg.UserError, match=r"reference\['blocks'\]\[0\]\['down'\] is an array of the state"):
            it.learn(state, rollout, odd_ids(rollout))
    assert not state.learner.params["lm"]["embed"].is_deleted()


REFUSED = {
    "a part of a cache": (
        lambda lm, params: pg.bundle(lm.hidden, lm.unembedding, vocab_size=4, max_positions=4, decode=lm.decode),
        "a cache takes init_cache, prefill and decode: init_cache and prefill missing",
    ),
    "no positions": (
        lambda lm, params: pg.bundle(lm.hidden, lm.unembedding, vocab_size=4, max_positions=0),
        "max_positions must be at least 1, got 0",
    ),
    "packed rows": (
        lambda lm, params: lm.apply(params, jnp.ones((1, 2), jnp.int32), None, jnp.ones((1, 2), jnp.int32)),
        "one text a row, not packed rows",
    ),
    "the wrong states": (
        lambda lm, params: lm._replace(
            hidden=pg.bundle(lambda params, ids: ids, lm.unembedding, vocab_size=4, max_positions=4).hidden
        ).hidden(params, jnp.ones((1, 2), jnp.int32)),
        r"hidden must return \[B, T, D\] for tokens \[B, T\] = \(1, 2\), got \(1, 2\)",
    ),
    "a Hugging Face folder": (lambda lm, params: pg.save_pretrained("nowhere", lm, params, None), "does not know its"),
    "a reward head": (lambda lm, params: pg.init_value_head(lm.arch.width), "does not know its width"),
    "a leaf of integers": (
        lambda lm, params: pg.iteration(lm, pg.reinforce(kl_coef=0.0), optax.sgd(0.1), max_new_tokens=2).init(
            {**params, "steps": jnp.arange(3)}, jax.random.key(0)
        ),
        r"parameters are trained, but \['steps'\] is int32",
    ),
    "adapters to nothing": (
        lambda lm, params: pg.init_lora(jax.random.key(0), params, rank=2, targets=("q", "query")),
        "no matrix of the parameters has query in its name; targets are steps of blocks.0.down, ",
    ),
    "adapters of another model": (
        lambda lm, params: pg.with_lora(
            {"embed": params["embed"]}, pg.init_lora(jax.random.key(0), params, rank=2, targets=("q",))
        ),
        "there is an adapter to blocks.0.q, but the model has no blocks.0.q",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_line(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(*built("dict"))
