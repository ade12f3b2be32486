"""Make the goldens of the families of `tests/family_models.py`, with torch and transformers.

    python tests/goldens/make_families.py

For each case: the config.json and the names and shapes of the tensors that transformers writes, torch's logits of rows alone
with weights drawn by those names, the tokens that `generate` continues the left-padded batch with, and the scores of a
classifier with the same body.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository, for the tests' own cases

from tests.family_models import CASES, config_for, padded_batch, write_model  # noqa: E402

NEW = 8  # tokens


def saved_shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {name: list(x.shape) for name, x in sorted(load_file(f"{folder}/model.safetensors").items())}


def opened(kind: type, config: dict, shapes: dict[str, list[int]]) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), config, shapes)
        model, told = kind.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


def main() -> None:
    tokens, mask = padded_batch()
    held, logits = {}, {}
    for case in CASES:
        config = AutoConfig.for_model(**config_for(case))
        shapes = saved_shapes(AutoModelForCausalLM.from_config(config))
        written = {**config_for(case), "architectures": [type(AutoModelForCausalLM.from_config(config)).__name__]}
        model = opened(AutoModelForCausalLM, written, shapes)
        rows = [torch.tensor(row[real][None], dtype=torch.long) for row, real in zip(tokens, mask, strict=True)]
        with torch.no_grad():
            logits[case] = np.concatenate([model(row).logits[0].numpy() for row in rows])
            out = model.generate(
                torch.tensor(tokens, dtype=torch.long),
                attention_mask=torch.tensor(mask, dtype=torch.long),
                do_sample=False, max_new_tokens=NEW, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        best = torch.stack(out.logits, 1).topk(2, dim=-1).values
        held[case] = {
            "config": written,
            "tensors": shapes,
            "greedy": out.sequences[:, tokens.shape[1] :].tolist(),
            "smallest_gap_of_logits": float((best[..., 0] - best[..., 1]).min()),
        }
        config.num_labels = 1
        try:
            score = AutoModelForSequenceClassification.from_config(config)
        except ValueError:  # the family has no such class
            print(f"{case}: no classifier")
            continue
        classifier = {**written, "architectures": [type(score).__name__], "num_labels": 1}
        shapes = saved_shapes(score)
        model = opened(AutoModelForSequenceClassification, classifier, shapes)
        with torch.no_grad():
            held[case]["scores"] = [model(row).logits.item() for row in rows]
        held[case]["classifier"] = classifier["architectures"][0]
        print(case, held[case]["smallest_gap_of_logits"], len(held[case]["tensors"]))
    np.savez_compressed(HERE / "families.npz", **logits)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    text = json.dumps({"versions": versions, "cases": held}, separators=(",", ":"))
    (HERE / "families.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
