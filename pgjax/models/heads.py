"""The heads on the body's hidden states: the tokens' log-probabilities and entropies, and the value, a linear map."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from pgjax.core.linear_logprobs import linear_token_logprobs, linear_token_logprobs_and_entropy
from pgjax.core.logprobs import token_frame
from pgjax.core.masking import as_floats, where_mask
from pgjax.models.architecture import Architecture
from pgjax.models.transformer import along_last
from pgjax.parallel.sharding import ambient_mesh, fitting


def head_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    tokens: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    logit_cap: float | None = None,
    vocab_size: int | None = None,
) -> jax.Array:
    """Compute `linear_token_logprobs` over the ambient mesh, with rows and unembedding split as `parallel.sharding` says.

    Args:
        hidden: [B, T, D], the last hidden states.
        unembedding: [V, D].
        tokens: [B, T] ids.
        temperature: [] the sampler's.
        logit_cap, vocab_size: of the architecture (`logit_options`).

    Returns:
        [B, T] float32, nats, in the token frame.

    >>> import jax.numpy as jnp
    >>> head_logprobs(jnp.ones((1, 2, 2)), jnp.zeros((4, 2)), jnp.array([[0, 1]])).round(3).tolist()
    [[0.0, -1.3860000371932983]]
    """
    options: dict[str, Any] = {"temperature": temperature, "logit_cap": logit_cap, "vocab_size": vocab_size}
    return linear_token_logprobs(hidden, unembedding, tokens, **options, **_mesh_axes(hidden, unembedding))


def head_logprobs_and_entropy(
    hidden: jax.Array,
    unembedding: jax.Array,
    tokens: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    logit_cap: float | None = None,
    vocab_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute `linear_token_logprobs_and_entropy` over the ambient mesh, as `head_logprobs` does.

    Args:
        hidden: [B, T, D], the last hidden states.
        unembedding: [V, D].
        tokens: [B, T] ids.
        temperature: [] the sampler's.
        logit_cap, vocab_size: of the architecture (`logit_options`).

    Returns:
        (logprobs, entropy), each [B, T] float32, nats, in the token frame.

    >>> import jax.numpy as jnp
    >>> logprobs, entropy = head_logprobs_and_entropy(jnp.ones((1, 2, 2)), jnp.zeros((4, 2)), jnp.array([[0, 1]]))
    >>> entropy.round(3).tolist()
    [[0.0, 1.3860000371932983]]
    """
    options: dict[str, Any] = {"temperature": temperature, "logit_cap": logit_cap, "vocab_size": vocab_size}
    return linear_token_logprobs_and_entropy(hidden, unembedding, tokens, **options, **_mesh_axes(hidden, unembedding))


def logit_options(arch: Architecture) -> dict[str, Any]:
    """Name what an architecture does to its logits, as `head_logprobs` and `linear_token_logprobs` take it.

    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    >>> logit_options(architecture_of(config))
    {'logit_cap': None, 'vocab_size': None}
    """
    return {"logit_cap": arch.logit_cap, "vocab_size": arch.known_ids}


def _mesh_axes(hidden: jax.Array, unembedding: jax.Array) -> dict[str, Any]:
    """Return the mesh options of `linear_token_logprobs` for these shapes: none without an ambient mesh."""
    mesh = ambient_mesh()
    if mesh is None:
        return {}
    rows = fitting(mesh, hidden.shape[0], "batch")
    vocab, width = fitting(mesh, unembedding.shape[0], "vocab"), fitting(mesh, unembedding.shape[1], "width")
    split = vocab[0] if vocab else None, width[0] if width and width[0] in rows else None
    return {"mesh": mesh, "batch_axes": rows, "unembedding_axes": split}


def init_value_head(width: int) -> dict[str, jax.Array]:
    """Return the parameters of a value head whose values are 0 everywhere.

    The first advantages are then the returns themselves, and the body gets no gradient from the value loss until the
    head's kernel has moved away from 0.

    Args:
        width: D of the hidden states.

    Returns:
        {"kernel": [D], "bias": []} float32 zeros.

    >>> {name: x.shape for name, x in init_value_head(8).items()}
    {'kernel': (8,), 'bias': ()}
    """
    return {"kernel": jnp.zeros(width, jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def token_values(head: dict[str, jax.Array], hidden: jax.Array) -> jax.Array:
    """Estimate the return from each token on, before the token is seen.

    V_t = kernel . hidden[:, t - 1] + bias, from the state that predicts token t. V_0 = 0, as no state comes before it.

    Args:
        head: from `init_value_head`.
        hidden: [B, T, D], one state per position.

    Returns:
        [B, T] float32, in the token frame.

    >>> import jax.numpy as jnp
    >>> head = {"kernel": jnp.array([1.0]), "bias": jnp.array(0.5)}
    >>> token_values(head, jnp.array([[[1.0], [2.0], [3.0]]])).tolist()
    [[0.0, 1.5, 2.5]]
    """
    chex.assert_rank(hidden, 3)
    return token_frame(state_values(head, hidden))


def state_values(head: dict[str, jax.Array], hidden: jax.Array) -> jax.Array:
    """Estimate the return from the next token on: kernel . hidden + bias, at the position of the state.

    Args:
        head: from `init_value_head`.
        hidden: [..., D]; a state that is not finite gives NaN at its position, and no gradient.

    Returns:
        [...] float32.

    Raises:
        AssertionError: the head was made for another width.

    >>> state_values({"kernel": jnp.array([1.0]), "bias": jnp.array(0.5)}, jnp.array([[1.0], [2.0]])).tolist()
    [1.5, 2.5]
    """
    hidden, kernel, bias = as_floats(hidden, head["kernel"], head["bias"])
    chex.assert_shape(kernel, hidden.shape[-1:])
    finite = jnp.isfinite(hidden).all(-1)
    states = where_mask(jnp.broadcast_to(finite[..., None], hidden.shape), hidden)
    return jnp.where(finite, jnp.sum(states * along_last(kernel, states), axis=-1) + bias, jnp.nan)
