"""Losses with reduce="none", added up over parts of a batch by another library: the gradient of the whole batch, to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from tests.compare import assert_close
from tests.core_cases import BATCH, CASES, PARTS, function
from tests.sizes import campaign_but_for

MASK = BATCH["mask"]
# What to divide the sum of "none" by, for each of the other reductions: of tokens, and of all that is accumulated.
OF_TOKENS = {"token_mean": 1.0, "sequence_sum": 1.0, "sequence_mean": jnp.maximum(MASK.sum(1, keepdims=True), 1)}
OF_ALL = {"token_mean": MASK.sum(), "sequence_sum": MASK.any(1).sum(), "sequence_mean": MASK.any(1).sum()}
LOSSES = [
    name for name, case in CASES.items() if name.endswith("_loss") and "mask" in case.inputs and name != "astar_po_loss"
]
CHOOSE_AMONG_ALL = ("kl_cov_loss", "clip_cov_loss")  # and so depend on the parts


def accumulated(loss, start, parts):
    """Take one step of gradient descent with the gradient of all parts, as optax adds it up."""
    optimizer = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=PARTS)  # it steps by the mean of the parts' gradients
    params, state = start, optimizer.init(start)
    for i in range(PARTS):
        part = jax.tree.map(lambda x, i=i: x.reshape(PARTS, -1, *x.shape[1:])[i], parts)
        with jax.numpy_dtype_promotion("standard"):  # optax counts in whole numbers
            updates, state = optimizer.update(jax.grad(loss)(params, part), state)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("reduce", campaign_but_for(OF_ALL, "sequence_mean"))
@pytest.mark.parametrize(
    "name", campaign_but_for([name for name in LOSSES if name not in CHOOSE_AMONG_ALL], "value_loss")
)
def test_foreign_accumulation_is_exact(name, reduce):
    call = function(name)
    others = tuple(BATCH[field] for field in CASES[name].inputs.split()[1:])
    first, scale = BATCH[CASES[name].inputs.split()[0]], jnp.ones(5)

    def part_loss(scale, part):
        losses = call(part[0] * scale[None], *part[1:-1], reduce="none")
        return jnp.sum(losses / part[-1]) * PARTS / OF_ALL[reduce].astype(jnp.float32)

    weights = jnp.broadcast_to(jnp.asarray(OF_TOKENS[reduce], jnp.float32), MASK.shape)
    stepped = accumulated(part_loss, scale, (first, *others, weights))
    whole = jax.grad(lambda scale: call(first * scale[None], *others, reduce=reduce))(scale)
    assert np.abs(whole).max() > 0
    assert_close(scale - stepped, whole, atol=2e-6, rtol=2e-5)


def test_foreign_accumulation_of_sequences_is_exact():
    fields = [BATCH[name] for name in CASES["astar_po_loss"].inputs.split()]

    def part_loss(scale, part):
        losses = pg.astar_po_loss(part[0] * scale, *part[1:], beta=0.5, reduce="none")
        return jnp.sum(losses) * PARTS / MASK.any(1).sum().astype(jnp.float32)

    stepped = accumulated(part_loss, jnp.ones(()), tuple(fields))
    whole = jax.grad(lambda scale: pg.astar_po_loss(fields[0] * scale, *fields[1:], beta=0.5))(1.0)
    assert_close(1.0 - stepped, whole, atol=2e-5, rtol=2e-5)


def test_foreign_accumulation_of_weighed_pairs_is_exact():
    chosen, rejected, weights = BATCH["scores"], BATCH["others"], jnp.arange(1.0, 9.0)
    options = {"margin": jnp.asarray(0.1), "center_coef": 0.05}

    def part_loss(scale, part):
        losses = pg.preference_loss(scale * part[0], part[1], weights=part[2], reduce="none", **options)
        return jnp.sum(losses) * PARTS / jnp.sum(weights)

    stepped = accumulated(part_loss, jnp.ones(()), (chosen, rejected, weights))
    whole = jax.grad(lambda scale: pg.preference_loss(scale * chosen, rejected, weights=weights, **options))(1.0)
    assert_close(1.0 - stepped, whole, atol=2e-6)
