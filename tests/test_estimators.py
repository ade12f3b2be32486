"""The laboratory of estimators: what it calls unbiased is so, and what it calls biased is biased by what is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from experiments.laboratory import estimators
from experiments.laboratory import token_mdp as mdp

CONFIG = estimators.Config(
    batch_sizes=(4, 16), sequences=2**14, lambdas=(0.0, 0.5), critic_samples=2048, pretrain_steps=40, prompts=2,
    group_size=8, earlier=1, max_new_tokens=8,
)  # fmt: skip
UNBIASED = ("whole return", "no baseline", "running mean", "leave-one-out", "optimal constant", "value, exact",
            "value, learned", "value, wrong", "GAE 0, exact", "GAE 0.5, exact")  # fmt: skip
PI = np.exp(mdp.exact_logprobs(mdp.POLICY).sum(1))


@pytest.fixture(scope="module")
def exact():
    return estimators.on_the_mdp(CONFIG)


def expected_bias(advantages):
    """The relative bias of an estimator that looks at one sequence at a time, by enumeration; advantages [256, 4]."""
    mean = np.einsum("n,nt,ntij->ij", PI, advantages, mdp.exact_scores(mdp.POLICY))
    truth = mdp.exact_gradient(mdp.POLICY)
    return np.linalg.norm(mean - truth) / np.linalg.norm(truth)


def test_unbiased_estimators_show_no_more_than_noise(exact):
    for name in UNBIASED:
        for found in exact[name]:
            assert found.bias < 1.6 * found.noise, name


def test_a_batch_mean_shrinks_the_gradient_by_one_over_the_batch(exact):
    for size, found in zip(CONFIG.batch_sizes, exact["batch mean"], strict=True):
        assert found.bias == pytest.approx(np.hypot(1 / size, found.noise), abs=found.noise)
    for found in exact["Dr. GRPO"]:  # groups of 4 at either batch size
        assert found.bias == pytest.approx(np.hypot(0.25, found.noise), abs=found.noise)
    assert exact["batch mean"][0].seen and exact["Dr. GRPO"][1].seen and exact["GRPO"][1].seen


def test_a_wrong_critic_biases_gae_as_enumeration_says_and_monte_carlo_not(exact):
    rows = np.arange(mdp.COUNT)
    wrong = mdp.values_at(-jnp.asarray(estimators.exact_values(), jnp.float32), rows)
    for lam in CONFIG.lambdas:
        advantages = np.asarray(estimators.gae(estimators.rewards_of(rows), wrong, mdp.MASK, lam))[:, 1:]
        bias = expected_bias(advantages)
        assert bias > 0.5
        for found in exact[f"GAE {lam:g}, wrong"]:
            assert found.bias == pytest.approx(bias, abs=2.5 * found.noise)
    assert expected_bias(estimators.exact_returns() - np.asarray(wrong)[:, 1:]) < 1e-6


def test_gae_at_lambda_one_is_monte_carlo():
    rows = jnp.arange(mdp.COUNT)
    values = jax.random.normal(jax.random.key(0), (mdp.COUNT, 5))
    rewards = estimators.rewards_of(rows)
    expected = pg.monte_carlo_advantages(rewards, values, mdp.MASK)
    np.testing.assert_allclose(estimators.gae(rewards, values, mdp.MASK, 1.0), expected, atol=1e-5)


def test_gae_against_its_recursion_with_a_sequence_that_ends_early():
    rewards, values = np.random.default_rng(0).standard_normal((2, 1, 5)).astype(np.float32)
    mask = np.array([[False, True, True, True, False]])
    expected, advantage = np.zeros(5), 0.0
    for t in (3, 2, 1):
        following = values[0, t + 1] if t < 3 else 0.0  # the episode ends with the last sampled token
        advantage = rewards[0, t] + following - values[0, t] + 0.7 * advantage
        expected[t] = advantage
    np.testing.assert_allclose(
        estimators.gae(jnp.asarray(rewards), jnp.asarray(values), mask, 0.7)[0], expected, atol=1e-6
    )


def test_the_variances_are_those_of_the_enumeration(exact):
    returns, scores = estimators.exact_returns(), mdp.exact_scores(mdp.POLICY)

    def trace(advantages):
        samples = np.einsum("nt,ntij->nij", advantages, scores).reshape(mdp.COUNT, -1)
        return PI @ (samples**2).sum(1) - ((PI @ samples) ** 2).sum()

    constant = estimators.exact_constant()
    known = {
        "whole return": returns[:, :1] * np.ones((1, 4)),
        "no baseline": returns,
        "optimal constant": returns - constant,
        "value, exact": returns - estimators.exact_values()[mdp.PREFIXES],
    }
    assert trace(known["whole return"]) == pytest.approx(3.76, abs=0.01)
    for name, advantages in known.items():
        for size, found in zip(CONFIG.batch_sizes, exact[name], strict=True):
            assert found.variance == pytest.approx(trace(advantages) / size, rel=0.06), name
    assert trace(returns - constant) < min(trace(returns - constant - 0.1), trace(returns - constant + 0.1))
    for size in (0, 1):
        assert exact["value, exact"][size].variance < exact["optimal constant"][size].variance
        assert exact["optimal constant"][size].variance < exact["no baseline"][size].variance
        assert exact["GAE 0, exact"][size].variance < 0.5 * exact["value, exact"][size].variance


def test_a_better_estimator_points_more_at_the_exact_gradient(exact):
    for names in (("value, wrong", "no baseline", "value, exact", "GAE 0, exact"), ("GRPO", "Dr. GRPO", "no baseline")):
        cosines = [exact[name][1].cosine for name in names]
        assert cosines == sorted(cosines)
    for small, large in exact.values():
        assert 0 < small.cosine < large.cosine < 1


def test_the_running_mean_never_looks_at_its_own_batch():
    means = jnp.arange(6.0)
    moved = estimators.running_mean(means.at[3].set(100.0))
    np.testing.assert_array_equal(moved[:4], estimators.running_mean(means)[:4])
    assert float(moved[4]) > float(estimators.running_mean(means)[4])


@pytest.mark.campaign
def test_the_script_measures_a_language_model_too_and_draws(exact, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(estimators, "on_the_mdp", lambda config: exact)  # measured above, at the same settings
    config = dataclasses.replace(CONFIG, picture=tmp_path / "estimators.png")
    metrics = estimators.main(config)
    assert all(np.isfinite(list(metrics.values()))) and (tmp_path / "estimators.png").stat().st_size > 10_000
    assert metrics["lm/leave-one-out"] < metrics["lm/no baseline"] and metrics["lm/value, learned"] > 0
    assert "leave-one-out" in capsys.readouterr().out


def test_the_spread_of_single_gradients_is_their_covariance_s_trace():
    gradients = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    squares, mean = (gradients**2).sum(1), (gradients.mean(0) ** 2).sum()
    found = estimators.spread_of(jnp.asarray(squares), jnp.asarray(mean))
    assert found.variance == pytest.approx(np.trace(np.cov(gradients.T)), rel=1e-5)
