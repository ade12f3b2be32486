"""Make trl.json: what TRL's newest release computes. Its trainers' methods run on stand-ins for the trainer.

python3.11 -m venv peers && peers/bin/pip install torch==2.13.0 trl==1.16.0
peers/bin/python tests/goldens/peers/make_trl.py
"""

from __future__ import annotations

from collections import defaultdict, deque
from importlib.metadata import version
from types import SimpleNamespace
from unittest import mock

import shared
import torch
from torch_inputs import POSITIONS, X, value_and_gradient
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

ACCELERATOR = SimpleNamespace(
    device="cpu",
    num_processes=1,
    process_index=0,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


def metrics():
    """Give what a trainer collects its metrics in."""
    return defaultdict(lambda: defaultdict(list))


def trainer(logprobs: torch.Tensor, **fields) -> SimpleNamespace:
    """Stand in for a GRPO or RLOO trainer whose model gives these log-probabilities."""
    usual = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "model": SimpleNamespace(training=True),
        "accelerator": ACCELERATOR,
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": shared.CLIP,
        "epsilon_high": shared.CLIP_HIGH,
        "use_vllm": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": shared.COMPLETION,
        "_entropy_bonus_enabled": False,
        "_metrics": metrics(),
    }
    return SimpleNamespace(**{**usual, **fields})


def batch(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Give what the loss methods read of a batch."""
    return {
        "prompt_ids": X.tokens[:, : shared.PROMPT],
        "prompt_mask": torch.ones_like(X.tokens[:, : shared.PROMPT]),
        "completion_ids": X.tokens[:, shared.PROMPT :],
        "completion_mask": mask.long(),
        "advantages": X.advantages,
        "old_per_token_logps": X.old_logprobs,
        "ref_per_token_logps": X.ref_logprobs,
        "num_items_in_batch": mask.sum(),
    }


def grpo_loss(loss_type: str, mask: torch.Tensor = X.mask, **fields):
    """Run GRPO's loss and its gradient to the log-probabilities."""
    return value_and_gradient(
        lambda x: GRPOTrainer._compute_loss(trainer(x, loss_type=loss_type, **fields), None, batch(mask)), X.logprobs
    )


def grpo_clip_fraction() -> float:
    """Read the share of clipped tokens off the metrics."""
    self = trainer(X.logprobs, loss_type="bnpo")
    GRPOTrainer._compute_loss(self, None, batch(X.mask))
    return self._metrics["train"]["clip_ratio/region_mean"][0]


def rloo_loss():
    """Run RLOO's loss, one ratio a sequence, and its gradient to the log-probabilities."""
    sums = (X.old_logprobs * X.mask).sum(1)
    given = {**batch(X.mask), "old_logps": sums, "advantages": X.scores}
    return value_and_gradient(lambda x: RLOOTrainer._compute_loss(trainer(x), None, given), X.logprobs)


def generated(kind: type) -> tuple:
    """Give what generation would: the prompts' and the completions' ids, and texts that nobody reads."""
    rows, cut = range(shared.ROWS), shared.PROMPT
    prompts = [X.tokens[i, :cut].tolist() for i in rows]
    completions = [X.tokens[i, cut : cut + shared.LENGTHS[i]].tolist() for i in rows]
    texts = ["text"] * shared.ROWS
    if kind is RLOOTrainer:
        return prompts, completions, texts
    return prompts, completions, None, texts, None, {}, None, None


def scoring_trainer(kind: type, **fields) -> mock.MagicMock:
    """Stand in for a trainer that generates and scores: generation, model and rewards are given."""
    policy, reference = mock.Mock(training=True, is_gradient_checkpointing=False), mock.Mock()
    logprobs = {policy: X.logprobs, reference: X.ref_logprobs}
    absent = ("pad_to_multiple_of", "reward_clip_range", "environment_factories", "tools", "environments")
    off = ("mask_truncated_completions", "normalize_advantages", "use_vllm", "log_multimodal")
    self = mock.MagicMock(
        **dict.fromkeys(absent, None),
        **dict.fromkeys(off, False),
        accelerator=ACCELERATOR,
        model=policy,
        ref_model=reference,
        reward_weights=torch.ones(1),
        reward_func_names=["reward"],
        num_generations=shared.GROUP,
        multi_objective_aggregation="sum_then_normalize",
        num_iterations=1,
        _metrics=metrics(),
        _logs=defaultdict(lambda: deque(maxlen=9), rewards=defaultdict(deque), extra=defaultdict(deque)),
        _pending_extra_logs={},
        _pending_metrics={},
        **fields,
    )
    self.args = SimpleNamespace(
        per_device_train_batch_size=shared.ROWS,
        gradient_checkpointing_kwargs=None,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
    )
    self._tokenizer.pad_token_id = 0
    self._generate = lambda *_: generated(kind)
    self._calculate_rewards = lambda *_: X.scores[:, None].clone()
    self._get_per_token_logps_and_entropies = lambda model, *_, **__: (logprobs[model], None, None)
    return self


def advantages(kind: type, *, beta: float = 0.0, **fields) -> torch.Tensor:
    """Run the whole of generate-and-score."""
    given = [{"prompt": "text"} for _ in range(shared.ROWS)]
    return kind._generate_and_score_completions(scoring_trainer(kind, beta=beta, **fields), given)["advantages"]


def reward_loss(margin: bool, center: float | None):
    """Run the reward trainer's loss and its gradient to both scores, [chosen, rejected]."""
    self = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        args=SimpleNamespace(center_rewards_coefficient=center),
        _metrics=metrics(),
        _total_train_tokens=0,
    )
    extra = {"margin": X.margin} if margin else {}

    def loss(both: torch.Tensor) -> torch.Tensor:
        model = lambda **_: SimpleNamespace(logits=both.reshape(-1, 1))
        return RewardTrainer.compute_loss(self, model, dict(extra))

    return value_and_gradient(loss, torch.stack([X.chosen, X.rejected]))


def token_logprobs():
    """Read log-probabilities at a temperature, with the gradient of their advantage-weighted sum to the logits."""
    read = lambda logits: selective_log_softmax(logits, X.tokens[:, shared.PROMPT :], shared.TEMPERATURE)
    _, gradient = value_and_gradient(lambda z: (X.advantages * read(z)).sum(), X.logits[:, POSITIONS])
    return read(X.logits[:, POSITIONS]), gradient


def main() -> None:
    """Write every entry."""
    loss, entry = "GRPOTrainer._compute_loss", shared.entry
    empty = X.mask_empty_row
    dual = SimpleNamespace(delta=shared.DUAL_CLIP, use_bias_correction_kl=False)
    group, score = "GRPOTrainer._generate_and_score_completions", "RLOOTrainer._generate_and_score_completions"
    reward = "RewardTrainer.compute_loss"
    entries = {
        "token_logprobs": entry("trl.trainer.utils.selective_log_softmax", *token_logprobs()),
        "token_entropy": entry("trl.trainer.utils.entropy_from_logits", entropy_from_logits(X.logits[:, POSITIONS])),
        "clipped_bnpo": entry(f"{loss}, loss_type=bnpo", *grpo_loss("bnpo")),
        "clipped_dapo": entry(f"{loss}, loss_type=dapo", *grpo_loss("dapo")),
        "clipped_grpo": entry(f"{loss}, loss_type=grpo", *grpo_loss("grpo")),
        "clipped_grpo_empty_row": entry(f"{loss}, loss_type=grpo", *grpo_loss("grpo", empty)),
        "clipped_dr_grpo": entry(f"{loss}, loss_type=dr_grpo", *grpo_loss("dr_grpo")),
        "clipped_luspo": entry(f"{loss}, loss_type=luspo", *grpo_loss("luspo")),
        "clipped_delta": entry(f"{loss}, loss_type=bnpo, delta", *grpo_loss("bnpo", args=dual)),
        "clipped_with_k3": entry(f"{loss}, loss_type=bnpo, beta", *grpo_loss("bnpo", beta=shared.KL_COEF)),
        "clip_fraction": entry(f"{loss}, clip_ratio/region_mean", grpo_clip_fraction()),
        "sequence_ratio": entry("RLOOTrainer._compute_loss", *rloo_loss()),
        "group_normalized": entry(f"{group}, scale_rewards=group", advantages(GRPOTrainer, scale_rewards="group")),
        "group_centred": entry(f"{group}, scale_rewards=none", advantages(GRPOTrainer, scale_rewards="none")),
        "leave_one_out": entry(score, advantages(RLOOTrainer)),
        "leave_one_out_with_kl": entry(f"{score}, beta", advantages(RLOOTrainer, beta=shared.KL_COEF)),
        "preference": entry(reward, *reward_loss(False, None)),
        "preference_margin": entry(f"{reward}, margin", *reward_loss(True, None)),
        "preference_centred": entry(f"{reward}, center_rewards_coefficient", *reward_loss(False, shared.CENTER)),
    }
    shared.write("trl", version("trl"), "make_trl.py", entries)


if __name__ == "__main__":
    main()
