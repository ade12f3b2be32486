"""The same model, weights and loss in plain torch and transformers; imported only where both are installed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import pgjax as pg


def torch_model(lm: pg.CausalLM, params: Any, dtype: str, threads: int | None) -> Any:
    """Build the torch model from our arrays, through a folder in Hugging Face layout; `threads` None is torch's choice."""
    if threads is not None:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        pg.save_pretrained(Path(folder) / "model", lm, params, None)
        return transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=getattr(torch, dtype))


def generator(model: Any, prompts: np.ndarray) -> Callable[[int], Any]:
    """Return a call that samples so many tokens a prompt with `generate`: temperature 1, no filter, no early end."""
    ids = torch.tensor(prompts, dtype=torch.long)
    mask = torch.ones_like(ids)

    def generate(new_tokens: int) -> Any:
        with torch.inference_mode():
            return model.generate(
                ids,
                attention_mask=mask,
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

    return generate


def learner(model: Any, batch: Any, *, clip_eps: float, value_coef: float, autocast: bool) -> Callable[[], float]:
    """Return a call that computes PPO's loss and its gradient by every weight and by the value head; it gives the loss.

    min(r A, clip(r, 1 - eps, 1 + eps) A) and 0.5 (V - R)^2, means over the mask, log-probabilities over the window only.
    """
    to = lambda x: torch.tensor(np.array(x))
    tokens, attention_mask = to(batch.tokens).long(), to(batch.attention_mask).long()
    mask, old, returns, advantages = (to(x) for x in (batch.mask, batch.old_logprobs, batch.returns, batch.advantages))
    window = mask.shape[1] - 1  # entry 0 of the window is the prompt's last token: nothing is sampled there
    mask, old, returns, advantages = (x[:, 1:] for x in (mask, old, returns, advantages))
    head = torch.nn.Linear(model.config.hidden_size, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)

    def mean(x: Any) -> Any:
        return torch.where(mask, x, 0.0).sum() / mask.sum()

    def run() -> float:
        model.zero_grad(set_to_none=True)
        head.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            hidden = model.model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).last_hidden_state
            hidden = hidden[:, -window - 1 : -1]
            logits = model.lm_head(hidden).float()
        values = head(hidden.float())[..., 0]
        logprobs = torch.log_softmax(logits, -1).gather(-1, tokens[:, -window:, None])[..., 0]
        ratio = torch.exp(logprobs - old)
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)
        loss = -mean(surrogate) + value_coef * mean(0.5 * (values - returns) ** 2)
        loss.backward()
        return float(loss.detach())

    return run
