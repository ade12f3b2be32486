"""The pure core again, in float64 NumPy, with loops where a loop is plainer: what the tests hold pgjax against."""

import numpy as np


def log_softmax(z):
    z = np.asarray(z, np.float64)
    top = z.max(-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))


def token_logprobs(logits, tokens, temperature=1.0):
    out = np.zeros(tokens.shape)
    for b in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            out[b, t] = log_softmax(np.asarray(logits[b, t - 1], np.float64) / temperature)[tokens[b, t]]
    return out


def token_entropy(logits, temperature=1.0):
    out = np.zeros(logits.shape[:2])
    for b in range(out.shape[0]):
        for t in range(1, out.shape[1]):
            logp = log_softmax(np.asarray(logits[b, t - 1], np.float64) / temperature)
            p = np.exp(logp)
            out[b, t] = -(p[p > 0] * logp[p > 0]).sum()
    return out


def categorical_kl(logits, ref_logits):
    out = np.zeros(logits.shape[:2])
    for b in range(out.shape[0]):
        for t in range(1, out.shape[1]):
            logp, logq = log_softmax(logits[b, t - 1]), log_softmax(ref_logits[b, t - 1])
            p = np.exp(logp)
            out[b, t] = (p[p > 0] * (logp[p > 0] - logq[p > 0])).sum()
    return out


def returns(rewards, mask, discount=1.0):
    out = np.zeros(np.shape(rewards))
    for b in range(out.shape[0]):
        following = 0.0
        for t in reversed(range(out.shape[1])):
            if mask[b, t]:
                following = float(rewards[b, t]) + discount * following
                out[b, t] = following
    return out


def shaped_rewards(scores, kl, mask, kl_coef):
    out = np.zeros(mask.shape)
    for b in range(mask.shape[0]):
        places = np.flatnonzero(mask[b])
        out[b, places] = -kl_coef * np.asarray(kl, np.float64)[b, places]
        if places.size:
            out[b, places[-1]] += float(scores[b])
    return out


def whiten(x, mask, shift_mean=True):
    inside = np.asarray(x, np.float64)[mask]
    out = np.zeros(mask.shape)
    out[mask] = (inside - inside.mean()) / np.sqrt(inside.var() + 1e-8) + (0 if shift_mean else inside.mean())
    return out


def reduce(losses, mask, how):
    if how == "token_mean":
        return losses[mask].mean()
    rows = [losses[b][mask[b]] for b in range(mask.shape[0]) if mask[b].any()]
    return np.mean([row.mean() if how == "sequence_mean" else row.sum() for row in rows])


def surrogate(logprobs, old, advantages, low=0.2, high=0.2, dual=None):
    """One entry's loss, by the definition with min, clip and max."""
    r = np.exp(np.asarray(logprobs, np.float64) - np.asarray(old, np.float64))
    a = np.asarray(advantages, np.float64)
    gain = np.minimum(r * a, np.clip(r, 1 - low, 1 + high) * a)
    if dual is not None:
        gain = np.where(a < 0, np.maximum(gain, dual * a), gain)
    return -gain
