"""The exact token MDP: 4 tokens, 4 steps, one row of logits a prefix, all 256 sequences enumerated: a policy with no secrets.

Rows of a table are prefixes, shortest first, then in the order of their base-4 number: 1 + 4 + 16 + 64 = 85. What is known
exactly is NumPy in float64 and calls nothing of pgjax; what is held against it goes through pgjax, in its own layout: a
first token that stands for the prompt, then the four sampled ones.

J(policy) = E[R] - BETA KL(policy || reference); its best policy is reference * exp(R / BETA) / Z, where J* = BETA log Z.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.core.logprobs import token_logprobs

VOCAB, HORIZON, COUNT, BETA = 4, 4, 256, 0.3
_RNG = np.random.default_rng(0)
POLICY = _RNG.standard_normal((85, VOCAB))  # logits; the draws' order is part of the definition
REFERENCE = _RNG.standard_normal((85, VOCAB))
REWARD = _RNG.standard_normal(COUNT)  # of each whole sequence
SEQUENCES = np.array(list(itertools.product(range(VOCAB), repeat=HORIZON)), np.int32)
_OFFSETS = [0, 1, 5, 21]
PREFIXES = np.stack(
    [_OFFSETS[t] + SEQUENCES[:, :t] @ VOCAB ** np.arange(t)[::-1] for t in range(HORIZON)], axis=1
).astype(np.int32)  # [256, 4] the row that each token is drawn from
TOKENS = np.pad(SEQUENCES, ((0, 0), (1, 0)))
MASK = np.concatenate([np.zeros((COUNT, 1), bool), np.ones((COUNT, HORIZON), bool)], axis=1)


def exact_logprobs(table: np.ndarray) -> np.ndarray:
    """Compute log pi of every token of every sequence: [256, 4] float64."""
    return _log_softmax(table)[PREFIXES, SEQUENCES]


def exact_scores(table: np.ndarray) -> np.ndarray:
    """Compute the gradient of log pi of every token by the table: [256, 4, 85, 4] float64; one-hot minus softmax."""
    gradient = np.zeros((COUNT, HORIZON, *np.shape(table)))
    rows, steps = np.indices((COUNT, HORIZON))
    gradient[rows, steps, PREFIXES] -= np.exp(_log_softmax(table))[PREFIXES]
    gradient[rows, steps, PREFIXES, SEQUENCES] += 1
    return gradient


def exact_objective(table: np.ndarray) -> float:
    """Compute J(table) = E[R] - BETA KL(policy || reference) by the plain sum over sequences."""
    logp, logq = exact_logprobs(table).sum(1), REF_LOGPROBS.sum(1)
    return float(np.exp(logp) @ (REWARD - BETA * (logp - logq)))


def exact_gradient(table: np.ndarray, beta: float = BETA) -> np.ndarray:
    """Compute dJ/dtable = sum over sequences of pi (R - beta log(pi / ref)) grad log pi: [85, 4] float64."""
    logp, logq = exact_logprobs(table).sum(1), REF_LOGPROBS.sum(1)
    weights = np.exp(logp) * (REWARD - beta * (logp - logq))
    return np.einsum("n,ntij->ij", weights, exact_scores(table))


def _log_softmax(table: np.ndarray) -> np.ndarray:
    table = np.asarray(table, np.float64)
    top = table.max(1, keepdims=True)
    return table - top - np.log(np.exp(table - top).sum(1, keepdims=True))


REF_LOGPROBS = exact_logprobs(REFERENCE)  # [256, 4] float64
OPTIMUM = BETA * float(np.log(np.exp(REF_LOGPROBS.sum(1) + REWARD / BETA).sum()))  # J*
BEST = np.exp(REF_LOGPROBS.sum(1) + (REWARD - OPTIMUM) / BETA)  # [256] the optimal policy's probabilities


def logits(table: jax.Array, rows: jax.Array | np.ndarray = PREFIXES) -> jax.Array:
    """Lay out a table as a language model's output: [N, 5, 4]; position t predicts token t + 1, the last one nothing."""
    found = table[rows]
    return jnp.concatenate([found, jnp.zeros_like(found[:, :1])], axis=1)


def logprobs(table: jax.Array) -> jax.Array:
    """Compute log pi of every sequence's tokens by pgjax, in its frame: [256, 5]; entry 0 is zero."""
    return token_logprobs(logits(table), jnp.asarray(TOKENS))


def values_at(values: jax.Array, rows: jax.Array) -> jax.Array:
    """Lay out a value a prefix [85] before each token of the sequences of these numbers [B]: [B, 5]."""
    return jnp.pad(values[jnp.asarray(PREFIXES)[rows]], ((0, 0), (1, 0)))


def sample(table: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """Draw sequences from a policy: [count] int32, their numbers in `SEQUENCES`."""
    return jax.random.categorical(key, logprobs(table).sum(1), shape=(count,))
