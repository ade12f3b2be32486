"""Drawing by blocks and multiplying in 16 bits: the short ways give what the long ways give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from pgjax.models.transformer import columns_dot, half_matmul
from pgjax.rollout.filters import draw


def test_draws_over_many_blocks_have_the_distribution_of_the_row():
    # 43 tokens in blocks of 8: a short last block, an empty block, a single likely token among unlikely ones.
    rows, generator = 40_000, np.random.default_rng(0)
    logprobs = generator.standard_normal(43).astype(np.float32) * 0.7
    logprobs[8:16] = -np.inf
    logprobs[20], logprobs[42] = 2.0, 1.0
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(rows))
    by_blocks = jax.jit(draw, static_argnames="block")
    logits = jnp.broadcast_to(logprobs + 3, (rows, 43))  # not normalised
    tokens, told = by_blocks(logits, keys, jnp.zeros(rows, jnp.int32), block=8)
    counts, p = np.bincount(np.asarray(tokens), minlength=43), np.exp(np.float64(logprobs))
    p /= p.sum()
    assert counts.shape == (43,) and counts[8:16].sum() == 0
    expected = rows * p[p > 0]
    assert expected.min() > 5
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() < chi2.isf(1e-4, (p > 0).sum() - 1)
    np.testing.assert_allclose(told, np.log(p[np.asarray(tokens)]), atol=2e-6)


def test_block_and_token_within_it_are_drawn_independently():
    # The bug: one key for both draws ties the place within the block to the block.
    rows = 20_000
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(rows))
    tokens = np.asarray(draw(jnp.zeros((rows, 64)), keys, jnp.zeros(rows, jnp.int32), block=8)[0])
    counts = np.bincount(tokens, minlength=64)
    assert ((counts - rows / 64) ** 2 / (rows / 64)).sum() < chi2.isf(1e-4, 63)


@pytest.mark.parametrize("shape", [(6, 4, 9), (6, 9, 4)])
def test_half_matmul_has_the_gradients_of_the_float32_product(shape):
    rows, width, features = shape
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((rows, width), (width, features), (rows, features))
    x, kernel, weight = (jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, sizes, strict=True))

    def loss(product, x, kernel):
        return (product(x, kernel).astype(jnp.float32) * weight.astype(jnp.float32)).sum()

    ours = jax.jit(jax.grad(lambda *a: loss(half_matmul, *a), (0, 1)))(x, kernel)
    exact = jax.grad(lambda *a: loss(jnp.matmul, *a), (0, 1))(x.astype(jnp.float32), kernel.astype(jnp.float32))
    for got, wanted in zip(ours, exact, strict=True):
        assert got.dtype == jnp.bfloat16 and got.shape == wanted.shape
        np.testing.assert_allclose(np.asarray(got, np.float32), wanted, atol=0.05, rtol=0.01)


def test_columns_dot_is_the_product_with_the_transposed_kernel():
    kernel, x = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(5, 4), (2, 3, 4)]))
    np.testing.assert_allclose(columns_dot(kernel, x), x @ kernel.T, rtol=1e-5, atol=1e-6)
