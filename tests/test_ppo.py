"""The PPO script, whole, on a tiny model: what it learns, what it writes, what it refuses, and how it goes on."""

import dataclasses
import datetime
import functools
import inspect
import itertools
import json
import math
import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

import pgjax as pg
from experiments import ppo as script
from pgjax.learning import algorithms, flags, iteration
from pgjax.learning.evaluation import evaluate
from pgjax.learning.optimizer import accumulate, adamw, init_state
from pgjax.learning.policy_loss import policy_loss
from pgjax.parallel.sharding import fold_in
from pgjax.rollout import sample
from pgjax.rollout.scoring import RewardError
from pgjax.rollout.task import make_task, read_task
from pgjax.run import devices, exits, logs, loop, session, stop, summary
from pgjax.run.checkpoint.checkpoints import Checkpoints
from pgjax.run.curves import plot_curves
from tests.sizes import campaign_but_for
from tests.tiny_task import early_letters, save_tiny_model

pytestmark = pytest.mark.usefixtures("no_pictures")

METRICS = {
    "objective": ["kl", "entropy", "non_score_reward", "rlhf_reward", "scores"],
    "policy": ["approxkl_avg", "clipfrac_avg", "entropy_avg"],
    "loss": ["policy_avg", "value_avg"],
    "val": ["clipfrac_avg", "ratio", "ratio_var", "num_eos_tokens"],
    "completions": ["mean_length", "clipped_ratio"],
    "timing": ["rollout", "reward", "score", "update"],
    "perf": ["tokens_per_second"],
}
NAMES = ["lr", "episode", *(f"{group}/{name}" for group, names in METRICS.items() for name in names)]


class Box:
    """A black box whose behaviour a test sets; calls are counted from 0, the evaluation's first."""

    def __init__(self):
        self.calls = 0
        self.completions: list[list[str]] = []
        self.act = lambda call, scores: scores

    def __call__(self, prompts, completions, **columns):
        call, self.calls = self.calls, self.calls + 1
        self.completions.append(list(completions))
        self.prompts = list(prompts)
        return self.act(call, early_letters(prompts, completions))


BOX = Box()


def boxed(prompts, completions, **columns):
    return BOX(prompts, completions, **columns)


@pytest.fixture(autouse=True)
def fresh_box():
    BOX.__init__()
    return BOX


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def config(model, tmp_path) -> script.Config:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in ("a", "bcd", "ef", "ghij")))
    return script.Config(
        model=str(model), prompts=str(prompts), held_out=str(prompts), rewards=(f"{__name__}:boxed",), output=tmp_path / "run",
        steps=3, batch_size=8, max_new_tokens=6, minibatches=2, microbatches=2, learning_rate=1e-3, warmup_updates=0,
        eval_samples=2, samples_every=1, save_every=100,
    )  # fmt: skip


def change(config: script.Config, **fields) -> script.Config:
    return dataclasses.replace(config, **fields)


def final_state(config: script.Config, folder: Path | None = None):
    """Restore a run's last checkpoint."""
    lm, params, _ = pg.load(config.model)
    optimizer = adamw(1.0, updates=1)
    learner = init_state({"lm": params, "value": pg.init_value_head(lm.arch.width)}, optimizer)
    state = pg.State(learner, jnp.float32(0), jnp.int32(0), None)
    with Checkpoints((folder or config.output) / "checkpoints") as checkpoints:
        state, extra = checkpoints.restore(state)
        return jax.tree.map(np.asarray, state), extra["step"]


def test_it_learns_and_leaves_the_files_that_a_user_expects(config, model, monkeypatch):
    monkeypatch.setattr(session, "plot_curves", plot_curves)  # this one draws
    config = change(config, steps=20, batch_size=32, learning_rate=1e-2, kl_coef=0.0, eval_samples=16, samples_every=10)
    figures = script.main(config)
    assert figures["eval/rise_in_stderr"] > 4
    rows = logs.read_metrics(config.output)
    trained = [row for row in rows if "objective/scores" in row]
    assert [row["step"] for row in trained] == list(range(1, 21))
    assert all(math.isfinite(row[name]) for row in trained for name in NAMES)
    assert not {"perf/mfu", "perf/decode_mbu"} & trained[0].keys(), "of a device without published peaks"
    assert json.loads((config.output / "config.json").read_text())["learning_rate"] == 1e-2
    assert (config.output / "curves.png").stat().st_size > 1000
    assert list(config.output.glob("events*")), "TensorBoard's event file"
    samples = [json.loads(line) for line in (config.output / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "completion", "score", "step"} <= samples[0].keys()
    state, step = final_state(config)
    _, params, _ = pg.load(config.output / "policy")
    assert step == state.iterations == 20
    jax.tree.map(np.testing.assert_array_equal, params, state.learner.params["lm"])
    assert not np.array_equal(params["embed"]["tokens"], pg.load(model)[1]["embed"]["tokens"])


@pytest.mark.campaign
@pytest.mark.parametrize("temperature", campaign_but_for([1.0, 0.7], 0.7))
def test_nothing_moves_at_rate_zero(config, temperature):
    """Ratio 1 and KL exactly 0 in every minibatch of every step: one temperature, no dropout, a frozen reference, one frame."""
    script.main(change(config, learning_rate=0.0, epochs=2, temperature=temperature))
    for row in logs.read_metrics(config.output):
        if "val/ratio" in row:
            assert row["objective/kl"] == 0
            assert abs(row["val/ratio"] - 1) < 1e-5 and row["val/ratio_var"] < 1e-10
            assert row["policy/clipfrac_avg"] == 0
            assert row["val/sampler_gap"] < 1e-5


@pytest.mark.campaign
def test_the_key_moves_on_every_step_and_repeats_with_the_seed(config, fresh_box):
    one_prompt = Path(config.prompts)
    one_prompt.write_text('{"prompt": "say a"}\n')
    script.main(change(config, learning_rate=0.0))
    first = fresh_box.completions
    assert first[1] != first[2] and len(set(first[1])) > 1
    fresh_box.__init__()
    script.main(change(config, learning_rate=0.0, output=config.output.with_name("again")))
    assert fresh_box.completions == first
    fresh_box.__init__()
    script.main(change(config, learning_rate=0.0, seed=1, output=config.output.with_name("other")))
    assert fresh_box.completions[1] != first[1]


def test_a_resumed_run_ends_bit_for_bit_where_an_undisturbed_one_does(config, fresh_box):
    config = change(config, steps=4, kl_target=1.0)
    script.main(change(config, output=config.output.with_name("straight")))

    def interrupt(call, scores):
        if call == 2:  # the evaluation, step 1, step 2
            os.kill(os.getpid(), signal.SIGINT)
        return scores

    fresh_box.__init__()
    fresh_box.act = interrupt
    with pytest.raises(loop.Interrupted, match="stopped after step 2"):
        script.main(config)
    assert final_state(config)[1] == 2
    script.main(change(config, resume=True))
    straight, resumed = final_state(config, config.output.with_name("straight")), final_state(config)
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    steps = [row["step"] for row in logs.read_metrics(config.output) if "objective/scores" in row]
    assert steps == [1, 2, 3, 4]


def failing(value):
    def act(call, scores):
        if call == 3:  # the evaluation, step 1, step 2, step 3
            return value(scores)
        return scores

    return act


def raise_error(scores):
    raise RuntimeError("the judge is out")


@pytest.mark.parametrize(
    "value, message",
    [
        (raise_error, "the judge is out"),
        (lambda scores: scores[:-1], "7"),
        (lambda scores: [*scores[:-1], "good"], "good"),
        (lambda scores: [*scores[:-1], math.nan], "nan"),
        (lambda scores: [*scores[:-1], math.inf], "inf"),
    ],
    ids=["raises", "too few", "a word", "nan", "inf"],
)
def test_a_bad_reward_stops_the_run_and_saves_the_last_good_step(config, fresh_box, value, message):
    fresh_box.act = failing(value)
    with pytest.raises(RewardError, match=message) as stopped:
        script.main(config)
    assert stopped.value.prompt.startswith("say ") and stopped.value.completion in fresh_box.completions[3]
    assert final_state(config)[1] == 2
    fresh_box.__init__()
    script.main(change(config, resume=True))
    assert final_state(config)[1] == 3


def test_a_loss_that_is_not_finite_stops_the_run_in_its_step_and_saves_finite_parameters(config):
    """The first update of two makes parameters that the second one's loss overflows on."""
    with pytest.raises(FloatingPointError, match="not finite in step 1 "):
        script.main(change(config, learning_rate=1e30, kl_target=1.0, steps=1))
    state, step = final_state(config)
    assert step == 0 and np.isfinite(state.kl_coef)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.learner.params))


def test_from_the_second_step_on_nothing_compiles_and_no_transfer_is_hidden(config, fresh_box):
    compiled: list[str] = []

    def guard(call, scores):
        if call == 2:  # in step 2: everything has been compiled, report and snapshot of step 1 included
            jax.config.update("jax_transfer_guard", "disallow")
            jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
        if call == 5:  # the evaluation of the last step: drawing comes next
            jax.config.update("jax_transfer_guard", "allow")
            jax.monitoring.clear_event_listeners()
        return scores

    fresh_box.act = guard
    before = sample._generate._cache_size()
    try:
        # A length that no other test has, and a snapshot a step.
        script.main(change(config, steps=4, epochs=2, kl_target=1.0, max_new_tokens=5, save_every=1))
        assert sample._generate._cache_size() - before == 1, "sampler: training and evaluation share one program"
    finally:
        jax.config.update("jax_transfer_guard", "allow")
        jax.monitoring.clear_event_listeners()
    assert not [name for name in compiled if "backend_compile" in name]


def test_prompts_with_dates_are_sampled_from_written_and_gone_on_with(config, tmp_path):
    # The bug: a traceback after the first step, where its samples are written.
    day = datetime.datetime(2026, 1, 2)
    messages = [
        [{"role": "user", "content": f"say {x}", "at": day, "odds": math.nan}] for x in ("a", "bcd", "ef", "ghij")
    ]
    table = pyarrow.Table.from_pylist([{"prompt": prompt, "day": day} for prompt in messages])
    parquet.write_table(table, tmp_path / "prompts.parquet")
    config = change(config, prompts=str(tmp_path / "prompts.parquet"), held_out=None, held_out_rows=1)
    script.main(change(config, steps=1))
    sample = json.loads((config.output / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"][0]["at"] == "2026-01-02T00:00:00" and sample["prompt"][0]["odds"] is None
    script.main(change(config, steps=2, resume=True))


def test_early_stop_leaves_out_the_later_epochs(config):
    script.main(change(config, epochs=4, max_approx_kl=1e-9))
    rows = [row for row in logs.read_metrics(config.output) if "train/updates" in row]
    assert {row["train/updates"] for row in rows} == {2}


def test_the_truncation_penalty_reaches_the_reward_but_not_the_reported_score(config):
    script.main(change(config, truncation_penalty=5.0, steps=1))
    row = next(row for row in logs.read_metrics(config.output) if "objective/scores" in row)
    assert 0 <= row["objective/scores"] <= 1
    assert row["objective/rlhf_reward"] == pytest.approx(
        row["objective/scores"] - 5 * row["completions/clipped_ratio"], abs=1e-4
    )


def test_rewards_that_do_not_apply_are_counted_and_groups_without_spread_make_room(config, fresh_box, capsys):
    def some(call, scores):  # in the second half of each batch all score the same
        return scores if call == 0 else [None, *scores[1:4], *[0.5] * 4]

    fresh_box.act = some
    config = change(
        config, algorithm="rloo", group_size=4, minibatches=None, steps=2, resample_groups=1, overlong_tokens=2
    )
    script.main(config)
    rows = [row for row in logs.read_metrics(config.output) if "objective/scores" in row]
    assert [row["groups/resampled"] for row in rows] == [1, 1] and all(row["groups/zero_spread"] == 0.5 for row in rows)
    assert all(row["completions/not_judged"] == row["completions/left_out"] == 2 for row in rows)
    assert all(math.isfinite(row["loss/policy_avg"]) and math.isfinite(row["objective/rlhf_reward"]) for row in rows)
    out = capsys.readouterr().out
    assert out.count("completions: they are left out of the update") == 1 and "no reward applies to" in out
    fresh_box.__init__()
    with pytest.raises(pg.UserError, match="resample_metric='x' is none of scores, boxed"):
        script.main(change(config, resample_metric="x"))


def test_a_stop_in_an_evaluation_saves_the_step_and_the_run_that_goes_on_evaluates_it(config, fresh_box, monkeypatch):
    monkeypatch.setattr(stop, "GRACE", 0.0)

    def slow(call, scores):
        if call == 2:  # the evaluation before, step 1, the evaluation after it
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(20)
        return scores

    fresh_box.act = slow
    config, begun = change(config, steps=2, eval_every=1), time.monotonic()
    with pytest.raises(loop.Interrupted, match="stopped after step 1"):
        script.main(config)
    assert time.monotonic() - begun < 19
    assert [row["step"] for row in logs.read_metrics(config.output) if "eval/scores" in row] == [0]
    fresh_box.__init__()
    script.main(change(config, resume=True))
    assert [row["step"] for row in logs.read_metrics(config.output) if "eval/scores" in row] == [0, 1, 2]


@pytest.mark.campaign
def test_the_adaptive_coefficient_moves_against_the_kl(config):
    script.main(change(config, kl_target=1e-6, kl_coef=0.1, kl_horizon=80.0, learning_rate=1e-2, steps=4))
    rows = [row for row in logs.read_metrics(config.output) if "objective/kl_coef" in row]
    assert rows[0]["objective/kl"] == 0 and rows[1]["objective/kl"] != 0
    for row, after in itertools.pairwise(rows):
        error = min(max(row["objective/kl"] / 1e-6 - 1, -0.2), 0.2)
        assert after["objective/kl_coef"] == pytest.approx(row["objective/kl_coef"] * (1 + error * 8 / 80), rel=1e-5)


def loss_of(lm, **options):
    """PPO's loss as a function of parameters and batch, with an entropy bonus."""
    return functools.partial(policy_loss, lm=lm, algorithm=pg.ppo(entropy_coef=0.01, **options), temperature=1.0)


def small_batch(lm, rows=4, prompt=3, new=5):
    tokens = jax.random.randint(jax.random.key(1), (rows, prompt + new), 0, lm.arch.vocab_size)
    lengths = jnp.array([5, 1, 3, 4])[:rows]
    mask = jnp.concatenate([jnp.zeros((rows, 1), bool), jnp.arange(new)[None, :] < lengths[:, None]], axis=1)
    attention_mask = jnp.concatenate([jnp.ones((rows, prompt - 1), bool), mask.at[:, 0].set(True)], axis=1)
    keys = jax.random.split(jax.random.key(2), 4)
    noise = [jax.random.normal(key, mask.shape) for key in keys]
    return algorithms.Batch(tokens, attention_mask, mask, -3 + 0.1 * noise[0], *noise[1:])


@pytest.mark.campaign
def test_uneven_microbatches_do_not_change_the_ppo_gradient(model):
    lm, params, _ = pg.load(model)
    params = {"lm": params, "value": pg.init_value_head(lm.arch.width)}
    batch = small_batch(lm)
    loss_fn = loss_of(lm)
    accumulated = jax.jit(accumulate, static_argnums=(0, 4))
    whole, _ = accumulated(loss_fn, params, batch, batch.mask.sum(1), 1)
    parts, _ = accumulated(loss_fn, params, batch, batch.mask.sum(1), 4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6), whole, parts)


def test_what_stands_outside_the_mask_changes_no_gradient(model):
    lm, params, _ = pg.load(model)
    params = {"lm": params, "value": pg.init_value_head(lm.arch.width)}
    batch = small_batch(lm)
    spoil = lambda x: jnp.where(batch.mask, x, jnp.nan)
    spoilt = batch._replace(**{name: spoil(getattr(batch, name)) for name in batch._fields[3:7]})
    loss_fn = loss_of(lm, value_clip_eps=0.2)
    gradient = jax.jit(jax.grad(loss_fn, has_aux=True))
    jax.tree.map(np.testing.assert_array_equal, gradient(params, batch)[0], gradient(params, spoilt)[0])


def test_the_policy_loss_does_not_touch_the_value_head(model):
    lm, params, _ = pg.load(model)
    params = {"lm": params, "value": pg.init_value_head(lm.arch.width)}
    loss_fn = loss_of(lm, value_coef=0.0)
    grad, _ = jax.jit(jax.grad(loss_fn, has_aux=True))(params, small_batch(lm))
    assert all(not np.any(x) for x in jax.tree.leaves(grad["value"])) and np.any(grad["lm"]["embed"]["tokens"])


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"batch_size": 6},
            "batch_size=6 does not divide into minibatches=2 times microbatches=2: make it a multiple of 4",
        ),
        ({"temperature": 0.0}, "temperature must be above 0.*got 0.0"),
        ({"temperature": math.nan}, "temperature.*nan"),
        ({"temperature": 1e-45}, "temperature must be above 0.* from 1e-06 on, got 1e-45"),
        ({"top_k": 2**31}, "top_k must be from 1 to 2.31 - 1, or None, got 2147483648"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"kl_target": 6.0, "kl_horizon": 0.5}, "kl_horizon=0.5 lets an iteration .* make it more than"),
        ({"top_k": 0}, "top_k must be from 1 to .*, or None, got 0"),
        ({"clip_eps": -0.1}, "clip_eps must be at least 0, got -0.1"),
        ({"kl_coef": -1.0}, "kl_coef must be finite and at least 0, got -1.0"),
        ({"entropy_coef": math.inf}, "entropy_coef.*inf"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"discount": 1.5}, "discount must be above 0 and at most 1, got 1.5"),
        ({"reward_weights": (1.0, 2.0)}, "reward_weights must be a finite number for each"),
        ({"rewards": ("no_such_module:f",)}, "no_such_module"),
        ({"model": "no/such/model"}, "no/such/model"),
        ({"prompts": "nothing.jsonl"}, "nothing.jsonl"),
        ({"prompts": "experiments.tasks.haiku:nothing"}, "nothing"),
        ({"max_new_tokens": 63}, "max_new_tokens|tokens"),
        ({"max_new_tokens": 64}, "64 positions"),
    ],
)
def test_bad_input_gets_one_error_that_names_it(config, fields, message):
    with pytest.raises(ValueError, match=message):
        script.main(change(config, **fields))


@pytest.mark.parametrize(
    "text, message",
    [('{"prompt": "a"}\n{"prompt": \n', "2"), ("\n", "no rows|no prompts|empty"), ('{"text": "a"}\n', "prompt")],
    ids=["malformed line", "no rows", "no prompt column"],
)
def test_a_bad_prompt_file_is_named_with_its_line(config, text, message):
    Path(config.prompts).write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        script.main(config)
    assert "prompts.jsonl" in str(refused.value)
    assert not config.output.exists(), "nothing is written before the input is known to be good"


def test_another_run_is_never_overwritten(config):
    script.main(change(config, steps=1))
    before = {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="resume to go on with the run in it"):
        script.main(config)
    with pytest.raises(ValueError, match="learning_rate"):
        script.main(change(config, resume=True, learning_rate=0.5))
    assert before == {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()}


def test_every_field_is_explained_where_it_stands():
    """tyro shows the comment behind a field as its help; a comment on another line is lost."""
    kinds = (script.Config, flags.LearningFlags, flags.RewardFlags, session.RunFlags, devices.Flags)
    lines = [line for kind in kinds for line in inspect.getsource(kind).splitlines()]
    for field in dataclasses.fields(script.Config):
        line = next(line for line in lines if line.strip().startswith(f"{field.name}:"))
        assert len(line.partition("# ")[2].split()) >= 3, line


def test_a_run_is_resumed_from_where_its_folder_was_moved_to_and_a_finished_one_is_left_as_it_is(config):
    script.main(change(config, steps=1))
    moved = config.output.rename(config.output.with_name("moved"))
    rows = logs.read_metrics(moved)
    script.main(change(config, steps=1, output=moved, resume=True))
    assert logs.read_metrics(moved) == rows
    with pytest.raises(ValueError, match="steps=1 lies below the 2 steps"):
        script.main(change(config, steps=2, output=moved, resume=True))
        script.main(change(config, steps=1, output=moved, resume=True))
    assert json.loads((moved / "config.json").read_text())["steps"] == 2  # what is refused leaves it as it was
    (moved / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"metrics.jsonl holds 0 of the run's evaluations"):
        summary.before_and_after(moved, "eval/scores", last="objective/scores")


def test_a_constant_reward_ends_well(config, fresh_box):
    fresh_box.act = lambda call, scores: [True] * len(scores)
    assert script.main(change(config, steps=1))["eval/rise_in_stderr"] == 0.0


def empty_rows():
    return []


@pytest.mark.parametrize("function, message", [("empty_rows", "returns no rows"), ("failing", "failing")])
def test_rows_of_a_function_are_checked_too(config, function, message):
    with pytest.raises((ValueError, TypeError), match=message):
        script.main(change(config, prompts=f"{__name__}:{function}"))


def test_without_held_out_prompts_some_of_the_rows_are_kept_aside(config, fresh_box):
    seen: list[set[str]] = []
    fresh_box.act = lambda call, scores: seen.append(set(fresh_box.prompts)) or scores
    script.main(change(config, held_out=None, held_out_rows=2, steps=2))
    evaluated, *trained, again = seen
    assert len(evaluated) == 2 and evaluated == again
    assert set.union(*trained).isdisjoint(evaluated)


@pytest.mark.campaign
def test_the_best_policy_is_the_one_whose_held_out_score_is_the_best(config):
    """The bug: a state got the score of the policy before it, on the batch that it learned from."""
    config = change(
        config, steps=4, save_every=2, eval_every=1, learning_rate=3e-2, eval_samples=8, keep_best=True, keep=4
    )
    script.main(config)
    rows = {row["step"]: row for row in logs.read_metrics(config.output) if "eval/scores" in row}
    assert sorted(rows) == [0, 1, 2, 3, 4]
    with Checkpoints(config.output / "checkpoints", keep=4, keep_best=True) as checkpoints:
        saved, best = checkpoints.steps(), checkpoints.best()
    assert saved == [2, 4] and rows[2]["eval/scores"] != rows[4]["eval/scores"]
    assert best == max(saved, key=lambda step: rows[step]["eval/scores"])
    for step in saved:
        record = json.loads((config.output / "checkpoints" / str(step) / "record.json").read_text())
        assert record["score"] == rows[step]["eval/scores"]
    # again, from the files alone
    lm, params, tokenizer = pg.load(config.output / "policy_best")
    judges, row_sets, _ = read_task(config.rewards, config.prompts, config.held_out, config.held_out_rows)
    task = make_task(
        lm, tokenizer, judges, None, row_sets, chat=config.chat, max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
    )  # fmt: skip
    figures = evaluate(
        task, params, pg.load(config.model)[1], task.prompt_sets[1], samples=config.eval_samples,
        batch_size=config.batch_size, key=fold_in(jax.random.key(config.seed), 2**32 - 1),
    )  # fmt: skip
    assert figures == {name: pytest.approx(rows[best][name], abs=1e-5) for name in figures}
    assert figures["eval/scores_stderr"] > 0


def test_an_error_of_the_users_own_code_keeps_its_traceback(config, monkeypatch):
    """Only what names its own mend is one line; a plain ValueError may come from anywhere."""

    def refuse(*args, **options):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(script.pg, "load", refuse)
    with pytest.raises(ValueError, match="shapes do not match") as raised, exits.plain_errors():
        script.main(config)
    assert raised.traceback[-1].name == "refuse"
    with pytest.raises(SystemExit, match="error: steps must be at least 1, got 0"), exits.plain_errors():
        script.main(change(config, steps=0))


def test_equal_scores_teach_grpo_the_kl_alone_and_gently(config, fresh_box):
    """The bug: the group's spread divided the penalty too, so that rounding between log-probabilities became advantages."""
    fresh_box.act = lambda call, scores: [1.0] * len(scores)
    found = []

    def recorded(*args, **options):
        batch, *rest = experience(*args, **options)
        found.append(float(jnp.abs(batch.advantages).sum() / batch.mask.sum().astype(jnp.float32)))
        return batch, *rest

    experience = iteration.programs.experience  # with one update a rollout the sampler's rounding is in the KL
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iteration.programs, "experience", recorded)
        script.main(
            change(config, algorithm="grpo", kl_coef=0.005, steps=6, learning_rate=1e-2, minibatches=1)
        )  # the sampler's rounding is in the KL
    assert len(found) == 6 and 0 < max(found) < 0.05, found
