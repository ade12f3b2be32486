"""GGUF files of Gemma, Mistral and Llama 3.1, and of SentencePiece's tokenizers: the same as their folders."""

import dataclasses
import json
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

import pgjax as pg
from pgjax.models.io.config import architecture_of
from pgjax.models.io.gguf_tokenizer import gguf_tokenizer
from tests.compare import assert_close
from tests.family_checks import HELD, MASK, TOKENS, applied
from tests.family_models import drawn, write_model
from tests.test_gguf import OF_QWEN, add_field, interleave

GOLDENS = Path(__file__).parent / "goldens"
PIECES = json.loads((GOLDENS / "gguf_sentencepiece.json").read_text())["models"]
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
OF_GEMMA2 = OF_QWEN | {  # which has norms behind attention and MLP too
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
PUBLISHED = {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}


def divisors(scaling, theta, head_dim):
    """Compute rope_freqs.weight as llama.cpp's converter does."""
    found, length = [], scaling["original_max_position_embeddings"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    for turns in 1 / theta ** (np.arange(0, head_dim, 2) / head_dim):
        wave = 2 * np.pi / turns
        smooth = (length / wave - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        found.append(1.0 if wave < length / high else factor if wave > length / low else between)
    return np.array(found, np.float32)


def write(file, config, keys, names=OF_QWEN, extra=None, added=0.0, permuted=False, shapes=None):
    """Write a model with the weights of `write_model` as a GGUF; return the same model, loaded from a folder."""
    lm, params, _ = pg.load(write_model(file.parent / "folder", config, shapes))
    name, kv = keys.pop("name"), lm.arch.kv_heads
    writer = gguf.GGUFWriter(file, name)
    keys = {
        "block_count": lm.arch.depth, "context_length": lm.arch.max_positions, "embedding_length": lm.arch.width,
        "feed_forward_length": lm.arch.mlp_width, "attention.head_count": lm.arch.heads, "attention.head_count_kv": kv,
        "attention.key_length": lm.arch.head_dim, "attention.value_length": lm.arch.head_dim,
        "attention.layer_norm_rms_epsilon": lm.arch.norm_eps, "rope.freq_base": lm.arch.rope.theta, **keys,
    }  # fmt: skip
    for key, value in keys.items():
        add_field(writer, f"{name}.{key}", value)
    out = dict(extra or {})
    for old, shape in shapes.items():
        number, _, rest = old.removeprefix("model.layers.").partition(".")
        new = OUTER[old] if old in OUTER else f"blk.{number}.{names[rest]}"
        out[new] = drawn(old, tuple(shape)) + np.float32(added * new.endswith("norm.weight"))
        if permuted and ("attn_q" in new or "attn_k" in new):
            out[new] = interleave(out[new], lm.arch.heads if "attn_q" in new else kv)
    for new, value in out.items():
        writer.add_tensor(new, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return lm, params


def of_case(case, **changes):
    return {"config": {**HELD[case]["config"], **changes}, "shapes": HELD[case]["tensors"]}


GEMMA2 = {
    "name": "gemma2",
    "attention.sliding_window": 4,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
LOCAL = {"rope_type": "default", "rope_theta": 10.0}
GEMMA3 = {
    "name": "gemma3", "attention.sliding_window": 4, "attention.sliding_window_pattern": 2, "rope.freq_base_swa": 10.0,
    "rope.freq_base": 1000.0, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0,
}  # fmt: skip
FULL = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}
BY_TYPE = {"full_attention": FULL, "sliding_attention": LOCAL}
CASES = {
    "gemma": (of_case("gemma"), {"name": "gemma"}, {"added": 1.0}),
    "gemma2": (of_case("gemma2", query_pre_attn_scalar=6), GEMMA2, {"names": OF_GEMMA2, "added": 1.0}),
    "gemma3": (
        of_case(
            "gemma3", query_pre_attn_scalar=6, layer_types=["sliding_attention", "full_attention"] * 2, rope_parameters=BY_TYPE
        ),
        GEMMA3,
        {"names": OF_GEMMA2, "added": 1.0},
    ),
    "mistral": (of_case("mistral_whole"), {"name": "llama"}, {"permuted": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_is_the_model_of_the_folder(tmp_path, case):
    model, keys, options = CASES[case]
    lm, params = write(tmp_path / "model.gguf", keys=dict(keys), **model, **options)
    found, found_params, _ = pg.load(tmp_path / "model.gguf")
    assert dataclasses.replace(found.arch, family=lm.arch.family) == lm.arch
    assert_close(found_params, params, 1e-6)  # a norm's scale is stored as 1 more


@pytest.mark.parametrize(("scaling", "named"), [(LLAMA3, False), (PUBLISHED, True)])
def test_what_llama3_divides_its_angles_by_is_read(tmp_path, scaling, named):
    model = of_case("llama_linear", rope_scaling={"rope_type": "llama3", **scaling}, rope_theta=500000.0)
    extra = {"rope_freqs.weight": divisors(scaling, 500000.0, 4 if "head_dim" not in model["config"] else 0)}
    lm, params = write(tmp_path / "model.gguf", keys={"name": "llama"}, extra=extra, permuted=True, **model)
    found, found_params, _ = pg.load(tmp_path / "model.gguf")
    assert (found.arch == lm.arch) is named
    assert_close(applied(found, found_params, TOKENS, MASK), applied(lm, params, TOKENS, MASK), of_max=1e-5)
    pg.save_pretrained(tmp_path / "out", found, found_params, None)
    assert pg.load(tmp_path / "out")[0].arch == found.arch
    plain = dataclasses.replace(found.arch, rope=dataclasses.replace(lm.arch.rope, factor=None))
    assert plain != architecture_of(model["config"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention.sliding_window": None}, "it lacks the metadata gemma3.attention.sliding_window"),
        ({"attention.key_length": None, "rope.dimension_count": 5}, "gemma3.rope.dimension_count = 5"),
        ({"rope.scaling.type": "yarn"}, "gemma3.rope.scaling.type = 'yarn'"),
        ({"block_count": None}, "it lacks the metadata gemma3.block_count"),
        ({"attention.head_count_kv": [2, 2]}, "gemma3.attention.head_count_kv"),
    ],
)  # fmt: skip
def test_a_key_that_is_missing_or_strange_is_named_with_its_file(keys, message):
    from pgjax.models.io.gguf_config import gguf_architecture

    whole = {"block_count": 2, "context_length": 64, "embedding_length": 16, "feed_forward_length": 24,
             "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": 6,
             **{k: v for k, v in GEMMA3.items() if k != "name"}, **keys}  # fmt: skip
    fields = {f"gemma3.{key}": value for key, value in whole.items() if value is not None}
    with pytest.raises(pg.UserError, match=f"x.gguf: {message}"):
        gguf_architecture(
            {"general.architecture": "gemma3", **fields}, {"token_embd.weight": (64, 16)}, origin="x.gguf"
        )


@pytest.mark.parametrize("name", PIECES)
def test_ids_are_those_of_sentencepiece(name):
    held = PIECES[name]
    fields = {"model": "llama", "add_space_prefix": name == "space in front", "bos_token_id": 1, "eos_token_id": 2,
              "unknown_token_id": 0, **{key: held[key] for key in ("tokens", "scores", "token_type")}}  # fmt: skip
    tokenizer = gguf_tokenizer({f"tokenizer.ggml.{k}": v for k, v in fields.items()}, max_length=64, origin="x.gguf")
    for text, ids in zip(held["texts"], held["ids"], strict=True):
        assert tokenizer(text)["input_ids"] == [1, *ids]
        assert tokenizer.decode(ids) == text
    control = tokenizer("</s><t>", add_special_tokens=False)["input_ids"]
    assert control == [2, held["tokens"].index("<t>")]


def test_metadata_of_a_file_makes_its_tokenizer_save_and_load(tmp_path):
    held = PIECES["none in front"]
    fields = {"model": "llama", "add_space_prefix": False, "bos_token_id": 1, "eos_token_id": 2, "add_eos_token": True,
              **{key: held[key] for key in ("tokens", "scores", "token_type")}}  # fmt: skip
    tokenizer = gguf_tokenizer({f"tokenizer.ggml.{k}": v for k, v in fields.items()}, max_length=64, origin="x.gguf")
    assert tokenizer("the sea")["input_ids"][:1] + tokenizer("the sea")["input_ids"][-1:] == [1, 2]
    tokenizer.save_pretrained(tmp_path)
    from pgjax.models.io.tokenizer import folder_tokenizer

    for text in held["texts"]:
        assert folder_tokenizer(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert jax.tree.leaves(tokenizer("")["input_ids"]) == [1, 2]
