"""Make the goldens of low-rank adapters, with torch, transformers and peft: lora.npz.

    python tests/goldens/make_lora.py

For each model the random factors of every adapted map, the logits of a row, and the gradient of the sum of its tokens'
log-probabilities by each factor; in the layout of peft, A [r, in] and B [out, r].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import torch
import transformers

HERE = Path(__file__).parent
MAPS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 3, 6.0


def case(name: str) -> dict[str, np.ndarray]:
    """Adapt a model with random factors, and see what it says of a row."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(HERE / name, attn_implementation="eager").float()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=MAPS)
    adapted = peft.get_peft_model(model, config).eval()
    factors = {path: x for path, x in adapted.named_parameters() if "lora_" in path}
    with torch.no_grad():
        for x in factors.values():
            x.copy_(0.2 * torch.randn_like(x))
    tokens = torch.randint(3, 64, (1, 12))
    logits = adapted(tokens).logits
    loss = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None]).sum()
    loss.backward()
    short = {path: path.removeprefix("base_model.model.").removesuffix(".default.weight") for path in factors}
    return {
        f"{name}/tokens": tokens.numpy(),
        f"{name}/logits": logits.detach().numpy(),
        **{f"{name}/value/{short[path]}": x.detach().numpy() for path, x in factors.items()},
        **{f"{name}/gradient/{short[path]}": x.grad.numpy() for path, x in factors.items() if x.grad is not None},
    }


if __name__ == "__main__":
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    np.savez_compressed(HERE / "lora.npz", versions=np.array(said), **case("llama"), **case("qwen2"))
    print(said)
