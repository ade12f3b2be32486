"""PPO's three programs over a causal LM: score a rollout, turn scores into advantages, update. Pure, to be composed.

Schulman et al. 2017 ("Proximal Policy Optimization Algorithms"), with Monte Carlo returns in place of GAE, and the KL to a
frozen reference in the rewards (Ziegler et al. 2019).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pgjax import train
from pgjax.advantages import kl_shaped_rewards, monte_carlo_returns
from pgjax.kl import adaptive_kl_coef, kl_k1
from pgjax.logprobs import linear_token_logprobs, token_entropy, token_logprobs
from pgjax.losses import clipped_surrogate_loss, surrogate_diagnostics, value_loss
from pgjax.masking import masked_mean, masked_whiten
from pgjax.models.causal_lm import CausalLM, logits_of
from pgjax.models.heads import token_values
from pgjax.rollout import Rollout


class Batch(NamedTuple):
    """An iteration's experience. W = max_new_tokens + 1: the window from the last prompt token on, in the token frame."""

    tokens: jax.Array  # [B, T] int32
    attention_mask: jax.Array  # [B, T]
    mask: jax.Array  # [B, W], True on sampled tokens; so are all that follow
    old_logprobs: jax.Array
    old_values: jax.Array
    returns: jax.Array
    advantages: jax.Array


class Scored(NamedTuple):
    """What one model says of a batch, each [B, W]."""

    logprobs: jax.Array
    values: jax.Array
    entropy: jax.Array


@functools.partial(jax.jit, static_argnames=("lm", "window", "parts"))
def score(
    lm: CausalLM,
    params: Any,
    tokens: jax.Array,
    attention_mask: jax.Array,
    temperature: jax.Array,
    *,
    window: int,
    parts: int,
) -> Scored:
    """Teacher-force a batch with one model: the same program for the policy and for its reference.

    logprobs_t = log pi(token_t | before) at `temperature`, values_t = V(before), entropy_t of that distribution; for the
    last `window` entries of the token frame.

    Args:
        lm: the model's functions.
        params: {"lm": parameters, "value": a value head}.
        tokens: [B, T] int32.
        attention_mask: [B, T].
        temperature: [] above 0, the sampler's.
        window: W, how many entries of the frame are wanted; the first of them may be an entry of the prompt.
        parts: divides B; the logits of one part exist at a time.

    Returns:
        Each [B, W] float32, in nats and in units of reward.

    >>> import pgjax as pg
    >>> lm = pg.causal_lm(pg.Architecture(
    ...     family="gpt2", vocab_size=7, width=4, depth=1, heads=2, kv_heads=2, head_dim=2, mlp_width=8, max_positions=8,
    ...     activation="gelu_tanh", norm="layer", norm_eps=1e-5, rope=None, gated_mlp=False, qkv_bias=True,
    ...     out_bias=True, mlp_bias=True, qk_norm=False, tied=True))
    >>> params = {"lm": lm.init(jax.random.key(0)), "value": pg.init_value_head(4)}
    >>> ones = jnp.ones((2, 5), jnp.int32)
    >>> score(lm, params, ones, ones > 0, jnp.float32(1.0), window=3, parts=2).values.shape
    (2, 3)
    """

    def part(xs: tuple[jax.Array, jax.Array]) -> Scored:
        tokens, attention_mask = xs
        hidden = lm.hidden(params["lm"], tokens, attention_mask)[:, -window:]
        logits = logits_of(hidden, lm.unembedding(params["lm"]))
        return Scored(
            token_logprobs(logits, tokens[:, -window:], temperature=temperature),
            token_values(params["value"], hidden),
            token_entropy(logits, temperature=temperature),
        )

    split = jax.tree.map(lambda x: x.reshape(parts, -1, x.shape[1]), (tokens, attention_mask))
    return jax.tree.map(lambda x: x.reshape(-1, window), jax.lax.map(part, split))


@functools.partial(jax.jit, static_argnames=("discount", "kl_target", "kl_horizon"))
def experience(
    rollout: Rollout, policy: Scored, reference: Scored, scores: jax.Array, kl_coef: jax.Array,
    *, discount: float, kl_target: float | None, kl_horizon: float,
) -> tuple[Batch, jax.Array, train.Metrics]:  # fmt: skip
    """Turn scores into advantages.

    rewards = score at the last sampled token - kl_coef * (log pi - log ref) at every one; returns = the sum of what is
    still to come; advantages = returns - values, whitened over all sampled tokens.

    Args:
        rollout: of `sample`, [B, T].
        policy: what the sampling policy says of it, [B, W].
        reference: what the frozen reference says of it.
        scores: [B] of the black box.
        kl_coef: [] reward units a nat.
        discount: of a reward one token later.
        kl_target: nats a sequence that kl_coef is steered to (Ziegler et al. 2019); None keeps it.
        kl_horizon: completions; how slowly it is steered.

    Returns:
        The batch to learn from, the coefficient for the next one, and metrics over all sequences.

    >>> mask = jnp.array([[False, True, True]])
    >>> zeros = jnp.zeros((1, 3))
    >>> same = Scored(zeros, zeros, zeros)
    >>> rollout = Rollout(jnp.zeros((1, 3), jnp.int32), mask, mask, zeros)
    >>> options = {"discount": 1.0, "kl_target": None, "kl_horizon": 1.0}
    >>> batch, _, _ = experience(rollout, same, same, jnp.array([2.0]), jnp.float32(0.1), **options)
    >>> batch.returns.tolist()
    [[0.0, 2.0, 2.0]]
    """
    mask = rollout.mask[:, -policy.values.shape[1] :]
    kl = kl_k1(policy.logprobs, reference.logprobs)
    rewards = kl_shaped_rewards(scores, kl, mask, kl_coef=kl_coef)
    returns = monte_carlo_returns(rewards, mask, discount=discount)
    advantages = masked_whiten(returns - policy.values, mask)
    batch = Batch(rollout.tokens, rollout.attention_mask, mask, policy.logprobs, policy.values, returns, advantages)

    def a_sequence(x: jax.Array) -> jax.Array:  # summed over its tokens, averaged over sequences
        return jnp.where(mask, x, 0.0).sum(1).mean()

    def variance(x: jax.Array) -> jax.Array:
        return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)

    sequence_kl = a_sequence(kl)
    new_kl_coef = kl_coef
    if kl_target is not None:
        new_kl_coef = adaptive_kl_coef(
            kl_coef, sequence_kl, target=kl_target, horizon=kl_horizon, batch_size=len(scores)
        )
        new_kl_coef = jnp.where(jnp.isfinite(new_kl_coef), new_kl_coef, kl_coef)
    sampled = rollout.logprobs[:, -mask.shape[1] :]
    return (
        batch,
        new_kl_coef,
        {
            "objective/kl": sequence_kl,
            "objective/kl_coef": kl_coef,
            "objective/entropy": a_sequence(policy.entropy),
            "objective/non_score_reward": -kl_coef * sequence_kl,
            "objective/rlhf_reward": scores.mean() - kl_coef * sequence_kl,
            "policy/entropy_avg": masked_mean(policy.entropy, mask),
            "val/explained_variance": 1 - variance(returns - policy.values) / (variance(returns) + 1e-8),
            "val/sampler_gap": masked_mean(jnp.abs(sampled - policy.logprobs), mask),  # sampler against learner, nats
            "completions/mean_length": a_sequence(jnp.ones_like(kl)),
            "completions/max_length": mask.sum(1).max(),
        },
    )


def ppo_loss(
    params: Any, batch: Batch, *, lm: CausalLM, temperature: float, clip_eps: float, value_clip_eps: float | None,
    value_coef: float, entropy_coef: float,
) -> tuple[jax.Array, train.Metrics]:  # fmt: skip
    """Compute PPO's loss: clipped surrogate + value_coef * value loss - entropy_coef * entropy, means over sampled tokens.

    Args:
        params: {"lm", "value"}, differentiated.
        batch: of `experience`.
        lm: the model's functions.
        temperature: the sampler's.
        clip_eps: range of the ratio.
        value_clip_eps: range of the value around its old one, in reward units; None does not clip.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus; 0 does not compute it.

    Returns:
        The loss [], and metrics, each a mean over the batch's sampled tokens.

    >>> import pgjax as pg
    >>> lm = pg.causal_lm(pg.Architecture(
    ...     family="gpt2", vocab_size=7, width=4, depth=1, heads=2, kv_heads=2, head_dim=2, mlp_width=8, max_positions=8,
    ...     activation="gelu_tanh", norm="layer", norm_eps=1e-5, rope=None, gated_mlp=False, qkv_bias=True,
    ...     out_bias=True, mlp_bias=True, qk_norm=False, tied=True))
    >>> params = {"lm": lm.init(jax.random.key(0)), "value": pg.init_value_head(4)}
    >>> x = jnp.zeros((2, 3))
    >>> batch = Batch(jnp.ones((2, 5), jnp.int32), jnp.ones((2, 5), bool), x == 0, x - 2.0, x, x + 1.0, x)
    >>> loss, metrics = ppo_loss(
    ...     params, batch, lm=lm, temperature=1.0, clip_eps=0.2, value_clip_eps=None, value_coef=0.5, entropy_coef=0.0)
    >>> float(loss), float(metrics["loss/value_avg"])  # V = 0 where the return is 1
    (0.25, 0.5)
    """
    window = batch.mask.shape[1]
    hidden = lm.hidden(params["lm"], batch.tokens, batch.attention_mask)[:, -window:]
    unembedding, tokens = lm.unembedding(params["lm"]), batch.tokens[:, -window:]
    logprobs = linear_token_logprobs(hidden, unembedding, tokens, temperature=temperature)
    values = token_values(params["value"], hidden)

    policy = clipped_surrogate_loss(logprobs, batch.old_logprobs, batch.advantages, batch.mask, clip_eps=clip_eps)
    old_values = None if value_clip_eps is None else batch.old_values
    value = value_loss(values, batch.returns, batch.mask, old_values=old_values, clip_eps=value_clip_eps)
    loss = policy + value_coef * value
    if entropy_coef != 0:
        entropy = token_entropy(logits_of(hidden, unembedding), temperature=temperature)
        loss = loss - entropy_coef * masked_mean(entropy, batch.mask)

    moved = surrogate_diagnostics(logprobs, batch.old_logprobs, batch.mask, clip_eps=clip_eps)
    value_moved = jnp.abs(values - batch.old_values) > (math.inf if value_clip_eps is None else value_clip_eps)
    ratio = jnp.exp(jnp.where(batch.mask, logprobs - batch.old_logprobs, 0.0))
    return loss, {
        "loss/policy_avg": policy,
        "loss/value_avg": value,
        "policy/approxkl_avg": moved["approx_kl"],
        "policy/clipfrac_avg": moved["clip_fraction"],
        "val/clipfrac_avg": masked_mean(value_moved.astype(jnp.float32), batch.mask),
        "val/ratio": moved["ratio_mean"],
        "val/ratio_var": masked_mean(jnp.square(ratio - 1), batch.mask),  # around 1
    }


STATIC = ("lm", "optimizer", "microbatches", "temperature", "clip_eps", "value_clip_eps", "value_coef", "entropy_coef")


@functools.partial(jax.jit, static_argnames=STATIC, donate_argnames=("state",))
def update(
    state: train.TrainState, batch: Batch, order: jax.Array, number: jax.Array,
    *, optimizer: train.Optimizer, microbatches: int, **options: Any,
) -> tuple[train.TrainState, train.Metrics]:  # fmt: skip
    """Take one optimizer step on one minibatch; the state's buffers are given away.

    Args:
        state: before the step.
        batch: of `experience`.
        order: [minibatches, rows] of `train.minibatches`.
        number: [] which minibatch.
        optimizer: of `train.adamw`.
        microbatches: parts whose gradients are added up, for memory.
        **options: those of `ppo_loss`.

    Returns:
        The state after it, and the metrics of `ppo_loss` and `train.apply_gradient`.

    >>> import pgjax as pg
    >>> lm = pg.causal_lm(pg.Architecture(
    ...     family="gpt2", vocab_size=7, width=4, depth=1, heads=2, kv_heads=2, head_dim=2, mlp_width=8, max_positions=8,
    ...     activation="gelu_tanh", norm="layer", norm_eps=1e-5, rope=None, gated_mlp=False, qkv_bias=True,
    ...     out_bias=True, mlp_bias=True, qk_norm=False, tied=True))
    >>> params = {"lm": lm.init(jax.random.key(0)), "value": pg.init_value_head(4)}
    >>> x = jnp.zeros((2, 3))
    >>> batch = Batch(jnp.ones((2, 5), jnp.int32), jnp.ones((2, 5), bool), x == 0, x - 2.0, x, x + 1.0, x)
    >>> optimizer = train.adamw(1e-3, updates=1)
    >>> state, metrics = update(
    ...     train.init_state(params, optimizer), batch, jnp.array([[0, 1]]), jnp.int32(0), lm=lm, optimizer=optimizer,
    ...     microbatches=2, temperature=1.0, clip_eps=0.2, value_clip_eps=None, value_coef=0.5, entropy_coef=0.0)
    >>> int(state.updates), bool(metrics["train/healthy"])
    (1, True)
    """
    part = jax.tree.map(lambda x: x[order[number]], batch)
    loss_fn = functools.partial(ppo_loss, **options)
    grad, metrics = train.accumulate(loss_fn, state.params, part, part.mask.sum(1), microbatches)
    state, step_metrics = train.apply_gradient(state, grad, metrics.pop("loss"), optimizer)
    return state, metrics | step_metrics
