"""One draw of the sampler: from hidden states to the next tokens, and which of them end their completions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pgjax.models.heads import state_values
from pgjax.models.transformer import columns_dot
from pgjax.parallel.sharding import constrain, constrain_batch
from pgjax.rollout.filters import draw, kept_logits

Drawn = tuple[
    jax.Array, jax.Array, tuple[jax.Array, ...]
]  # token, log-probability; value and entropy with a value head


def draw_tokens(
    unembedding: jax.Array, hidden: jax.Array, row_keys: jax.Array, positions: jax.Array, options: dict[str, Any],
    value_head: Any,
) -> Drawn:  # fmt: skip
    """Draw each row's next token.

    Args:
        unembedding: [V, D].
        hidden: [B, D], of the last token read.
        row_keys: [B] typed keys.
        positions: [B] int32, of the tokens to draw.
        options: temperature, top_k, top_p and min_p, as of `filters.kept_logits`.
        value_head: of a critic; None: neither values nor entropies are computed.

    Returns:
        [B] each: the token, its log-probability, and with a value head the value and the entropy.

    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> token, *_ = draw_tokens(jnp.eye(3), jnp.eye(3)[1:2], keys, jnp.zeros(1, jnp.int32), {"temperature": 0.0}, None)
    >>> token.tolist()
    [1]
    """
    # Every device draws for rows of its own, tensor's too, and needs their logits whole: these change hands here.
    logits = constrain(constrain(columns_dot(unembedding, hidden), "batch", "vocab"), "row")
    kept = kept_logits(logits, **options)
    token, logprob = draw(kept, row_keys, constrain(positions, "batch"))
    if value_head is None:
        return constrain_batch((token, logprob, ()))
    logprobs = jax.nn.log_softmax(kept)
    entropy = -jnp.sum(jnp.exp(logprobs) * jnp.maximum(logprobs, jnp.finfo(jnp.float32).min), axis=1)
    return constrain_batch((token, logprob, (state_values(value_head, hidden), entropy)))


def ends(
    token: jax.Array, state: jax.Array | None, eos: jax.Array, stop_table: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Say which tokens end their completions, and give the states of the stop strings after them.

    Args:
        token: of any shape.
        state: of the same shape, before the tokens; None without stop strings.
        eos: [E] int32, ids that end a completion.
        stop_table: of `data.stop_strings.stop_table`, or None.

    Returns:
        Booleans and states, of that shape.

    >>> ends(jnp.array([4, 5]), None, jnp.array([5]), None)[0].tolist()
    [False, True]
    """
    over = jnp.isin(token, eos)
    if state is None or stop_table is None:
        return over, None
    state = stop_table[state, token]
    return over | (state < 0), state
