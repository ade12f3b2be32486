"""A TRPO step keeps its promises: the bound, the descent, the parameters where nothing helps; and the exact MDP climbs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from experiments.laboratory import token_mdp as mdp
from pgjax.core.advantages import kl_shaped_rewards, monte_carlo_returns
from pgjax.core.kl import categorical_kl, kl_k1
from pgjax.core.logprobs import token_frame, token_logprobs
from pgjax.core.losses import clipped_surrogate_loss
from pgjax.core.masking import masked_mean
from pgjax.core.trust_region import trust_region_step
from tests.compare import assert_close, assert_same_bits
from tests.sizes import campaign_but_for
from tests.tanh_policy import MASK, draw, fisher_matrix, logits_of, product, step, surrogate


@functools.partial(jax.jit, static_argnames=("cg_iterations", "backtracks"))
def steps(params, batch, max_kl, **options):
    return jax.vmap(lambda p, b: step(p, b, max_kl=max_kl, **options))(params, batch)


PROBLEMS = jax.tree.map(lambda *x: jnp.stack(x), *[draw(seed) for seed in range(32)])


@pytest.mark.parametrize("max_kl", campaign_but_for([1e-4, 0.01, 0.3, 3.0], 0.01, 3.0))
def test_the_constraint_holds_and_the_loss_falls(max_kl):
    moved, info = steps(*PROBLEMS, max_kl)
    assert (info["accepted"] == 1).all()
    assert (info["kl"] <= np.float32(max_kl)).all() and (info["loss_after"] < info["loss_before"]).all()

    def measured(new, old, batch):
        logp, logq = (jax.nn.log_softmax(logits_of(p, batch)) for p in (old, new))
        kl = token_frame(jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1))
        return masked_mean(kl, MASK), surrogate(new, token_logprobs(logits_of(old, batch), batch["tokens"]), batch)

    kl, loss = jax.jit(jax.vmap(measured))(moved, *PROBLEMS)
    np.testing.assert_allclose(info["kl"], kl, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(info["loss_after"], loss, rtol=1e-4, atol=1e-5)
    if max_kl == 1e-4:  # where the quadratic is exact, an unshortened step uses the bound up
        whole = np.asarray(info["kl"])[info["backtracks"] == 0] / max_kl
        assert len(whole) > 5 and (whole > 0.9).all()
        ratio = (info["loss_before"] - info["loss_after"]) / info["expected_improvement"]
        np.testing.assert_allclose(ratio, 1, atol=0.4)
    if max_kl == 3.0:  # far from it, steps must be shortened
        assert (info["backtracks"] > 0).any()


def test_the_step_is_the_scaled_solution_of_the_dense_system():
    with jax.enable_x64(True):
        params, batch = draw(6, np.float64)
        flat, _ = ravel_pytree(params)
        old = token_logprobs(logits_of(params, batch), batch["tokens"])
        gradient = np.asarray(ravel_pytree(jax.jit(jax.grad(surrogate))(params, old, batch))[0])
        fisher = fisher_matrix(params, batch, MASK)
        x = np.linalg.solve(fisher + 0.01 * np.eye(len(flat)), -gradient)
        x *= np.sqrt(2 * 1e-5 / (x @ fisher @ x))
        moved, info = step(params, batch, max_kl=1e-5, damping=0.01, cg_iterations=100)
        taken = np.asarray(ravel_pytree(moved)[0] - flat)
    np.testing.assert_allclose(taken, info["step_scale"] * x, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(info["expected_improvement"], -gradient @ taken, rtol=1e-5)
    assert info["step_scale"] == 0.5 ** info["backtracks"] and info["cg_residual"] < 2e-5


START, FALL = jnp.array([0.0, -0.0, 0.0]), jnp.array([1.0, -1.0, 0.0])  # the sign of a zero is a bit too


def row_step(loss_fn, start=START, **options):
    """A step of a policy that is one row of three logits; at zero F is (I - 1/3) / 3."""
    logits_fn = lambda row: jnp.stack([row, row])[None]
    options = {"max_kl": 0.01, "damping": 0.0} | options
    return trust_region_step(loss_fn, logits_fn, start, jnp.array([[False, True]]), **options)


@jax.jit
def fenced_step(distance, shrink, backtracks):
    """The loss falls along FALL, and jumps up beyond a distance."""
    loss_fn = lambda row: -row @ FALL + jnp.where(jnp.abs(row).max() > distance, 100.0, 0.0)
    return row_step(loss_fn, shrink=shrink, backtracks=backtracks)


def test_the_line_search_shortens_as_often_as_it_must():
    free, info = fenced_step(jnp.inf, 0.5, 10)
    assert info["backtracks"] == 0 and info["step_scale"] == 1
    np.testing.assert_allclose(free, FALL * np.sqrt(2 * 0.01 / (2 / 3)), rtol=1e-4)  # FALL F FALL = 2/3
    for shrink, needed in ((0.5, 2), (0.8, 6)):
        moved, info = fenced_step(0.3 * free[0], shrink, needed)
        assert info["accepted"] == 1 and info["backtracks"] == needed
        np.testing.assert_allclose(moved, shrink**needed * free, rtol=1e-5)
        np.testing.assert_allclose(info["expected_improvement"], 2 * moved[0], rtol=1e-5)  # -gradient . step
        moved, info = fenced_step(0.3 * free[0], shrink, needed - 1)
        assert info["accepted"] == 0 and info["backtracks"] == needed - 1
        assert_same_bits(moved, START)


def test_a_step_too_long_for_the_kl_is_shortened():
    # Towards an unlikely token the KL grows faster than its quadratic at the start.
    loss_fn = lambda row: -row[2]
    start = jnp.array([2.0, 2.0, -2.0])
    moved, info = jax.jit(lambda row: row_step(loss_fn, row, max_kl=0.1, damping=1e-4))(start)
    whole = start + (moved - start) / info["step_scale"]
    kl = categorical_kl(*(jnp.stack([row, row])[None] for row in (start, whole)))[0, 1]
    assert info["backtracks"] > 0 and info["kl"] <= np.float32(0.1) < kl and loss_fn(whole) < loss_fn(start)


@pytest.mark.campaign
@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda row: 1.0 + row @ FALL - jax.lax.stop_gradient(row @ FALL),  # a gradient, and nowhere lower
        lambda row: 0.0 * row.sum(),
        lambda row: jnp.nan * row.sum(),
        lambda row: jnp.sqrt(row).sum(),  # a finite loss with an infinite gradient
        lambda row: jnp.where(row[0] == 0, -row @ FALL, jnp.nan),  # NaN at every trial
        lambda row: row.sum() * 1e-30,  # no curvature that way: all the logits alike
    ],
    ids=["flat", "zero gradient", "nan", "infinite gradient", "nan beyond", "no curvature"],
)
def test_where_nothing_helps_the_parameters_keep_their_bits(loss_fn):
    moved, info = jax.jit(lambda row: row_step(loss_fn, row))(START)
    assert_same_bits(moved, START)
    assert info["accepted"] == 0 and info["step_scale"] == 0 and info["kl"] == 0 and info["expected_improvement"] == 0
    np.testing.assert_array_equal(info["loss_after"], info["loss_before"])


def test_a_nan_at_a_trial_is_stepped_back_from():
    loss_fn = lambda row: jnp.where(jnp.abs(row).max() > 0.1, jnp.nan, -row @ FALL)
    moved, info = jax.jit(lambda row: row_step(loss_fn, row))(START)
    assert info["accepted"] == 1 and info["backtracks"] == 1 and np.isfinite(moved).all()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_kl": 0.0}, "max_kl must be above 0 and finite, got 0.0"),
        ({"max_kl": float("nan")}, "max_kl must be above 0 and finite, got nan"),
        ({"max_kl": np.float32(-1)}, "max_kl must be above 0 and finite, got -1.0"),
        ({"max_kl": jnp.float32(-1)}, "max_kl must be above 0 and finite, got -1.0"),
        ({"damping": -0.1}, "damping must be at least 0 and finite, got -0.1"),
        ({"cg_iterations": 0}, "cg_iterations must be at least 1 and finite, got 0"),
        ({"backtracks": -1}, "backtracks must be at least 0 and finite, got -1"),
        ({"shrink": 1.0}, "shrink must be above 0 and below 1, got 1.0"),
    ],
)
def test_numbers_out_of_range_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        row_step(lambda row: row @ FALL, **option)


def test_an_infinite_clip_is_the_plain_ratio():
    rng = np.random.default_rng(0)
    new, old, advantages = rng.standard_normal((3, *MASK.shape)).astype(np.float32)
    found, gradient = jax.value_and_grad(clipped_surrogate_loss)(new, old, advantages, MASK, clip_eps=jnp.inf)
    np.testing.assert_allclose(found, -(np.exp(new - old) * advantages)[MASK].mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.where(MASK, -np.exp(new - old) * advantages, 0) / MASK.sum(), rtol=1e-5)


def both(params, vector, batch, axis_name=None):
    return product(params, vector, batch, axis_name), step(params, batch, axis_name, damping=0.1)


def shard_map(sizes, axes, **options):
    mesh = jax.make_mesh(sizes, ("data", "fsdp")[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))
    mapped = functools.partial(both, axis_name=axes)
    return jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=(P(), P(), P(axes)), out_specs=P(), **options))


def by_row(transform):
    """Four copies that share an axis, one row each; they must agree."""

    def run(params, vector, batch):
        mapped = transform(functools.partial(both, axis_name="i"), in_axes=(None, None, 0), axis_name="i")
        found = mapped(params, vector, jax.tree.map(lambda x: x[:, None], batch))
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape)), found)
        return jax.tree.map(lambda x: x[0], found)

    return run


TRANSFORMS = {
    "one axis": lambda: shard_map((4,), "data"),
    "two axes": lambda: shard_map((2, 2), ("data", "fsdp")),
    "replicated over the second": lambda: shard_map((2, 2), "data"),
    "unchecked": lambda: shard_map((4,), "data", check_vma=False),
    "pmap": lambda: by_row(jax.pmap),
    "vmap": lambda: by_row(jax.vmap),
}


@pytest.mark.parametrize("name", campaign_but_for(TRANSFORMS, "one axis", "two axes"))
def test_devices_take_the_step_of_the_whole_batch(name):
    # MASK is as uneven as it gets: 3, 4, 0 and 1 tokens a device.
    params, batch = draw(7)
    vector, _ = draw(8)
    found, known = TRANSFORMS[name]()(params, vector, batch), both(params, vector, batch)
    # What conjugate gradients leave over is rounding, which no two programs share.
    assert max(of_step[1].pop("cg_residual") for _, of_step in (found, known)) < 1e-4
    assert_close(found, known, rtol=1e-3, atol=1e-5)


@pytest.mark.campaign
def test_many_problems_at_once_are_each_one():
    moved, info = steps(*PROBLEMS, 0.01, damping=0.1)
    for i in range(3):
        params, batch = jax.tree.map(lambda x, i=i: x[i], PROBLEMS)
        assert_close(
            (jax.tree.map(lambda x, i=i: x[i], (moved, info))), step(params, batch, damping=0.1), rtol=1e-3, atol=1e-5
        )


REF = np.pad(mdp.REF_LOGPROBS, ((0, 0), (1, 0))).astype(np.float32)
COPIES = 1024


def on_policy(table):
    """Rows of the prefixes of COPIES sequences, each as often as the policy draws it: the states the KL is averaged over."""
    mass = jnp.cumsum(jnp.exp(mdp.logprobs(table).sum(1)))
    picks = jnp.searchsorted(mass, np.arange(0.5, COPIES, dtype=np.float32) / COPIES * mass[-1])
    rows = jnp.asarray(mdp.PREFIXES)[jnp.minimum(picks, mdp.COUNT - 1)]
    return lambda table: mdp.logits(table, rows)


def objective_loss(old):
    """-J itself: the ratio of whole sequences times the reward, and the KL to the reference at the new policy."""
    scores = jnp.asarray(mdp.COUNT * mdp.REWARD, jnp.float32) * jnp.exp(old).prod(1)

    def loss(table):
        new = mdp.logprobs(table).sum(1)
        kl = jnp.sum(jnp.exp(new) * (new - REF.sum(1)))
        return clipped_surrogate_loss(new, old.sum(1), scores, clip_eps=jnp.inf) + mdp.BETA * kl

    return loss


def token_loss(old):
    """The surrogate of token ratios and returns with the KL in the reward, in expectation: TRPO as it is run on samples."""
    shaped = kl_shaped_rewards(jnp.asarray(mdp.REWARD, jnp.float32), kl_k1(old, REF), mdp.MASK, kl_coef=mdp.BETA)
    weights = mdp.COUNT * jnp.exp(old.sum(1, keepdims=True))
    advantages = monte_carlo_returns(shaped, mdp.MASK) * weights
    options = {"clip_eps": jnp.inf, "reduce": "sequence_sum"}
    return lambda table: clipped_surrogate_loss(mdp.logprobs(table), old, advantages, mdp.MASK, **options)


def climb(make_loss, count, **options):
    """J in float64 after every step from the reference, and the KL of each."""

    def advance(table, _):
        moved, info = trust_region_step(make_loss(mdp.logprobs(table)), on_policy(table), table, ON_POLICY, **options)
        return moved, (moved, info["kl"])

    start = jnp.asarray(mdp.REFERENCE, jnp.float32)
    tables, kl = jax.jit(lambda table: jax.lax.scan(advance, table, length=count)[1])(start)
    return np.array([mdp.exact_objective(x) for x in (start, *np.asarray(tables))]), kl


ON_POLICY = np.broadcast_to(mdp.MASK[0], (COPIES, 5))


def test_on_the_exact_objective_every_step_climbs_to_the_optimum():
    found, kl = climb(objective_loss, 60, max_kl=0.01, damping=1e-3)
    assert np.diff(found).min() > -1e-6 and (kl <= np.float32(0.01)).all()
    assert mdp.OPTIMUM - found[-1] < 0.002


@pytest.mark.campaign
def test_on_the_token_surrogate_it_climbs_until_close_to_the_optimum():
    # The surrogate holds the visited prefixes and the KL's reward as they were, so it is not monotone within 0.013 of J*.
    found, kl = climb(token_loss, 150, max_kl=0.001, damping=0.01)
    far = mdp.OPTIMUM - found[:-1] > 0.02
    assert far.sum() > 50 and np.diff(found)[far].min() > 0 and np.diff(found).min() > -0.003
    assert (kl <= np.float32(0.001)).all() and mdp.OPTIMUM - found[-1] < 0.008
