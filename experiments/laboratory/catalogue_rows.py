"""What the tables of `experiments/laboratory/catalogue.py` hold: each name with its formula, what it estimates, and its loss.

A loss is given everything that is known of a batch of two sequences, under the names of `Known`, and takes what it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pgjax as pg


class Known(NamedTuple):
    """What is known of the sequences of a batch, [B, 5] unless another shape is given."""

    old: Any  # nats, under the policy that sampled
    prox: Any  # nats, under a policy half as old
    entropy: Any  # nats, of the distribution that a token was drawn from
    sum_squares: Any  # the sum of its squared probabilities
    scores: Any  # [B] from 0 to 1
    baseline: Any  # [B] the expected score under the policy that sampled
    mask: Any


class Row(NamedTuple):
    """One line of a table."""

    formula: str
    estimates: str
    loss: Callable[..., jax.Array]  # (logprobs, *Known) -> []


def of_loss(loss: Callable[..., jax.Array], **options: Any) -> Callable[..., jax.Array]:
    """Give a loss leave-one-out advantages, which are unbiased by themselves."""

    def run(logprobs: jax.Array, *known: jax.Array) -> jax.Array:
        x = Known(*known)
        return loss(logprobs, x.old, spread(_leave_one_out(x), x), x.mask, **options)

    return run


def of_advantages(advantages: Callable[[Known], jax.Array]) -> Callable[..., jax.Array]:
    """Give advantages a loss that is exact for them on policy: the unclipped ratio."""

    def run(logprobs: jax.Array, *known: jax.Array) -> jax.Array:
        x = Known(*known)
        found = advantages(x)
        found = spread(found, x) if found.ndim == 1 else found
        return pg.clipped_surrogate_loss(logprobs, x.old, found, x.mask, clip_eps=jnp.inf, reduce="sequence_sum")

    return run


def of_weights(weights: Callable[[jax.Array, Known, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """Weigh the tokens of a policy gradient, whose baseline is the expected score."""

    def run(logprobs: jax.Array, *known: jax.Array) -> jax.Array:
        x = Known(*known)
        advantages = spread(x.scores - x.baseline, x)
        weighed = advantages * weights(jax.lax.stop_gradient(logprobs), x, advantages)
        return pg.policy_gradient_loss(logprobs, weighed, x.mask, reduce="sequence_sum")

    return run


def weights_of(
    function: Callable[..., jax.Array],
    keep: Callable[[jax.Array, Known, jax.Array], jax.Array] | None = None,
    **options: Any,
) -> Callable[..., jax.Array]:
    """Correct by importance weights, of all tokens or of those that a mask keeps."""
    return of_weights(lambda new, x, a: function(new, x.old, x.mask if keep is None else keep(new, x, a), **options))


def of_scores(
    function: Callable[..., jax.Array], *given: Callable[[Known], jax.Array], **options: Any
) -> Callable[..., jax.Array]:
    """Take advantages that are made of a group's scores."""
    return of_advantages(lambda x: function(x.scores, *[y(x) for y in given], group_size=2, **options))


def spread(x: jax.Array, known: Known) -> jax.Array:
    """Give every token its sequence's number."""
    return jnp.where(known.mask, x[:, None], jnp.zeros_like(known.old))


def _policy_gradient(logprobs: jax.Array, old: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
    return pg.policy_gradient_loss(logprobs, advantages, mask)


def _sequence_ratio(logprobs: jax.Array, old: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
    weights = pg.truncated_importance_weights(logprobs, old, mask, cap=jnp.inf, level="sequence")
    return pg.policy_gradient_loss(logprobs, weights * advantages, mask, reduce="sequence_sum")


def _decoupled(logprobs: jax.Array, *known: jax.Array) -> jax.Array:
    x = Known(*known)
    return pg.decoupled_ppo_loss(logprobs, x.prox, x.old, spread(_leave_one_out(x), x), x.mask)


def _a3po(logprobs: jax.Array, old: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
    return pg.decoupled_ppo_loss(logprobs, pg.a3po_logprobs(logprobs, old, alpha=0.5), old, advantages, mask)


def _leave_one_out(x: Known) -> jax.Array:
    return x.scores - pg.leave_one_out_baseline(x.scores, group_size=2)


def _optimal_token(x: Known) -> jax.Array:
    returns = spread(x.scores, x)
    return returns - pg.optimal_token_baseline(returns, x.old, x.sum_squares, x.mask, group_size=2)


def _undecided(x: Known) -> jax.Array:
    advantages = spread(_leave_one_out(x), x)
    return jnp.where(pg.entropy_quantile_mask(x.entropy, x.mask), advantages, jnp.zeros_like(advantages))


_INF = float("inf")
_clip = pg.clipped_surrogate_loss
LOSSES = {
    "policy_gradient_loss": Row("-A log π", "the sampler's J, as if the policy were it", of_loss(_policy_gradient)),
    "... by sequence weights": Row("-W A log π, W = Π r", "J, exactly", of_loss(_sequence_ratio)),
    "clipped_surrogate_loss, clip_eps=inf": Row("-r A", "the local objective", of_loss(_clip, clip_eps=_INF)),
    "clipped_surrogate_loss (PPO)": Row("-min(r A, clip(r) A)", "local, stopped at ±0.2", of_loss(_clip)),
    "... clip_eps_high=0.28 (DAPO)": Row(
        "the same", "local, stopped at -0.2 and 0.28", of_loss(_clip, clip_eps_high=0.28)
    ),
    "gspo_loss": Row("-min(s A, clip(s) A), s = Π r^(1/n)", "E_old[s A], stopped at ±3e-4", of_loss(pg.gspo_loss)),
    "gspo_loss, clip_eps=0.2": Row("the same", "E_old[s A]", of_loss(pg.gspo_loss, clip_eps=0.2, clip_eps_high=0.2)),
    "gmpo_loss": Row("-A Π clip(r)^(1/n)", "E_old[s A], tokens stopped at e^±0.4", of_loss(pg.gmpo_loss)),
    "cispo_loss": Row("-sg[min(r, 5)] A log π", "local, weights at most 5", of_loss(pg.cispo_loss)),
    "sapo_loss": Row("-4/τ p A, p = sigmoid(τ (r - 1))", "local, faded by 4 p (1 - p)", of_loss(pg.sapo_loss)),
    "dppo_loss": Row("-sg[r] A log π", "local, stopped where π has moved by 0.2", of_loss(pg.dppo_loss)),
    '... divergence="kl", delta=0.05': Row(
        "the same", "local, stopped at a token's KL of 0.05", of_loss(pg.dppo_loss, divergence="kl", delta=0.05)
    ),
    "vespo_loss": Row("-sg[W^k e^(λ - λW)] A log π", "J, faded by W^(k-1) e^(λ - λW)", of_loss(pg.vespo_loss)),
    "decoupled_ppo_loss": Row("-w min(r A, clip(r) A), r = π/π_prox", "local, stopped at ±0.2 from π_prox", _decoupled),
    "... a3po_logprobs, alpha=0.5": Row(
        "the same, π_prox halfway to μ", "local, stopped at half as much", of_loss(_a3po)
    ),
    "kl_cov_loss, coef=0.1": Row(
        "-r A + 0.1 abs(log r) on the top",
        "local, and a pull (here on one token of 8)",
        of_loss(pg.kl_cov_loss, coef=0.1),
    ),
    "squared_log_ratio_loss": Row(
        "-A log π + 10⁻³ log² r", "the sampler's J, and a pull", of_loss(pg.squared_log_ratio_loss)
    ),
}
ADVANTAGES = {
    "leave_one_out_baseline": Row("R - mean of the others", "J", of_advantages(_leave_one_out)),
    "group_advantages, normalize=False": Row("R - m", "(1 - 1/G) J", of_scores(pg.group_advantages, normalize=False)),
    "group_advantages (GRPO)": Row("(R - m) / sd", "P(R > R') - P(R < R')", of_scores(pg.group_advantages)),
    "reinforce_plus_plus_advantages": Row(
        "R - m, whitened", "of one group, as here: as GRPO", of_scores(pg.reinforce_plus_plus_advantages)
    ),
    "maxrl_advantages": Row("(R - m) / m", "scores 0, 1: log p, G - 1 terms of it", of_scores(pg.maxrl_advantages)),
    "opo_advantages": Row(
        "R - Σ l R / Σ l", "equal lengths: (1 - 1/G) J", of_scores(pg.opo_advantages, lambda x: jnp.sum(x.mask, axis=1))
    ),
    "pass_at_k_advantages": Row("2 max(R - R', 0)", "E[max of 2], exactly", of_scores(pg.pass_at_k_advantages)),
    "optimal_token_baseline": Row("R - Σ W R / Σ W", "J, biased: its own sample counts", of_advantages(_optimal_token)),
    "entropy_quantile_mask, fraction=0.2": Row(
        "A where the entropy is high", "J, these prefixes' part of it", of_advantages(_undecided)
    ),
}
CORRECTIONS = {
    "none": Row("1", "", of_weights(lambda new, x, a: jnp.ones_like(new))),
    "token": Row("r", "", weights_of(pg.truncated_importance_weights, cap=_INF)),
    "token, truncated": Row("min(r, 2)", "", weights_of(pg.truncated_importance_weights, cap=2.0)),
    "token, masked": Row("r where r ≤ 2", "", weights_of(pg.masked_importance_weights, cap=2.0)),
    "IcePop": Row("r where 0.5 ≤ r ≤ 5", "", weights_of(pg.icepop_weights)),
    "M2PO": Row(
        "r where m2po_mask",
        "",
        weights_of(pg.truncated_importance_weights, lambda new, x, a: pg.m2po_mask(new, x.old, x.mask), cap=_INF),
    ),
    "OPSM": Row(
        "r where opsm_mask, δ = 0.1",
        "",
        weights_of(
            pg.truncated_importance_weights, lambda new, x, a: pg.opsm_mask(new, x.old, a, x.mask, delta=0.1), cap=_INF
        ),
    ),
    "geometric": Row("s = Π r^(1/n)", "", weights_of(pg.truncated_importance_weights, cap=_INF, level="geometric")),
    "sequence": Row("W = Π r", "", weights_of(pg.truncated_importance_weights, cap=_INF, level="sequence")),
    "sequence, truncated": Row("min(W, 2)", "", weights_of(pg.truncated_importance_weights, cap=2.0, level="sequence")),
    "sequence, masked": Row("W where W ≤ 2", "", weights_of(pg.masked_importance_weights, cap=2.0, level="sequence")),
}
