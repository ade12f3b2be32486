"""The value head: zero start, the value before the token, and no gradient but from the value loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.core.advantages import monte_carlo_returns
from pgjax.core.logprobs import token_logprobs
from pgjax.core.losses import clipped_surrogate_loss, policy_gradient_loss, value_loss
from pgjax.models.heads import init_value_head, token_values
from tests.compare import assert_close
from tests.tiny import left_padded, tiny_lm, tiny_params

TOKENS, MASK = left_padded((6, 4, 3), 6)
SAMPLED = MASK & (np.arange(6) >= 4)
REWARDS = np.where(SAMPLED, np.random.default_rng(0).standard_normal(MASK.shape), 0).astype(np.float32)
RETURNS = np.asarray(monte_carlo_returns(REWARDS, SAMPLED))
HIDDEN = np.random.default_rng(1).standard_normal((3, 6, 16)).astype(np.float32)  # stands for the body
HEAD = {"kernel": jnp.linspace(-1.0, 1.0, 16), "bias": jnp.float32(0.3)}


def test_the_head_starts_at_zero_and_the_value_loss_first_moves_the_head_alone():
    head = init_value_head(16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), head) == {
        "kernel": ((16,), jnp.float32),
        "bias": ((), jnp.float32),
    }

    def loss(hidden, head):
        values = token_values(head, hidden)
        return value_loss(values, RETURNS, SAMPLED), values

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, values), (of_hidden, of_head) = run(HIDDEN, head)
    assert (values == 0).all() and (of_hidden == 0).all()
    assert_close(value, 0.5 * np.square(RETURNS)[SAMPLED].mean(), 1e-6)
    assert_close(of_head["bias"], -RETURNS[SAMPLED].mean(), 1e-6)
    before = np.where(SAMPLED, RETURNS, 0)[:, 1:, None] * HIDDEN[:, :-1]  # the state that chose the token
    assert_close(of_head["kernel"], -before.sum((0, 1)) / SAMPLED.sum(), 1e-5)
    (_, _), (of_hidden, _) = run(HIDDEN, HEAD)
    assert (np.abs(of_hidden).max(-1) > 0).tolist() == np.roll(SAMPLED, -1, axis=1).tolist()


def test_a_value_is_read_before_its_token():
    # The bug: V(state after the token), which has already seen the action that it is the baseline of.
    lm, params = tiny_lm("gpt2"), tiny_params("gpt2")
    values_of = jax.jit(lambda tokens: token_values(HEAD, lm.hidden(params, tokens, MASK)))
    values = np.asarray(values_of(TOKENS))
    assert values.dtype == np.float32 and values.shape == TOKENS.shape and (values[:, 0] == 0).all()
    for t in range(6):
        other = TOKENS.copy()
        other[0, t] = (other[0, t] + 5) % 23
        changed = np.asarray(values_of(other))[0] != values[0]
        assert not changed[: t + 1].any() and changed[t + 1 :].all()


def test_values_are_float32_from_bfloat16_states():
    values = token_values(HEAD, jnp.asarray(HIDDEN, jnp.bfloat16))
    assert values.dtype == jnp.float32
    assert_close(values, token_values(HEAD, HIDDEN), 0.05)


def test_states_that_are_not_finite_stay_at_their_place():
    head = {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array(0.5)}
    states = jnp.array([[[jnp.nan, 2.0], [3.0, 4.0], [1.0, jnp.inf]]])
    loss = lambda head: value_loss(token_values(head, states), jnp.ones((1, 3)), jnp.array([[False, False, True]]))
    values, gradient = token_values(head, states), jax.grad(loss)(head)
    np.testing.assert_array_equal(values, [[0.0, np.nan, 11.5]])
    np.testing.assert_allclose(gradient["kernel"], [10.5 * 3, 10.5 * 4])
    np.testing.assert_allclose(gradient["bias"], 10.5)
    with pytest.raises(AssertionError):
        token_values(init_value_head(1), states)


def test_the_policy_loss_gives_the_head_no_gradient_through_advantages_that_nobody_stopped():
    unembedding = np.random.default_rng(2).standard_normal((16, 23)).astype(np.float32)

    def losses(hidden, head):
        logprobs = token_logprobs(hidden @ unembedding, TOKENS)
        advantages = RETURNS - token_values(head, hidden)
        clipped = clipped_surrogate_loss(logprobs, logprobs, advantages, SAMPLED)
        return clipped + policy_gradient_loss(logprobs, advantages, SAMPLED)

    of_hidden, of_head = jax.jit(jax.grad(losses, argnums=(0, 1)))(HIDDEN, HEAD)
    assert all((x == 0).all() for x in jax.tree.leaves(of_head))
    assert np.abs(of_hidden).max() > 0.01
