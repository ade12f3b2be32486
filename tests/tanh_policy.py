"""A small policy, tanh(x w) u + b, and batches for it: what the trust region is tested on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from pgjax.core.logprobs import token_logprobs
from pgjax.core.losses import clipped_surrogate_loss
from pgjax.core.trust_region import fisher_vector_product, trust_region_step

ROWS, LENGTH, VOCAB, WIDTH = 4, 5, 6, 3
MASK = np.array([[1, 1, 0, 0, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]], bool)
OLD = np.full((ROWS, LENGTH), -2, np.float32)


def draw(seed, dtype=np.float32):
    """A policy tanh(x w) u + b and a batch of random inputs, tokens and advantages."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (WIDTH, 4), "u": (4, VOCAB), "b": (VOCAB,)}
    params = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    batch = {
        "x": rng.standard_normal((ROWS, LENGTH, WIDTH)).astype(dtype),
        "tokens": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        "advantages": rng.standard_normal((ROWS, LENGTH)).astype(np.float32),
        "mask": MASK,
    }
    return jax.tree.map(jnp.asarray, (params, batch))


def logits_of(params, batch):
    return jnp.tanh(batch["x"] @ params["w"]) @ params["u"] + params["b"][None, None]


@functools.partial(jax.jit, static_argnames="axis_name")
def product(params, vector, batch, axis_name=None):
    return fisher_vector_product(lambda p: logits_of(p, batch), params, vector, batch["mask"], axis_name=axis_name)


def surrogate(params, old, batch, axis_name=None):
    logprobs = token_logprobs(logits_of(params, batch), batch["tokens"])
    return clipped_surrogate_loss(
        logprobs, old, batch["advantages"], batch["mask"], clip_eps=jnp.inf, axis_name=axis_name
    )


@functools.partial(jax.jit, static_argnames=("axis_name", "cg_iterations"))
def step(params, batch, axis_name=None, **options):
    """One step on the plain ratio surrogate, the batch being the old policy's."""
    old = token_logprobs(logits_of(params, batch), batch["tokens"])
    return trust_region_step(
        lambda p: surrogate(p, old, batch, axis_name),
        lambda p: logits_of(p, batch),
        params,
        batch["mask"],
        axis_name=axis_name,
        **options,
    )


def fisher_matrix(params, batch, mask):
    """The definition, in NumPy: the mean over the mask of sum_a p_a s_a s_a^T, s_a the gradient of log p_a."""
    flat, unravel = ravel_pytree(params)
    jacobian = np.asarray(jax.jacfwd(lambda v: logits_of(unravel(v), batch))(flat))
    logits = np.asarray(logits_of(params, batch))
    total = np.zeros((flat.size, flat.size))
    for row, token in np.argwhere(mask):
        if token == 0:
            continue  # counted below, predicted by nothing
        p = np.exp(logits[row, token - 1]) / np.exp(logits[row, token - 1]).sum()
        scores = (np.eye(VOCAB) - p) @ jacobian[row, token - 1]
        total += np.einsum("a,ai,aj->ij", p, scores, scores)
    return total / mask.sum()
