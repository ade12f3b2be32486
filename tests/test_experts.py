"""A product by expert: NumPy's, forward and backward, by loops and by ragged products; the router's choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.models import experts
from pgjax.models.architecture import Experts
from tests.compare import assert_close

RNG = np.random.default_rng(0)
SIZES = np.array([0, 1, experts.BLOCK, 0, 2 * experts.BLOCK + 3, 2, 0], np.int32)  # none, a whole block, more than one
ROWS = RNG.standard_normal((SIZES.sum(), 5)).astype(np.float32)
KERNELS = RNG.standard_normal((len(SIZES), 5, 3)).astype(np.float32)
COTANGENT = RNG.standard_normal((SIZES.sum(), 3)).astype(np.float32)
OF_ROW = np.repeat(np.arange(len(SIZES)), SIZES)


@pytest.mark.parametrize("product", [experts.expert_dot, experts._ragged])
def test_rows_are_multiplied_by_their_experts_kernels(product):
    expected = np.einsum("md,mdf->mf", np.float64(ROWS), np.float64(KERNELS)[OF_ROW])
    assert_close(jax.jit(product)(ROWS, KERNELS, SIZES), expected, 1e-5)


@pytest.mark.parametrize("by_kernel", [None, experts._ragged_by_kernel])  # a GPU's, beside what a CPU runs
def test_gradients_are_those_of_the_same_products(by_kernel):
    by_x = np.einsum("mf,mdf->md", np.float64(COTANGENT), np.float64(KERNELS)[OF_ROW])
    expected = np.zeros(KERNELS.shape)
    np.add.at(expected, OF_ROW, np.float64(ROWS)[:, :, None] * COTANGENT[:, None])
    if by_kernel is None:
        found = jax.jit(lambda *x: jax.vjp(lambda x, kernels: experts.expert_dot(x, kernels, SIZES), *x)[1](COTANGENT))
        assert_close(found(ROWS, KERNELS), (by_x, expected), 1e-4)
    else:
        assert_close(by_kernel(ROWS, COTANGENT, SIZES), expected, 1e-4)


def test_a_router_weighs_its_choice_alone_or_among_all():
    logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
    weights, chosen = experts.routed(logits, Experts(3, 2, normalized=False))
    assert chosen.tolist() == [[1, 2]]
    assert_close(weights, [[0.6, 0.3]], 1e-6)
    assert_close(experts.routed(logits, Experts(3, 2))[0], [[2 / 3, 1 / 3]], 1e-6)
