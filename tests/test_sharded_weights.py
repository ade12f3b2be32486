"""Weights in and out of a mesh: each process reads its slices once, tensors leave one at a time, and no bit changes."""

import collections
import json
import math
import os
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import pgjax as pg
from pgjax.models.io import load as loading
from pgjax.models.io.config import architecture_of, config_of
from pgjax.models.io.gguf import read_gguf
from pgjax.models.io.load import laid_out
from pgjax.models.io.save import named_tensors, write_folder
from pgjax.models.io.tensors import read_params, safetensors_of
from pgjax.parallel.sharding import make_mesh, param_shardings
from tests.compiling import xla_flags
from tests.test_gguf import Q, write
from tests.tiny import equal

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests" / "goldens"
MESHES = {
    "data": {"data": 4},
    "fsdp": {"fsdp": 4},
    "tensor": {"tensor": 4},
    "data_fsdp": {"data": 2, "fsdp": 2},
    "fsdp_tensor": {"fsdp": 2, "tensor": 2},
}
MODELS = ("llama", "qwen2", "qwen3", "gpt2", "reward_llama", "reward_gpt2")  # qwen3 keeps its unembedding apart
SMALL = {"model_type": "qwen2", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8,
         "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
         "max_position_embeddings": 64, "hidden_act": "silu", "tie_word_embeddings": True}  # fmt: skip


def both_ways(model):
    """The functions that load and save a golden model."""
    if model.startswith("reward"):
        return pg.load_reward_model, pg.save_reward_model
    return pg.load, pg.save_pretrained


def numbers(box):
    return math.prod(last - first for first, last in box)


def counting(tensors, boxes):
    """Note what is read of each tensor; the one number that shows its type aside."""

    def read(name, box):
        if numbers(box) > 1:
            boxes[name].append(box)
        return tensors.read(name, box)

    return tensors._replace(read=read)


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_no_bit_changes_on_the_way_in_and_out_of_a_mesh(model, axes, tmp_path):
    load, save = both_ways(model)
    mesh = make_mesh(**MESHES[axes])
    bundle, params, _ = load(GOLDENS / model, mesh=mesh)
    assert equal(params, load(GOLDENS / model)[1])
    assert all(
        jax.tree.leaves(
            jax.tree.map(lambda leaf, layout: leaf.sharding == layout, params, param_shardings(mesh, params))
        )
    )
    save(tmp_path / "out", bundle, params, None)
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(GOLDENS / model / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("model", ["qwen3", "gpt2"])
def test_each_number_is_read_once_however_many_devices_hold_it(model, axes):
    lm, plain, _ = pg.load(GOLDENS / model)
    boxes = collections.defaultdict(list)
    shapes = laid_out(make_mesh(**MESHES[axes]), jax.eval_shape(lm.init, jax.random.key(0)))
    params = read_params(lm.arch, shapes, counting(safetensors_of(GOLDENS / model), boxes))
    assert equal(params, plain)
    assert sum(numbers(box) for read in boxes.values() for box in read) == sum(
        leaf.size for leaf in jax.tree.leaves(plain)
    )


def test_a_slice_is_read_without_the_rest_of_its_tensor():
    lm, _, _ = pg.load(GOLDENS / "gpt2")
    boxes = collections.defaultdict(list)
    shapes = laid_out(make_mesh(fsdp=2, tensor=2), jax.eval_shape(lm.init, jax.random.key(0)))
    read_params(lm.arch, shapes, counting(safetensors_of(GOLDENS / "gpt2"), boxes))
    fused = boxes["transformer.h.1.attn.c_attn.weight"]  # [32, 96]: queries, keys, values, each by four devices
    assert sorted(fused) == sorted(
        ((row, row + 16), (part + column, part + column + 16))
        for part in (0, 32, 64)
        for row in (0, 16)
        for column in (0, 16)
    )


def test_layers_that_no_device_wants_are_not_read():
    lm, plain, _ = pg.load(GOLDENS / "llama")
    mesh = make_mesh(data=2, fsdp=2)
    boxes = collections.defaultdict(list)

    def by_layer(path, leaf):
        split = PartitionSpec("fsdp") if path[0].key == "layers" else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, split))

    shapes = jax.tree_util.tree_map_with_path(by_layer, jax.eval_shape(lm.init, jax.random.key(0)))
    assert equal(read_params(lm.arch, shapes, counting(safetensors_of(GOLDENS / "llama"), boxes)), plain)
    assert {len(read) for read in boxes.values()} == {1}


@pytest.mark.parametrize("kind", [Q.F32, Q.Q4_1])
def test_a_gguf_file_is_the_same_model_on_every_mesh(kind, tmp_path):
    file = write(tmp_path / "model.gguf", kind=kind)
    plain = pg.load(file)[1]
    for axes in MESHES.values():
        assert equal(pg.load(file, mesh=make_mesh(**axes))[1], plain)


@pytest.mark.parametrize(("kind", "block"), [(Q.F32, 1), (Q.F16, 1), (Q.BF16, 1), (Q.Q8_0, 32), (Q.Q4_1, 32)])
def test_a_rectangle_of_a_gguf_tensor_is_dequantised_to_whole_blocks_only(kind, block, tmp_path, monkeypatch):
    head = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    _, tensors, _ = read_gguf(write(tmp_path / "model.gguf", extra={"output.weight": head}, kind=kind))
    whole = {name: tensors.read(name, tuple((0, size) for size in shape)) for name, shape in tensors.shapes.items()}
    count, dequantize = [], gguf.dequantize

    def counted(data, kind):
        value = dequantize(data, kind)
        count.append(value.size)
        return value

    monkeypatch.setattr(gguf, "dequantize", counted)
    for name in ("lm_head.weight", "model.layers.1.self_attn.q_proj.weight"):  # queries are permuted in the file
        for (top, bottom), (left, right) in [((5, 9), (3, 31)), ((0, 1), (0, 32)), ((17, 18), (12, 13))]:
            count.clear()
            part = tensors.read(name, ((top, bottom), (left, right)))
            np.testing.assert_array_equal(part, whole[name][top:bottom, left:right])
            assert count == [(bottom - top) * (right - left if block == 1 else 32)]
    count.clear()
    np.testing.assert_array_equal(
        tensors.read("lm_head.weight", ((2, 6), (40, 70))), whole["lm_head.weight"][2:6, 40:70]
    )
    assert count == [4 * (30 if block == 1 else 64)]


def test_a_mesh_that_does_not_divide_is_refused_before_the_weights_are_read(monkeypatch):
    boxes = collections.defaultdict(list)
    monkeypatch.setattr(loading, "safetensors_of", lambda folder: counting(safetensors_of(folder), boxes))
    mesh = jax.make_mesh((3,), ("fsdp",), devices=jax.devices()[:3], axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match=r"an axis of 32, which fsdp=3 of the mesh does not divide"):
        pg.load(GOLDENS / "llama", mesh=mesh)
    with pytest.raises(ValueError, match=r"an axis of 16, which fsdp=3 of the mesh does not divide"):
        pg.load_reward_model(GOLDENS / "reward_llama", mesh=mesh)
    assert not boxes


@pytest.fixture(scope="module")
def deep():
    """A model of eight layers whose stacked leaves are far larger than any of its tensors."""
    lm = pg.causal_lm(architecture_of(SMALL))
    rng, shapes = np.random.default_rng(0), jax.eval_shape(lm.init, jax.random.key(0))
    return lm, jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), shapes)


def test_a_large_model_becomes_several_files_that_open_on_any_mesh(deep, tmp_path):
    lm, params = deep
    most = 400_000
    sizes = {name: tensor.size for name, tensor in named_tensors(lm.arch, params).items()}

    def save(**options):
        write_folder(tmp_path / "out", lm.arch, lm.init, config_of(lm.arch), params, None, **options)
        return sorted(file.name for file in (tmp_path / "out").glob("model*"))

    files = save(max_shard_bytes=most)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = files[:-1]
    assert len(shards) > 4 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(sizes.values()) and sizes.keys() == index["weight_map"].keys()
    for shard in shards:
        held = load_file(tmp_path / "out" / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == held.keys()
        assert sum(value.nbytes for value in held.values()) <= most
    assert equal(pg.load(tmp_path / "out", mesh=make_mesh(fsdp=2, tensor=2))[1], params)
    assert save() == ["model.safetensors"]  # and nothing of the former files is left
    assert len(save(max_shard_bytes=1)) == len(sizes) + 1  # a tensor larger than a file has one to itself


def test_the_host_holds_one_file_of_a_model_that_it_saves(deep, tmp_path):
    lm, params = deep
    layout = param_shardings(make_mesh(fsdp=4), params)
    tensor, whole = 128 * 256 * 4, sum(leaf.nbytes for leaf in jax.tree.leaves(params))  # bytes

    def peak(most):
        spread = jax.device_put(params, layout)  # anew: an array keeps what was once brought to the host
        tracemalloc.start()
        write_folder(tmp_path / "out", lm.arch, lm.init, config_of(lm.arch), spread, None, max_shard_bytes=most)
        left, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return left, most

    peak(1)  # compiles
    assert whole > 40 * tensor
    left, most = peak(1)
    assert most < 5 * tensor  # a stacked leaf has 8 tensors
    assert left < tensor  # the embedding is two
    assert whole < peak(whole)[1] < 1.5 * whole


def test_two_processes_read_a_half_each_and_save_one_model(tmp_path):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(2),
    }
    lm, params, _ = pg.load(GOLDENS / "qwen3")
    for process in range(2):  # the files of the hosts differ in the last row of one layer's matrix
        params["layers"]["up"]["kernel"] = params["layers"]["up"]["kernel"].at[1, :, -1].multiply(1 + process)
        pg.save_pretrained(tmp_path / f"other{process}", lm, params, None)
    pair = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests" / "weights_process.py", str(port), str(process), tmp_path],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=240)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], told
    first, second = (json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2))
    for result in (first, second):
        # A half, the norms whole, and three rows of every tensor, which are compared: the tensors are small.
        assert not result["whole"] and 0.5 <= result["numbers"] / result["of"] < 0.7
        assert (
            result["another model"].startswith("UserError") and "ForSequenceClassification" in result["another model"]
        )
        assert (
            result["other weights"].startswith("UserError: the weights of")
            and "digest of some rows" in result["other weights"]
        )
        assert result["other depth"].startswith("UserError: the configuration of") and "family" in result["other depth"]
    assert first["absent here"].startswith("FailedElsewhere: process 1 failed") and "none" in first["absent here"]
    assert second["absent here"].startswith("UserError")
    assert first["not a folder"].startswith("UserError") and "is a file" in second["not a folder"]
    assert first["cannot write"].startswith(("NotADirectoryError", "UserError"))
    assert second["cannot write"].startswith("FailedElsewhere: process 0 failed")
    theirs = load_file(GOLDENS / "qwen3" / "model.safetensors")
    for name in ("together", "again"):
        ours = load_file(tmp_path / name / "model.safetensors")
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in theirs)


def test_parameters_in_bfloat16_are_rounded_as_without_a_mesh():
    whole = pg.load(GOLDENS / "gpt2", param_dtype=jnp.bfloat16)[1]
    assert equal(pg.load(GOLDENS / "gpt2", param_dtype=jnp.bfloat16, mesh=make_mesh(fsdp=2, tensor=2))[1], whole)
