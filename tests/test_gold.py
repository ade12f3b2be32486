"""The gold score and the coin that turns it into preferences."""

import numpy as np
import pytest

from experiments.tasks.gold import gold_reward, prefers_first, repeated_share
from experiments.tasks.sentiment import sentiment_reward


def test_case_and_punctuation_do_not_hide_a_repeated_word():
    assert repeated_share("Good, good. GOOD! it's it\u2019s") == pytest.approx(1 - 3 / 5)


def test_text_without_words_is_not_divided_by_zero():
    assert repeated_share("") == repeated_share("?! --") == 0.0
    assert gold_reward([""], ["!"]) == [0.0]


def test_gold_judges_prompt_and_completion_as_one_text():
    (together,) = gold_reward(["a dull film"], [" and a dull ending"])
    text = "a dull film and a dull ending"
    assert together == pytest.approx(sentiment_reward([""], [text])[0] - 1.5 * 2 / 7)  # "a" and "dull" come again
    (completion_alone,) = gold_reward([""], [" and a dull ending"])
    assert completion_alone != pytest.approx(together)


def test_praise_said_over_and_over_scores_below_praise_said_once():
    once, over = gold_reward(["The film was"] * 2, [" a lovely surprise.", " lovely lovely lovely lovely lovely."])
    assert once > over + 0.3


def test_messages_are_judged_by_their_contents():
    messages = [{"role": "user", "content": "Tell me of a lovely day"}]
    assert gold_reward([messages], ["gladly"]) == gold_reward(["Tell me of a lovely day\n"], ["gladly"])


def test_coin_follows_the_bradley_terry_probability():
    gaps = np.array([-0.8, 0.0, 0.3, 1.1])
    first = np.repeat(gaps, 20_000).tolist()
    won = prefers_first(first, [0.0] * len(first), scale=4.0, seed=3)
    share = np.asarray(won).reshape(4, -1).mean(1)
    np.testing.assert_allclose(share, 1 / (1 + np.exp(-4.0 * gaps)), atol=0.012)  # 3 standard errors of 20,000 tosses


def test_coin_depends_on_the_seed_and_not_on_the_other_pairs():
    first, second = [0.1] * 200, [0.0] * 200
    won = prefers_first(first, second, scale=1.0, seed=0)
    assert won == prefers_first(first, second, scale=1.0, seed=0) != prefers_first(first, second, scale=1.0, seed=1)
    assert won[:50] == prefers_first(first[:50], second[:50], scale=1.0, seed=0)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_scale_that_is_no_scale_is_refused(scale):
    with pytest.raises(ValueError, match="scale"):
        prefers_first([0.0], [0.0], scale=scale, seed=0)
