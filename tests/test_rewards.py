"""Rewards are black boxes of the user's: whatever they return is either taken whole or refused with its row."""

import asyncio
import fractions
import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.rollout.calling import Caller
from pgjax.rollout.rewards import check_reward, load_reward, reward_names
from pgjax.rollout.scoring import RewardError, score

PROMPTS = ["first prompt", "second prompt", "third prompt"]
COMPLETIONS = ["one", "two", "three"]


def returning(values: Any) -> Callable[..., Any]:
    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> Any:
        return values

    return reward


def run(*rewards: Callable[..., Any], weights: Sequence[float] | None = None, **columns: Sequence[Any]) -> Any:
    return score(rewards, weights, PROMPTS, COMPLETIONS, columns)


def failure(values: Any) -> RewardError:
    with pytest.raises(RewardError) as caught:
        run(returning(values))
    return caught.value


def test_fractions_survive_beside_integers() -> None:
    scores, parts = run(returning([1, 0.9, 0]))
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, np.asarray([1, 0.9, 0], np.float32))
    np.testing.assert_array_equal(parts["reward"], scores)


@pytest.mark.parametrize(
    "values",
    [
        (1, 2.5, -3),
        np.asarray([1, 2.5, -3], np.float16),
        [np.int64(1), np.float32(2.5), np.asarray(-3)],
        jnp.asarray([1, 2.5, -3], jnp.bfloat16),
        [jnp.asarray(1, jnp.int32), jnp.asarray(2.5, jnp.bfloat16), fractions.Fraction(-3)],
    ],
)
def test_numbers_of_every_kind_are_taken(values: Any) -> None:
    np.testing.assert_array_equal(run(returning(values))[0], np.asarray([1, 2.5, -3], np.float32))


def test_an_exact_match_may_return_truth_values() -> None:
    np.testing.assert_array_equal(run(returning([True, False, np.bool_(True)]))[0], np.asarray([1, 0, 1], np.float32))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (math.nan, "finite"),
        (math.inf, "finite"),
        (-math.inf, "finite"),
        (np.float32(math.nan), "finite"),
        (jnp.asarray(math.nan), "finite"),
        (1e39, "too large for float32"),
        (-1e39, "too large for float32"),
        (10**400, "too large for a float"),
        ("0.5", "return a number"),
        (1j, "return a number"),
        ([0.5], "return a number"),
        (np.asarray([0.5]), "return a number"),
        (np.datetime64("2020-01-01"), "return a number"),
        ({}, "return a number"),
    ],
)
def test_a_bad_value_is_refused_with_its_row(bad: Any, said: str) -> None:
    error = failure([0.5, bad, math.nan])
    assert (error.row, error.prompt, error.completion, error.reward) == (1, "second prompt", "two", "reward")
    assert error.value is bad
    for part in (said, "'reward'", "row 1 of 3", "'second prompt'", "'two'", type(bad).__name__):
        assert part in str(error)


def test_a_masked_entry_is_no_zero() -> None:
    masked = np.ma.array([0.5, 1.0, 2.0], mask=[False, False, True])
    assert failure(masked).row == failure(list(masked)).row == 2
    assert score([returning(np.ma.array([0.5, 1.0]))], None, ["a", "b"], ["c", "d"])[0].tolist() == [0.5, 1.0]


def test_nan_inside_an_array_is_found() -> None:
    assert failure(np.asarray([0.5, 1.0, math.nan])).row == 2


@pytest.mark.parametrize("values", [[], [0.5], [0.5] * 4, np.zeros(2)])
def test_a_wrong_number_of_values_is_refused(values: Any) -> None:
    error = failure(values)
    assert f"{len(values)} values for 3 completions" in str(error)
    assert "a batch of 3" in str(error) and error.prompt == "first prompt"


@pytest.mark.parametrize(
    "values", [None, 0.5, "abc", {0: 1, 1: 2, 2: 3}, {1.0, 2.0, 3.0}, np.zeros((3, 1)), np.zeros(())]
)
def test_something_else_than_a_list_is_refused(values: Any) -> None:
    assert f"of type {type(values).__name__}, not a list of 3 numbers" in str(failure(values))


def test_a_generator_is_refused_rather_than_half_read() -> None:
    assert "not a list" in str(failure(x for x in (1.0, 2.0, 3.0)))


def test_a_reward_that_raises_is_called_once_and_its_exception_is_chained() -> None:
    calls = []

    def broken(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        calls.append(len(completions))
        raise KeyError("judge")

    with pytest.raises(RewardError, match="'broken' raised KeyError: 'judge'") as caught:
        run(broken)
    assert calls == [3]
    assert isinstance(caught.value.__cause__, KeyError)
    assert (caught.value.prompt, caught.value.completion, caught.value.value) == ("first prompt", "one", None)


def test_a_reward_that_leaves_does_not_end_the_run_in_silence() -> None:
    def leaving(**arguments: Any) -> list[float]:
        sys.exit(0)

    with pytest.raises(RewardError, match="'leaving' raised SystemExit: 0"):
        run(leaving)


def test_a_cancelled_judge_is_one_that_failed() -> None:
    def cancelled(prompts: list[str], completions: list[str]) -> list[float]:
        raise asyncio.CancelledError

    with pytest.raises(RewardError, match="'cancelled' raised CancelledError"):
        score([cancelled], None, ["p"], ["c"])


def test_a_reward_that_changes_what_the_lists_hold_disturbs_nobody() -> None:
    prompts, columns = [[{"role": "user", "content": "Hi"}]], {"ref": [[1, {"a": [2]}]], "thing": [print]}
    seen = []

    def spoils(prompts: Any, completions: Any, ref: Any, thing: Any) -> list[float]:
        seen.append((prompts[0][0]["content"], ref[0][1]["a"][0], thing[0]))
        prompts[0][0]["content"], ref[0][1]["a"][0] = "Bye", 3
        return [0.0]

    score([spoils, spoils], None, prompts, ["c"], columns)
    assert seen == [("Hi", 2, print)] * 2
    assert prompts == [[{"role": "user", "content": "Hi"}]] and columns["ref"] == [[1, {"a": [2]}]]


def test_an_interrupt_is_no_reward_error() -> None:
    def interrupted(**arguments: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupted)


def test_long_texts_are_shortened_in_the_message_only() -> None:
    with pytest.raises(RewardError) as caught:
        score([returning([math.nan])], None, ["p" * 5000], ["c"])
    assert len(str(caught.value)) < 1200
    assert caught.value.prompt == "p" * 5000


def test_weights_multiply_and_parts_stay_unweighted() -> None:
    scores, parts = run(returning([1, 2, 3]), returning([0.5, 0, -1]), weights=[2, -0.5])
    np.testing.assert_allclose(scores, [1.75, 4, 6.5])
    assert list(parts) == ["reward", "reward_2"]
    np.testing.assert_array_equal(parts["reward_2"], np.asarray([0.5, 0, -1], np.float32))


def test_a_weight_of_zero_is_kept() -> None:
    np.testing.assert_array_equal(run(returning([1, 2, 3]), weights=[0.0])[0], np.zeros(3))


def test_a_weighted_sum_beyond_float32_is_refused() -> None:
    with pytest.raises(RewardError, match="weighted sum") as caught:
        run(returning([0, 3e38, 0]), weights=[10])
    assert (caught.value.row, caught.value.completion) == (1, "two")


def test_a_score_whose_square_is_beyond_float32_is_refused_and_a_weight_mends_it() -> None:
    # The bug: a variance of infinity, and so advantages of 0 without a word.
    with pytest.raises(RewardError, match="too large for learning in float32: lower the weights"):
        run(returning([0, 1e19, 0]))
    np.testing.assert_allclose(run(returning([0, 1e19, 0]), weights=[1e-19])[0], [0, 1, 0])


@pytest.mark.parametrize("weights", [[], [1.0, 1.0], [math.nan], [math.inf], ["1"], [True], [None]])
def test_bad_weights_are_refused_before_the_reward_is_called(weights: Any) -> None:
    def never(**arguments: Any) -> list[float]:
        raise AssertionError("called")

    with pytest.raises(ValueError, match="weight") as caught:
        run(never, weights=weights)
    assert not isinstance(caught.value, RewardError)


def test_columns_reach_the_reward_row_by_row() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: list[str], completions: list[str], answer: list[int], **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, answer=answer, columns=columns)
        return [float(len(text) == n) for text, n in zip(completions, answer, strict=True)]

    scores, _ = run(reward, answer=(3, 4, 5), topic=["a", "b", "c"])
    np.testing.assert_array_equal(scores, [1, 0, 1])
    assert seen == {
        "prompts": PROMPTS, "completions": COMPLETIONS, "answer": [3, 4, 5], "columns": {"topic": ["a", "b", "c"]}
    }  # fmt: skip


def test_a_reward_that_changes_its_lists_disturbs_nobody() -> None:
    def vandal(prompts: list[str], completions: list[str], note: list[str]) -> list[float]:
        completions.clear()
        note.clear()
        return [0.0] * 3

    def lengths(prompts: list[str], completions: list[str], note: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    note = ["x", "y", "z"]
    np.testing.assert_array_equal(run(vandal, lengths, note=note)[0], [3, 3, 5])
    assert COMPLETIONS == ["one", "two", "three"] and note == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("prompts", "completions", "columns", "said"),
    [
        (["a"], ["b", "c"], {}, "1 prompts and 2 completions"),
        ([], [], {}, "0 prompts"),
        (["a"], ["b"], {"topic": ["x", "y"]}, "'topic' holds 2 values for 1"),
        (["a"], ["b"], {"completions": ["x"]}, "'completions'"),
    ],
)
def test_lists_that_do_not_pair_up_are_refused(prompts: Any, completions: Any, columns: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        score([returning([0.5])], None, prompts, completions, columns)
    with pytest.raises(ValueError, match="no reward"):
        score([], None, ["a"], ["b"])


def test_names_are_unique_even_where_one_looks_like_a_copy() -> None:
    def reward_2() -> list[float]:
        return []

    class Judge:
        def __call__(self, **arguments: Any) -> list[float]:
            return []

    names = reward_names([returning(0), reward_2, returning(1), returning(2), lambda: [], Judge()])
    assert names == ["reward", "reward_2", "reward_3", "reward_4", "lambda", "Judge"]


def write_module(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_reward_is_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(tmp_path, "my_reward_a", "def half(prompts, completions):\n    return [0.5] * 3", monkeypatch)
    np.testing.assert_array_equal(run(load_reward("my_reward_a:half"))[0], [0.5] * 3)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("my_reward_b", "module:function"),
        ("my_reward_b:", "module:function"),
        (":half", "module:function"),
        ("my_reward_b:half:x", "module:function"),
        ("./my_reward_b.py:half", "module:function"),
        ("no_such_module_anywhere:half", "there is no module 'no_such_module_anywhere'"),
        ("my_reward_b.inner:half", "there is no module 'my_reward_b.inner'|'my_reward_b' is not a package"),
        ("my_reward_b:hafl", "no 'hafl'; it has half"),
        ("my_reward_b:NUMBER", "'NUMBER' is of type int, not a function"),
    ],
)
def test_a_wrong_name_is_explained(spec: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(tmp_path, "my_reward_b", "NUMBER = 3\ndef half(prompts, completions): return []", monkeypatch)
    with pytest.raises(ValueError, match=said) as caught:
        load_reward(spec)
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_package_x", "needs 'no_such_package_x', which isn't installed"),
        ("1 / 0", "raised ZeroDivisionError"),
        ("def f(:", "raised SyntaxError"),
    ],
)
def test_a_module_that_fails_is_not_called_missing(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(tmp_path, "my_reward_c", text, monkeypatch)
    with pytest.raises(ValueError, match=said) as caught:
        load_reward("my_reward_c:half")
    assert caught.value.__cause__ is not None


def test_the_signature_is_checked_before_any_compute() -> None:
    check_reward(returning([0.5]), ["topic"])
    check_reward(lambda prompts, completions, topic: [], ["topic"])
    check_reward(lambda completions, **rest: [], ["topic"])
    with pytest.raises(ValueError, match=r"topic.*def reward\(prompts, completions, \*\*columns\)"):
        check_reward(lambda prompts, completions: [], ["topic"])
    with pytest.raises(ValueError, match="answer"):
        check_reward(lambda prompts, completions, answer: [])
    with pytest.raises(ValueError, match="'prompts'"):
        check_reward(returning([0.5]), ["prompts"])


def test_a_reward_that_does_not_apply_is_left_out_of_its_rows_sum() -> None:
    scores, parts = run(returning([1, None, None]), returning([None, 2, None]), weights=[2, 0.5])
    np.testing.assert_array_equal(scores, np.float32([2, 1, math.nan]))
    np.testing.assert_array_equal(parts["reward_2"], np.float32([math.nan, 2, math.nan]))
    watched, _ = run(returning([None, 1, None]), returning([5, 5, 5]), weights=[1, 0])
    np.testing.assert_array_equal(watched, np.float32([math.nan, 1, math.nan]))  # a weight of 0 counts for nothing
    with pytest.raises(RewardError, match="not a list of 3 numbers"):
        run(returning(None))


def test_rewards_of_tokens_stand_at_their_tokens_and_others_at_the_last() -> None:
    tokens = returning([[1, 2, 3], np.asarray([4.0]), None])
    scores, parts = score([tokens, returning([10, None, 30])], [1, 0.5], PROMPTS, COMPLETIONS, lengths=[3, 1, 2])
    np.testing.assert_array_equal(scores, np.float32([[1, 2, 8], [4, 0, 0], [0, 15, 0]]))
    np.testing.assert_array_equal(parts["reward"], np.float32([6, 4, math.nan]))
    none = score([tokens], None, PROMPTS, COMPLETIONS, lengths=[3, 1, 2])[0]
    assert np.isnan(none[2]).all() and none[:2].tolist() == [[1, 2, 3], [4, 0, 0]]
    for values, said in {((1, 2), 1.0, 1.0): "2 numbers for the 3 tokens", ((1, 2, "x"), 1.0, 1.0): "token 2"}.items():
        with pytest.raises(RewardError, match=said) as caught:
            score([returning(values)], None, PROMPTS, COMPLETIONS, lengths=[3, 1, 2])
        assert caught.value.row == 0


def test_async_rewards_are_awaited_at_the_same_time_on_one_loop_that_stays() -> None:
    loops, ready = set(), {"a": asyncio.Event(), "b": asyncio.Event()}

    def meeting(mine: str, other: str, value: float) -> Callable[..., Any]:
        async def reward(prompts: list[str], completions: list[str]) -> list[float | None]:
            loops.add(asyncio.get_running_loop())
            ready[mine].set()
            await asyncio.wait_for(ready[other].wait(), 5)
            return [value, None, value]

        return reward

    caller = Caller()
    rewards = [meeting("a", "b", 1.0), meeting("b", "a", 2.0), returning([0, 5, 0])]
    check_reward(rewards[0])
    for _ in range(2):
        scores, _ = score(rewards, None, PROMPTS, COMPLETIONS, caller=caller)
        assert scores.tolist() == [3, 5, 3]
    assert len(loops) == 1

    async def broken(**arguments: Any) -> list[float]:
        raise KeyError("judge")

    async def cancelled(**arguments: Any) -> list[float]:
        raise asyncio.CancelledError

    for reward, said in {broken: "raised KeyError: 'judge'", cancelled: "raised CancelledError"}.items():
        with pytest.raises(RewardError, match=said):
            score([reward], None, PROMPTS, COMPLETIONS, caller=caller)


def test_a_reward_that_takes_too_long_is_named_with_the_flag_that_gives_it_more() -> None:
    def stuck(prompts: list[str], completions: list[str]) -> list[float]:
        threading.Event().wait(10)
        return [0.0] * 3

    async def later(prompts: list[str], completions: list[str]) -> list[float]:
        await asyncio.sleep(10)
        return [0.0] * 3

    for reward in (stuck, later):
        with pytest.raises(RewardError, match=f"{reward.__name__}' gave no answer within reward_timeout=0.1 seconds"):
            score([reward], None, PROMPTS, COMPLETIONS, caller=Caller(timeout=0.1))
    quick = score([returning([1, 2, 3])], None, PROMPTS, COMPLETIONS, caller=Caller(timeout=10))[0]
    assert quick.tolist() == [1, 2, 3]


def test_threads_work_at_the_same_time_each_on_whole_groups() -> None:
    barrier, seen = threading.Barrier(3), []

    def met(
        prompts: list[str], completions: list[str], number: list[int], completion_ids: list[list[int]]
    ) -> list[int]:
        barrier.wait(5)
        seen.append(number)
        return number

    columns, ids = {"number": list(range(8))}, {"completion_ids": [[i] for i in range(8)]}
    texts = ["p"] * 8, ["c"] * 8
    scores, _ = score([met], None, *texts, columns, ids, group_size=2, caller=Caller(workers=3))
    assert scores.tolist() == list(range(8)) and sorted(seen) == [[0, 1], [2, 3], [4, 5, 6, 7]]

    def fails(prompts: list[str], completions: list[str], number: list[int]) -> list[int]:
        return number[:-1] if 6 in number else number

    with pytest.raises(RewardError, match="returned 3 values for 4 completions") as caught:
        score([fails], None, *texts, columns, group_size=4, caller=Caller(workers=5))
    assert caught.value.row == 4


def test_processes_are_told_apart_from_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import os, time\ndef number(prompts, completions): return [os.getpid()] * len(prompts)\n"
    text += "def stuck(prompts, completions): time.sleep(60)\n"
    write_module(tmp_path, "my_reward_d", text, monkeypatch)
    caller = Caller(workers=1, processes=True)
    one, two = (run_with(caller, load_reward("my_reward_d:number")) for _ in range(2))
    assert one == two != [os.getpid()] * 3, "they stay"
    (worker,) = (child for child in multiprocessing.active_children() if child.pid == int(one[0]))
    caller.timeout = 0.2
    with pytest.raises(RewardError, match="no answer within"):
        run_with(caller, load_reward("my_reward_d:stuck"))
    worker.join(5)
    assert not worker.is_alive()


def run_with(caller: Caller, reward: Callable[..., Any]) -> list[float]:
    return score([reward], None, PROMPTS, COMPLETIONS, caller=caller)[0].tolist()


def test_a_reward_gets_messages_where_it_asks_for_them() -> None:
    def as_messages(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
        assert all(row[0]["role"] == "assistant" for row in completions)
        return [float(len(row[0]["content"])) for row in completions]

    def as_texts(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    both = [run(reward)[0].tolist() for reward in (as_messages, as_texts)]
    assert both == [[3, 3, 5]] * 2


def test_the_rewards_that_trl_ships_run_unchanged() -> None:
    trl = pytest.importorskip("trl.rewards")
    pytest.importorskip("math_verify")
    completions = [
        "<think>\nThree thirds.\n</think>\nMy answer is \\boxed{\\frac{1}{3}}", "It is \\boxed{\\frac{1}{2}}", "Who knows?",
    ]  # fmt: skip
    rewards = [
        trl.accuracy_reward, trl.reasoning_accuracy_reward, trl.think_format_reward, trl.get_cosine_scaled_reward(max_len=100),
        trl.get_soft_overlong_punishment(100, 20), trl.get_repetition_penalty_reward(ngram_size=2),
    ]  # fmt: skip
    for reward in rewards:
        check_reward(reward, ["solution"])
    columns = {"solution": [r"$\frac{1}{3}$", r"$\frac{1}{3}$", "no number at all"]}
    ids = {"completion_ids": [[*range(50)], [*range(90)], [1, 1, 1]]}
    _, parts = score(rewards, None, PROMPTS, completions, columns, ids, lengths=[50, 90, 3])
    found = {name: part.tolist() for name, part in parts.items()}
    assert found["accuracy_reward"][:2] == [1, 0] and math.isnan(found["accuracy_reward"][2])
    assert found["think_format_reward"] == [1, 0, 0]
    assert found["soft_overlong_punishment_reward"] == [0, -0.5, 0]
    assert found["repetition_penalty_reward"] == [0, 0, -0.5]
    assert found["cosine_scaled_reward"][0] == 0.75 and math.isnan(found["cosine_scaled_reward"][2])
