"""What a policy is worth on prompts that it never learned from, and how far it has moved from its reference."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pgjax.learning import programs
from pgjax.parallel.sharding import place, replicated, whole_groups
from pgjax.rollout.sample import Rollout
from pgjax.rollout.task import Task


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
        "eval/scores", "eval/kl" in nats a sequence, "eval/rewards/NAME" of each reward, all means; "eval/scores_stderr" and
        "eval/kl_stderr", clustered by prompt, where there are several prompts.
    """
    group = whole_groups(task.mesh, batch_size // parts, whole_groups(None, samples, task.group_size))
    logprobs = functools.partial(
        programs.reference_logprobs, task.lm, temperature=place(np.float32(task.temperature), replicated(task.mesh)),
        window=task.max_new_tokens + 1, parts=parts, group_size=group,
    )  # fmt: skip

    def kl(rollout: Rollout) -> jax.Array:
        own, ref = (logprobs(x, rollout.tokens, rollout.attention_mask) for x in (params, reference))
        return programs.sequence_kl(own, ref, rollout.mask)

    figures = task.evaluate(params, prompts, samples, batch_size, key, kl)
    return {f"eval/{name}": x for name, x in figures.items()}
