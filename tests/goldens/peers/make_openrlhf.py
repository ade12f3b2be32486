"""Make openrlhf.json: what OpenRLHF computes, from its wheel's own files, without the clusters that it runs on.

    python3.11 -m venv peers && peers/bin/pip install torch==2.13.0 transformers
    peers/bin/pip install --no-deps openrlhf==0.11.2
    peers/bin/python tests/goldens/peers/make_openrlhf.py

Its packages' __init__ files import DeepSpeed, Ray and FlashAttention; no function called here uses them, so empty modules
stand in for them, and for the launcher of its workers.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import shared

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its entropy is compiled; a compiler isn't needed here

import torch
from torch_inputs import POSITIONS, X, controlled, value_and_gradient

ROOT = Path(importlib.util.find_spec("openrlhf").submodule_search_locations[0])


def stand_in(name: str, folder: Path | None = None) -> None:
    """Put an empty module, or a package whose __init__ is not run, where an import finds it."""
    module = mock.MagicMock() if folder is None else ModuleType(name)
    module.__path__ = [] if folder is None else [str(folder)]
    module.__spec__ = importlib.util.spec_from_loader(name, None)
    sys.modules[name] = module


for missing in ("deepspeed", "ray", "openrlhf.trainer.ray.launcher"):
    stand_in(missing)
for package in ("", ".models", ".trainer", ".trainer.ppo_utils", ".trainer.ray", ".utils"):
    stand_in(f"openrlhf{package}", ROOT.joinpath(*package.split(".")))

from openrlhf.models.loss import GPTLMLoss, PairWiseLoss, PolicyLoss, SFTLoss, ValueLoss  # noqa: E402
from openrlhf.models.utils import (  # noqa: E402
    compute_approx_kl,
    compute_entropy,
    compute_reward,
    log_probs_from_logits,
    masked_mean,
    masked_normalize,
)
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker as Maker  # noqa: E402
from openrlhf.trainer.ppo_utils.kl_controller import AdaptiveKLController  # noqa: E402

FAR = torch.tensor([12.0, -12.0, 3.0], dtype=torch.float64)  # log-ratios, two beyond OpenRLHF's bound of 10


def policy_loss(mask: torch.Tensor = X.mask, **settings):
    """Run the policy loss and its gradient to the log-probabilities."""
    loss = PolicyLoss(shared.CLIP, shared.CLIP_HIGH, **settings)
    return value_and_gradient(lambda x: loss(x, X.old_logprobs, X.advantages, mask)[0], X.logprobs)


def value_loss(clip: float | None):
    """Run the value loss and its gradient to the values."""
    return value_and_gradient(lambda x: ValueLoss(clip)(x, X.old_values, X.returns, X.mask), X.values)


def approx_kl(kind: str, **settings):
    """Estimate the KL, and differentiate its sum over tokens."""
    estimate = lambda x: compute_approx_kl(x, X.ref_logprobs, kl_estimator=kind, **settings)
    return estimate(X.logprobs), value_and_gradient(lambda x: estimate(x).sum(), X.logprobs)[1]


def language_model_loss():
    """Run the loss of supervised fine-tuning on logits, with its gradient to them."""
    prompt = torch.zeros_like(X.tokens[:, : shared.PROMPT], dtype=torch.bool)
    labels = torch.where(torch.cat([prompt, X.mask], 1), X.tokens, -100)
    return value_and_gradient(lambda logits: GPTLMLoss()(logits, labels), X.logits)


def preference(margin: torch.Tensor | None):
    """Run the reward model's loss and its gradient to both scores, [chosen, rejected]."""
    return value_and_gradient(lambda x: PairWiseLoss()(x[0], x[1], margin), torch.stack([X.chosen, X.rejected]))


def maker(estimator: str) -> SimpleNamespace:
    """Stand in for the maker of experience, with settings that leave the estimator alone."""
    args = SimpleNamespace(
        algo=SimpleNamespace(
            advantage=SimpleNamespace(estimator=estimator, gamma=shared.DISCOUNT, lambd=1.0, no_std_norm=False)
        ),
        rollout=SimpleNamespace(n_samples_per_prompt=shared.GROUP, max_new_tokens=shared.COMPLETION),
        reward=SimpleNamespace(clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None),
    )
    self = SimpleNamespace(
        strategy=SimpleNamespace(args=args),
        advantage_estimator=estimator,
        kl_ctl=SimpleNamespace(value=shared.KL_COEF),
    )
    self.get_advantages_and_returns = lambda *given: Maker.get_advantages_and_returns(self, *given)
    self.get_cumulative_returns = lambda *given: Maker.get_cumulative_returns(self, *given)
    return self


def advantages(estimator: str) -> torch.Tensor:
    """Go from scores and KL to advantages, over two batches of experience, as its trainer does."""
    halves = []
    for rows in (slice(0, 2), slice(2, shared.ROWS)):
        halves.append(
            SimpleNamespace(
                rewards=X.scores[rows],
                index=list(range(shared.ROWS))[rows],
                kl=(X.logprobs - X.ref_logprobs)[rows],
                values=X.values[rows],
                action_mask=X.mask[rows],
                info={},
            )
        )
    made = Maker.compute_advantages_and_returns(maker(estimator), halves)
    return torch.cat([experience.advantages for experience in made])


def tokens() -> dict[str, dict]:
    """Give the entries of what a token has: log-probability, entropy, KL; and the reductions."""
    entry, logits = shared.entry, X.logits[:, POSITIONS]
    ids = X.tokens[:, shared.PROMPT :]
    logprobs = log_probs_from_logits(logits.clone(), ids, temperature=shared.TEMPERATURE)
    unbiased = approx_kl("k3", unbiased_gradient=True)
    zeros = torch.zeros_like(FAR)
    return {
        "token_logprobs": entry("openrlhf.models.utils.log_probs_from_logits", logprobs),
        "token_entropy": entry("openrlhf.models.utils.compute_entropy", compute_entropy(logits)),
        "masked_mean": entry("openrlhf.models.utils.masked_mean", masked_mean(X.rewards, X.mask)),
        "masked_whiten_rows": entry("openrlhf.models.utils.masked_normalize", masked_normalize(X.rewards, X.mask)),
        "kl_k1": entry("compute_approx_kl, k1", *approx_kl("k1")),
        "kl_k2": entry("compute_approx_kl, k2", *approx_kl("k2")),
        "kl_k3": entry("compute_approx_kl, k3", *approx_kl("k3")),
        "kl_k3_unbiased_gradient": entry("compute_approx_kl, k3, unbiased_gradient=True", *unbiased),
        "kl_k1_far": entry("compute_approx_kl, k1", compute_approx_kl(FAR, zeros)),
        "kl_k3_far": entry("compute_approx_kl, k3", compute_approx_kl(FAR, zeros, kl_estimator="k3")),
    }


def losses() -> dict[str, dict]:
    """Give the entries of the losses."""
    entry, by_sequence = shared.entry, "PolicyLoss, token_level_loss=False"
    _, clip_fraction, ppo_kl, *_ = PolicyLoss(shared.CLIP, shared.CLIP_HIGH)(
        X.logprobs, X.old_logprobs, X.advantages, X.mask
    )
    sft = value_and_gradient(lambda x: SFTLoss()(x, X.mask), X.logprobs)
    empty_row = policy_loss(X.mask_empty_row, token_level_loss=False)
    return {
        "clipped_token_mean": entry("PolicyLoss", *policy_loss()),
        "clipped_dual": entry("PolicyLoss, dual_clip", *policy_loss(dual_clip=shared.DUAL_CLIP)),
        "clipped_sequence_mean": entry(by_sequence, *policy_loss(token_level_loss=False)),
        "clipped_sequence_mean_empty_row": entry(by_sequence, *empty_row),
        "clip_fraction": entry("PolicyLoss: clip_ratio", clip_fraction),
        "ppo_kl": entry("PolicyLoss: ppo_kl", ppo_kl),
        "value_loss": entry("ValueLoss", *value_loss(None)),
        "value_loss_clipped": entry("ValueLoss, clip_eps", *value_loss(shared.VALUE_CLIP)),
        "cross_entropy_logprobs": entry("SFTLoss", *sft),
        "cross_entropy_logits": entry("GPTLMLoss", *language_model_loss()),
        "preference": entry("PairWiseLoss", *preference(None)),
        "preference_margin": entry("PairWiseLoss, margin", *preference(X.margin)),
    }


def experience() -> dict[str, dict]:
    """Give the entries of rewards, returns, advantages and the weight of the KL."""
    entry, gamma = shared.entry, shared.DISCOUNT
    k1 = compute_approx_kl(X.logprobs, X.ref_logprobs).double()
    gae = Maker.get_advantages_and_returns(None, X.values, X.rewards, X.mask, gamma, 1.0)
    returns, whole = "RemoteExperienceMaker.get_cumulative_returns", "RemoteExperienceMaker"
    maker_of = {name: f"{whole}.compute_advantages_and_returns, {name}" for name in ("rloo", "dr_grpo", "group_norm")}
    return {
        "kl_shaped_rewards": entry("compute_reward", compute_reward(X.scores, shared.KL_COEF, k1, X.mask)),
        "returns": entry(returns, Maker.get_cumulative_returns(None, X.rewards, X.mask, gamma)),
        "returns_holes": entry(returns, Maker.get_cumulative_returns(None, X.rewards, X.mask_holes, gamma)),
        "gae_advantages": entry(f"{whole}.get_advantages_and_returns, lambd=1: advantages", gae[0]),
        "gae_returns": entry(f"{whole}.get_advantages_and_returns, lambd=1: returns", gae[1]),
        **{f"experience_{name}": entry(function, advantages(name)) for name, function in maker_of.items()},
        "experience_gae": entry(f"{whole}.compute_advantages_and_returns, gae, lambd=1", advantages("gae")),
        "adaptive_kl_coef": entry("AdaptiveKLController.update", controlled(AdaptiveKLController)),
    }


if __name__ == "__main__":
    shared.write("openrlhf", version("openrlhf"), "make_openrlhf.py", {**tokens(), **losses(), **experience()})
