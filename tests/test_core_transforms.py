"""The pure core under jit, vmap, scan, shard_map and pmap: the numbers of one device, uneven masks included."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import pgjax.core.advantages as adv
import pgjax.core.importance as importance
import pgjax.core.kl as kl
import pgjax.core.logprobs as lp
import pgjax.core.losses as losses
import pgjax.core.masking as masking
from pgjax.core.linear_logprobs import linear_token_logprobs, linear_token_logprobs_and_entropy
from tests import page_table, transform_table
from tests.compare import assert_close
from tests.core_cases import CASES
from tests.sizes import campaign_but_for

ROWS, LENGTH, VOCAB, WIDTH = 8, 5, 6, 3
RNG = np.random.default_rng(0)
THETA = jnp.asarray(RNG.standard_normal((VOCAB, WIDTH)), jnp.float32)
BATCH = {
    "hidden": jnp.asarray(RNG.standard_normal((ROWS, LENGTH, WIDTH)), jnp.float32),
    "tokens": jnp.asarray(RNG.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32),
    "scores": jnp.asarray(RNG.standard_normal(ROWS), jnp.float32),
    "old": jnp.asarray(RNG.standard_normal((ROWS, LENGTH)) - 2, jnp.float32),
    # As uneven as it gets: two of the four devices hold almost everything, one holds nothing.
    "mask": jnp.asarray(np.arange(LENGTH)[None] < np.array([5, 5, 0, 0, 1, 0, 4, 2])[:, None]),
}
REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum")


def by_row(theta, batch):
    """All that is computed row by row, [rows, ...] each."""
    mask, old = batch["mask"], batch["old"]
    logits = jnp.einsum("btd,vd->btv", batch["hidden"], theta)
    logprobs = lp.token_logprobs(logits, batch["tokens"], temperature=0.7)
    rewards = adv.kl_shaped_rewards(batch["scores"], kl.kl_k1(logprobs, old), mask, kl_coef=0.1)
    return {
        "token_logprobs": logprobs,
        "token_entropy": lp.token_entropy(logits),
        "linear": linear_token_logprobs(batch["hidden"], theta, batch["tokens"], chunk_size=4),
        "linear_entropy": linear_token_logprobs_and_entropy(batch["hidden"], theta, batch["tokens"], chunk_size=4)[1],
        "k2": kl.kl_k2(logprobs, old),
        "k3": kl.kl_k3(logprobs, old),
        "categorical_kl": kl.categorical_kl(logits, logits * 0.5),
        "place_scores": adv.place_scores(batch["scores"], mask),
        "rewards": rewards,
        "returns": adv.monte_carlo_returns(rewards, mask, discount=0.9),
        "advantages": adv.monte_carlo_advantages(rewards, old, mask),
        "baseline": adv.leave_one_out_baseline(batch["scores"], group_size=2),
        "group": adv.group_advantages(batch["scores"], group_size=2),
    }


def whitened(batch, axis_name=None):
    return masking.masked_whiten(batch["old"], batch["mask"], axis_name=axis_name)


def over_all(theta, batch, axis_name=None):
    """All that is reduced over the batch, [] each."""
    mask, old = batch["mask"], batch["old"]
    logprobs = linear_token_logprobs(batch["hidden"], theta, batch["tokens"], chunk_size=4)
    advantages = whitened(batch, axis_name)
    found = {
        "mean": masking.masked_mean(logprobs, mask, axis_name=axis_name),
        "plain_mean": masking.masked_mean(logprobs, axis_name=axis_name),
        "value": losses.value_loss(logprobs, old, mask, axis_name=axis_name),
        "clipped_value": losses.value_loss(
            logprobs, advantages, mask, old_values=old, clip_eps=0.5, axis_name=axis_name
        ),
        "cross_entropy": losses.cross_entropy_loss(logprobs, mask, axis_name=axis_name),
        "entry": losses.policy_gradient_loss(logprobs[:, 1], batch["scores"], mask[:, 1], axis_name=axis_name),
    }
    for name in REDUCTIONS:
        options = {"reduce": name, "axis_name": axis_name}
        found[f"policy_{name}"] = losses.policy_gradient_loss(logprobs, advantages, mask, **options)
        found[f"clipped_{name}"] = losses.clipped_surrogate_loss(logprobs, old, advantages, mask, **options)
    return found | losses.surrogate_diagnostics(logprobs, old, mask, axis_name=axis_name)


def objective(theta, batch, axis_name=None):
    """One number that weighs all losses differently."""
    found = over_all(theta, batch, axis_name)
    return sum((i + 1.0) * x for i, (_, x) in enumerate(sorted(found.items())))


gradient = jax.grad(objective)


@functools.cache
def on_one_device(function):
    """What every transformation has to give: a function of the whole batch under jit alone, computed once."""
    return jax.jit(function)(*((BATCH,) if function is whitened else (THETA, BATCH)))


MESHES = {
    "one axis": ((4,), ("data",), "data"),
    "two axes": ((2, 2), ("data", "fsdp"), ("data", "fsdp")),
}


assert_agree = functools.partial(assert_close, atol=2e-6, rtol=2e-5)


def shard_map(function, layout, in_specs, out_specs, **options):
    sizes, names, axes = MESHES[layout]
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
    specs = {"rows": P(axes), "whole": P()}
    mapped = jax.shard_map(
        functools.partial(function, **options),
        mesh=mesh,
        in_specs=tuple(specs[s] for s in in_specs),
        out_specs=jax.tree.map(specs.get, out_specs),
    )
    return jax.jit(mapped)


def split(batch, parts=4):
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)


def joined(tree):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def test_every_public_function_of_the_core_has_a_row_of_yes_on_the_page():
    stub = (page_table.ROOT / "pgjax" / "__init__.pyi").read_text()
    public = re.findall(r"^from pgjax\.core\.(?!errors)\w+ import (\w+)", stub, flags=re.MULTILINE)
    assert sorted(CASES) == sorted(public)
    shown = transform_table.of_page()
    assert shown.startswith(transform_table.head()) and "**no**" not in shown
    assert re.findall(r"^\| `(\w+)`", shown, flags=re.MULTILINE) == list(CASES)


@pytest.mark.parametrize("name", campaign_but_for(CASES, "opo_advantages", "high_covariance_mask"))
def test_the_page_shows_what_holds_under_every_transformation(name):
    assert transform_table.row(name) in transform_table.of_page()


def test_a_trust_region_step_with_parameters_split_over_an_explicit_mesh_is_that_of_one_device():
    # The bug: the solver's inner products had no layout there.
    transform_table.on_explicit_vocabulary("trust_region_step")


def test_forward_mode_of_a_reverse_rule_is_refused_and_a_hessian_is_not():
    batch = {name: x[:1] for name, x in BATCH.items()}
    of_theta = lambda theta: linear_token_logprobs(batch["hidden"], theta, batch["tokens"], chunk_size=4)
    with pytest.raises(TypeError, match=r"can't apply forward-mode .* to a custom_vjp function"):
        jax.jvp(of_theta, (THETA,), (THETA,))
    whole = lambda theta: lp.token_logprobs(jnp.einsum("btd,vd->btv", batch["hidden"], theta), batch["tokens"])
    total = lambda function: jax.jit(jax.hessian(lambda theta: jnp.sum(jnp.sin(function(theta)))))
    assert_agree(total(of_theta)(THETA), total(whole)(THETA))


def test_vmap_equals_one_at_a_time():
    parts = split(BATCH)
    assert_agree(joined(jax.jit(jax.vmap(by_row, (None, 0)))(THETA, parts)), on_one_device(by_row))
    one = jax.jit(over_all)
    each = [one(THETA, jax.tree.map(lambda x, i=i: x[i], parts)) for i in range(4)]
    assert_agree(jax.jit(jax.vmap(over_all, (None, 0)))(THETA, parts), jax.tree.map(lambda *x: jnp.stack(x), *each))


@pytest.mark.campaign
def test_vmap_with_an_axis_name_is_the_global_batch():
    mapped = jax.jit(jax.vmap(functools.partial(over_all, axis_name="i"), (None, 0), axis_name="i"))
    assert_agree(mapped(THETA, split(BATCH)), jax.tree.map(lambda x: jnp.full(4, x), on_one_device(over_all)))


def test_scan_equals_one_at_a_time():
    def scanned(batch):
        return jax.lax.scan(lambda theta, part: (theta, by_row(theta, part)), THETA, batch)[1]

    assert_agree(joined(jax.jit(scanned)(split(BATCH))), on_one_device(by_row))


@pytest.mark.parametrize("layout", campaign_but_for(MESHES, "two axes"))
def test_shard_map_equals_one_device(layout):
    axes = MESHES[layout][2]
    if layout == "two axes":
        assert_agree(shard_map(by_row, layout, ("whole", "rows"), "rows")(THETA, BATCH), on_one_device(by_row))
    assert_agree(shard_map(whitened, layout, ("rows",), "rows", axis_name=axes)(BATCH), on_one_device(whitened))
    reduced = shard_map(over_all, layout, ("whole", "rows"), "whole", axis_name=axes)
    assert_agree(reduced(THETA, BATCH), on_one_device(over_all))


@pytest.mark.parametrize("layout", campaign_but_for(MESHES, "two axes"))
def test_shard_map_gradient_is_that_of_the_global_loss(layout):
    axes = MESHES[layout][2]
    outside = shard_map(objective, layout, ("whole", "rows"), "whole", axis_name=axes)
    assert_agree(jax.grad(outside)(THETA, BATCH), on_one_device(gradient))
    # Inside, shard_map itself sums the gradient of what is replicated.
    inside = shard_map(jax.grad(functools.partial(objective, axis_name=axes)), layout, ("whole", "rows"), "whole")
    assert_agree(inside(THETA, BATCH), on_one_device(gradient))


def test_pmap_equals_one_device():
    parts = split(BATCH)
    assert_agree(joined(jax.pmap(by_row, in_axes=(None, 0))(THETA, parts)), on_one_device(by_row))
    reduced = jax.pmap(functools.partial(over_all, axis_name="i"), axis_name="i", in_axes=(None, 0))
    assert_agree(reduced(THETA, parts), jax.tree.map(lambda x: jnp.full(4, x), on_one_device(over_all)))
    assert_agree(
        joined(jax.pmap(functools.partial(whitened, axis_name="i"), axis_name="i")(parts)), on_one_device(whitened)
    )


def test_pmap_gradients_are_averaged_not_summed():
    # Every device differentiates the sum of all devices' copies of the loss: the mean undoes the factor.
    def step(theta, batch):
        return jax.lax.pmean(jax.grad(objective)(theta, batch, "i"), "i")

    found = jax.pmap(step, axis_name="i", in_axes=(None, 0))(THETA, split(BATCH))
    assert_agree(found, jnp.broadcast_to(on_one_device(gradient), found.shape))


def test_a_mean_of_device_means_would_be_another_number():
    parts = split(BATCH)
    means = jax.vmap(lambda x, m: masking.masked_mean(x, m))(parts["old"], parts["mask"])
    assert abs(float(means.mean()) - float(masking.masked_mean(BATCH["old"], BATCH["mask"]))) > 0.05


def test_float64_stays_float64_inside_and_scalars_stay_float32():
    with jax.enable_x64(True):
        wide = {k: v.astype(jnp.float64) if v.dtype == jnp.float32 else v for k, v in BATCH.items()}
        wide |= {"tokens": BATCH["tokens"].astype(jnp.int64), "old": BATCH["old"]}  # one of them float32
        rows, scalars = jax.eval_shape(lambda *args: (by_row(*args), over_all(*args)), THETA.astype(jnp.float64), wide)
        assert {name: x.dtype.name for name, x in rows.items() if x.dtype != jnp.float64} == {}
        assert {name: x.dtype.name for name, x in scalars.items() if x.dtype != jnp.float32} == {}


def test_clean_numbers_pass_where_jax_looks_out_for_nan():
    # The bug: a constant of NaN made on the way, for what is not there.
    tokens = BATCH["tokens"]
    with jax.debug_nans(True):
        logits, pull = jax.vjp(lambda theta: jnp.einsum("btd,vd->btv", BATCH["hidden"], theta), THETA)
        for of_logits in (
            lambda z: lp.token_logprobs(z, tokens),
            lp.token_entropy,
            lambda z: kl.categorical_kl(z, z * 0.5),
        ):
            found, back = jax.vjp(of_logits, logits)
            assert np.isfinite(pull(*back(found))[0]).all()
        assert np.isfinite(linear_token_logprobs(BATCH["hidden"], THETA, tokens, chunk_size=4)).all()
        both = lambda theta: linear_token_logprobs_and_entropy(BATCH["hidden"], theta, tokens, chunk_size=4)
        found, back = jax.vjp(both, THETA)
        assert np.isfinite(found).all() and np.isfinite(back(found)[0]).all()


def test_plain_numbers_have_no_say_in_the_dtype_with_64_bits_enabled():
    x, mask = BATCH["old"], BATCH["mask"]
    with jax.enable_x64(True):
        found = (
            adv.kl_shaped_rewards(BATCH["scores"], x, mask, kl_coef=0.1),
            adv.monte_carlo_returns(x, mask, discount=0.9),
            adv.monte_carlo_advantages(x, x, mask),
            importance.truncated_importance_weights(x, x, mask, cap=2.0),
        )
    assert [y.dtype for y in found] == [jnp.float32] * 4
