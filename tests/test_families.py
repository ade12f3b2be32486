"""config.json in and out: defaults, both spellings of rope, and errors instead of guesses."""

import dataclasses
import json
from pathlib import Path

import pytest

from pgjax.models.architecture import Rope
from pgjax.models.io.config import architecture_of, config_of
from pgjax.models.io.families import FAMILIES

GOLDENS = Path(__file__).parent / "goldens"
MODELS = ("llama", "llama3_rope", "qwen2", "qwen3", "gpt2")
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_absent_fields_mean_what_hugging_face_means(family):
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(family).to_dict()
    for name, value in FAMILIES[family].defaults.items():
        if name == "rope_theta":
            ropes = theirs["rope_parameters"]
            rope = ropes.get("full_attention", ropes)
            before = {
                "olmo3": 10_000.0
            }  # of transformers 5.0, whose OLMo 3 had OLMo 2's; the model's files name theirs
            assert rope["rope_theta"] in (value, before.get(family)) and rope["rope_type"] == "default"
        elif name == "sliding_window" and theirs.get("use_sliding_window") is False:
            assert theirs[name] is None  # ours is read where the other is true
        elif value is not None and name in theirs:  # None: derived, below
            assert theirs[name] == value, name


def test_absent_head_counts_are_derived_as_hugging_face_derives_them():
    from transformers import AutoConfig

    theirs, ours = AutoConfig.for_model(**LLAMA), architecture_of(LLAMA)
    assert (ours.kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim) == (4, 8)
    assert architecture_of(GPT2).mlp_width == 128
    assert architecture_of({**LLAMA, "head_dim": 12}).head_dim == 12


@pytest.mark.parametrize("model", MODELS)
def test_config_survives_a_round_trip(model):
    config = json.loads((GOLDENS / model / "config.json").read_text())
    arch = architecture_of(config)
    written = config_of(arch)
    assert architecture_of(json.loads(json.dumps(written))) == arch
    same = set(written) & set(config) - {"attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"}
    assert {name: written[name] for name in same} == {name: config[name] for name in same}


@pytest.mark.parametrize("model", MODELS)
def test_transformers_reads_the_written_config_as_the_original(model):
    from transformers import AutoConfig

    config = json.loads((GOLDENS / model / "config.json").read_text())
    theirs, ours = (
        AutoConfig.for_model(**config).to_dict(),
        AutoConfig.for_model(**config_of(architecture_of(config))).to_dict(),
    )
    free = {
        "attention_dropout",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "dtype",
        "transformers_version",
        "rope_theta",
    }
    free |= {"bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "rope_scaling"}
    free |= {"head_dim"} if model == "qwen2" else set()  # not in their class, but their model reads it
    assert {k: v for k, v in ours.items() if k not in free} == {k: v for k, v in theirs.items() if k not in free}


def test_both_spellings_of_rope_are_the_same_rope():
    new = {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}}
    old = {**LLAMA, "rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA3}}
    both = {**LLAMA, "rope_theta": 500.0, "rope_scaling": {"type": "llama3", "rope_type": "llama3", **LLAMA3}}
    expected = Rope(500.0, 8.0, 1.0, 4.0, 64)
    assert [architecture_of(c).rope for c in (new, old, both)] == [expected] * 3
    assert architecture_of({**LLAMA, "rope_theta": 7.0, "rope_scaling": None}).rope == Rope(7.0)
    assert architecture_of({**LLAMA, "rope_parameters": {"rope_theta": 7.0}}).rope == Rope(7.0)


def test_the_number_of_experts_has_the_names_of_two_versions_of_transformers():
    moe = {**LLAMA, "model_type": "qwen3_moe", "num_key_value_heads": 2, "num_experts_per_tok": 2}
    assert architecture_of({**moe, "num_experts": 6}).experts.number == 6
    assert architecture_of({**moe, "num_local_experts": 6}).experts.number == 6
    assert architecture_of(moe).experts.number == 128


def test_falcon_has_the_key_heads_that_its_layers_have():
    falcon = {**LLAMA, "model_type": "falcon"}
    assert architecture_of({**falcon, "num_kv_heads": 4}).kv_heads == 1  # the field notwithstanding
    assert architecture_of({**falcon, "multi_query": False}).kv_heads == 4
    assert architecture_of({**falcon, "new_decoder_architecture": True, "num_kv_heads": 2}).kv_heads == 2


def test_biases_belong_to_their_families():
    def biases(**changes):
        arch = architecture_of({**LLAMA, "num_key_value_heads": 2, **changes})
        return arch.qkv_bias, arch.out_bias, arch.mlp_bias, arch.qk_norm

    assert biases() == (False, False, False, False)
    assert biases(attention_bias=True, mlp_bias=True) == (True, True, True, False)
    assert biases(model_type="qwen2") == (True, False, False, False)
    assert biases(model_type="qwen3", attention_bias=True) == (True, True, False, True)


@pytest.mark.parametrize(
    ("config", "named", "listed"),
    [
        ({**LLAMA, "model_type": "mamba"}, "mamba", "llama"),
        ({}, "model_type", ""),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "hidden_size", ""),
        ({k: v for k, v in GPT2.items() if k != "n_layer"}, "n_layer", ""),
        ({**LLAMA, "hidden_act": "relu2"}, "relu2", "silu"),
        ({**LLAMA, "rope_scaling": {"type": "ntk", "factor": 2.0}}, "ntk", "llama3"),
        ({**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}}, "linear", "factor"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": -2.0}}, "factor = -2.0", "above 0"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate = 1", "true or false"),
        ({**LLAMA, "rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor", "4 numbers"),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor", ""),
        ({**LLAMA, "rope_parameters": {"rope_theta": 7.0}, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear", ""),
        ({**LLAMA, "rope_parameters": {"rope_theta": 7.0}, "rope_scaling": {"type": "default"}}, "differ", "7.0"),
        ({**LLAMA, "rope_parameters": "linear"}, "rope_parameters = 'linear'", "object"),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": None}}, "factor = None", "above 0"),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": 0}}, "factor = 0", "above 0"),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 0.5}}, "low_freq_factor", "0.5"),
        ({**LLAMA, "is_causal": False}, "is_causal = False", "True"),
        ({**LLAMA, "hidden_act": ["silu"]}, "hidden_act", "silu"),
        ({**LLAMA, "model_type": ["llama"]}, "model_type", "qwen3"),
        ({**LLAMA, "attention_bias": "false"}, "attention_bias = 'false'", "true or false"),
        ({**LLAMA, "tie_word_embeddings": None}, "tie_word_embeddings = None", "true or false"),
        ({**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor", "1.0"),
        ({**LLAMA, "vocab_size": 0}, "vocab_size", "positive"),
        ({**LLAMA, "num_key_value_heads": 3}, "num_key_value_heads = 3", ""),
        ({**LLAMA, "head_dim": 7}, "head_dim = 7", "odd"),
        ({**LLAMA, "rms_norm_eps": -1.0}, "rms_norm_eps = -1.0", "above 0"),
        ({**LLAMA, "rope_theta": 0}, "rope_theta = 0", "above 0"),
        ({**GPT2, "layer_norm_epsilon": "small"}, "layer_norm_epsilon = 'small'", "above 0"),
        ({**GPT2, "n_head": 5}, "5", "32"),
        ({**LLAMA, "use_sliding_window": True}, "use_sliding_window", "False"),
        ({**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0},
         "sliding_window = 0", ""),
        ({**LLAMA, "model_type": "qwen2", "max_window_layers": -1}, "max_window_layers = -1", "0 or more"),
        ({**LLAMA, "model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types", "2 layers"),
        ({**LLAMA, "model_type": "gemma2", "layer_types": ["chunked_attention"] * 2}, "chunked_attention", "sliding_attention"),
        ({**LLAMA, "model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention", "False"),
        ({**LLAMA, "model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1.0}}, "rope_parameters", "full_attention"),
        ({**LLAMA, "model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers = [1]", "2 layers"),
        ({**LLAMA, "model_type": "granite", "attention_multiplier": 0}, "attention_multiplier = 0", "above 0"),
        ({**LLAMA, "model_type": "phi3", "sliding_window": 8, "num_key_value_heads": None,
          "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}, "sliding_window = 8", "longrope"),
        ({**LLAMA, "model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers = [0]", "[]"),
        ({**LLAMA, "model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step = 2", "1"),
        ({**LLAMA, "model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok = 9", "8"),
        ({**LLAMA, "layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention", "full_attention"),
        ({**LLAMA, "model_type": "falcon", "alibi": True}, "alibi = True", "False"),
        ({**LLAMA, "model_type": "falcon", "new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn", "True"),
        ({**LLAMA, "model_type": "falcon", "num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn = 3", "1, 2"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config", "None"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx", "False"),
        ({**GPT2, "add_cross_attention": True}, "add_cross_attention", "False"),
        ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights", "True"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named_never_guessed(config, named, listed):
    with pytest.raises(ValueError) as raised:
        architecture_of(config)
    assert named in str(raised.value) and listed in str(raised.value)


@pytest.mark.parametrize(
    ("base", "changes"),
    [(LLAMA, {"qk_norm": True}), (LLAMA, {"rope": None}), (LLAMA, {"out_bias": True}), (GPT2, {"gated_mlp": True}),
     (GPT2, {"norm": "rms"}), (LLAMA, {"family": "mamba"}), (LLAMA, {"activation": "tanh"})],
)  # fmt: skip
def test_an_architecture_that_the_layout_cannot_express_is_not_written(base, changes):
    arch = dataclasses.replace(architecture_of(base), **changes)
    with pytest.raises(ValueError, match=next(iter(changes))):
        config_of(arch)
