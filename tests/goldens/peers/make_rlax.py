"""Make rlax.json: what rlax computes on single trajectories.

python3.11 -m venv peers && peers/bin/pip install jax==0.10.2 rlax==0.1.9
peers/bin/python tests/goldens/peers/make_rlax.py
"""

from __future__ import annotations

from importlib.metadata import version

import jax
import jax.numpy as jnp
import rlax
import shared
from jax_inputs import POSITIONS, X, value_and_gradient

PLACES = shared.ROWS * shared.COMPLETION
LOGITS = X.logits[:, POSITIONS].reshape(PLACES, shared.VOCABULARY)
REF_LOGITS = X.ref_logits[:, POSITIONS].reshape(PLACES, shared.VOCABULARY)
TOKENS = X.tokens[:, shared.PROMPT :].reshape(PLACES)
ADVANTAGES, WEIGHTS = X.advantages.reshape(PLACES), X.mask.reshape(PLACES).astype(jnp.float64)
DISCOUNTS = jnp.full((shared.ROWS, shared.COMPLETION), shared.DISCOUNT)


def frame(x: jax.Array) -> jax.Array:
    """Put a value a place back into rows."""
    return x.reshape(shared.ROWS, shared.COMPLETION)


def advantages() -> jax.Array:
    """Estimate advantages with lambda 1; after the last token the value and the reward are 0."""
    values = jnp.pad(jnp.where(X.mask, X.values, 0), ((0, 0), (0, 1)))
    estimate = jax.vmap(rlax.truncated_generalized_advantage_estimation, in_axes=(0, 0, None, 0))
    return estimate(jnp.where(X.mask, X.rewards, 0), DISCOUNTS, 1.0, values)


def main() -> None:
    """Write every entry."""
    entry = shared.entry
    softmax = rlax.softmax(shared.TEMPERATURE)
    rewards, ratios = jnp.where(X.mask, X.rewards, 0), jnp.exp(X.logprobs - X.old_logprobs).reshape(PLACES)
    policy = value_and_gradient(lambda z: rlax.policy_gradient_loss(z, TOKENS, ADVANTAGES, WEIGHTS), LOGITS)
    clipped = value_and_gradient(lambda r: rlax.clipped_surrogate_pg_loss(r, ADVANTAGES, shared.CLIP), ratios)
    returns = jax.vmap(rlax.discounted_returns, in_axes=(0, 0, None))(rewards, DISCOUNTS, 0.0)
    squared = value_and_gradient(lambda v: rlax.l2_loss(v, X.returns).mean(), X.values)
    entries = {
        "token_logprobs": entry("rlax.softmax(temperature).logprob", frame(softmax.logprob(TOKENS, LOGITS))),
        "token_entropy": entry("rlax.softmax(temperature).entropy", frame(softmax.entropy(LOGITS))),
        "categorical_kl": entry(
            "rlax.categorical_kl_divergence", frame(rlax.categorical_kl_divergence(LOGITS, REF_LOGITS))
        ),
        "policy_gradient": entry("rlax.policy_gradient_loss, gradient to logits", *policy),
        "clipped": entry("rlax.clipped_surrogate_pg_loss, gradient to ratios", clipped[0], frame(clipped[1])),
        "entropy_loss": entry("rlax.entropy_loss", rlax.entropy_loss(LOGITS, WEIGHTS)),
        "returns": entry("rlax.discounted_returns", returns),
        "advantages": entry("rlax.truncated_generalized_advantage_estimation, lambda_=1", advantages()),
        "value_loss": entry("rlax.l2_loss, mean", *squared),
    }
    shared.write("rlax", version("rlax"), "make_rlax.py", entries)


if __name__ == "__main__":
    main()
