"""Reward models of every family with every parameter random, and a tokenizer that pads with its end of sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import pgjax as pg
from pgjax.models.io.config import architecture_of

END = "<|end|>"
TEXTS = [
    f"a fine film{END}",
    "no",
    f"it was not the worst film of that long year{END}",
    f"{END}",
    f"dull, dull {END}{END}",
]
_ROTARY = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_ROTARY, "tie_word_embeddings": True},
    "qwen2": {**_ROTARY, "tie_word_embeddings": True},
    "qwen3": {**_ROTARY, "head_dim": 6},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "n_positions": 64},
}


def end_padded_tokenizer(*specials: str) -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer whose padding is its end of sequence, with more special tokens if given."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([END, *letters])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, bos_token=END)
    fast.add_special_tokens({"additional_special_tokens": list(specials)})
    return fast


def random_params(rm: pg.RewardModel) -> Any:
    """Noise on every leaf, norms and biases too, so that none can be lost unseen."""
    draw = np.random.default_rng(7)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(0.3 * draw.standard_normal(shape.shape) + (path[-1].key == "scale"), shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(rm.init, jax.random.key(0)))


def saved_case(family: str, folder: Path) -> tuple[pg.RewardModel, Any, PreTrainedTokenizerFast]:
    """Save the family's case; llama's tokenizer has a special token to spare, the others' must be given one."""
    tokenizer = end_padded_tokenizer(*(["<|user|>", "<|reserved_1|>"] if family == "llama" else []))
    config = {"model_type": family, "vocab_size": len(tokenizer), **FAMILIES[family]}
    rm = pg.reward_model(architecture_of(config))
    params = random_params(rm)
    pg.save_reward_model(folder, rm, params, tokenizer)
    return rm, params, tokenizer
