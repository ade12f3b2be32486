"""Losses: golden numbers, the three reductions, where the gradient is exactly zero, and who gets none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pgjax.core.losses import (
    clipped_surrogate_loss,
    cross_entropy_loss,
    policy_gradient_loss,
    preference_loss,
    surrogate_diagnostics,
    value_loss,
)
from tests import core_in_numpy

RNG = np.random.default_rng(0)
MASK = np.array([[0, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]], bool)
NEW, OLD, ADVANTAGES = RNG.standard_normal((3, *MASK.shape)).astype(np.float32) * 0.4
REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum")
LOSSES = {  # (present log-probabilities or values, old ones, advantages or returns, mask) -> []
    "policy_gradient": lambda x, old, a, m: policy_gradient_loss(x, a, m),
    "clipped": lambda x, old, a, m: clipped_surrogate_loss(x, old, a, m, dual_clip=3.0),
    "value": lambda x, old, a, m: value_loss(x, a, m),
    "clipped_value": lambda x, old, a, m: value_loss(x, a, m, old_values=old, clip_eps=0.2),
    "cross_entropy": lambda x, old, a, m: cross_entropy_loss(x, m),
}


def test_golden_token_mean_and_sequence_mean():
    ratios = jnp.array([[1.25, 0.8, 1.0], [1.8, 0.5, 1.0]])
    advantages = jnp.array([[1.0, -1.0, 2.0], [0.5, -2.0, 0.0]])
    mask = jnp.array([[1, 1, 1], [1, 1, 0]])

    def loss(reduce):
        return clipped_surrogate_loss(jnp.log(ratios), jnp.zeros((2, 3)), advantages, mask, clip_eps=0.2, reduce=reduce)

    np.testing.assert_allclose(loss("token_mean"), -0.28, rtol=1e-5)
    np.testing.assert_allclose(loss("sequence_mean"), -0.15, rtol=1e-5)
    np.testing.assert_allclose(loss("sequence_sum"), -0.7, rtol=1e-5)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_policy_losses_against_numpy(reduce):
    expected = core_in_numpy.reduce(-ADVANTAGES.astype(np.float64) * NEW, MASK, reduce)
    np.testing.assert_allclose(policy_gradient_loss(NEW, ADVANTAGES, MASK, reduce=reduce), expected, rtol=1e-5)
    for low, high, dual in ((0.2, None, None), (0.1, 0.3, None), (0.2, None, 1.5), (0.0, 0.0, None)):
        exact = core_in_numpy.surrogate(NEW, OLD, ADVANTAGES, low, low if high is None else high, dual)
        found = clipped_surrogate_loss(
            NEW, OLD, ADVANTAGES, MASK, clip_eps=low, clip_eps_high=high, dual_clip=dual, reduce=reduce
        )
        np.testing.assert_allclose(found, core_in_numpy.reduce(exact, MASK, reduce), rtol=1e-4, atol=1e-6)


def test_an_upper_clip_of_zero_is_not_lost():
    # `clip_eps_high or clip_eps` turns 0.0 into clip_eps.
    new, zeros, ones = jnp.log(jnp.array([1.1])), jnp.zeros(1), jnp.ones(1)
    assert clipped_surrogate_loss(new, zeros, ones, clip_eps=0.2, clip_eps_high=0.0) == -1.0
    np.testing.assert_allclose(clipped_surrogate_loss(new, zeros, ones, clip_eps=0.2), -1.1, rtol=1e-6)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_one_number_a_sequence_uses_the_same_function(reduce):
    # The [B] Gaussian: each entry is a sequence of one token, so every reduction is the mean, and equals [B, 1].
    flat = policy_gradient_loss(NEW[:, 1], ADVANTAGES[:, 1], MASK[:, 1], reduce=reduce)
    column = policy_gradient_loss(NEW[:, 1:2], ADVANTAGES[:, 1:2], MASK[:, 1:2], reduce=reduce)
    np.testing.assert_allclose(flat, column, rtol=1e-6)
    np.testing.assert_allclose(flat, -(NEW[:, 1] * ADVANTAGES[:, 1])[MASK[:, 1]].mean(), rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 1.9, 4.0])
@pytest.mark.parametrize("advantage", [-1.5, 0.7])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_gradient_is_zero_exactly_where_it_must_be(ratio, advantage, dual_clip):
    def loss(x):
        return clipped_surrogate_loss(x, jnp.zeros(1), jnp.array([advantage]), clip_eps=0.2, dual_clip=dual_clip)

    gradient = float(jax.jit(jax.grad(loss))(np.log(np.array([ratio], np.float32)))[0])
    clipped = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
    clipped |= dual_clip is not None and advantage < 0 and ratio > dual_clip
    assert gradient == 0 if clipped else gradient == pytest.approx(-ratio * advantage, rel=1e-5)


@pytest.mark.parametrize("advantage, dual_clip, value", [(0.7, None, -0.84), (0.0, None, 0.0), (-1.5, 3.0, 4.5)])
def test_a_ratio_that_overflows_gets_no_gradient_where_it_is_clipped(advantage, dual_clip, value):
    # exp(100) is inf in float32: behind it a gradient of 0 would be 0 * inf.
    def loss(x):
        return clipped_surrogate_loss(x, jnp.array([-100.0]), jnp.array([advantage]), dual_clip=dual_clip)

    found, gradient = jax.jit(jax.value_and_grad(loss))(jnp.zeros(1))
    assert float(found) == pytest.approx(value) and float(gradient[0]) == 0


def test_no_clip_is_the_plain_ratio():
    unclipped = clipped_surrogate_loss(NEW, OLD, ADVANTAGES, MASK, clip_eps=float("inf"))
    plain = -(np.exp(NEW.astype(np.float64) - OLD) * ADVANTAGES)[MASK].mean()
    np.testing.assert_allclose(unclipped, plain, rtol=1e-5)
    gradient = jax.grad(lambda x: clipped_surrogate_loss(x, OLD, ADVANTAGES, MASK, clip_eps=jnp.inf))
    assert jnp.all(jnp.isfinite(gradient(jnp.asarray(NEW))))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_on_policy_the_surrogate_has_the_policy_gradient(reduce):
    x = jnp.asarray(NEW)
    surrogate = jax.grad(lambda x: clipped_surrogate_loss(x, NEW, ADVANTAGES, MASK, reduce=reduce))(x)
    plain = jax.grad(lambda x: policy_gradient_loss(x, ADVANTAGES, MASK, reduce=reduce))(x)
    np.testing.assert_allclose(surrogate, plain, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38])
def test_garbage_outside_the_mask_stays_there(name, garbage):
    def run(*arrays):
        return jax.jit(jax.value_and_grad(LOSSES[name]))(*arrays, MASK)

    found = run(*(np.where(MASK, x, np.float32(garbage)) for x in (NEW, OLD, ADVANTAGES)))
    jax.tree.map(np.testing.assert_array_equal, found, run(NEW, OLD, ADVANTAGES))
    np.testing.assert_array_equal(np.asarray(found[1])[~MASK], 0)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_equals_the_subset(name):
    subset = LOSSES[name](NEW[MASK], OLD[MASK], ADVANTAGES[MASK], None)
    np.testing.assert_allclose(LOSSES[name](NEW, OLD, ADVANTAGES, MASK), subset, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_mask_gives_zero_and_zero_gradient(name):
    none = jnp.zeros_like(MASK)
    value, gradient = jax.jit(jax.value_and_grad(LOSSES[name]))(NEW, OLD, ADVANTAGES, none)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_scalars_are_float32_and_gradients_right(name):
    half = LOSSES[name](jnp.asarray(NEW, jnp.bfloat16), OLD, ADVANTAGES, MASK.astype(np.int32))
    assert half.dtype == jnp.float32 and half.shape == ()
    loss = jax.jit(lambda x: LOSSES[name](x, OLD, ADVANTAGES, MASK))
    check_grads(loss, (jnp.asarray(NEW),), 1, ["rev"], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_uneven_microbatches_add_up_by_count(reduce):
    # The unreduced sum and its count, accumulated and divided once, give the loss of the whole batch.
    mask = jnp.asarray(MASK)
    total, count = 0.0, 0
    for rows in (slice(0, 1), slice(1, 4)):
        part = policy_gradient_loss(NEW[rows], ADVANTAGES[rows], mask[rows], reduce=reduce)
        weight = int(mask[rows].sum() if reduce == "token_mean" else mask[rows].any(1).sum())
        total, count = total + float(part) * weight, count + weight
    whole = policy_gradient_loss(NEW, ADVANTAGES, mask, reduce=reduce)
    np.testing.assert_allclose(total / count, whole, rtol=1e-5)


def test_only_logprobs_and_values_get_a_gradient():
    calls = {
        "policy": lambda a, o: policy_gradient_loss(NEW, a, MASK),
        "surrogate": lambda a, o: clipped_surrogate_loss(NEW, o, a, MASK),
        "value": lambda a, o: value_loss(NEW, a, MASK, old_values=o, clip_eps=0.2),
        "diagnostics": lambda a, o: sum(surrogate_diagnostics(a, o, MASK).values()),
        "margin": lambda a, o: preference_loss(NEW[0], NEW[1], margin=a[0]),
    }
    for name, call in calls.items():
        for gradient in jax.jit(jax.grad(call, argnums=(0, 1)))(ADVANTAGES, OLD):
            np.testing.assert_array_equal(gradient, 0, err_msg=name)


def test_value_clip_takes_the_larger_error():
    # V has moved past the range towards the return: the clipped error is larger, and nothing pulls further.
    far_right, wrong_side = jnp.array([0.9]), jnp.array([-0.9])
    options = {"old_values": jnp.zeros(1), "clip_eps": 0.2}
    np.testing.assert_allclose(value_loss(far_right, jnp.ones(1), **options), 0.5 * 0.8**2, rtol=1e-6)
    assert jax.grad(lambda v: value_loss(v, jnp.ones(1), **options))(far_right)[0] == 0
    # V beyond the range on the wrong side: the plain error is larger and must pull it back.
    np.testing.assert_allclose(value_loss(wrong_side, jnp.ones(1), **options), 0.5 * 1.9**2, rtol=1e-6)
    gradient = jax.grad(lambda v: value_loss(v, jnp.ones(1), **options))(wrong_side)[0]
    np.testing.assert_allclose(gradient, -1.9, rtol=1e-6)


def test_value_clip_of_infinity_is_no_clip():
    wide = value_loss(NEW, ADVANTAGES, MASK, old_values=OLD, clip_eps=1e6)
    np.testing.assert_allclose(wide, value_loss(NEW, ADVANTAGES, MASK), rtol=1e-4)


def test_preference_loss_against_numpy():
    chosen, rejected, margin = RNG.standard_normal((3, 6)).astype(np.float32)
    d = chosen.astype(np.float64) - rejected
    np.testing.assert_allclose(preference_loss(chosen, rejected), np.log1p(np.exp(-d)).mean(), rtol=1e-5)
    expected = np.log1p(np.exp(-(d - margin))).mean() + 0.1 * ((chosen + rejected) ** 2).mean()
    assert float(preference_loss(jnp.array([1e20]), jnp.array([1e20]))) == pytest.approx(
        np.log(2)
    )  # nothing is squared
    found = preference_loss(chosen, rejected, margin=margin, center_coef=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(
        preference_loss(chosen, rejected, margin=0.5), np.log1p(np.exp(-(d - 0.5))).mean(), rtol=1e-5
    )
    loss = jax.jit(lambda c, r: preference_loss(c, r, center_coef=0.1))
    check_grads(loss, (chosen, rejected), 1, ["rev"], rtol=2e-2)


def test_preference_loss_of_a_hopeless_pair_is_finite():
    value, gradient = jax.value_and_grad(preference_loss)(jnp.array([-1e4]), jnp.array([1e4]))
    np.testing.assert_allclose(value, 2e4)
    assert gradient[0] == -1


def test_diagnostics_against_numpy():
    found = surrogate_diagnostics(NEW, OLD, MASK, clip_eps=0.1)
    r = np.exp((NEW.astype(np.float64) - OLD)[MASK])
    expected = {
        "approx_kl": (r - 1 - np.log(r)).mean(),
        "clip_fraction": (np.abs(r - 1) > 0.1).mean(),
        "ratio_mean": r.mean(),
        "ratio_min": r.min(),
        "ratio_max": r.max(),
    }
    assert found.keys() == expected.keys() and 0 < expected["clip_fraction"] < 1
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
        assert found[name].dtype == jnp.float32 and found[name].shape == ()


def test_diagnostics_see_no_padding():
    dirty = np.where(MASK, NEW, np.float32(np.nan))
    assert surrogate_diagnostics(dirty, OLD, MASK) == surrogate_diagnostics(NEW, OLD, MASK)
    assert all(v == 0 for v in surrogate_diagnostics(dirty, OLD, np.zeros_like(MASK)).values())
    first = surrogate_diagnostics(NEW, NEW, MASK)
    assert [float(v) for v in first.values()] == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_the_diagnostics_of_an_empty_batch_are_zero(shape):
    # The bug: a minimum over nothing was an error of the reduction.
    for mask in (None, jnp.zeros(shape, bool)):
        found = surrogate_diagnostics(jnp.zeros(shape), jnp.zeros(shape), mask)
        assert {name: float(x) for name, x in found.items()} == dict.fromkeys(found, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_eps": -0.1}, "clip_eps must be at least 0, got -0.1"),
        ({"clip_eps": np.float32(-1)}, "clip_eps must be at least 0, got -1.0"),
        ({"clip_eps_high": -1}, "clip_eps_high must be at least 0, got -1"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1, got 1.0"),
        ({"reduce": "mean"}, "token_mean, sequence_mean, sequence_sum, none, got 'mean'"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        clipped_surrogate_loss(NEW, OLD, ADVANTAGES, MASK, **options)


def test_half_a_value_clip_is_refused():
    with pytest.raises(ValueError, match="old_values without clip_eps"):
        value_loss(NEW, ADVANTAGES, MASK, old_values=OLD)
    with pytest.raises(ValueError, match="clip_eps without old_values"):
        value_loss(NEW, ADVANTAGES, MASK, clip_eps=0.0)
    with pytest.raises(ValueError, match="clip_eps must be at least"):
        value_loss(NEW, ADVANTAGES, MASK, old_values=OLD, clip_eps=-0.2)


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError):
        policy_gradient_loss(NEW, ADVANTAGES[:, :1], MASK)
    with pytest.raises(AssertionError):
        clipped_surrogate_loss(NEW, OLD, ADVANTAGES, MASK[0])
    with pytest.raises(AssertionError):
        preference_loss(NEW[0], NEW[1], margin=NEW[0, :1])


def test_clip_fraction_counts_what_the_loss_clips():
    # By |r - 1| > eps the ratio that rounds to 1 + eps would count, and the loss does not clip it.
    new = jnp.log(jnp.array([1.2], jnp.float32))
    assert float(jax.grad(lambda x: clipped_surrogate_loss(x, jnp.zeros(1), jnp.ones(1)))(new)[0]) < 0
    assert float(surrogate_diagnostics(new, jnp.zeros(1))["clip_fraction"]) == 0


def test_clip_fraction_knows_an_upper_bound_of_its_own():
    ratio = np.array([0.7, 0.9, 1.3, 1.6])
    found = surrogate_diagnostics(np.log(ratio), np.zeros(4), clip_eps=0.2, clip_eps_high=0.5)
    assert float(found["clip_fraction"]) == 0.5


def test_diagnostics_refuse_the_bounds_that_the_loss_does():
    for bad in ({"clip_eps": -0.1}, {"clip_eps_high": -0.1}):
        with pytest.raises(ValueError, match=rf"{next(iter(bad))} must be at least 0, got -0\.1"):
            surrogate_diagnostics(jnp.zeros(2), jnp.zeros(2), **bad)
