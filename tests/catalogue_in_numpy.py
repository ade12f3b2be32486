"""The catalogue again, in float64 NumPy, entry by entry: the losses by name, importance weights, masks and advantages.

A loss is a function of (new, at, old, advantages, mask): what stands behind a stop-gradient is computed from `at`, so that the
difference quotient by `new` alone is the gradient.
"""

import itertools

import numpy as np


def each_row(x, mask, f):
    """Apply f to the sampled entries of each row, and spread what it gives over them."""
    out = np.zeros(mask.shape)
    for b in range(len(mask)):
        if mask[b].any():
            out[b, mask[b]] = f(x[b][mask[b]])
    return out


def entries(f, mask, *xs):
    """Apply f to each sampled entry."""
    out = np.zeros(mask.shape)
    for place in zip(*np.nonzero(mask), strict=True):
        out[place] = f(*(x[place] for x in xs))
    return out


def gspo(new, at, old, a, mask, low=3e-4, high=4e-4):
    with np.errstate(invalid="ignore"):
        s = np.exp(each_row(at - old, mask, np.mean))

    def loss(new, at, s, a):
        s = s * np.exp(new - at)
        return -min(s * a, np.clip(s, 1 - low, 1 + high) * a)

    return entries(loss, mask, new, at, s, a)


def gmpo(new, at, old, a, mask, low=0.4, high=0.4):
    def held(d, a):
        return np.sign(a) * min(np.sign(a) * d, np.sign(a) * np.clip(d, -low, high))

    g = np.exp(each_row(entries(held, mask, new - old, a), mask, np.mean))
    return entries(lambda g, a: -a * g, mask, g, a)


def vespo(new, at, old, a, mask):
    whole = np.exp(each_row(at - old, mask, np.sum))

    def loss(new, w, a):
        k, rate = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
        return -(w**k) * np.exp(rate * (1 - w)) * a * new

    return entries(loss, mask, new, whole, a)


def cispo(new, at, old, a, mask, low=1.0, high=4.0):
    return entries(
        lambda new, at, old, a: -np.clip(np.exp(at - old), 1 - low, 1 + high) * a * new, mask, new, at, old, a
    )


def sapo(new, at, old, a, mask, pos=1.0, neg=1.05):
    def loss(new, old, a):
        tau = pos if a > 0 else neg
        return -4 / tau / (1 + np.exp(-tau * (np.exp(new - old) - 1))) * a

    return entries(loss, mask, new, old, a)


def dppo(new, at, old, a, mask, kind="tv", delta=0.2, cap=20.0):
    def loss(new, at, old, a):
        p, q = np.exp(at), np.exp(old)
        far = abs(p - q) if kind == "tv" else q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
        stopped = far > delta and (p > q if a > 0 else p < q)
        return 0.0 if stopped else -min(p / q, cap) * a * new

    return entries(loss, mask, new, at, old, a)


def decoupled(new, at, old, a, mask, *, prox, cap=np.inf):
    def loss(new, prox, old, a):
        r, w = np.exp(new - prox), min(np.exp(prox - old), cap)
        return -w * min(r * a, np.clip(r, 0.8, 1.2) * a)

    return entries(loss, mask, new, prox, old, a)


def squared(new, at, old, a, mask, coef=1e-3):
    return entries(lambda new, old, a: -a * new + coef * (new - old) ** 2, mask, new, old, a)


def covariance(logp, a, mask):
    return np.where(mask, (a - a[mask].mean()) * (logp - logp[mask].mean()), -np.inf)


def kl_cov(new, at, old, a, mask, fraction=0.3, coef=1.0):
    count = max(1, int(fraction * mask.sum()))
    chosen = covariance(at, a, mask) >= np.sort(covariance(at, a, mask)[mask])[-count]
    return entries(lambda x, old, a, c: -np.exp(x - old) * a + coef * c * abs(x - old), mask, new, old, a, chosen)


def importance(new, old, mask, cap, floor=None, level="token"):
    d = np.where(mask, new - old, 0)
    of = {"token": lambda x: x, "sequence": np.sum, "geometric": np.mean}[level]
    w = np.exp(each_row(d, mask, of))
    kept = np.minimum(w, cap) if floor is None else np.where((floor <= w) & (w <= cap), w, 0)
    return np.where(mask, kept, 0)


def m2po(new, old, mask, threshold):
    """Drop the largest, one at a time."""
    kept = mask.copy()
    while kept.any() and ((new - old)[kept] ** 2).mean() >= threshold:
        kept[np.unravel_index(np.argmax(np.where(kept, (new - old) ** 2, -1)), mask.shape)] = False
    return kept


def opsm(new, old, a, mask, delta):
    return mask & ((a >= 0) | (each_row(old - new, mask, np.mean) <= delta))


def entropy_quantile(entropy, mask, fraction):
    return mask & (entropy >= np.quantile(entropy[mask], 1 - fraction))


def groups(x, size):
    return [np.arange(i, i + size) for i in range(0, len(x), size)]


def maxrl(scores, size, eps=1e-6):
    return np.concatenate([(scores[g] - scores[g].mean()) / (scores[g].mean() + eps) for g in groups(scores, size)])


def whiten_rows(x, lengths=None):
    tokens = np.repeat(x, np.ones(len(x), int) if lengths is None else lengths)
    return (x - tokens.mean()) / np.sqrt(tokens.var() + 1e-8)


def reinforce_plus_plus(scores, size, lengths=None):
    centred = np.concatenate([scores[g] - (scores[g].mean() if size > 1 else 0) for g in groups(scores, size)])
    return whiten_rows(centred, lengths)


def gdpo(rewards, weights, size, lengths=None):
    z = [
        (rewards[g] - rewards[g].mean(0)) / (rewards[g].std(0, ddof=1) + 1e-4)
        for g in groups(rewards, size)
    ]  # fmt: skip
    return whiten_rows(np.concatenate(z) @ weights, lengths)


def opo(scores, lengths, size):
    found = [scores[g] - (scores[g] @ lengths[g] / lengths[g].sum()) for g in groups(scores, size)]
    return np.concatenate(found)


def pass_at_k(scores, size, k):
    """By the definition: every set of k samples with this one in it, its best with and without it."""
    out = np.zeros(len(scores))
    for g in groups(scores, size):
        for i in g:
            sets = list(itertools.combinations([j for j in g if j != i], k - 1))
            best = [max(*scores[list(others)], scores[i]) - scores[list(others)].max() for others in sets]
            out[i] = k * np.mean(best)
    return out


def optimal_token_baseline(returns, logp, squares, mask, size):
    out = np.zeros(mask.shape)
    for g in groups(returns, size):
        for t in range(mask.shape[1]):
            rows = [i for i in g if mask[i, t]]
            if len(rows) > 1:
                w = [sum(1 - 2 * np.exp(logp[i, u]) + squares[i, u] for u in range(t + 1) if mask[i, u]) for i in rows]
                out[rows, t] = np.dot(w, returns[rows, t]) / np.sum(w)
    return out
