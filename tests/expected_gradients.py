"""Expected gradients by enumeration, and what they must be: every batch that a policy can draw, weighted by its probability.

`expected_gradient` goes through pgjax and autodiff. The constants are closed forms in float64 NumPy that use neither.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.laboratory import token_mdp as mdp
from pgjax.core.logprobs import token_logprobs

# The same places for both precisions: NumPy's int64 would be int64 under enable_x64 and int32 elsewhere.
PREFIXES, SEQUENCES, TOKENS = (x.astype(np.int32) for x in (mdp.PREFIXES, mdp.SEQUENCES, mdp.TOKENS))
TOKEN_LOGP, TOKEN_LOGQ = mdp.exact_logprobs(mdp.POLICY), mdp.REF_LOGPROBS  # [256, 4]
LOGP, LOGQ = TOKEN_LOGP.sum(1), TOKEN_LOGQ.sum(1)
PI, REF = np.exp(LOGP), np.exp(LOGQ)
TOTAL = mdp.REWARD - mdp.BETA * (LOGP - LOGQ)  # what J is the mean of
SINGLES = np.arange(mdp.COUNT, dtype=np.int32)[:, None]  # batches of one
PAIRS = np.array(list(itertools.product(range(mdp.COUNT), repeat=2)), np.int32)  # every batch of two
# All sequences once: under a policy of equal logits this one batch is the distribution itself.
EVERY = SINGLES.T
UNIFORM = np.zeros_like(mdp.POLICY)


def in_both_precisions(test):
    """Run a test in float64, where it proves, and in float32, where it checks; `atol` says how closely."""

    @functools.wraps(test)
    def run(*args, atol, **kwargs):
        with jax.enable_x64(atol < 1e-6):
            test(*args, atol=atol, **kwargs)

    precisions = [pytest.param(1e-12, id="float64"), pytest.param(1e-5, id="float32")]
    return pytest.mark.parametrize("atol", precisions)(run)


def cosine(x, y):
    """Compute the cosine of the angle between two arrays."""
    x, y = np.ravel(x), np.ravel(y)
    return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


def frame(x):
    """Put [256, 4] sampled tokens into pgjax's frame: [256, 5], entry 0 is the prompt's."""
    return jnp.asarray(np.pad(x, ((0, 0), (1, 0))))


def chance(table=mdp.POLICY):
    """Compute the probability of each sequence: [256] float64."""
    return np.exp(mdp.exact_logprobs(table).sum(1))


@jax.jit
def _logprobs(table):
    return token_logprobs(mdp.logits(table, PREFIXES), TOKENS)


@jax.jit
def pull(table, cotangent):
    return jax.vjp(_logprobs, table)[1](cotangent)[0]


def logprobs_of(table):
    """Compute log pi of every sequence's tokens through pgjax: [256, 5]."""
    return np.asarray(_logprobs(jnp.asarray(table)))


@functools.cache
def each_batch(loss):
    return jax.jit(jax.vmap(jax.grad(loss)))


def expected_gradient(loss, *arrays, batches=SINGLES, weights=None, table=mdp.POLICY):
    """Expect a loss's gradient by the table over every batch: [85, 4].

    `loss(logprobs [B, 5], *arrays [B, ...]) -> []` is differentiated a batch at a time; each of `arrays` is [N, B, ...].
    `weights` [N] are the batches' probabilities, those of `mdp.POLICY` unless given; `table` is where the gradient is.
    """
    weights = PI[batches].prod(1) if weights is None else weights
    logprobs = logprobs_of(table)
    found = np.asarray(each_batch(loss)(logprobs[batches], *arrays), np.float64)
    total = np.zeros(logprobs.shape)
    np.add.at(total, batches, weights.reshape(-1, 1, 1) * found)  # float64 sums, whatever the loss computes in
    return np.asarray(pull(jnp.asarray(table), jnp.asarray(total)))


def weighted_scores(weights, table=mdp.POLICY):
    """Sum weights [256, 4] or [256] times the gradient of each token's log pi: [85, 4], in NumPy alone."""
    weights = np.broadcast_to(np.reshape(weights, (mdp.COUNT, -1)), SEQUENCES.shape)
    return np.einsum("nt,ntij->ij", weights, mdp.exact_scores(table))


def softmax(table):
    return np.exp(table - table.max(1, keepdims=True)) / np.exp(table - table.max(1, keepdims=True)).sum(
        1, keepdims=True
    )


def visits(chances):
    """Compute how often each prefix is met: [85]."""
    met = np.zeros(len(mdp.POLICY))
    np.add.at(met, PREFIXES, np.broadcast_to(chances[:, None], PREFIXES.shape))
    return met


def conditional(returns, chances=PI):
    """Average reward-to-go given the prefix, and given prefix and token: V [85], Q [85, 4]."""
    mass, total = np.zeros_like(mdp.POLICY), np.zeros_like(mdp.POLICY)
    np.add.at(mass, (PREFIXES, SEQUENCES), np.broadcast_to(chances[:, None], PREFIXES.shape))
    np.add.at(total, (PREFIXES, SEQUENCES), chances[:, None] * returns)
    return total.sum(1) / mass.sum(1), total / mass


def _charge_gradient(charge, whole):
    """Differentiate the expected k2 of tokens or of whole sequences, by autodiff of the plain sum in float64."""

    def expected(table):
        d = jax.nn.log_softmax(table)[PREFIXES, SEQUENCES] - TOKEN_LOGQ
        chances = jnp.exp(jnp.sum(d + TOKEN_LOGQ, axis=1))
        return jnp.sum(chances * (charge(d.sum(1)) if whole else charge(d).sum(1)))

    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.grad(expected))(jnp.asarray(mdp.POLICY)))


_P, _Q = softmax(mdp.POLICY), softmax(mdp.REFERENCE)
_D = np.log(_P) - np.log(_Q)
SCORE_GRADIENT = mdp.exact_gradient(mdp.POLICY, beta=0.0)  # of E[R]
KL_GRADIENT = SCORE_GRADIENT - mdp.exact_gradient(mdp.POLICY, beta=1.0)  # of KL(policy || reference)
FORWARD_GRADIENT = visits(REF)[:, None] * (_P - _Q)  # of KL(reference || policy)
# The two that hold the prefixes fixed: of each token's own KL at the prefixes that the policy meets.
LOCAL_GRADIENT = visits(PI)[:, None] * _P * (_D - (_P * _D).sum(1, keepdims=True))
LOCAL_FORWARD_GRADIENT = visits(PI)[:, None] * (_P - _Q)
K2_GRADIENT = _charge_gradient(lambda d: d**2 / 2, whole=False)  # of E[k2] of tokens, which is not the KL
WHOLE_K2_GRADIENT = _charge_gradient(lambda d: d**2 / 2, whole=True)
RETURNS = mdp.REWARD[:, None] - mdp.BETA * np.cumsum((TOKEN_LOGP - TOKEN_LOGQ)[:, ::-1], axis=1)[:, ::-1]  # [256, 4]
VALUES = conditional(RETURNS)[0]  # the right critic of J
