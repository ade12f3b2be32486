"""Updates: microbatches that add up, schedules, and a state that takes in nothing that is not finite."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from pgjax.learning.optimizer import accumulate, adamw, apply_gradient, init_state, minibatches
from tests.tiny import ARCHITECTURES


def uneven_batch() -> tuple[jax.Array, jax.Array]:
    mask = jnp.arange(6)[None, :] < jnp.array([1, 6, 3, 2, 0, 5, 4, 6])[:, None]
    return jax.random.normal(jax.random.key(0), (8, 6)), mask


def loss_fn(params, batch):
    x, mask = batch
    return pg.policy_gradient_loss(jnp.tanh(x * params), x, mask), {"x": pg.masked_mean(x, mask)}


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_uneven_microbatches_equal_the_whole_batch(microbatches):
    batch = uneven_batch()
    weight = batch[1].sum(1)
    whole = accumulate(loss_fn, jnp.float32(0.7), batch, weight, 1)
    parts = accumulate(loss_fn, jnp.float32(0.7), batch, weight, microbatches)
    chex.assert_trees_all_close(parts, whole, rtol=1e-6)
    gradient = jax.grad(lambda p, x: loss_fn(p, x)[0])
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(8)]
    equal_shares = [gradient(jnp.float32(0.7), row) for row in rows]
    assert abs(np.mean(equal_shares) - whole[0]) > 1e-3, "a mean of means must differ here, or the test cannot fail"


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_weights_count_by_their_shares_alone(scale):
    batch = uneven_batch()
    weight = batch[1].sum(1).astype(jnp.float32)
    found, whole = (accumulate(loss_fn, jnp.float32(0.7), batch, w, 2) for w in (scale * weight, weight))
    chex.assert_trees_all_close(found, whole, rtol=1e-6)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_counts_and_16_bit_gradients_add_up(microbatches):
    """The bugs: a share in integers is 0, and the sum of many 16-bit parts stands still."""
    loss = lambda w, x: ((w * x).mean().astype(jnp.float32), {"rows": jnp.sum(x > 0, dtype=jnp.int32)})
    gradient, metrics = accumulate(loss, jnp.bfloat16(1.0), jnp.ones(4, jnp.bfloat16), jnp.ones(4), microbatches)
    assert gradient.dtype == jnp.bfloat16 and float(gradient) == 1.0
    assert float(metrics["rows"]) == 4 / microbatches  # a mean over the parts


def test_the_sum_of_many_16_bit_gradients_is_taken_in_32():
    loss = lambda w, x: ((w * x).mean().astype(jnp.float32), {})
    many = 2048
    gradient, _ = accumulate(loss, jnp.bfloat16(1.0), jnp.ones(many, jnp.bfloat16), jnp.ones(many), many)
    assert float(gradient) == 1.0


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="8 rows do not divide into 3 microbatches"):
        accumulate(loss_fn, jnp.float32(1.0), uneven_batch(), jnp.ones(8), 3)
    with pytest.raises(ValueError, match="8 rows do not divide into 3 minibatches"):
        minibatches(jax.random.key(0), 8, 3)


def test_minibatches_hold_every_row_once_and_move_with_the_key():
    one, two = (minibatches(jax.random.key(seed), 12, 3) for seed in (0, 1))
    assert sorted(one.ravel().tolist()) == list(range(12))
    assert one.tolist() != two.tolist()


def test_the_rate_warms_up_and_decays():
    rate = adamw(1.0, updates=10, warmup=4, decay=True).learning_rate
    rates = [float(rate(i)) for i in range(11)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[10] == 0.0 and rates[9] > 0
    constant = adamw(0.5, updates=3).learning_rate
    assert [float(constant(i)) for i in range(4)] == [0.5] * 4


def test_the_first_step_of_adamw_is_the_rate_times_the_sign_and_decays_matrices_only():
    params = {"matrix": jnp.full((2, 2), 2.0), "vector": jnp.full(2, 2.0)}
    optimizer = adamw(0.1, updates=1, max_grad_norm=None, weight_decay=0.5)
    state, metrics = apply_gradient(
        init_state(params, optimizer), jax.tree.map(jnp.ones_like, params), jnp.float32(0.0), optimizer
    )
    np.testing.assert_allclose(state.params["vector"], 2.0 - 0.1, rtol=1e-5)
    np.testing.assert_allclose(state.params["matrix"], 2.0 - 0.1 * (1 + 0.5 * 2.0), rtol=1e-5)
    assert float(metrics["lr"]) == pytest.approx(0.1) and int(state.updates) == 1


def test_norms_and_biases_stacked_over_layers_do_not_decay():
    params = jax.tree.map(jnp.ones_like, pg.causal_lm(ARCHITECTURES["gpt2"]).init(jax.random.key(0)))
    optimizer = adamw(0.1, updates=1, weight_decay=0.5)
    grad = jax.tree.map(jnp.zeros_like, params)
    state, _ = apply_gradient(init_state(params, optimizer), grad, jnp.float32(0.0), optimizer)
    for path, x in jax.tree_util.tree_leaves_with_path(state.params):
        np.testing.assert_allclose(
            x, 0.95 if path[-1].key in ("kernel", "tokens", "positions") else 1.0, err_msg=str(path)
        )


def test_gradients_are_clipped_by_their_global_norm():
    optimizer = adamw(1.0, updates=1, max_grad_norm=1.0)
    grad = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    state, metrics = apply_gradient(init_state(grad, optimizer), grad, jnp.float32(0.0), optimizer)
    first_moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (1,)][:2]
    assert float(metrics["train/grad_norm"]) == pytest.approx(5.0)
    np.testing.assert_allclose(np.concatenate(first_moments), [0.06, 0.08], rtol=1e-5)  # 0.1 * grad / 5


@pytest.mark.parametrize("grad, loss", [(np.nan, 0.0), (np.inf, 0.0), (1.0, np.nan)])
def test_a_number_that_is_not_finite_changes_nothing_now_or_later(grad, loss):
    optimizer = adamw(0.1, updates=2)
    before = init_state(jnp.float32(1.0), optimizer)
    bad, _ = apply_gradient(before, jnp.float32(grad), jnp.float32(loss), optimizer)
    later, _ = apply_gradient(bad, jnp.float32(1.0), jnp.float32(0.0), optimizer)
    assert not bad.healthy and not later.healthy
    chex.assert_trees_all_equal(later[:3], before[:3])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"learning_rate": -1.0, "updates": 1}, "-1.0"),
        ({"learning_rate": float("nan"), "updates": 1}, "nan"),
        ({"learning_rate": 0.1, "updates": 2, "warmup": 3}, "from 0 to the run's 2 updates, got 3"),
        ({"learning_rate": 0.1, "updates": 2, "eps": 0.0}, "eps must be finite and above 0, got 0.0"),
        ({"learning_rate": 0.1, "updates": 2, "weight_decay": float("inf")}, "weight_decay must be finite .* got inf"),
        ({"learning_rate": 0.1, "updates": 2, "max_grad_norm": 0.0}, "max_grad_norm must be above 0, or None, got 0.0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        adamw(**options)


def test_adamw_is_a_transformation_of_optax_wherever_one_is_taken():
    # The bug: a tuple of three, which optax.chain could not unpack.
    params, gradient = {"w": jnp.ones((2, 2))}, {"w": jnp.full((2, 2), 0.1)}
    plain = adamw(0.1, updates=4)
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = plain.update(gradient, plain.init(params), params)
        for wrapped in (
            optax.chain(optax.clip(1.0), plain),
            optax.apply_if_finite(plain, 1),
            optax.MultiSteps(plain, 1),
            optax.multi_transform({"all": plain}, {"w": "all"}),
            optax.masked(plain, {"w": True}),
        ):
            found, _ = wrapped.update(gradient, wrapped.init(params), params)
            np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)
