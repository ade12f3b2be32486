"""The sentiment reward judges the completion, in [-1, 1], with the sign that people hear."""

import sys

import numpy as np
import pytest

from experiments.tasks import sentiment
from experiments.tasks.sentiment import HELD_OUT, OPENINGS, rows, sentiment_reward
from pgjax.rollout.rewards import check_reward, load_reward
from pgjax.rollout.scoring import score


def judge(*completions: str, prompt: str = "The film was") -> list[float]:
    return sentiment_reward([prompt] * len(completions), list(completions))


def test_praise_is_above_nothing_above_blame() -> None:
    best, good, none, empty, bad, not_good = judge(
        " WONDERFUL, I loved it!!!", " nice.", " on at nine.", "", " horrible, a disaster", " not good at all"
    )
    assert best > good > none > not_good > bad
    assert [none, empty] == [0, 0] and min(bad, -best) >= -1


def test_the_prompt_is_not_judged() -> None:
    assert judge(" on at nine.", prompt="The wonderful, lovely film was") == [0.0]


def test_openings_differ_and_lean_to_neither_side() -> None:
    openings = [opening.lower() for opening in (*OPENINGS, *HELD_OUT)]
    assert len(set(openings)) == len(openings) and len(OPENINGS) >= 60 and len(HELD_OUT) >= 16
    assert all(opening == opening.strip() for opening in openings)
    assert np.abs(sentiment_reward([""] * len(openings), openings)).max() == 0
    assert rows(["My new phone"]) == [{"prompt": "My new phone"}]


def test_the_reward_fits_the_contract() -> None:
    reward = load_reward("experiments.tasks.sentiment:sentiment_reward")
    check_reward(reward, ["topic"])
    scores, _ = score([reward], None, ["a", "b"], [" great", ""])
    assert scores[0] > 0.5 and scores[1] == 0


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    sentiment._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match=r"vaderSentiment.*\[demo\]"):
        judge("good")


def test_the_whole_text_counts_the_prompt_and_refuses_messages() -> None:
    prompts, completions = ["A wonderful, lovely film that was", "It was not"], [" on at nine.", " good."]
    whole = sentiment.whole_text_sentiment(prompts, completions)
    assert whole == sentiment_reward(prompts, [a + b for a, b in zip(prompts, completions, strict=True)])
    assert whole[0] > 0.5 and whole[1] < 0 < sentiment_reward(prompts, completions)[1]
    with pytest.raises(TypeError, match="plain texts, got a prompt of type list"):
        sentiment.whole_text_sentiment([[{"role": "user", "content": "hi"}]], ["a"])
