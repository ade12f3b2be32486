"""Training on the exact MDP comes as near to the optimum as it should, and the distance is the true one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.laboratory import optimum
from experiments.laboratory import token_mdp as mdp
from tests.sizes import campaign_but_for

FULL = optimum.Config(seeds=2)
SHORT = dataclasses.replace(FULL, steps=8)
LIMITS = {"REINFORCE": 0.02, "leave-one-out": 0.02, "actor-critic": 0.02, "PPO": 0.08, "TRPO": 0.08}


def train(name, config):
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    return jax.vmap(lambda key: optimum.run(optimum.METHODS[name], config, key))(keys)


@pytest.mark.campaign
@pytest.mark.usefixtures("full_compiles")  # many steps with few programs
@pytest.mark.parametrize("name", campaign_but_for(optimum.METHODS, "PPO"))
def test_every_method_comes_near_the_optimum(name):
    tables, distances = train(name, FULL)
    assert distances.shape == (2, 1200)
    assert float(distances[:, -1].max()) < LIMITS[name]
    assert float(distances.min()) > -1e-6  # nothing is better than the optimum
    exact = [mdp.OPTIMUM - mdp.exact_objective(np.asarray(table)) for table in tables]
    np.testing.assert_allclose(distances[:, -1], exact, atol=2e-6)
    assert not np.allclose(tables[0], tables[1])  # seeds differ


def test_the_distance_starts_at_that_of_the_reference():
    start = optimum.distance(jnp.asarray(mdp.REFERENCE, jnp.float32))
    assert float(start) == pytest.approx(1.0775825 - 0.0986815, abs=1e-6)


def test_the_charge_for_the_kl_is_zero_at_the_reference():
    reference = jnp.asarray(mdp.REFERENCE, jnp.float32)
    batch = optimum.collect(reference, jax.random.key(0), 16)
    np.testing.assert_allclose(batch.rewards.sum(1), mdp.REWARD[batch.rows], atol=1e-5)
    np.testing.assert_array_equal(batch.rewards[:, :4], 0)


def test_the_rate_rises_and_falls():
    rate = optimum.schedule(1.0, 100)
    found = [float(rate(jnp.float32(update))) for update in (0, 25, 50, 75, 100)]
    np.testing.assert_allclose(found, [0, 0.5, 1, 0.5, 0], atol=1e-6)


@pytest.mark.campaign
def test_the_script_runs_and_draws(tmp_path, capsys):
    config = dataclasses.replace(SHORT, picture=tmp_path / "optimum.png")
    metrics = optimum.main(config)
    assert len(metrics) == 2 * len(optimum.METHODS)
    assert all(0 < metrics[f"{name}/median"] <= metrics[f"{name}/worst"] < 1.2 for name in optimum.METHODS)
    assert (tmp_path / "optimum.png").stat().st_size > 5_000
    assert "worst seed" in capsys.readouterr().out
