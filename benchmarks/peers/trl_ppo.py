"""One PPO iteration after another with TRL's PPOTrainer (`trl.experimental.ppo`; TRL 1.12 is the last that has it).

    PYTHON -m benchmarks.peers.trl_ppo      # started by `benchmarks.worker`

PYTHON is one with trl, torch, transformers, datasets and accelerate. The policy, its reference and the value model, which
TRL keeps as a separate network of the policy's size, are the folder's weights. TRL needs a reward model, a module with a
backbone and a head: here the backbone is no network but returns whether an id is odd, and the head is the identity, so that
the reward costs what our trivial host reward does. In TRL's favour: no gradient checkpointing (its default), one
forward pass over the whole batch (its default splits it in parts of 64), no samples printed, no checkpoints.
No end of sequence: TRL's stop token is left unset, so every completion has the full length.
Set-up: "folder", "dtype", "threads", "device", "prompts" as ids, "new_tokens", "epochs", "learning_rate", "kl_coef", "seed".
"""

from __future__ import annotations

import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.peers.protocol import Parent
from benchmarks.peers.trl_trainer import Metronome, id_tokenizer, settle

STEPS = 100_000  # more than are ever requested: the parent ends this process


class OddIds(torch.nn.Module):
    """A reward model without a network: a token's score is 1 where its id is odd."""

    base_model_prefix = "backbone"

    def __init__(self) -> None:
        """Build the two parts that TRL looks for."""
        super().__init__()
        self.backbone = OddBackbone()
        self.score = torch.nn.Identity()


class OddBackbone(torch.nn.Module):
    """The module that TRL takes for a transformer."""

    def forward(self, input_ids: Any, **_: Any) -> Any:
        """Give "hidden states" [B, T, 1]."""
        return SimpleNamespace(hidden_states=[(input_ids % 2).float()[..., None]])


def train(parent: Parent, output: str) -> None:
    """Build the trainer and train until the parent ends this process."""
    setup = parent.setup
    rows = len(setup["prompts"])
    settings = PPOConfig(
        output_dir=output, use_cpu=setup["device"] == "cpu", bf16=setup["dtype"] == "bfloat16", gradient_checkpointing=False,
        per_device_train_batch_size=rows, gradient_accumulation_steps=1, num_mini_batches=1, num_ppo_epochs=setup["epochs"],
        local_rollout_forward_batch_size=rows, num_sample_generations=0, response_length=setup["new_tokens"],
        total_episodes=rows * STEPS, temperature=1.0, kl_coef=setup["kl_coef"], learning_rate=setup["learning_rate"],
        save_strategy="no", report_to="none", disable_tqdm=True, seed=setup["seed"],
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(setup["folder"], dtype=torch.float32)
    prompts = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in setup["prompts"]]
    PPOTrainer(
        args=settings,
        processing_class=id_tokenizer(policy.config.vocab_size),
        model=policy,
        ref_model=None,  # a copy of the policy
        reward_model=OddIds(),
        value_model=AutoModelForSequenceClassification.from_pretrained(
            setup["folder"], dtype=torch.float32, num_labels=1
        ),
        train_dataset=Dataset.from_list(prompts * 100),
        eval_dataset=Dataset.from_list(prompts),
        callbacks=[Metronome(parent)],
    ).train()


if __name__ == "__main__":
    mother = Parent()
    settle(mother)
    with tempfile.TemporaryDirectory() as folder:
        train(mother, folder)
