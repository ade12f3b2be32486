"""The losses, weights, masks and advantages by name, against float64 NumPy to 1e-12, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from tests import catalogue_in_numpy as plain
from tests import core_in_numpy
from tests.compare import assert_close

RNG = np.random.default_rng(0)
MASK = np.arange(6)[None] < np.array([6, 1, 0, 4, 5, 6])[:, None]
MASK[:, 0], MASK[4, 2] = False, False  # the prompt's entry, and a hole
NEW = -np.abs(RNG.normal(0.7, 0.7, MASK.shape)) - 0.02
OLD, PROX = (np.minimum(NEW + RNG.normal(0, scale, MASK.shape), -0.01) for scale in (0.6, 0.3))
ADVANTAGES = RNG.normal(size=MASK.shape) + 0.1
ADVANTAGES[4] = 0.0
REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum")


def decoupled(new, old, a, mask, **options):
    return pg.decoupled_ppo_loss(new, jnp.where(mask, PROX, new), old, a, mask, **options)


def a3po(new, old, a, mask, **options):
    return pg.decoupled_ppo_loss(new, pg.a3po_logprobs(new, old, alpha=0.3), old, a, mask, **options)


def a3po_in_numpy(new, at, old, a, mask):
    return plain.decoupled(new, at, old, a, mask, prox=old + 0.3 * (at - old))


def wide(loss, **options):
    return functools.partial(loss, **options)


LOSSES = {  # pgjax's, NumPy's
    "gspo": (pg.gspo_loss, plain.gspo),
    "gspo, wide": (wide(pg.gspo_loss, clip_eps=0.2, clip_eps_high=None), wide(plain.gspo, low=0.2, high=0.2)),
    "gmpo": (pg.gmpo_loss, plain.gmpo),
    "gmpo, uneven": (wide(pg.gmpo_loss, clip_eps=0.1, clip_eps_high=0.7), wide(plain.gmpo, low=0.1, high=0.7)),
    "vespo": (pg.vespo_loss, plain.vespo),
    "cispo": (pg.cispo_loss, plain.cispo),
    "cispo, both ends": (wide(pg.cispo_loss, clip_eps=0.2, clip_eps_high=0.3), wide(plain.cispo, low=0.2, high=0.3)),
    "sapo": (pg.sapo_loss, plain.sapo),
    "dppo, tv": (wide(pg.dppo_loss, delta=0.1, cap=1.5), wide(plain.dppo, delta=0.1, cap=1.5)),
    "dppo, kl": (wide(pg.dppo_loss, divergence="kl", delta=0.02), wide(plain.dppo, kind="kl", delta=0.02)),
    "decoupled": (decoupled, wide(plain.decoupled, prox=PROX)),
    "decoupled, capped": (wide(decoupled, cap=1.1), wide(plain.decoupled, prox=PROX, cap=1.1)),
    "a3po": (a3po, a3po_in_numpy),
    "squared_log_ratio": (wide(pg.squared_log_ratio_loss, coef=0.3), wide(plain.squared, coef=0.3)),
    "kl_cov": (wide(pg.kl_cov_loss, fraction=0.3), plain.kl_cov),
    "high covariance in parts": (
        lambda x, old, a, m, **o: pg.kl_cov_loss(
            x, old, a, m, chosen=pg.high_covariance_mask(x, a, m, fraction=0.3), **o
        ),
        plain.kl_cov,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_match_numpy(name):
    loss, in_numpy = LOSSES[name]
    with jax.enable_x64(True):
        whole = jax.jit(lambda x: [loss(x, OLD, ADVANTAGES, MASK, reduce=how) for how in REDUCTIONS])
        weighed = lambda x: jnp.sum(WEIGHTS * loss(x, OLD, ADVANTAGES, MASK, reduce="none"))
        each = jax.jit(lambda x: (loss(x, OLD, ADVANTAGES, MASK, reduce="none"), jax.grad(weighed)(x)))(NEW)
        found = [np.asarray(x) for x in whole(NEW)]
    expected = in_numpy(NEW, NEW, OLD, ADVANTAGES, MASK)
    assert_close(each[0], expected, 1e-12)
    assert_close(found, [core_in_numpy.reduce(expected, MASK, how) for how in REDUCTIONS], 1e-6, rtol=1e-6)
    assert_close(each[1], difference_quotients(in_numpy), 1e-7)


WEIGHTS = RNG.normal(size=MASK.shape)


def difference_quotients(in_numpy, h=1e-6):
    """The gradient of the weighed sum by each entry; where the two sides differ (a bound), both are what it may be."""
    out = np.zeros(MASK.shape)
    for place in zip(*np.nonzero(MASK), strict=True):
        sides = []
        for step in (h, -h):
            moved = NEW.copy()
            moved[place] += step
            sides.append((WEIGHTS * in_numpy(moved, NEW, OLD, ADVANTAGES, MASK)).sum())
        out[place] = (sides[0] - sides[1]) / (2 * h)
    return out


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_nothing_outside_the_mask_reaches_a_loss_or_a_gradient(garbage):
    def all_of_them(new, old, a):
        return sum(loss(new, old, a, MASK) for loss, _ in LOSSES.values())

    run = jax.jit(jax.value_and_grad(all_of_them))
    clean = run(*(np.where(MASK, x, 0).astype(np.float32) for x in (NEW, OLD, ADVANTAGES)))
    dirty = run(*(np.where(MASK, x, garbage).astype(np.float32) for x in (NEW, OLD, ADVANTAGES)))
    assert_close(dirty, clean, 0.0)
    assert not np.asarray(clean[1])[~MASK].any()


def test_a_ratio_that_overflows_makes_no_nan():
    """The bug: 0 * inf, where a bound stops what has overflowed."""
    new, old = jnp.zeros((1, 2)), jnp.full((1, 2), -200.0)
    bounded = {name: loss for name, (loss, _) in LOSSES.items() if "cov" not in name and "decoupled" not in name}
    gradient = lambda loss, x: jax.value_and_grad(lambda y: loss(y, old, 0 * x + 1, x == 0))(x)
    found = jax.jit(lambda x: {name: gradient(loss, x) for name, loss in bounded.items()})(new)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found)), found


def test_clip_cov_drops_as_many_candidates_as_it_should_and_nothing_else():
    scale = 3 / np.abs(ADVANTAGES).max()
    options = {"fraction": 0.1, "low": 0.05, "high": 5.0}
    with jax.enable_x64(True):
        losses = jax.jit(
            jax.vmap(
                lambda key: pg.clip_cov_loss(NEW, OLD, scale * ADVANTAGES, MASK, key=key, reduce="none", **options)
            )
        )(jax.random.split(jax.random.key(0), 400))
        kept = pg.clipped_surrogate_loss(NEW, OLD, scale * ADVANTAGES, MASK, reduce="none")
    c, ratio = plain.covariance(NEW, scale * ADVANTAGES, MASK), np.exp(NEW - OLD)
    held = (ADVANTAGES > 0) & (ratio > 1.2) | (ADVANTAGES < 0) & (ratio < 0.8)
    candidates = MASK & ~held & (c > 0.05) & (c < 5)
    dropped = (np.asarray(losses) == 0) & (np.asarray(kept) != 0)
    count = int(0.1 * MASK.sum())
    assert 0 < count < candidates.sum()
    assert (dropped.sum((1, 2)) == count).all() and not dropped[:, ~candidates].any()
    assert_close(np.where(dropped, 0, kept), losses, 1e-12)
    assert_close(dropped.mean(0)[candidates], np.full(candidates.sum(), count / candidates.sum()), 0.12)


def test_weights_match_numpy():
    with jax.enable_x64(True):
        for level in ("token", "sequence", "geometric"):
            for cap in (0.9, 2.0, np.inf):
                found = pg.truncated_importance_weights(NEW, OLD, MASK, cap=cap, level=level)
                assert_close(found, plain.importance(NEW, OLD, MASK, cap, level=level), 1e-12, rtol=1e-12)
                for floor in (0.0, 0.7):
                    found = pg.masked_importance_weights(NEW, OLD, MASK, cap=cap, floor=floor, level=level)
                    assert_close(found, plain.importance(NEW, OLD, MASK, cap, floor, level), 1e-12, rtol=1e-12)
        assert_close(pg.icepop_weights(NEW, OLD, MASK), plain.importance(NEW, OLD, MASK, 5.0, 0.5), 1e-12)
        sums = np.where(MASK, NEW, 0).sum(1), np.where(MASK, OLD, 0).sum(1)
        whole = pg.masked_importance_weights(*sums, cap=3.0)
        spread = pg.masked_importance_weights(NEW, OLD, MASK, cap=3.0, level="sequence")
        assert_close(np.where(MASK, np.asarray(whole)[:, None], 0), spread, 1e-12)
        assert_close(
            jax.grad(lambda x: pg.masked_importance_weights(x, OLD, MASK, cap=2.0).sum())(jnp.asarray(NEW)), 0 * NEW
        )


def test_masks_match_numpy():
    entropy = RNG.gamma(1.0, size=MASK.shape)
    m2po = jax.jit(lambda threshold, mask: pg.m2po_mask(NEW, OLD, mask, threshold=threshold))
    opsm = jax.jit(lambda delta: pg.opsm_mask(NEW, OLD, ADVANTAGES, MASK, delta=delta))
    undecided = jax.jit(lambda fraction, mask: pg.entropy_quantile_mask(entropy, mask, fraction=fraction))
    none = np.zeros_like(MASK)
    with jax.enable_x64(True):
        for threshold in (1e-9, 0.02, 0.1, 0.3, 10.0):
            assert (m2po(threshold, MASK) == plain.m2po(NEW, OLD, MASK, threshold)).all(), threshold
        for delta in (-0.5, 0.0, 0.1, 9.0):
            assert (opsm(delta) == plain.opsm(NEW, OLD, ADVANTAGES, MASK, delta)).all(), delta
        for fraction in (0.0, 0.2, 0.5, 0.77, 1.0):
            assert (undecided(fraction, MASK) == plain.entropy_quantile(entropy, MASK, fraction)).all(), fraction
        assert not m2po(0.1, none).any() and not undecided(0.2, none).any()
    tokens = np.where(MASK, 5, 9)
    tokens[0, 5], tokens[3, 2] = 9, 9  # row 0 ends, row 3 has an end inside
    assert np.asarray(pg.finished_mask(tokens, MASK, eos_ids=(9, 7))).any(1).tolist() == [True, *[False] * 5]


def test_garbage_outside_reaches_no_mask_and_no_weight():
    dirty = [np.where(MASK, x, np.nan).astype(np.float32) for x in (NEW, OLD, ADVANTAGES)]
    clean = [np.where(MASK, x, 0).astype(np.float32) for x in (NEW, OLD, ADVANTAGES)]

    def all_of_them(new, old, a):
        return (
            pg.m2po_mask(new, old, MASK, threshold=0.1), pg.opsm_mask(new, old, a, MASK, delta=0.1),
            pg.entropy_quantile_mask(-new, MASK), pg.high_covariance_mask(new, a, MASK, fraction=0.3),
            pg.truncated_importance_weights(new, old, MASK, cap=2.0, level="sequence"),
            pg.masked_importance_weights(new, old, MASK, cap=2.0, level="geometric"),
            pg.optimal_token_baseline(a, new, jnp.exp(old), MASK, group_size=2),
            pg.distillation_advantages(new, old, MASK),
        )  # fmt: skip

    run = jax.jit(all_of_them)
    assert_close(run(*dirty), run(*clean), 0.0)


def test_advantages_match_numpy():
    scores, lengths = RNG.gamma(2.0, size=12), RNG.integers(1, 9, 12)
    rewards, weights = RNG.normal(size=(12, 3)) * [1, 10, 100], np.array([1.0, 0.5, 2.0])
    returns, squares = RNG.normal(size=(12, 5)), RNG.uniform(0.3, 0.9, (12, 5))
    logp, mask = np.log(RNG.uniform(0.1, 0.9, (12, 5))), np.arange(5)[None] < RNG.integers(0, 6, 12)[:, None]

    def ours(size):
        return {
            "maxrl": pg.maxrl_advantages(scores, group_size=size),
            "opo": pg.opo_advantages(scores, lengths, group_size=size),
            "rpp": [pg.reinforce_plus_plus_advantages(scores, by, group_size=size) for by in (None, lengths)],
            "gdpo": [pg.gdpo_advantages(rewards, weights, by, group_size=size) for by in (None, lengths)],
            "pass": [pg.pass_at_k_advantages(scores, group_size=size, k=k) for k in (2, size, None)],
            "baseline": pg.optimal_token_baseline(returns, logp, squares, mask, group_size=size),
            "values": pg.optimal_values(scores, group_size=size, beta=0.7),
        }

    def theirs(size):
        return {
            "maxrl": plain.maxrl(scores, size),
            "opo": plain.opo(scores, lengths, size),
            "rpp": [plain.reinforce_plus_plus(scores, size, by) for by in (None, lengths)],
            "gdpo": [plain.gdpo(rewards, weights, size, by) for by in (None, lengths)],
            "pass": [plain.pass_at_k(scores, size, k) for k in (2, size, size)],
            "baseline": plain.optimal_token_baseline(returns, logp, squares, mask, size),
            "values": 0.7 * np.log(np.exp(scores.reshape(-1, size) / 0.7).mean(1)),
        }

    with jax.enable_x64(True):
        for size in (2, 4):
            assert_close(jax.jit(ours, static_argnums=0)(size), theirs(size), 1e-12)
        found = jax.jit(lambda: pg.reinforce_plus_plus_advantages(scores))()
        assert_close(found, plain.reinforce_plus_plus(scores, 1), 1e-12)
        assert_close(pg.distillation_advantages(OLD, NEW, MASK), np.where(MASK, OLD - NEW, 0), 0.0)
        penalty = pg.overlong_penalty(np.arange(0, 13), 10, buffer=4, coef=0.5)
        assert_close(penalty, np.interp(np.arange(13), [6, 10], [0, -0.5]), 1e-12)


def test_equal_scores_give_no_advantage():
    """The bug: a rounding error of the mean, over a deviation of nothing."""
    lengths = jnp.array([3, 1, 4, 1, 5, 9])

    @jax.jit
    def all_of_them(scores):
        return (
            pg.maxrl_advantages(scores, group_size=3), pg.opo_advantages(scores, lengths, group_size=3),
            pg.reinforce_plus_plus_advantages(scores, lengths, group_size=3),
            pg.reinforce_plus_plus_advantages(scores, lengths), pg.pass_at_k_advantages(scores, group_size=3),
            pg.gdpo_advantages(jnp.stack([scores, scores], 1), jnp.ones(2), group_size=3),
        )  # fmt: skip

    for value in (0.0, 0.1, 1 / 3, 1e6 + 0.1):
        assert not any(found.any() for found in all_of_them(jnp.full(6, value, jnp.float32))), value


def test_astar_po_matches_numpy():
    ref, scores, values = OLD, RNG.normal(size=6), RNG.normal(size=6)
    with jax.enable_x64(True):
        loss = lambda x: pg.astar_po_loss(x, ref, scores, values, MASK, beta=0.4)
        found, gradient = jax.jit(jax.value_and_grad(loss))(NEW)
    errors = 0.4 * np.where(MASK, NEW - ref, 0).sum(1) - scores + values
    rows = MASK.any(1)
    assert_close(found, (errors[rows] ** 2).mean(), 1e-6)
    assert_close(gradient, np.where(MASK, 0.8 * errors[:, None] / rows.sum(), 0), 1e-12)


def test_the_unbiased_kl_matches_numpy():
    with jax.enable_x64(True):
        value, pull = jax.vjp(lambda x: pg.kl_k3_unbiased(x, OLD, PROX), jnp.asarray(NEW))
        (gradient,) = pull(jnp.ones_like(value))
    d, r = NEW - OLD, np.exp(NEW - PROX)
    assert_close(value, r * (np.exp(-d) - 1 + d), 1e-12)
    assert_close(gradient, r * (np.exp(-d) - 1 + d) + r * (1 - np.exp(-d)), 1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: pg.gspo_loss(x, x, x, clip_eps=-1.0), "clip_eps must be at least 0, got -1.0"),
        (lambda x: pg.sapo_loss(x, x, x, tau_neg=0.0), "tau_neg must be above 0, got 0.0"),
        (lambda x: pg.vespo_loss(x, x, x, k_pos=0.0), "k_pos must be above 0, got 0.0"),
        (lambda x: pg.dppo_loss(x, x, x, divergence="js"), "divergence must be one of tv, kl, got 'js'"),
        (lambda x: pg.kl_cov_loss(x, x, x, fraction=0.0), "fraction must be above 0, got 0.0"),
        (lambda x: pg.cispo_loss(x, x, x, reduce="sum"), "reduce must be one of token_mean, .* got 'sum'"),
        (lambda x: pg.m2po_mask(x, x, threshold=0.0), "threshold must be above 0, got 0.0"),
        (lambda x: pg.entropy_quantile_mask(x, fraction=1.5), "fraction must be at least 0 and below 1"),
        (lambda x: pg.finished_mask(x, x == 0, eos_ids=()), "eos_ids must hold at least one id"),
        (lambda x: pg.masked_importance_weights(x, x, cap=2.0, floor=-0.1), "floor must be at least 0, got -0.1"),
        (lambda x: pg.masked_importance_weights(x, x, cap=2.0, level="row"), "level must be one of token, sequence"),
        (lambda x: pg.pass_at_k_advantages(x[0], group_size=2, k=3), "k must be at most group_size=2, got 3"),
        (lambda x: pg.pass_at_k_advantages(x[0], group_size=2, k=1), "k must be at least 2, got 1"),
        (lambda x: pg.overlong_penalty(x, 10, buffer=0), "buffer must be above 0, got 0"),
        (lambda x: pg.astar_po_loss(x, x, x[:, 0], x[:, 0], beta=0.0), "beta must be above 0, got 0.0"),
        (lambda x: pg.optimal_token_baseline(x, x, x, group_size=3), "2 scores do not divide into groups"),
    ],
)
def test_what_cannot_work_is_refused_by_the_arguments_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 4)))


def test_split_over_devices_and_on_an_explicit_mesh_all_are_those_of_the_whole_batch():
    """The bug: a quantile, a threshold, a mean or a choice of each device's own rows."""
    rows = 8
    draw = np.random.default_rng(5)
    new, old, a = draw.normal(-1.5, 0.6, (3, rows, 5)).astype(np.float32)
    mask = np.arange(5)[None] < np.array([5, 5, 0, 0, 1, 0, 4, 2])[:, None]
    batch = {"new": new, "old": old, "a": a, "mask": mask, "lengths": mask.sum(1)}

    def over_all(x, axis_name=None):
        given, o = (x["old"], x["a"], x["mask"]), {"axis_name": axis_name}
        new, scores = x["new"], jnp.sum(x["a"], axis=1)
        masks = (
            pg.m2po_mask(new, x["old"], x["mask"], threshold=0.1, **o),
            pg.entropy_quantile_mask(-new, x["mask"], fraction=0.4, **o),
            pg.high_covariance_mask(new, x["a"], x["mask"], fraction=0.3, **o),
            pg.reinforce_plus_plus_advantages(scores, x["lengths"], group_size=2, **o),
            pg.gdpo_advantages(x["a"][:, :2], jnp.ones(2), x["lengths"], group_size=2, **o),
            pg.maxrl_advantages(scores + 9, group_size=2),
            pg.pass_at_k_advantages(scores, group_size=2),
            pg.optimal_token_baseline(x["a"], new, jnp.exp(x["old"]), x["mask"], group_size=2),
        )
        losses = lambda new: jnp.stack(
            [pg.gspo_loss(new, *given, **o), pg.gmpo_loss(new, *given, **o), pg.vespo_loss(new, *given, **o),
             pg.cispo_loss(new, *given, **o), pg.sapo_loss(new, *given, **o), pg.dppo_loss(new, *given, **o),
             pg.kl_cov_loss(new, *given, fraction=0.3, **o), pg.squared_log_ratio_loss(new, *given, **o),
             pg.decoupled_ppo_loss(new, x["old"], *given, **o),
             pg.astar_po_loss(new, x["old"], scores, scores - 1, x["mask"], **o)]
        )  # fmt: skip
        return masks, losses(new), jax.grad(lambda y: losses(y).sum())(new)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        functools.partial(over_all, axis_name="data"), mesh=mesh, in_specs=split, out_specs=(split, whole, split)
    )
    found, known = jax.jit(mapped)(batch), jax.jit(over_all)(batch)
    assert all(np.asarray(x).any() and not np.asarray(x)[mask].all() for x in known[0][:3])
    assert_close(found, known, 2e-6)
    explicit = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        assert_close(jax.jit(over_all)(jax.device_put(batch, jax.NamedSharding(explicit, split))), known, 2e-6)

    def dropped(x, axis_name=None):
        options = {"key": jax.random.key(0), "fraction": 0.2, "low": -9.0, "high": 9.0, "clip_eps": jnp.inf}
        losses = pg.clip_cov_loss(
            x["new"], x["new"], jnp.ones_like(x["new"]), x["mask"], reduce="none", axis_name=axis_name, **options
        )
        return (losses == 0) & x["mask"]

    mapped = jax.shard_map(functools.partial(dropped, axis_name="data"), mesh=mesh, in_specs=split, out_specs=split)
    assert jax.jit(mapped)(batch).sum() == jax.jit(dropped)(batch).sum() == int(0.2 * mask.sum())


def test_kl_cov_holds_nothing_before_the_policy_has_moved():
    """The bug: jnp.abs has slope 1 at 0, so that the first update is pulled away from the old policy."""
    new = jnp.asarray(NEW, jnp.float32)
    found = jax.grad(lambda x: pg.kl_cov_loss(x, new, ADVANTAGES, MASK, fraction=0.5, coef=3.0))(new)
    known = jax.grad(lambda x: pg.policy_gradient_loss(x, ADVANTAGES, MASK))(new)
    assert_close(found, known, 1e-7)
