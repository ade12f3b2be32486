"""`pg.iteration` on a tiny model: it learns, in whatever parts, on whatever devices, with whichever optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from pgjax.core.errors import UserError
from pgjax.learning import programs
from pgjax.parallel.sharding import make_mesh, param_shardings, place
from tests import ppo_on_mesh
from tests.compare import assert_close, assert_same_bits
from tests.sizes import campaign_but_for
from tests.tiny import left_padded

NEW = 5
LM = ppo_on_mesh.tiny_lm("llama")
PROMPTS, PROMPT_MASK = (np.repeat(x, 2, axis=0) for x in left_padded((5, 2, 4, 3, 1, 5, 2, 3), 5))
SAMPLING = {"max_new_tokens": NEW, "eos_ids": (3, 8)}
SGD = optax.sgd(0.1)
RLOO = pg.rloo(group_size=2, kl_coef=0.1)


@functools.cache
def params():
    """Parameters far from each other, on the first device."""
    return jax.tree.map(jnp.asarray, ppo_on_mesh.host_params(LM)["lm"])


@functools.cache
def other_params():
    """A reference that is another model."""
    return jax.tree.map(lambda x: 1.1 * x, params())


def odd(rollout):
    """A black box: the share of odd ids among the completion's."""
    mask = np.asarray(rollout.mask)
    return ((np.asarray(rollout.tokens) % 2) * mask).sum(1) / mask.sum(1)


def once(it, start, key=1):
    """Take one iteration: the rollout, the state after it, and the metrics."""
    state = it.init(start, jax.random.key(key))
    rollout = it.sample(state, PROMPTS, PROMPT_MASK)
    return rollout, *it.learn(state, rollout, odd(rollout))


LEARNERS = {
    "ppo": (pg.ppo(kl_coef=0.001), {"epochs": 2, "minibatches": 2}),
    "grpo": (pg.grpo(group_size=2, kl_coef=0.001, entropy_coef=0.001), {"microbatches": 2}),
}


@pytest.mark.parametrize("name", campaign_but_for(LEARNERS, "grpo"))
def test_scores_rise(name):
    algorithm, options = LEARNERS[name]
    start = LM.init(jax.random.key(0))
    it = pg.iteration(LM, algorithm, pg.adamw(2e-2, updates=100), reference=start, max_new_tokens=4, **options)
    state, means = it.init(start, jax.random.key(1)), []
    prompts, mask = np.tile(PROMPTS, (4, 1)), np.tile(PROMPT_MASK, (4, 1))
    for _ in range(10):
        rollout = it.sample(state, prompts, mask)
        scores = odd(rollout)
        state, metrics = it.learn(state, rollout, scores)
        means.append(scores.mean())
    assert means[0] < 0.65 and np.mean(means[-2:]) > 0.8, means
    assert int(state.iterations) == 10 and metrics["train/healthy"]
    assert float(metrics["lr"]) == np.float32(2e-2) and metrics["objective/kl"] > 0.01


def test_microbatches_do_not_change_the_gradient_of_uneven_lengths():
    found = []
    for microbatches in (1, 4):
        it = pg.iteration(LM, RLOO, SGD, reference=other_params(), **SAMPLING, microbatches=microbatches)
        found.append(once(it, params()))
    (one, whole, metrics), (other, parts, of_parts) = found
    assert np.array_equal(one.tokens, other.tokens)
    assert len(set(np.asarray(one.mask).sum(1))) > 2, "uneven"
    assert_close(parts.learner.params, whole.learner.params, 1e-6, of_max=1e-5)
    assert_close(of_parts, metrics, 1e-6, rtol=1e-4)
    assert np.abs(whole.learner.params["lm"]["embed"]["tokens"] - params()["embed"]["tokens"]).max() > 1e-3


OPTIMIZERS = {"adam": optax.adam(1e-2), "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3))}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optax_optimizer_will_do(name):
    _, state, metrics = once(pg.iteration(LM, pg.reinforce(kl_coef=0.0), OPTIMIZERS[name], **SAMPLING), params())
    assert metrics["train/healthy"] and int(state.learner.updates) == 1 and "lr" not in metrics
    assert np.any(state.learner.params["lm"]["embed"]["tokens"] != params()["embed"]["tokens"])


@pytest.mark.parametrize("name", campaign_but_for(LEARNERS, "ppo"))
def test_columns_that_no_completion_reaches_are_neither_computed_nor_missed(name):
    algorithm, options = LEARNERS[name]
    ends = tuple(range(3, 13))  # half of the vocabulary: completions are short
    it = pg.iteration(
        LM, algorithm, SGD, reference=other_params(), max_new_tokens=40, eos_ids=ends, temperature=0.7, **options
    )
    states = [it.init(params(), jax.random.key(1)) for _ in range(3)]
    rollout = it.sample(states[0], PROMPTS, PROMPT_MASK)
    assert rollout.tokens.shape == (16, 5 + 16) and rollout.ref_logprobs.shape == rollout.policy.values.shape == (
        16,
        17,
    )
    whole = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 24))), rollout)
    scores = odd(rollout)
    of_tokens = np.zeros((16, 40), np.float32)
    of_tokens[np.arange(16), np.asarray(rollout.mask).sum(1) - 1] = scores
    short, long, by_token = (
        it.learn(state, sampled, paid)
        for state, sampled, paid in zip(states, (rollout, whole, rollout), (scores, scores, of_tokens), strict=True)
    )
    for other in (long, by_token):
        assert_close(short[0].learner.params, other[0].learner.params, 1e-6)
        for metric in short[1].keys() - {"completions/padded_length"}:
            value = short[1][metric]
            np.testing.assert_allclose(value, other[1][metric], rtol=2e-5, atol=2e-6, err_msg=metric)


def test_without_a_reference_there_is_no_pass_for_it_and_no_kl(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a pass for nothing")

    monkeypatch.setattr(programs, "reference_logprobs", refuse)
    monkeypatch.setattr(programs, "teacher_force", refuse)
    rollout, _, metrics = once(pg.iteration(LM, pg.reinforce(kl_coef=0.0), SGD, **SAMPLING), params())
    assert rollout.ref_logprobs is None
    assert not {"objective/kl", "objective/kl_coef", "objective/rlhf_reward", "loss/kl_avg"} & metrics.keys()
    assert "objective/entropy" in metrics


def test_with_several_updates_the_policy_is_teacher_forced_and_of_two_equal_models_the_kl_is_0():
    it = pg.iteration(LM, pg.ppo(), SGD, reference=params(), **SAMPLING, epochs=2, minibatches=2)
    rollout, state, metrics = once(it, params())
    mask = np.asarray(rollout.mask)[:, -(NEW + 1) :]
    forced, sampled = (np.asarray(x)[:, -(NEW + 1) :][mask] for x in (rollout.policy.logprobs, rollout.logprobs))
    assert_close(forced, sampled, 2e-5)
    assert metrics["val/sampler_gap"] < 2e-5 and metrics["objective/kl"] == 0
    assert int(metrics["train/updates"]) == int(state.learner.updates) == 4


def test_where_the_sampler_is_filtered_the_policy_is_not():
    it = pg.iteration(LM, RLOO, SGD, reference=params(), **SAMPLING, top_k=2, importance_cap=1.5)
    rollout, _, metrics = once(it, params())
    mask = np.asarray(rollout.mask)[:, -(NEW + 1) :]
    assert (np.asarray(rollout.policy.logprobs) < np.asarray(rollout.logprobs)[:, -(NEW + 1) :])[mask].all()
    assert metrics["val/sampler_gap"] > 0.01 and metrics["objective/kl"] == 0
    assert 0 <= metrics["val/importance_capped"] <= 1


@pytest.mark.campaign
def test_early_stopping_and_the_adaptive_coefficient():
    it = pg.iteration(
        LM, pg.ppo(kl_coef=0.5), SGD, reference=other_params(), **SAMPLING, epochs=3, max_approx_kl=1e-12, kl_target=1e-3,
        kl_horizon=160.0,
    )  # fmt: skip
    _, state, metrics = once(it, params())
    assert int(metrics["train/updates"]) == 2, "the first epoch's policy is the one that sampled"
    sign = 1 if metrics["objective/kl"] > 1e-3 else -1  # the estimate of a batch may be below 0
    assert abs(metrics["objective/kl"] - 1e-3) > 2e-4, "far enough from the target for the largest step"
    assert float(state.kl_coef) == pytest.approx(0.5 * (1 + sign * 0.2 * 16 / 160))


@pytest.mark.campaign
def test_a_mesh_gives_the_numbers_of_one_device():
    def run(mesh):
        put = jax.device_put if mesh is None else lambda x: place(x, param_shardings(mesh, x))
        start, reference = (put(jax.device_get(x)) for x in (params(), other_params()))
        it = pg.iteration(
            LM, pg.rloo(group_size=2, kl_coef=0.1, clip_eps=0.2), SGD, reference=reference, **SAMPLING, minibatches=2,
            microbatches=2, mesh=mesh,
        )  # fmt: skip
        rollout, state, metrics = once(it, start)
        assert mesh is None or jax.tree.map(lambda x: x.sharding, state.learner.params) == param_shardings(
            mesh, state.learner.params
        )
        return jax.device_get((rollout, state._replace(key=None), metrics))

    found, expected = run(make_mesh(data=2, fsdp=2)), run(None)
    assert np.array_equal(found[0].tokens, expected[0].tokens) and np.array_equal(found[0].mask, expected[0].mask)
    assert_close(found, expected, 1e-6, of_max=2e-5)


def test_the_states_buffers_are_given_away_and_the_parameters_kept():
    start = jax.tree.map(jnp.copy, params())
    it = pg.iteration(LM, pg.reinforce(kl_coef=0.0), SGD, **SAMPLING)
    state = it.init(start, jax.random.key(1))
    rollout = it.sample(state, PROMPTS, PROMPT_MASK)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state.learner)), "sampling leaves them"
    after, _ = it.learn(state, rollout, odd(rollout))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.learner.params))
    assert_same_bits(start, params())
    again = it.sample(after, PROMPTS, PROMPT_MASK)
    assert not np.array_equal(again.tokens, rollout.tokens), "the next iteration draws anew"


def test_adapters_learn_beside_frozen_parameters():
    adapters = pg.init_lora(jax.random.key(2), params(), rank=2)
    it = pg.iteration(LM, RLOO, SGD, reference=params(), frozen=params(), **SAMPLING, microbatches=2)
    rollout, state, metrics = once(it, adapters)
    assert jax.tree.structure(state.learner.params["lm"]) == jax.tree.structure(adapters)
    assert np.any(state.learner.params["lm"]["layers"]["q"]["lora_b"]) and metrics["train/healthy"]
    plain = pg.iteration(LM, RLOO, SGD, reference=params(), **SAMPLING, microbatches=2)
    assert np.array_equal(rollout.tokens, once(plain, params())[0].tokens), "adapters start as nothing"


def test_a_state_without_its_key_is_refused():
    it = pg.iteration(LM, pg.reinforce(kl_coef=0.0), SGD, **SAMPLING)
    state = it.init(params(), jax.random.key(1))
    with pytest.raises(ValueError, match=r"the state holds no key: state._replace\(key=...\) gives it the run's"):
        it.sample(state._replace(key=None), PROMPTS, PROMPT_MASK)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (6, {"minibatches": 2, "microbatches": 2}, "a batch of 6 does not divide .* make it a multiple of 4"),
        (7, {}, "a batch of 7 does not divide into groups of 2"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_before_anything_is_sampled(rows, options, message):
    algorithm = pg.rloo(group_size=2, kl_coef=0.0, clip_eps=0.2)
    it = pg.iteration(LM, algorithm, SGD, **SAMPLING, **options)
    state = it.init(params(), jax.random.key(1))
    with pytest.raises(UserError, match=message):
        it.sample(state, PROMPTS[:rows], PROMPT_MASK[:rows])


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        (pg.ppo(), {}, "kl_coef=0.005 penalises the KL to a reference: give its parameters, or kl_coef=0"),
        (pg.grpo(), {}, "kl_loss_coef=0.04 penalises the KL to a reference"),
        (pg.ppo(kl_coef=-1.0), {}, "kl_coef must be finite and at least 0, got -1.0"),
        (pg.ppo(kl_coef=0.0), {"kl_target": 1.0}, "kl_target=1.0 adapts kl_coef by factors: it must start above 0"),
        (pg.reinforce(kl_coef=0.0), {"epochs": 2}, "epochs=2 would learn from samples of an older policy"),
        (pg.ppo(kl_coef=0.0), {"epochs": 0}, "epochs must be at least 1, got 0"),
        (pg.ppo(kl_coef=0.0), {"microbatches": 1.5}, "microbatches must be a whole number, got 1.5"),
        (pg.ppo(kl_coef=0.0), {"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        (pg.ppo(kl_coef=0.0), {"top_p": 0.9, "teacher_force": False}, "teacher_force=False takes the sampler's"),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_once(algorithm, options, message):
    with pytest.raises(ValueError, match=message):
        pg.iteration(LM, algorithm, SGD, **{**SAMPLING, **options})
