"""The same model, weights and losses in plain torch and transformers: sampling, scoring, PPO's loss and gradient.

    PYTHON -m benchmarks.peers.torch_model      # started by `benchmarks.worker`

PYTHON is one with torch and transformers. Set-up: "task" (rollout, scoring, learner), "folder", "dtype", "autocast",
"threads", "device", and the task's arrays as nested lists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import transformers

from benchmarks.peers.protocol import Parent


def load(setup: dict[str, Any]) -> Any:
    """Load the model; "threads" None is torch's own choice."""
    if setup["threads"] is not None:
        torch.set_num_threads(setup["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(setup["folder"], dtype=getattr(torch, setup["dtype"]))
    return model.to(setup["device"])


def wait(setup: dict[str, Any]) -> None:
    """Wait until the device is done."""
    if setup["device"] != "cpu":
        torch.cuda.synchronize()


def precision(setup: dict[str, Any]) -> Any:
    """Cast inside to bfloat16, where the set-up has it."""
    return torch.autocast(setup["device"], torch.bfloat16) if setup["autocast"] else contextlib.nullcontext()


def rollout(setup: dict[str, Any]) -> Callable[..., dict[str, float]]:
    """Return a call that samples so many tokens a prompt with `generate`: temperature 1, no filter, no early end."""
    model = load(setup)
    ids = torch.tensor(setup["prompts"], dtype=torch.long, device=setup["device"])

    def run(new_tokens: int) -> dict[str, float]:
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                eos_token_id=None,
                pad_token_id=0,
                use_cache=True,
            )
        wait(setup)
        return {"new_tokens": found.shape[1] - ids.shape[1]}

    return run


def window_logits(setup: dict[str, Any], model: Any, tokens: Any, window: int) -> tuple[Any, Any]:
    """Compute the last `window` tokens' hidden states and logits, from the tokens before them; logits in float32."""
    with precision(setup):
        hidden = model.base_model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
        ).last_hidden_state
        hidden = hidden[:, -window - 1 : -1]
        return hidden.float(), model.get_output_embeddings()(hidden).float()


def scoring(setup: dict[str, Any]) -> Callable[..., dict[str, float]]:
    """Return a call that computes log-probabilities and entropy of the window, without a gradient; it gives their means."""
    model = load(setup)
    tokens = torch.tensor(setup["tokens"], dtype=torch.long, device=setup["device"])
    window = setup["window"]

    def run() -> dict[str, float]:
        with torch.inference_mode():
            _, logits = window_logits(setup, model, tokens, window)
            every = torch.log_softmax(logits, -1)
            logprobs = every.gather(-1, tokens[:, -window:, None])[..., 0]
            entropy = -(every.exp() * every).sum(-1)
            return {"logprob": float(logprobs.mean()), "entropy": float(entropy.mean())}

    return run


def learner(setup: dict[str, Any]) -> Callable[..., dict[str, float]]:
    """Return a call that computes PPO's loss and its gradient by every weight and by the value head; it gives the loss.

    min(r A, clip(r, 1 - eps, 1 + eps) A) and 0.5 (V - R)^2, means over the window, log-probabilities over it only.
    """
    model = load(setup)
    tokens = torch.tensor(setup["tokens"], dtype=torch.long, device=setup["device"])
    old, returns, advantages = (
        torch.tensor(setup[name], dtype=torch.float32, device=setup["device"])
        for name in ("old_logprobs", "returns", "advantages")
    )
    window, clip_eps, value_coef = setup["window"], setup["clip_eps"], setup["value_coef"]
    head = torch.nn.Linear(model.config.hidden_size, 1, device=setup["device"])
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)

    def run() -> dict[str, float]:
        model.zero_grad(set_to_none=True)
        head.zero_grad(set_to_none=True)
        hidden, logits = window_logits(setup, model, tokens, window)
        values = head(hidden)[..., 0]
        logprobs = torch.log_softmax(logits, -1).gather(-1, tokens[:, -window:, None])[..., 0]
        ratio = torch.exp(logprobs - old)
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)
        loss = -surrogate.mean() + value_coef * (0.5 * (values - returns) ** 2).mean()
        loss.backward()
        wait(setup)
        return {"loss": float(loss.detach())}

    return run


TASKS: dict[str, Callable[[dict[str, Any]], Callable[..., dict[str, float]]]] = {
    "rollout": rollout,
    "scoring": scoring,
    "learner": learner,
}


if __name__ == "__main__":
    parent = Parent()
    work = TASKS[parent.setup["task"]](parent.setup)
    parent.ready("torch", "transformers")
    parent.serve(work)
