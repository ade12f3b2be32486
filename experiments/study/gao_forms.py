"""The closed forms of over-optimisation (Gao et al. 2023): best-of-n, its KL, and what gold does as a policy moves away."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pgjax.core.errors import UserError

Bend = Callable[[np.ndarray], np.ndarray]
Fit = Callable[[Any, Any], tuple[float, float]]


class Curve(NamedTuple):
    """What evaluations along one way say, each [K]."""

    kl: np.ndarray  # nats a sequence
    proxy: np.ndarray  # the reward model's score, standard deviations of the reference samples
    gold: np.ndarray


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Average over seeds, evaluation by evaluation."""
    return Curve(*(np.mean(columns, axis=0) for columns in zip(*curves, strict=True)))


def distance(kl: Any) -> np.ndarray:
    """Work out d = sqrt(KL), with 0 for an estimate below 0."""
    return np.sqrt(np.maximum(np.asarray(kl, np.float64), 0.0))


def fit_best_of_n(d: Any, gain: Any) -> tuple[float, float]:
    """Fit R(d) = d (a - b d) by least squares (Gao et al. 2023, eq. 1).

    Args:
      d: [K] sqrt(KL).
      gain: [K] gold - gold at the start.

    Returns:
      a and b.

    Example:
      >>> d = np.array([0.5, 1.0, 2.0])
      >>> [round(x, 6) for x in fit_best_of_n(d, d * (0.8 - 0.1 * d))]
      [0.8, 0.1]
    """
    return _least_squares(d, gain, lambda d: d)


def fit_rl(d: Any, gain: Any) -> tuple[float, float]:
    """Fit R(d) = d (a - b log d) by least squares (Gao et al. 2023, eq. 2).

    Args:
      d: [K] sqrt(KL).
      gain: [K] gold - gold at the start.

    Returns:
      a and b.

    Example:
      >>> d = np.array([0.5, 1.0, 2.0, 8.0])
      >>> [round(x, 6) for x in fit_rl(d, d * (0.3 - 0.2 * np.log(d)))]
      [0.3, 0.2]
    """
    return _least_squares(d, gain, np.log)


def _least_squares(d: Any, gain: Any, bend: Bend) -> tuple[float, float]:
    d, gain = np.asarray(d, np.float64), np.asarray(gain, np.float64)
    d, gain = d[d > 0], gain[d > 0]  # where d = 0 both forms are 0, whatever a and b
    if len(d) < 2:
        raise UserError(f"two points with d > 0 are needed for a fit, got {len(d)}")
    a, b = np.linalg.lstsq(np.stack([d, -d * bend(d)], axis=1), gain, rcond=None)[0]
    return float(a), float(b)


def best_of(proxy: Any, values: Any, n: int) -> np.ndarray:
    """Estimate the mean value of the sample that the proxy likes best among n, over all subsets of n of N samples.

    E = sum_i C(i - 1, n - 1) / C(N, n) value_(i), with value_(i) that of the sample whose proxy is the i-th lowest:
    unbiased (Nakano et al. 2021), and far less noisy than one subset.

    Args:
      proxy: [P, N] what chooses.
      values: [P, N] what is averaged.
      n: size of the subsets, 1 <= n <= N.

    Returns:
      [P] one estimate a prompt.

    Raises:
      ValueError: n out of range.

    Example:
      >>> best_of([[1.0, 3.0, 2.0]], [[10.0, 30.0, 20.0]], 2).round(3).tolist()  # (30 + 30 + 20) / 3
      [26.667]
    """
    proxy, values = np.asarray(proxy, np.float64), np.asarray(values, np.float64)
    count = proxy.shape[1]
    if not 1 <= n <= count:
        raise UserError(f"n must be from 1 to the {count} samples that there are, got {n}")
    chances = np.array([math.comb(i, n - 1) for i in range(count)], object) / math.comb(count, n)
    in_order = np.take_along_axis(values, np.argsort(proxy, axis=1, kind="stable"), axis=1)
    return in_order @ chances.astype(np.float64)


def best_of_kl(n: int) -> float:
    """Bound the KL of best-of-n from the model it samples from: log n - (n - 1) / n (Beirami et al. 2024: an upper bound).

    Args:
      n: how many samples the best is taken from.

    Returns:
      Nats a sequence.

    Example:
      >>> round(best_of_kl(4), 3)
      0.636
    """
    return math.log(n) - (n - 1) / n
