"""Chapters 1 and 2: both scripts run, and every number that they tell is the right one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from experiments.chapters import ch1_black_box as ch1
from experiments.chapters import ch2_gaussian_reinforce as ch2


def test_chapter_1_tells_the_worked_numbers(tmp_path, capsys):
    metrics = ch1.main(ch1.Config(picture=tmp_path / "new" / "ch1.png"))
    said = capsys.readouterr().out
    assert "x = -2.000   R = -6.000   dR/dx =  8.000   ->   x = -1.200" in said
    assert "query(4) = 6 and query(0) = 6" in said
    assert metrics["gradient/first_x"] == pytest.approx(-1.2, abs=1e-6)
    assert metrics["gradient/x"] == pytest.approx(2.0, abs=0.01)
    assert metrics["finite_difference/x"] == pytest.approx(2.0, abs=1e-6)
    # A step of rate 0.1 on 20 samples: variance (0.01 * 55 / 20) / (1 - 0.8**2), with 55 that of one sample at the peak.
    assert 0.2 < metrics["score_function/rms"] < 0.45
    assert (tmp_path / "new" / "ch1.png").read_bytes().startswith(b"\x89PNG")


def test_the_box_hides_its_formula_from_jax_and_counts_every_query():
    query, asked = ch1.black_box()
    assert (query(4.0), query(0.0), asked) == (6.0, 6.0, [4.0, 0.0])
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.grad(query)(-2.0)
    assert asked == [4.0, 0.0]  # jax never got an answer
    ch1.finite_difference(query, 1.0, 0.5)
    assert asked[2:] == [1.5, 0.5]
    ch1.score_function(query, 1.0, 1.0, 7, np.random.default_rng(0))
    assert len(asked) == 4 + 7


def test_blind_ascents_are_given_the_same_number_of_queries():
    config = ch1.Config(queries=100, runs=2)
    differences, scores = ch1.without_gradient(config)
    assert differences[-1][0] == scores[0][-1][0] == scores[1][-1][0] == 100
    assert [spent for spent, _ in scores[0]] == [0, 20, 40, 60, 80, 100]
    assert scores[0] != scores[1]  # another seed, another path


@pytest.mark.parametrize("x", [-2.0, 0.0, 3.0])
def test_both_blind_gradients_are_those_of_the_parabola(x):
    query, _ = ch1.black_box()
    assert ch1.finite_difference(query, x, 0.5) == pytest.approx(-2 * (x - 2))  # exact on a parabola
    count = 200_000
    guess = ch1.score_function(query, x, 1.0, count, np.random.default_rng(0))
    assert abs(guess + 2 * (x - 2)) < 5 * (term_variance(x, 0.0) / count) ** 0.5


def test_chapter_2_tells_the_worked_numbers(tmp_path, capsys):
    config = ch2.Config(steps=200, runs=2, sizes=(1, 64), picture=tmp_path / "ch2.png")
    metrics = ch2.main(config)
    said = capsys.readouterr().out
    assert [f"= {number}\n" in said for number in (" 3.89", " 9.99", "38.85", "-1.61")] == [True] * 4
    assert metrics["score"] == pytest.approx(3.89)
    assert metrics["reward"] == pytest.approx(9.9879)
    assert metrics["term"] == pytest.approx(3.89 * 9.9879)
    assert metrics["mu"] == pytest.approx(-2 + 0.01 * 3.89 * 9.9879)
    assert metrics["loop/mu"] == pytest.approx(2.0, abs=0.4)  # 4 of its stationary spread, 0.1
    assert (tmp_path / "ch2.png").read_bytes().startswith(b"\x89PNG")


def test_the_update_is_policy_gradient_loss_on_flat_arrays():
    x, advantages = jnp.array([1.89, -3.0, 0.5]), np.array([2.0, -1.0, 0.25], np.float32)
    by_hand = -np.mean(advantages * (np.array([1.89, -3.0, 0.5]) + 2.0) / 1.5**2)
    gradient = jax.grad(lambda mu: pg.policy_gradient_loss(ch2.log_density(mu, 1.5, x), advantages))(-2.0)
    assert gradient == pytest.approx(by_hand, rel=1e-5)
    assert ch2.update(-2.0, 1.5, x, advantages, 0.1) == pytest.approx(-2.0 - 0.1 * by_hand, rel=1e-5)


def term_variance(mu, baseline):
    """The variance of (R(x) - b) (x - mu), sigma 1: with z = x - mu, d = mu - 2, a = 10 - d^2 - b it is a z - 2 d z^2 - z^3."""
    a, d = 10 - (mu - 2) ** 2 - baseline, mu - 2
    return a**2 - 6 * a + 15 + 8 * d**2


@pytest.mark.parametrize(("mu", "baseline"), [(-2.0, 0.0), (-2.0, -7.0), (2.0, 0.0), (2.0, 9.0)])
def test_a_baseline_changes_the_variance_and_not_the_mean(mu, baseline):
    config = ch2.Config(repeats=200_000)
    guesses = ch2.estimates(config, jax.random.key(1), mu, 1, baseline).astype(np.float64)
    exact = term_variance(mu, baseline)
    assert abs(guesses.mean() + 2 * (mu - 2)) < 5 * (exact / len(guesses)) ** 0.5
    assert guesses.var() == pytest.approx(exact, rel=0.1)


def test_the_spread_falls_as_one_over_the_root_of_n():
    config = ch2.Config(sizes=(1, 16, 256))
    means, spreads = ch2.as_n_grows(config, jax.random.key(2))
    exact = np.sqrt(term_variance(-2.0, 0.0) / np.array(config.sizes))
    np.testing.assert_allclose(spreads, exact, rtol=0.15)
    assert np.all(np.abs(means - 8.0) < 5 * exact / config.repeats**0.5)


def test_with_one_sample_a_running_mean_steadies_mu(tmp_path):
    _, metrics = ch2.one_sample(ch2.Config(steps=300, runs=4), jax.random.key(0))
    assert metrics["with/wander"] < 0.7 * metrics["without/wander"]
    assert metrics["with/variance"] < 0.3 * metrics["without/variance"]


def test_the_baseline_does_not_know_the_score_that_it_judges():
    """With memory 1 the baseline is the last score; were it the present one, every advantage would be 0."""
    path = ch2.learn(ch2.Config(steps=3), jax.random.key(0), samples=1, memory=1.0)
    assert len(set(path)) == 4
