"""Make trl_ppo.json: what TRL's actor-critic PPO of release 0.11 computes, the last whose steps are methods of their own.

python3.11 -m venv peers && peers/bin/pip install torch==2.13.0 trl==1.16.0 tyro
peers/bin/pip install --no-deps --target trl-0.11 trl==0.11.4
PYTHONPATH=trl-0.11 peers/bin/python tests/goldens/peers/make_trl_ppo.py
"""

from __future__ import annotations

from types import SimpleNamespace

import shared
import torch
import trl
from torch_inputs import POSITIONS, X, controlled
from trl.core import entropy_from_logits, logprobs_from_logits, masked_mean, masked_whiten
from trl.trainer.ppo_trainer import PPOTrainer
from trl.trainer.utils import AdaptiveKLController


def trainer(**fields) -> SimpleNamespace:
    """Stand in for a PPO trainer with these settings."""
    usual = {
        "kl_penalty": "kl",
        "whiten_rewards": False,
        "gamma": shared.DISCOUNT,
        "lam": 1.0,
        "cliprange": shared.CLIP,
        "cliprange_value": shared.VALUE_CLIP,
        "vf_coef": 1.0,
        "ratio_threshold": 10.0,
    }
    config = SimpleNamespace(**{**usual, **fields})
    self = SimpleNamespace(config=config, kl_ctl=SimpleNamespace(value=shared.KL_COEF))
    self._kl_penalty = lambda *arrays: PPOTrainer._kl_penalty(self, *arrays)
    return self


def losses(logprobs: torch.Tensor, values: torch.Tensor):
    """Compute the policy's and the value head's loss, and the statistics."""
    logits, mask = X.logits[:, POSITIONS], X.mask.long()
    return PPOTrainer.loss(
        trainer(), X.old_logprobs, X.old_values, logits, values, logprobs, mask, X.advantages, X.returns
    )


def losses_and_gradients():
    """Differentiate both losses, each with respect to its own argument."""
    logprobs, values = X.logprobs.clone().requires_grad_(), X.values.clone().requires_grad_()
    policy, value, stats = losses(logprobs, values)
    policy_gradient, value_gradient = torch.autograd.grad(policy + value, (logprobs, values))
    return (policy.detach(), policy_gradient), (value.detach(), value_gradient), stats


def main() -> None:
    """Write every entry."""
    entry = shared.entry
    policy, value, stats = losses_and_gradients()
    mask = X.mask.long()
    whole = [torch.log_softmax(logits[:, POSITIONS], -1) for logits in (X.logits, X.ref_logits)]
    kl = [PPOTrainer._kl_penalty(trainer(kl_penalty=kind), X.logprobs, X.ref_logprobs) for kind in ("kl", "mse")]
    full = PPOTrainer._kl_penalty(trainer(kl_penalty="full"), *whole)
    rewards = PPOTrainer.compute_rewards(trainer(), X.scores, X.logprobs, X.ref_logprobs, mask)[0]
    _, advantages, returns = PPOTrainer.compute_advantages(trainer(), X.values, X.rewards, mask)
    entries = {
        "token_logprobs": entry(
            "trl.core.logprobs_from_logits",
            logprobs_from_logits(X.logits[:, POSITIONS], X.tokens[:, shared.PROMPT :]),
        ),
        "token_entropy": entry("trl.core.entropy_from_logits", entropy_from_logits(X.logits[:, POSITIONS])),
        "masked_mean": entry("trl.core.masked_mean", masked_mean(X.rewards, mask)),
        "masked_whiten": entry("trl.core.masked_whiten", masked_whiten(X.rewards, mask)),
        "masked_whiten_keep_mean": entry(
            "trl.core.masked_whiten, shift_mean=False", masked_whiten(X.rewards, mask, shift_mean=False)
        ),
        "kl_k1": entry("PPOTrainer._kl_penalty, kl", kl[0]),
        "kl_k2": entry("PPOTrainer._kl_penalty, mse", kl[1]),
        "categorical_kl": entry("PPOTrainer._kl_penalty, full", full),
        "kl_shaped_rewards": entry("PPOTrainer.compute_rewards", rewards),
        "returns": entry("PPOTrainer.compute_advantages, lam=1: returns", returns),
        "whitened_advantages": entry("PPOTrainer.compute_advantages, lam=1: advantages", advantages),
        "policy_loss": entry("PPOTrainer.loss: policy", *policy),
        "value_loss": entry("PPOTrainer.loss: value", *value),
        "approx_kl": entry("PPOTrainer.loss: policy/approxkl", stats["policy/approxkl"]),
        "clip_fraction": entry("PPOTrainer.loss: policy/clipfrac", stats["policy/clipfrac"]),
        "entropy": entry("PPOTrainer.loss: policy/entropy", stats["policy/entropy"]),
        "adaptive_kl_coef": entry("AdaptiveKLController.update", controlled(AdaptiveKLController)),
    }
    shared.write("trl", trl.__version__, "make_trl_ppo.py", entries, name="trl_ppo")


if __name__ == "__main__":
    main()
