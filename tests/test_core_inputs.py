"""What the pure core does with inputs that are not what it computes with: refused by name, or right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from tests.compare import assert_close

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.standard_normal((2, 4, 7)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(0, 7, (2, 4)), jnp.int32)


@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_tokens_that_are_no_ids_are_refused_by_function_and_argument(dtype):
    # The bug: True became the id 1, and 2.7 the id 2.
    tokens, hidden = TOKENS.astype(dtype), jnp.ones((2, 4, 3))
    with pytest.raises(ValueError, match=r"^token_logprobs: tokens must be whole numbers.*got"):
        pg.token_logprobs(LOGITS, tokens)
    with pytest.raises(ValueError, match=r"^aligned_token_logprobs: tokens must be whole numbers.*got"):
        pg.aligned_token_logprobs(LOGITS, tokens)
    with pytest.raises(ValueError, match=r"^linear_token_logprobs: tokens must be whole numbers.*got"):
        jax.jit(pg.linear_token_logprobs)(hidden, jnp.ones((7, 3)), tokens)


def test_numbers_that_cannot_be_meant_are_refused():
    hidden = jnp.ones((2, 4, 3), jnp.int32)
    with pytest.raises(ValueError, match="linear_token_logprobs: hidden must be of a floating type, got int32"):
        pg.linear_token_logprobs(hidden, jnp.ones((7, 3)), TOKENS)
    with pytest.raises(ValueError, match=r"discount must be at most 1, got 1\.5"):
        pg.monte_carlo_returns(jnp.ones((1, 3)), None, discount=1.5)
    with pytest.raises(ValueError, match="group_size must be known when the function is traced"):
        jax.jit(lambda size: pg.group_advantages(jnp.ones(4), group_size=size))(2)


def test_logits_of_completions_are_taken_as_they_stand():
    found = pg.aligned_token_logprobs(LOGITS, TOKENS, temperature=0.7)
    log_p = jax.nn.log_softmax(LOGITS / 0.7)
    assert_close(found, jnp.take_along_axis(log_p, TOKENS[..., None], axis=2)[..., 0], 1e-6)
    shifted = pg.token_logprobs(LOGITS, jnp.pad(TOKENS, ((0, 0), (1, 0)))[:, :-1], temperature=0.7)
    assert_close(found[:, :-1], shifted[:, 1:], 1e-6)


def test_preferences_are_masked_and_weighed():
    chosen, rejected = jnp.array([1.0, 0.2, jnp.nan, -1.0]), jnp.array([0.0, 0.5, 1.0, 0.3])
    mask, weights = jnp.array([True, True, False, True]), jnp.array([1.0, 2.0, jnp.nan, 0.5])
    options = {"margin": jnp.array([0.1, 0.0, 0.3, 0.2]), "center_coef": 0.1}
    kept = np.array([0, 1, 3])
    of = lambda i, **more: pg.preference_loss(
        chosen[i], rejected[i], margin=options["margin"][i], center_coef=0.1, **more
    )
    assert_close(pg.preference_loss(chosen, rejected, mask, **options), of(kept), 1e-6)
    each = np.array([float(of(np.array([i]))) for i in kept])
    weighed = pg.preference_loss(chosen, rejected, mask, weights=weights, **options)
    assert_close(weighed, np.float32((each * [1.0, 2.0, 0.5]).sum() / 3.5), 1e-6)
    gradient = jax.grad(lambda x: pg.preference_loss(x, rejected, mask, weights=weights, **options))(chosen)
    assert np.isfinite(gradient).all() and gradient[2] == 0
    parts = jax.tree.map(lambda x: x.reshape(2, 2), (chosen, rejected, mask, weights, options["margin"]))
    mapped = lambda c, r, m, w, x: pg.preference_loss(c, r, m, weights=w, margin=x, center_coef=0.1, axis_name="i")
    assert_close(jax.vmap(mapped, axis_name="i")(*parts), jnp.full(2, weighed), 1e-6)
