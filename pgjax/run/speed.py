"""How fast a training step was: tokens a second, and the share of the devices' peaks that its parts reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from pgjax.parallel.sharding import whole_groups
from pgjax.run.flops import adapter_flops, decode_bytes, mbu, mfu, sequence_sizes, training_flops
from pgjax.run.peaks import Peaks, known_peaks

if TYPE_CHECKING:
    from pgjax.models.architecture import Architecture


def step_speed(
    arch: Architecture,
    peaks: Peaks | None,
    *,
    dtype: DTypeLike,
    batch_size: int,
    prompt_length: float,
    new_tokens: int,
    mean_length: float,
    max_length: float,
    rollout_seconds: float,
    score_seconds: float,
    update_seconds: float,
    epochs: float = 1.0,
    group_size: int = 1,
    adapters: bool = False,
    devices: int = 1,
    replicas: int = 1,
) -> dict[str, float]:
    """Work out tokens a second of a policy-gradient step, and what share of the devices' peaks learner and sampler reached.

        tokens_per_second = B * mean_length / (rollout + score + update seconds)
        mfu               = training_flops of epochs * B rows / (update seconds * devices * matmul_flops)
        decode_mbu        = decode_bytes of all steps / (rollout seconds * devices * read_bytes)

    The learner computes all N positions of a completion, whether sampled or not; the sampler takes `max_length` steps, prefill
    included, of which each replica reads every weight and its own rows of the cache, filled to P + mean_length / 2.

    Args:
        arch: the model's sizes.
        peaks: of one device, published (`known_peaks`) or measured; None leaves out the two shares.
        dtype: of the arithmetic, and of weights and cache while decoding.
        batch_size: B, completions a step.
        prompt_length: P, in tokens, as padded.
        new_tokens: N, that the longest completion takes, as padded.
        mean_length: of the completions, in tokens.
        max_length: of the completions, in tokens.
        rollout_seconds: that sampling took.
        score_seconds: that the reward and the reference took.
        update_seconds: that the gradient steps took.
        epochs: passes of learning over the batch; not whole where it was cut short.
        group_size: rows whose prompt the learner computes once.
        adapters: whether the learner trains low-rank adapters alone.
        devices: in all.
        replicas: parts of the devices that each read all weights while they decode.

    Returns:
        "perf/tokens_per_second", and with peaks "perf/mfu" and "perf/decode_mbu".

    Raises:
        UserError: with peaks, where a time or a peak is not above 0.

    Example:
        >>> from pgjax.models.io.config import architecture_of
        >>> from pgjax.run.speed import step_speed
        >>> config = {"model_type": "gpt2", "vocab_size": 10, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
        >>> step_speed(
        ...     architecture_of(config), None, dtype="float32", batch_size=8, prompt_length=4, new_tokens=4, mean_length=3.0,
        ...     max_length=4.0, rollout_seconds=1.0, score_seconds=0.5, update_seconds=1.5)
        {'perf/tokens_per_second': 8.0}
    """
    tokens_per_second = batch_size * mean_length / (rollout_seconds + score_seconds + update_seconds)
    if peaks is None:
        return {"perf/tokens_per_second": tokens_per_second}
    rows = epochs * batch_size
    sizes = sequence_sizes(rows, prompt_length=prompt_length, new_tokens=new_tokens, group_size=group_size)
    count = adapter_flops if adapters else training_flops
    flops = count(arch, **sizes, head_tokens=rows * (new_tokens + 1))
    itemsize = jnp.dtype(dtype).itemsize
    read = replicas * decode_bytes(
        arch, batch=batch_size / replicas, context=prompt_length + mean_length / 2, weight_bytes=itemsize, cache_bytes=itemsize
    )  # fmt: skip
    return {
        "perf/tokens_per_second": tokens_per_second,
        "perf/mfu": mfu(flops, update_seconds, devices * peaks.matmul_flops),
        "perf/decode_mbu": mbu(read * max_length, rollout_seconds, devices * peaks.read_bytes),
    }


def policy_speed(
    metrics: Mapping[str, float], *, arch: Architecture, dtype: DTypeLike, mesh: Mesh | None, batch_size: int,
    minibatches: int, parts: int = 1, group_size: int = 1, adapters: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Work out `step_speed` from the metrics of a step, on the published peaks of the device.

    Args:
        metrics: of the step, with its timings and lengths.
        arch: the model's sizes.
        dtype: of its activations.
        mesh: that it runs on; None: one device.
        batch_size: completions a step.
        minibatches: updates in an epoch.
        parts: that the batch is learned in.
        group_size: completions of each prompt; a part of whole groups computes their prompts once.
        adapters: whether low-rank adapters alone are trained.

    Returns:
        As `step_speed`.

    Example:
        >>> from pgjax.models.io.config import architecture_of
        >>> config = {"model_type": "gpt2", "vocab_size": 10, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
        >>> metrics = {f"timing/{name}": 0.5 for name in ("rollout", "score", "update")} | {"train/updates": 2}
        >>> metrics |= {f"completions/{name}": x for name, x in
        ...             {"padded_prompt": 4, "padded_length": 8, "mean_length": 3.0, "max_length": 4}.items()}
        >>> policy_speed(metrics, arch=architecture_of(config), dtype="float32", mesh=None, batch_size=8, minibatches=2)
        {'perf/tokens_per_second': 16.0}
    """
    devices, tensor = (1, 1) if mesh is None else (mesh.size, dict(mesh.shape).get("tensor", 1))
    return step_speed(
        arch, known_peaks(jax.local_devices()[0], dtype), dtype=dtype, batch_size=batch_size,
        prompt_length=metrics["completions/padded_prompt"],
        new_tokens=int(metrics["completions/padded_length"] - metrics["completions/padded_prompt"]),
        mean_length=metrics["completions/mean_length"], max_length=metrics["completions/max_length"],
        rollout_seconds=metrics["timing/rollout"], score_seconds=metrics["timing/score"],
        update_seconds=metrics["timing/update"], epochs=metrics["train/updates"] / minibatches,
        group_size=whole_groups(mesh, batch_size // parts, group_size),
        adapters=adapters, devices=devices, replicas=devices // tensor,
    )  # fmt: skip
