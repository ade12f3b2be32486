"""Parameters spread over a mesh compute what they compute on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import pgjax as pg
from pgjax.learning.optimizer import accumulate
from pgjax.parallel.sharding import check_batch, constrain, make_mesh, param_shardings, parse_mesh
from tests.tiny import tiny_lm, tiny_params
from tests.tiny_task import save_tiny_model


def test_fsdp_splits_every_matrix_over_the_devices(tmp_path):
    lm, params, _ = pg.load(save_tiny_model(tmp_path / "tiny"), mesh=make_mesh(fsdp=4))
    for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        share = x.addressable_shards[0].data.size / x.size
        assert share == (0.25 if path[-1].key in ("kernel", "tokens") else 1.0), path
    assert np.isfinite(jax.jit(lm.apply)(params, jnp.zeros((4, 3), jnp.int32))).all()


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3}, r"data=3 needs 3 devices, but there are 4: .* \(data=4,fsdp=1,tensor=1 would fit\)"),
        ({"tensor": 2, "data": 4}, r"needs 8 devices, but there are 4: .* \(data=2,fsdp=1,tensor=2 would fit\)"),
        ({"data": -1, "fsdp": 3}, r"data=-1,fsdp=3 needs a multiple of 3 devices, but there are 4"),
        ({"data": -1, "fsdp": -1}, "data and fsdp are both -1"),
        ({"data": 0}, "data=0: .* at least 1, or -1"),
        ({"fsdp": -2}, "fsdp=-2: .* at least 1, or -1"),
        ({}, "no axes"),
        ({"rows": 4}, r"unknown mesh axes \['rows'\]: the axes are data, fsdp, tensor"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**axes)


def test_a_mesh_fills_up_and_keeps_the_order_of_its_axes():
    mesh = make_mesh(tensor=2, data=-1)
    assert dict(mesh.shape) == {"data": 2, "tensor": 2} and mesh.axis_names == ("data", "tensor")
    assert [d.id for d in make_mesh(devices=jax.devices()[2:], fsdp=-1).devices.flat] == [2, 3]
    assert parse_mesh(" fsdp=2, data=-1 ") == {"fsdp": 2, "data": -1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names the axis ''"),
        ("data=2,rows=2", "names the axis 'rows': write sizes of data, fsdp, tensor"),
        ("data", "gives data the size ''"),
        ("data=two", "gives data the size 'two'"),
        ("data=2,data=2", "names data twice"),
        ("data=0", "data=0"),
        ("data=-1,tensor=-1", "both -1"),
    ],
)
def test_a_mesh_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


def test_rows_that_the_mesh_cannot_share_are_refused_before_compute():
    mesh = make_mesh(data=2, fsdp=2)
    check_batch(mesh, 8, "batch_size")
    check_batch(make_mesh(tensor=4), 3, "batch_size")
    message = "batch_size: 6 rows do not divide over data=2 x fsdp=2 of the mesh: make it a multiple of 4, as 8"
    with pytest.raises(ValueError, match=message):
        check_batch(mesh, 6, "batch_size")
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="each microbatch: 2 rows do not divide over data=2 x fsdp=2"),
    ):
        accumulate(lambda w, x: (jnp.mean(w * x), {}), jnp.ones(()), jnp.ones(8), jnp.ones(8), microbatches=4)


def test_outside_a_mesh_and_inside_shard_map_constraints_do_nothing():
    x, mesh = jnp.arange(8.0), make_mesh(data=4)
    assert constrain(x, "batch") is x
    doubled = jax.shard_map(
        lambda x: 2 * constrain(x, "batch"), in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")
    )
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(jax.jit(doubled)(x), 2 * x)
        assert jax.jit(lambda x: constrain(x, "batch"))(x).sharding.spec == PartitionSpec("data")
        assert jax.jit(lambda x: constrain(x[:3], "batch"))(x).shape == (3,)  # three rows are not split


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


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        (
            ("dp", "tp"),
            AxisType.Auto,
            r"axes \('dp', 'tp'\), none of data, fsdp, tensor: over others nothing would be split",
        ),
        (
            ("data", "tensor"),
            AxisType.Explicit,
            r"axes \('data', 'tensor'\) of the mesh are Explicit: .* want Auto ones",
        ),
    ],
)
def test_a_mesh_on_which_nothing_would_be_split_is_refused(names, kind, message):
    # The bug: with names of its own, a mesh replicated everything, and said nothing.
    mesh = jax.make_mesh((2, 2), names, axis_types=(kind,) * 2)
    lm, params = tiny_lm("llama"), tiny_params("llama")
    prompts, mask = np.ones((4, 2), np.int32), np.ones((4, 2), bool)
    whole = jax.device_put(params, jax.sharding.NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(ValueError, match=message):
        pg.sample(lm, whole, prompts, mask, jax.random.key(0), max_new_tokens=2)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        jax.jit(lm.apply)(params, prompts)
    with pytest.raises(ValueError, match=message):
        param_shardings(mesh, params)
