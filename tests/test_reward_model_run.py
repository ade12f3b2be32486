"""The reward model script: it learns what the pairs say, ends where a stopped run ends, and refuses what it cannot use."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import pgjax as pg
from experiments import export, reward_model
from experiments.reward_model import Config
from pgjax.data import preferences
from pgjax.learning import reward_learning
from pgjax.run import logs, loop
from pgjax.run.checkpoint.checkpoints import Checkpoints
from tests.compare import CLOCKED
from tests.tiny_task import save_tiny_model

WORDS = ["sun", "rain", "fog", "wind", "snow", "ice", "dew", "hail"]


def rows(count, seed):
    """The answer that holds a plus is the preferred one."""
    draw = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        first, second = draw.choice(WORDS, 2, replace=False)
        out.append({"prompt": "sky:", "chosen": f" {first}+", "rejected": f" {second}-"})
    return out


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    model = save_tiny_model(folder / "model")
    pairs, held_out = write(folder / "pairs.jsonl", rows(96, 0)), write(folder / "held_out.jsonl", rows(32, 1))
    return Config(
        model=str(model), pairs=pairs, held_out=held_out, batch_size=8, learning_rate=3e-3, epochs=2.0, save_every=7
    )


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """A run from start to end."""
    config = dataclasses.replace(source, output=tmp_path_factory.mktemp("whole") / "run")
    return config, reward_model.main(config)


def unclocked(figures):
    """A run's figures but for those that no two runs share."""
    return {name: x for name, x in figures.items() if not name.startswith(CLOCKED)}


def leaves(folder):
    _, params, _ = pg.load_reward_model(folder)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def test_it_learns_the_preference_and_says_so(whole):
    config, figures = whole
    assert figures["before/accuracy"] < 0.8 and figures["eval/accuracy"] > 0.95
    assert figures["eval/margin"] > 1 and figures["eval/loss"] < 0.3 < figures["before/loss"]
    assert {"eval/calibration_error", "reference/mean", "reference/std", "normalized/accuracy"} <= figures.keys()
    assert (config.output / "calibration.png").stat().st_size < 150_000
    steps = [row["step"] for row in logs.read_metrics(config.output) if "loss/preference" in row]
    assert steps == list(range(1, 25))  # 2 passes over 96 pairs, 8 at a time


def test_the_saved_model_scores_the_references_with_mean_0_and_deviation_1(whole):
    config, figures = whole
    rm, params, tokenizer = pg.load_reward_model(config.output / "model")
    pairs = preferences.check_pairs([("", row) for row in rows(96, 0)])
    encoded = preferences.encode_pairs(pairs, tokenizer, chat=False, eos=True, max_length=64).kept
    scores = reward_learning.pair_scores(rm, params, encoded, batch_size=16)
    assert abs(scores.mean()) < 1e-4 and abs(scores.std() - 1) < 1e-4
    assert figures["normalized/accuracy"] > 0.95


def test_every_part_of_the_body_has_learnt(whole, source):
    config, _ = whole
    _, before, _ = pg.load(source.model)
    _, after, _ = pg.load_reward_model(config.output / "model")
    after["lm"]["embed"]["tokens"] = after["lm"]["embed"]["tokens"][: before["embed"]["tokens"].shape[0]]
    for (path, x), y in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after["lm"]), strict=True):
        assert np.abs(np.asarray(x) - np.asarray(y)).max() > 1e-4, jax.tree_util.keystr(path)


def test_a_snapshot_exports_to_the_model_that_the_end_of_the_run_would_save(whole, source, tmp_path):
    folder = export.main(export.Config(whole[0].output, output=tmp_path / "exported"))
    for x, y in zip(leaves(folder), leaves(whole[0].output / "model"), strict=True):
        assert np.array_equal(x, y)
    short = dataclasses.replace(source, output=tmp_path / "short", end_after=2)
    assert reward_model.main(short)["step"] == 2 and leaves(short.output / "model")


def test_a_run_stopped_halfway_ends_with_the_same_bits(whole, tmp_path, monkeypatch):
    config = dataclasses.replace(whole[0], output=tmp_path / "run")
    update = reward_learning.update

    def crash(state, *args, **kwargs):
        if int(state.updates) == 9:
            raise RuntimeError("power cut")
        return update(state, *args, **kwargs)

    monkeypatch.setattr(reward_learning, "update", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        reward_model.main(config)
    monkeypatch.undo()
    figures = reward_model.main(dataclasses.replace(config, resume=True))
    assert unclocked(figures) == unclocked(whole[1])
    for x, y in zip(leaves(config.output / "model"), leaves(whole[0].output / "model"), strict=True):
        assert np.array_equal(x, y)


@pytest.mark.campaign
def test_the_snapshot_of_the_lowest_held_out_loss_and_its_model_are_kept_beside_the_latest(
    source, tmp_path, monkeypatch
):
    score, metrics, seen = reward_learning.pair_scores, reward_learning.pair_metrics, []

    def remembered(rm, params, pairs, *, batch_size):
        seen.append(jax.device_get(params["lm"]))
        return score(rm, params, pairs, batch_size=batch_size)

    def scripted(scores, prompts=None):  # before, after 5, 10, 15, 20 and 24 updates, and at the end
        return {**metrics(scores, prompts), "loss": [9.0, 5.0, 1.0, 3.0][min(len(seen), 4) - 1]}

    monkeypatch.setattr(reward_learning, "pair_scores", remembered)
    monkeypatch.setattr(reward_learning, "pair_metrics", scripted)
    config = dataclasses.replace(source, output=tmp_path / "run", save_every=5, keep=1, keep_best=True)
    reward_model.main(config)
    with Checkpoints(config.output / "checkpoints", keep=1, keep_best=True) as checkpoints:
        assert checkpoints.steps() == [10, 24] and checkpoints.best() == 10
    for name, body in {"model_best": seen[2], "model": seen[5]}.items():
        saved = jax.tree.leaves(pg.load_reward_model(config.output / name)[1]["lm"])
        assert all(np.array_equal(x, y) for x, y in zip(saved, jax.tree.leaves(body), strict=True)), name


def test_a_finished_run_is_read_off_and_not_overwritten(whole):
    config, figures = whole
    before = (config.output / "model" / "model.safetensors").stat().st_mtime_ns
    assert reward_model.main(dataclasses.replace(config, resume=True)) == figures
    assert (config.output / "model" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="not empty"):
        reward_model.main(config)
    with pytest.raises(ValueError, match="learning_rate"):
        reward_model.main(dataclasses.replace(config, resume=True, learning_rate=1e-3))


@pytest.mark.campaign
def test_a_run_stopped_after_training_and_before_saving_goes_on_to_the_same_end(whole, tmp_path, monkeypatch):
    config = dataclasses.replace(whole[0], output=tmp_path / "run")

    def crash(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(pg, "save_reward_model", crash)
    with pytest.raises(OSError, match="No space"):
        reward_model.main(config)
    monkeypatch.undo()
    assert unclocked(reward_model.main(dataclasses.replace(config, resume=True))) == unclocked(whole[1])


def test_rows_left_out_are_counted_and_printed_with_their_lines(source, tmp_path, capsys):
    odd = [
        {"prompt": "sky:", "chosen": " same", "rejected": " same"},
        {"prompt": "sky:", "chosen": " ", "rejected": " b"},
        {"prompt": "sky:", "chosen": " " + "long" * 20, "rejected": " b"},
    ]
    path = write(tmp_path / "pairs.jsonl", rows(24, 0) + odd)
    config = dataclasses.replace(source, pairs=path, epochs=0.4, output=tmp_path / "run", reference_rows=8)
    assert reward_model.main(config)["step"] == 2  # 0.4 of 24 pairs, 8 at a time: 1.2 updates, rounded up as everywhere
    printed = capsys.readouterr().out
    for line in (
        f"left out 1 row, two equal answers: {path}, line 25",
        f"left out 1 row, an empty answer: {path}, line 26",
        f"left out 1 row, longer than 64 tokens: {path}, line 27",
    ):
        assert line in printed


@pytest.mark.campaign
def test_references_of_their_own_are_what_the_scores_are_normalised_on(source, tmp_path):
    given = [{"prompt": "sky:", "completion": f" {word}+"} for word in WORDS]
    path = write(tmp_path / "reference.jsonl", given)
    config = dataclasses.replace(source, reference=path, epochs=0.3, output=tmp_path / "run")
    reward_model.main(config)
    rm, params, tokenizer = pg.load_reward_model(config.output / "model")
    answers = preferences.check_answers([("", row) for row in given])
    ids = preferences.encode_references(answers, tokenizer, chat=False, eos=True, max_length=64).kept
    scores = reward_learning.features(rm, params, ids, batch_size=8) @ np.asarray(params["score"]["kernel"])
    assert abs(scores.mean()) < 1e-4 and abs(scores.std() - 1) < 1e-4


def test_references_that_are_all_the_same_are_refused_before_training(source, tmp_path, capsys):
    # The bug: the run fails after all its updates, when it comes to normalise on them.
    same = [{"prompt": "sky:", "completion": text} for text in (" sun+", " sun+", "")]
    path = write(tmp_path / "reference.jsonl", same)
    with pytest.raises(ValueError, match=r"reference\.jsonl: all references are the same"):
        reward_model.main(dataclasses.replace(source, reference=path, output=tmp_path / "run"))
    assert f"references: left out 1 row, an empty answer: {path}, line 3" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 6, "microbatches": 4}, "does not divide"),
        ({"epochs": 0.0}, "epochs must be above 0"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"center_coef": -1.0}, "center_coef must be finite"),
        ({"max_length": 65}, "more than the model's 64 positions"),
        ({"pairs": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"held_out": None, "held_out_rows": 500}, "can't hold out 500 of 96 rows"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_its_folder_is_made(source, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        reward_model.main(dataclasses.replace(source, output=tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_and_the_run_goes_on(whole, tmp_path, monkeypatch):
    config = dataclasses.replace(whole[0], output=tmp_path / "run")
    import os
    import signal

    update = reward_learning.update

    def stop(state, *args, **kwargs):
        if int(state.updates) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return update(state, *args, **kwargs)

    monkeypatch.setattr(reward_learning, "update", stop)
    with pytest.raises(loop.Interrupted):
        reward_model.main(config)
    monkeypatch.undo()
    assert unclocked(reward_model.main(dataclasses.replace(config, resume=True))) == unclocked(whole[1])


@pytest.mark.campaign
def test_the_center_coefficient_reaches_the_loss_and_holds_scores_small(source, tmp_path):
    found = []
    for coef in (0.0, 1.0):
        config = dataclasses.replace(source, center_coef=coef, epochs=1.0, output=tmp_path / str(coef))
        found.append(reward_model.main(config)["reference/std"])
    assert found[1] < 0.5 * found[0]


@pytest.mark.campaign
def test_margins_of_the_file_count_unless_told_otherwise(source, tmp_path):
    path = write(tmp_path / "pairs.jsonl", [{**row, "margin": 3.0} for row in rows(96, 0)])
    found = {}
    for use in (True, False):
        config = dataclasses.replace(source, pairs=path, use_margin=use, epochs=1.0, output=tmp_path / str(use))
        found[use] = reward_model.main(config)["eval/margin"]
    assert found[True] > found[False] + 1
