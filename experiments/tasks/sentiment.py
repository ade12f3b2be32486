"""Sentiment as a black-box reward: continue the opening of a review, the kinder the better.

Hutto and Gilbert 2014, "VADER: A parsimonious rule-based model for sentiment analysis of social media text";
the package `vaderSentiment` is theirs.
"""

import functools
from collections.abc import Sequence
from typing import Any

from pgjax.core.errors import MissingPackageError

OPENINGS = (
    "The film was", "I walked into the hotel and", "The waiter brought us", "My new phone",
    "The second season", "After a week with this laptop, I", "Our flight to Denver", "The book opens with",
    "When the package arrived,", "The band began", "I took my family to", "The soup tasted",
    "This coffee machine", "The museum guide", "We stayed for three nights and", "The lead actor",
    "Customer service told me", "The story in this paperback", "My first ride in the car",
    "The concert last night", "I ordered the fish and", "The room on the fifth floor", "Her latest album",
    "The tour of the old town", "These headphones", "The ending of the movie", "At the front desk, a man",
    "The pizza place on our street", "I wore these shoes", "The game runs", "The dentist told me",
    "Our neighbours said", "The view from the balcony", "The director wanted",
    "I bought this blender because", "The train to the coast", "The cake at the wedding",
    "My son opened the box and", "The history of this house", "The teacher of the evening class",
    "The bus tour started", "I finished the last chapter and", "The battery of this watch",
    "The drama at the small theatre", "The beach behind the resort", "The mechanic looked at",
    "The menu had", "I tried the new update and", "The dialogue in this film",
    "The garden of the restaurant", "The carpet in the hallway", "The app asked me", "The stage was",
    "Our guide in the mountains", "This jacket", "The podcast begins", "The breakfast buffet",
    "I asked for a table and", "The camera on this model", "The taxi driver",
    "The poems in this collection", "The gym near my office", "The museum shop sells",
    "The crew of the ferry",
)  # fmt: skip

HELD_OUT = (
    "The documentary was", "I sat down in the cafe and", "The nurse at the clinic", "My old printer",
    "The final episode", "The hostel in the city centre", "The salad came with", "This vacuum",
    "The singer walked on stage and", "The author of this biography", "We rented the cabin and",
    "The keyboard of this tablet", "The bakery on the corner", "The staff at the airport", "The musical",
    "The campsite by the lake",
)  # fmt: skip


def rows(openings: Sequence[str]) -> list[dict[str, str]]:
    """Make a prompt of each opening: a plain text to continue, without a chat template.

    Args:
      openings: such as `OPENINGS` or `HELD_OUT`.

    Returns:
      A row an opening, with the column ``prompt``.

    Example:
      >>> rows(["The film was"])
      [{'prompt': 'The film was'}]
    """
    return [{"prompt": opening} for opening in openings]


def train_rows() -> list[dict[str, str]]:
    """Write the rows to train on."""
    return rows(OPENINGS)


def held_out_rows() -> list[dict[str, str]]:
    """Write the rows to evaluate on, which training never sees."""
    return rows(HELD_OUT)


def sentiment_reward(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """Score the sentiment of each completion with VADER's compound in [-1, 1].

    compound = x / sqrt(x^2 + 15), where x sums the valence of the words with rules for negation, emphasis and
    punctuation. The completion alone is judged, so the openings shift nothing. It saturates, and praise said
    over and over scores high: the KL penalty is what keeps the text readable.

    Args:
      prompts: [B] not looked at.
      completions: [B] texts.
      **columns: not looked at.

    Returns:
      [B] compounds; 0 for a text without any word that VADER knows.

    Raises:
      ImportError: the package vaderSentiment is not installed.

    Example:
      >>> sentiment_reward(["The film was"] * 3, [" wonderful, I loved it!", " terrible.", " on."])
      [0.8356, -0.4767, 0.0]
    """
    analyzer = _analyzer()
    return [float(analyzer.polarity_scores(text)["compound"]) for text in completions]


def whole_text_sentiment(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """Score the sentiment of prompt and completion together, as one text, with VADER's compound in [-1, 1].

    Args:
      prompts: [B] texts, as they are sampled from: nothing is put between them and the completions.
      completions: [B] texts.
      **columns: not looked at.

    Returns:
      [B] compounds; 0 for a text without any word that VADER knows.

    Raises:
      ImportError: the package vaderSentiment is not installed.
      TypeError: a prompt is a list of messages, which has no one text.

    Example:
      >>> whole_text_sentiment(["The film was", "A great film was"], [" wonderful, I loved it!", " on."])
      [0.8356, 0.6249]
    """
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"whole_text_sentiment judges plain texts, got a prompt of type {type(prompt).__name__}")
    return sentiment_reward(prompts, [prompt + text for prompt, text in zip(prompts, completions, strict=True)])


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise MissingPackageError("the sentiment reward needs vaderSentiment: pip install -e '.[demo]'") from error
    return SentimentIntensityAnalyzer()
