"""What a task puts before the model: a batch as wide as its own prompts, and rows that are the same whoever reads them."""

import datetime
import decimal

import jax
import numpy as np
import pytest

import pgjax as pg
from pgjax.core.errors import UserError
from pgjax.parallel import batch_rows
from pgjax.parallel.encoding import decode, encode
from pgjax.rollout import task as tasks
from pgjax.rollout.sample import Rollout
from pgjax.rollout.task import make_task
from pgjax.run.checkpoint.resume import rows_digest
from tests.tiny_task import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_positions=4096)


@pytest.fixture(scope="module")
def loaded(model):
    return pg.load(model)


def task_of(loaded, *lengths, **options):
    """A task whose prompts have so many tokens, a letter each."""
    lm, _, tokenizer = loaded
    rows = [{"prompt": "a" * length} for length in lengths]
    return make_task(lm, tokenizer, [], None, [rows], chat=False, max_new_tokens=4, temperature=1.0, **options)


def test_one_long_prompt_widens_its_own_batches_alone(loaded):
    task = task_of(loaded, *[10] * 400, 2000)
    (prompts,) = task.prompt_sets
    assert task.padded(prompts[:8])[0].shape == (8, 10), "as without the long one"
    tokens, mask = task.padded(prompts[-8:])
    assert tokens.shape == (8, 2000)
    assert mask.sum(1).tolist() == [10] * 7 + [2000] and mask[:, -1].all()


def test_prompts_of_few_lengths_have_one_shape_and_those_of_many_have_few(loaded):
    task = task_of(loaded, *range(17, 24))
    assert {task.padded([prompt])[0].shape[1] for prompt in task.prompt_sets[0]} == {23}
    task = task_of(loaded, *range(1, 300))
    assert {task.padded([prompt])[0].shape[1] for prompt in task.prompt_sets[0]} == {
        16, 24, 32, 48, 64, 96, 128, 192, 256, 299,
    }  # fmt: skip


def test_a_process_pads_its_rows_to_the_length_of_the_whole_batch(loaded, monkeypatch):
    # The bug: processes that choose lengths of their own wait for each other for ever.
    task = task_of(loaded, 3, 3, 3, 100)
    monkeypatch.setattr(batch_rows, "rows_to_feed", lambda mesh, rows: [0, 1])
    tokens, mask = task.padded(task.prompt_sets[0])
    assert tokens.shape == (2, 100) and mask.sum(1).tolist() == [3, 3]


def test_an_evaluation_pads_batch_by_batch_and_fills_up_the_last(loaded, monkeypatch):
    widths = []

    def sample(lm, params, tokens, mask, key, **options):
        widths.append((tokens.shape, mask.sum(1).tolist()))
        return Rollout(*[np.zeros(tokens.shape)] * 4)

    monkeypatch.setattr(tasks, "sample", sample)
    task = task_of(loaded, 3, 4, 3, 100, 20)
    (prompts,) = task.prompt_sets
    key = jax.random.key(0)
    counts = [count for _, count, _ in task.rollouts(None, prompts, 2, key)]
    assert counts == [2, 2, 1]
    assert widths == [((2, 4), [3, 4]), ((2, 100), [3, 100]), ((2, 20), [20, 20])]


def test_an_evaluation_has_a_limit_of_its_own_and_counts_what_ended_by_itself(loaded):
    # The bug: a limit that cuts what training cuts hides that nothing ends.
    lengths = lambda prompts, completions, completion_ids, ended, **columns: [
        float(len(ids)) * (-1 if end else 1) for ids, end in zip(completion_ids, ended, strict=True)
    ]
    lm, params, tokenizer = loaded
    options = {"chat": False, "max_new_tokens": 4, "temperature": 1.0, "eval_max_new_tokens": 40}
    task = make_task(lm, tokenizer, [lengths], None, [[{"prompt": "ab"}, {"prompt": "c"}]], **options)
    figures = task.evaluate(params, task.prompt_sets[0], 8, 8, jax.random.key(0))
    judged = [
        task.for_evaluation().judge(fed, rollout)
        for fed, _, rollout in task.for_evaluation()._replace(group_size=8).rollouts(
            params, [prompt for prompt in task.prompt_sets[0] for _ in range(8)], 8, jax.random.key(0)
        )
    ]  # fmt: skip
    scores = np.concatenate([x.scores for x in judged])
    assert np.abs(scores).max() == 40 and figures["scores"] == pytest.approx(scores.mean())
    assert 0 < figures["ended"] == (scores < 0).mean() < 1
    assert figures["ended_stderr"] >= 0 and figures["rewards/lambda_stderr"] == figures["scores_stderr"]
    assert task.generate(params, task.prompt_sets[0], jax.random.key(0)).tokens.shape == (2, 2 + 4)
    with pytest.raises(UserError, match="eval_max_new_tokens=4096 leaves no room for a prompt in 4096 positions"):
        make_task(lm, tokenizer, [], None, [[{"prompt": "a"}]], **options | {"eval_max_new_tokens": 4096})


def test_the_limit_of_evaluations_leaves_no_training_prompt_out(loaded, capsys):
    lm, _, tokenizer = loaded
    options = {"chat": False, "max_new_tokens": 4, "temperature": 1.0, "eval_max_new_tokens": 4080}
    rows = [{"prompt": "a" * 100}, {"prompt": "a"}]
    task = make_task(lm, tokenizer, [], None, [rows, rows], **options)
    assert [len(prompts) for prompts in task.prompt_sets] == [2, 1]
    assert "held-out prompts: " in (told := capsys.readouterr().out) and "eval_max_new_tokens=4080 in the 4096" in told
    assert [len(prompts) for prompts in make_task(lm, tokenizer, [], None, [rows], **options).prompt_sets] == [1]


def test_processes_can_exchange_what_is_shown_of_prompts_with_dates(loaded):
    # The bug: with several processes, the first rollout of such a prompt ends the run.
    lm, _, tokenizer = loaded
    message = {"role": "user", "content": "a", "at": datetime.datetime(2026, 1, 2)}
    task = make_task(lm, tokenizer, [], None, [[{"prompt": [message]}]], chat=True, max_new_tokens=1, temperature=1.0)
    tokens = jax.numpy.int32([[5, 6]])
    judged = task.judge(task.prompt_sets[0], Rollout(tokens, tokens > 0, tokens > 5, jax.numpy.zeros((1, 2))))
    assert decode(encode(judged.shown))[0][1] == [{"role": "user", "content": "a", "at": "2026-01-02T00:00:00"}]


class Thing:
    """Its text holds its address."""


def test_the_digest_of_rows_is_the_same_in_every_process_and_tells_rows_apart():
    def row(**more):
        return {
            "prompt": "a", "at": datetime.datetime(2026, 1, 2), "price": decimal.Decimal("1.5"), "x": float("nan"),
            "thing": Thing(), "raw": b"a", "counts": {1: 2, "b": 3}, "array": np.arange(2000), **more,
        }  # fmt: skip

    first, second = row(tags={0, 8}), dict(reversed(row(tags={8, 0}).items()))
    assert list(first["tags"]) != list(second["tags"]) and list(first) != list(second)
    assert rows_digest([first]) == rows_digest([second])
    other = np.arange(2000)
    other[1000] = -1  # where the text of an array has dots
    changes = {
        "at": datetime.datetime(2026, 1, 3),
        "price": decimal.Decimal("1.6"),
        "x": None,
        "raw": b"b",
        "array": other,
    }
    rows = [row(), *(row(**{name: value}) for name, value in changes.items())]
    assert len({rows_digest([each]) for each in rows}) == len(rows)
