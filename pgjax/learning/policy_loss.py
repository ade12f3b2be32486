"""The loss of one minibatch: PPO's or REINFORCE's policy loss, the value loss, the entropy, and a KL."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pgjax.core.kl import kl_k3
from pgjax.core.logprobs import token_entropy
from pgjax.core.losses import clipped_surrogate_loss, policy_gradient_loss, surrogate_diagnostics, value_loss
from pgjax.core.masking import masked_mean, where_mask
from pgjax.learning.optimizer import Metrics
from pgjax.models.causal_lm import CausalLM, logits_of
from pgjax.models.heads import head_logprobs, token_values
from pgjax.parallel.sharding import constrain


class Batch(NamedTuple):
    """An iteration's experience. W = max_new_tokens + 1: the window from the last prompt token on, in the token frame."""

    tokens: jax.Array  # [B, T] int32
    attention_mask: jax.Array  # [B, T]
    mask: jax.Array  # [B, W] bool, True on sampled tokens; all that follow are [B, W] float32
    old_logprobs: jax.Array | None  # of the policy that sampled; None: the present one did, its ratio is 1
    old_values: jax.Array
    returns: jax.Array
    advantages: jax.Array
    ref_logprobs: jax.Array | None = None  # of the frozen reference; for a KL in the loss
    weights: jax.Array | None = None  # what each token counts in the policy's losses, of `token_weights`; None: 1


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


def ppo_loss(
    params: Any, batch: Batch, *, lm: CausalLM, temperature: float, clip_eps: float, value_clip_eps: float | None,
    value_coef: float, entropy_coef: float, algorithm: str = "ppo", clip_eps_high: float | None = None,
    dual_clip: float | None = None, kl_loss_coef: float = 0.0, group_size: int = 1,
) -> tuple[jax.Array, Metrics]:  # fmt: skip
    """Compute the loss: policy loss + value_coef * value loss - entropy_coef * entropy + kl_loss_coef * k3.

    The policy loss is PPO's clipped surrogate (Schulman et al. 2017) or REINFORCE's -A log pi (Williams 1992). It and k3 are
    means over sampled tokens weighted by `batch.weights`, the others plain means. k3 in the loss is GRPO's penalty (Shao et
    al. 2024); its gradient is that of the forward KL at the policy's prefixes, not of the KL that it estimates
    (`kl.kl_k3`). The exact one is `kl_coef` of `experience`.

    Args:
        params: {"lm", "value"}, differentiated.
        batch: of `experience`.
        lm: the model's functions.
        temperature: the sampler's.
        clip_eps: range of the ratio, for "ppo".
        value_clip_eps: range of the value around its old one, in reward units; None does not clip.
        value_coef: weight of the value loss; 0 leaves the critic alone.
        entropy_coef: weight of the entropy bonus; 0 does not compute it.
        algorithm: "ppo" or "reinforce".
        clip_eps_high: range of the ratio above 1; None: `clip_eps`.
        dual_clip: bound of the ratio where the advantage is below 0; None: no bound.
        kl_loss_coef: weight of k3 to the reference, in units of the advantage a nat; 0 does not compute it.
        group_size: completions a prompt, adjacent rows with the same prompt, which is computed once; 1 where rows have nothing
            in common.

    Returns:
        The loss [], and metrics, each a mean over the batch's sampled tokens.

    Raises:
        ValueError: an unknown algorithm, or `kl_loss_coef` without `batch.ref_logprobs`.

    >>> import pgjax as pg
    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 7, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
    >>> lm = pg.causal_lm(architecture_of(config))
    >>> params = {"lm": lm.init(jax.random.key(0)), "value": pg.init_value_head(4)}
    >>> x = jnp.zeros((2, 3))
    >>> batch = Batch(jnp.ones((2, 5), jnp.int32), jnp.ones((2, 5), bool), x == 0, x - 2.0, x, x + 1.0, x)
    >>> options = {"temperature": 1.0, "clip_eps": 0.2, "value_clip_eps": None, "value_coef": 0.5, "entropy_coef": 0.0}
    >>> loss, metrics = jax.jit(lambda params, batch: ppo_loss(params, batch, lm=lm, **options))(params, batch)
    >>> float(loss), float(metrics["loss/value_avg"])  # V = 0 where the return is 1
    (0.25, 0.5)
    """
    window = batch.mask.shape[1]
    group = {"prompt_length": batch.tokens.shape[1] - window + 1, "group_size": group_size}
    hidden = lm.hidden(params["lm"], batch.tokens, batch.attention_mask, **group)[:, -window:]
    unembedding, tokens = lm.unembedding(params["lm"]), batch.tokens[:, -window:]
    logprobs = head_logprobs(hidden, unembedding, tokens, temperature=temperature)
    old_logprobs = jax.lax.stop_gradient(logprobs) if batch.old_logprobs is None else batch.old_logprobs

    def weighted(x: jax.Array) -> jax.Array:
        return x if batch.weights is None else x * batch.weights

    if algorithm == "ppo":
        policy = clipped_surrogate_loss(
            logprobs, old_logprobs, weighted(batch.advantages), batch.mask,
            clip_eps=clip_eps, clip_eps_high=clip_eps_high, dual_clip=dual_clip,
        )  # fmt: skip
    elif algorithm == "reinforce":
        policy = policy_gradient_loss(logprobs, weighted(batch.advantages), batch.mask)
    else:
        raise ValueError(f"algorithm must be ppo or reinforce, got {algorithm!r}")
    low, high = (clip_eps, clip_eps_high) if algorithm == "ppo" else (math.inf, None)  # REINFORCE clips nothing
    metrics = {"loss/policy_avg": policy, **policy_metrics(logprobs, old_logprobs, batch.mask, low, high)}
    loss = policy
    if value_coef != 0:
        values = token_values(params["value"], hidden)
        old_values = None if value_clip_eps is None else batch.old_values
        value = value_loss(values, batch.returns, batch.mask, old_values=old_values, clip_eps=value_clip_eps)
        moved = jnp.abs(values - batch.old_values) > (math.inf if value_clip_eps is None else value_clip_eps)
        metrics |= {
            "loss/value_avg": value,
            "val/clipfrac_avg": masked_mean(moved.astype(jnp.float32), batch.mask),
        }
        loss = loss + value_coef * value
    if kl_loss_coef != 0:
        if batch.ref_logprobs is None:
            raise ValueError(f"kl_loss_coef={kl_loss_coef} needs the batch's ref_logprobs, which are None")
        penalty = masked_mean(weighted(kl_k3(logprobs, batch.ref_logprobs)), batch.mask)
        metrics["loss/kl_avg"] = penalty
        loss = loss + kl_loss_coef * penalty
    if entropy_coef != 0:
        logits = constrain(logits_of(hidden, unembedding), "batch", None, "vocab")
        entropy = token_entropy(logits, temperature=temperature)
        loss = loss - entropy_coef * masked_mean(entropy, batch.mask)
    return loss, metrics


def policy_metrics(
    logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array, clip_eps: float, clip_eps_high: float | None
) -> Metrics:
    """Say how far the policy has moved from the one that sampled the batch.

    Args:
        logprobs: [B, W] nats, of the present policy.
        old_logprobs: [B, W] of the one that sampled.
        mask: [B, W] True on sampled tokens.
        clip_eps: range of the ratio.
        clip_eps_high: its upper end; None: `clip_eps`.

    Returns:
        Means over sampled tokens.

    >>> x = jnp.zeros((1, 2))
    >>> float(policy_metrics(x, x, x == 0, 0.2, None)["val/ratio"])
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
