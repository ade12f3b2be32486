"""The training scripts on a tiny model of families of every kind, one behind the other: each opens what the one before saved."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import pgjax as pg
from experiments import ppo, reward_model, sft
from tests.family_checks import opened
from tests.tiny_task import EARLY_LETTERS, save_tiny_task, task_config

KINDS = ("gemma3", "qwen3_moe", "phi3", "gpt_neox", "cohere2", "falcon_two_norms")
SMALL = {"batch_size": 4, "warmup_updates": 0}
SHORT = {"max_length": 32}


@pytest.mark.campaign
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("case", KINDS)
def test_scripts_train_a_family_and_save_it_as_one(case, tmp_path):
    folder = save_tiny_task(tmp_path)
    tokenizer = pg.load(folder / "model")[2]
    arch = dataclasses.replace(opened(case)[0].arch, vocab_size=len(tokenizer))
    lm = pg.causal_lm(arch)
    pg.save_pretrained(folder / "model", lm, lm.init(jax.random.key(0)), tokenizer)
    sft.main(task_config(sft, folder, folder / "sft", epochs=1, **SMALL, **SHORT))
    tuned = str(folder / "sft" / "model")
    judged = dataclasses.replace(
        task_config(reward_model, folder, folder / "reward", epochs=1.0, **SMALL, **SHORT), model=tuned
    )
    reward_model.main(judged)
    assert pg.load_reward_model(folder / "reward" / "model")[0].arch.family == arch.family
    policy = task_config(ppo, folder, folder / "ppo", rewards=(EARLY_LETTERS,), steps=2, max_new_tokens=4,
                         eval_samples=1, minibatches=1, microbatches=1, **SMALL)  # fmt: skip
    ppo.main(dataclasses.replace(policy, model=tuned))
    found, params, _ = pg.load(folder / "ppo" / "policy")
    assert found.arch == arch
    start = pg.load(folder / "sft" / "model")[1]
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True)]
    assert max(moved) > 0 and all(np.isfinite(x) for x in moved)
    assert json.loads((folder / "ppo" / "policy" / "config.json").read_text())["model_type"] == arch.family
