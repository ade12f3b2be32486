"""Bias and variance of every baseline, against a gradient that is known exactly; then the variance on a language model.

    python -m experiments.laboratory.estimators                    # the exact MDP, then the small language model
    python -m experiments.laboratory.estimators --model smollm2    # ... then SmolLM2-135M-Instruct

An estimator is the gradient of `policy_gradient_loss`, with advantages of its own, on a batch of B sampled sequences. On
the token MDP (`experiments/laboratory/token_mdp.py`) the gradient that it should have on average is known, so over many batches:

    bias      |mean gradient - exact| / |exact|; what chance alone makes of an unbiased estimator stands beside it (noise)
    variance  trace of the covariance of a batch's gradient
    cosine    mean cosine of a batch's gradient to the exact one: the share of a step that goes the right way

GAE stands here for comparison alone: Monte Carlo (lambda = 1) takes its variance to be rid of the critic's errors.
"value" is a critic under Monte Carlo returns; "exact" knows every prefix's value, "learned" was fitted to 4,096 sequences,
"wrong" has the exact values' signs turned. GRPO divides by each group's standard deviation, so its variance is in a unit
of its own; its cosine compares.

40 s on 2 quiet cores; 3 to 4 minutes with SmolLM2, by default on 16 completions only, so that standard errors are a
third of the variances or more, and the critic, fitted to 32 others, is a poor one (--group-size for more).
Expect (seed 0, B = 16): no bias beyond noise in any Monte Carlo row, with any critic, but for the batch mean
(1/B) and the groups of 4 (Dr. GRPO 1/4; GRPO 0.37); GAE 0 has a third of the variance, cosine 0.71 for
0.51, no bias with the exact critic, 0.10 with the learned one and 1.31 with the wrong one. On the small language
model a baseline, whichever, takes away nine tenths of the variance: its score is far from 0 and varies little.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import pgjax as pg
from experiments.chapters import small_lm
from experiments.laboratory import token_mdp as mdp
from experiments.laboratory.estimators_lm import Spread, hidden_states, per_sequence, roll_out, spread_of
from experiments.laboratory.estimators_picture import CRITICS, plot
from experiments.study.pictures import picture_path


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure, and how precisely."""

    seed: int = 0  # of all sampling
    batch_sizes: tuple[int, ...] = (4, 16, 64)  # sequences a batch, multiples of 4
    sequences: int = 2**18  # sequences sampled in all for each batch size
    lambdas: tuple[float, ...] = (0.0, 0.5, 0.9)  # of GAE; 1 is Monte Carlo less the value
    critic_samples: int = 4096  # sequences that the learned critic saw
    model: str = "small"  # language model: "small", "smollm2", "" for none, or what `pg.load` takes
    pretrain_steps: int = 400  # updates that make the small one
    prompts: int = 8  # prompts for it
    group_size: int = 32  # completions a prompt
    earlier: int = 4  # rollouts of as many completions that the critic and the constants are learned from, beforehand
    max_new_tokens: int = 24  # the longest completion, in tokens
    picture: Path = Path("runs/laboratory/estimators.png")  # where it is drawn
    refresh_pictures: bool = False  # draw over the picture that the tutorial shows


GROUP = 4  # rows of a GRPO group on the MDP, where one prompt is all there is
POLICY = jnp.asarray(mdp.POLICY, jnp.float32)
EXACT = jnp.asarray(mdp.exact_gradient(mdp.POLICY), jnp.float32)

Advantages = OrderedDict[str, jax.Array]  # of each estimator, [B, T]; JAX would sort the names of a plain dict


class Measured(NamedTuple):
    """What became of an estimator on the MDP at one batch size."""

    bias: float  # |mean - exact| / |exact|
    noise: float  # what `bias` would be, root mean square, for an unbiased estimator of this variance
    variance: float  # trace of the covariance of a batch's gradient
    cosine: float  # to the exact gradient, mean over batches

    @property
    def seen(self) -> bool:
        """Say whether the bias is more than its noise explains."""
        return self.bias > 2 * self.noise


# The estimators: from the rewards [B, T] of one batch of sequences to its advantages [B, T].


def gae(rewards: jax.Array, values: jax.Array, mask: jax.Array, lam: float) -> jax.Array:
    """Generalized advantage estimation, discount 1: A_t = sum_k lam^k (r + V_next - V)_{t+k} (Schulman et al. 2016)."""
    values = jnp.where(mask, values, jnp.zeros_like(values))
    following = jnp.roll(values, -1, axis=1)  # 0 after the end: entry 0, which comes round, is never inside the mask
    return pg.monte_carlo_returns(rewards + following - values, mask, discount=lam)


def without_critic(
    rewards: jax.Array, mask: jax.Array, earlier: jax.Array, constant: jax.Array, *, peers: int, group_size: int
) -> Advantages:
    """Compute the advantages of every estimator that needs no critic.

    `earlier` [] is the mean return of earlier batches, `constant` [] the baseline of least variance; leave-one-out and
    the mean are taken over `peers` adjacent sequences, GRPO's groups are of `group_size`.
    """
    whole = rewards.sum(1)

    def spread(per_sequence: jax.Array) -> jax.Array:
        return jnp.where(mask, per_sequence[:, None], jnp.zeros_like(rewards))

    def less(baseline: jax.Array) -> jax.Array:
        return pg.monte_carlo_advantages(rewards, spread(jnp.broadcast_to(baseline, whole.shape)), mask)

    return OrderedDict({
        "whole return": spread(whole),
        "no baseline": pg.monte_carlo_returns(rewards, mask),
        "batch mean": less(whole.mean()),
        "running mean": less(earlier),
        "leave-one-out": less(pg.leave_one_out_baseline(whole, group_size=peers)),
        "Dr. GRPO": spread(pg.group_advantages(whole, group_size=group_size, normalize=False)),
        "GRPO": spread(pg.group_advantages(whole, group_size=group_size)),
        "optimal constant": less(constant),
    })  # fmt: skip


def with_critic(
    rewards: jax.Array, mask: jax.Array, values: jax.Array, critic: str, lambdas: Sequence[float]
) -> Advantages:
    """Compute the advantages from a critic's values [B, T]: Monte Carlo's, and GAE's at each lambda."""
    found = OrderedDict({f"value, {critic}": pg.monte_carlo_advantages(rewards, values, mask)})
    return found | {f"GAE {lam:g}, {critic}": gae(rewards, values, mask, lam) for lam in lambdas}


# On the exact MDP.


def rewards_of(rows: jax.Array) -> jax.Array:
    """Pay the score at the end and charge k1 at every token: [..., 5] for sequence numbers [...]."""
    kl = pg.kl_k1(mdp.logprobs(POLICY), mdp.logprobs(jnp.asarray(mdp.REFERENCE, jnp.float32)))
    return pg.kl_shaped_rewards(jnp.asarray(mdp.REWARD, jnp.float32), kl, mdp.MASK, kl_coef=mdp.BETA)[rows]


def exact_returns() -> np.ndarray:
    """Compute the return from each token of each sequence: [256, 4] float64."""
    rewards = -mdp.BETA * (mdp.exact_logprobs(mdp.POLICY) - mdp.REF_LOGPROBS)
    rewards[:, -1] += mdp.REWARD
    return rewards[:, ::-1].cumsum(1)[:, ::-1]


def exact_values() -> np.ndarray:
    """Compute the value of each prefix, its expected return: [85] float64."""
    weights = np.exp(mdp.exact_logprobs(mdp.POLICY).sum(1))[:, None] * np.ones((1, mdp.HORIZON))
    sums, mass = np.zeros(len(mdp.POLICY)), np.zeros(len(mdp.POLICY))
    np.add.at(sums, mdp.PREFIXES, weights * exact_returns())
    np.add.at(mass, mdp.PREFIXES, weights)
    return sums / mass


def exact_constant() -> float:
    """Compute the constant b that minimises the trace of the variance of sum_t (G_t - b) grad log pi_t."""
    scores = mdp.exact_scores(mdp.POLICY)  # [256, 4, 85, 4]
    weights, whole = np.exp(mdp.exact_logprobs(mdp.POLICY).sum(1)), scores.sum(1)
    plain = np.einsum("nt,ntij->nij", exact_returns(), scores)
    return float(np.einsum("n,nij,nij", weights, plain, whole) / np.einsum("n,nij,nij", weights, whole, whole))


@functools.partial(jax.jit, static_argnames="count")
def learn_values(key: jax.Array, count: int) -> jax.Array:
    """Fit a table of values to the returns of sampled sequences: [85]; prefixes never seen stay 0."""
    rows = mdp.sample(POLICY, key, count)
    mask = jnp.asarray(mdp.MASK)[rows]
    returns = pg.monte_carlo_returns(rewards_of(rows), mask)

    def loss_of(table: jax.Array) -> jax.Array:
        return pg.value_loss(mdp.values_at(table, rows), returns, mask)

    return small_lm.fit(loss_of, jnp.zeros(len(POLICY)), learning_rate=0.1, steps=500)


@jax.jit
def measure(rows: jax.Array, advantages: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Take the gradient of each batch's loss and hold them all against the exact one: the fields of `Measured`.

    Args:
      rows: [N, B] sequence numbers of N batches.
      advantages: [N, B, 5].
    """

    def gradient(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, advantages = batch

        def loss(table: jax.Array) -> jax.Array:
            logits = mdp.logits(table, jnp.asarray(mdp.PREFIXES)[rows])
            logprobs = pg.token_logprobs(logits, jnp.asarray(mdp.TOKENS)[rows])
            return pg.policy_gradient_loss(logprobs, advantages, jnp.asarray(mdp.MASK)[rows], reduce="sequence_sum")

        return -jax.grad(loss)(POLICY).reshape(-1)

    found = jax.lax.map(gradient, (rows, advantages), batch_size=min(1024, len(rows)))  # [N, 340]
    exact, mean = EXACT.reshape(-1), found.mean(0)
    size = jnp.linalg.norm(exact)
    variance = jnp.sum(jnp.square(found - mean[None])) / (len(rows) - 1)
    lengths = jnp.linalg.norm(found, axis=1)
    lengths = jnp.where(lengths > 0, lengths, jnp.ones_like(lengths))  # no step goes 0 of the right way
    cosines = found @ exact / (lengths * size)
    noise = jnp.sqrt(variance / len(rows)) / size
    return jnp.linalg.norm(mean - exact) / size, noise, variance, cosines.mean()


def on_the_mdp(config: Config) -> dict[str, list[Measured]]:
    """Measure every estimator at every batch size."""
    critic_key, *keys = jax.random.split(jax.random.key(config.seed), 1 + len(config.batch_sizes))
    right = jnp.asarray(exact_values(), jnp.float32)
    tables = dict(zip(CRITICS, (right, learn_values(critic_key, config.critic_samples), -right), strict=True))
    constant = jnp.float32(exact_constant())

    @jax.jit
    def advantages_of(rows: jax.Array, earlier: jax.Array) -> Advantages:
        rewards, mask = rewards_of(rows), jnp.asarray(mdp.MASK)[rows]
        found = without_critic(rewards, mask, earlier, constant, peers=len(rows), group_size=GROUP)
        for critic, table in tables.items():
            found |= with_critic(rewards, mask, mdp.values_at(table, rows), critic, config.lambdas)
        return found

    results: dict[str, list[Measured]] = {}
    for size, key in zip(config.batch_sizes, keys, strict=True):
        rows = mdp.sample(POLICY, key, config.sequences).reshape(-1, size)
        earlier = running_mean(rewards_of(rows).sum(2).mean(1))
        for name, advantages in jax.vmap(advantages_of)(rows, earlier).items():
            results.setdefault(name, []).append(Measured(*(float(x) for x in measure(rows, advantages))))
    return results


def running_mean(means: jax.Array, newest: float = 0.1) -> jax.Array:
    """Average the batches before each one, newer ones more: [N] -> [N]; it starts at 0."""

    def step(average: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (1 - newest) * average + newest * mean, average

    return jax.lax.scan(step, jnp.zeros((), means.dtype), means)[1]


# On a language model.


@jax.jit
def learn_head(hidden: jax.Array, rewards: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Fit a value head to the returns, on hidden states as they are."""
    returns = pg.monte_carlo_returns(rewards, mask)

    def loss_of(head: dict[str, jax.Array]) -> jax.Array:
        return pg.value_loss(pg.token_values(head, hidden), returns, mask)

    return small_lm.fit(loss_of, pg.init_value_head(hidden.shape[2]), learning_rate=0.03, steps=1000)


def on_a_language_model(config: Config) -> dict[str, Spread]:
    """Measure every estimator's variance on the same completions, with a critic and constants learned on others."""
    lm, params, tokenizer = small_lm.load(config.model, seed=config.seed, pretrain_steps=config.pretrain_steps)
    keys = jax.random.split(jax.random.key(config.seed), 1 + config.earlier)
    roll = functools.partial(roll_out, lm, params, tokenizer, config.prompts, config.group_size, config.max_new_tokens)
    many = [roll(key) for key in keys[1:]]
    hidden = [hidden_states(lm, params, one.rollout) for one in many]
    earlier = jax.tree.map(lambda *xs: jnp.concatenate(xs), *many)
    head = learn_head(jnp.concatenate(hidden), earlier.rewards, earlier.rollout.mask)
    squares, _ = per_sequence(lm, params, many[0].rollout, many[0].rollout.mask.astype(jnp.float32))
    constant = jnp.sum(squares * many[0].rewards.sum(1)) / jnp.sum(squares)

    rollout, rewards = roll(keys[0])
    mean, size = earlier.rewards.sum(1).mean(), config.group_size
    found = without_critic(rewards, rollout.mask, mean, constant, peers=size, group_size=size)
    values = pg.token_values(head, hidden_states(lm, params, rollout))
    found |= with_critic(rewards, rollout.mask, values, "learned", config.lambdas)
    del found["whole return"]  # the same as no baseline here: all of the reward comes at the end
    return {name: spread_of(*per_sequence(lm, params, rollout, one)) for name, one in found.items()}


# What came out.


def report(exact: dict[str, list[Measured]], language: dict[str, Spread], config: Config) -> None:
    """Print one table for the MDP, with the language model's variance in its last column."""
    table = Table(title="bias (and what noise alone would show), variance and cosine, by batch size")
    table.add_column("estimator", no_wrap=True)
    for size in config.batch_sizes:
        for name in (f"bias\nB = {size}", "variance\n", "cosine\n"):
            table.add_column(name, justify="right", no_wrap=True)
    table.add_column("variance\non the LM", justify="right", no_wrap=True)
    for name, found in exact.items():
        cells = [(f"{x.bias:.3f} ({x.noise:.3f})", f"{x.variance:.3f}", f"{x.cosine:.3f}") for x in found]
        last = f"{language[name].variance:.3g} \u00b1 {language[name].error:.1g}" if name in language else ""
        table.add_row(name, *(cell for three in cells for cell in three), last)
    Console(width=48 + 34 * len(config.batch_sizes)).print(table)


def main(config: Config) -> dict[str, float]:
    """Measure, print and draw; return every number under estimator/batch size/what, and lm/estimator."""
    exact = on_the_mdp(config)
    language = on_a_language_model(config) if config.model else {}
    report(exact, language, config)
    picture = picture_path(config.picture, config.refresh_pictures)
    plot(exact, language, config.batch_sizes, config.lambdas, config.model, picture)
    print(f"picture: {picture}")
    metrics = {
        f"{name}/{size}/{field}": value
        for name, found in exact.items()
        for size, measured in zip(config.batch_sizes, found, strict=True)
        for field, value in measured._asdict().items()
    }
    return metrics | {f"lm/{name}": found.variance for name, found in language.items()}


if __name__ == "__main__":
    main(small_lm.parse(Config, prompts=2, group_size=8, earlier=2))
