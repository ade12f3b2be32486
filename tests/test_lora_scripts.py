"""The scripts train adapters in place of all parameters: what moves, what is kept, what is saved, and how a run goes on."""

import dataclasses

import jax
import numpy as np
import pytest

import pgjax as pg
from experiments import ppo, reward_model, sft
from pgjax.run import logs
from pgjax.run.checkpoint.checkpoints import BadCheckpoint
from tests.tiny_task import EARLY_LETTERS, save_tiny_model, save_tiny_task, task_config

pytestmark = pytest.mark.usefixtures("no_pictures")

ADAPTERS = {"lora_rank": 2, "lora_alpha": 8.0, "learning_rate": 1e-2, "batch_size": 8, "microbatches": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_task(tmp_path_factory.mktemp("adapters"))


def config_of(script, folder, output, **changes):
    return task_config(script, folder, output, **{**ADAPTERS, **changes})


def only_kernels_moved(before, after):
    """Assert that every kernel of every layer has moved, and nothing else of the model."""
    for path, x in jax.tree_util.tree_flatten_with_path(before)[0]:
        same = np.array_equal(x, jax.tree_util.tree_reduce(lambda tree, key: tree[key.key], path, after))
        assert same != ("layers" in str(path) and "kernel" in str(path)), path


@pytest.mark.campaign
def test_ppo_trains_adapters_beside_one_copy_of_the_model_and_goes_on_to_the_same_bits(folder, tmp_path):
    options = {
        "rewards": (EARLY_LETTERS,), "max_new_tokens": 6, "minibatches": 1, "warmup_updates": 0, "eval_samples": 2,
        "kl_coef": 0.1, "chat": False,
    }  # fmt: skip
    whole = config_of(ppo, folder, tmp_path / "whole", steps=3, **options)
    ppo.main(whole)
    rows = [row for row in logs.read_metrics(whole.output) if "objective/kl" in row]
    assert abs(rows[0]["objective/kl"]) < 1e-5 < abs(rows[2]["objective/kl"])  # the reference is the model before
    before = pg.load(folder / "model")[1]
    after = pg.load(whole.output / "policy")[1]
    only_kernels_moved(before, after)

    parts = config_of(ppo, folder, tmp_path / "parts", steps=1, **options)
    ppo.main(parts)
    ppo.main(dataclasses.replace(parts, steps=3, resume=True))
    jax.tree.map(np.testing.assert_array_equal, pg.load(parts.output / "policy")[1], after)


@pytest.mark.campaign
def test_fine_tuning_trains_adapters_and_goes_on_beside_the_same_model_alone(folder, tmp_path):
    save_tiny_model(tmp_path / "model")
    config = config_of(sft, folder, tmp_path / "run", max_length=16, epochs=4, learning_rate=3e-2)
    config = dataclasses.replace(config, model=str(tmp_path / "model"))
    figures = sft.main(config)
    assert figures["eval/perplexity"] < 0.9 * figures["eval/perplexity_before"]  # the tied embeddings stay
    lm, before, _ = pg.load(tmp_path / "model")
    only_kernels_moved(before, pg.load(config.output / "model")[1])
    pg.save_pretrained(tmp_path / "model", lm, jax.tree.map(lambda x: 2 * x, before), pg.load(tmp_path / "model")[2])
    with pytest.raises(BadCheckpoint, match="model: 'digest"):
        sft.main(dataclasses.replace(config, resume=True))


@pytest.mark.campaign
def test_a_reward_model_learns_by_adapters_and_a_head(folder, tmp_path):
    config = config_of(reward_model, folder, tmp_path / "run", epochs=4.0, warmup_updates=0, learning_rate=3e-2)
    figures = reward_model.main(config)
    assert figures["eval/loss"] < 0.9 * figures["before/loss"]
    before, after = pg.load(folder / "model")[1], pg.load_reward_model(config.output / "model")[1]["lm"]
    only_kernels_moved({"layers": before["layers"], "norm": before["norm"]}, after)


@pytest.mark.parametrize("script", [ppo, sft, reward_model])
def test_what_cannot_be_meant_is_refused_before_any_work(script, folder, tmp_path):
    for changes, message in (({"lora_rank": 0}, "lora_rank must be at least 1"), ({"lora_alpha": -1.0}, "lora_alpha")):
        with pytest.raises(ValueError, match=message):
            script.main(config_of(script, folder, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_adapters_to_a_model_from_scratch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="lora_rank=2 adapts a model that is there"):
        sft.main(sft.Config(lora_rank=2, output=tmp_path / "run"))
