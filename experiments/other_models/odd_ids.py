"""A task that any tiny model learns in seconds: the black box pays the share of odd ids in a completion."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

import pgjax as pg

VOCABULARY, POSITIONS, WIDTH = 16, 32, 16
PROMPTS = np.repeat([[0, 0, 3], [0, 4, 1], [2, 6, 9], [0, 0, 8]], 16, axis=0)
PROMPT_MASK = np.repeat([[0, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]], 16, axis=0).astype(bool)


class Learned(NamedTuple):
    """What training gave."""

    means: list[float]  # of each iteration's scores
    gap: float  # nats, the largest between the sampler's log-probabilities and the learner's
    state: pg.State


def odd_ids(rollout: pg.Rollout | pg.Sampled) -> np.ndarray:
    """Score a completion by its share of odd ids.

    >>> ids, sampled = np.array([[2, 3, 4]]), np.array([[False, True, True]])
    >>> odd_ids(pg.Rollout(ids, sampled, sampled, ids)).tolist()
    [0.5]
    """
    mask = np.asarray(rollout.mask)
    return ((np.asarray(rollout.tokens) % 2) * mask).sum(1) / mask.sum(1)


def train(
    lm: pg.CausalLM, params: Any, *, frozen: Any = None, steps: int = 12, learning_rate: float = 1e-2, seed: int = 0
) -> Learned:
    """Train a model by GRPO, with a KL to where it started.

    Args:
        lm: its bundle of functions.
        params: what is trained: its parameters, or adapters to them.
        frozen: the parameters that adapters belong to.
        steps: iterations of 64 completions.
        learning_rate: of Adam.
        seed: of the sampling.
    """
    it = pg.iteration(
        lm, pg.grpo(group_size=4, kl_loss_coef=1e-3), pg.adamw(learning_rate, updates=steps), max_new_tokens=6,
        reference=params if frozen is None else frozen, frozen=frozen, teacher_force=True, minibatches=2,
    )  # fmt: skip
    state, means, gap = it.init(params, jax.random.key(seed)), [], 0.0
    for _ in range(steps):
        rollout = it.sample(state, PROMPTS, PROMPT_MASK)
        window = rollout.policy.logprobs.shape[1]
        apart = np.abs(np.asarray(rollout.logprobs)[:, -window:] - np.asarray(rollout.policy.logprobs))
        gap = max(gap, float(apart[np.asarray(rollout.mask)[:, -window:]].max()))
        scores = odd_ids(rollout)
        means.append(float(scores.mean()))
        state, _ = it.learn(state, rollout, scores)
    return Learned(means, gap, state)


def show(lm: pg.CausalLM, params: Any) -> None:
    """Train a model, and print how its scores rise."""
    learned = train(lm, params)
    print("mean score of each iteration:", *(f"{mean:.2f}" for mean in learned.means))
    print(f"the sampler and the learner differ by {learned.gap:.1e} nats at most")
