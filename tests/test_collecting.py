"""Which rows are learned from, for which scores: penalties for length, and groups of equal scores sampled anew."""

import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.core.errors import UserError
from pgjax.learning.collecting import learned, refilled, take_rows
from pgjax.learning.iteration import Sampled
from pgjax.rollout.judged import Judged, joined
from pgjax.rollout.sample import Scored

NAN = np.nan


def judged(scores, lengths=None, ended=None, parts=None, tokens=None):
    size = len(scores)
    lengths = np.full(size, 2) if lengths is None else np.asarray(lengths)
    ended = np.ones(size, bool) if ended is None else np.asarray(ended)
    shown = [(i, "p", f"{i}: {score}") for i, score in enumerate(scores)]
    parts = {name: np.float32(x) for name, x in (parts or {}).items()}
    return Judged(np.float32(scores), parts, ended, lengths, shown, None if tokens is None else np.float32(tokens))


def rollout(numbers, length):
    """A rollout whose rows are told apart by a number, in a frame of so many entries; the window has 3."""
    frame, window = (jnp.asarray(np.repeat(np.asarray(numbers)[:, None], width, 1)) for width in (length, 3))
    real, of_window = frame.astype(jnp.float32), window.astype(jnp.float32)
    return Sampled(frame, frame > 0, frame > 0, real, Scored(*[of_window] * 3), of_window)


def test_penalties_for_length_are_those_of_dapo():
    lengths = [1, 6, 7, 8, 10, 10]
    found, kept = learned(
        judged([1] * 6, lengths, [True] * 5 + [False]), max_new_tokens=10, overlong_tokens=4, overlong_penalty=2.0,
        truncation_penalty=0.5,
    )  # fmt: skip
    assert found.tolist() == [1, 1, 0.5, 0, -1, -1.5] and kept is None


def test_rows_are_left_out_that_nothing_judged_or_that_were_cut():
    scores, kept = learned(judged([1, NAN, 3], ended=[True, True, False]), max_new_tokens=2, truncation_penalty=1.0)
    assert scores.tolist() == [1, 0, 2] and kept.tolist() == [True, False, True]
    scores, kept = learned(judged([1, 2, 3], ended=[True, True, False]), max_new_tokens=2, mask_truncated=True)
    assert scores.tolist() == [1, 2, 3] and kept.tolist() == [True, True, False]
    more = judged([3, NAN], tokens=[[1, 2, 0], [NAN] * 3], ended=[False, True])
    scores, kept = learned(more, max_new_tokens=3, truncation_penalty=5.0)
    assert scores.tolist() == [[1, -3, 0], [0, 0, 0]] and kept.tolist() == [True, False]
    assert learned(judged([1, 2]), max_new_tokens=2, keep=np.array([True, False]))[1].tolist() == [True, False]


def test_groups_of_equal_scores_give_their_places_to_others():
    first = judged([1, 1, 0, 1, NAN, 2, 5, 5], parts={"format": [0, 1, 1, 1, 0, 0, 0, 1]})
    draws = {
        1: (rollout(range(101, 109), 7), judged([4, 4, 4, 4, 8, 9, 4, 4], parts={"format": [0] * 8})),
        2: (rollout(range(201, 209), 4), judged([1, 2, 3, 4, 5, 6, 7, 8], parts={"format": [0] * 8})),
    }
    asked = []

    def draw(number):
        asked.append(number)
        return draws[number]

    start = rollout(range(1, 9), 5)
    sampled, found, keep, metrics = refilled(start, first, draw, most=2, group_size=2)
    assert np.asarray(sampled.tokens)[:, -1].tolist() == [105, 106, 3, 4, 201, 202, 203, 204]
    assert np.asarray(sampled.policy.values)[:, 0].tolist() == [105, 106, 3, 4, 201, 202, 203, 204]
    assert sampled.tokens.shape == (8, 7) and np.asarray(sampled.tokens)[2].tolist() == [0, 0, *[3] * 5]
    assert not np.asarray(sampled.attention_mask)[2, :2].any()
    assert found.scores.tolist() == [8, 9, 0, 1, 1, 2, 3, 4] and keep.all()
    assert [text for _, _, text in found.shown] == ["4: 8", "5: 9", "2: 0", "3: 1", "0: 1", "1: 2", "2: 3", "3: 4"]
    assert metrics == {"groups/zero_spread": 0.75, "groups/resampled": 2.0} and asked == [1, 2]
    _, found, keep, metrics = refilled(start, first, draw, most=1, group_size=2)
    assert keep.tolist() == [True] * 4 + [False] * 4 and metrics["groups/resampled"] == 1
    assert refilled(start, first, draw, most=0, group_size=2)[2].tolist() == [False] * 2 + [True] * 2 + [False] * 4
    same, _, keep, metrics = refilled(start, first, draw, most=None, group_size=2)
    assert same is start and keep is None and metrics == {"groups/zero_spread": 0.75}
    _, _, keep, metrics = refilled(start, first, draw, most=0, group_size=2, metric="format")
    assert keep.tolist() == [True] * 2 + [False] * 4 + [True] * 2 and metrics["groups/zero_spread"] == 0.75
    with pytest.raises(UserError, match="resample_metric='fromat' is none of scores, format"):
        refilled(start, first, draw, most=0, group_size=2, metric="fromat")
    assert refilled(start, first, draw, most=2, group_size=1)[2:] == (None, {})


def test_a_group_in_which_nothing_applies_has_no_spread():
    assert judged([NAN, NAN, NAN, 3, 3, NAN, 2, NAN, 3]).spread(3).tolist() == [False, False, True]


def test_a_score_rises_where_a_reward_model_applies_and_not_by_a_penalty():
    row = judged([NAN, 1.0], tokens=[[NAN] * 2, [0.5, 0.5]])
    assert np.isnan(row.plus(np.float32([-1, -1])).scores).tolist() == [True, False]
    found = row.plus(np.float32([-1, 2]), applies=True)
    assert found.scores.tolist() == [-1, 3] and found.token_scores.tolist() == [[0, -1], [0.5, 2.5]]


def test_what_processes_judged_is_joined_with_and_without_rewards_of_tokens():
    one, two = judged([1, NAN], [2, 1]), judged([3, 4], [1, 2], tokens=[[3, 0, 0], [1, 3, 0]])
    found = joined([([0, 2], one), ([1, 3], two)], max_new_tokens=3)
    np.testing.assert_array_equal(found.scores, np.float32([1, 3, NAN, 4]))
    np.testing.assert_array_equal(found.token_scores, np.float32([[0, 1, 0], [3, 0, 0], [NAN] * 3, [1, 3, 0]]))


def test_metrics_count_what_applies():
    found = judged([1, NAN, 3], parts={"a": [NAN] * 3, "b": [1, NAN, 5]}).metrics()
    assert found["objective/scores"] == 2 and found["completions/not_judged"] == 1
    assert np.isnan(found["rewards/a"]) and found["rewards/b"] == 3


def test_rows_are_taken_onto_the_shape_of_the_longer_rollout():
    found = take_rows(rollout([1, 2], 3), rollout([3, 4], 5), [3, 0])
    assert np.asarray(found.tokens).tolist() == [[4] * 5, [0, 0, 1, 1, 1]]
