"""Best of n, the fitted forms, the figures read off runs; and RLHF with its study on a tiny model, from one end to the other."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from experiments import overoptimisation as over
from experiments import ppo, rlhf
from experiments.study import rlhf_report, rlhf_stages
from experiments.study.gao_forms import Curve, best_of, best_of_kl, distance, fit_best_of_n, fit_rl
from pgjax.run import logs
from pgjax.run.stages import finished

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_best_of_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(2, 3, 7))
    for n in range(1, 8):
        subsets = list(itertools.combinations(range(7), n))
        expected = [np.mean([gold[p, max(s, key=lambda i: proxy[p, i])] for s in subsets]) for p in range(3)]
        np.testing.assert_allclose(best_of(proxy, gold, n), expected, rtol=1e-12)


def test_best_of_one_is_the_mean_and_of_all_the_favourite():
    proxy, gold = [[3.0, 1.0, 2.0]], [[-1.0, 4.0, 6.0]]
    np.testing.assert_allclose(best_of(proxy, gold, 1), [3.0])
    np.testing.assert_allclose(best_of(proxy, gold, 3), [-1.0])


@pytest.mark.parametrize("n", [0, 4])
def test_best_of_more_samples_than_there_are_is_refused(n):
    with pytest.raises(ValueError, match="from 1 to the 3 samples"):
        best_of([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]], n)


def test_kl_of_best_of_n_is_that_of_the_favourite_of_distinct_samples():
    grid = (np.arange(1_000_000) + 0.5) / 1_000_000  # best-of-n of u ~ U(0, 1) has density n u^(n-1)
    for n in (1, 2, 8, 64):
        density = n * grid ** (n - 1)
        assert best_of_kl(n) == pytest.approx(np.mean(density * np.log(np.maximum(density, 1e-300))), abs=1e-3)


@pytest.mark.parametrize(
    ("fit", "form"), [(fit_best_of_n, lambda d: d * (0.7 - 0.2 * d)), (fit_rl, lambda d: d * (0.7 - 0.2 * np.log(d)))]
)
def test_fit_finds_the_coefficients_and_a_point_at_the_start_does_no_harm(fit, form):
    d = np.array([0.0, 0.3, 1.0, 2.0, 5.0])
    noise = np.array([0.4, 0.0, 0.0, 0.0, 0.0])  # at d = 0 log d is infinite, and the gain is 0 by definition
    gain = np.where(d > 0, form(np.maximum(d, 1e-9)), 0.0) + noise
    np.testing.assert_allclose(fit(d, gain), (0.7, 0.2), rtol=1e-9)


def test_two_forms_are_told_apart_by_their_bend():
    d = np.linspace(0.2, 6, 30)
    collapsed = d * (0.9 - 0.45 * np.log(d))
    a, b = fit_best_of_n(d, collapsed)
    assert np.abs(d * (a - b * d) - collapsed).max() > 0.05


def test_fit_of_a_single_point_is_refused():
    with pytest.raises(ValueError, match="two points"):
        fit_rl([0.0, 1.0], [0.0, 0.5])


def test_estimated_kl_below_zero_is_no_nan():
    assert distance([-0.01, 4.0]).tolist() == [0.0, 2.0]


def test_summary_takes_the_peak_of_the_mean_and_the_fall_from_it():
    kl = np.array([0.0, 1.0, 4.0, 9.0])
    runs = [Curve(kl, kl, np.array([0.0, 0.4, 0.8, 0.1])), Curve(kl, kl, np.array([0.0, 0.9, 0.6, 0.3]))]
    found = over.summary({0.0: runs}, Curve(kl, kl, kl / 10))["kl_coef=0"]
    assert (found["gold_peak"], found["kl_at_peak"]) == (
        pytest.approx(0.7),
        4.0,
    )  # not 0.85, the mean of each run's highest
    assert found["fall"] == pytest.approx(0.5) and found["smallest_fall"] == pytest.approx(0.3)
    assert (found["lowest_gold_after"], found["highest_gold_after"]) == (pytest.approx(0.1), pytest.approx(0.3))


def test_curve_reads_evaluations_and_not_the_training_steps(tmp_path):
    with logs.Writer(tmp_path) as writer:
        writer.write(0, {"eval/kl": 0.0, rlhf_report.PROXY: 0.1, "eval/rewards/my_gold": 0.5})
        writer.write(1, {"objective/kl": 7.0})
        writer.write(2, {"eval/kl": 2.0, rlhf_report.PROXY: 0.9, "eval/rewards/my_gold": 0.2})
    curve = over.curve(tmp_path)
    assert [x.tolist() for x in curve] == [[0.0, 2.0], [0.1, 0.9], [0.5, 0.2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_coefs": ()}, "kl_coefs"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"best_of": 256}, "best_of_samples"),
        ({"ppo": dataclasses.replace(over.PPO, eval_every=None)}, "eval_every"),
        ({"ppo": dataclasses.replace(over.PPO, kl_coef=0.4)}, "ppo.kl_coef"),
        ({"ppo": dataclasses.replace(over.PPO, seed=4)}, "ppo.seed"),
    ],
)
def test_study_that_cannot_work_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        over.main(dataclasses.replace(over.Config(rlhf=tmp_path / "r", output=tmp_path / "o"), **changes))
    assert list(tmp_path.iterdir()) == []


WORDS = ("good", "bad", "film", "dull", "lovely", "plot", "a", "the", "is", "not")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(rng, count):
    return " ".join(rng.choice(WORDS, count))


def tiny_rlhf(tmp_path):
    """A run of seconds: a model from scratch on texts of ten words."""
    rng = np.random.default_rng(0)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True,
        "hidden_act": "silu",
    }  # fmt: skip
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    return rlhf.Config(
        output=tmp_path / "rlhf", max_new_tokens=6,
        data=write(tmp_path / "data.jsonl", [{"text": words(rng, 8)} for _ in range(64)]), held_out_data=None,
        prompts=write(tmp_path / "prompts.jsonl", [{"prompt": words(rng, 2)} for _ in range(20)]), held_out_prompts=None,
        sft=dataclasses.replace(
            rlhf.SFT, config=tmp_path / "tiny.json", epochs=1, max_length=32, batch_size=4, held_out_rows=8, warmup_updates=1
        ),
        pair=rlhf.Pairs(train=32, held_out=8, batch_size=8),
        reward_model=dataclasses.replace(rlhf.REWARD_MODEL, epochs=1.0, batch_size=8),
        ppo=dataclasses.replace(rlhf.PPO, steps=2, batch_size=8, held_out_rows=4, eval_every=1),
    )  # fmt: skip


@pytest.mark.campaign
def test_rlhf_and_its_study_from_one_end_to_the_other(tmp_path, capsys):
    config = tiny_rlhf(tmp_path)
    figures = rlhf.main(config)
    pairs = [json.loads(line) for line in (tmp_path / "rlhf" / "pairs" / "train.jsonl").read_text().splitlines()]
    assert len(pairs) == 32 and figures["pairs/train_pairs"] == 32
    kept_aside = {row["prompt"] for row in rlhf_stages.read_prompts(config)[1]}
    assert not kept_aside & {pair["prompt"] for pair in pairs}  # what PPO is evaluated on was never judged
    assert {
        pair["prompt"] for pair in map(json.loads, (tmp_path / "rlhf" / "pairs" / "held_out.jsonl").open())
    } <= kept_aside
    ended = [answer.endswith("<|endoftext|>") for pair in pairs for answer in (pair["chosen"], pair["rejected"])]
    cut = [answer.count("<|endoftext|>") for pair in pairs for answer in (pair["chosen"], pair["rejected"])]
    assert (
        sum(ended) == sum(cut) < len(ended)
    )  # what ended a completion stays on it, and nothing is added to one cut off
    for name in ("ppo/eval/rewards/reward_model", "ppo/eval/rewards/gold_reward", "reward_model/eval/accuracy"):
        assert math.isfinite(figures[name])
    assert (tmp_path / "rlhf" / "rlhf.png").exists()

    study = over.Config(
        rlhf=config.output, output=tmp_path / "over", kl_coefs=(0.0, 0.2), seeds=(0,), held_out_rows=4, best_of=4,
        best_of_samples=8,
        ppo=dataclasses.replace(over.PPO, steps=2, batch_size=8, eval_every=1),
    )  # fmt: skip
    over.main(study)
    runs = [over.curve(tmp_path / "over" / f"kl_{kl}_seed_0") for kl in ("0", "0.2")]
    assert [len(run.kl) for run in runs] == [3, 3]
    assert runs[0].proxy[0] == runs[1].proxy[0]  # the same start, on the same prompts
    assert (tmp_path / "over" / "overoptimisation.png").exists() and "kl_0.2_seed_0" in (
        tmp_path / "over" / "samples.md"
    ).read_text()
    scores = json.loads((tmp_path / "over" / "best_of_n" / "scores.json").read_text())
    bests = finished(tmp_path / "over" / "best_of_n").metrics
    of_prompts = np.mean(scores["gold"], axis=1)
    assert bests["gold_stderr"][0] == pytest.approx(np.std(of_prompts, ddof=1) / np.sqrt(4))  # prompts, not samples
    assert bests["gold"][0] == pytest.approx(np.mean(scores["gold"])) and np.all(np.diff(bests["proxy"]) >= 0)
    capsys.readouterr()
    over.main(study)
    assert capsys.readouterr().out.count("complete, skipped") == 3


def test_study_of_a_run_without_gold_is_refused_by_name(tmp_path):
    asked = {"gold": None, "prompts": "p", "held_out_prompts": None, "ppo.held_out_rows": 4}
    for name in rlhf_stages.MADE_FROM:
        (tmp_path / "r" / name).mkdir(parents=True)
        record = {"config": asked, "made_from": {}, "id": name, "seconds": 1.0, "metrics": {}}
        (tmp_path / "r" / name / "complete.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="no gold score"):
        over.main(over.Config(rlhf=tmp_path / "r", output=tmp_path / "o"))


def test_ppo_of_the_study_optimises_the_proxy_and_only_watches_gold(tmp_path):
    config = tiny_rlhf(tmp_path)
    asked = rlhf_stages.stage_config(config, "ppo") | {"gold": "experiments.tasks.gold:gold_reward"}
    stage = over.Done(tmp_path / "ppo", "x", 1.0, {}, asked, skipped=True)
    study = over.Config(output=tmp_path / "o", held_out_rows=2)
    run = over.ppo_config(study, dict.fromkeys(rlhf_stages.MADE_FROM, stage))
    assert run.reward_weights == (0.0,) and run.reward_model_weight == ppo.Config().reward_model_weight == 1.0
    assert len((tmp_path / "o" / "held_out.jsonl").read_text().splitlines()) == 2
