"""PPO's three programs over a causal LM: score a rollout, turn scores into advantages, update. Pure, to be composed.

Schulman et al. 2017 ("Proximal Policy Optimization Algorithms"), with Monte Carlo returns in place of GAE, and the KL to a
frozen reference in the rewards (Ziegler et al. 2019). RLOO, GRPO, Dr. GRPO and REINFORCE are other values of `advantage`,
`algorithm` and `reduce`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pgjax.core.advantages import (
    group_advantages,
    kl_shaped_rewards,
    leave_one_out_baseline,
    monte_carlo_returns,
    truncated_importance_weights,
)
from pgjax.core.checks import check_whole
from pgjax.core.kl import adaptive_kl_coef, kl_k1
from pgjax.core.logprobs import token_entropy, token_logprobs
from pgjax.core.masking import masked_mean, masked_whiten, where_mask
from pgjax.learning.optimizer import (
    Metrics,
    Optimizer,
    TrainState,
    accumulate,
    apply_gradient,
)
from pgjax.learning.policy_loss import Batch, ppo_loss, token_weights
from pgjax.models.causal_lm import CausalLM, logits_of
from pgjax.models.heads import token_values
from pgjax.models.lora import with_lora
from pgjax.parallel.sharding import ambient_mesh, check_batch, constrain, constrain_batch
from pgjax.rollout.sample import Rollout, Scored


@functools.partial(jax.jit, static_argnames=("lm", "window", "parts", "group_size"))
def score(
    lm: CausalLM,
    params: Any,
    tokens: jax.Array,
    attention_mask: jax.Array,
    temperature: jax.Array,
    *,
    window: int,
    parts: int,
    group_size: int = 1,
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
        window: W, how many entries of the frame are wanted; the first of them must be an entry of the prompt, and is 0.
        parts: divides B; the logits of one part exist at a time.
        group_size: completions a prompt, adjacent rows with the same T - W + 1 first entries, which are computed once; each
            part holds whole groups. 1 where rows have nothing in common.

    Returns:
        Each [B, W] float32, in nats and in units of reward.

    Raises:
        ValueError: rows that do not divide into the parts, or parts into groups or over the mesh, with the numbers.

    >>> import pgjax as pg
    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 7, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
    >>> lm = pg.causal_lm(architecture_of(config))
    >>> params = {"lm": lm.init(jax.random.key(0)), "value": pg.init_value_head(4)}
    >>> ones = jnp.ones((2, 5), jnp.int32)
    >>> score(lm, params, ones, ones > 0, jnp.float32(1.0), window=3, parts=2).values.shape
    (2, 3)
    """
    check_whole("parts", parts, 1)
    if len(tokens) % parts:
        raise ValueError(f"{len(tokens)} rows do not divide into {parts} parts")

    def part(xs: tuple[jax.Array, jax.Array]) -> Scored:
        tokens, attention_mask = xs
        hidden = lm.hidden(params["lm"], tokens, attention_mask, **group)[:, -window:]
        logits = constrain(logits_of(hidden, unembedding), "batch", None, "vocab")
        return constrain_batch(
            Scored(
                token_logprobs(logits, tokens[:, -window:], temperature=temperature),
                token_values(params["value"], hidden),
                token_entropy(logits, temperature=temperature),
            )
        )

    group = {"prompt_length": tokens.shape[1] - window + 1, "group_size": group_size}
    check_batch(ambient_mesh(), len(tokens) // parts // group_size, "each part")
    # Gathered over fsdp once: XLA on TPU would do it again in each part.
    unembedding = constrain(lm.unembedding(params["lm"]).astype(lm.dtype), "vocab")
    split = jax.tree.map(lambda x: x.reshape(parts, -1, x.shape[1]), (tokens, attention_mask))
    split = jax.tree.map(lambda x: constrain(x, None, "batch"), split)  # each part on all devices
    return constrain_batch(jax.tree.map(lambda x: x.reshape(-1, window), jax.lax.map(part, split)))


def baselined(
    kind: str, returns: jax.Array, values: jax.Array, scores: jax.Array, totals: jax.Array, mask: jax.Array,
    *, group_size: int, normalize: bool,
) -> jax.Array:  # fmt: skip
    """Compare returns with what was to be expected: the advantages of PPO, RLOO, GRPO and REINFORCE.

    - "value": returns - values, whitened over all sampled tokens; PPO with a critic.
    - "leave-one-out": returns - the mean of what the prompt's other completions still earn from the same token on: their
      score, and the penalties that are still to come; RLOO, Ahmadian et al. (2024), "Back to Basics", token by token.
      Unbiased: the baseline does not depend on the row that it is taken from.
    - "group": at every token, the total against its group's; GRPO (Shao et al. 2024), Dr. GRPO without `normalize`.
    - "none": the returns themselves; Williams (1992).

    Args:
        kind: one of the four.
        returns: [B, W] reward units, what is still to come at each token.
        values: [B, W] reward units; looked at by "value" alone.
        scores: [B] reward units, what each sequence earns at its end; rows of one prompt are adjacent.
        totals: [B] reward units, each sequence's whole reward.
        mask: [B, W] boolean.
        group_size: completions a prompt, at least 2, for "leave-one-out" and "group".
        normalize: whether "group" divides by the group's standard deviation.

    Returns:
        [B, W] float32, 0 outside the mask; in standard deviations for "value" and normalised "group", else in reward units.

    Raises:
        ValueError: an unknown kind, or a group size that does not fit.

    >>> ones = jnp.ones((2, 1))
    >>> scores = jnp.array([1.0, 3.0])
    >>> baselined("leave-one-out", scores[:, None], ones, scores, scores, ones > 0, group_size=2, normalize=True).tolist()
    [[-2.0], [2.0]]
    """
    if kind == "value":
        return masked_whiten(returns - values, mask)
    if kind == "leave-one-out":
        earned = scores[:, None] + jnp.where(mask, returns - scores[:, None], 0.0)  # its score alone, once it has ended
        of_others = functools.partial(leave_one_out_baseline, group_size=group_size)
        return where_mask(mask, returns - jax.vmap(of_others, in_axes=1, out_axes=1)(earned))
    if kind == "group":
        compared = group_advantages(totals, group_size=group_size, normalize=normalize)
        return where_mask(mask, jnp.broadcast_to(compared[:, None], mask.shape))
    if kind == "none":
        return returns
    raise ValueError(f"advantage must be value, leave-one-out, group or none, got {kind!r}")


EXPERIENCE_STATIC = (
    "discount", "kl_target", "kl_horizon", "advantage", "group_size", "normalize_group", "importance_cap",
)  # fmt: skip


@functools.partial(jax.jit, static_argnames=EXPERIENCE_STATIC)
def experience(
    rollout: Rollout, policy: Scored, reference: Scored, scores: jax.Array, kl_coef: jax.Array,
    *, discount: float, kl_target: float | None, kl_horizon: float, advantage: str = "value", group_size: int = 1,
    normalize_group: bool = True, importance_cap: float | None = None,
) -> tuple[Batch, jax.Array, Metrics]:  # fmt: skip
    """Turn scores into advantages.

    rewards = score at the last sampled token - kl_coef * (log pi - log ref) at every one; returns = the sum of what is
    still to come; advantages = returns against what `baselined` expects, times min(pi / sampler, importance_cap).

    Args:
        rollout: of `sample`, [B, T].
        policy: what the sampling policy says of it, [B, W].
        reference: what the frozen reference says of it.
        scores: [B] of the black box.
        kl_coef: [] reward units a nat.
        discount: of a reward one token later.
        kl_target: nats a sequence that kl_coef is steered to (Ziegler et al. 2019); None keeps it.
        kl_horizon: completions; how slowly it is steered.
        advantage: "value", "leave-one-out", "group" or "none", as in `baselined`.
        group_size: completions a prompt, adjacent rows, for "leave-one-out" and "group".
        normalize_group: whether "group" divides by the group's standard deviation.
        importance_cap: bound of the weights pi / sampler of single tokens, where the sampler was not quite the policy (a
            lower precision, a filter such as top_p); None takes the sampler for the policy.

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
    advantages = baselined(
        advantage, returns, policy.values, scores, rewards.sum(1), mask,
        group_size=group_size, normalize=normalize_group,
    )  # fmt: skip
    sampled = rollout.logprobs[:, -mask.shape[1] :]
    if importance_cap is not None:
        advantages *= truncated_importance_weights(policy.logprobs, sampled, mask, cap=importance_cap)
    batch = Batch(
        rollout.tokens, rollout.attention_mask, mask, policy.logprobs, policy.values, returns, advantages,
        ref_logprobs=reference.logprobs,
    )  # fmt: skip

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
    metrics = {
        "objective/kl": sequence_kl,
        "objective/kl_coef": kl_coef,
        "objective/entropy": a_sequence(policy.entropy),
        "objective/non_score_reward": -kl_coef * sequence_kl,
        "objective/rlhf_reward": scores.mean() - kl_coef * sequence_kl,
        "policy/entropy_avg": masked_mean(policy.entropy, mask),
        "val/sampler_gap": masked_mean(jnp.abs(sampled - policy.logprobs), mask),  # sampler against learner, nats
        "completions/mean_length": a_sequence(jnp.ones_like(kl)),
        "completions/max_length": mask.sum(1).max(),
    }
    if advantage == "value":
        metrics["val/explained_variance"] = 1 - variance(returns - policy.values) / (variance(returns) + 1e-8)
    if importance_cap is not None:
        weighty = policy.logprobs - sampled > jnp.log(importance_cap)
        metrics["val/importance_capped"] = masked_mean(weighty.astype(jnp.float32), mask)
    return batch, new_kl_coef, metrics


@jax.jit
def sequence_kl(policy: Scored, reference: Scored, mask: jax.Array) -> jax.Array:
    """Estimate each sequence's KL to the reference by its log-ratio, k1 summed over the sampled tokens.

    Args:
        policy: what the sampling policy says of a rollout, [B, W].
        reference: what the frozen reference says of it.
        mask: [B, T] of the rollout, T at least W.

    Returns:
        [B] float32, nats; unbiased, of either sign.

    >>> zeros = jnp.zeros((1, 2))
    >>> policy, reference = Scored(zeros, zeros, zeros), Scored(zeros - 1.5, zeros, zeros)
    >>> sequence_kl(policy, reference, jnp.array([[False, True, True]])).tolist()
    [3.0]
    """
    inside = mask[:, -policy.logprobs.shape[1] :]
    return where_mask(inside, kl_k1(policy.logprobs, reference.logprobs)).sum(1)


STATIC = (
    "optimizer", "microbatches", "reduce",
    "lm", "temperature", "clip_eps", "value_clip_eps", "value_coef", "entropy_coef",
    "algorithm", "clip_eps_high", "dual_clip", "kl_loss_coef", "group_size",
)  # fmt: skip


@functools.partial(jax.jit, static_argnames=STATIC, donate_argnames=("state",))
def update(
    state: TrainState, batch: Batch, order: jax.Array, number: jax.Array, frozen: dict[str, Any] | None = None,
    *, optimizer: Optimizer, microbatches: int, reduce: str = "token_mean", **options: Any,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Take one optimizer step on one minibatch; the state's buffers are given away.

    Args:
        state: before the step.
        batch: of `experience`.
        order: [minibatches, rows] of `minibatches`.
        number: [] which minibatch.
        frozen: {"lm": parameters} where `state.params["lm"]` are adapters to them (`lora`); None: all are trained.
        optimizer: of `adamw`.
        microbatches: parts whose gradients are added up, for memory.
        reduce: of the policy's losses over the minibatch: "token_mean", "sequence_mean" or "sequence_sum".
        **options: those of `ppo_loss`.

    Returns:
        The state after it, and the metrics of `ppo_loss` and `apply_gradient`.

    >>> import pgjax as pg
    >>> from pgjax.learning.optimizer import adamw, init_state
    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 7, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
    >>> lm = pg.causal_lm(architecture_of(config))
    >>> params = {"lm": lm.init(jax.random.key(0)), "value": pg.init_value_head(4)}
    >>> x = jnp.zeros((2, 3))
    >>> batch = Batch(jnp.ones((2, 5), jnp.int32), jnp.ones((2, 5), bool), x == 0, x - 2.0, x, x + 1.0, x)
    >>> optimizer = adamw(1e-3, updates=1)
    >>> state, metrics = update(
    ...     init_state(params, optimizer), batch, jnp.array([[0, 1]]), jnp.int32(0), lm=lm, optimizer=optimizer,
    ...     microbatches=2, temperature=1.0, clip_eps=0.2, value_clip_eps=None, value_coef=0.5, entropy_coef=0.0)
    >>> int(state.updates), bool(metrics["train/healthy"])
    (1, True)
    """
    part = constrain_batch(jax.tree.map(lambda x: x[order[number]], batch))
    part = part._replace(weights=token_weights(part.mask, reduce))

    def loss_fn(params: Any, part: Batch) -> tuple[jax.Array, Metrics]:
        return ppo_loss(with_lora(frozen, params), part, **options)

    grad, metrics = accumulate(loss_fn, state.params, part, part.mask.sum(1), microbatches)
    state, step_metrics = apply_gradient(state, grad, metrics.pop("loss"), optimizer)
    return state, metrics | step_metrics
