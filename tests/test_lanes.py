"""Rows through fewer lanes: the same tokens as all rows at once, whatever their number, order, lengths, groups and mesh."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax.parallel.mesh import make_mesh
from pgjax.parallel.sharding import batch_sharding, entered, param_shardings, place, replicated
from pgjax.rollout.sample import _generate, sample, sample_scored
from tests.sizes import SOME_FAMILIES, campaign_but_for
from tests.tiny import ARCHITECTURES, tiny_lm, tiny_params

B, NEW, EOS = 16, 12, (3, 8, 17)
RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1, 7, B)
PROMPTS = RNG.integers(0, 23, (B, 6)).astype(np.int32)
MASK = np.arange(6)[None, :] >= 6 - LENGTHS[:, None]
KEY = jax.random.key(5)


def rolled(name="llama", prompts=PROMPTS, mask=MASK, params=None, **options):
    params = tiny_params(name) if params is None else params
    return jax.device_get(sample(tiny_lm(name), params, prompts, mask, KEY, max_new_tokens=NEW, **options))


def assert_same_rollout(actual, expected):
    for name in ("tokens", "attention_mask", "mask"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", campaign_but_for([0.0, 1.0], 1.0))
@pytest.mark.parametrize("lanes", campaign_but_for([1, 3, 8, 15, 16, 40], 3))
@pytest.mark.parametrize("name", SOME_FAMILIES)
def test_the_tokens_are_those_of_all_rows_at_once(name, lanes, temperature):
    options = {"temperature": temperature, "eos_ids": EOS, "pad_id": 7}
    expected = rolled(name, **options)
    counts = expected.mask.sum(1)
    assert len(set(counts.tolist())) > 3 or temperature == 0.0, "rows must end apart, or lanes never change hands"
    assert_same_rollout(rolled(name, lanes=lanes, **options), expected)


@pytest.mark.parametrize("lanes", campaign_but_for([4, 8], 4))
def test_groups_share_their_prompt_in_lanes_too(lanes):
    groups = np.repeat(np.arange(4), 4)
    options = {"prompts": PROMPTS[groups], "mask": MASK[groups], "eos_ids": EOS, "group_size": 4}
    assert_same_rollout(rolled(lanes=lanes, **options), rolled(**options))


@pytest.mark.parametrize(
    "axes", campaign_but_for([{"data": 2, "tensor": 2}, {"data": 2, "fsdp": 2}, {"fsdp": 4}], {"data": 2, "fsdp": 2})
)
def test_a_mesh_samples_the_same_tokens_in_lanes(axes):
    mesh = make_mesh(**axes)
    lm = pg.causal_lm(dataclasses.replace(ARCHITECTURES["llama"], vocab_size=24))  # which tensor=2 divides
    params = lm.init(jax.random.key(0))
    spread = place(params, param_shardings(mesh, params))
    options = {"max_new_tokens": NEW, "eos_ids": EOS}
    expected = jax.device_get(sample(lm, params, PROMPTS, MASK, KEY, **options))
    assert_same_rollout(jax.device_get(sample(lm, spread, PROMPTS, MASK, KEY, lanes=8, **options)), expected)


def test_filters_scores_and_stop_strings_go_through_lanes():
    table = np.zeros((1, 23), np.int32)
    table[0, [4, 5, 6]] = -1
    options = {"top_k": 7, "top_p": 0.9, "stop_table": table}
    assert_same_rollout(rolled(lanes=4, **options), rolled(**options))
    lm, params = (
        tiny_lm("llama"),
        {"lm": tiny_params("llama"), "value": {"kernel": jnp.ones(16), "bias": jnp.float32(1)}},
    )
    both = [
        jax.device_get(sample_scored(lm, params, PROMPTS, MASK, KEY, max_new_tokens=NEW, eos_ids=EOS, lanes=lanes))
        for lanes in (None, 4)
    ]
    assert_same_rollout(both[1][0], both[0][0])
    for actual, expected in zip(both[1][1], both[0][1], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_lanes_that_no_group_or_device_can_share_are_refused():
    with pytest.raises(ValueError, match="lanes=6 do not divide into groups of 4: make it a multiple of 4"):
        rolled(prompts=PROMPTS[[0] * 8], mask=MASK[[0] * 8], group_size=4, lanes=6)
    with pytest.raises(ValueError, match="lanes must be at least 1, got 0"):
        rolled(lanes=0)


@pytest.mark.campaign
def test_public_names_take_lanes():
    rollout = pg.sample(tiny_lm("llama"), tiny_params("llama"), PROMPTS, MASK, KEY, max_new_tokens=2, lanes=4)
    assert rollout.mask.sum() == 2 * B


@pytest.mark.campaign
@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "tensor": 2}])
def test_no_lane_of_a_cache_is_sent_to_another_device(axes, full_compiles):
    mesh = make_mesh(**axes)
    lm = pg.causal_lm(dataclasses.replace(ARCHITECTURES["llama"], vocab_size=24))
    params = lm.init(jax.random.key(0))
    params = place(params, param_shardings(mesh, params))
    batch = place((np.ones((32, 16), np.int32), np.ones((32, 16), bool)), batch_sharding(mesh))
    options = {"temperature": np.float32(1), "top_k": np.int32(24), "top_p": np.float32(1), "min_p": np.float32(0)}
    others = place((options, np.full(8, -1, np.int32), np.int32(0)), replicated(mesh))
    with entered(mesh):
        text = _generate.lower(
            lm, params, *batch, jax.random.key(0), *others, max_new_tokens=16, few=(16, axes["data"])
        ).compile().as_text()  # fmt: skip
    sent = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", text)
    assert all(np.prod([int(x) for x in shape.split(",") if x]) < 100 for shape in sent), sent


@pytest.mark.campaign
def test_an_iteration_samples_in_lanes_what_it_samples_without():
    lm, params = tiny_lm("llama"), tiny_params("llama")
    found = []
    for lanes in (None, 8):
        it = pg.iteration(
            lm,
            pg.rloo(group_size=2),
            pg.adamw(1e-2, updates=1),
            reference=params,
            max_new_tokens=NEW,
            eos_ids=EOS,
            lanes=lanes,
        )
        found.append(jax.device_get(it.sample(it.init(params, KEY), PROMPTS.repeat(2, 0)[:B], MASK.repeat(2, 0)[:B])))
    for actual, expected in zip(jax.tree.leaves(found[1]), jax.tree.leaves(found[0]), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.campaign
def test_no_completion_is_shorter_than_the_shortest_allowed_and_later_draws_are_as_ever():
    options = {"eos_ids": EOS, "pad_id": 7}
    free, bound = rolled(**options), rolled(**options, min_new_tokens=5)
    lengths, free_lengths = bound.mask.sum(1), free.mask.sum(1)
    assert free_lengths.min() < 5 <= lengths.min() and lengths.max() <= NEW
    drawn = bound.tokens[:, -NEW:]
    assert not np.isin(drawn[:, :5], EOS).any() and not np.isin(free.tokens[free_lengths >= 5, -NEW:][:, :4], EOS).any()
    same = free_lengths > 5  # a row that did not want to end early draws what it drew: only the ending ids are closed
    np.testing.assert_array_equal(bound.tokens[same, -NEW:][:, :5], free.tokens[same, -NEW:][:, :5])
    assert (bound.logprobs[same, -NEW:][:, :5] >= free.logprobs[same, -NEW:][:, :5] - 1e-6).all()
    assert_same_rollout(rolled(**options, min_new_tokens=5, lanes=8), bound)
    with pytest.raises(ValueError, match="min_new_tokens=13 is more than max_new_tokens=12"):
        rolled(**options, min_new_tokens=13)
