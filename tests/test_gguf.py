"""GGUF files made here with the package gguf: weights, permuted rows, tokenizers, and errors that name the cause."""

import json
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from pgjax.models.io.gguf import unpermute
from pgjax.models.io.gguf_tokenizer import gguf_tokenizer
from pgjax.models.io.load import load
from pgjax.models.io.stops import stop_ids
from tests.compare import assert_same_bits

GOLDENS = Path(__file__).parent / "goldens"
NAMES = {  # llama.cpp's names, written out again so that a slip in the table of the module shows
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
OF_QWEN = NAMES | {
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}
FIELDS = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
}
Q = gguf.GGMLQuantizationType


def interleave(rows, heads):
    """Permute query and key rows as llama.cpp's converter does."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def add_field(writer, name, value):
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(name, value)


def write(file, fields=FIELDS, extra=None, kind=Q.F32):
    """Write the golden llama as a GGUF, its matrices stored as `kind`."""
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in fields.items():
        if name != "general.architecture":
            add_field(writer, name, value)
    tensors = load_file(GOLDENS / "llama" / "model.safetensors")
    out = {
        "token_embd.weight": tensors["model.embed_tokens.weight"],
        "output_norm.weight": tensors["model.norm.weight"],
    }
    for layer in range(2):
        for theirs, name in NAMES.items():
            value = tensors[f"model.layers.{layer}.{theirs}"]
            heads = {"attn_q.weight": 4, "attn_k.weight": 2}.get(name)
            out[f"blk.{layer}.{name}"] = value if heads is None else interleave(value, heads)
    for name, value in {**out, **(extra or {})}.items():
        # Rows of the MLP's width do not divide into quantisation blocks of 32: those stay whole.
        stored = kind if value.ndim == 2 and value.shape[1] % 32 == 0 else Q.F32
        writer.add_tensor(name, gguf.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_unpermute_undoes_the_converter():
    rows = np.arange(24 * 3).reshape(24, 3)
    np.testing.assert_array_equal(unpermute(interleave(rows, 2), 2), rows)
    np.testing.assert_array_equal(unpermute(interleave(rows[:, 0], 3), 3), rows[:, 0])


def test_gguf_holds_the_same_model_as_the_folder(tmp_path):
    lm, params, tokenizer = load(write(tmp_path / "model.gguf"))
    expected_lm, expected, _ = load(GOLDENS / "llama")
    assert lm.arch == expected_lm.arch
    assert tokenizer is None
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, expected))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_gguf_of_qwen_is_the_same_model_as_the_folder(tmp_path, family):
    folder = GOLDENS / family
    tensors, layer = load_file(folder / "model.safetensors"), "model.layers."
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    outer["lm_head.weight"] = "output.weight"
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", family)
    config = json.loads((folder / "config.json").read_text())
    values = {**{name.replace("llama.", f"{family}."): value for name, value in FIELDS.items()},
              f"{family}.attention.key_length": config.get("head_dim", 8), f"{family}.rope.freq_base": 10000.0}  # fmt: skip
    for name, value in values.items():
        if name != "general.architecture":
            add_field(writer, name, value)
    for name, value in tensors.items():
        number, _, rest = name.removeprefix(layer).partition(".")
        writer.add_tensor(outer[name] if name in outer else f"blk.{number}.{OF_QWEN[rest]}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (lm, params, _), (expected_lm, expected, _) = load(tmp_path / "model.gguf"), load(folder)
    assert lm.arch == expected_lm.arch
    assert_same_bits(params, expected)


@pytest.mark.parametrize(("kind", "bits"), [(Q.F16, 11), (Q.BF16, 8), (Q.Q8_0, 7), (Q.Q4_1, 3)])
def test_quantised_weights_come_back_within_their_precision(tmp_path, kind, bits):
    _, params, _ = load(write(tmp_path / "model.gguf", kind=kind))
    _, expected, _ = load(GOLDENS / "llama")
    for name in ("q", "k", "up"):
        ours, theirs = np.asarray(params["layers"][name]["kernel"]), np.asarray(expected["layers"][name]["kernel"])
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert 0 < error < 2.0**-bits


def test_untied_head_and_biases_are_seen(tmp_path):
    head, bias = np.ones((64, 32), np.float32), np.arange(32, dtype=np.float32)
    extra = {"output.weight": head}
    for layer in range(2):
        extra |= {f"blk.{layer}.attn_{x}.bias": interleave(bias[:n], h) for x, n, h in (("q", 32, 4), ("k", 16, 2))}
        extra |= {f"blk.{layer}.attn_v.bias": bias[:16]}
    lm, params, _ = load(write(tmp_path / "model.gguf", extra=extra))
    assert not lm.arch.tied and lm.arch.qkv_bias and not lm.arch.out_bias
    np.testing.assert_array_equal(params["head"]["kernel"], head)
    np.testing.assert_array_equal(params["layers"]["q"]["bias"][1], bias)
    np.testing.assert_array_equal(params["layers"]["k"]["bias"][0], bias[:16])


@pytest.mark.parametrize(
    ("fields", "extra", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, {}, "llama.rope.scaling.type = 'yarn'"),
        ({"llama.expert_count": 8}, {}, "llama.expert_count = 8"),
        ({"llama.attention.sliding_window": 8}, {}, "llama.attention.sliding_window"),
        ({"llama.rope.dimension_count": 4}, {}, "llama.rope.dimension_count = 4"),
        ({"llama.attention.head_count": [4, 4]}, {}, "llama.attention.head_count"),
        ({}, {"rope_freqs.weight": np.ones(3, np.float32)}, "rope_freqs.weight has 3 numbers.*4 pairs"),
        ({}, {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}, "unexpected tensors: blk.0.attn_sinks.weight"),
        ({"llama.block_count": 3}, {}, "missing tensors: model.layers.2"),
        ({"tokenizer.ggml.model": "t5"}, {}, "model.gguf: tokenizer.ggml.model 't5'"),
        ({"tokenizer.ggml.model": "gpt2"}, {}, "model.gguf lacks the metadata tokenizer.ggml.tokens, .*merges"),
        ({"tokenizer.ggml.model": "llama"}, {}, "model.gguf lacks the metadata tokenizer.ggml.tokens, .*scores"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, fields, extra, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "model.gguf", {**FIELDS, **fields}, extra))


def test_missing_metadata_other_architectures_and_damaged_files_are_named(tmp_path):
    fields = {name: value for name, value in FIELDS.items() if name != "llama.block_count"}
    with pytest.raises(ValueError, match=r"lacks the metadata llama\.block_count"):
        load(write(tmp_path / "a.gguf", fields))
    whole = write(tmp_path / "b.gguf").read_bytes()
    other = tmp_path / "c.gguf"
    other.write_bytes(whole.replace(b"llama", b"bloom", 2))
    with pytest.raises(ValueError, match="'bloom' is not supported in GGUF; supported: llama"):
        load(other)
    for size in (3, 100, 2000, len(whole) - 5000):
        other.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"c\.gguf is not a whole GGUF file"):
            load(other)


def byte_level_fields(pre, **more):
    """Describe a tokenizer of the 256 bytes, merges for " ab" and "12", two control tokens and a plain added one."""
    from tokenizers import pre_tokenizers

    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "\u0120ab", "12", "<think>"]
    kinds = [3, 3, *[1] * 256, 1, 1, 1, 4]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": ["a b", "\u0120 ab", "1 2"]}
    fields |= {"bos_token_id": 0, "eos_token_id": 1, **more}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "ab ab 12", ["ab", "\u0120ab", "\u0120", "12"]),
        ("smollm", "ab ab 12", ["ab", "\u0120ab", "\u0120", "1", "2"]),
        ("llama-bpe", "ab ab12 1212", ["<s>", "ab", "\u0120ab", "12", "\u0120", "12", "1", "2"]),
        ("smollm", "a</s>b<think>", ["a", "</s>", "b", "<think>"]),
        ("qwen2", "ab ab12 12", ["ab", "\u0120ab", "1", "2", "\u0120", "1", "2"]),
    ],
)
def test_text_is_cut_as_the_file_says(pre, text, pieces):
    tokenizer = gguf_tokenizer(byte_level_fields(pre), max_length=64, origin="x.gguf")
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids).removeprefix("<s>") == text


def test_a_way_to_cut_text_that_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"x\.gguf: tokenizer\.ggml\.pre 'tekken' is not supported.*smollm"):
        gguf_tokenizer(byte_level_fields("tekken"), max_length=64, origin="x.gguf")
    with pytest.raises(ValueError, match=r"x\.gguf lacks the metadata tokenizer\.ggml\.bos_token_id"):
        fields = byte_level_fields("llama-bpe")
        del fields["tokenizer.ggml.bos_token_id"]
        gguf_tokenizer(fields, max_length=64, origin="x.gguf")


@pytest.mark.parametrize("pre", [None, "", "default"])
def test_a_file_that_does_not_say_how_text_is_cut_is_cut_as_its_model_is(pre):
    fields = byte_level_fields(pre, add_bos_token=False)
    pieces = lambda **more: gguf_tokenizer({**fields, **more}, max_length=64, origin="x.gguf").tokenize(
        "ab 12 1212 12ab"
    )
    assert pieces() == ["ab", "\u0120", "12", "\u0120", "12", "1", "2", "\u0120", "12", "ab"]
    of_qwen = pieces(**{"general.architecture": "qwen3"})
    assert of_qwen == ["ab", *["\u0120", "1", "2"], *["\u0120", "1", "2", "1", "2"], *["\u0120", "1", "2"], "ab"]


def test_bos_is_put_in_front_only_where_the_file_says_so():
    def first(pre, **more):
        return gguf_tokenizer(byte_level_fields(pre, **more), max_length=64, origin="x.gguf")("ab")["input_ids"][0] == 0

    assert first("smollm", add_bos_token=True) and first("llama-bpe")
    assert not first("smollm") and not first("llama-bpe", add_bos_token=False)


def test_end_of_turn_is_a_stop_id_beside_the_end_of_sequence():
    tokenizer = gguf_tokenizer(byte_level_fields("smollm", eot_token_id=0), max_length=64, origin="x.gguf")
    assert stop_ids(tokenizer) == (1, 0)
    assert stop_ids(gguf_tokenizer(byte_level_fields("smollm", eot_token_id=1), max_length=64, origin="x.gguf")) == (1,)
    assert tokenizer.pad_token is None and tokenizer.model_max_length == 64
