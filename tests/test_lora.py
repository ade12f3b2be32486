"""Low-rank adapters: a start that changes nothing, gradients that follow from the kernels', and functions that merging keeps."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax.learning import programs
from pgjax.learning.algorithm import Batch
from pgjax.learning.optimizer import adamw, init_state
from pgjax.models.lora import KERNELS
from pgjax.parallel import sharding
from tests.compare import assert_close
from tests.sizes import SOME_FAMILIES
from tests.tiny import ARCHITECTURES, tiny_apply, tiny_lm, tiny_params

GOLDENS = Path(__file__).parent / "goldens"
PEFT = {name: f"self_attn.{name}_proj" for name in "qkvo"} | {
    name: f"mlp.{name}_proj" for name in ("gate", "up", "down")
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 23, (4, 9)), jnp.int32)
MASK = jnp.arange(9)[None, :] >= jnp.array([0, 2, 3, 0])[:, None]


@functools.cache
def adapters(name, rank=3, moved=True, **options):
    """Adapters to a tiny model; moved ones are far from their start."""
    found = pg.init_lora(jax.random.key(1), tiny_params(name), rank=rank, **options)
    rng = np.random.default_rng(2)

    def moving(path, x):
        noise = 0.3 * rng.standard_normal(x.shape) if moved and path[-1].key != "lora_scale" else 0
        return np.asarray(x + noise, np.float32)

    return jax.tree_util.tree_map_with_path(moving, jax.device_get(found))


def merged_by_hand(name, factors):
    """Add each adapter to its kernel in float64 NumPy, layer by layer."""
    params = jax.tree.map(lambda x: np.array(x, np.float64), tiny_params(name))
    for module, leaves in factors["layers"].items():
        a, b, scale = (np.asarray(leaves[f"lora_{part}"], np.float64) for part in ("a", "b", "scale"))
        for layer in range(len(a)):
            params["layers"][module]["kernel"][layer] += scale[layer] * (a[layer] @ b[layer])
    return jax.tree.map(np.float32, params)


@pytest.mark.parametrize("name", SOME_FAMILIES)
def test_before_the_first_step_the_model_is_the_one_it_was(name):
    apply, params = tiny_apply(name), tiny_params(name)
    found, wanted = (apply(x, TOKENS, MASK) for x in (pg.with_lora(params, adapters(name, moved=False)), params))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))  # XLA may sum in another order


@pytest.mark.parametrize("name", SOME_FAMILIES)
def test_adapters_beside_and_inside_the_kernels_are_one_function(name):
    apply, factors = tiny_apply(name), adapters(name, alpha=1.5)
    adapted = pg.with_lora(tiny_params(name), factors)
    wanted = apply(merged_by_hand(name, factors), TOKENS, MASK)
    assert np.abs(apply(tiny_params(name), TOKENS, MASK) - wanted).max() > 0.5  # they do change it
    for found in (apply(adapted, TOKENS, MASK), apply(pg.merge_lora(adapted), TOKENS, MASK)):
        np.testing.assert_allclose(found, wanted, atol=2e-4 * float(jnp.abs(wanted).max()))
    assert jax.tree.structure(pg.merge_lora(adapted)) == jax.tree.structure(tiny_params(name))


@pytest.mark.campaign
def test_in_16_bits_the_function_and_its_gradient_are_near_those_in_32():
    adapted, factors = pg.with_lora(tiny_params("qwen2"), adapters("qwen2", alpha=1.5)), adapters("qwen2", alpha=1.5)

    def loss(trained, dtype):
        logits = tiny_apply("qwen2", dtype)(pg.with_lora(tiny_params("qwen2"), trained), TOKENS, MASK)
        return pg.token_logprobs(logits, TOKENS).mean()

    exact, half = (jax.jit(jax.grad(functools.partial(loss, dtype=x)))(factors) for x in ("float32", "bfloat16"))
    for x, y in zip(jax.tree.leaves(exact), jax.tree.leaves(half), strict=True):
        assert y.dtype == jnp.float32 and np.abs(x - y).max() <= 0.1 * np.abs(x).max()
    logits = [tiny_apply("qwen2", x)(adapted, TOKENS, MASK)[MASK] for x in ("float32", "bfloat16")]
    assert np.abs(logits[0] - logits[1]).max() < 0.05 * np.abs(logits[0]).max()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_their_gradients_are_those_of_the_kernels_through_the_other_factor(name):
    # L(W + s A B): dL/dA = s dL/dW B^T, dL/dB = s A^T dL/dW
    apply, factors = tiny_apply(name), adapters(name, alpha=1.5)

    def loss(params):
        return pg.token_logprobs(apply(params, TOKENS, MASK), TOKENS).sum()

    found = jax.jit(jax.grad(lambda trained: loss(pg.with_lora(tiny_params(name), trained))))(factors)
    whole = jax.jit(jax.grad(loss))(merged_by_hand(name, factors))
    for module, leaves in factors["layers"].items():
        kernel = np.asarray(whole["layers"][module]["kernel"], np.float64)
        a, b = (np.asarray(leaves[part], np.float64) for part in ("lora_a", "lora_b"))
        wanted = {"lora_a": 0.5 * kernel @ b.swapaxes(1, 2), "lora_b": 0.5 * a.swapaxes(1, 2) @ kernel}
        for part, x in wanted.items():
            np.testing.assert_allclose(found["layers"][module][part], x, atol=1e-3 * np.abs(x).max(), err_msg=module)
        assert not found["layers"][module]["lora_scale"].any()
    beside = jax.jit(jax.grad(loss))(pg.with_lora(tiny_params(name), factors))
    for module in factors["layers"]:  # where the kernel's own is asked for, it is there
        kernel = whole["layers"][module]["kernel"]
        found = beside["layers"][module]["kernel"]
        np.testing.assert_allclose(found, kernel, atol=1e-3 * float(jnp.abs(kernel).max()), err_msg=module)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_logits_and_gradients_are_those_of_peft(name):
    golden = np.load(GOLDENS / "lora.npz")
    lm, params, _ = pg.load(GOLDENS / name, dtype=jnp.float32)
    tokens = jnp.asarray(golden[f"{name}/tokens"], jnp.int32)

    def factor(kind, module, part):  # peft keeps A as [r, in] and B as [out, r], layer by layer
        path = f"{name}/{kind}/model.layers.{{}}.{PEFT[module]}.lora_{part}"
        return jnp.stack([golden[path.format(layer)].T for layer in range(lm.arch.depth)])

    trained = pg.init_lora(jax.random.key(0), params, rank=3, alpha=6.0)
    for module, leaves in trained["layers"].items():
        leaves |= {f"lora_{part.lower()}": factor("value", module, part) for part in "AB"}

    def loss(trained):
        logits = lm.apply(pg.with_lora(params, trained), tokens)
        return pg.token_logprobs(logits, tokens).sum(), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)
    wanted = golden[f"{name}/logits"]
    np.testing.assert_allclose(logits, wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(jax.jit(lm.apply)(params, tokens) - wanted).max() > 0.1 * np.abs(wanted).max()
    for module, leaves in gradient["layers"].items():
        for part in "AB":
            wanted = factor("gradient", module, part)
            np.testing.assert_allclose(leaves[f"lora_{part.lower()}"], wanted, atol=1e-3 * np.abs(wanted).max())


def test_the_sampler_and_a_teacher_forced_pass_have_one_policy():
    lm, adapted = tiny_lm("qwen3"), pg.with_lora(tiny_params("qwen3"), adapters("qwen3", alpha=1.5))
    params = {"lm": adapted, "value": pg.init_value_head(lm.arch.width)}
    options = {"max_new_tokens": 6, "temperature": 0.9}
    rollout, policy = pg.sample_scored(lm, params, TOKENS[:, :5], MASK[:, 4:], jax.random.key(3), **options)
    given = rollout.tokens, rollout.attention_mask, jnp.float32(0.9)
    forced = programs.teacher_force(lm, params, *given, window=7, parts=2)
    inside = rollout.mask[:, -7:]
    np.testing.assert_allclose(policy.logprobs[inside], forced.logprobs[inside], atol=1e-4)
    frozen = programs.reference_logprobs(lm, tiny_params("qwen3"), *given, window=7, parts=2)
    assert np.abs(frozen - forced.logprobs).max() > 0.1


def batch_of(rows=4, width=4):
    x = jnp.asarray(np.random.default_rng(4).standard_normal((rows, width)), jnp.float32)
    inside = jnp.arange(width)[None, :] >= jnp.ones((rows, 1), jnp.int32)
    return Batch(TOKENS, MASK, inside, x - 4.0, x, x + 1.0, 0.3 * x)


LM = pg.causal_lm(dataclasses.replace(ARCHITECTURES["llama"], vocab_size=24))  # which two devices can share


def frozen_and_start():
    params = LM.init(jax.random.key(5))
    return {"lm": params}, pg.init_lora(jax.random.key(6), params, rank=3)


def updated(frozen, trained, *, microbatches=1, mesh=None):
    lm, optimizer = LM, adamw(1e-2, updates=3, weight_decay=0.1)
    params = jax.tree.map(jnp.copy, {"lm": trained, "value": pg.init_value_head(lm.arch.width)})
    batch = batch_of()
    if mesh is not None:
        params, frozen = (sharding.place(x, sharding.param_shardings(mesh, x)) for x in (params, frozen))
        batch = sharding.place(batch, sharding.batch_sharding(mesh))
    state, order = init_state(params, optimizer), jnp.array([[2, 0, 3, 1]])
    algorithm = pg.ppo(entropy_coef=0.01)
    for _ in range(3):
        state, metrics = programs.update(
            state, batch, order, jnp.int32(0), frozen, lm=lm, algorithm=algorithm, optimizer=optimizer,
            microbatches=microbatches,
        )  # fmt: skip
    return state, metrics


def test_an_update_moves_the_adapters_and_the_critic_and_nothing_else():
    frozen, start = frozen_and_start()
    state, metrics = updated(frozen, start)
    assert bool(metrics["train/healthy"]) and state.params["value"]["kernel"].any()
    for module in KERNELS:
        moved, before = state.params["lm"]["layers"][module], start["layers"][module]
        assert moved["lora_b"].all() and (moved["lora_a"] != before["lora_a"]).all()
        assert (moved["lora_scale"] == before["lora_scale"]).all()
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert size(state) < 4 * size(start)  # and no moments but theirs


@pytest.mark.campaign
def test_an_update_is_the_same_in_parts_and_over_every_axis_of_a_mesh():
    frozen, start = frozen_and_start()
    whole = updated(frozen, start)
    assert_close(updated(frozen, start, microbatches=2), whole, 2e-5)
    for sizes in ({"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2}):
        mesh = sharding.make_mesh(**sizes)
        with jax.set_mesh(mesh):
            found = updated(frozen, start, mesh=mesh)
        assert_close(found, whole, 1e-4)
        q = found[0].params["lm"]["layers"]["q"]
        assert q["lora_a"].sharding.spec == jax.P(None, "fsdp")
        assert q["lora_b"].sharding.spec == (jax.P(None, None, "tensor") if "tensor" in sizes else jax.P())


def test_a_saved_model_has_its_adapters_inside(tmp_path):
    lm, factors = tiny_lm("qwen2"), adapters("qwen2", alpha=1.5)
    pg.save_pretrained(tmp_path / "model", lm, pg.with_lora(tiny_params("qwen2"), factors), None)
    _, params, _ = pg.load(tmp_path / "model")
    assert_close(params, merged_by_hand("qwen2", factors), 1e-5)


def test_some_kernels_alone_can_have_them():
    factors = adapters("gpt2", targets=("q", "gate", "up"))  # GPT-2 has no gate
    assert set(factors["layers"]) == {"q", "up"}
    a = factors["layers"]["q"]["lora_a"]
    assert a.shape == (2, 16, 3) and (factors["layers"]["q"]["lora_scale"] == jnp.float32(32 / 3)).all()
    start = pg.init_lora(jax.random.key(0), tiny_params("llama"), rank=64)["layers"]
    first = np.asarray(start["q"]["lora_a"])
    assert np.abs(first).max() <= 0.25 and first.std() == pytest.approx(0.25 / np.sqrt(3), rel=0.05)
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first, start["k"]["lora_a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 2.0}, "rank must be a whole number, got 2.0"),
        ({"rank": 2, "alpha": 0.0}, "alpha must be finite and above 0, got 0.0"),
        ({"rank": 2, "alpha": float("nan")}, "alpha must be finite and above 0, got nan"),
        ({"rank": 2, "targets": ("q_proj",)}, r"targets must be some of q, k, .*, got \('q_proj',\)"),
        ({"rank": 2, "targets": ()}, r"targets must be some of q, k, .*, got \(\)"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_number(options, message):
    with pytest.raises(ValueError, match=message):
        pg.init_lora(jax.random.key(0), tiny_params("llama"), **options)


def test_adapters_of_another_model_are_refused_with_the_map_that_is_missing():
    with pytest.raises(ValueError, match="an adapter to gate, but the model has no gate"):
        pg.with_lora(tiny_params("gpt2"), adapters("llama"))
