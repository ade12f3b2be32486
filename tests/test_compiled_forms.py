"""What XLA makes of the hot paths on a CPU: forms that cost time without changing a number, so that no other test sees them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.core.linear_logprobs import linear_token_logprobs
from pgjax.models.cache import write_slot
from pgjax.models.causal_lm import decode_params
from pgjax.models.transformer import columns_dot
from tests.compile_options import AS_FOR_USERS
from tests.tiny import tiny_lm, tiny_params

pytestmark = pytest.mark.usefixtures("full_compiles")

HALF = jnp.bfloat16


def compiled(function, *args, **options) -> str:
    """Return the optimised program's text."""
    return jax.jit(function, **options).lower(*args).compile(AS_FOR_USERS).as_text()


def test_the_kernel_stays_the_left_side_of_a_decode_product():
    # The bug: XLA folds the transpose into the product by exchanging its sides, and then packs the weights at every step.
    for dtype in (jnp.float32, HALF):
        text = compiled(columns_dot, jnp.ones((48, 40), dtype), jnp.ones((16, 40), dtype))
        results = re.findall(r"f32\[([\d,]+)\]\S* dot\(", text)
        assert results == ["48,16"], results


def test_a_cache_of_half_floats_is_written_without_widening_it():
    cache, x = jnp.zeros((4, 2, 24, 8), HALF), jnp.ones((4, 2, 1, 8), HALF)
    text = compiled(write_slot, cache, x, jnp.int32(3), donate_argnums=0)
    assert "dynamic-update-slice" in text and "f32[4,2,24,8]" not in text


def test_a_decode_step_looks_tokens_up_without_rounding_the_embeddings():
    # The bug: a table of 16-bit floats is widened again as a whole, because XLA on CPU gathers no such rows.
    lm, params = tiny_lm("llama", "bfloat16"), tiny_params("llama")
    row, slots = jnp.ones(2, jnp.int32), jnp.ones((2, 5), bool)
    step = lambda params, cache: lm.decode(decode_params(params, HALF), row, row, jnp.int32(3), slots, cache)
    text = compiled(step, params, lm.init_cache(2, 5))
    assert f"f32[{lm.arch.vocab_size},{lm.arch.width}]" in text
    assert f"bf16[{lm.arch.vocab_size},{lm.arch.width}]" not in text


def test_the_backward_pass_stacks_no_half_floats():
    # The bug: a write into a stack of 16-bit floats widens, updates and rounds all layers' entries at every layer.
    lm, params = tiny_lm("llama", "bfloat16"), tiny_params("llama")
    tokens = jnp.ones((2, 13), jnp.int32)
    text = compiled(jax.grad(lambda params: lm.hidden(params, tokens).astype(jnp.float32).sum()), params)
    stack = f"[{lm.arch.depth},2,13,{lm.arch.width}]"
    assert f"f32{stack}" in text and f"bf16{stack}" not in text


def test_the_gradient_of_the_unembedding_is_summed_and_returned_in_float32():
    # The bug: casting the whole unembedding first rounds its gradient to the hidden states' 16 bits.
    keys = jax.random.split(jax.random.key(0), 2)
    hidden = jax.random.normal(keys[0], (2, 5, 8), HALF)
    unembedding = jax.random.normal(keys[1], (33, 8))
    tokens = jnp.arange(10).reshape(2, 5)

    def loss(unembedding):
        return linear_token_logprobs(hidden, unembedding, tokens, chunk_size=11).sum()

    text = compiled(jax.grad(loss), unembedding)
    assert "bf16[33,8]" not in text
    gradient = np.asarray(jax.jit(jax.grad(loss))(unembedding))
    assert gradient.dtype == np.float32
    assert (gradient != gradient.astype(HALF).astype(np.float32)).mean() > 0.5
