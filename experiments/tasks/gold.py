"""The gold score of the RLHF experiments: what the people behind the preferences want, known here because it is a formula.

Gold = sentiment of the whole text - 1.5 * the share of its words that stand there more than once. A reward model sees only
which of two texts a noisy judge preferred; Gao, Schulman and Hilton 2023 ("Scaling laws for reward model
overoptimization") put such a synthetic judge in the place of people, so that it can be measured when the proxy is fooled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.tasks.sentiment import sentiment_reward
from pgjax.core.errors import UserError

REPETITION_WEIGHT = 1.5  # of the repeated words' share, beside a sentiment in [-1, 1]
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")


def repeated_share(text: str) -> float:
    """Work out which share of a text's words has stood in it before.

    1 - distinct words / words, letter case aside.

    Args:
      text: any text.

    Returns:
      From 0 (no word twice, or no word at all) towards 1.

    Example:
      >>> repeated_share("A funny, funny film"), repeated_share("...")
      (0.25, 0.0)
    """
    words = _WORD.findall(text.lower())
    return 1 - len(set(words)) / len(words) if words else 0.0


def gold_reward(prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """Score prompt and completion as one text: VADER's compound - 1.5 * `repeated_share`.

    Hutto and Gilbert 2014 for VADER. Praise alone would be scored highest where it is said over and over; the second
    term takes that away, so that the best texts are kind and still say something.

    Args:
      prompts: [B] texts, or lists of messages, whose contents are joined.
      completions: [B] texts.
      **columns: not looked at.

    Returns:
      [B] numbers in (-2.5, 1].

    Raises:
      ImportError: the package vaderSentiment is not installed.

    Example:
      >>> [round(x, 3) for x in gold_reward(["This is"] * 2, [" a lovely film", " lovely lovely lovely lovely"])]
      [0.586, 0.195]
    """
    texts = [_text(prompt) + completion for prompt, completion in zip(prompts, completions, strict=True)]
    sentiment = sentiment_reward(texts, texts)
    return [kind - REPETITION_WEIGHT * repeated_share(text) for kind, text in zip(sentiment, texts, strict=True)]


def prefers_first(first: Sequence[float], second: Sequence[float], *, scale: float, seed: int) -> list[bool]:
    """Toss the Bradley-Terry coin: does the judge prefer the first of two texts?

    P(first preferred) = sigmoid(scale * (gold_first - gold_second)).

    Bradley and Terry 1952.

    Args:
      first: [N] gold scores of the first texts.
      second: [N] gold scores of the second texts.
      scale: how sure the judge is, in nats a unit of gold; 0 is a fair coin.
      seed: of the coins; pair i gets the same coin whatever the other pairs are.

    Returns:
      [N] True where the first one is preferred.

    Raises:
      ValueError: lists of different lengths, or a scale that is not a finite number of at least 0.

    Example:
      >>> prefers_first([0.9, -0.5], [-0.9, 0.4], scale=100.0, seed=0)
      [True, False]
    """
    if len(first) != len(second):
        raise UserError(f"{len(first)} first scores and {len(second)} second ones do not pair up")
    if not 0 <= scale < float("inf"):
        raise UserError(f"scale must be finite and not below 0, got {scale}")
    gaps = scale * (np.asarray(first, np.float64) - np.asarray(second, np.float64))
    coins = np.random.default_rng(seed).logistic(size=len(gaps))  # P(coin < gap) = sigmoid(gap)
    return (coins < gaps).tolist()


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message.get("content", "") for message in prompt) + "\n"
