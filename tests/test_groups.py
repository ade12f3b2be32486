"""Rows that continue one prompt get what they get alone, and their prompt is computed once."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from experiments import ppo as script
from pgjax.learning import evaluation, iteration, programs
from pgjax.learning.algorithm import Batch
from pgjax.learning.optimizer import accumulate, minibatches
from pgjax.learning.policy_loss import policy_loss
from pgjax.parallel.sharding import make_mesh, whole_groups
from pgjax.rollout import task
from pgjax.run import logs
from tests import ppo_on_mesh
from tests.compare import assert_close
from tests.sizes import campaign_but_for
from tests.tiny import left_padded, tiny_lm, tiny_params
from tests.tiny_task import save_tiny_model

P, N, G = 7, 5, 3
ROWS = 4 * G
PROMPTS, PROMPT_MASK = (np.repeat(x, G, axis=0) for x in left_padded((7, 2, 5, 1), P))
GROUP = {"prompt_length": P, "group_size": G}


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Groups of rows, padded on both sides, whatever stands under the padding; one completion has no token at all."""
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([PROMPTS, np.zeros((ROWS, N), int)], axis=1)
    mask = np.concatenate([PROMPT_MASK, np.arange(N)[None, :] < rng.integers(0, N + 1, (ROWS, 1))], axis=1)
    mask[0, P:] = False
    anything = rng.integers(0, 23, tokens.shape)
    tokens[:, P:] = anything[:, P:]
    return np.where(mask, tokens, anything).astype(np.int32), mask


def same_gradient(found, expected) -> None:
    """Assert closeness leaf by leaf, but for the bias of keys, which has no gradient but rounding."""

    def without(path, x):
        return jnp.zeros(()) if [step.key for step in path][-2:] == ["k", "bias"] else x

    assert_close(*(jax.tree_util.tree_map_with_path(without, tree) for tree in (found, expected)), of_max=1e-4)


@pytest.mark.parametrize("name", ["llama3_rope", "gpt2"])  # relative and absolute positions
def test_hidden_states_and_gradients_are_those_of_rows_alone(name):
    lm, params = tiny_lm(name), tiny_params(name)
    tokens, mask = rows()
    weights = np.random.default_rng(3).normal(size=(ROWS, N + 1, lm.arch.width)) * mask[:, P - 1 :, None]

    @functools.partial(jax.jit, static_argnames=("prompt_length", "group_size"))
    def run(params, **group):
        def objective(params):
            hidden = lm.hidden(params, tokens, mask, **group)[:, -(N + 1) :]
            return (hidden * weights).sum(dtype=jnp.float32), hidden

        return jax.value_and_grad(objective, has_aux=True)(params)

    (_, alone), by_itself = run(params)
    (_, grouped), together = run(params, **GROUP)
    seen = mask[:, P - 1 :, None]
    assert_close(np.where(seen, grouped, 0), np.where(seen, alone, 0), 2e-5)
    same_gradient(together, by_itself)


def test_a_prompt_unlike_its_groups_is_never_wrong_in_silence():
    lm, params = tiny_lm("llama"), tiny_params("llama")
    tokens, mask = rows()
    tokens[2 * G + 1, P - 1] += 1
    mask[G + 2, 0] = not mask[G + 2, 0]
    found = np.isnan(np.asarray(lm.hidden(params, tokens, mask, **GROUP))).all((1, 2))
    assert np.flatnonzero(found).tolist() == [G + 2, 2 * G + 1]
    with pytest.raises(ValueError, match="12 rows do not divide into groups of group_size=5"):
        lm.hidden(params, tokens, mask, prompt_length=P, group_size=5)
    with pytest.raises(ValueError, match="prompt_length must be from 0 to the 12 tokens of a row, got 13"):
        lm.hidden(params, tokens, mask, prompt_length=13, group_size=G)


def test_logprobs_loss_and_gradient_of_groups_are_those_of_rows():
    lm = tiny_lm("gpt2")
    params = {"lm": tiny_params("gpt2"), "value": {"kernel": jnp.ones(16), "bias": jnp.float32(0.5)}}
    tokens, mask = rows(1)
    window = N + 1
    inside = np.concatenate([np.zeros((ROWS, 1), bool), mask[:, P:]], axis=1)

    given = tokens, mask, jnp.float32(0.7)

    def forced(group_size):
        options = {"window": window, "parts": 2, "group_size": group_size}
        policy = programs.teacher_force(lm, params, *given, **options)
        ref_logprobs = programs.reference_logprobs(lm, params["lm"], *given, **options)
        return jax.tree.map(lambda x: jnp.where(inside, x, 0.0), (policy, ref_logprobs))

    def learned(group_size):
        x, y, z = np.random.default_rng(0).normal(size=(3, ROWS, window)).astype(np.float32)
        batch, algorithm = Batch(tokens, mask, inside, x - 3, y, z, x), pg.ppo(entropy_coef=0.1)
        loss_fn = functools.partial(policy_loss, lm=lm, algorithm=algorithm, temperature=0.7, group_size=group_size)
        return jax.jit(lambda params: accumulate(loss_fn, params, batch, inside.sum(1), 2))(params)

    with pytest.raises(ValueError, match="12 rows do not divide into 5 parts"):
        programs.teacher_force(lm, params, *given, window=window, parts=5)
    assert_close(forced(G), forced(1), of_max=1e-5)
    (gradient, metrics), (expected, expected_metrics) = learned(G), learned(1)
    same_gradient(gradient, expected)
    assert_close(metrics, expected_metrics, of_max=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completions_are_those_of_rows_alone(temperature):
    lm = tiny_lm("qwen3")
    params = {"lm": tiny_params("qwen3"), "value": {"kernel": jnp.ones(16), "bias": jnp.float32(0.5)}}
    options = {"max_new_tokens": N, "eos_ids": (3, 8, 17), "temperature": temperature}
    arguments = lm, params["lm"], PROMPTS, PROMPT_MASK, jax.random.key(2)
    alone, grouped = (pg.sample(*arguments, **options, group_size=g) for g in (1, G))
    jax.tree.map(np.testing.assert_array_equal, grouped[:3], alone[:3])
    assert_close(grouped.logprobs, alone.logprobs, 2e-5)
    assert len({tuple(row) for row in np.asarray(grouped.tokens)[:G, P:]}) == (1 if temperature == 0 else G)
    _, alone = pg.sample_scored(lm, params, *arguments[2:], **options)
    _, grouped = pg.sample_scored(lm, params, *arguments[2:], **options, group_size=G)
    assert_close(grouped, alone, of_max=2e-5)


def test_a_sampler_refuses_groups_that_are_none():
    lm, params = tiny_lm("llama"), tiny_params("llama")
    sample = functools.partial(pg.sample, lm, params, key=jax.random.key(0), max_new_tokens=2)
    other = PROMPTS.copy()
    other[G + 1, -1] += 1
    with pytest.raises(ValueError, match="row 4 of prompts is not that of row 3, but group_size=3"):
        sample(other, PROMPT_MASK, group_size=G)
    with pytest.raises(ValueError, match="12 rows do not divide into groups of group_size=8"):
        sample(PROMPTS, PROMPT_MASK, group_size=8)
    under_padding = np.where(PROMPT_MASK, PROMPTS, np.arange(ROWS)[:, None])
    assert np.array_equal(sample(under_padding, PROMPT_MASK, group_size=G).mask, sample(PROMPTS, PROMPT_MASK).mask)


def test_a_prompt_is_computed_once():
    # On paper: the layers see P + G N tokens of a group in place of G (P + N); attention's part is small at this width.
    arch = dataclasses.replace(tiny_lm("llama").arch, width=256, mlp_width=512, vocab_size=8, depth=1)
    lm = pg.causal_lm(arch)
    params = jax.eval_shape(lm.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2 * 8, 32 + 8), jnp.int32)

    def flops(group_size):
        run = jax.jit(lambda params, tokens: lm.hidden(params, tokens, prompt_length=32, group_size=group_size))
        return run.lower(params, tokens).cost_analysis()["flops"]

    assert flops(8) / flops(1) == pytest.approx((32 + 8 * 8) / (8 * 40), rel=0.1)


def test_minibatches_hold_whole_groups():
    order = np.asarray(minibatches(jax.random.key(0), 24, 2, 4))
    assert order.shape == (2, 12) and sorted(order.ravel()) == list(range(24))
    assert (order.reshape(-1, 4) % 4 == np.arange(4)).all() and (
        order.reshape(-1, 4) // 4 == order[:, ::4].reshape(-1, 1) // 4
    ).all()
    assert (np.diff(order[:, ::4].ravel()) != 4).any(), "groups are shuffled"
    with pytest.raises(ValueError, match="24 rows do not divide into 4 minibatches of whole groups of 4"):
        minibatches(jax.random.key(0), 24, 4, 4)


@pytest.mark.campaign
@pytest.mark.parametrize(
    "axes", campaign_but_for([{"data": 4}, {"fsdp": 2, "tensor": 2}], {"fsdp": 2, "tensor": 2}), ids=str
)
def test_groups_over_a_mesh_give_what_one_device_gives(axes):
    lm = ppo_on_mesh.tiny_lm("llama")
    prompts, prompt_mask = (np.repeat(x, 2, axis=0) for x in left_padded((7, 4, 1, 5, 3, 6, 2, 7), 7))

    def run(axes):
        with ppo_on_mesh.placed(axes, ppo_on_mesh.host_params(lm)) as params:
            options = {"max_new_tokens": 4, "eos_ids": (3,), "group_size": 2}
            rolled = pg.sample(lm, params["lm"], prompts, prompt_mask, jax.random.key(5), **options)
            loss = lambda params: lm.hidden(params, rolled.tokens, rolled.attention_mask, prompt_length=7, group_size=2)
            gradient = jax.jit(jax.grad(lambda params: jnp.square(loss(params)).mean()))(params["lm"])
            given, options = (rolled.tokens, rolled.attention_mask, jnp.float32(1.0)), {"window": 5, "parts": 2}
            forced = programs.teacher_force(lm, params, *given, **options, group_size=2)
            return jax.device_get((rolled, gradient, forced))

    rolled, gradient, forced = run(axes)
    expected, expected_gradient, expected_forced = run(None)
    jax.tree.map(np.testing.assert_array_equal, rolled[:3], expected[:3])
    assert_close((rolled.logprobs, forced), (expected.logprobs, expected_forced), of_max=1e-5)
    assert_close(gradient, expected_gradient, of_max=1e-5)


def test_devices_that_would_get_parts_of_groups_compute_rows():
    mesh = make_mesh(data=2, fsdp=2)
    assert whole_groups(mesh, 16, 4) == 4 and whole_groups(mesh, 16, 8) == 1 and whole_groups(None, 12, 8) == 1


def letters(prompts, completions, **columns):
    """A black box: letters up to m."""
    return [float(sum(c < "m" for c in text)) for text in completions]


@pytest.mark.campaign
@pytest.mark.parametrize("eval_samples", campaign_but_for([3, 4], 4))  # of groups of two: not shared, shared
def test_a_script_that_shares_prompts_learns_what_one_learns_that_does_not(tmp_path, monkeypatch, eval_samples):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in ("a", "bcd", "ef", "ghij")))
    config = script.Config(
        model=str(save_tiny_model(tmp_path / "tiny")), prompts=str(prompts), held_out=str(prompts), steps=2,
        rewards=("tests.test_groups:letters",), output=tmp_path / "shared", batch_size=8, max_new_tokens=6, minibatches=1,
        microbatches=2, learning_rate=1e-2, warmup_updates=0, kl_coef=0.5, eval_samples=eval_samples, samples_every=1,
        save_every=100, algorithm="grpo", group_size=2, kl_loss_coef=0.1,
    )  # fmt: skip
    script.main(config)
    one = logs.read_metrics(config.output)
    for module in (iteration, evaluation, task):
        monkeypatch.setattr(module, "whole_groups", lambda mesh, rows, group_size: 1)
    script.main(dataclasses.replace(config, output=tmp_path / "alone"))
    other = logs.read_metrics(tmp_path / "alone")
    for mine, known in zip(one, other, strict=True):
        for name in known:
            if name.partition("/")[0] not in ("timing", "perf", "time"):
                assert math.isclose(mine[name], known[name], rel_tol=2e-3, abs_tol=2e-5), name
