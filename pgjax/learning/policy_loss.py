"""The loss of one minibatch: the algorithm's policy loss, the value loss, the entropy, and a KL to the reference."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pgjax.core.kl import kl_k3
from pgjax.core.losses import surrogate_diagnostics, value_loss
from pgjax.core.masking import masked_mean, where_mask
from pgjax.learning.algorithm import Algorithm, Batch
from pgjax.learning.optimizer import Metrics
from pgjax.models.causal_lm import CausalLM
from pgjax.models.heads import head_logprobs, head_logprobs_and_entropy, logit_options, token_values
from pgjax.rollout.packed_rows import PackedRows, read_packed


def token_weights(mask: jax.Array, reduce: str) -> jax.Array | None:
    """Weigh tokens so that a mean over tokens becomes another reduction.

    With N sampled tokens in B sequences, n_i in the i-th: N / (B n_i) makes it "sequence_mean", N / B "sequence_sum".
    Worked out over a whole minibatch, the weights keep its microbatches exact, which then all average over tokens.

    Args:
        mask: [B, W] boolean, of a whole minibatch.
        reduce: "token_mean", "sequence_mean" or "sequence_sum", as in `losses.policy_gradient_loss`.

    Returns:
        [B, W] float32, 0 outside the mask; None for "token_mean".

    Raises:
        ValueError: `reduce` is none of the three.

    >>> token_weights(jnp.array([[True, True, True], [True, False, False]]), "sequence_mean").tolist()
    [[0.6666666865348816, 0.6666666865348816, 0.6666666865348816], [2.0, 0.0, 0.0]]
    """
    if reduce == "token_mean":
        return None
    if reduce not in ("sequence_mean", "sequence_sum"):
        raise ValueError(f"reduce must be token_mean, sequence_mean or sequence_sum, got {reduce!r}")
    lengths = mask.sum(1, keepdims=True).astype(jnp.float32)
    per_row = lengths.sum() / jnp.maximum((lengths > 0).sum(), 1).astype(jnp.float32)
    share = per_row / jnp.maximum(lengths, 1.0) if reduce == "sequence_mean" else per_row
    return where_mask(mask, jnp.broadcast_to(share, mask.shape))


def policy_loss(
    params: Any, batch: Batch, *, lm: CausalLM, algorithm: Algorithm, temperature: float, group_size: int = 1,
    packing: PackedRows | None = None,
) -> tuple[jax.Array, Metrics]:  # fmt: skip
    """Compute the loss of an algorithm: policy + value_coef * value - entropy_coef * entropy + kl_loss_coef * k3.

    The policy's loss is `algorithm.token_loss`. It, the entropy and k3 are means over sampled tokens weighed by
    `batch.weights`; the value's is a plain mean. k3 in the loss is GRPO's penalty (Shao et al. 2024); its gradient is that of
    the forward KL at the policy's prefixes, not of the KL that it estimates (`pg.kl_k3`). The exact one is `kl_coef`, in the
    reward.

    Args:
        params: {"lm", "value"}, differentiated.
        batch: of `programs.experience`, with its weights.
        lm: the model's functions.
        algorithm: what is computed, and its coefficients.
        temperature: the sampler's.
        group_size: completions a prompt, adjacent rows with the same prompt, which is computed once; 1 where rows have nothing
            in common.
        packing: of `packed_rows.step_of`: the model runs over these packed rows, in which the tokens of `batch.mask` stand; None:
            over the batch's own.

    Returns:
        The loss [], and metrics, each a mean over the batch's sampled tokens.

    Raises:
        ValueError: `kl_loss_coef` without `batch.ref_logprobs`.

    >>> import pgjax as pg
    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 7, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
    >>> lm = pg.causal_lm(architecture_of(config))
    >>> params = {"lm": lm.init(jax.random.key(0)), "value": pg.init_value_head(4)}
    >>> x = jnp.zeros((2, 3))
    >>> batch = Batch(jnp.ones((2, 5), jnp.int32), jnp.ones((2, 5), bool), x == 0, x - 2.0, x, x + 1.0, x)
    >>> loss, metrics = policy_loss(params, batch, lm=lm, algorithm=pg.ppo(), temperature=1.0)
    >>> float(loss), float(metrics["loss/value_avg"])  # V = 0 where the return is 1
    (0.25, 0.5)
    """
    window, options = batch.mask.shape[1], {"temperature": temperature, **logit_options(lm.arch)}

    def read(hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array) -> tuple[jax.Array, Any, Any]:
        values = token_values(params["value"], hidden) if algorithm.value_coef != 0 else None
        if algorithm.entropy_coef != 0:
            return *head_logprobs_and_entropy(hidden, unembedding, tokens, **options), values
        return head_logprobs(hidden, unembedding, tokens, **options), None, values

    ids = batch.tokens, batch.attention_mask
    unembedding = lm.unembedding(params["lm"])
    if packing is None:
        group = {"prompt_length": batch.tokens.shape[1] - window + 1, "group_size": group_size}
        hidden = lm.hidden(params["lm"], *ids, **group)[:, -window:]
        logprobs, entropy, values = read(hidden, unembedding, batch.tokens[:, -window:])
    else:
        found = read_packed(read, lm, params["lm"], unembedding, *ids, packing, window=window, group_size=group_size)
        logprobs, entropy, values = found
    old_logprobs = jax.lax.stop_gradient(logprobs) if batch.old_logprobs is None else batch.old_logprobs
    batch = batch._replace(old_logprobs=old_logprobs)

    def mean(x: jax.Array) -> jax.Array:
        return masked_mean(x if batch.weights is None else x * batch.weights, batch.mask)

    loss = mean(algorithm.token_loss(logprobs, batch))
    metrics = {"loss/policy_avg": loss, **policy_metrics(logprobs, old_logprobs, batch.mask, *algorithm.clip_range)}
    if algorithm.value_coef != 0:
        eps = algorithm.value_clip_eps
        old_values = None if eps is None else batch.old_values
        value = value_loss(values, batch.returns, batch.mask, old_values=old_values, clip_eps=eps)
        moved = jnp.abs(values - batch.old_values) > (math.inf if eps is None else eps)
        metrics |= {
            "loss/value_avg": value,
            "val/clipfrac_avg": masked_mean(moved.astype(jnp.float32), batch.mask),
        }
        loss = loss + algorithm.value_coef * value
    if algorithm.kl_loss_coef != 0:
        if batch.ref_logprobs is None:
            raise ValueError(f"kl_loss_coef={algorithm.kl_loss_coef} needs the reference's log-probabilities")
        penalty = mean(kl_k3(logprobs, batch.ref_logprobs))
        metrics["loss/kl_avg"] = penalty
        loss = loss + algorithm.kl_loss_coef * penalty
    if entropy is not None:
        metrics["loss/entropy_avg"] = mean(entropy)
        loss = loss - algorithm.entropy_coef * metrics["loss/entropy_avg"]
    return loss, metrics


def policy_metrics(
    logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array, clip_eps: float, clip_eps_high: float
) -> Metrics:
    """Measure how far the policy has moved from the one that sampled the batch.

    Args:
        logprobs: [B, W] nats, of the present policy.
        old_logprobs: [B, W] of the one that sampled.
        mask: [B, W] True on sampled tokens.
        clip_eps: range of the ratio.
        clip_eps_high: its upper end.

    Returns:
        Means over sampled tokens.

    >>> x = jnp.zeros((1, 2))
    >>> float(policy_metrics(x, x, x == 0, 0.2, 0.2)["val/ratio"])
    1.0
    """
    moved = surrogate_diagnostics(logprobs, old_logprobs, mask, clip_eps=clip_eps, clip_eps_high=clip_eps_high)
    ratio = jnp.exp(jnp.where(mask, logprobs - old_logprobs, 0.0))
    return {
        "policy/approxkl_avg": moved["approx_kl"],
        "policy/clipfrac_avg": moved["clip_fraction"],
        "val/ratio": moved["ratio_mean"],
        "val/ratio_var": masked_mean(jnp.square(ratio - 1), mask),  # around 1
    }
