"""Make tunix.json: what Tunix computes, from its wheel's own files.

    python3.11 -m venv peers && peers/bin/pip install jax==0.10.2 "flax>=0.12" absl-py humanize fsspec huggingface_hub
    peers/bin/pip install --no-deps google-tunix==0.1.7
    peers/bin/python tests/goldens/peers/make_tunix.py

Its __init__ imports every trainer and what they need; it is not run here.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import version
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import shared
from flax import nnx
from jax_inputs import POSITIONS, X, value_and_gradient

_package = ModuleType("tunix")
_package.__path__ = list(importlib.util.find_spec("tunix").submodule_search_locations)
sys.modules["tunix"] = _package

from tunix.rl import algo_core, common  # noqa: E402

AGGREGATIONS = {
    "token_mean": "token-mean",
    "sequence_mean": "sequence-mean-token-mean",
    "sequence_sum": "seq-mean-token-sum",
    "sequence_scale": "sequence-mean-token-scale",
    "sequence_sum_norm": "sequence-mean-token-sum-norm",
}


class TwoTokens(nnx.Module):
    """A language model of two tokens that gives token 0 the stored log-probability, wherever a completion has a token."""

    def __init__(self, logprobs: jax.Array):
        self.x = nnx.Param(logprobs)

    def __call__(self, tokens: jax.Array, **_):
        logits = jnp.stack([self.x[...], jnp.log1p(-jnp.exp(self.x[...]))], -1)
        return jnp.pad(logits, ((0, 0), (shared.PROMPT - 1, 1), (0, 0))), None


class StoredValues(nnx.Module):
    """A critic with stored values before each token of the completion."""

    def __init__(self, values: jax.Array):
        self.x = nnx.Param(values)

    def __call__(self, tokens: jax.Array, **_):
        return jnp.pad(self.x[...], ((0, 0), (shared.PROMPT - 1, 1)))[..., None]


def example(mask: jax.Array = X.mask, advantages: jax.Array = X.advantages) -> common.TrainExample:
    """Give the batch that the losses read; every token is token 0."""
    prompts = jnp.zeros((shared.ROWS, shared.PROMPT), jnp.int32)
    completions = jnp.zeros((shared.ROWS, shared.COMPLETION), jnp.int32)
    return common.TrainExample(
        prompt_ids=prompts,
        prompt_mask=jnp.ones_like(prompts),
        completion_ids=completions,
        completion_mask=mask.astype(jnp.int32),
        advantages=advantages,
        ref_per_token_logps=X.ref_logprobs,
        old_per_token_logps=X.old_logprobs,
    )


def differentiate(loss, model: nnx.Module):
    """Call a loss of (model) -> (loss, metrics), and differentiate it with respect to what the model stores."""
    (value, metrics), gradient = nnx.value_and_grad(loss, has_aux=True)(model)
    return (value, jnp.asarray(gradient["x"][...])), metrics


def ppo_loss(dual_clip: float | None = None):
    """Run PPO's policy loss."""
    config = SimpleNamespace(
        epsilon_low=shared.CLIP, epsilon_high=shared.CLIP_HIGH, entropy_coef=None, epsilon_c=dual_clip, kl_coef=0.0
    )
    return differentiate(
        lambda model: algo_core.ppo_policy_loss_fn(model, example(), config, -1, -1), TwoTokens(X.logprobs)
    )


def grpo_loss(aggregation: str, beta: float = 0.0, mask: jax.Array = X.mask):
    """Run GRPO's policy loss, one advantage a sequence."""
    config = SimpleNamespace(
        beta=beta,
        epsilon=shared.CLIP,
        epsilon_high=shared.CLIP_HIGH,
        epsilon_c=None,
        loss_algo="grpo",
        loss_agg_mode=aggregation,
        temperature=1.0,
        kl_loss_mode="low_var_kl",
        kl_clamp_value=None,
    )
    given = example(mask, X.scores)
    return differentiate(lambda model: algo_core.grpo_loss_fn(model, given, config, -1, -1), TwoTokens(X.logprobs))[0]


def value_loss():
    """Run PPO's value loss."""
    given = SimpleNamespace(
        **{name: getattr(example(), name) for name in ("prompt_ids", "completion_ids", "completion_mask")},
        old_values=X.old_values,
        returns=X.returns,
        segment_ids=None,
        segment_positions=None,
    )
    return differentiate(
        lambda model: algo_core.ppo_value_loss_fn(model, given, shared.VALUE_CLIP, -1, -1), StoredValues(X.values)
    )[0]


def estimated_kl(method: str):
    """Estimate the KL, and differentiate its sum over tokens."""
    estimate = lambda x: common.compute_kl_divergence(x, X.ref_logprobs, method)
    return estimate(X.logprobs), value_and_gradient(lambda x: estimate(x).sum(), X.logprobs)[1]


def losses() -> dict[str, dict]:
    """Give the entries of the losses."""
    entry = shared.entry
    (ppo, metrics), (dual, _) = ppo_loss(), ppo_loss(shared.DUAL_CLIP)
    by_sequence = "sequence-mean-token-mean"
    return {
        "ppo": entry("algo_core.ppo_policy_loss_fn", *ppo),
        "ppo_dual_clip": entry("algo_core.ppo_policy_loss_fn, epsilon_c", *dual),
        "ppo_clip_fraction": entry("algo_core.ppo_policy_loss_fn: pg_clipfrac", metrics["pg_clipfrac"]),
        "value_loss": entry("algo_core.ppo_value_loss_fn", *value_loss()),
        **{
            f"grpo_{name}": entry(f"algo_core.grpo_loss_fn, {kind}", *grpo_loss(kind))
            for name, kind in AGGREGATIONS.items()
        },
        "grpo_sequence_mean_empty_row": entry(
            f"algo_core.grpo_loss_fn, {by_sequence}", *grpo_loss(by_sequence, mask=X.mask_empty_row)
        ),
        "grpo_with_k3": entry("algo_core.grpo_loss_fn, token-mean, beta", *grpo_loss("token-mean", shared.KL_COEF)),
    }


def tokens() -> dict[str, dict]:
    """Give the entries of what a token has: log-probability, entropy, KL; and the reductions."""
    entry, mask = shared.entry, X.mask.astype(jnp.int32)
    logits, ids = X.logits[:, POSITIONS], X.tokens[:, shared.PROMPT :]
    kinds = {"kl_k1": "kl", "kl_k2": "mse_kl", "kl_k3": "low_var_kl"}
    return {
        "token_logprobs": entry("common.selective_log_softmax", common.selective_log_softmax(logits, ids)),
        "token_entropy": entry("algo_core.compute_entropy_from_logits", algo_core.compute_entropy_from_logits(logits)),
        "masked_mean": entry("algo_core.masked_mean", algo_core.masked_mean(X.rewards, mask)),
        "masked_whiten": entry("algo_core.masked_whiten", algo_core.masked_whiten(X.rewards, mask)),
        **{name: entry(f"common.compute_kl_divergence, {kind}", *estimated_kl(kind)) for name, kind in kinds.items()},
    }


def advantages() -> dict[str, dict]:
    """Give the entries of returns, advantages and baselines."""
    entry = shared.entry
    whole, holes = (
        algo_core.compute_gae_advantages(X.rewards, X.values, mask.astype(jnp.int32), shared.DISCOUNT, 1.0)
        for mask in (X.mask, X.mask_holes)
    )
    gae = "algo_core.compute_gae_advantages, gae_lambda=1"
    groups = {
        "group_normalized": algo_core.compute_advantages,
        "group_centred": algo_core.compute_drgrpo_advantages,
        "leave_one_out": algo_core.compute_rloo_advantages,
    }
    return {
        "gae_returns": entry(f"{gae}: returns", whole[1]),
        "gae_advantages": entry(f"{gae}: advantages", whole[0]),
        "gae_returns_holes": entry(f"{gae}: returns", holes[1]),
        **{
            name: entry(f"algo_core.{function.__name__}", function(X.scores, shared.GROUP))
            for name, function in groups.items()
        },
    }


if __name__ == "__main__":
    entries = {**tokens(), **losses(), **advantages()}
    shared.write("google-tunix", version("google-tunix"), "make_tunix.py", entries, name="tunix")
