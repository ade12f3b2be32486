"""Parameters spread over a mesh compute what they compute on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import pgjax as pg
from pgjax.sharding import make_mesh, param_shardings
from tests.tiny_model import save_tiny_model


@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "tensor": 2}], ids=str)
def test_a_model_loaded_onto_a_mesh_gives_the_same_logits(tmp_path, axes):
    folder = save_tiny_model(tmp_path / "tiny")
    lm, params, _ = pg.load(folder)
    tokens = jax.random.randint(jax.random.key(0), (4, 6), 0, 16)
    mesh = make_mesh(**axes)
    whole = lm.apply(params, tokens)
    if "tensor" in axes:  # 257 ids: the vocabulary cannot be split in two
        with pytest.raises(ValueError, match="embed/tokens has an axis of 257, which tensor=2"):
            pg.load(folder, mesh=mesh)
        return
    _, spread, _ = pg.load(folder, mesh=mesh)
    placed = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(jax.jit(lm.apply)(spread, placed), whole, rtol=1e-5, atol=1e-6)


def test_fsdp_splits_every_matrix_over_the_devices(tmp_path):
    lm, params, _ = pg.load(save_tiny_model(tmp_path / "tiny"), mesh=make_mesh(fsdp=4))
    for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        share = x.addressable_shards[0].data.size / x.size
        assert share == (0.25 if path[-1].key in ("kernel", "tokens") else 1.0), path
    assert np.isfinite(jax.jit(lm.apply)(params, jnp.zeros((4, 3), jnp.int32))).all()


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="needs 3 devices, but there are 4"):
        make_mesh(data=3)
    with pytest.raises(ValueError, match="unknown mesh axes"):
        make_mesh(rows=4)


def test_the_layout_of_every_parameter_is_in_the_table():
    mesh = make_mesh(data=1, fsdp=2, tensor=2)
    shapes = {
        "layers": {
            "q": {"kernel": jax.ShapeDtypeStruct((3, 8, 4), jnp.float32)},
            "norm": {"scale": jax.ShapeDtypeStruct((3, 8), jnp.float32)},
        }
    }
    layout = param_shardings(mesh, shapes)["layers"]
    assert layout["q"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert layout["norm"]["scale"].spec == PartitionSpec()
