"""pass@k and majority@k: exact expectations by enumeration, and what an evaluation makes of them."""

import itertools
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import pgjax as pg
from pgjax.core.errors import UserError
from pgjax.learning import flags
from pgjax.rollout.attempts import NO_VOTE, Attempts, attempt_figures, majority_at, pass_at, votes_of
from pgjax.rollout.scoring import RewardError
from pgjax.rollout.task import make_task
from tests.tiny_task import save_tiny_model


@pytest.mark.parametrize("n, k", [(1, 1), (4, 1), (4, 2), (5, 3), (6, 6)])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_pass_at_k_is_unbiased_over_all_outcomes_of_n_attempts(n, k, p):
    expected = sum(
        math.prod(p if hit else 1 - p for hit in outcome) * pass_at(n, sum(outcome), k)
        for outcome in itertools.product([0, 1], repeat=n)
    )
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


def test_pass_at_k_is_the_share_of_subsets_with_a_success():
    for n, c in [(5, 2), (6, 1), (6, 5)]:
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_of_many_attempts_neither_overflows_nor_cancels():
    assert pass_at(10_000, 1, 100) == pytest.approx(0.01, rel=1e-12)
    assert pass_at(10_000, 5_000, 5_000) == 1.0


@pytest.mark.parametrize("n, k", [(3, 3), (4, 2), (5, 2)])
def test_majority_is_unbiased_over_all_outcomes_of_n_attempts(n, k):
    # Answers 0 (right), 1 and 2 (wrong), and none, with probabilities of their own.
    chance = {0: 0.4, 1: 0.35, 2: 0.15, NO_VOTE: 0.1}

    def worth(given):  # a draw among the commonest answers
        counts = {answer: given.count(answer) for answer in set(given) - {NO_VOTE}}
        best = [answer for answer, count in counts.items() if count == max(counts.values())]
        return best.count(0) / len(best) if best else 0.0

    def mean_of(length, value):
        return sum(
            math.prod(chance[x] for x in given) * value(given) for given in itertools.product(chance, repeat=length)
        )

    estimate = mean_of(n, lambda given: majority_at(given, [x == 0 for x in given], k))
    assert estimate == pytest.approx(mean_of(k, worth), abs=1e-14)


def test_errors_are_those_of_prompts_and_attempts_that_were_not_judged_are_none():
    nan = math.nan
    scores = [[1, 0, 0, nan], [0, 0, nan, nan], [1, 1, 1, 1]]
    figures = attempt_figures(scores, None, success=1.0)
    ones = [1 / 3, 0, 1]
    assert figures["pass@1"] == pytest.approx(np.mean(ones))
    assert figures["pass@1_stderr"] == pytest.approx(np.std(ones, ddof=1) / math.sqrt(3))
    assert figures["pass@2"] == pytest.approx(np.mean([2 / 3, 0, 1]))
    assert figures["pass@4"] == 1.0 and "pass@4_stderr" not in figures  # of the one prompt with four
    assert attempt_figures([[nan, nan]], None, success=1.0) == {}


@pytest.mark.parametrize("bad", [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_numbers_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match="are needed"):
        pass_at(*bad)
    with pytest.raises(ValueError, match="is needed"):
        majority_at([1, 1], [True, False], 3)


def test_answers_that_are_none_are_named():
    rows = [{"prompt": "a", "solution": "5"}] * 2
    for given, problem in [(["5"], "a list of 2 answers"), (["5", 5], "a text or None"), ("55", "a list of 2")]:
        with pytest.raises(RewardError, match=problem):
            votes_of(lambda prompts, completions, solution, given=given: given, rows, ["x", "y"], {})

    def broken(prompts, completions, solution):
        raise KeyError(solution[0])

    with pytest.raises(RewardError, match="KeyError"):
        votes_of(broken, rows, ["x", "y"], {})


def test_an_evaluation_reports_what_several_attempts_reach_whatever_its_batches(tmp_path):
    lm, params, tokenizer = pg.load(save_tiny_model(tmp_path / "tiny"))
    seen = []

    def early(prompts, completions, **columns):
        scores = [float(text[:1] < "m") for text in completions]
        seen.extend(zip(prompts, completions, scores, strict=True))
        return scores

    def first_letter(prompts, completions, completion_ids, **columns):
        return [
            text[:1].lower() if ids and text else None for text, ids in zip(completions, completion_ids, strict=True)
        ]

    task = make_task(
        lm, tokenizer, [early], None, [[{"prompt": "ab"}, {"prompt": "c"}]], chat=False, max_new_tokens=4,
        temperature=1.0, attempts=Attempts(1.0, "early", first_letter),
    )  # fmt: skip
    figures = task.evaluate(params, task.prompt_sets[0], 6, 8, jax.random.key(0))  # a last batch that is filled up
    scores = np.reshape([score for _, _, score in seen[:12]], (2, 6))
    votes = votes_of(
        lambda prompts, completions: first_letter(prompts, completions, [[1]] * 12),
        [{"prompt": prompt} for prompt, *_ in seen[:12]], [text for _, text, _ in seen[:12]], {},
    )  # fmt: skip
    wanted = attempt_figures(scores, votes.reshape(2, 6), 1.0)
    assert wanted["pass@1"] == pytest.approx(figures["scores"]) and 0 < figures["scores"] < 1
    assert {"pass@6", "majority@6", "majority@2_stderr"} <= set(wanted)
    assert {name: figures[name] for name in wanted} == wanted


def test_flags_that_say_nothing_together_are_refused():
    config = SimpleNamespace(**vars(flags.RewardFlags()), rewards=("m:f",), max_new_tokens=4)
    change = lambda **fields: SimpleNamespace(**vars(config) | fields)
    flags.check_rewards(change(success_score=1.0, success_metric="f", answers="m:g"), 1)
    for fields, problem in [
        ({"answers": "m:g"}, "success_score=None does not say which"),
        ({"success_score": math.nan}, "success_score must be finite"),
        ({"success_score": 1.0, "success_metric": "g"}, "success_metric='g' is none of scores, f"),
    ]:
        with pytest.raises(UserError, match=problem):
            flags.check_rewards(change(**fields), 1)
