"""Checkpoints come back bit for bit, and what is wrong with one is named."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pgjax.core.errors import UserError
from pgjax.learning.optimizer import init_state
from pgjax.run.checkpoint.checkpoints import Checkpoints
from pgjax.run.checkpoint.digest import digest
from tests import ppo_on_mesh


def mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))


def training_state():
    """The kinds of leaf that a training run holds: nested, of five dtypes, sharded and not, with a typed key."""
    params = {
        "layers": {"w": jax.random.normal(jax.random.key(1), (8, 16)), "half": jnp.full((3,), 1 / 3, jnp.bfloat16)},
        "heads": [jnp.float32(0.5), jnp.arange(4)],
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "params": params,
        "opt": optimizer.init(params["layers"]),
        "key": jax.random.key(7),
        "seen": jnp.array(True),
    }


def bits(leaf):
    """Give the raw bytes of a leaf, read through a copy, so that no view on its buffer stays behind."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(jnp.array(leaf, copy=True)).tobytes()


def assert_same(restored, expected):
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for have, want in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert have.dtype == want.dtype and have.shape == want.shape and have.sharding == want.sharding
        assert bits(have) == bits(want)


def written(folder, state, *, step=3):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(step, state, {"epoch": 1})
    return folder


def data_files(folder, step):
    """List the files that hold the arrays' values, the largest first."""
    files = [p for p in (folder / str(step) / "state" / "ocdbt.process_0" / "d").iterdir() if p.is_file()]
    return sorted(files, key=lambda p: p.stat().st_size, reverse=True)


def test_state_comes_back_bit_for_bit_in_another_process_object(tmp_path):
    state = training_state()
    written(tmp_path, state)
    with Checkpoints(tmp_path) as checkpoints:
        restored, extra = checkpoints.restore(jax.eval_shape(training_state))
        assert_same(restored, state)
        assert extra == {"epoch": 1} and checkpoints.latest() == 3


def test_updates_after_save_do_not_reach_the_checkpoint(tmp_path):
    update = jax.jit(lambda w: w + 1, donate_argnums=0)
    w = update(jnp.zeros((512, 2048)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": w}, {})
        for _ in range(20):
            w = update(w)
        jax.block_until_ready(w)
        restored, _ = checkpoints.restore({"w": w})
    np.testing.assert_array_equal(restored["w"], 1.0)
    np.testing.assert_array_equal(w, 21.0)


def test_sharded_state_restores_onto_another_sharding(tmp_path):
    rows, columns = (NamedSharding(mesh(), spec) for spec in (PartitionSpec("data"), PartitionSpec(None, "data")))
    w = jax.random.normal(jax.random.key(0), (8, 4))
    written(tmp_path, {"w": jax.device_put(w, rows)})
    with Checkpoints(tmp_path) as checkpoints:
        for like in (
            jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=columns),
            jax.device_put(jnp.zeros_like(w), columns),
        ):
            restored, _ = checkpoints.restore({"w": like})
            assert restored["w"].sharding == columns
            np.testing.assert_array_equal(restored["w"], w)


def learner_on(mesh):
    """Everything a PPO run has: policy and critic, Adam's moments, the coefficient and the key."""
    with ppo_on_mesh.placed(mesh, ppo_on_mesh.host_params(ppo_on_mesh.tiny_lm("llama"))) as params:
        learner = init_state(params, ppo_on_mesh.OPTIMIZER)
        return {"learner": with_noise(learner), "kl_coef": jnp.float32(0.1), "key": jax.random.key(3)}


@jax.jit
def with_noise(tree):
    """Fill moments and counters, which start at zero, with something that can be lost."""
    return jax.tree.map(lambda x: jnp.sin(100 * x + 1) if x.dtype == jnp.float32 else ~x, tree)


def test_a_training_state_goes_from_mesh_to_mesh_bit_for_bit(tmp_path):
    states = [learner_on(mesh) for mesh in (None, *ppo_on_mesh.LAYOUTS[1:4])]
    for number, state in enumerate(states):
        assert digest(state) == digest(states[0])
        if number in (0, 3):
            written(tmp_path / str(number), state)
            with Checkpoints(tmp_path / str(number)) as checkpoints:
                for like in states:
                    assert_same(checkpoints.restore(like)[0], like)


def test_restored_key_and_counter_enter_one_program_with_sharded_parameters(tmp_path):
    state = {
        "w": jax.device_put(jnp.ones((8,)), NamedSharding(mesh(), PartitionSpec("data"))),
        "key": jax.random.key(5),
        "step": jnp.int32(2),
    }
    step = jax.jit(lambda s: s["w"] * s["step"].astype(jnp.float32) + jax.random.normal(s["key"], (8,)))
    written(tmp_path, state)
    bare = {name: jax.ShapeDtypeStruct(state[name].shape, state[name].dtype) for name in ("key", "step")}
    with Checkpoints(tmp_path) as checkpoints:
        for like in (state, state | bare):
            restored, _ = checkpoints.restore(like)
            np.testing.assert_array_equal(step(restored), step(state))


def test_key_keeps_its_implementation(tmp_path):
    key = jax.random.key(3, impl="rbg")
    written(tmp_path, {"key": key})
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore({"key": key})
    assert restored["key"].dtype == key.dtype
    np.testing.assert_array_equal(jax.random.bits(restored["key"]), jax.random.bits(key))


def test_only_the_last_checkpoints_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.full((2,), float(step))}, {"step": step})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
        restored, extra = checkpoints.restore({"w": jnp.zeros((2,))}, step=2)
    np.testing.assert_array_equal(restored["w"], 2.0)
    assert extra == {"step": 2}
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["2", "3"]


def test_same_step_is_saved_once_and_an_earlier_one_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(5, {"w": jnp.ones((2,))}, {}) is True
        assert checkpoints.save(5, {"w": jnp.zeros((2,))}, {}) is False
        with pytest.raises(ValueError, match="holds step 5 already, so step 4"):
            checkpoints.save(4, {"w": jnp.zeros((2,))}, {})
        restored, _ = checkpoints.restore({"w": jnp.zeros((2,))})
    np.testing.assert_array_equal(restored["w"], 1.0)


def test_unfinished_save_is_not_taken_for_a_checkpoint(tmp_path):
    written(tmp_path, {"w": jnp.ones((2,))}, step=3)
    shutil.copytree(tmp_path / "3", tmp_path / "4.unfinished")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [3]


def test_truncated_array_is_named_with_the_step_to_fall_back_on(tmp_path):
    state = {"body": {"w": jax.random.normal(jax.random.key(0), (256, 256))}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
        checkpoints.save(4, state, {})
    largest = data_files(tmp_path, 4)[0]
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            ValueError, match=r'step 4 in .* is damaged at body.w; resume_from="last-good" goes on from step 3'
        ) as e:
            checkpoints.restore(state)
        assert str(tmp_path) in str(e.value)
        restored, _ = checkpoints.restore(state, step=3)
    assert_same(restored, state)


@pytest.mark.parametrize("name", ["state/_METADATA", "state/manifest.ocdbt", "record.json"])
def test_truncated_index_is_one_value_error(tmp_path, name):
    written(tmp_path, {"w": jnp.ones((4,))})
    path = tmp_path / "3" / name
    path.write_bytes(path.read_bytes()[:-4])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=r"step 3 in .* is damaged"):
        checkpoints.restore({"w": jnp.ones((4,))})


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.zeros((4, 3)), "b": jnp.zeros((3,))}, r"w is float32\[4, 2\], expected float32\[4, 3\]"),
        ({"w": jnp.zeros((4, 2), jnp.bfloat16), "b": jnp.zeros((3,))}, r"w is float32\[4, 2\], expected bfloat16"),
        (
            {"w": jnp.zeros((4, 2)), "c": {"d": jnp.zeros(())}},
            r"c\.d is not in the checkpoint; b is in the checkpoint only",
        ),
        ({"w": jnp.zeros((4, 2))}, "b is in the checkpoint only"),
        ({"w": jnp.zeros((4, 2)), "b": jax.random.key(0)}, r"b is float32\[3\], expected uint32\[2\]"),
    ],
    ids=["shape", "dtype", "other leaf", "missing leaf", "key"],
)
def test_checkpoint_of_another_model_names_the_leaf(tmp_path, like, message):
    written(tmp_path, {"w": jnp.ones((4, 2)), "b": jnp.ones((3,))})
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=message) as error:
        checkpoints.restore(like)
    assert str(tmp_path) in str(error.value) and "step 3" in str(error.value)


def test_missing_checkpoint_names_the_steps_there_are(tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(ValueError, match="holds no checkpoint"):
            checkpoints.restore({"w": jnp.zeros((2,))})
        checkpoints.save(3, {"w": jnp.zeros((2,))}, {})
        with pytest.raises(ValueError, match=r"no checkpoint of step 2, only of steps \[3\]"):
            checkpoints.restore({"w": jnp.zeros((2,))}, step=2)


def test_extra_is_json_and_state_is_arrays(tmp_path):
    extra = {"data": {"epoch": 2, "order": [3, 1]}, "kl_coef": 0.1 + 0.2, "note": "ü", "none": None, "big": 2**60}
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"params\.step is a int"):
            checkpoints.save(1, {"params": {"step": 3}}, {})
        with pytest.raises(ValueError, match="JSON"):
            checkpoints.save(1, {"w": jnp.ones(())}, {"kl": float("nan")})
        checkpoints.save(1, {"w": jnp.ones(())}, extra)
        assert checkpoints.restore({"w": jnp.ones(())})[1] == extra


def test_keeping_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1 checkpoint, got 0"):
        Checkpoints(tmp_path, keep=0)


HOST = {
    "whole": np.arange(3),
    "signed": np.array([-1, 2**62]),
    "unsigned": np.array([2**64 - 1, 3], np.uint64),
    "real": np.array([1 / 3, np.nan]),
    "complex": np.array([1 / 3 + 2j, -0.0]),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "scalar": np.array(2**40),
}
DEVICE = ("int2", "int4", "float4_e2m1fn", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "bool", "complex64")


def test_every_dtype_that_is_saved_comes_back(tmp_path):
    state = {
        "host": jax.tree.map(np.copy, HOST),
        "device": {name: jnp.array([0, 1, 1, 0, 1]).astype(name) for name in DEVICE},
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for x in jax.tree.leaves(state["host"]):
            x[...] = 0  # what was saved is safe
        restored, _ = checkpoints.restore(state)
        again, _ = checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))
    for found in (restored, again):
        for name, x in HOST.items():
            y = found["host"][name]
            assert type(y) is np.ndarray and y.dtype == x.dtype and y.tobytes() == x.tobytes(), name
        for name, x in state["device"].items():
            y = found["device"][name]
            assert isinstance(y, jax.Array) and y.dtype == x.dtype, name
            np.testing.assert_array_equal(y.astype(jnp.complex64), x.astype(jnp.complex64), err_msg=name)


@pytest.mark.parametrize("name", DEVICE)
def test_a_digest_sees_one_changed_entry_of_every_dtype(name):
    one = jnp.array([1, 0, 1]).astype(name)
    assert digest({"x": one}) != digest({"x": jnp.array([1, 1, 1]).astype(name)})


REFUSED = {
    "uint4": jnp.ones(3, jnp.uint4),
    "float8_e4m3": jnp.ones(3, jnp.float8_e4m3),
    "<U1": np.array(["a"]),
    "object": np.array([None]),
    r"datetime64\[D\]": np.array(["2026-01-01"], "datetime64[D]"),
    ">i4": np.arange(3, dtype=">i4"),
}


def test_what_no_file_can_hold_is_refused_when_it_is_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for name, x in REFUSED.items():
            with pytest.raises(UserError, match=rf"cannot hold params\.w, whose dtype is {name}"):
                checkpoints.save(1, {"params": {"w": x}}, {})
        with pytest.raises(UserError, match=r"cannot hold w, which is empty: its shape is \(0, 3\)"):
            checkpoints.save(1, {"w": jnp.zeros((0, 3))}, {})
        with pytest.raises(UserError, match="the state has none"):
            checkpoints.save(1, {"w": None}, {})
        assert checkpoints.latest() is None
