"""What a policy is worth on prompts that it never learned from, and how far it has moved from its reference."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.core.errors import NotFiniteError
from pgjax.learning import programs
from pgjax.parallel.sharding import place, replicated, whole_groups
from pgjax.rollout.sample import Rollout
from pgjax.rollout.task import Task
from pgjax.rollout.trim import columns_behind, without_last


def evaluate(
    task: Task, params: Any, reference: Any, prompts: Sequence[Any], *, samples: int, batch_size: int, key: jax.Array,
    parts: int = 1,
) -> dict[str, float]:  # fmt: skip
    """Score completions of held-out prompts, and estimate the KL to the reference on them.

    Args:
        task: samples and scores.
        params: of the policy's language model.
        reference: parameters of the reference.
        prompts: some of `task.prompt_sets`.
        samples: completions of each prompt.
        batch_size: completions sampled at once.
        key: of the samples.
        parts: of a batch in the teacher-forced passes, for memory.

    Returns:
        "eval/scores", "eval/kl" in nats a sequence, "eval/ended" of those that ended by themselves, "eval/rewards/NAME" of each
        reward, all means; NAME_stderr of each, clustered by prompt, where there are several prompts.
    """
    task = task.for_evaluation()
    group = whole_groups(task.mesh, batch_size // parts, whole_groups(None, samples, task.group_size))
    logprobs = functools.partial(
        programs.reference_logprobs, task.lm, temperature=place(np.float32(task.temperature), replicated(task.mesh)),
        parts=parts, group_size=group,
    )  # fmt: skip

    def kl(rollout: Rollout) -> jax.Array:
        unused = columns_behind(rollout.mask, task.max_new_tokens)
        rollout, window = without_last(rollout, unused), task.max_new_tokens + 1 - unused
        own, ref = (logprobs(x, rollout.tokens, rollout.attention_mask, window=window) for x in (params, reference))
        return programs.sequence_kl(own, ref, rollout.mask)

    figures = task.evaluate(params, prompts, samples, batch_size, key, kl)
    return {f"eval/{name}": x for name, x in figures.items()}


def check_start(figures: dict[str, float], source: Any, dtype: Any, done: int = 0) -> dict[str, float]:
    """Refuse a model whose log-probabilities are not finite before anything is learned from it.

    Args:
        figures: of `evaluate`, before the next update.
        source: of the model, for the message.
        dtype: of its activations, likewise.
        done: steps that it has made, likewise.

    Returns:
        The figures.

    Raises:
        NotFiniteError: the KL is not finite.

    Example:
        >>> check_start({"eval/kl": float("nan")}, "my-model", "float16")
        Traceback (most recent call last):
        pgjax.NotFiniteError: the log-probabilities of my-model are not finite before the first update: ...
    """
    if not math.isfinite(figures["eval/kl"]):
        when = "before the first update" if done == 0 else f"after {done} steps"
        raise NotFiniteError(
            f"the log-probabilities of {source} are not finite {when}: its weights hold NaN or "
            f"infinities, or overflow in {jnp.dtype(dtype).name}"
        )
    return figures
