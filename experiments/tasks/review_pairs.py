"""Pairs of real film reviews with a preference between the two: what the reward model learns from when nothing is given.

The reviews are those of `experiments.tasks.reviews`; which of two is preferred is a coin that the gold score of
`experiments.tasks.gold` weighs: P(first preferred) = sigmoid(4 * (gold_first - gold_second)).
"""

from __future__ import annotations

import numpy as np

from experiments.tasks.gold import gold_reward, prefers_first
from experiments.tasks.reviews import split, texts

PROMPT = "Review:"
SCALE = 4.0  # nats a unit of gold: about five in six preferences are for the better review


def paired(reviews: list[str], *, seed: int) -> list[dict[str, str]]:
    """Pair reviews at random and toss a coin over each pair.

    Args:
      reviews: at least two texts.
      seed: of the pairing and of the coins.

    Returns:
      Rows with the columns ``prompt``, ``chosen`` and ``rejected``; a text stands in one of them.

    Raises:
      ImportError: the package vaderSentiment is not installed.

    Example:
      >>> paired(["A lovely, lovely film.", "A dreadful bore."], seed=0)[0]["chosen"]
      ' A lovely, lovely film.'
    """
    order = np.random.default_rng(seed).permutation(len(reviews))
    first, second = ([f" {reviews[i]}" for i in half] for half in (order[: len(order) // 2], order[len(order) // 2 :]))
    gold = [gold_reward([PROMPT] * len(side), side) for side in (first[: len(second)], second[: len(first)])]
    wins = prefers_first(gold[0], gold[1], scale=SCALE, seed=seed)
    pairs = [(a, b) if win else (b, a) for a, b, win in zip(first, second, wins, strict=False)]
    return [{"prompt": PROMPT, "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]


def all_train_rows() -> list[dict[str, str]]:
    """Pair all reviews that fine-tuning sees too: about 6,100 pairs."""
    return paired(split(texts())[0], seed=0)


def train_rows() -> list[dict[str, str]]:
    """Take the first 1,024 of them, which a pretrained model learns from in minutes."""
    return all_train_rows()[:1024]


def held_out_rows() -> list[dict[str, str]]:
    """Pair reviews that nothing is trained on."""
    return paired(split(texts())[1], seed=1)
