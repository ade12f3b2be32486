"""Fine-tuning on packed examples: packing loses nothing and changes no number."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from pgjax.data.examples import Example
from pgjax.data.packing import Packed, pack
from pgjax.learning import supervised
from pgjax.learning.optimizer import Optimizer, init_state
from tests.compare import assert_close
from tests.sizes import campaign_but_for
from tests.tiny import tiny_lm, tiny_params


def examples_of(*lengths: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [Example(rng.integers(0, 23, n).tolist(), (rng.random(n) < 0.6).tolist()) for n in lengths]


def unpacked(packed: Packed) -> list[tuple[list[int], list[bool]]]:
    found = []
    for tokens, segments, mask in zip(*packed, strict=True):
        found += [(tokens[segments == s].tolist(), mask[segments == s].tolist()) for s in range(1, segments.max() + 1)]
    return found


def test_packing_loses_no_example_and_learns_no_first_token():
    examples = examples_of(*np.random.default_rng(1).integers(1, 17, 200).tolist())
    packed = pack(examples, 16)
    wanted = [(e.ids, [False, *e.learned[1:]]) for e in examples]
    assert sorted(unpacked(packed)) == sorted(wanted)
    assert (packed.segment_ids > 0).mean() > 0.95  # a row an example would be half empty
    assert not packed.mask[packed.segment_ids == 0].any()
    again = pack(examples, 16)
    assert all(np.array_equal(a, b) for a, b in zip(packed, again, strict=True))


@pytest.mark.parametrize("lengths", [(), (3, 0), (3, 17)])
def test_what_does_not_fit_is_refused(lengths):
    with pytest.raises(ValueError, match="examples"):
        pack(examples_of(*lengths), 16)


LENGTHS = (9, 2, 5, 1, 7, 3, 4, 6, 2)
EXAMPLES = examples_of(*LENGTHS)


@functools.cache
def loss_apart(name: str) -> tuple[float, Any]:
    """The mean over all learned tokens and its gradient, each example in a row of its own."""
    width, lm = max(LENGTHS), tiny_lm(name)
    tokens = np.array([e.ids + [0] * (width - len(e.ids)) for e in EXAMPLES], np.int32)
    real = np.arange(width)[None, :] < np.array(LENGTHS)[:, None]
    mask = np.array([[False, *e.learned[1:]] + [False] * (width - len(e.ids)) for e in EXAMPLES])

    def loss(params):
        found = pg.token_logprobs(lm.apply(params, tokens, real), tokens)
        return -jnp.where(mask, found, 0.0).sum() / int(mask.sum())

    value, gradient = jax.jit(jax.value_and_grad(loss))(tiny_params(name))
    return float(value), gradient


@pytest.mark.parametrize("name", campaign_but_for(["llama", "gpt2"], "llama"))
@pytest.mark.parametrize("microbatches", campaign_but_for([1, 2, 4], 2))
def test_the_packed_gradient_is_that_of_the_examples_apart(name, microbatches):
    # The bugs: a mean of means over rows or microbatches, a token predicted from the example before it.
    lm, params = tiny_lm(name), tiny_params(name)
    packed = pack(EXAMPLES, 12, pad_id=5)
    rows = 4 * -(-len(packed.tokens) // 4)
    packed = Packed(*(np.pad(x, ((0, rows - len(x)), (0, 0))) for x in packed))  # rows without a token, too
    assert len({int(n) for n in packed.mask.sum(1)}) > 2  # uneven rows
    optimizer = Optimizer.at(optax.scale(-1.0), lambda i: jnp.float32(1))  # a step is minus the gradient
    given = init_state(jax.tree.map(jnp.copy, params), optimizer)
    state, metrics = supervised.update(
        given, jax.device_put(packed), lm=lm, optimizer=optimizer, microbatches=microbatches
    )
    assert all(x.is_deleted() for x in jax.tree.leaves(given[:2]))  # its memory is the new state's
    expected, gradient = loss_apart(name)
    assert bool(state.healthy) and int(metrics["train/tokens"]) == int(packed.mask.sum())
    assert_close(metrics["loss/cross_entropy"], expected, rtol=1e-5)
    assert_close(jax.tree.map(jnp.subtract, params, state.params), gradient, 5e-5, of_max=5e-5)


def test_mean_surprise_counts_tokens_not_rows():
    lm, params = tiny_lm("gpt2"), tiny_params("gpt2")
    expected, _ = loss_apart("gpt2")
    packed = pack(EXAMPLES, 12)
    for batch_size in (2, 8):
        assert abs(supervised.mean_surprise(lm, params, packed, batch_size) - expected) < 1e-5 * expected
    with pytest.raises(ValueError, match=f"none of the {packed.mask.size} tokens is learned"):
        supervised.mean_surprise(lm, params, packed._replace(mask=packed.mask & False), 2)
