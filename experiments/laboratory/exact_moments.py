"""Mean and variance of a loss's gradient on the token MDP, exactly: every batch that can be drawn, by its probability.

A loss goes through pgjax and autodiff, in float64, as far as the log-probabilities; the rest of the way to the table is linear,
and NumPy's: with S the gradients of all tokens' log pi, a batch's gradient is c S, its squared length c (S S^T) c.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.laboratory import token_mdp as mdp

SCORES = (mdp.REWARD - mdp.REWARD.min()) / np.ptp(mdp.REWARD)  # [256] of each sequence, from 0 to 1
PAIRS = np.array(list(itertools.product(range(mdp.COUNT), repeat=2)), np.int32)  # every batch of two
STEP = 0.1  # of a logit in an update

Loss = Callable[..., jax.Array]  # (logprobs [B, 5], *arrays [B, ...]) -> []


class Moments(NamedTuple):
    """Of a batch's gradient."""

    mean: np.ndarray  # [340] the expected gradient of the objective, minus the loss's
    variance: float  # trace of the covariance

    def cosine(self, exact: np.ndarray) -> float:
        """Compute the cosine of the expected gradient to the exact one."""
        return float(self.mean @ exact / np.linalg.norm(self.mean) / np.linalg.norm(exact))

    def bias(self, exact: np.ndarray) -> float:
        """Compute how far the expected gradient is from the exact one, in lengths of it."""
        return float(np.linalg.norm(self.mean - exact) / np.linalg.norm(exact))

    @property
    def noise(self) -> float:
        """Give the variance in squares of the expected gradient's length, which is no matter of scale."""
        return self.variance / float(self.mean @ self.mean)


def exact_gradient(table: np.ndarray, scores: np.ndarray = SCORES) -> np.ndarray:
    """Compute the gradient of the expected score: [340]."""
    return (np.exp(mdp.exact_logprobs(table).sum(1)) * scores) @ token_scores(table).reshape(mdp.COUNT, 4, -1).sum(1)


def token_scores(table: np.ndarray) -> np.ndarray:
    """Compute the gradient of each token's log pi: [1024, 340]."""
    return mdp.exact_scores(table).reshape(mdp.COUNT * mdp.HORIZON, -1)


@functools.cache
def policies(updates: int) -> tuple[np.ndarray, ...]:
    """Go up the expected score: the tables after 0, 1, ... updates, each of which moves every logit by `STEP`, as Adam's do."""
    found = [mdp.POLICY]
    for _ in range(updates):
        found.append(found[-1] + STEP * np.sign(exact_gradient(found[-1]).reshape(mdp.POLICY.shape)))
    return tuple(found)


def divergence(sampler: np.ndarray, table: np.ndarray) -> float:
    """Compute KL(sampler || policy), in nats a sequence."""
    old, new = (mdp.exact_logprobs(x).sum(1) for x in (sampler, table))
    return float(np.exp(old) @ (old - new))


def framed(logprobs: np.ndarray) -> np.ndarray:
    """Put [256, 4] sampled tokens into pgjax's frame: [256, 5], entry 0 is the prompt's."""
    return np.pad(logprobs, ((0, 0), (1, 0)))


def moments(loss: Loss, arrays: Sequence[Any], table: np.ndarray, sampler: np.ndarray, batches: np.ndarray) -> Moments:
    """Compute mean and variance of the gradient of minus a loss, at a policy, on samples of another one.

    Args:
      loss: (logprobs [B, 5] of the policy, *arrays [B, ...]) -> [].
      arrays: [256, ...] each: what is known of every sequence.
      table: [85, 4] logits of the policy.
      sampler: [85, 4] logits of what the batches are drawn from.
      batches: [N, B] numbers of sequences: all batches that there are.
    """
    chances = np.exp(mdp.exact_logprobs(sampler).sum(1))[batches].prod(1)
    batches, chances = batches[chances > 0], chances[chances > 0]
    logprobs = framed(mdp.exact_logprobs(table))
    with jax.enable_x64(True):
        given = [jnp.asarray(x[batches]) for x in (logprobs, *arrays)]
        weights = -np.asarray(_gradients(loss)(*given))[:, :, 1:].reshape(len(batches), -1)  # [N, B * 4]
    tokens = (batches[:, :, None] * mdp.HORIZON + np.arange(mdp.HORIZON)).reshape(len(batches), -1)
    total = np.zeros(mdp.COUNT * mdp.HORIZON)
    np.add.at(total, tokens, chances[:, None] * weights)
    mean = total @ token_scores(table)
    products = _products(table.tobytes())[tokens[:, :, None], tokens[:, None, :]]
    second = np.einsum("n,ni,nij,nj->", chances, weights, products, weights, optimize=True)
    return Moments(mean, float(second - mean @ mean))


@functools.lru_cache(maxsize=64)
def _gradients(loss: Loss) -> Callable[..., jax.Array]:
    return jax.jit(jax.vmap(jax.grad(loss)))


@functools.lru_cache(maxsize=8)
def _products(table: bytes) -> np.ndarray:
    scores = token_scores(np.frombuffer(table).reshape(mdp.POLICY.shape))
    return scores @ scores.T
