"""Make the goldens of reward models, with torch and transformers.

    python tests/goldens/make_reward_models.py

For every family a small random sequence classifier that torch saved, with torch's scores of rows alone; and torch's scores
of the reward models that pgjax saves (`reward_cases.py`), of texts through the tokenizer saved beside them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository, for pgjax and the tests' own cases

from tests.goldens.reward_cases import FAMILIES, TEXTS, saved_case  # noqa: E402

SHAPE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
MORE = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_labels": 1, "num_key_value_heads": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, **MORE, max_position_embeddings=64),
    "qwen2": Qwen2Config(**SHAPE, **MORE, max_position_embeddings=64),
    "qwen3": Qwen3Config(**SHAPE, **MORE, head_dim=6, max_position_embeddings=64),
    "gpt2": GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_inner=24, n_positions=64, num_labels=1,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
}  # fmt: skip
LENGTHS = (9, 5, 2)


def random_classifier(config: PreTrainedConfig) -> torch.nn.Module:
    """Build a classifier whose every parameter is far from its usual start."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if ("norm" in name or "ln_" in name) and "weight" in name else 0.3 * noise)
    return model


def scores_of_rows(model: torch.nn.Module, rows: list[np.ndarray]) -> np.ndarray:
    """Score each row alone; none ends with the padding id."""
    with torch.no_grad():
        return np.array([model(torch.tensor(row[None], dtype=torch.long)).logits.item() for row in rows])


def main() -> None:
    rows = [np.random.default_rng(length).integers(3, 32, length) for length in LENGTHS]
    rows[1][-1] = 2  # ends with its end of sequence
    out = {f"row{i}": row for i, row in enumerate(rows)}
    for name, config in CONFIGS.items():
        model = random_classifier(config)
        model.save_pretrained(HERE / f"reward_{name}")
        out[f"torch_{name}"] = scores_of_rows(model, rows)
    sharded = random_classifier(CONFIGS["llama"]).to(torch.bfloat16)
    sharded.save_pretrained(HERE / "reward_llama_bf16", max_shard_size="4KB")
    # Read back, because .to(bfloat16) rounded the rotary frequencies too, which no file holds.
    read = AutoModelForSequenceClassification.from_pretrained(HERE / "reward_llama_bf16", dtype=torch.float32)
    out["torch_llama_bf16"] = scores_of_rows(read.eval(), rows)
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            saved_case(name, Path(folder) / "rm")
            model = AutoModelForSequenceClassification.from_pretrained(Path(folder) / "rm").eval()
            batch = AutoTokenizer.from_pretrained(Path(folder) / "rm")(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            out[f"ours_{name}"] = model(**batch).logits[:, 0].numpy()
    np.savez_compressed(HERE / "reward_models.npz", **out)


if __name__ == "__main__":
    main()
