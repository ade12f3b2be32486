"""What a TPU is given: forms that are meant for a CPU stay there, and the mask is no tensor of all heads."""

import re

import jax
import jax.numpy as jnp
import pytest

from pgjax.models.attention import _lowered, _replaced
from tests.tiny import tiny_lm, tiny_params

B, T = 5, 7


def lowered(function, *args, platform):
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def decode_args(lm):
    slots = jnp.ones((B, T), bool)
    index = jnp.int32(3)
    return tiny_params("llama"), jnp.ones(B, jnp.int32), jnp.full(B, 3), index, slots, lm.init_cache(B, T)


@pytest.mark.parametrize(("platform", "by_bits"), [("tpu", False), ("cpu", True), ("cuda", False)])
def test_a_slot_is_written_as_integers_on_a_cpu_alone(platform, by_bits):
    lm = tiny_lm("llama", "bfloat16")
    text = lowered(lm.decode, *decode_args(lm), platform=platform)
    assert ("bitcast_convert" in text) == by_bits
    assert len(re.findall(r"dynamic_update_slice.*tensor<5x2x7x4x(?:bf16|ui16)>", text)) == 2 * lm.arch.depth


@pytest.mark.parametrize(("platform", "all_heads"), [("tpu", False), ("cpu", True), ("cuda", True)])
def test_no_mask_of_all_heads_is_made_on_a_tpu(platform, all_heads):
    lm = tiny_lm("llama")
    args = tiny_params("llama"), jnp.ones((B, T), jnp.int32), jnp.ones((B, T), bool)
    text = lowered(lm.hidden, *args, platform=platform)
    assert bool(re.search(rf"tensor<{B}x{lm.arch.heads}x{T}x{T}xi1>", text)) == all_heads


def test_both_forms_give_the_same_numbers():
    scores = 30 * jax.random.normal(jax.random.key(0), (2, 3, 4, 4))
    mask = jnp.tril(jnp.ones((2, 4, 4), bool)).at[1, 2:].set(False)
    some = mask.any(-1)[:, None, :, None]
    weights = [jax.nn.softmax(form(scores, mask), axis=-1) for form in (_lowered, _replaced)]
    assert jnp.array_equal(*(jnp.where(some, x, 0.0) for x in weights))
    assert all(bool(jnp.isfinite(x).all()) for x in weights)
    slopes = [
        jax.grad(lambda x, f=f: jnp.where(some, f(x, mask), 0.0).max(-1).sum())(scores) for f in (_lowered, _replaced)
    ]
    assert jnp.array_equal(*slopes)
