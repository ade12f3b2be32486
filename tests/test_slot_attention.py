"""A decode step's attention by one kernel: the numbers of `attention`, by Pallas's interpreter; on a GPU see test_gpu.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import sample
from pgjax.models import causal_lm
from pgjax.models.attention import attention
from pgjax.models.decode_attention import BLOCK, slot_attention, takes
from pgjax.parallel.sharding import make_mesh
from tests.compare import assert_close
from tests.tiny import ARCHITECTURES, left_padded

interpreted = functools.partial(slot_attention, interpret=True)


def case(batch, heads, kv_heads, length, head_dim, index, dtype=np.float32):
    """Random arguments: slots in holes, the first row beginning late, nothing marked after `index`."""
    draw = np.random.default_rng([heads, length]).standard_normal
    shapes = (batch, heads, 1, head_dim), *[(batch, kv_heads, length, head_dim)] * 2
    query, keys, values = (jnp.asarray(draw(shape), dtype) for shape in shapes)
    slots = draw((batch, length)) < 0.5
    slots[0, :index] = False
    slots[:, index], slots[:, index + 1 :] = True, False
    return query, keys, values, jnp.asarray(slots)


def plainly(query, keys, values, slots, **scale):
    """What it must equal."""
    return attention(query, keys, values, slots[:, None, :], **scale)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "head_dim", "index"),
    [
        (14, 2, 2 * BLOCK + 5, 16, 2 * BLOCK + 4),  # a last block that is short
        (9, 3, 3 * BLOCK, 32, BLOCK - 1),  # ends with a block
        pytest.param(4, 4, 2 * BLOCK, 16, BLOCK, marks=pytest.mark.campaign),  # begins one; one query a head
        (40, 2, 7, 64, 3),  # a group of more rows than the least
    ],
)
def test_it_equals_attention_under_a_mask(heads, kv_heads, length, head_dim, index):
    arguments = case(3, heads, kv_heads, length, head_dim, index)
    assert_close(interpreted(*arguments), plainly(*arguments), 2e-6)
    assert_close(interpreted(*arguments, scale=0.4), plainly(*arguments, scale=0.4), 2e-6)
    half = case(3, heads, kv_heads, length, head_dim, index, jnp.bfloat16)
    exact = plainly(*(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in half))
    assert_close(interpreted(*half), exact, 0.02)  # scores and sums in float32, weights and result rounded
    assert interpreted(*half).dtype == jnp.bfloat16


def test_blocks_beyond_the_last_slot_are_not_read():
    query, keys, values, slots = case(2, 4, 2, 3 * BLOCK, 16, BLOCK + 3)
    expected = interpreted(query, keys, values, slots)
    poison = lambda x: x.at[:, :, 2 * BLOCK :].set(jnp.nan)
    assert np.array_equal(interpreted(query, poison(keys), poison(values), slots), expected)
    wrapped = slots.at[0, 2 * BLOCK].set(True)  # as where the slots are a ring
    found = interpreted(query, poison(keys), poison(values), wrapped)
    assert np.isnan(found[0]).all() and np.array_equal(found[1], expected[1])


@pytest.mark.campaign
@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "tensor": 2}, {"tensor": 4}])
def test_on_a_mesh_each_device_computes_its_own_rows_and_heads(axes):
    arguments = case(4, 12, 4 if axes != {"tensor": 4} else 2, BLOCK, 16, 20)  # two heads do not split in four
    with jax.set_mesh(make_mesh(**axes)):
        found = jax.jit(interpreted)(*arguments)
    assert_close(found, plainly(*arguments), 2e-6)


def test_heads_that_it_takes():
    assert [size for size in range(1, 300) if takes(size)] == [16, 32, 64, 128, 256]


def lm_of(head_dim: int, **options):
    """A tiny model."""
    return causal_lm.causal_lm(dataclasses.replace(ARCHITECTURES["llama"], head_dim=head_dim), **options)


def test_decoding_uses_it_beside_cudnn_alone():
    def decode(lm) -> str:
        params = jax.eval_shape(lm.init, jax.random.key(0))
        row = jax.ShapeDtypeStruct((2,), jnp.int32)
        cache = jax.eval_shape(lambda: lm.init_cache(2, 5))
        slots = jax.ShapeDtypeStruct((2, 5), bool)
        return str(jax.make_jaxpr(lm.decode)(params, row, row, jax.ShapeDtypeStruct((), jnp.int32), slots, cache))

    assert decode(lm_of(16, dtype=jnp.bfloat16, kernel="cudnn")).count("name=slot_attention") == 2  # one a layer
    for other in (lm_of(16, dtype=jnp.bfloat16), lm_of(8, dtype=jnp.bfloat16, kernel="cudnn")):
        assert "slot_attention" not in decode(other)


@pytest.mark.campaign
def test_greedy_tokens_are_the_same(monkeypatch):
    monkeypatch.setattr(causal_lm, "slot_attention", interpreted)
    plain = lm_of(16)
    params = jax.tree.map(lambda x: 10 * x, plain.init(jax.random.key(0)))
    prompts, mask = left_padded((7, 4, 1, 5), 7)
    options = {"max_new_tokens": 9, "temperature": 0.0}
    expected = sample(plain, params, prompts, mask, jax.random.key(0), **options)
    by_kernel = plain._replace(decode=lm_of(16, kernel="cudnn").decode)
    found = sample(by_kernel, params, prompts, mask, jax.random.key(0), **options)
    assert np.array_equal(found.tokens, expected.tokens)
    assert len(np.unique(np.asarray(expected.tokens)[:, 7:])) > 4  # so the above can fail
