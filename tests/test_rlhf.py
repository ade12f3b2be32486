"""The stages of RLHF: skipped, gone on with, redone, refused; and the whole of it on a tiny model."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments import ppo, reward_model, rlhf, sft
from experiments.study import rlhf_report, rlhf_stages
from experiments.study.pictures import picture_path
from pgjax.run import presets
from pgjax.run.loop import Interrupted
from pgjax.run.stages import finished, move_aside, run_stage

pytestmark = pytest.mark.usefixtures("no_pictures")


def parse(*arguments):
    return presets.parse(rlhf.PRESETS, goes_with=rlhf.GOES_WITH, args=list(arguments))


def stage(folder, config, calls, *, made_from=(), fail=None):
    """A stand-in that notes how it was called, leaves a run behind, and may be stopped halfway."""

    def work(folder, resume):
        calls.append((folder.name, resume))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        if fail is not None:
            raise fail
        return {"calls": len(calls)}

    return run_stage(folder, config, work, made_from=made_from, redo="--from x")


def test_complete_stage_is_done_once(tmp_path, capsys):
    calls = []
    first, second = (stage(tmp_path / "a", {"n": 1}, calls) for _ in range(2))
    assert calls == [("a", False)] and (first.skipped, second.skipped) == (False, True)
    assert first.id == second.id and second.metrics == {"calls": 1}
    assert "a: complete, skipped" in capsys.readouterr().out


def test_stage_stopped_halfway_goes_on_and_counts_its_time(tmp_path):
    calls = []
    with pytest.raises(Interrupted):
        stage(tmp_path / "a", {"n": 1}, calls, fail=Interrupted(3))
    assert finished(tmp_path / "a") is None
    begun = json.loads((tmp_path / "a.begun.json").read_text())
    (tmp_path / "a.begun.json").write_text(json.dumps(begun | {"seconds": 100.0}))
    done = stage(tmp_path / "a", {"n": 1}, calls)
    assert calls == [("a", False), ("a", True)] and done.seconds > 100
    assert not (tmp_path / "a.begun.json").exists()


def test_stage_that_left_nothing_to_go_on_with_starts_over_cleanly(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "half.jsonl.part").write_text("{")
    (tmp_path / "a.begun.json").write_text(json.dumps({"config": {"n": 1}, "made_from": {}, "seconds": 1.0}))
    calls = []
    stage(tmp_path / "a", {"n": 1}, calls)
    assert calls == [("a", False)] and not (tmp_path / "a" / "half.jsonl.part").exists()


def test_files_of_others_are_never_cleared_away(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="in the way"):
        stage(tmp_path / "a", {"n": 1}, [])
    assert (tmp_path / "a" / "thesis.tex").exists()


@pytest.mark.parametrize("halfway", [False, True])
def test_another_config_is_refused_by_name_and_nothing_is_touched(tmp_path, halfway):
    calls = []
    if halfway:
        with pytest.raises(Interrupted):
            stage(tmp_path / "a", {"n": 1, "lr": {"x": 2}}, calls, fail=Interrupted(3))
    else:
        stage(tmp_path / "a", {"n": 1, "lr": {"x": 2}}, calls)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"lr\.x: 2 there, 3 asked for.*--from x"):
        stage(tmp_path / "a", {"n": 1, "lr": {"x": 3}}, calls)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} and len(calls) == 1


def test_stage_made_from_a_stage_that_was_redone_is_refused(tmp_path):
    calls = []
    first = stage(tmp_path / "a", {}, calls)
    stage(tmp_path / "b", {}, calls, made_from=[first])
    move_aside([tmp_path / "a"])
    again = stage(tmp_path / "a", {}, calls)
    with pytest.raises(ValueError, match="made from another a"):
        stage(tmp_path / "b", {}, calls, made_from=[again])


def test_move_aside_keeps_every_old_stage_under_one_number(tmp_path):
    for name in ("a", "b", "b.1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text(name)
    moved = move_aside([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    assert [path.name for path in moved] == ["a.2", "b.2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.2", "b.1", "b.2"]
    assert (tmp_path / "b.1" / "old").read_text() == "b.1"


@pytest.fixture
def stand_ins(monkeypatch):
    """The three scripts in miniature: each notes its config and leaves what the report reads."""
    calls = []

    def main_of(name, files):
        def main(config):
            calls.append((name, config))
            config.output.mkdir(parents=True, exist_ok=True)
            for file, text in {"config.json": "{}", **files}.items():
                (config.output / file).write_text(text)
            return {"x": 1.0}

        return main

    sample = {
        "step": 1,
        "prompt": "p",
        "completion": "c\x1b[2J",
        "rewards/reward_model": 0.5,
        "rewards/gold_reward": 0.1,
    }
    evaluation = {"step": 0, rlhf_report.PROXY: 0.0, "eval/rewards/gold_reward": 0.1, "eval/kl": 0.0}
    lines = {"samples.jsonl": json.dumps(sample) + "\n", "metrics.jsonl": json.dumps(evaluation) + "\n"}
    monkeypatch.setattr(sft, "main", main_of("sft", {"metrics.jsonl": ""}))
    monkeypatch.setattr(reward_model, "main", main_of("reward_model", {"metrics.jsonl": ""}))
    monkeypatch.setattr(ppo, "main", main_of("ppo", lines))
    monkeypatch.setitem(
        rlhf_stages.WORK,
        "pairs",
        lambda config, folder, resume: calls.append(("pairs", config)) or folder.mkdir() or PAIRS,
    )
    return calls


PAIRS = dict.fromkeys(("train_pairs", "held_out_pairs", "train_gold", "train_gold_std", "train_judge_right"), 1.0)


def small(tmp_path, **changes):
    return dataclasses.replace(rlhf.Config(output=tmp_path / "run"), **changes)


def names(calls):
    return [name for name, _ in calls]


def test_stages_run_in_order_each_on_the_output_of_the_one_before(tmp_path, stand_ins):
    figures = rlhf.main(small(tmp_path, seed=5))
    assert names(stand_ins) == list(rlhf_stages.MADE_FROM) and figures["ppo/x"] == 1.0
    configs = dict(stand_ins)
    run = tmp_path / "run"
    assert configs["reward_model"].model == configs["ppo"].model == str(run / "sft" / "model")
    assert configs["ppo"].reward_model == str(run / "reward_model" / "model")
    assert configs["reward_model"].pairs == str(run / "pairs" / "train.jsonl")
    assert configs["reward_model"].eos is False  # sampled answers hold what ended them
    assert configs["ppo"].reward_weights == (0.0,)  # gold is watched, never optimised
    assert {configs[name].seed for name in ("sft", "reward_model", "ppo")} == {5}


@pytest.mark.campaign
def test_from_redoes_a_stage_and_those_after_it_and_keeps_the_old_ones(tmp_path, stand_ins):
    rlhf.main(small(tmp_path))
    stand_ins.clear()
    rlhf.main(small(tmp_path))
    assert names(stand_ins) == []
    rlhf.main(small(tmp_path, from_stage="reward_model"))
    assert names(stand_ins) == ["reward_model", "ppo"]
    assert (tmp_path / "run" / "reward_model.1" / "complete.json").exists()
    assert (tmp_path / "run" / "ppo.1" / "complete.json").exists() and not (tmp_path / "run" / "sft.1").exists()


def test_changed_number_of_a_complete_stage_needs_from(tmp_path, stand_ins):
    rlhf.main(small(tmp_path))
    other = small(tmp_path, ppo=dataclasses.replace(rlhf.PPO, kl_coef=0.5))
    with pytest.raises(ValueError, match=r"ppo\.kl_coef: 0\.\d+ there, 0\.5 asked for.*--from ppo"):
        rlhf.main(other)
    stand_ins.clear()
    rlhf.main(dataclasses.replace(other, from_stage="ppo"))
    assert names(stand_ins) == ["ppo"]


def test_pairs_of_ones_own_go_straight_to_the_reward_model(tmp_path, stand_ins):
    rlhf.main(small(tmp_path, pairs="judged.jsonl", gold=None))
    configs = dict(stand_ins)
    assert names(stand_ins) == ["sft", "reward_model", "ppo"]
    assert (configs["reward_model"].pairs, configs["reward_model"].held_out) == ("judged.jsonl", None)
    assert configs["reward_model"].eos is True and configs["ppo"].rewards == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gold": None}, "without pairs"),
        ({"held_out_pairs": "x.jsonl"}, "give pairs"),
        ({"data": "mine.jsonl"}, "held_out_data"),
        ({"prompts": "mine.txt"}, "held_out_prompts"),
        ({"sft": sft.Config(seed=3)}, "sft.seed"),
        ({"ppo": dataclasses.replace(rlhf.PPO, rewards=("a:b",))}, "ppo.rewards"),
        ({"pair": rlhf.Pairs(train=0)}, "pair.train"),
        ({"pair": rlhf.Pairs(temperature=float("nan"))}, "pair.temperature must be finite and above 0, got nan"),
        ({"ppo": dataclasses.replace(rlhf.PPO, temperature=0.0)}, "ppo: temperature must be above 0"),
        ({"max_new_tokens": 0}, "ppo: max_new_tokens must be at least 1, got 0"),
        (
            {"reward_model": dataclasses.replace(rlhf.REWARD_MODEL, microbatches=3)},
            "reward_model: batch_size=.* microbatches=3",
        ),
        ({"prompts": "nosuch.jsonl", "held_out_prompts": None}, "nosuch.jsonl: there is no such file"),
        ({"gold": "experiments.tasks.gold:silver"}, "silver"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(tmp_path, stand_ins, changes, message):
    with pytest.raises(ValueError, match=message):
        rlhf.main(small(tmp_path, **changes))
    assert stand_ins == [] and not (tmp_path / "run").exists()


def test_command_line_reaches_every_stage():
    arguments = [
        "--from",
        "ppo",
        "--sft.epochs",
        "2",
        "--pair.scale",
        "3",
        "--reward-model.epochs",
        "3",
        "--ppo.kl-coef",
        "0.3",
    ]
    config = parse(*arguments)
    assert (config.from_stage, config.sft.epochs, config.pair.scale) == ("ppo", 2, 3.0)
    assert (config.reward_model.epochs, config.ppo.kl_coef, config.ppo.steps) == (3.0, 0.3, rlhf.PPO.steps)
    assert Path(config.output) == Path("runs/rlhf")


def test_source_of_ones_own_takes_the_film_reviews_with_it():
    config = parse("--data=a.jsonl", "--ppo.steps", "3", "--pairs", "b.jsonl")
    assert (config.held_out_data, config.gold, config.ppo.steps) == (None, None, 3)
    assert config.held_out_prompts == rlhf.Config().held_out_prompts  # its prompts stay
    given = parse("--data", "a.jsonl", "--held-out-data", rlhf.Config().held_out_data)
    assert given.held_out_data == rlhf.Config().held_out_data  # what is given stays, even where it is the preset's


def test_a_preset_is_named_first_and_its_fields_can_be_overridden():
    assert parse() == rlhf.Config() and parse("smollm2") == rlhf.PRESETS["smollm2"]
    config = parse("smollm2", "--ppo.steps", "3", "--output", "runs/x")
    assert (config.ppo.steps, config.output, config.model) == (3, Path("runs/x"), "SmolLM2-135M-Instruct")
    assert config.held_out_data == rlhf.Config().held_out_data  # its data are reviews, too


def test_the_dtype_of_the_run_is_that_of_every_stage(tmp_path, stand_ins):
    rlhf.main(small(tmp_path, dtype="bfloat16"))
    assert {config.dtype for _, config in stand_ins} == {"bfloat16"}
    with pytest.raises(ValueError, match="dtype: 'bfloat16' there, None asked for"):
        rlhf.main(small(tmp_path))


def test_pictures_stay_in_the_folder_of_the_run(tmp_path, stand_ins):
    # The bug: the default picture overwrites the one that git tracks, for a run on other data too.
    rlhf.main(small(tmp_path))
    assert (tmp_path / "run" / "rlhf.png").exists()
    assert picture_path(tmp_path / "run" / "rlhf.png", True).exists()  # the committed one, by --refresh-pictures
