"""Two processes against one: the same run, the same errors on both, and no waiting for what never comes."""

import json
import re
import shutil
import time

import jax
import numpy as np
import pytest

import pgjax as pg
from pgjax.models.io.classifier import with_padding_token
from pgjax.models.reward_model import from_causal_lm
from pgjax.run import logs
from pgjax.run.checkpoint.checkpoints import Checkpoints
from tests import pair
from tests.compare import assert_same_metrics
from tests.pair import script
from tests.tiny_task import other_letters, save_tiny_model


@pytest.fixture(scope="module")
def folder(once):
    return once("processes", run_by_two_and_by_one)


def write_inputs(folder):
    """Write the model, the reward model, the prompts and the texts of all runs."""
    save_tiny_model(folder / "model", unused_ids=1)  # so that tensor=2 divides them
    lm, params, tokenizer = pg.load(folder / "model")
    judge = with_padding_token(*from_causal_lm(lm, params, jax.random.key(1)), other_letters(tokenizer))
    pg.save_reward_model(folder / "judge", *judge)
    lines = [json.dumps({"prompt": f"say {word}"}) + "\n" for word in ("a", "bcd", "ef", "ghij")]
    (folder / "prompts.jsonl").write_text("".join(lines))
    words = [("abcdefgh" * 5)[:length] for length in (1, 2, 40, 3, 2, 1, 30, 2)]  # few of a batch's are long
    rows = [{"prompt": "say", "completion": word, "chosen": word, "rejected": word[::-1] + "."} for word in words]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_by_two(folder, part):
    """Do a part of what two processes do, and keep what they print."""
    port = pair.free_port()
    processes = [pair.start(["-m", "tests.pair", str(i), str(port), str(folder), part]) for i in range(2)]
    for i, (code, printed, errors) in enumerate(pair.finish(processes)):
        assert code == 0, errors[-3000:]
        (folder / f"printed{i}.txt").write_text(printed)


def run_by_two_and_by_one(folder):
    """Do all that two processes do, and their run in this process, on four devices, an iteration longer."""
    write_inputs(folder)
    run_by_two(folder, "training")
    script.main(pair.make_config(folder, "one", steps=4))


@pytest.fixture(scope="module")
def found(folder):
    """What both processes found; what they left behind lies in the folder."""
    return [json.loads((folder / f"found{i}.json").read_text()) for i in range(2)]


@pytest.fixture(scope="module")
def single(folder):
    return folder / "one"


def assert_same_training(actual, expected):
    """Two runs' metrics; the explained variance, 1 less a quotient, has the quotient's rounding however small it is itself."""
    name = "val/explained_variance"
    np.testing.assert_allclose([row[name] for row in actual], [row[name] for row in expected], rtol=0, atol=1e-5)
    rows = [[{k: x for k, x in row.items() if k != name} for row in run] for run in (actual, expected)]
    assert_same_metrics(*rows, rtol=1e-5)


def trained(folder):
    """The metrics of each step, without the evaluation that the last one holds."""
    rows = [row for row in logs.read_metrics(folder) if "objective/scores" in row]
    return [{name: x for name, x in row.items() if not name.startswith("eval/")} for row in rows]


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one(found, single, folder):
    assert found[0]["figures"] == found[1]["figures"]
    assert_same_training(trained(folder / "two"), trained(single)[:3])
    before = [next(row for row in logs.read_metrics(x) if "eval/scores" in row) for x in (folder / "two", single)]
    assert_same_metrics(before[:1], before[1:], rtol=1e-5)
    ours, theirs = samples(folder / "two"), [row for row in samples(single) if row["step"] <= 3]
    assert len(ours) == 3 * 8
    assert [(row["prompt"], row["completion"]) for row in ours] == [(x["prompt"], x["completion"]) for x in theirs]


def test_each_process_judges_its_own_rows(found):
    assert found[0]["calls"] == found[1]["calls"] == [4] * 5  # of 8: an evaluation, three iterations, an evaluation


def test_where_tensor_spans_the_processes_they_share_out_the_judging(found, single, folder):
    assert found[0]["crossed_calls"] == found[1]["crossed_calls"] == [4] * 3
    assert_same_training(trained(folder / "crossed"), trained(single)[:1])
    ours, theirs = samples(folder / "crossed"), [row for row in samples(single) if row["step"] == 1]
    assert len(ours) == 8
    assert [(row["prompt"], row["completion"]) for row in ours] == [(x["prompt"], x["completion"]) for x in theirs]
    assert_same_metrics(
        *([{k: x for k, x in row.items() if type(x) is not str} for row in rows] for rows in (ours, theirs)), rtol=1e-5
    )


@pytest.mark.campaign
def test_two_processes_fine_tune_and_learn_from_pairs_as_one(tmp_path):
    write_inputs(tmp_path)
    run_by_two(tmp_path, "stages")
    for alone in pair.learn(tmp_path, "learned_alone"):
        ours, theirs = (logs.read_metrics(tmp_path / name / alone.name) for name in ("learned", "learned_alone"))
        assert sum("train/grad_norm" in row for row in ours) == 2
        assert_same_metrics(ours, theirs, rtol=1e-5)
    for process in range(2):
        printed = (tmp_path / f"printed{process}.txt").read_text()
        assert ("held-out perplexity" in printed) == ("data: 8 examples" in printed) == (process == 0)


def test_one_process_goes_on_where_two_stopped(found, single, folder):
    """The snapshot and the folder of two processes are those of one."""
    shutil.copytree(folder / "two", folder / "onward")
    script.main(pair.make_config(folder, "onward", steps=4, resume=True))
    assert_same_training(trained(folder / "onward"), trained(single))


@pytest.mark.campaign
def test_a_mesh_gives_the_numbers_of_one_device(single, folder):
    script.main(pair.make_config(folder, "alone", mesh=None))
    assert_same_training(trained(folder / "alone"), trained(single)[:3])
    ours, theirs = samples(folder / "alone"), [row for row in samples(single) if row["step"] <= 3]
    assert [row["completion"] for row in ours] == [row["completion"] for row in theirs]


def test_values_are_exchanged_in_order_and_exactly(found):
    for mine in found:
        assert mine["gathered"] == [{"process": 0, "text": ""}, {"process": 1, "text": "x" * 3000}]
        assert mine["any"] == [True, False] and mine["exact"] is True
        assert mine["on process 0"] == "by 0"


def test_both_refuse_with_the_same_words(found):
    for name, words in {
        "differ": "seed is 0 on process 0, 1 on process 1",
        "steps": "the config: not the same on all processes .steps is 3 on process 0, 4 on process 1",
        "prompts": "the rows of tests.pair:own_rows: not the same on all processes",
        "unfit": "data=3.* needs 3 devices, but there are 4",
        "uneven": "6 rows do not divide",
        "apart": "not all processes see .*apart: choose an output folder on a disk that they share",
    }.items():
        kinds, texts, _ = zip(*(mine[name] for mine in found), strict=True)
        assert set(kinds) == {"UserError"}
        assert texts[0] == texts[1] and re.search(words, texts[0]), texts


def test_all_write_where_process_0_does(found, folder):
    assert [mine["shared"] for mine in found] == [f"{folder}/of0/run"] * 2
    assert not any((folder / name).is_file() for name in ("of0", "of1")) and not list((folder / "of0").iterdir())


def test_what_a_reward_prints_is_seen_on_each_process_and_what_the_library_prints_on_process_0(folder):
    # The bug: all that other processes print went nowhere.
    for process in range(2):
        printed = (folder / f"printed{process}.txt").read_text()
        assert f"judging on {process}" in printed and f"judging on {1 - process}" not in printed
        assert ("step 3/3" in printed) == (process == 0)


def test_a_failure_of_one_stops_both(found):
    assert found[0]["broke"] == ["IndexError", "list index out of range", True]
    elsewhere = "process 0 failed, so all stop: IndexError: list index out of range"
    assert found[1]["broke"] == ["FailedElsewhere", elsewhere, True]
    # an error that is not made from its text: here as it was raised, there as a UserError of the same words
    assert [mine["refused"] for mine in found] == [[kind, "row 3 is empty", True] for kind in ("Refused", "UserError")]
    assert found[1]["broken"][0] == "RewardError"
    assert found[0]["broken"][0] == "FailedElsewhere" and "process 1 failed" in found[0]["broken"][1]
    for mine in found:
        assert "no such judge" in mine["broken"][1]
    assert [mine["infinite"][0] for mine in found] == ["FailedElsewhere", "RewardError"]
    for mine in found:
        assert "returned inf in row 5\n  prompt: 'row 5'\n  completion: 'on 1'" in mine["infinite"][1]


ALONE = """
import os, signal, sys
import jax
from pgjax.run.exits import plain_errors
from pgjax.run.devices import replicate
from pgjax.run import loop
from pgjax.parallel import processes, sharding
from pgjax.run.checkpoint.checkpoints import Checkpoints

def step(state, i, work):
    if i == 3:
        if jax.process_index() == failing:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("no step 3")
        processes.gather(i)  # the other waits here
    return {"x": state["x"] + 1}, {"x": state["x"]}, None

failing, how = int(sys.argv[4]), sys.argv[5]
with plain_errors():
    processes.initialize(sys.argv[1], 2, int(sys.argv[2]))
    with Checkpoints(sys.argv[3]) as checkpoints:
        loop.run({"x": replicate(sharding.make_mesh(data=-1), 0.0)}, steps=5, save_every=2, step=step,
                 prepare=lambda state, i: None, check=lambda done, metrics: checkpoints.wait(),
                 report=lambda done, metrics, samples: None, checkpoints=checkpoints)
"""


@pytest.mark.parametrize("failing, how", [(0, "raises"), (1, "raises"), (1, "killed")])
def test_an_error_on_one_process_alone_ends_both_and_what_was_saved_stays(tmp_path, failing, how):
    """Without `plain_errors` it would be jax's time-outs that end them, in a minute."""
    address, begin = f"localhost:{pair.free_port()}", time.monotonic()
    started = [pair.start(["-c", ALONE, address, str(i), str(tmp_path), str(failing), how]) for i in range(2)]
    ended = pair.finish(started, seconds=200)
    assert all(code != 0 for code, _, _ in ended), ended
    assert time.monotonic() - begin < 120  # the start included
    if how == "raises":
        code, _, errors = ended[failing]
        assert code == 1 and "KeyError: 'no step 3'" in errors and "Traceback" in errors
        assert f"on process {failing} of 2, so all end; the same command with --resume goes on" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2"]
    with Checkpoints(tmp_path) as checkpoints:
        assert float(checkpoints.restore({"x": jax.numpy.zeros(())})[0]["x"]) == 2.0


def test_a_signal_to_one_stops_both_after_the_same_step(found, folder):
    assert (
        found[0]["stopped"] == found[1]["stopped"] == ["Interrupted", "stopped after step 2; its state is saved", True]
    )
    assert (folder / "stopped" / "checkpoints" / "2").is_dir()
    assert [row["step"] for row in trained(folder / "stopped")] == [1, 2]
