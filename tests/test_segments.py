"""Several texts in one row: each is computed as if it stood alone, and no gradient crosses from one to another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compare import assert_close
from tests.sizes import SOME_FAMILIES
from tests.tiny import tiny_apply, tiny_lm, tiny_params

LENGTHS = (5, 3, 4)
SEGMENTS = np.array([[1] * 5 + [2] * 3 + [3] * 4 + [0] * 3], np.int32)
TOKENS = np.random.default_rng(0).permutation(23)[None, :15].astype(np.int32)  # all different: a token is a position


@pytest.mark.parametrize("name", SOME_FAMILIES)
def test_a_packed_text_is_computed_as_if_it_stood_alone(name):
    # The bug: positions that run on (seen with absolute positions), or texts that see the one before them.
    params, apply = tiny_params(name), tiny_apply(name)
    packed = np.asarray(apply(params, TOKENS, None, SEGMENTS))
    tolerance = 1e-5 * np.abs(packed).max()
    begin = 0
    for length in LENGTHS:
        alone = np.asarray(apply(params, TOKENS[:, begin : begin + length]))
        assert_close(packed[:, begin : begin + length], alone, tolerance)
        begin += length
    joined = np.asarray(apply(params, TOKENS))
    assert np.abs(joined - packed)[:, 5:12].max() > 100 * tolerance  # so the above can fail


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_gradient_crosses_from_one_segment_to_another(name):
    lm, params = tiny_lm(name), tiny_params(name)
    direction = np.random.default_rng(1).standard_normal(lm.arch.width).astype(np.float32)

    def states(table):  # not logits: a tied unembedding must not reach the table
        return (
            lm.hidden({**params, "embed": {**params["embed"], "tokens": table}}, TOKENS, None, SEGMENTS)[0] @ direction
        )

    by_token = np.abs(np.asarray(jax.jacobian(states)(params["embed"]["tokens"]))).sum(-1)[:, TOKENS[0]]
    position = np.arange(15)
    allowed = (SEGMENTS.T == SEGMENTS) & (position[:, None] >= position[None, :])
    real = SEGMENTS[0] != 0
    assert (by_token[real][:, ~real] == 0).all()
    assert ((by_token > 0) == allowed)[np.ix_(real, real)].all()


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_changes_nothing_and_makes_no_nan(name):
    # The bug: 300 padded places count as positions, run past the table of 256, and their NaN reaches every gradient.
    lm, params = tiny_lm(name), tiny_params(name)
    tokens = np.pad(TOKENS[:, :12], ((0, 0), (0, 300)), constant_values=7)
    segments = np.pad(SEGMENTS[:, :12], ((0, 0), (0, 300)))

    @jax.jit
    def loss(params, tokens, segments):
        return jnp.square(lm.apply(params, tokens, None, segments)[:, :12]).mean()

    value, gradient = jax.value_and_grad(loss)(params, tokens, segments)
    expected, wanted = jax.value_and_grad(loss)(params, TOKENS[:, :12], SEGMENTS[:, :12])
    assert_close(value, expected, rtol=1e-5)
    assert_close(gradient, wanted, 1e-7, of_max=1e-4)
    other = np.where(segments == 0, 3, tokens)
    assert np.array_equal(
        lm.apply(params, other, None, segments)[:, :12], lm.apply(params, tokens, None, segments)[:, :12]
    )


def test_an_attention_mask_inside_segments_holds_too():
    # Two left-padded rows side by side in one: the padding inside a segment is nothing's neighbour and no position.
    params, apply = tiny_params("gpt2"), tiny_apply("gpt2")
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2]], np.int32)
    mask = np.array([[0, 1, 1, 1, 0, 0, 1, 1]], bool)
    packed = np.asarray(apply(params, TOKENS[:, :8], mask, segments))
    assert_close(packed[:, 1:4], apply(params, TOKENS[:, 1:4]), of_max=1e-5)
    assert_close(packed[:, 6:8], apply(params, TOKENS[:, 6:8]), of_max=1e-5)
