"""What a policy would find in the reward: loopholes that pay, and near misses that do not."""

import itertools
import sys

import numpy as np
import pytest

from experiments.tasks.haiku import HELD_OUT, TOPICS, exact_575, haiku_reward, haiku_score, rows, syllables
from pgjax.rollout.rewards import check_reward, load_reward
from pgjax.rollout.scoring import score

HAIKU = "Silver robots hum\nin the quiet of the night\ndreaming of the rain"
WORDS = (
    "sun", "moon", "tree", "lake", "stone", "wind", "bird", "cloud", "snow", "leaf",
    "rain", "fox", "star", "field", "road", "hill", "dawn", "dusk", "frost", "bell",
)  # fmt: skip


def lines_of(*counts: int) -> str:
    """A text of lines with so many syllables, no word twice until the list is used up."""
    words = itertools.cycle(WORDS)
    return "\n".join(" ".join(itertools.islice(words, count)) for count in counts)


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("", 0),
        ("   \t", 0),
        ("--- *** ...", 0),
        ("An old silent pond", 5),
        ("A frog jumps into the pond,", 7),
        ("Splash! Silence again.", 5),
        ("SPLASH! SILENCE AGAIN.", 5),
        ("*Splash!* -- _silence_, again…", 5),
        ("robots", 2),
        ("robot's heart", 3),
        ("didn\u2019t isn't couldn't don't can't", 2 + 2 + 2 + 1 + 1),
        ("self-made", 2),
        ("café", 2),
        ("AI dreams of TV", 2 + 1 + 1 + 2),
        ("www WWW", 1 + 9),
        ("I, a, o", 3),
        ("a b c d e f g h i j k l m n o p q r s t u v w x y z", 3),
        ("7 robots", 2 + 2),
        ("13 14 20 42 77", 2 + 2 + 2 + 3 + 5),
        ("1984 07 365", 5 + 4 + 3),
        ("123456789", 0),
        ("静かな池 — тихий пруд", 0),
    ],
)
def test_syllables(line: str, count: int) -> None:
    assert syllables(line) == count


def test_the_score_is_one_exactly_for_the_shape() -> None:
    pond = "An old silent pond\r\nA frog jumps into the pond\r\n\r\nSplash! Silence again\n"
    for text in (HAIKU, pond, f"\n\n{HAIKU}  \n", HAIKU.replace("\n", "\n\n\n")):
        assert haiku_score(text) == pytest.approx(1, abs=1e-12) and exact_575(text)
    for counts in itertools.product(range(1, 9), repeat=3):
        text = lines_of(*counts)
        assert (haiku_score(text) > 1 - 1e-9) == (counts == (5, 7, 5)) == exact_575(text)


@pytest.mark.parametrize("line", [0, 1, 2])
def test_each_syllable_nearer_pays_more(line: int) -> None:
    target = (5, 7, 5)
    scores = []
    for count in range(1, 15):
        counts = list(target)
        counts[line] = count
        scores.append(haiku_score(lines_of(*counts)))
    below, above = scores[: target[line]], scores[target[line] - 1 :]
    assert below == sorted(set(below)) and above == sorted(set(above), reverse=True)


def test_a_long_single_line_still_feels_the_way() -> None:
    scores = [haiku_score(lines_of(count)) for count in (20, 15, 10, 6, 5)]
    assert scores == sorted(set(scores))


def test_the_number_of_lines_pays_step_by_step() -> None:
    texts = ["\n".join((HAIKU.split("\n") * 3)[:n]) for n in range(1, 8)]
    scores = [haiku_score(text) for text in texts]
    assert scores[:3] == sorted(set(scores[:3])) and scores[2:] == sorted(set(scores[2:]), reverse=True)


@pytest.mark.parametrize("tail", ["\nI hope you like it!", "\n\nThis haiku is about robots.", "\n---", "\n1.", "\n。"])
def test_chatter_after_the_third_line_costs(tail: str) -> None:
    assert haiku_score(HAIKU + tail) < 0.7 and not exact_575(HAIKU + tail)


def test_a_title_costs() -> None:
    assert haiku_score(f"Robots\n{HAIKU}") < 0.7


@pytest.mark.parametrize(
    "text", ["", " \n\n ", "...\n---\n...", "b c d e f\nb c d e f g h\nb c d e f", "静\n静\n静", "123456789"]
)
def test_texts_without_words_earn_nothing(text: str) -> None:
    assert haiku_score(text) == 0


def test_lines_without_words_are_no_lines_of_a_poem() -> None:
    assert haiku_score("Silver robots hum\n.\n.") < haiku_score("Silver robots hum")


@pytest.mark.parametrize(
    "text",
    [
        "rain rain rain rain rain\nrain rain rain rain rain rain rain\nrain rain rain rain rain",
        "robot robot I\nrobot robot robot I\nrobot robot I",
        "1 2 3 4 5\n1 2 3 4 5 6 8\n1 2 3 4 5",
        "I I I I I\na a a a a a a\no o o o o",
    ],
)
def test_a_word_over_and_over_does_not_pay_in_full(text: str) -> None:
    assert exact_575(text) and haiku_score(text) < 0.5


def test_odd_separators_do_not_make_lines() -> None:
    for separator in ("\u2028", "\x0b", "\x0c", "\x85", "\r", " / "):
        assert haiku_score(HAIKU.replace("\n", separator)) < 0.3


def test_the_start_of_training_has_a_signal() -> None:
    """What an untrained model writes, in kind: one line, long lines, two, four, a broken one."""
    texts = [
        "The robot smiles at its smartphone, light pulsating in a cosmos, light embracing the blank",
        "In twilight's haste, tea stands, a humble grain\nA humble bean's whisper of the home's tending hands\nThe",
        "Heal upon humble wheels\nEfforts to transport carrying weight\nPromotes endless journeys",
        "The snow's silent ways\nA warrior's path follows in the cold light\nWinter's warmth is in the gift",
        "Gears turn in the dark\nA soft hum",
        "Here's a haiku:\n\nMetal hands reach out\nTo touch the morning sky\nAnd find it cold",
    ]
    scores = haiku_reward([""] * len(texts), texts)
    assert np.std(scores) > 0.15 and all(0 < value < 1 for value in scores)


def test_topics_differ_and_none_is_held_out_and_trained_on() -> None:
    topics = [topic.lower() for topic in (*TOPICS, *HELD_OUT)]
    assert len(set(topics)) == len(topics) and "robots" in TOPICS
    assert len(TOPICS) >= 60 and len(HELD_OUT) >= 16
    assert rows(["the sea"]) == [{"prompt": "Write a haiku about the sea", "topic": "the sea"}]


def test_the_reward_fits_the_contract() -> None:
    reward = load_reward("experiments.tasks.haiku:haiku_reward")
    check_reward(reward, ["topic"])
    scores, parts = score([reward], None, ["Write a haiku"] * 2, [HAIKU, ""], {"topic": ["x", "y"]})
    np.testing.assert_allclose(scores, [1, 0], atol=1e-7)
    assert list(parts) == ["haiku_reward"]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "syllapy", None)
    with pytest.raises(ImportError, match=r"syllapy.*\[demo\]"):
        syllables("robots")
