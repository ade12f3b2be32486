"""PPO against a reward model: what it is given, what its score counts, that it never changes, and what is refused."""

import copy
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from experiments import ppo as script
from pgjax.data.preferences import TEMPLATED
from pgjax.learning import iteration, programs
from pgjax.models.reward_model import from_causal_lm
from pgjax.rollout import judge, task
from pgjax.rollout.judge import load_judge, tokenizer_differences
from pgjax.rollout.scoring import RewardError
from pgjax.run import logs, presets
from tests.sizes import campaign_but_for
from tests.tiny_task import EARLY_LETTERS, early_letters, other_letters, save_tiny_model

pytestmark = pytest.mark.usefixtures("no_pictures")


class Box:
    """A black box that tells a test when it is called; calls are counted from 0, the evaluation's first."""

    def __init__(self):
        self.calls, self.act = 0, lambda call: None

    def __call__(self, prompts, completions, **columns):
        self.act(self.calls)
        self.calls += 1
        return [0.0] * len(completions)


BOX = Box()


def boxed(prompts, completions, **columns):
    return BOX(prompts, completions, **columns)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A policy, and a reward model on its body."""
    folder = tmp_path_factory.mktemp("models")
    policy = save_tiny_model(folder / "policy")
    lm, params, tokenizer = pg.load(policy)
    rm, params = from_causal_lm(lm, params, jax.random.key(7))
    pg.save_reward_model(folder / "reward_model", rm, params, tokenizer)
    return policy, folder / "reward_model"


@pytest.fixture(scope="session")
def foreign(folders, tmp_path_factory) -> Path:
    """A reward model whose tokenizer has the letters in another order, and room for 40 tokens alone."""
    folder = tmp_path_factory.mktemp("foreign")
    lm, _, tokenizer = pg.load(folders[0])
    lm = pg.causal_lm(dataclasses.replace(lm.arch, max_positions=40))
    rm, params = from_causal_lm(lm, lm.init(jax.random.key(3)), jax.random.key(4))
    pg.save_reward_model(folder / "rm", rm, params, other_letters(tokenizer))
    return folder / "rm"


@pytest.fixture
def config(folders, tmp_path) -> script.Config:
    prompts = tmp_path / "prompts.jsonl"
    words = ("a", "bcd", "ef", "ghij", "k", "lmn", "op", "qrs")
    prompts.write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in words))
    return script.Config(
        model=str(folders[0]), prompts=str(prompts), held_out=str(prompts), rewards=(), reward_model=str(folders[1]),
        output=tmp_path / "run", steps=2, batch_size=8, max_new_tokens=6, minibatches=1, microbatches=2,
        learning_rate=1e-2, warmup_updates=0, kl_coef=0.1, eval_samples=1, samples_every=1, save_every=100,
    )  # fmt: skip


def change(config: script.Config, **fields) -> script.Config:
    return dataclasses.replace(config, **fields)


@pytest.fixture
def seen(monkeypatch):
    """The rollouts and scores that `programs.experience` gets."""
    calls = []
    original = programs.experience

    def recorded(rollout, policy, ref_logprobs, scores, *others, **options):
        calls.append(jax.device_get((rollout, scores)))
        return original(rollout, policy, ref_logprobs, scores, *others, **options)

    monkeypatch.setattr(iteration.programs, "experience", recorded)
    return calls


def alone(rm, params, ids):
    """The score of one row by itself, without padding."""
    return float(rm.apply(params, jnp.asarray([ids], jnp.int32))[0])


def test_it_scores_the_policys_own_ids_read_at_the_last_sampled_token(config, seen, folders):
    """Prompts of every length, and a tokenizer whose padding is its end of sequence."""
    figures = script.main(config)
    rm, params, _ = pg.load_reward_model(folders[1])
    for rollout, scores in seen:
        known = [alone(rm, params, row[m]) for row, m in zip(rollout.tokens, rollout.attention_mask, strict=True)]
        np.testing.assert_allclose(scores, known, rtol=1e-4, atol=1e-5)
    assert np.std(seen[0][1]) > 0.01
    assert figures["rewards/reward_model"] == pytest.approx(seen[-1][1].mean(), rel=1e-5)
    assert figures["eval/rewards/reward_model"] == pytest.approx(figures["eval/scores"], rel=1e-5)
    samples = [json.loads(line) for line in (config.output / "samples.jsonl").read_text().splitlines()]
    assert all(sample["rewards/reward_model"] == pytest.approx(sample["score"]) for sample in samples)


@pytest.mark.campaign
def test_it_is_mixed_with_black_boxes_by_weight(config, seen, folders):
    config = change(
        config, rewards=(EARLY_LETTERS, f"{__name__}:boxed"), reward_weights=(2.0, 0.0), reward_model_weight=-0.5
    )
    script.main(config)
    rm, params, _ = pg.load_reward_model(folders[1])
    _, _, tokenizer = pg.load(folders[0])
    for rollout, scores in seen:
        texts = pg_texts(rollout, tokenizer)
        model = [alone(rm, params, row[m]) for row, m in zip(rollout.tokens, rollout.attention_mask, strict=True)]
        known = 2 * np.array(early_letters(texts, texts)) - 0.5 * np.array(model)
        np.testing.assert_allclose(scores, known, rtol=1e-4, atol=1e-5)
    row = logs.read_metrics(config.output)[-1]
    assert {"rewards/early_letters", "rewards/boxed", "rewards/reward_model"} <= row.keys()


def pg_texts(rollout, tokenizer):
    return [
        tokenizer.decode(row[m], skip_special_tokens=True) for row, m in zip(rollout.tokens, rollout.mask, strict=True)
    ]


@pytest.mark.parametrize("algorithm", campaign_but_for(["ppo", "rloo"], "rloo"))
def test_reference_and_reward_model_are_bit_identical_afterwards(config, monkeypatch, algorithm):
    kept = []

    def keeping(load):
        def loaded(source, **options):
            functions, params, tokenizer = load(source, **options)
            kept.append((params, jax.tree.map(np.array, params)))
            return functions, params, tokenizer

        return loaded

    monkeypatch.setattr(script.pg, "load", keeping(pg.load))
    monkeypatch.setattr(judge, "load_reward_model", keeping(pg.load_reward_model))
    script.main(change(config, algorithm=algorithm, epochs=2 if algorithm == "ppo" else 1))
    assert len(kept) == 2, "the policy's start, which is the reference, and the reward model"
    for params, before in kept:
        jax.tree.map(np.testing.assert_array_equal, params, before)
    trained = pg.load(config.output / "policy")[1]
    assert not np.array_equal(trained["embed"]["tokens"], kept[0][1]["embed"]["tokens"])


@pytest.mark.campaign
def test_from_the_second_step_on_nothing_compiles_and_no_transfer_is_hidden(config):
    compiled: list[str] = []

    def guard(call):
        if call == 2:  # in step 2: everything has been compiled, the report of step 1 included
            jax.config.update("jax_transfer_guard", "disallow")
            jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
        if call == 5:  # the evaluation of the last step: saving and drawing come next
            jax.config.update("jax_transfer_guard", "allow")
            jax.monitoring.clear_event_listeners()

    BOX.__init__()
    BOX.act = guard
    try:
        script.main(change(config, algorithm="rloo", steps=3, eval_every=2, rewards=(f"{__name__}:boxed",)))
    finally:
        jax.config.update("jax_transfer_guard", "allow")
        jax.monitoring.clear_event_listeners()
    assert BOX.calls == 6, "before, two steps, an evaluation, the last step and its evaluation"
    assert not [name for name in compiled if "backend_compile" in name]


@pytest.mark.campaign
def test_where_tokenizers_differ_texts_are_encoded_again_and_that_is_said_once(config, seen, foreign, folders, capsys):
    script.main(change(config, reward_model=str(foreign)))
    said = capsys.readouterr().out
    assert said.count("differ in vocabulary") == 1 and "encoded again" in said
    rm, params, other = pg.load_reward_model(foreign)
    _, _, tokenizer = pg.load(folders[0])
    prompt = slice(0, -config.max_new_tokens)
    for rollout, scores in seen:
        known = []
        for tokens, real, sampled in zip(rollout.tokens, rollout.attention_mask, rollout.mask, strict=True):
            asked = tokenizer.decode(tokens[prompt][real[prompt]])
            assert asked.startswith("<user>say ") and asked.endswith("<bot>")
            answer = tokenizer.decode(tokens[sampled], skip_special_tokens=True)
            ids = other(asked)["input_ids"] + other(answer)["input_ids"]
            ended = tokens[sampled][-1] == tokenizer.eos_token_id
            known.append(alone(rm, params, ids + [other.eos_token_id] * int(ended)))
        np.testing.assert_allclose(scores, known, rtol=1e-4, atol=1e-5)


def test_a_completion_that_ended_gets_the_reward_models_end_and_a_cut_one_does_not(foreign, folders):
    lm, _, tokenizer = pg.load(folders[0])
    judge = load_judge(str(foreign), 1.0, lm, tokenizer, chat=False)
    tokens, mask = judge.translated([{"prompt": "ab"}] * 2, ["cd", "cd"], np.array([True, False]))
    assert mask.sum(1).tolist() == [5, 4] and tokens[0, -1] == judge.tokenizer.eos_token_id
    assert tokens[1][mask[1]].tolist() == judge.tokenizer("abcd")["input_ids"]


def test_lengths_of_a_translation_come_in_buckets(foreign, folders):
    lm, _, tokenizer = pg.load(folders[0])
    judge = load_judge(str(foreign), 1.0, lm, tokenizer, chat=False)
    widths = {judge.translated([{"prompt": "ab"}], ["c" * n], np.array([True]))[0].shape[1] for n in range(1, 38)}
    assert widths == {16, 24, 32, 40}


def test_one_completion_too_long_for_the_reward_model_does_not_end_the_run(foreign, folders):
    lm, _, tokenizer = pg.load(folders[0])
    judge = load_judge(str(foreign), 1.0, lm, tokenizer, chat=False)
    tokens, mask = judge.translated([{"prompt": "ab"}], ["c" * 60], np.array([True]))
    assert mask.sum() == judge.rm.arch.max_positions == 40
    assert tokens[0].tolist() == judge.tokenizer("ab" + "c" * 38)["input_ids"]


def test_a_reward_model_that_saw_other_prompts_is_refused(folders, tmp_path):
    lm, _, tokenizer = pg.load(folders[0])
    rm, params, own = pg.load_reward_model(folders[1])
    own.init_kwargs[TEMPLATED] = False
    pg.save_reward_model(tmp_path / "plain", rm, params, own)
    load_judge(str(tmp_path / "plain"), 1.0, lm, tokenizer, chat=False)
    with pytest.raises(
        ValueError, match=r"was trained with chat=False, but the policy's prompts have chat=True.*set chat=False"
    ):
        load_judge(str(tmp_path / "plain"), 1.0, lm, tokenizer, chat=True)


def test_how_a_tokenizer_pads_makes_no_difference_and_what_it_reads_does(folders, foreign):
    _, _, policy = pg.load(folders[0])
    _, _, own = pg.load_reward_model(folders[1])
    assert own.pad_token != policy.pad_token and own.padding_side != policy.padding_side
    assert tokenizer_differences(policy, own, chat=True) == []
    assert tokenizer_differences(policy, pg.load_reward_model(foreign)[2], chat=True) == ["vocabulary"]
    other = copy.deepcopy(own)
    other.chat_template = "{{ messages }}"
    assert tokenizer_differences(policy, other, chat=False) == []
    assert tokenizer_differences(policy, other, chat=True) == ["chat template"]
    other = copy.deepcopy(own)
    other.add_tokens(["<|new|>"])
    assert tokenizer_differences(policy, other, chat=False) == ["added tokens"]


def test_parameters_spread_over_a_mesh_give_the_same_scores(folders):
    rm, params, _ = pg.load_reward_model(folders[1])
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    _, spread, _ = pg.load_reward_model(folders[1], mesh=mesh)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(spread))
    tokens = jax.random.randint(jax.random.key(0), (4, 9), 0, 200)
    mask = jnp.arange(9)[None, :] < jnp.array([[9], [3], [5], [1]])
    one, four = (np.asarray(judge._scores(rm, x, tokens, mask)) for x in (params, spread))
    np.testing.assert_allclose(one, four, rtol=1e-5)


def test_a_score_that_is_not_finite_stops_the_run_and_names_the_row(config, monkeypatch):
    original = pg.load_reward_model

    def broken(source, **options):
        rm, params, tokenizer = original(source, **options)
        return rm, params | {"score": {"kernel": params["score"]["kernel"] * jnp.nan}}, tokenizer

    monkeypatch.setattr(judge, "load_reward_model", broken)
    with pytest.raises(RewardError, match=r"reward 'reward_model' returned nan in row 0") as stopped:
        script.main(config)
    assert stopped.value.prompt.startswith("say ")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"reward_model": "no-such-model"}, "no-such-model"),
        ({"reward_model_weight": float("nan")}, "reward_model_weight must be finite, got nan"),
        (
            {"max_new_tokens": 30},
            r"no row is left: training prompts: left out 8 rows, .* max_new_tokens=30 in the 40 positions of the reward model",
        ),
    ],
)
def test_bad_input_is_named_before_anything_is_computed(config, foreign, fields, message):
    with pytest.raises(ValueError, match=message):
        script.main(change(config, **({"reward_model": str(foreign)} | fields)))
    assert not config.output.exists()


def test_a_language_model_is_no_reward_model(config, folders):
    with pytest.raises(ValueError, match="not a reward model"):
        script.main(change(config, reward_model=str(folders[0])))
    assert not config.output.exists()


@pytest.mark.parametrize(
    "arguments, rewards, held_out",
    [
        ([], ("experiments.tasks.haiku:haiku_reward",), True),
        (["--reward-model", "x"], (), True),
        (["sentiment", "--reward-model=x"], (), True),
        (["--reward_model", "x", "--rewards", "math:fsum"], ("math:fsum",), True),
        (["--reward-model", "x", "--prompts", "y"], (), False),
        (["--reward-model-weight", "2"], ("experiments.tasks.haiku:haiku_reward",), True),
    ],
)
def test_a_reward_model_takes_the_place_of_the_presets_black_box_unless_rewards_are_named(arguments, rewards, held_out):
    found = presets.parse(script.PRESETS, goes_with=script.GOES_WITH, args=arguments)
    assert found.rewards == rewards and (found.held_out is not None) == held_out


def test_judging_without_any_black_box_counts_from_zero(folders):
    lm, _, tokenizer = pg.load(folders[0])
    built = task.make_task(
        lm, tokenizer, [], None, [[{"prompt": "a"}]], chat=False, max_new_tokens=2, temperature=1.0
    )  # fmt: skip
    rollout = pg.Rollout(*(jnp.asarray(x) for x in ([[66, 67, 0]], [[True] * 3], [[False, True, True]], [[0.0] * 3])))
    judged = built.judge(built.prompt_sets[0], rollout)
    assert judged.scores.tolist() == [0.0] and judged.parts == {} and judged.ended.tolist() == [True]
