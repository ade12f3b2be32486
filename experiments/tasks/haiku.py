"""The shape of a haiku as a black-box reward: three lines of 5, 7 and 5 syllables, near misses paid in part.

A completion that was cut at the longest length is no whole haiku, whatever its lines. Syllables are counted by the package
`syllapy` (a dictionary, and a rule for other words), so the reward judges English.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from pgjax.core.errors import MissingPackageError

TARGET = (5, 7, 5)  # syllables of each line
LINES_WEIGHT = 0.4  # the share of the score for the number of lines; the rest is for the syllables
VARIED = 0.7  # a text whose words are this varied (different words / words) loses nothing

TOPICS = (
    "robots", "the sea", "autumn leaves", "a sleeping cat", "morning coffee", "the moon", "snow",
    "an old bridge", "trains", "a garden", "thunder", "fireflies", "the desert", "a lighthouse", "rain",
    "mountains", "a forgotten letter", "spring", "bees", "the city at night", "a river", "owls", "bread",
    "a violin", "the stars", "frogs", "a winter morning", "clouds", "a broken clock", "whales", "a market",
    "the wind", "cherry blossoms", "a computer", "shadows", "an empty house", "butterflies", "the harvest",
    "ice", "a bicycle", "dreams", "the forest", "a candle", "ants", "the beach", "a grandmother", "fog",
    "horses", "a library", "sunrise", "spiders", "an orchard", "silence", "a volcano", "dancing", "a fox",
    "the subway", "honey", "a spaceship", "friendship", "old books", "a waterfall", "crows", "lost keys",
)  # fmt: skip

HELD_OUT = (
    "dragons", "the lake", "a teapot", "summer", "a sailor", "pine trees", "music", "a thunderstorm",
    "a puppy", "the museum", "kites", "sunset", "an astronaut", "mushrooms", "a mirror", "swans",
)  # fmt: skip

_ONES = (2, 1, 1, 1, 1, 1, 1, 2, 1, 1)  # syllables of zero, one, ..., nine
_TEENS = (1, 3, 1, 2, 2, 2, 2, 3, 2, 2)  # ten, eleven, ..., nineteen
_TENS = (0, 0, 2, 2, 2, 2, 2, 3, 2, 2)  # twenty, thirty, ..., ninety
_WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*|[0-9]+")


def rows(topics: Sequence[str]) -> list[dict[str, str]]:
    """Write the prompt for each topic.

    Args:
      topics: such as `TOPICS` or `HELD_OUT`.

    Returns:
      A row a topic, with the columns ``prompt`` and ``topic``.

    Example:
      >>> rows(["robots"])
      [{'prompt': 'Write a haiku about robots', 'topic': 'robots'}]
    """
    return [{"prompt": f"Write a haiku about {topic}", "topic": topic} for topic in topics]


def train_rows() -> list[dict[str, str]]:
    """Write the rows to train on."""
    return rows(TOPICS)


def held_out_rows() -> list[dict[str, str]]:
    """Write the rows to evaluate on, which training never sees."""
    return rows(HELD_OUT)


def syllables(line: str) -> int:
    """Count the syllables of a line of English.

    Accents are folded; numerals up to two digits are read as numbers, four digits as a year in two pairs, three one
    by one; capitals of up to three letters are spelled (AI, GPT), unless the whole line is in capitals; single
    letters other than a, I and O, longer numerals, and other scripts count nothing, for they are no words to recite.

    Args:
      line: one line of text.

    Returns:
      The number of syllables, 0 where there is no word.

    Raises:
      ImportError: the package syllapy is not installed.

    Example:
      >>> [syllables(text) for text in ("Silver robots hum", "I didn't see 24", "AI cafés", "...", "")]
      [5, 7, 4, 0, 0]
    """
    words = _words(line)
    shouted = len(words) > 1 and all(word.upper() == word for word in words)
    return sum(_word_syllables(word, spell=not shouted) for word in words)


def exact_575(text: str) -> bool:
    """Say whether a text is three lines of 5, 7 and 5 syllables; blank lines between them are forgiven.

    Args:
      text: a whole completion.

    Returns:
      True for the exact shape.

    Example:
      >>> exact_575("Silver robots hum\\nin the quiet of the night\\ndreaming of the rain")
      True
    """
    return tuple(syllables(line) for line in _lines(text)) == TARGET


def haiku_score(text: str) -> float:
    """Score the shape of one text in [0, 1].

    score = varied * (0.4 / (1 + |n - 3|) + 0.6 * fit), where n is the number of lines that aren't blank; fit
    is the mean, over max(n, 3) lines, of (min(s, t) / max(s, t))^2 for s syllables against t = 5, 7, 5 (lines
    missing or beyond the third fit by 0); varied = min(1, different words / words / 0.7), so that a word said
    over and over does not pay in full. A line without a word takes away the whole part for the number of
    lines. There is no plateau below the target: one syllable nearer always pays more. The score is 1 exactly
    where `exact_575` holds and the words are varied.

    Args:
      text: a whole completion.

    Returns:
      The score.

    Example:
      >>> def show(text): return round(haiku_score(text), 3)
      >>> haiku = "Silver robots hum\\nin the quiet of the night\\ndreaming of the rain"
      >>> show(haiku), show(haiku.replace("\\n", "\\n\\n"))  # exact; blank lines are forgiven
      (1.0, 1.0)
      >>> show(haiku.replace("the rain", "rain"))  # a syllable short in one line
      0.928
      >>> show(haiku + "\\nI hope you like it!")  # a line too many
      0.65
      >>> show("Silver robots hum\\nin the quiet of the night"), show("Silver robots hum")  # lines missing
      (0.6, 0.333)
      >>> show("A haiku about robots, who hum and dream of rain in the quiet of the night.")  # in one line
      0.146
      >>> show("robot robot robot\\nrobot robot robot robot\\nrobot robot robot")  # over and over
      0.119
      >>> show("..."), show("")
      (0.0, 0.0)
    """
    lines = _lines(text)
    counts = [syllables(line) for line in lines]
    if not any(counts):
        return 0.0
    form = 1 / (1 + abs(len(lines) - 3)) if all(counts) else 0.0
    closeness = [(min(pair) / max(pair)) ** 2 for pair in zip(counts, TARGET, strict=False)]
    fit = sum(closeness) / max(len(lines), 3)
    return _varied(text) * (LINES_WEIGHT * form + (1 - LINES_WEIGHT) * fit)


def haiku_reward(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """Score the shape of each completion as a haiku with `haiku_score`; neither prompt nor topic matters.

    Args:
      prompts: [B] not looked at.
      completions: [B] texts.
      **columns: not looked at.

    Returns:
      [B] scores in [0, 1].

    Example:
      >>> pond = "An old silent pond\\nA frog jumps into the pond\\nSplash! Silence again"
      >>> haiku_reward(["Write a haiku"] * 2, [pond, ""])
      [1.0, 0.0]
    """
    return [haiku_score(text) for text in completions]


def whole_haiku_score(text: str) -> float:
    """Score the shape of one text in [0, 1], exact lines above all.

    score = varied * form * (0.1 + 0.45 * near + 0.45 * exact), where form = 1 / (1 + |n - 3|) for n lines that aren't blank, 0
    where one of them holds no word; near is the mean, over max(n, 3) lines, of exp(-|s - t| / 2) for s syllables against
    t = 5, 7, 5, and exact the share of them with s = t; varied as in `haiku_score`. There a line that is one syllable off earns
    most of what an exact one does; here less than a third of it, so that a policy that writes three lines goes on to count.

    Args:
      text: a whole completion.

    Returns:
      The score, 1 exactly where `exact_575` holds and the words are varied.

    Example:
      >>> def show(text): return round(whole_haiku_score(text), 3)
      >>> haiku = "Silver robots hum\\nin the quiet of the night\\ndreaming of the rain"
      >>> show(haiku), show(haiku.replace("the rain", "rain"))  # exact; a syllable short in one line
      (1.0, 0.791)
      >>> show(haiku + "\\nI hope you like it!"), show("Silver robots hum")  # a line too many; lines missing
      (0.388, 0.133)
    """
    counts = [syllables(line) for line in _lines(text)]
    if not counts or not all(counts):
        return 0.0
    pairs, most = list(zip(counts, TARGET, strict=False)), max(len(counts), 3)
    near = sum(math.exp(-abs(s - t) / 2) for s, t in pairs) / most
    exact = sum(s == t for s, t in pairs) / most
    return _varied(text) / (1 + abs(len(counts) - 3)) * (0.1 + 0.45 * near + 0.45 * exact)


def whole_haiku_reward(
    prompts: Sequence[Any], completions: Sequence[str], ended: Sequence[bool], **columns: Any
) -> list[float]:
    """Score each completion that ended by itself with `whole_haiku_score`; one that was cut gets 0.

    Args:
      prompts: [B] not looked at.
      completions: [B] texts.
      ended: [B] True where the completion ended by itself.
      **columns: not looked at.

    Returns:
      [B] scores in [0, 1].

    Example:
      >>> pond = "An old silent pond\\nA frog jumps into the pond\\nSplash! Silence again"
      >>> whole_haiku_reward(["Write a haiku"] * 2, [pond, pond], [True, False])
      [1.0, 0.0]
    """
    return [whole_haiku_score(text) if end else 0.0 for text, end in zip(completions, ended, strict=True)]


def three_lines(
    prompts: Sequence[Any], completions: Sequence[str], ended: Sequence[bool], **columns: Any
) -> list[float]:
    """Say which completions ended by themselves after three lines: with the weight 0 a share that is reported.

    Args:
      prompts, completions, ended, **columns: as of `whole_haiku_reward`.

    Returns:
      [B] 1 or 0.

    Example:
      >>> three_lines([""] * 3, ["a\\nb\\nc", "a\\nb", "a\\nb\\nc"], [True, True, False])
      [1.0, 0.0, 0.0]
    """
    return [float(end and len(_lines(text)) == 3) for text, end in zip(completions, ended, strict=True)]


def exact_haiku(
    prompts: Sequence[Any], completions: Sequence[str], ended: Sequence[bool], **columns: Any
) -> list[float]:
    """Say which completions ended by themselves with the exact shape (`exact_575`), likewise.

    Args:
      prompts, completions, ended, **columns: as of `whole_haiku_reward`.

    Returns:
      [B] 1 or 0.

    Example:
      >>> pond = "An old silent pond\\nA frog jumps into the pond\\nSplash! Silence again"
      >>> exact_haiku([""] * 2, [pond, pond], [True, False])
      [1.0, 0.0]
    """
    return [float(end and exact_575(text)) for text, end in zip(completions, ended, strict=True)]


def _lines(text: str) -> list[str]:
    # Only the newline ends a line: str.splitlines would also split at odd separators that no reader sees.
    return [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


def _words(line: str) -> list[str]:
    folded = unicodedata.normalize("NFKD", line.replace("\u2019", "'"))
    return _WORD.findall("".join(letter for letter in folded if not unicodedata.combining(letter)))


def _varied(text: str) -> float:
    words = ["0" if word.isdigit() else word.lower() for word in _words(text)]
    return min(1.0, len(set(words)) / len(words) / VARIED) if words else 0.0


def _word_syllables(word: str, *, spell: bool) -> int:
    if word.isdigit():
        return _numeral_syllables(word)
    if len(word) == 1:
        return int(word.lower() in "aio")
    if spell and len(word) <= 3 and word.isupper():
        return sum(3 if letter == "W" else 1 for letter in word)
    count = _syllapy().count
    stem, contracted = word[:-3].lower(), word.lower().endswith("n't")
    if contracted and stem.endswith(("s", "d", "t")):  # didn't, isn't, mustn't: the package's rule hears one syllable
        return int(count(stem)) + 1
    return int(count(word))


def _numeral_syllables(digits: str) -> int:
    if len(digits) > 4:
        return 0
    if len(digits) == 4:
        return _numeral_syllables(digits[:2]) + _numeral_syllables(digits[2:])
    if len(digits) != 2 or digits[0] == "0":
        return sum(_ONES[int(digit)] for digit in digits)
    tens, ones = int(digits[0]), int(digits[1])
    if tens == 1:
        return _TEENS[ones]
    return _TENS[tens] + (_ONES[ones] if ones else 0)


def _syllapy() -> Any:
    try:
        import syllapy
    except ImportError as error:
        raise MissingPackageError("the haiku reward needs the package syllapy: pip install -e '.[demo]'") from error
    return syllapy
