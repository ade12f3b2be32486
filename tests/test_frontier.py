"""The frontier benchmark, whole, on a tiny model; and its estimates against what can be computed exactly."""

import dataclasses
import functools
import json
import math
import sys

import jax
import numpy as np
import pytest

import pgjax as pg
from benchmarks import frontier, frontier_report
from pgjax.core.errors import UserError
from pgjax.learning.flags import algorithm_of, iteration_options
from tests.tiny_task import EARLY_LETTERS, early_letters, save_tiny_model

WORDS = ("good", "bad", "fine", "awful", "great", "sad", "nice", "ugly")


@pytest.fixture(scope="module")
def config_in():
    """Make the config of a small benchmark in a folder."""

    def make(folder):
        return frontier.Config(
            model=str(folder / "model"), prompts=str(folder / "prompts.txt"), reward=EARLY_LETTERS,
            held_out_prompts=2, output=folder / "runs",
            episodes=(16,), kl_coefs=(0.05,), seeds=(0,), batch_size=8, max_new_tokens=3, samples=16,
            reference_samples=8, best_of=(1, 4), peer=False, picture=folder / "frontier.png", json=folder / "report.json",
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def small(once, config_in):
    """The model and the prompts alone: nothing has run in `output`."""

    def make(folder):
        save_tiny_model(folder / "model")
        (folder / "prompts.txt").write_text("".join(f"a {word}\n" for word in WORDS), encoding="utf-8")

    return config_in(once("frontier", make))


@pytest.fixture(scope="module")
def finished(once, small, config_in):
    """The config of a benchmark that has run."""

    def make(folder):
        made = config_in(folder)
        frontier.main(dataclasses.replace(made, model=small.model, prompts=small.prompts))

    return dataclasses.replace(config_in(once("frontier_run", make)), model=small.model, prompts=small.prompts)


@pytest.fixture
def report(finished):
    return json.loads(finished.json.read_text())


@pytest.mark.campaign
def test_every_kind_of_run_is_there_and_the_report_is_written(finished, report):
    kinds = [(row["method"], row["episodes"], row["kl_coef"], row["seed"]) for row in report["rows"]]
    assert kinds == [("RLOO", 16, 0.05, 0), ("PPO", 16, 0.05, 0)]
    for row in report["rows"]:
        assert math.isfinite(row["score"]) and row["seconds"] > 0 and row["kl_stderr"] > 0
        assert row["objective"] == pytest.approx(row["score"] - 0.05 * row["kl"])
    assert finished.picture.stat().st_size > 5_000 and report["peer"] is None


def test_other_coefficients_are_run_with_the_fewest_episodes_only():
    config = frontier.Config(methods=("PPO",), episodes=(640, 64), kl_coefs=(0.05, 0.2), seeds=(3,))
    assert [run[1:] for run in frontier.plan(config)] == [(640, 0.05, 3), (64, 0.05, 3), (64, 0.2, 3)]
    assert frontier.peer_plan(config) == [(640, 0), (64, 0)]
    assert frontier.peer_plan(dataclasses.replace(config, peer_episodes=(64,))) == [(64, 0)]


@pytest.mark.campaign
def test_a_finished_run_is_not_trained_again_and_evaluates_to_the_same(finished, report):
    config = dataclasses.replace(finished, methods=("PPO",), json=None, picture=finished.output / "again.png")
    again = frontier.main(config)["rows"]
    first = [row for row in report["rows"] if row["method"] == "PPO"]
    names = ("score", "kl", "objective", "seconds")  # another training would take other seconds
    assert [[row[name] for name in names] for row in again] == [[row[name] for name in names] for row in first]


def test_the_standard_error_is_over_prompts():
    rng = np.random.default_rng(0)
    means, n = rng.normal(size=(400, 16, 1)), 64  # 400 evaluations of 16 prompts, whose completions differ little
    found = [
        frontier_report.figures(frontier_report.Samples(x, np.zeros_like(x)))
        for x in means + 0.1 * rng.normal(size=(400, 16, n))
    ]
    spread = np.std([row["score"] for row in found])  # 1 / sqrt(16), not 1 / sqrt(16 * 64)
    assert np.mean([row["score_stderr"] for row in found]) == pytest.approx(spread, rel=0.15)


@pytest.mark.campaign
def test_the_reference_itself_has_no_kl_and_training_prompts_are_not_evaluated(small):
    lm, params, tokenizer = pg.load(small.model)
    train_rows, held_out = frontier.prompt_sets(small, tokenizer)
    assert len(held_out) == 2 and len(train_rows) == 6
    assert not {row["prompt"] for row in held_out} & {row["prompt"] for row in train_rows}
    task = frontier.make_task(
        lm, tokenizer, [early_letters], None, (train_rows, held_out),
        chat=False, max_new_tokens=3, temperature=1.0,
    )  # fmt: skip
    draw = functools.partial(
        frontier.draw, task, reference=params, prompts=task.prompt_sets[1], samples=5, batch_size=4
    )
    found = draw(params, key=jax.random.key(0))
    assert found.scores.shape == (2, 5) and np.all(found.kl == 0)
    assert np.all(draw(jax.tree.map(lambda x: 2 * x, params), key=jax.random.key(0)).kl != 0)


def test_the_sampled_optimum_is_the_tilted_distribution():
    rng = np.random.default_rng(0)
    outcomes, chances = np.array([-0.5, 0.1, 0.9]), np.array([0.6, 0.3, 0.1])
    scores = rng.choice(outcomes, p=chances, size=(4, 50_000))
    for beta in (0.2, 0.5):
        tilted = chances * np.exp(outcomes / beta)
        tilted /= tilted.sum()
        found = frontier_report.optimum_row(scores, beta)
        assert found["score"] == pytest.approx(tilted @ outcomes, abs=0.01)
        assert found["kl"] == pytest.approx(tilted @ np.log(tilted / chances), abs=0.02)
        assert found["objective"] == pytest.approx(found["score"] - 0.05 * found["kl"])


def test_best_of_one_is_the_mean_and_has_no_kl():
    scores = np.random.default_rng(1).normal(size=(3, 16))
    assert frontier_report.best_of_row(scores, 1) == {"n": 1, "score": pytest.approx(scores.mean()), "kl": 0.0}
    assert frontier_report.best_of_row(scores, 16)["score"] == pytest.approx(scores.max(1).mean())


def test_every_method_has_arguments_for_every_number_of_episodes():
    for method in frontier.RECIPES:
        for episodes in (64, 6_400, 25_600, 10**6):
            config = frontier.experiment.Config(**frontier.recipe(method, episodes), batch_size=64, steps=1)
            frontier.experiment.check(config)
            algorithm = algorithm_of(config)
            assert (algorithm.group_size > 1, algorithm.value_coef > 0) == (method == "RLOO", method == "PPO")
            assert not algorithm.on_policy and iteration_options(config, algorithm)["minibatches"] == 4


def test_other_prompts_in_the_same_folder_are_refused(tmp_path):
    frontier.write_prompts(tmp_path, [{"prompt": "a good"}], [{"prompt": "a bad"}])
    frontier.write_prompts(tmp_path, [{"prompt": "a good"}], [{"prompt": "a bad"}])
    with pytest.raises(UserError, match=r"held_out\.jsonl holds the prompts of another benchmark"):
        frontier.write_prompts(tmp_path, [{"prompt": "a good"}], [{"prompt": "a fine"}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("RLOO", "DPO")}, "methods are RLOO and PPO, got DPO"),
        ({"episodes": (100,)}, "episodes=100 is no positive multiple of batch_size=8"),
        ({"peer_episodes": (12,)}, "episodes=12 is no positive multiple of batch_size=8"),
        ({"seeds": ()}, "episodes, kl_coefs and seeds must each name at least one"),
        ({"betas": (0.1, 0.0)}, "betas must be above 0, got 0.0"),
        ({"best_of": (9,)}, "best_of must be from 1 to reference_samples=8, got 9"),
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"held_out_prompts": 1}, "held_out_prompts must be at least 2, for a standard error over prompts, got 1"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(small, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        frontier.main(dataclasses.replace(small, output=tmp_path / "new", **change))
    assert not (tmp_path / "new").exists()


def test_prompts_from_the_reviews_have_so_many_tokens_and_are_kept_apart(small, monkeypatch):
    texts = [f"{i:03d} is a film that ends" for i in range(40)] + ["short"]
    monkeypatch.setattr(frontier.reviews, "texts", lambda: texts)
    monkeypatch.setattr(frontier.reviews, "split", lambda texts: (texts[:30], [*texts[20:40], "short"]))
    tokenizer = pg.load(small.model)[2]
    config = dataclasses.replace(small, prompts=None, prompt_tokens=5, held_out_prompts=8)
    train_rows, held_out = frontier.prompt_sets(config, tokenizer)
    assert [row["prompt"] for row in train_rows] == [f"{i:03d} i" for i in range(30)]
    assert [row["prompt"] for row in held_out] == [f"{i:03d} i" for i in range(30, 38)]  # not those trained on


def test_too_few_prompts_to_evaluate_on_are_refused(small, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("a\nb\nc\nd\ne\nf\ng\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"few\.txt has 7 rows: too few to set two aside; name --held-out"):
        frontier.main(dataclasses.replace(small, prompts=str(few), output=tmp_path / "new"))
    one = tmp_path / "one.txt"
    one.write_text("a\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"one\.txt has 1 rows: a standard error over prompts needs two"):
        frontier.main(dataclasses.replace(small, held_out=str(one), output=tmp_path / "new"))


def test_a_peer_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(frontier.importlib.util, "find_spec", lambda name: None if name == "trl" else object())
    assert "TRL left out: trl not installed" in frontier.missing_trl(None)
    assert "does not run" in frontier.missing_trl(tmp_path / "no_python")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ModuleNotFoundError: No module named trl' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert "cannot import it (ModuleNotFoundError: No module named trl)" in frontier.missing_trl(broken)


def test_the_peer_gets_the_same_weights_prompts_and_sizes(small, tmp_path):
    """The program started in TRL's place writes down what it was asked, and gives the reference back."""
    fake = tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, shutil, sys\n"
        "asked = dict(zip(sys.argv[3::2], sys.argv[4::2]))\n"
        "out = pathlib.Path(asked['--output'])\n"
        "shutil.copytree(asked['--model'], out / 'policy')\n"
        "(out / 'asked.json').write_text(json.dumps(asked))\n"
        "print('loading')\n"
        "print(json.dumps({'seconds': 2.0, 'versions': {'trl': '9'}}))\n"
    )
    fake.chmod(0o755)
    config = dataclasses.replace(small, peer_python=fake, output=tmp_path / "runs")
    train_rows, held_out = frontier.prompt_sets(config, None)
    files = frontier.write_prompts(config.output, train_rows, held_out)
    row, _ = frontier.train_trl(config, files, 16, 7)
    assert (row["who"], row["seconds"], row["seed"], row["kl_coef"]) == ("TRL", 2.0, 7, 0.05)
    asked = json.loads((config.output / "trl_16_7" / "asked.json").read_text())
    sizes = {name: asked[f"--{name}"] for name in ("steps", "batch-size", "max-new-tokens", "kl-coef", "learning-rate")}
    assert sizes == {
        "steps": "2",
        "batch-size": "8",
        "max-new-tokens": "3",
        "kl-coef": "0.05",
        "learning-rate": "0.0003",
    }
    assert asked["--prompts"] == str(files[0].resolve()) and asked["--seed"] == "7"
    fake.write_text("#!/bin/sh\nexit 3\n")
    assert frontier.train_trl(config, files, 16, 7)[0] == row  # finished: not run again
    with pytest.raises(UserError, match=r"trl_16_7 holds another run"):
        frontier.train_trl(dataclasses.replace(config, kl_coefs=(0.1,)), files, 16, 7)


def test_a_failing_peer_shows_its_last_words(small, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'out of memory' >&2\nexit 3\n")
    broken.chmod(0o755)
    config = dataclasses.replace(small, peer_python=broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        frontier.train_trl(config, (tmp_path / "p", tmp_path / "h"), 16, 0)
