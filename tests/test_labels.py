"""Weight decay, muon and multi_transform on stacked layers are what they are on one tree a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import pgjax as pg
from pgjax.learning.optimizer import apply_gradient, init_state, muon_dimensions
from pgjax.models.causal_lm import per_layer
from tests.compare import assert_close
from tests.tiny import FAMILIES, tiny_lm, tiny_params


def gradients(params):
    """Random ones, of one size whatever the leaf."""
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(draw.standard_normal(x.shape), jnp.float32), params)


def step(optimizer, params, grad):
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.update(grad, optimizer.init(params), params)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_list_of_layers_has_the_labels_of_a_stack(name):
    lm = tiny_lm(name)
    params = {"lm": jax.eval_shape(lm.init, jax.random.key(0)), "value": pg.init_value_head(lm.arch.width)}
    stacked = pg.parameter_labels(params)
    listed = pg.parameter_labels({**params, "lm": jax.eval_shape(per_layer, params["lm"])})
    for layer in listed["lm"]["layers"]:
        assert layer == stacked["lm"]["layers"]
    assert set(jax.tree.leaves(stacked["lm"]["embed"])) == {"embeddings"}
    assert stacked["value"] == {"kernel": "norms", "bias": "norms"} and stacked["lm"]["norm"]["scale"] == "norms"
    kernels = {name: leaf["kernel"] for name, leaf in stacked["lm"]["layers"].items() if "kernel" in leaf}
    assert len(kernels) >= 6 and set(kernels.values()) == {"matrices"}
    others = [leaf for layer in stacked["lm"]["layers"].values() for kind, leaf in layer.items() if kind != "kernel"]
    assert set(others) == {"norms"}
    assert jax.tree.leaves(pg.matrix_mask(params)) == [label != "norms" for label in jax.tree.leaves(stacked)]


MATRIX, VECTOR = jnp.ones((2, 2)), jnp.ones(2)
TREES = {
    "a list": {"layers": [{"w": MATRIX, "b": VECTOR}], "head": MATRIX},
    "a tuple": {"layers": ({"w": MATRIX, "b": VECTOR},), "head": MATRIX},
    "numbered": {"layers": {"layer_0": {"w": MATRIX, "b": VECTOR}}, "head": MATRIX},
    "counted": {"layers": {0: {"w": MATRIX, "b": VECTOR}}, "head": MATRIX},
    "blocks": {"blocks": [{"w": MATRIX, "b": VECTOR}], "head": MATRIX},
    "a stack": {"layers": {"w": MATRIX[None], "b": VECTOR[None]}, "head": MATRIX},
}


@pytest.mark.parametrize("name", TREES)
def test_every_matrix_decays_and_no_vector_does(name):
    params = TREES[name]
    found = step(pg.adamw(1.0, updates=1, weight_decay=0.5), params, jax.tree.map(jnp.zeros_like, params))
    for path, x in jax.tree_util.tree_leaves_with_path(found):
        np.testing.assert_array_equal(x, 0.0 if "'b'" in jax.tree_util.keystr(path) else -0.5)


@pytest.mark.campaign
@pytest.mark.skipif(not hasattr(optax.contrib, "MuonDimensionNumbers"), reason="optax is older than 0.2.6")
def test_muon_orthogonalises_each_kernel_of_a_stack_by_itself_and_leaves_all_else_to_adam():
    params = {"lm": tiny_params("qwen2"), "value": pg.init_value_head(16)}
    grad = gradients(params)
    muon = optax.contrib.muon(1.0, muon_weight_dimension_numbers=muon_dimensions)
    found = jax.jit(lambda params, grad: step(muon, params, grad))(params, grad)
    adam = step(optax.nadamw(1.0, weight_decay=0.0), params, grad)  # as muon's own Adam
    by_layer = optax.contrib.muon(1.0)  # of a tree of nothing but two-dimensional kernels
    layers, stacks = found["lm"].pop("layers"), grad["lm"].pop("layers")
    of_adam = adam["lm"].pop("layers")
    assert_close(found, adam, 1e-5)
    for name, leaves in stacks.items():
        for kind, x in leaves.items():
            if kind == "kernel":
                wanted = jnp.stack([step(by_layer, {"w": one}, {"w": one})["w"] for one in x])
                singular = np.linalg.svd(
                    layers[name][kind] / np.sqrt(max(1, x.shape[2] / x.shape[1])), compute_uv=False
                )
                assert singular.min() > 0.3 and singular.max() < 1.3, name
            else:
                wanted = of_adam[name][kind]
            assert_close(layers[name][kind], wanted, 1e-4, name=f"{name} {kind}")


def test_masked_and_multi_transform_go_by_the_labels():
    params = tiny_params("llama")
    ones = jax.tree.map(jnp.ones_like, params)
    rates = {"matrices": optax.sgd(1.0), "norms": optax.sgd(10.0), "embeddings": optax.set_to_zero()}
    found = step(optax.multi_transform(rates, pg.parameter_labels), params, ones)
    decay = step(optax.masked(optax.add_decayed_weights(1.0), pg.matrix_mask), params, ones)
    for path, x in jax.tree_util.tree_leaves_with_path(found):
        name = jax.tree_util.keystr(path)
        wanted = 0.0 if "embed" in name else -10.0 if "norm" in name else -1.0
        np.testing.assert_array_equal(x, wanted, err_msg=name)
    moved = jax.tree.map(lambda x, w: bool(np.allclose(x, 1.0 + w)), decay, params)
    assert moved == pg.matrix_mask(params)


def test_an_optimizer_that_wants_the_loss_gets_it():
    params = {"w": jnp.full(2, 3.0)}
    polyak = optax.polyak_sgd()  # steps by loss / |gradient|^2
    state = init_state(params, polyak)
    state, metrics = apply_gradient(state, {"w": jnp.ones(2)}, jnp.float32(2.0), polyak)
    np.testing.assert_allclose(state.params["w"], 3.0 - 1.0, rtol=1e-4)
    assert metrics["train/healthy"] and "lr" not in metrics


@pytest.mark.campaign
@pytest.mark.skipif(not hasattr(optax.contrib, "MuonDimensionNumbers"), reason="optax is older than 0.2.6")
def test_an_iteration_takes_muon():
    lm, params = tiny_lm("llama"), tiny_params("llama")
    muon = optax.contrib.muon(1e-2, muon_weight_dimension_numbers=pg.muon_dimensions)
    it = pg.iteration(lm, pg.reinforce(kl_coef=0.0), muon, max_new_tokens=2)
    state = it.init(params, jax.random.key(0))
    rollout = it.sample(state, [[3], [4]], [[True], [True]])
    state, metrics = it.learn(state, rollout, [1.0, 0.0])
    assert metrics["train/healthy"]
