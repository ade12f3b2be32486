"""One RLOO iteration after another with TRL's RLOOTrainer.

    PYTHON -m benchmarks.peers.trl_rloo      # started by `benchmarks.worker`

PYTHON is one with trl, torch, transformers, datasets and accelerate. "group_size" completions of each prompt; the reward is
a host function that counts odd ids, as ours is. In TRL's favour: no gradient checkpointing (its default). The end of
sequence is kept away by generate's `min_new_tokens`, so every completion has the full length.
Set-up: as `trl_ppo`, with "group_size"; "prompts" hold each prompt once.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import RLOOConfig, RLOOTrainer

from benchmarks.peers.protocol import Parent
from benchmarks.peers.trl_trainer import Metronome, id_tokenizer, settle, text

STEPS = 100_000  # more than are ever requested: the parent ends this process


def odd_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Give the share of odd ids."""
    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]


def train(parent: Parent, output: str) -> None:
    """Build the trainer and train until the parent ends this process."""
    setup = parent.setup
    settings = RLOOConfig(
        output_dir=output, use_cpu=setup["device"] == "cpu", bf16=setup["dtype"] == "bfloat16", gradient_checkpointing=False,
        per_device_train_batch_size=len(setup["prompts"]) * setup["group_size"], num_generations=setup["group_size"],
        num_iterations=setup["epochs"], max_steps=STEPS, max_completion_length=setup["new_tokens"], temperature=1.0,
        beta=setup["kl_coef"], learning_rate=setup["learning_rate"], disable_dropout=True,
        generation_kwargs={"min_new_tokens": setup["new_tokens"]}, save_strategy="no", report_to="none",
        logging_steps=STEPS, disable_tqdm=True, seed=setup["seed"],
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(setup["folder"], dtype=torch.float32)
    prompts = [{"prompt": text(ids)} for ids in setup["prompts"]]
    RLOOTrainer(
        model=policy,
        args=settings,
        processing_class=id_tokenizer(policy.config.vocab_size),
        reward_funcs=odd_ids,
        train_dataset=Dataset.from_list(prompts * 100),
        callbacks=[Metronome(parent)],
    ).train()


if __name__ == "__main__":
    mother = Parent()
    settle(mother)
    with tempfile.TemporaryDirectory() as folder:
        train(mother, folder)
