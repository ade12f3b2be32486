"""The compiled programs of an iteration: teacher-force a rollout, turn scores into advantages, take an update. Pure functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pgjax.core.advantages import kl_shaped_rewards, monte_carlo_returns
from pgjax.core.checks import check_whole
from pgjax.core.importance import masked_importance_weights, truncated_importance_weights
from pgjax.core.kl import adaptive_kl_coef, kl_k1
from pgjax.core.masking import masked_mean, where_mask
from pgjax.learning.algorithm import Algorithm, Batch, Experience, check_algorithm
from pgjax.learning.optimizer import (
    Metrics,
    TrainState,
    Transformation,
    accumulate,
    accumulate_steps,
    apply_gradient,
)
from pgjax.learning.policy_loss import policy_loss, token_weights
from pgjax.models.causal_lm import CausalLM
from pgjax.models.heads import head_logprobs, head_logprobs_and_entropy, logit_options, token_values
from pgjax.models.lora import with_lora
from pgjax.parallel.sharding import ambient_mesh, check_batch, constrain, constrain_batch
from pgjax.rollout.packed_rows import PackedRows, members, read_all_packed, step_of
from pgjax.rollout.sample import Rollout, Scored

_Read = Callable[
    [jax.Array, jax.Array, jax.Array], Any
]  # (hidden, unembedding, tokens) of a window -> tree of [rows, W]


@functools.partial(jax.jit, static_argnames=("lm", "window", "parts", "group_size"))
def teacher_force(
    lm: CausalLM,
    params: Any,
    tokens: jax.Array,
    attention_mask: jax.Array,
    temperature: jax.Array,
    *,
    window: int,
    parts: int,
    group_size: int = 1,
    packing: PackedRows | None = None,
) -> Scored:
    """Run a policy with its critic over a batch of given tokens.

    logprobs_t = log pi(token_t | before) at `temperature`, values_t = V(before), entropy_t of that distribution; for the
    last `window` entries of the token frame.

    Args:
        lm: the model's functions.
        params: {"lm": parameters, "value": a value head}.
        tokens: [B, T] int32.
        attention_mask: [B, T].
        temperature: [] above 0, the sampler's.
        window: W, how many entries of the frame are wanted; the first of them must be an entry of the prompt, and is 0.
        parts: divides B; the hidden states of one part exist at a time.
        group_size: completions a prompt, adjacent rows with the same T - W + 1 first entries, which are computed once; each
            part holds whole groups. 1 where rows have nothing in common.
        packing: of `packed_rows.pack_rows`, which takes the place of `parts`; where nothing was sampled all is then 0.

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
    >>> teacher_force(lm, params, ones, ones > 0, jnp.float32(1.0), window=3, parts=2).values.shape
    (2, 3)
    """

    def read(hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array) -> Scored:
        options = {"temperature": temperature, **logit_options(lm.arch)}
        logprobs, entropy = head_logprobs_and_entropy(hidden, unembedding, tokens, **options)
        return Scored(logprobs, token_values(params["value"], hidden), entropy)

    return _in_parts(read, lm, params["lm"], tokens, attention_mask, window, parts, group_size, packing)


@functools.partial(jax.jit, static_argnames=("lm", "window", "parts", "group_size"))
def reference_logprobs(
    lm: CausalLM,
    params: Any,
    tokens: jax.Array,
    attention_mask: jax.Array,
    temperature: jax.Array,
    *,
    window: int,
    parts: int,
    group_size: int = 1,
    packing: PackedRows | None = None,
) -> jax.Array:
    """Compute the log-probabilities that a frozen model gives to a batch, and nothing else.

    The arithmetic is that of `teacher_force`: of two equal models the KL is 0, not rounding.

    Args:
        lm: the model's functions.
        params: its parameters, without a value head.
        tokens, attention_mask, temperature, window, parts, group_size, packing: as of `teacher_force`.

    Returns:
        [B, W] float32, nats.

    Raises:
        ValueError: as `teacher_force`.

    >>> import pgjax as pg
    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 7, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
    >>> lm = pg.causal_lm(architecture_of(config))
    >>> ones = jnp.ones((2, 5), jnp.int32)
    >>> reference_logprobs(lm, lm.init(jax.random.key(0)), ones, ones > 0, jnp.float32(1.0), window=3, parts=2).shape
    (2, 3)
    """
    read = functools.partial(head_logprobs, temperature=temperature, **logit_options(lm.arch))
    return _in_parts(read, lm, params, tokens, attention_mask, window, parts, group_size, packing)


def _in_parts(
    read: _Read, lm: CausalLM, params: Any, tokens: jax.Array, attention_mask: jax.Array,
    window: int, parts: int, group_size: int, packing: PackedRows | None,
) -> Any:  # fmt: skip
    """Read what is wanted off the last hidden states, some rows at a time."""
    # Gathered over fsdp once: XLA on TPU would do it again in each part.
    unembedding = constrain(lm.unembedding(params).astype(lm.dtype), "vocab")
    if packing is not None:
        of_model = lm, params, unembedding, tokens, attention_mask
        return read_all_packed(read, *of_model, packing, window=window, group_size=group_size)
    check_whole("parts", parts, 1)
    if len(tokens) % parts:
        raise ValueError(f"{len(tokens)} rows do not divide into {parts} parts")
    check_batch(ambient_mesh(), len(tokens) // parts // group_size, "each part")
    group = {"prompt_length": tokens.shape[1] - window + 1, "group_size": group_size}

    def part(xs: tuple[jax.Array, jax.Array]) -> Any:
        tokens, attention_mask = xs
        hidden = lm.hidden(params, tokens, attention_mask, **group)[:, -window:]
        return constrain_batch(read(hidden, unembedding, tokens[:, -window:]))

    split = jax.tree.map(lambda x: x.reshape(parts, -1, x.shape[1]), (tokens, attention_mask))
    split = jax.tree.map(lambda x: constrain(x, None, "batch"), split)  # each part on all devices
    return constrain_batch(jax.tree.map(lambda x: x.reshape(-1, window), jax.lax.map(part, split)))


@functools.partial(
    jax.jit,
    static_argnames=("algorithm", "importance_cap", "importance_level", "importance_floor", "kl_target", "kl_horizon"),
)
def experience(
    rollout: Rollout, policy: Scored, ref_logprobs: jax.Array | None, scores: jax.Array, kl_coef: jax.Array,
    kept: jax.Array | None = None, *, algorithm: Algorithm, importance_cap: float | None = None,
    importance_level: str = "token", importance_floor: float | None = None, kl_target: float | None = None,
    kl_horizon: float = 10_000.0,
) -> tuple[Batch, jax.Array, Metrics]:  # fmt: skip
    """Turn scores into advantages.

    rewards = score at the last sampled token - kl_coef * (log pi - log ref) at every one; returns = the sum of what is
    still to come; advantages = `algorithm.advantages`, times min(pi / sampler, importance_cap). Scores of single tokens are
    rewards of those in place of one at the last.

    Args:
        rollout: of `pg.sample`, [B, T].
        policy: what the sampling policy gives to it, [B, W].
        ref_logprobs: [B, W] nats, what the frozen reference gives to it; None: there is none, and no penalty.
        scores: [B] of the black box, finite where rows are kept; or [B, W - 1], one for each token that was sampled.
        kl_coef: [] reward units a nat.
        kept: [B] bool, False where a row is left out of the update: no mean and no baseline counts it. None: all are kept.
        algorithm: how advantages are made.
        importance_cap: bound of the weights pi / sampler, where the sampler was not quite the policy (a lower precision, a
            filter such as top_p); None takes the sampler for the policy.
        importance_level: "token", "sequence" or "geometric", as of `pg.truncated_importance_weights`.
        importance_floor: a number: weights below it and above the cap are set to 0 (`pg.masked_importance_weights`); None: those
            above the cap are set to the cap.
        kl_target: nats a sequence that kl_coef is steered to (Ziegler et al. 2019); None keeps it.
        kl_horizon: completions; how slowly it is steered.

    Returns:
        The batch to learn from, the coefficient for the next one, and metrics over all sequences.

    Raises:
        UserError: as `check_algorithm`, such as a discount below 1 with groups, which compare whole sequences.

    >>> import pgjax as pg
    >>> mask = jnp.array([[False, True, True]])
    >>> zeros = jnp.zeros((1, 3))
    >>> rollout = Rollout(jnp.zeros((1, 3), jnp.int32), mask, mask, zeros)
    >>> policy, scores = Scored(zeros, zeros, zeros), jnp.array([2.0])
    >>> batch, _, _ = experience(rollout, policy, zeros, scores, jnp.float32(0.1), algorithm=pg.ppo())
    >>> batch.returns.tolist()
    [[0.0, 2.0, 2.0]]
    """
    check_algorithm(algorithm)
    sampled_mask = rollout.mask[:, -policy.values.shape[1] :]
    mask = sampled_mask if kept is None else sampled_mask & kept[:, None]
    kl = jnp.zeros_like(policy.logprobs) if ref_logprobs is None else kl_k1(policy.logprobs, ref_logprobs)
    if scores.ndim == 1:
        scores = scores if kept is None else _group_mean_in_place(scores, kept, algorithm.group_size)
        rewards = kl_shaped_rewards(scores, kl, mask, kl_coef=kl_coef)
    else:
        of_tokens = where_mask(mask, jnp.pad(scores, ((0, 0), (1, 0))))  # the window's first entry is the prompt's last
        rewards = of_tokens - kl_coef * where_mask(mask, kl)
        scores = of_tokens.sum(1)
        scores = scores if kept is None else _group_mean_in_place(scores, kept, algorithm.group_size)
    returns = monte_carlo_returns(rewards, mask, discount=algorithm.discount)
    sampled = rollout.logprobs[:, -mask.shape[1] :]
    penalties = -kl_coef * where_mask(mask, kl)
    known = Experience(scores, penalties, returns, policy.values, policy.logprobs, sampled, mask, kept)
    advantages = algorithm.advantages(known)
    chosen = None if algorithm.choose is None else algorithm.choose(known, advantages)
    if importance_cap is not None:
        compared = functools.partial(
            truncated_importance_weights, policy.logprobs, sampled, mask, level=importance_level
        )
        if importance_floor is None:
            advantages *= compared(cap=importance_cap)
        else:
            advantages *= masked_importance_weights(
                policy.logprobs, sampled, mask, cap=importance_cap, floor=importance_floor, level=importance_level
            )
    batch = Batch(
        rollout.tokens, rollout.attention_mask, mask, policy.logprobs, policy.values, returns, advantages,
        ref_logprobs=ref_logprobs, chosen=chosen,
    )  # fmt: skip

    def a_sequence(x: jax.Array) -> jax.Array:  # summed over its tokens, averaged over all that were sampled
        return jnp.where(sampled_mask, x, 0.0).sum(1).mean()

    def variance(x: jax.Array) -> jax.Array:
        return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)

    metrics = {
        "objective/entropy": a_sequence(policy.entropy),
        "policy/entropy_avg": masked_mean(policy.entropy, sampled_mask),
        "val/sampler_gap": masked_mean(
            jnp.abs(sampled - policy.logprobs), sampled_mask
        ),  # sampler against learner, nats
        "completions/mean_length": a_sequence(jnp.ones_like(kl)),
        "completions/max_length": sampled_mask.sum(1).max(),
    }
    if kept is not None:
        metrics["completions/left_out"] = (~kept).sum()
    kl_sum = a_sequence(kl)
    if ref_logprobs is not None:
        metrics |= {
            "objective/kl": kl_sum,
            "objective/kl_coef": kl_coef,
            "objective/non_score_reward": -kl_coef * kl_sum,
            "objective/rlhf_reward": masked_mean(scores, kept) - kl_coef * kl_sum,
        }
    if algorithm.value_coef != 0:
        metrics["val/explained_variance"] = 1 - variance(returns - policy.values) / (variance(returns) + 1e-8)
    if importance_cap is not None:
        weights = compared(cap=jnp.inf)
        cut = (weights > importance_cap) | (weights < (importance_floor or 0.0))
        metrics["val/importance_capped"] = masked_mean(cut.astype(jnp.float32), mask)
    if kl_target is None:
        return batch, kl_coef, metrics
    steered = adaptive_kl_coef(kl_coef, kl_sum, target=kl_target, horizon=kl_horizon, batch_size=len(scores))
    return batch, jnp.where(jnp.isfinite(steered), steered, kl_coef), metrics


def _group_mean_in_place(scores: jax.Array, kept: jax.Array, group_size: int) -> jax.Array:
    """Give rows that are left out the mean of the others of their group: what averages all rows of a group finds that mean."""
    groups, inside = scores.reshape(-1, group_size), kept.reshape(-1, group_size)
    total = where_mask(inside, groups).sum(1, keepdims=True)
    mean = total / jnp.maximum(inside.sum(1, keepdims=True), 1).astype(total.dtype)
    return jnp.where(inside, groups, mean).reshape(-1)


@jax.jit
def sequence_kl(logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """Estimate each sequence's KL to the reference by its log-ratio, k1 summed over the sampled tokens.

    Args:
        logprobs: [B, W] nats, of the sampling policy.
        ref_logprobs: [B, W] nats, of the frozen reference.
        mask: [B, T] of the rollout, T at least W.

    Returns:
        [B] float32, nats; unbiased, of either sign.

    >>> sequence_kl(jnp.zeros((1, 2)), jnp.full((1, 2), -1.5), jnp.array([[False, True, True]])).tolist()
    [3.0]
    """
    return where_mask(mask[:, -logprobs.shape[1] :], kl_k1(logprobs, ref_logprobs)).sum(1)


@functools.partial(
    jax.jit,
    static_argnames=("lm", "algorithm", "optimizer", "microbatches", "temperature", "group_size", "left_out"),
    donate_argnames=("state",),
)
def update(
    state: TrainState, batch: Batch, order: jax.Array, number: jax.Array, frozen: dict[str, Any] | None = None,
    packing: PackedRows | None = None, *, lm: CausalLM, algorithm: Algorithm, optimizer: Transformation,
    microbatches: int = 1, temperature: float = 1.0, group_size: int = 1, left_out: bool = False,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Take one optimizer step on one minibatch; the state's buffers are given away.

    Args:
        state: before the step.
        batch: of `experience`.
        order: [minibatches, rows] of `optimizer.minibatches`.
        number: [] which minibatch.
        frozen: {"lm": parameters} where `state.params["lm"]` are adapters to them (`lora`); None: all are trained.
        packing: of `packed_rows.pack_rows` of the minibatch's rows, in their order; its steps take the place of microbatches.
        lm: the model's functions.
        algorithm: whose loss it is.
        optimizer: any optax transformation.
        microbatches: parts whose gradients are added up, for memory; the gradient is the same.
        temperature: the sampler's.
        group_size: as of `policy_loss`.
        left_out: whether rows may be left out, all of a minibatch even, which then takes no step; False saves memory.

    Returns:
        The state after it, and the metrics of `policy_loss` and `optimizer.apply_gradient`.

    >>> import pgjax as pg
    >>> from pgjax.learning.optimizer import init_state
    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 7, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
    >>> lm = pg.causal_lm(architecture_of(config))
    >>> params = {"lm": lm.init(jax.random.key(0)), "value": pg.init_value_head(4)}
    >>> x = jnp.zeros((2, 3))
    >>> batch = Batch(jnp.ones((2, 5), jnp.int32), jnp.ones((2, 5), bool), x == 0, x - 2.0, x, x + 1.0, x)
    >>> adam = pg.adamw(1e-3, updates=1)
    >>> state, metrics = update(init_state(params, adam), batch, jnp.array([[0, 1]]), jnp.int32(0),
    ...                         lm=lm, algorithm=pg.ppo(), optimizer=adam, microbatches=2)
    >>> int(state.updates), bool(metrics["train/healthy"])
    (1, True)
    """
    part = constrain_batch(jax.tree.map(lambda x: x[order[number]], batch))
    part = part._replace(weights=token_weights(part.mask, algorithm.reduce))

    def loss_fn(params: Any, given: tuple[Batch, PackedRows | None]) -> tuple[jax.Array, Metrics]:
        options: dict[str, Any] = {"algorithm": algorithm, "temperature": temperature, "group_size": group_size}
        return policy_loss(with_lora(frozen, params), given[0], lm=lm, packing=given[1], **options)

    def of_step(number: jax.Array) -> tuple[tuple[Batch, PackedRows], jax.Array]:
        rows = step_of(packing, number)  # type: ignore[arg-type]
        mask = part.mask & members(rows)[:, None]
        return (part._replace(mask=mask), rows), mask.sum(1)

    if packing is None:
        grad, metrics = accumulate(loss_fn, state.params, (part, None), part.mask.sum(1), microbatches)
    else:
        grad, metrics = accumulate_steps(loss_fn, state.params, of_step, part.mask.sum(), packing.steps)
    state, step_metrics = apply_gradient(state, grad, metrics.pop("loss"), optimizer, not left_out or part.mask.any())
    return state, metrics | step_metrics
