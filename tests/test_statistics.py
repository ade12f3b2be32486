"""The standard error of a mean over clusters: against its definition, and where it must be the plain one."""

import numpy as np
import pytest

from pgjax.run.statistics import clustered_stderr


def plain(values):
    """The standard error of the mean of independent values."""
    values = np.asarray(values, np.float64)
    return np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1) / len(values))


def test_it_is_the_error_of_the_mean_of_the_clusters_means():
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 7, 60).tolist()
    values = rng.normal(size=60) + 3 * np.array(clusters)
    means = [np.mean([v for v, c in zip(values, clusters, strict=True) if c == k]) for k in sorted(set(clusters))]
    assert clustered_stderr(values, clusters) == pytest.approx(plain(means), rel=1e-12)


def test_equal_values_within_each_cluster_count_once_however_often_they_are_repeated():
    means = np.array([0.5, -1.0, 2.0, 0.25])
    for samples in (1, 2, 50):
        found = clustered_stderr(np.repeat(means, samples), np.repeat(np.arange(4), samples).tolist())
        assert found == pytest.approx(plain(means), rel=1e-12)


def test_one_value_a_cluster_gives_the_plain_error_in_any_order():
    values = np.random.default_rng(1).normal(size=20)
    order = np.random.default_rng(2).permutation(20)
    for clusters in (list(range(20)), order.tolist()):
        assert clustered_stderr(values, clusters) == pytest.approx(plain(values), rel=1e-12)


def test_float32_values_are_added_in_float64():
    values = np.float32(1e4) + np.arange(8, dtype=np.float32) * np.float32(1e-3)
    assert clustered_stderr(values, list(range(8))) == pytest.approx(plain(values.astype(np.float64)), rel=1e-12)


@pytest.mark.parametrize(("values", "clusters"), [([], []), ([1.0], ["a"]), ([1.0, 2.0], ["a", "a"])])
def test_fewer_than_two_clusters_have_no_error(values, clusters):
    assert clustered_stderr(values, clusters) is None


@pytest.mark.parametrize(("values", "clusters"), [([1.0], []), ([[1.0, 2.0]], ["a"])])
def test_a_value_without_its_cluster_is_refused(values, clusters):
    with pytest.raises(ValueError, match="one cluster a value"):
        clustered_stderr(values, clusters)
