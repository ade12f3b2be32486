"""The fine-tuning script, whole: what it learns and writes, how it goes on, and what it refuses."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import pgjax as pg
from experiments import export
from experiments import sft as script
from pgjax.data.examples import check_examples, encode_examples
from pgjax.data.packing import pack
from pgjax.data.sources import load_rows
from pgjax.learning import supervised
from pgjax.models.io import scratch
from pgjax.run import logs, loop
from pgjax.run.checkpoint.checkpoints import Checkpoints
from pgjax.run.logs import read_metrics
from tests.sizes import campaign_but_for
from tests.tiny_task import save_tiny_model

ADJECTIVES = ("fine", "dull", "long", "short", "odd", "kind")
NOUNS = ("film", "play", "book", "song")
CONFIG = {
    "model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64,
}  # fmt: skip


def pairs() -> list[dict[str, str]]:
    return [{"prompt": f"the {n} is", "completion": f" {a}, a {a} {n}"} for n in NOUNS for a in ADJECTIVES]


@pytest.fixture
def config(tmp_path: Path) -> script.Config:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    return script.Config(
        config=tmp_path / "config.json", data=str(tmp_path / "pairs.jsonl"), held_out=None, held_out_rows=4,
        output=tmp_path / "run", max_length=48, epochs=4, batch_size=4, microbatches=2, learning_rate=1e-2, warmup_updates=2,
        eval_every=100, save_every=100,
    )  # fmt: skip


def change(config: script.Config, /, **fields) -> script.Config:
    return dataclasses.replace(config, **fields)


def parameters(folder: Path) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(pg.load(folder / "model")[1])]


def same(one: Path, other: Path) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(parameters(one), parameters(other), strict=True))


def test_it_learns_and_leaves_the_files_that_a_user_expects(config, capsys):
    figures = script.main(change(config, epochs=40, eval_every=10))
    assert figures["eval/perplexity"] < 0.2 * figures["eval/perplexity_before"]
    rows = read_metrics(config.output)
    steps = [row["step"] for row in rows if "loss/cross_entropy" in row]
    assert steps == list(range(1, len(steps) + 1))
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, *range(10, len(steps) + 1, 10)] + (
        [len(steps)] if len(steps) % 10 else []
    )
    assert rows[-1]["eval/perplexity"] == pytest.approx(math.exp(rows[-1]["eval/loss"]))
    assert {"config.json", "metrics.jsonl", "curves.png", "model", "checkpoints"} <= set(os.listdir(config.output))
    assert "20 examples" in capsys.readouterr().out
    lm, params, tokenizer = pg.load(config.output / "model")
    assert lm.arch.family == "gpt2" and tokenizer.eos_token == scratch.END and tokenizer.pad_token == scratch.PAD
    from transformers import AutoConfig, AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(config.output / "model")
    assert theirs("the film is odd")["input_ids"] == tokenizer("the film is odd")["input_ids"]
    assert AutoConfig.from_pretrained(config.output / "model").eos_token_id == tokenizer.eos_token_id
    held_out = load_rows(config.data, check_examples)[:4]
    examples = encode_examples(held_out, tokenizer, chat=False, max_length=48).examples
    assert supervised.mean_surprise(lm, params, pack(examples, 48), 4) < 2  # the saved model is the trained one


def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(config, monkeypatch):
    config = change(config, batch_size=2)  # less than the rows: the order of the data counts
    script.main(change(config, output=config.output.with_name("whole"), eval_every=3))
    update = supervised.update
    calls = 0

    def stop_in_the_fourth(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*arguments, **options)

    monkeypatch.setattr(supervised, "update", stop_in_the_fourth)
    with pytest.raises(loop.Interrupted):
        script.main(change(config, eval_every=3))
    monkeypatch.undo()
    # Another tokenizer than the one of the run would make other data: the run's own must be read.
    monkeypatch.setattr(scratch, "train_tokenizer", lambda *arguments: pytest.fail("it trained another tokenizer"))
    script.main(change(config, eval_every=3, resume=True))
    whole = config.output.with_name("whole")
    assert same(config.output, whole)
    names = ("step", "loss/cross_entropy", "eval/loss", "lr")
    numbers = [[{k: row.get(k) for k in names} for row in read_metrics(run)] for run in (config.output, whole)]
    assert numbers[0] == numbers[1] and len(numbers[0]) > 5
    # One that ends early keeps the course of its learning rate up to there.
    short = change(config, output=config.output.with_name("short"), eval_every=3, end_after=3)
    monkeypatch.undo()
    assert script.main(short)["step"] == 3 and (short.output / "model").is_dir()
    early = [{k: row.get(k) for k in names} for row in read_metrics(short.output)]
    assert early == [row for row in numbers[0] if row["step"] <= 3]


@pytest.mark.campaign
def test_the_snapshot_of_the_lowest_held_out_loss_and_its_model_are_kept_beside_the_latest(config, monkeypatch):
    seen = []

    def scripted(lm, params, held_out, batch_size):
        seen.append(jax.device_get(params))
        return [9.0, 5.0, 1.0, 3.0, 1.5][min(len(seen), 5) - 1]  # before, and after each update

    monkeypatch.setattr(supervised, "mean_surprise", scripted)
    script.main(change(config, eval_every=1, save_every=1, keep=1, keep_best=True))
    last = len(seen) - 1
    with Checkpoints(config.output / "checkpoints", keep=1, keep_best=True) as checkpoints:
        assert checkpoints.steps() == [2, last] and checkpoints.best() == 2 and last > 3
    for name, params in {"model_best": seen[2], "model": seen[last]}.items():
        saved = jax.tree.leaves(pg.load(config.output / name)[1])
        assert all(np.array_equal(x, y) for x, y in zip(saved, jax.tree.leaves(params), strict=True))
    exported = {"best": export.Config(config.output, best=True), "last": export.Config(config.output, step=last)}
    monkeypatch.undo()
    for name, params in {"best": seen[2], "last": seen[last]}.items():
        saved = jax.tree.leaves(pg.load(export.main(exported[name]))[1])
        assert all(np.array_equal(x, y) for x, y in zip(saved, jax.tree.leaves(params), strict=True))
    wrong = {"step=3": "holds no snapshot of step 3: those of", "step=2,best": "best=True and step=2: give one"}
    for fields, said in wrong.items():
        with pytest.raises(pg.UserError, match=said):
            export.main(export.Config(config.output, step=int(fields[5]), best="best" in fields))
    monkeypatch.setattr(supervised, "mean_surprise", scripted)
    # The best stays the best, and what is kept may change, where the run goes on.
    script.main(change(config, eval_every=1, save_every=1, keep=3, keep_best=True, resume=True))
    assert np.array_equal(pg.load(config.output / "model_best")[1]["embed"]["tokens"], seen[2]["embed"]["tokens"])


@pytest.mark.campaign
def test_more_updates_compile_nothing_more(config, monkeypatch):
    # The bug: a batch of another shape or type at the end of an epoch, and a new program for it.
    jax.clear_caches()  # another test may have compiled the first run's programs already
    logprobs, traced = supervised.logprobs, []
    monkeypatch.setattr(supervised, "logprobs", lambda *arguments: traced.append(None) or logprobs(*arguments))
    script.main(config)
    few = len(traced)
    script.main(change(config, epochs=15, batch_size=4, eval_every=2, output=config.output.with_name("longer")))
    assert 0 < len(traced) - few <= few


def test_a_run_does_not_go_on_with_other_data(config):
    script.main(config)
    with Path(config.data).open("a") as file:
        file.write(json.dumps({"prompt": "the end is", "completion": " near"}) + "\n")
    with pytest.raises(ValueError, match="is of another run: data: "):
        script.main(change(config, resume=True))


def test_a_finished_run_is_not_overwritten(config):
    script.main(config)
    with pytest.raises(ValueError, match="is not empty"):
        script.main(config)
    with pytest.raises(ValueError, match="epochs: 4 in the run, 5 now"):
        script.main(change(config, epochs=5, resume=True))
    before = parameters(config.output)
    script.main(change(config, resume=True))  # nothing is left to do
    assert all(np.array_equal(a, b) for a, b in zip(before, parameters(config.output), strict=True))


@pytest.mark.campaign
def test_it_goes_on_from_a_checkpoint_and_learns_all_tokens_where_asked(config, tmp_path):
    model = save_tiny_model(tmp_path / "tiny")
    config = change(config, model=str(model), config=None)
    figures = script.main(config)
    assert figures["eval/perplexity"] < figures["eval/perplexity_before"]
    lm, _, tokenizer = pg.load(config.output / "model")
    assert lm.arch == pg.load(model)[0].arch and len(tokenizer) == len(pg.load(model)[2])
    everything = script.main(change(config, learn_prompt=True, output=tmp_path / "all"))
    assert everything["train/tokens"] > figures["train/tokens"]


@pytest.mark.parametrize("kind", campaign_but_for(["messages", "text", "chat", "csv", "txt"], "messages"))
def test_every_kind_of_rows_trains_from_scratch(config, tmp_path, kind):
    texts = [row["prompt"] + row["completion"] for row in pairs()]
    rows = {
        "text": [{"text": text} for text in texts],
        "messages": [
            {"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["completion"]}]}
            for p in pairs()
        ],
        "chat": pairs(),
    }
    if kind == "csv":
        source = tmp_path / "rows.csv"
        source.write_text("prompt,completion\n" + "".join(f'{p["prompt"]},"{p["completion"]}"\n' for p in pairs()))
    elif kind == "txt":
        source = tmp_path / "rows.txt"
        source.write_text("\n".join(texts))
    else:
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows[kind]))
    figures = script.main(change(config, data=str(source), chat=kind == "chat", epochs=6, learning_rate=1e-2))
    assert figures["eval/perplexity"] < 0.7 * figures["eval/perplexity_before"]


@pytest.mark.campaign
def test_the_tokenizer_is_the_same_in_another_process(tmp_path):
    # The bug: merges that depend on the order of a hash map, so that a run cannot be repeated.
    code = (
        "from pgjax.models.io.scratch import train_tokenizer as t; import hashlib;"
        "x = t([f'{a} {b} film number {a * b}' for a in range(40) for b in range(40)], 400);"
        "print(hashlib.sha256(x.backend_tokenizer.to_str().encode()).hexdigest(), len(x))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1 and said.pop().endswith(" 400\n")


def test_the_tokenizer_loses_nothing_and_adds_nothing():
    tokenizer = scratch.train_tokenizer(["a film"], 280)
    text = " Café\n\n\t日本 <b> a  film"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert scratch.small_architecture(2048).vocab_size == 2048


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch_size": 4, "microbatches": 3}, "batch_size=4 does not divide into microbatches=3"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"keep_best": True, "save_every": 10}, "save_every=10 is no multiple of eval_every=100"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"max_length": 65}, "max_length=65 is more than the model's 64 positions"),
        ({"learning_rate": math.nan}, "learning_rate must be finite"),
        ({"vocab_size": 301}, "vocab_size=301 is more than the 300 entries"),
        ({"vocab_size": 100}, "vocab_size=100 is too small"),
        ({"config": Path("no/config.json")}, "there is no such file"),
        ({"data": "no.jsonl"}, "no.jsonl: there is no such file"),
        ({"data": "no_such_module:rows"}, "no_such_module"),
        ({"model": "no-such-model", "config": None}, "'no-such-model' is not a model source"),
        ({"model": "x"}, "config and vocab_size are for a model from scratch"),
        ({"held_out_rows": 24}, "can't hold out 24 of 24 rows"),
        ({"chat": True, "data": f"{__name__}:texts"}, "plain texts cannot be rendered with a chat template"),
        ({"data": f"{__name__}:wrong"}, "row 0: the columns are 'question', 'answer'"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_its_folder_is_made(config, fields, said):
    with pytest.raises((ValueError, ImportError), match=said):
        script.main(change(config, **fields))
    assert not config.output.exists()


def texts() -> list[dict[str, str]]:
    return [{"text": "a film"}] * 8


def wrong() -> list[dict[str, str]]:
    return [{"question": "a", "answer": "b"}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "the configuration has no field|model_type"),
        ("[1]", "must hold a JSON object, not list"),
        ("{", "not JSON"),
    ],
)
def test_a_bad_architecture_names_its_file(config, content, said):
    config.config.write_text(content)
    with pytest.raises(ValueError, match=f"config.json:? .*({said})"):
        script.main(config)


def test_a_number_that_is_not_finite_stops_the_run(config, monkeypatch):
    update = supervised.update

    def poisoned(state, batch, **options):
        state, metrics = update(state, batch, **options)
        bad = jax.numpy.zeros((), bool)
        return state._replace(healthy=bad), {**metrics, "train/healthy": bad}

    monkeypatch.setattr(supervised, "update", poisoned)
    with pytest.raises(FloatingPointError, match="not finite in step 1"):
        script.main(config)


def test_the_command_line_says_errors_in_one_line_and_forgets_the_reviews_for_other_data(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.sft", "--data", str(tmp_path / "bad.jsonl"), "--output", str(tmp_path / "run")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "line 2: not JSON" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not logs.read_metrics(tmp_path / "run")
