"""Tensors to leaves and back: bit-equal, and an error that names what is missing, extra or misshapen."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pgjax.models.io.load import load
from pgjax.models.io.save import named_tensors
from tests.compare import assert_same_bits

GOLDENS = Path(__file__).parent / "goldens"
MODELS = ("llama", "llama3_rope", "qwen2", "qwen3", "gpt2")


def copy_with(tmp_path, model, change):
    """Copy a golden model and let `change` edit its tensors in place."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDENS / model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, shape, dtype=np.float32):
    return lambda tensors: tensors.update({name: np.ones(shape, dtype)})


@pytest.mark.parametrize("model", MODELS)
def test_tensors_survive_the_way_in_and_out_bit_by_bit(model):
    lm, params, _ = load(GOLDENS / model)
    back, file = named_tensors(lm.arch, params), load_file(GOLDENS / model / "model.safetensors")
    assert back.keys() == file.keys()
    for name in file:
        value = back[name].fetch()
        assert value.flags.c_contiguous and value.nbytes == back[name].size  # safetensors writes the buffer as it lies
        assert np.array_equal(value, file[name]), name


@pytest.mark.parametrize("model", MODELS)
def test_loaded_tree_is_the_tree_of_init(model):
    lm, params, _ = load(GOLDENS / model)
    expected = jax.eval_shape(lm.init, jax.random.key(0))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), expected)


def test_gpt2_thirds_are_query_key_value_in_that_order():
    tensors = load_file(GOLDENS / "gpt2" / "model.safetensors")
    _, params, _ = load(GOLDENS / "gpt2")
    fused = tensors["transformer.h.1.attn.c_attn.weight"]  # [32, 96]
    for name, columns in (("q", slice(0, 32)), ("k", slice(32, 64)), ("v", slice(64, 96))):
        np.testing.assert_array_equal(params["layers"][name]["kernel"][1], fused[:, columns])
        np.testing.assert_array_equal(
            params["layers"][name]["bias"][1], tensors["transformer.h.1.attn.c_attn.bias"][columns]
        )


@pytest.mark.parametrize(("model", "prefix"), [("gpt2", "transformer."), ("llama", "model.")])
def test_base_model_checkpoint_without_prefix_is_the_same_model(tmp_path, model, prefix):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    assert_same_bits(load(copy_with(tmp_path, model, strip))[1], load(GOLDENS / model)[1])


@pytest.mark.parametrize(
    ("model", "name"),
    [("gpt2", "transformer.h.0.attn.bias"), ("gpt2", "transformer.h.1.attn.masked_bias"),
     ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq")],
)  # fmt: skip
def test_known_buffers_are_left_aside(tmp_path, model, name):
    folder = copy_with(tmp_path, model, put(name, (3, 3)))
    assert_same_bits(load(folder)[1], load(GOLDENS / model)[1])


@pytest.mark.parametrize(
    ("model", "embeddings"), [("gpt2", "transformer.wte.weight"), ("llama", "model.embed_tokens.weight")]
)
def test_a_tied_head_is_left_aside_only_where_it_is_the_embeddings(tmp_path, model, embeddings):
    # With a tied head beside it that differs, transformers computes by the head: other logits than by the embeddings.
    same = copy_with(tmp_path / "same", model, lambda t: t.update({"lm_head.weight": t[embeddings].copy()}))
    assert_same_bits(load(same)[1], load(GOLDENS / model)[1])
    other = copy_with(tmp_path / "other", model, lambda t: t.update({"lm_head.weight": t[embeddings] + 1}))
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true, but lm_head.weight is not .*set it to false"):
        load(other)


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("llama", drop("model.layers.1.mlp.up_proj.weight"), "missing tensors: model.layers.1.mlp.up_proj.weight"),
        ("qwen3", drop("lm_head.weight"), "missing tensors: lm_head.weight"),
        ("gpt2", drop("transformer.h.0.attn.c_attn.bias"), "missing tensors: transformer.h.0.attn.c_attn.bias"),
        ("llama", put("score.weight", (3,)), "unexpected tensors: score.weight"),
        ("qwen2", put("model.layers.2.self_attn.q_proj.bias", (32,)), "unexpected tensors: model.layers.2.self_attn"),
        ("qwen3", put("lm_head.weight", (65, 32)), r"\[65, 32\], expected \[64, 32\]"),
        ("llama", put("model.norm.weight", (32,), np.int8), "model.norm.weight is of type int8"),
    ],
)
def test_a_checkpoint_that_is_not_the_configured_model_is_an_error_that_names_it(tmp_path, model, change, message):
    with pytest.raises(ValueError, match=message):
        load(copy_with(tmp_path, model, change))


def shard(folder):
    """Split model.safetensors of `folder` into two shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    owner = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(owner.values()):
        save_file({name: tensors[name] for name in tensors if owner[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owner}))
    return owner


def test_shards_are_one_model(tmp_path):
    folder = copy_with(tmp_path, "qwen2", lambda tensors: None)
    shard(folder)
    assert_same_bits(load(folder)[1], load(GOLDENS / "qwen2")[1])


def test_a_missing_shard_or_tensor_of_a_shard_is_named(tmp_path):
    folder = copy_with(tmp_path, "qwen2", lambda tensors: None)
    owner = shard(folder)
    index = {"weight_map": {**owner, "model.extra": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"that are not in their shards: model\.extra"):
        load(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"do not exist: model-00002-of-00002\.safetensors"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        load(folder)


def test_pickled_truncated_and_absent_weights_are_refused(tmp_path):
    folder = copy_with(tmp_path, "llama", lambda tensors: None)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        load(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="convert them to safetensors"):
        load(folder)


def test_parameters_take_the_asked_dtype_by_rounding_to_nearest():
    _, whole, _ = load(GOLDENS / "llama")
    _, half, _ = load(GOLDENS / "llama", param_dtype=jnp.bfloat16)
    assert_same_bits(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole))


def test_a_parameter_that_the_family_lacks_is_named():
    lm, params, _ = load(GOLDENS / "gpt2")
    with pytest.raises(ValueError, match="layers/gate/kernel"):
        named_tensors(lm.arch, {**params, "layers": {**params["layers"], "gate": {"kernel": jnp.ones((2, 4, 4))}}})
