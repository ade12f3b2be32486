"""Standard errors of what a run measures: completions of one prompt are not independent of each other."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt


def clustered_stderr(values: npt.ArrayLike, clusters: Sequence[Hashable]) -> float | None:
    """Estimate the standard error of a mean over values that come in clusters, such as completions of one prompt.

    Values of one cluster may depend on each other in any way, clusters do not. With m_c the mean of the values of cluster c,
    and C clusters, the estimated mean is the mean of the m_c, and its standard error is

        (sum_c (m_c - mean_c m_c)^2 / (C - 1) / C)^(1/2)

    Where all clusters are of one size that mean is the mean of all values; where each holds one value, this is the standard
    error of independent values.

    Args:
      values: [N] in any unit; computed in float64.
      clusters: [N] which cluster each value belongs to, such as the number of its prompt.

    Returns:
      The standard error, in the unit of the values; None for fewer than two clusters, of which nothing can be estimated.

    Raises:
      ValueError: as many clusters as values are needed.

    Example:
      >>> clustered_stderr([1.0, 3.0, 5.0, 7.0], ["a", "a", "b", "b"])  # means 2 and 6
      2.0
      >>> clustered_stderr([1.0, 3.0], ["a", "a"]) is None
      True
    """
    flat = np.asarray(values, np.float64)
    if flat.ndim != 1 or len(flat) != len(clusters):
        raise ValueError(f"values of shape {flat.shape} and {len(clusters)} clusters: one cluster a value is needed")
    numbers: dict[Hashable, int] = {}
    places = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], np.int64)
    count = len(numbers)
    if count < 2:
        return None
    means = np.bincount(places, flat, count) / np.bincount(places, minlength=count)
    return float(np.std(means, ddof=1) / np.sqrt(count))
