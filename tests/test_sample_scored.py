"""What the sampler computes on its way equals a second pass over its completions, and one update a rollout needs no more."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from experiments import ppo as script
from pgjax.learning import algorithms, iteration, policy_loss, programs
from pgjax.rollout import sample
from pgjax.run import logs
from tests.compare import assert_close
from tests.sizes import SOME_FAMILIES, campaign_but_for
from tests.tiny import left_padded, tiny_lm, tiny_params
from tests.tiny_task import EARLY_LETTERS, save_tiny_model

PROMPTS, PROMPT_MASK = left_padded((7, 4, 1, 5), 7)
NEW, EOS = 9, (3, 8, 17, 21, 5)
KEY = jax.random.key(11)


def critic(lm):
    kernel = jnp.asarray(np.random.default_rng(5).normal(size=lm.arch.width), jnp.float32)
    return {"kernel": kernel, "bias": jnp.float32(0.25)}


@pytest.mark.parametrize("name", SOME_FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_the_sampler_computes_equals_a_teacher_forced_pass(name, temperature):
    # The bugs: values one token late, entropy of another temperature, columns past the end that are not 0.
    lm = tiny_lm(name)
    params = {"lm": tiny_params(name), "value": critic(lm)}
    options = {"max_new_tokens": NEW, "eos_ids": EOS, "temperature": temperature}
    rolled, policy = sample.sample_scored(lm, params, PROMPTS, PROMPT_MASK, KEY, **options)
    plain = sample.sample(lm, params["lm"], PROMPTS, PROMPT_MASK, KEY, **options)
    jax.tree.map(np.testing.assert_array_equal, rolled[:3], plain[:3])
    # Two programs round a float32 sum in two ways, by up to 5.5e-6 on another kind of CPU; a column too early is off by nats.
    assert_close(rolled.logprobs, plain.logprobs, 2e-5)
    temperature = jnp.float32(temperature)
    given = rolled.tokens, rolled.attention_mask, temperature
    forced = programs.teacher_force(lm, params, *given, window=NEW + 1, parts=1)
    mask = np.asarray(rolled.mask[:, -(NEW + 1) :])
    assert not mask[:, 0].any() and 0 < mask.sum() < mask.size, "some rows end early"
    for mine, known in zip(policy, forced, strict=True):
        assert_close(mine, np.where(mask, known, 0.0), 2e-5)


def test_a_greedy_policy_has_no_entropy_and_log_probability_0():
    lm = tiny_lm("gpt2")
    params = {"lm": tiny_params("gpt2"), "value": critic(lm)}
    _, policy = sample.sample_scored(lm, params, PROMPTS, PROMPT_MASK, KEY, max_new_tokens=NEW, temperature=0.0)
    assert not np.any(policy.entropy) and not np.any(policy.logprobs)
    assert np.any(policy.values)


def test_without_old_logprobs_the_ratio_is_1_and_the_gradient_is_reinforces():
    lm = tiny_lm("llama")
    params = {"lm": tiny_params("llama"), "value": critic(lm)}
    rolled, policy = sample.sample_scored(lm, params, PROMPTS, PROMPT_MASK, KEY, max_new_tokens=NEW)
    mask = rolled.mask[:, -(NEW + 1) :]
    advantages = jax.random.normal(KEY, mask.shape)
    batch = algorithms.Batch(rolled.tokens, rolled.attention_mask, mask, None, policy.values, policy.values, advantages)

    def gradient(batch, algorithm):
        loss = lambda params: policy_loss.policy_loss(params, batch, lm=lm, algorithm=algorithm, temperature=1.0)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    clip, plain = algorithms.ppo(value_coef=0.0), algorithms.reinforce(reduce="token_mean")
    (_, metrics), clipped = gradient(batch, clip)
    assert metrics["val/ratio"] == 1 and metrics["val/ratio_var"] == 0 and metrics["policy/clipfrac_avg"] == 0
    _, plain = gradient(batch, plain)
    _, sampled = gradient(batch._replace(old_logprobs=policy.logprobs), clip)  # the sampler's rounding in the ratio
    # Three programs: the sampler's log-probabilities may be off by 1e-5 from the learner's, and the ratio hands that on.
    for known in (plain, sampled):
        assert_close(clipped, known, 5e-5, of_max=5e-5)


@pytest.fixture
def config(tmp_path) -> script.Config:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in ("a", "bcd", "ef", "ghij")))
    return script.Config(
        model=str(save_tiny_model(tmp_path / "tiny")), prompts=str(prompts), held_out=str(prompts),
        rewards=(EARLY_LETTERS,), output=tmp_path / "run", steps=2, batch_size=8, max_new_tokens=6,
        minibatches=1, microbatches=2, learning_rate=1e-2, warmup_updates=0, kl_coef=0.5, eval_samples=1,
        samples_every=1, save_every=100,
    )  # fmt: skip


@pytest.mark.campaign
@pytest.mark.parametrize("algorithm", campaign_but_for(["ppo", "rloo"], "rloo"))
def test_a_script_with_one_update_a_rollout_skips_the_pass_and_learns_the_same(config, monkeypatch, algorithm):
    passes = []
    original = programs.teacher_force
    counted = lambda *args, **options: passes.append(0) or original(*args, **options)
    monkeypatch.setattr(iteration.programs, "teacher_force", counted)
    found = []
    for teacher_force in (None, True):
        output = config.output.with_name(str(teacher_force))
        passes.clear()
        script.main(dataclasses.replace(config, algorithm=algorithm, teacher_force=teacher_force, output=output))
        rows = [row for row in logs.read_metrics(output) if "objective/scores" in row]
        found.append((len(passes), rows))
    (few, fast), (many, slow) = found
    assert (few, many) == (0, config.steps), "one pass an iteration less"
    for one, other in zip(fast, slow, strict=True):
        assert set(other) - set(one) == {"val/sampler_gap"}
        for name in one:
            if name.partition("/")[0] not in ("timing", "perf"):
                assert math.isclose(one[name], other[name], rel_tol=2e-3, abs_tol=2e-5), name


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 5}, {"importance_cap": 2.0}])
def test_the_samplers_logprobs_are_refused_where_they_are_not_the_policys(config, filters):
    with pytest.raises(pg.UserError, match=r"teacher_force=False takes .* make them differ: leave it out"):
        script.main(dataclasses.replace(config, teacher_force=False, **filters))
    assert not config.output.exists()
