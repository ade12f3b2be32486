"""A tiny model of every family on disk, as transformers saves it, with weights that are drawn by the names of its tensors."""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDENS = Path(__file__).parent / "goldens"
LENGTHS = (12, 7, 3)
VOCAB = 64
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
SHORT, LONG = [1.0, 1.25], [1.5, 3.0]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 8}
EXPERTS = {"num_experts_per_tok": 2, "num_hidden_layers": 2}
GEMMA = {"head_dim": 6, "query_pre_attn_scalar": 9, "sliding_window": 4}
# What each has beside or in place of SHAPE, for its odd pieces to show in twelve tokens.
CASES = {
    "mistral": {"model_type": "mistral", "sliding_window": 4, "head_dim": 6},
    "mistral_whole": {"model_type": "mistral", "sliding_window": None, "num_hidden_layers": 2},
    "qwen2_windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3_windows": {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 3, "layer_types": MIXED,
                      "head_dim": 6},
    "gemma": {"model_type": "gemma", "head_dim": 6, "num_hidden_layers": 2},
    "gemma2": {"model_type": "gemma2", **GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3": {"model_type": "gemma3_text", **GEMMA, "layer_types": MIXED,
               "rope_parameters": {
                   "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
                   "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
               }},
    "phi3": {"model_type": "phi3", "sliding_window": 5, "num_key_value_heads": 1},
    "phi3_longrope": {"model_type": "phi3", "hidden_size": 32, "partial_rotary_factor": 0.5, "rope_theta": 100.0,
                      "rope_scaling": LONGROPE, "original_max_position_embeddings": 8, "num_hidden_layers": 2},
    "olmo2": {"model_type": "olmo2", "attention_bias": True},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": False},
    "granite": {"model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3,
                "logits_scaling": 7.0},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5, "head_dim": None, "num_key_value_heads": None},
    "gpt_neox_serial": {"model_type": "gpt_neox", "rotary_pct": 1.0, "use_parallel_residual": False,
                        "attention_bias": False, "num_key_value_heads": None, "num_hidden_layers": 2},
    "mixtral": {"model_type": "mixtral", **EXPERTS, "num_local_experts": 4, "sliding_window": 4},
    "qwen3_moe": {"model_type": "qwen3_moe", **EXPERTS, "num_experts": 6, "head_dim": 6, "moe_intermediate_size": 8},
    "qwen3_moe_normalized": {"model_type": "qwen3_moe", **EXPERTS, "num_experts": 6, "head_dim": 6,
                             "moe_intermediate_size": 8, "norm_topk_prob": True},
    "olmo3": {"model_type": "olmo3", "sliding_window": 4, "layer_types": MIXED,
              "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}},
    "cohere2": {"model_type": "cohere2", "sliding_window": 4, "layer_types": MIXED, "logit_scale": 0.7},
    "glm4": {"model_type": "glm4", "head_dim": 12, "num_hidden_layers": 2},
    "stablelm": {"model_type": "stablelm", "hidden_size": 32, "use_qkv_bias": True, "num_hidden_layers": 2},
    "stablelm_parallel": {"model_type": "stablelm", "hidden_size": 32, "use_parallel_residual": True, "num_hidden_layers": 2,
                          "partial_rotary_factor": 0.5},
    "falcon": {"model_type": "falcon", "num_key_value_heads": None, "intermediate_size": None},
    "falcon_two_norms": {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True,
                         "num_key_value_heads": None, "intermediate_size": None, "num_hidden_layers": 2},
    "falcon_serial": {"model_type": "falcon", "multi_query": False, "parallel_attn": False, "num_hidden_layers": 2,
                      "num_key_value_heads": None, "intermediate_size": None, "ffn_hidden_size": 24},
    "llama_linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}, "num_hidden_layers": 2},
    "llama_dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 4.0}, "num_hidden_layers": 2},
    "qwen2_yarn": {"model_type": "qwen2", "rope_parameters": YARN, "num_hidden_layers": 2},
}  # fmt: skip


def config_for(case: str) -> dict:
    """Give the fields of a case's config.json; None in CASES leaves one out, but for a window."""
    fields = {**SHAPE, **CASES[case]}
    return {k: v for k, v in fields.items() if v is not None or k == "sliding_window"} | IDS


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw a tensor by its name, far from any usual start: the same on every machine."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    is_norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
    return (is_norm + (0.6 if ".gate.weight" in name else 0.3) * noise).astype(np.float32)


def write_model(folder: Path, config: dict, shapes: dict[str, list[int]]) -> Path:
    """Write a folder in Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: drawn(name, tuple(shape)) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


def padded_batch() -> tuple[np.ndarray, np.ndarray]:
    """Draw a left-padded batch: tokens and mask, [rows, longest]."""
    mask = np.arange(max(LENGTHS))[None, :] >= max(LENGTHS) - np.array(LENGTHS)[:, None]
    tokens = np.random.RandomState(0).randint(3, VOCAB, mask.shape)
    return np.where(mask, tokens, 0).astype(np.int32), mask
