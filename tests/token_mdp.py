"""The exact token MDP: 4 tokens, 4 steps, one row of logits a prefix, all 256 sequences enumerated.

Rows of a table are prefixes, shortest first, then in the order of their base-4 number: 1 + 4 + 16 + 64 = 85.
A sequence is laid out as pgjax has it: a first token that stands for the prompt, then the four sampled ones.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.logprobs import token_logprobs

VOCAB, HORIZON, COUNT, BETA = 4, 4, 256, 0.3
_RNG = np.random.default_rng(0)
POLICY = _RNG.standard_normal((85, VOCAB))
REFERENCE = _RNG.standard_normal((85, VOCAB))
REWARD = _RNG.standard_normal(COUNT)
SEQUENCES = np.array(list(itertools.product(range(VOCAB), repeat=HORIZON)))
_OFFSETS = [0, 1, 5, 21]
PREFIXES = np.stack(
    [_OFFSETS[t] + SEQUENCES[:, :t] @ VOCAB ** np.arange(t)[::-1].astype(int) for t in range(HORIZON)], axis=1
)
TOKENS = np.concatenate([np.zeros((COUNT, 1), int), SEQUENCES], axis=1)
MASK = np.concatenate([np.zeros((COUNT, 1), bool), np.ones((COUNT, HORIZON), bool)], axis=1)


def exact_logprobs(table: np.ndarray) -> np.ndarray:
    """[256, 4] in float64 NumPy, independent of pgjax."""
    logp = table - np.log(np.exp(table).sum(1, keepdims=True))
    return logp[PREFIXES, SEQUENCES]


@jax.jit
def logits(table: jax.Array) -> jax.Array:
    """[256, 5, 4] in pgjax's layout: position t predicts token t + 1, the last one predicts nothing."""
    rows = table[PREFIXES]
    return jnp.concatenate([rows, jnp.zeros_like(rows[:, :1])], axis=1)


@jax.jit
def logprobs(table: jax.Array) -> jax.Array:
    """[256, 5] by pgjax."""
    return token_logprobs(logits(table), TOKENS)


@jax.jit
def objective(table: jax.Array, beta: float = BETA) -> jax.Array:
    """E[R] - beta KL(policy || reference), by the plain sum over sequences."""
    logp = jax.nn.log_softmax(table)[PREFIXES, SEQUENCES].sum(1)
    logq = jnp.asarray(exact_logprobs(REFERENCE).sum(1), logp.dtype)
    return jnp.sum(jnp.exp(logp) * (jnp.asarray(REWARD, logp.dtype) - beta * (logp - logq)))


THETA = jnp.asarray(POLICY, jnp.float32)
REF_LOGPROBS = np.pad(exact_logprobs(REFERENCE), ((0, 0), (1, 0))).astype(np.float32)
PROBABILITY = np.exp(exact_logprobs(POLICY).sum(1)).astype(np.float32)
EXACT_GRADIENT = jax.jit(jax.grad(objective))(THETA)
SCORES = REWARD.astype(np.float32)
