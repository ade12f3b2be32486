"""Policy gradients for language models in JAX and Flax.

`import pgjax as pg`: the pure core (masking, log-probabilities, advantages, KL, losses, the trust region), the causal LM
behind a bundle of pure functions, and the sampler. The rooms around it, which README.md lists,
are imported by name: `pgjax.data`, `pgjax.rollout.rewards`, `pgjax.learning.optimizer`, `pgjax.run.loop`, ...
"""

from pgjax.core.advantages import (
    group_advantages,
    kl_shaped_rewards,
    leave_one_out_baseline,
    monte_carlo_advantages,
    monte_carlo_returns,
    place_scores,
    truncated_importance_weights,
)
from pgjax.core.errors import MissingPackageError, NotFiniteError, UserError
from pgjax.core.kl import adaptive_kl_coef, categorical_kl, kl_k1, kl_k2, kl_k3
from pgjax.core.linear_logprobs import linear_token_logprobs, linear_token_logprobs_and_entropy
from pgjax.core.logprobs import token_entropy, token_frame, token_logprobs
from pgjax.core.losses import (
    clipped_surrogate_loss,
    cross_entropy_loss,
    policy_gradient_loss,
    preference_loss,
    surrogate_diagnostics,
    value_loss,
)
from pgjax.core.masking import masked_mean, masked_whiten
from pgjax.core.trust_region import fisher_vector_product, trust_region_step
from pgjax.learning.algorithms import Algorithm, Batch, Experience, dr_grpo, grpo, ppo, reinforce, rloo
from pgjax.learning.iteration import Iteration, Sampled, State, iteration
from pgjax.learning.optimizer import adamw
from pgjax.models.architecture import Architecture, Rope
from pgjax.models.causal_lm import CausalLM, causal_lm
from pgjax.models.heads import init_value_head, token_values
from pgjax.models.io.classifier import load_reward_model, save_reward_model
from pgjax.models.io.load import load, save_pretrained
from pgjax.models.lora import init_lora, merge_lora, with_lora
from pgjax.models.reward_model import RewardModel, reward_model
from pgjax.rollout.sample import Rollout, Scored, sample, sample_scored

__all__ = [
    "Algorithm",
    "Architecture",
    "Batch",
    "CausalLM",
    "Experience",
    "Iteration",
    "MissingPackageError",
    "NotFiniteError",
    "RewardModel",
    "Rollout",
    "Rope",
    "Sampled",
    "Scored",
    "State",
    "UserError",
    "adamw",
    "adaptive_kl_coef",
    "categorical_kl",
    "causal_lm",
    "clipped_surrogate_loss",
    "cross_entropy_loss",
    "dr_grpo",
    "fisher_vector_product",
    "group_advantages",
    "grpo",
    "init_lora",
    "init_value_head",
    "iteration",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_shaped_rewards",
    "leave_one_out_baseline",
    "linear_token_logprobs",
    "linear_token_logprobs_and_entropy",
    "load",
    "load_reward_model",
    "masked_mean",
    "masked_whiten",
    "merge_lora",
    "monte_carlo_advantages",
    "monte_carlo_returns",
    "place_scores",
    "policy_gradient_loss",
    "ppo",
    "preference_loss",
    "reinforce",
    "reward_model",
    "rloo",
    "sample",
    "sample_scored",
    "save_pretrained",
    "save_reward_model",
    "surrogate_diagnostics",
    "token_entropy",
    "token_frame",
    "token_logprobs",
    "token_values",
    "truncated_importance_weights",
    "trust_region_step",
    "value_loss",
    "with_lora",
]
