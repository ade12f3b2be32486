"""The PPO script goes on only with what its run was made from, and from the last good snapshot where the user says so."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import pgjax as pg
from experiments import export
from experiments import ppo as script
from pgjax.run import logs
from pgjax.run.checkpoint.checkpoints import Checkpoints
from pgjax.run.session import settled
from tests.tiny_task import save_tiny_model

pytestmark = pytest.mark.usefixtures("no_pictures")

SCORES = [0.1, 0.9, 0.3, 0.2]  # after each step: the best snapshot is neither the first nor among the last two
EVALUATION, STEP = (
    2,
    3,
)  # calls of the reward: five held-out prompts in batches of four; a step's batch, then an evaluation
CALLS: list[int] = []


def scripted(prompts, completions, **columns):
    """A black box that says how good each step is, on its batch and on the held-out prompts after it."""
    step = (len(CALLS) - EVALUATION) // STEP  # from 0, and -1 in the evaluation before the first
    CALLS.append(len(completions))
    return [SCORES[step] + 0.01 * (i % 2) for i in range(len(completions))]


def change(config, **fields):
    return dataclasses.replace(config, **fields)


@pytest.fixture(scope="module")
def done(no_pictures, tmp_path_factory):
    """A run of four steps, each saved, and where it lies; tests work on copies."""
    root = tmp_path_factory.mktemp("done")
    save_tiny_model(root / "model")
    words = ("a", "bcd", "ef", "ghij", "k")
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in words))
    config = script.Config(
        model=str(root / "model"), prompts=str(root / "prompts.jsonl"), held_out=str(root / "prompts.jsonl"),
        rewards=(f"{__name__}:scripted",), output=root / "run", steps=4, batch_size=4, max_new_tokens=4, minibatches=2,
        microbatches=1, learning_rate=1e-2, warmup_updates=0, kl_target=1.0, eval_samples=1, save_every=1, keep_best=True,
    )  # fmt: skip
    CALLS.clear()
    script.main(config)
    return config


@pytest.fixture
def copied(done, tmp_path):
    """The same run in a folder of its own, resumed as it is: the model and the prompts keep their places."""
    shutil.copytree(done.output, tmp_path / "run")
    return change(done, output=tmp_path / "run", resume=True)


def flip(folder: Path) -> None:
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.campaign
def test_the_best_snapshot_and_its_policy_are_kept_beside_the_latest(done):
    with Checkpoints(done.output / "checkpoints", keep_best=True) as checkpoints:
        assert checkpoints.steps() == [2, 3, 4] and checkpoints.best() == 2
    record = json.loads((done.output / "checkpoints" / "2" / "record.json").read_text())
    assert record["score"] == pytest.approx(0.904) and record["made_from"]["config"]["learning_rate"] == 1e-2
    best, last = (pg.load(done.output / name)[1] for name in ("policy_best", "policy"))
    assert not np.array_equal(best["embed"]["tokens"], last["embed"]["tokens"])


def test_any_kept_snapshot_exports_to_a_policy(copied):
    best = pg.load(export.main(export.Config(copied.output, step=2)))[1]
    last = pg.load(export.main(export.Config(copied.output)))[1]
    for exported, name in ((best, "policy_best"), (last, "policy")):
        jax.tree.map(np.testing.assert_array_equal, exported, pg.load(copied.output / name)[1])


def test_a_damaged_snapshot_is_left_out_only_where_asked_and_the_run_ends_as_before(copied, capsys):
    flip(copied.output / "checkpoints" / "4")
    with pytest.raises(ValueError, match=r"step 4 in .* is damaged.*last-good"):
        script.main(copied)
    CALLS[:] = [0] * (EVALUATION + 3 * STEP)
    rows = logs.read_metrics(copied.output)
    script.main(change(copied, resume=False, resume_from="last-good"))
    said = capsys.readouterr().out
    assert "left out: the checkpoint of step 4" in said and "going on after step 3" in said
    again = logs.read_metrics(copied.output)
    names = ("step", "objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "eval/kl")
    assert [[row.get(name) for name in names] for row in again] == [[row.get(name) for name in names] for row in rows]
    digests = [
        json.loads((folder / "4" / "record.json").read_text())["digests"]
        for folder in (copied.output / "checkpoints", Path(copied.prompts).parent / "run" / "checkpoints")
    ]
    assert digests[0] == digests[1]


def test_snapshots_of_one_run_in_the_folder_of_another_are_refused(copied, tmp_path):
    other = settled(change(copied, output=tmp_path / "other", learning_rate=0.5))
    logs.open_run(other.output, dataclasses.asdict(other), resume=False)
    shutil.copytree(copied.output / "checkpoints", other.output / "checkpoints")
    with pytest.raises(ValueError, match=r"is of another run: config.learning_rate: 0.01 there, 0.5 here"):
        script.main(other)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is good, .*another run"):
        script.main(change(other, resume_from="last-good"))


def test_models_and_prompts_are_known_by_what_they_hold_wherever_they_lie(done, copied, tmp_path):
    file = Path(done.prompts)
    prompts = file.read_text()
    file.write_text(prompts.replace("bcd", "bcde"))
    with pytest.raises(ValueError, match=r"is of another run: data: '\w+' there, '\w+' here"):
        script.main(copied)
    file.write_text(prompts)
    shutil.copytree(done.model, tmp_path / "copy")  # the same weights in another place are the same
    shutil.copy(file, tmp_path / "copy.jsonl")
    script.main(change(copied, model=str(tmp_path / "copy"), prompts=str(tmp_path / "copy.jsonl")))
    assert logs.recorded(copied.output, "model") == str(tmp_path / "copy")
    lm, params, tokenizer = pg.load(done.model)
    shutil.move(done.model, done.model + ".old")
    try:
        pg.save_pretrained(done.model, lm, jax.tree.map(lambda x: x * np.float32(1.001), params), tokenizer)
        told = r"is of another run: reference: 'digest \w+' there, 'digest \w+' here"
        with pytest.raises(ValueError, match=told):
            script.main(copied)
    finally:
        shutil.rmtree(done.model)
        shutil.move(done.model + ".old", done.model)
