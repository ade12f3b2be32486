"""Train with TRL's RLOO for `benchmarks.frontier`, which starts this as a program of its own; it needs no jax.

    PYTHON -m benchmarks.frontier_trl --model FOLDER --prompts prompts.jsonl --output FOLDER --kl-coef 0.05 ...

PYTHON is one with trl, torch, transformers, datasets and vaderSentiment. Prints one line of JSON in the end.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def arguments() -> argparse.Namespace:
    """Read the command line; `benchmarks.frontier.peer_command` writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in (
        ("model", Path), ("prompts", Path), ("reward", str), ("output", Path), ("learning-rate", float), ("kl-coef", float),
        ("steps", int), ("batch-size", int), ("group-size", int), ("max-new-tokens", int), ("seed", int),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, required=True)
    return parser.parse_args()


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train a copy of the model, save it, and say how long the training took, loading left out."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import RLOOConfig, RLOOTrainer

    module, _, name = args.reward.partition(":")
    rows = [json.loads(line) for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    settings = RLOOConfig(
        output_dir=str(args.output / "trainer"), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=args.batch_size, num_generations=args.group_size, max_steps=args.steps,
        learning_rate=args.learning_rate, beta=args.kl_coef, max_completion_length=args.max_new_tokens, temperature=1.0,
        disable_dropout=True, save_strategy="no", report_to="none", logging_steps=args.steps, seed=args.seed,
        disable_tqdm=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    trainer = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model), processing_class=tokenizer, args=settings,
        reward_funcs=vars(importlib.import_module(module))[name],
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
    )  # fmt: skip
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    trainer.model.save_pretrained(args.output / "policy")
    tokenizer.save_pretrained(args.output / "policy")
    return {"seconds": seconds, "versions": {name: version(name) for name in ("trl", "torch", "transformers")}}


if __name__ == "__main__":
    print(json.dumps(train(arguments())))
