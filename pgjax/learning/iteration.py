"""One iteration of an algorithm: sample, let the caller score, learn. Written once, for scripts, benchmarks and other code."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pgjax.core.checks import check_number, check_whole
from pgjax.learning import optimizer as updates
from pgjax.learning import programs
from pgjax.learning.algorithm import Algorithm
from pgjax.learning.iteration_checks import (
    check_importance,
    check_kept,
    check_options,
    check_packing,
    check_reference,
    check_rows,
    check_scores,
    check_trained,
)
from pgjax.learning.optimizer import Metrics, TrainState
from pgjax.models.causal_lm import CausalLM, Params
from pgjax.models.heads import init_value_head
from pgjax.models.lora import with_lora
from pgjax.parallel.sharding import batch_parts, check_batch, entered, fold_in, place, replicated, whole_groups
from pgjax.rollout.packed_rows import PackedRows, pack_rows, sequence_lengths
from pgjax.rollout.sample import Rollout, Rows, Scored, sample, sample_scored
from pgjax.rollout.trim import columns_behind, without_last

Scores: TypeAlias = (
    jax.typing.ArrayLike | Sequence[float]
)  # of the black box, [B]; or [B, max_new_tokens], one for each token


class State(NamedTuple):
    """What an iteration changes."""

    learner: TrainState  # of {"lm": policy, "value": critic}
    kl_coef: jax.Array  # [] reward units a nat
    iterations: jax.Array  # [] int32, how many are done
    key: jax.Array | None  # of the run; each iteration folds its number into it


class Sampled(NamedTuple):
    """A rollout, and what the policy and the reference give to it.

    T = P + N columns and W = N + 1 entries. N is max_new_tokens; without packing, less where every completion is shorter
    (`rollout.trim`).
    """

    tokens: jax.Array  # [B, T] int32
    attention_mask: jax.Array  # [B, T] bool
    mask: jax.Array  # [B, T] bool, True where the policy sampled
    logprobs: jax.Array  # [B, T] nats, of the distribution sampled from
    policy: Scored  # [B, W] each
    ref_logprobs: jax.Array | None  # [B, W] nats; None without a reference


class Iteration(NamedTuple):
    """An algorithm on a model as three functions; state and rollout carry everything else."""

    init: Callable[..., State]
    sample: Callable[[State, Rows, Rows], Sampled]
    learn: Callable[..., tuple[State, dict[str, Any]]]


def iteration(
    lm: CausalLM, algorithm: Algorithm, optimizer: updates.Transformation, *,
    reference: Params | None = None, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None, min_p: float | None = None, eos_ids: Sequence[int] = (),
    stop_table: jax.typing.ArrayLike | None = None, pad_id: int = 0, lanes: int | None = None,
    min_new_tokens: int = 0,
    epochs: int = 1, minibatches: int = 1, microbatches: int = 1, pack_tokens: int | None = None,
    max_approx_kl: float | None = None,
    importance_cap: float | None = None, importance_level: str = "token", importance_floor: float | None = None,
    kl_target: float | None = None, kl_horizon: float = 10_000.0,
    teacher_force: bool | None = None, frozen: Params | None = None, mesh: Mesh | None = None,
) -> Iteration:  # fmt: skip
    """Compose an algorithm with a model: sample completions, turn their scores into advantages, take the updates.

    `sample` queues its work on the device and returns; scores are made of its tokens on the host meanwhile. `learn` gives the
    state's buffers away. Where a rollout is learned from once, the sampler's own log-probabilities are the policy's; with
    several updates, filters or an importance cap the policy is teacher-forced on its samples.

    Args:
        lm: the model's functions.
        algorithm: `ppo(...)`, `grpo(...)`, ..., or one of your own.
        optimizer: any optax transformation, or `adamw`.
        reference: parameters of the frozen model that the KL is measured to; None: there is no KL, and no pass for it.
        max_new_tokens: the longest completion, in tokens.
        temperature: of the policy, above 0: in sampling and in every log-probability.
        top_k, top_p, min_p, eos_ids, stop_table, pad_id, lanes, min_new_tokens: as of `pg.sample`.
        epochs: passes over an iteration's completions.
        minibatches: optimizer steps in an epoch.
        microbatches: parts of a minibatch, for memory; the gradient is the same.
        pack_tokens: pack the sequences into rows, so that scoring and learning cost what their tokens do, and their memory is
            that of so many tokens a device at a time, the longest prompt and completion at least. The gradient is the same.
            None: a row is a sequence, padded to the longest.
        max_approx_kl: nats a token; the epochs stop once the policy has moved further.
        importance_cap, importance_level, importance_floor, kl_target, kl_horizon: as of `programs.experience`.
        teacher_force: whether the policy's log-probabilities come from a pass of their own over its samples; None: where the
            sampler's are not exact enough.
        frozen: the model's parameters where the policy is adapters to them (`pg.init_lora`); None: all are trained.
        mesh: that the parameters lie on; None: one device.

    Returns:
        init: (params, key, critic=None) -> state; the parameters are copied; the critic, a head as of `init_value_head`,
            starts at 0 unless one is given.
        sample: (state, prompts [B, P], prompt_mask [B, P]) -> rollout; of `algorithm.group_size` adjacent rows, all hold the
            same prompt. It waits for the completions: what comes after is computed up to the longest of them.
        learn: (state, rollout, scores [B], kept=None) -> state, metrics; each a scalar, averaged over the updates. Scores may
            also be [B, max_new_tokens], a reward for each token that was sampled. kept [B] is False for rows that are left out
            of the update, as where nothing could judge them: no mean, no denominator and no baseline counts them, and a
            minibatch of which nothing is left takes no step.

    Raises:
        ValueError: options that do not go together, with the values; a batch that does not divide.

    Example:
        >>> import pgjax as pg
        >>> from pgjax.models.io.config import architecture_of
        >>> config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
        >>> lm = pg.causal_lm(architecture_of(config))
        >>> params = lm.init(jax.random.key(0))
        >>> it = pg.iteration(lm, pg.rloo(group_size=2), pg.adamw(1e-2, updates=1), reference=params, max_new_tokens=4)
        >>> state = it.init(params, jax.random.key(1))
        >>> rollout = it.sample(state, [[3], [3], [5], [5]], [[True]] * 4)
        >>> scores = (np.asarray(rollout.tokens)[:, 1:] == 7).mean(1)  # the black box
        >>> state, metrics = it.learn(state, rollout, scores)
        >>> int(state.iterations), bool(metrics["train/healthy"])
        (1, True)
    """
    check_number("temperature", temperature, 0, math.inf, strict=True)
    for name, number in {"epochs": epochs, "minibatches": minibatches, "microbatches": microbatches}.items():
        check_whole(name, number, 1)
    filtered = any(x is not None for x in (top_k, top_p, min_p)) or min_new_tokens > 0
    once = epochs * minibatches == 1
    plain = not filtered and importance_cap is None  # the sampler draws from the policy itself
    check_options(algorithm, epochs, kl_target, plain=plain, teacher_force=teacher_force)
    check_importance(importance_cap, importance_level, importance_floor)
    check_reference(algorithm, reference)
    check_packing(lm, pack_tokens, microbatches)
    sampler_knows = plain and once if teacher_force is None else not teacher_force
    group, whole = algorithm.group_size, replicated(mesh)
    parts = minibatches * microbatches
    base = None if frozen is None else {"lm": frozen}
    scale = place(np.float32(temperature), whole)
    numbers = [place(np.int32(number), whole) for number in range(minibatches)]
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": scale, "eos_ids": tuple(eos_ids), "pad_id": pad_id,
        "stop_table": place(stop_table, whole), "lanes": lanes,
    }  # fmt: skip
    prepare = functools.partial(
        programs.experience,
        algorithm=algorithm,
        importance_cap=importance_cap,
        importance_level=importance_level,
        importance_floor=importance_floor,
        kl_target=kl_target,
        kl_horizon=kl_horizon,
    )
    take_update = functools.partial(
        programs.update, lm=lm, algorithm=algorithm, optimizer=optimizer, microbatches=microbatches,
        temperature=float(temperature),
    )  # fmt: skip

    def packing_of(rollout: Sampled | Rollout, window: int, orders: Sequence[Any] = (None,)) -> list[PackedRows | None]:
        """Plan the packed rows of the whole batch, or of minibatches of it, given as the numbers of their rows."""
        if pack_tokens is None:
            return [None] * len(orders)
        columns = rollout.tokens.shape[1]
        known = jax.device_get(sequence_lengths(rollout.attention_mask, rollout.mask, window=window))
        plans = []
        for order in orders:
            of_prompts, new = known if order is None else known[:, order]
            plans.append(
                pack_rows(
                    of_prompts, new, columns=columns, prompt_columns=columns - window + 1, pack_tokens=pack_tokens,
                    group_size=whole_groups(None, len(new), group), parts=batch_parts(mesh),
                )
            )  # fmt: skip
        return [place(plan, whole) for plan in plans]

    def keys(state: State) -> tuple[jax.Array, jax.Array]:
        if state.key is None:
            raise ValueError("the state holds no key: state._replace(key=...) gives it the run's")
        sample_key, shuffle_key = jax.random.split(jax.random.fold_in(state.key, state.iterations))
        return sample_key, shuffle_key

    def init(params: Params, key: jax.Array, *, critic: Params | None = None) -> State:
        check_trained(params)
        if critic is None:
            width = jax.eval_shape(lm.unembedding, params if frozen is None else frozen).shape[1]
            head = init_value_head(width)
        else:
            head = jax.tree.map(jnp.copy, critic)
        policy = {"lm": jax.tree.map(jnp.copy, params), "value": place(head, whole)}
        learner = updates.init_state(policy, optimizer)
        return State(learner, place(np.float32(algorithm.kl_coef), whole), place(np.int32(0), whole), key)

    def sample_(state: State, prompts: Rows, prompt_mask: Rows) -> Sampled:
        params = with_lora(base, state.learner.params)
        rows = len(prompts)  # type: ignore[arg-type]
        a_prompt = rows_a_prompt(rows)
        sampler = {**sampling, "group_size": whole_groups(mesh, rows, group)}
        if sampler_knows:
            rollout, policy = sample_scored(lm, params, prompts, prompt_mask, keys(state)[0], **sampler)
        else:
            sampler |= {"top_k": top_k, "top_p": top_p, "min_p": min_p, "min_new_tokens": min_new_tokens}
            rollout = sample(lm, params["lm"], prompts, prompt_mask, keys(state)[0], **sampler)
        # Packed rows hold no column that no completion reaches.
        unused = columns_behind(rollout.mask, max_new_tokens) if pack_tokens is None else 0
        rollout = without_last(rollout, unused)
        ids = rollout.tokens, rollout.attention_mask, scale
        window = max_new_tokens + 1 - unused
        options: dict[str, Any] = {"window": window, "parts": parts, "group_size": a_prompt}
        if reference is not None or not sampler_knows:
            options["packing"] = packing_of(rollout, window)[0]
        known = without_last(policy, unused) if sampler_knows else programs.teacher_force(lm, params, *ids, **options)
        ref = None if reference is None else programs.reference_logprobs(lm, reference, *ids, **options)
        return Sampled(*rollout, known, ref)

    def learn(
        state: State, rollout: Sampled, scores: Scores, kept: jax.typing.ArrayLike | None = None
    ) -> tuple[State, dict[str, Any]]:
        check_kept(state.learner, reference=reference, frozen=frozen)
        rows = len(rollout.tokens)
        scores = scores if isinstance(scores, jax.Array) else place(np.asarray(scores, np.float32), whole)
        check_scores(scores.shape, rows, max_new_tokens)
        if scores.ndim == 2:
            scores = without_last(scores, max_new_tokens + 1 - rollout.policy.values.shape[1])
        if kept is not None and not isinstance(kept, jax.Array):
            kept = place(np.asarray(kept, bool), whole)
        batch, kl_coef, metrics = prepare(
            Rollout(*rollout[:4]), rollout.policy, rollout.ref_logprobs, scores, state.kl_coef, kept
        )
        if sampler_knows:
            del metrics["val/sampler_gap"]  # nothing to compare
            if once:
                batch = batch._replace(old_logprobs=None)
        learner, taken, shuffle_key = state.learner, [], keys(state)[1]
        unsplit = whole_groups(None, rows // minibatches, group)  # whole groups in a minibatch, on any mesh
        window = rollout.policy.values.shape[1]
        for epoch in range(epochs):
            order = updates.minibatches(fold_in(shuffle_key, epoch), rows, minibatches, unsplit)
            plans = packing_of(rollout, window, numbers if pack_tokens is None else jax.device_get(order))
            for number, plan in zip(numbers, plans, strict=True):
                learner, of_update = take_update(
                    learner, batch, order, number, base, plan, group_size=rows_a_prompt(rows), left_out=kept is not None
                )
                taken.append(of_update)
            if max_approx_kl is not None and jax.device_get(of_update["policy/approxkl_avg"]) > max_approx_kl:
                break
        averaged = _averaged(taken) | {"train/healthy": of_update["train/healthy"]}  # once False, it stays so
        length = rollout.tokens.shape[1]
        padded = {
            "completions/padded_prompt": np.int32(length - window + 1),
            "completions/padded_length": np.int32(length),
        }
        metrics = {**metrics, **averaged, **padded, "train/updates": np.int32(len(taken))}
        return State(learner, kl_coef, _one_more(state.iterations), state.key), metrics

    def rows_a_prompt(rows: int) -> int:
        """Give the rows whose prompt is computed once, in each part."""
        check_rows(rows, minibatches, microbatches, group)
        if pack_tokens is not None:
            return whole_groups(None, rows // minibatches, group)
        check_batch(mesh, rows // parts, "each part of the batch")
        return whole_groups(mesh, rows // parts, group)

    def on_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            with entered(mesh):
                return function(*args, **options)

        return run if mesh is not None else function

    return Iteration(on_mesh(init), on_mesh(sample_), on_mesh(learn))


@jax.jit
def _one_more(count: jax.Array) -> jax.Array:
    return count + 1  # in a program: outside, the 1 would be transferred implicitly


@jax.jit
def _averaged(taken: list[Metrics]) -> Metrics:
    return jax.tree.map(lambda *x: jnp.mean(jnp.stack(x).astype(jnp.float32)), *taken)
