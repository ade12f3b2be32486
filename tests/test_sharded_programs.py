"""Sampling, teacher forcing and learning give one device's numbers on every layout of four, and leave the layout as it was."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax.data.packing import Packed
from pgjax.data.preferences import EncodedPair
from pgjax.learning import reward_learning, supervised
from pgjax.learning.optimizer import init_state
from pgjax.models.reward_model import reward_model
from pgjax.parallel.sharding import batch_sharding, init_sharded, make_mesh, param_shardings, place
from tests.compare import assert_close
from tests.ppo_on_mesh import (
    LAYOUTS,
    NEW,
    OPTIMIZER,
    PROMPT_MASK,
    PROMPTS,
    acted,
    host_params,
    learned,
    placed,
    tiny_lm,
    update,
)


def without_key_bias(params):
    """Leave out the keys' bias: it moves all scores of a query alike, so its gradient is rounding, and Adam follows it."""
    layers = params["lm"]["layers"]
    keys = {name: x for name, x in layers["k"].items() if name != "bias"}
    return {**params, "lm": {**params["lm"], "layers": {**layers, "k": keys}}}


@functools.cache
def on_one_device(program, name):
    lm = tiny_lm(name)
    with placed(None, host_params(lm)) as params:
        return program(lm, params)


def case(name, axes):
    """A model on a layout; without tensor it is left to the campaign, since fsdp beside tensor gathers the same weights."""
    marks = [] if "tensor" in axes else [pytest.mark.campaign]
    return pytest.param(name, axes, id=f"{name}, {axes}", marks=marks)


@pytest.mark.parametrize(("name", "axes"), [case("llama", axes) for axes in LAYOUTS])
def test_samples_and_their_logprobs_are_the_same_on_every_layout(name, axes):
    lm, expected = tiny_lm(name), on_one_device(acted, name)
    with placed(axes, host_params(lm)) as params:
        found = acted(lm, params)
    for kind in ("greedy", "rollout"):
        assert np.array_equal(found[kind].tokens, expected[kind].tokens)
        assert np.array_equal(found[kind].mask, expected[kind].mask)
        assert_close(found[kind].logprobs, expected[kind].logprobs, of_max=1e-5)
    for kind in ("policy", "ref_logprobs"):
        assert_close(found[kind], expected[kind], of_max=1e-5)


@pytest.mark.parametrize(("name", "axes"), [*(case("llama", axes) for axes in LAYOUTS), case("gpt2", LAYOUTS[-1])])
def test_updates_are_the_same_on_every_layout_and_keep_it(name, axes, caplog):
    lm, expected = tiny_lm(name), on_one_device(learned, name)
    with placed(axes, host_params(lm)) as params:
        found = learned(lm, params)
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            update(lm, found.pop("state"), 1)
        assert not [message for message in caplog.messages if "update" in message]
    assert_close(found["losses"], expected["losses"], of_max=1e-5)
    # After one update Adam's first moment is a tenth of the gradient.
    gradient, wanted = (without_key_bias(x["first"].opt_state[1][0].mu) for x in (found, expected))
    assert_close(gradient, wanted, of_max=1e-5)
    assert_close(without_key_bias(found["second"].params), without_key_bias(expected["second"].params), of_max=1e-3)
    assert found["layout"] == param_shardings(make_mesh(**axes), found["second"])


@pytest.mark.campaign
def test_parameters_on_a_mesh_are_enough_for_the_sampler():
    lm, expected = tiny_lm("llama"), on_one_device(acted, "llama")["rollout"]
    params = host_params(lm)["lm"]
    spread = place(params, param_shardings(make_mesh(fsdp=4), params))
    options = {"max_new_tokens": NEW, "eos_ids": (3,)}
    rollout = pg.sample(lm, spread, PROMPTS, PROMPT_MASK, jax.random.key(5), **options)
    assert np.array_equal(rollout.tokens, expected.tokens)
    assert rollout.tokens.sharding.is_equivalent_to(batch_sharding(make_mesh(fsdp=4)), 2)
    inside = jax.jit(lambda key: pg.sample(lm, spread, PROMPTS, PROMPT_MASK, key, **options))(jax.random.key(5))
    assert np.array_equal(inside.tokens, expected.tokens)
    with pytest.raises(ValueError, match=r"prompts: 3 rows do not divide over fsdp=4 of the mesh: .* a multiple of 4"):
        pg.sample(lm, spread, PROMPTS[:3], PROMPT_MASK[:3], jax.random.key(5), **options)


def fine_tuning(lm, params):
    """Two updates on packed rows, and the held-out loss."""
    rng = np.random.default_rng(2)
    segments = np.sort(rng.integers(1, 4, (8, 12)), axis=1).astype(np.int32)
    packed = Packed(rng.integers(0, 24, (8, 12)).astype(np.int32), segments, rng.random((8, 12)) < 0.7)
    state = init_state(params, OPTIMIZER)
    for _ in range(2):
        state, metrics = supervised.update(state, packed, lm=lm, optimizer=OPTIMIZER, microbatches=2)
    held_out = supervised.mean_surprise(lm, state.params, Packed(*(x[:7] for x in packed)), 6)
    return {"params": state.params, "moments": state.opt_state[1][0], "metrics": metrics, "held_out": held_out}


def preferring(rm, params):
    """Two updates of a reward model on pairs, and the scores of others."""
    rng = np.random.default_rng(3)
    pairs = [
        EncodedPair(*(list(rng.integers(0, 24, n)) for n in lengths), 0.1) for lengths in rng.integers(2, 12, (8, 2))
    ]
    batch = reward_learning.pair_batch(pairs, most=64)
    state = init_state(params, OPTIMIZER)
    for _ in range(2):
        state, metrics = reward_learning.update(
            state, batch, jnp.float32(0.01), rm=rm, optimizer=OPTIMIZER, microbatches=2
        )
    scores = reward_learning.pair_scores(rm, state.params, pairs[:7], batch_size=3)
    return {"params": state.params, "moments": state.opt_state[1][0], "metrics": metrics, "scores": scores}


@pytest.mark.campaign
def test_fine_tuning_and_reward_models_are_the_same_on_a_mesh():
    axes, lm = LAYOUTS[-1], tiny_lm("llama")
    rm = reward_model(lm.arch)
    body = host_params(lm)
    judged = {"lm": body["lm"], "score": {"kernel": body["value"]["kernel"]}}
    for learn, model, host in ((fine_tuning, lm, body["lm"]), (preferring, rm, judged)):
        with placed(None, host) as params:
            expected = jax.device_get(learn(model, params))
        with placed(axes, host) as params:
            found = learn(model, params)
        layout = param_shardings(make_mesh(**axes), found["params"])
        assert jax.tree.map(lambda x: x.sharding, found["params"]) == layout
        assert_close(found.pop("params"), expected.pop("params"), of_max=1e-3)
        assert_close(found, expected, of_max=1e-4)


def test_parameters_and_moments_are_born_where_they_belong():
    lm, mesh = tiny_lm("qwen3"), make_mesh(data=1, fsdp=2, tensor=2)
    params = init_sharded(lm.init, jax.random.key(0), mesh=mesh)
    assert_close(params, jax.jit(lm.init)(jax.random.key(0)), of_max=1e-5)
    state = init_state(params, OPTIMIZER)
    assert jax.tree.map(lambda x: x.sharding, state) == param_shardings(mesh, state)
    parts = jax.tree_util.tree_map_with_path(
        lambda path, x: x.size // x.addressable_shards[0].data.size, state.opt_state[1][0].mu
    )
    assert {parts["embed"]["tokens"], *(parts["layers"][name]["kernel"] for name in ("q", "o", "up", "down"))} == {4}
    assert parts["norm"]["scale"] == 1
