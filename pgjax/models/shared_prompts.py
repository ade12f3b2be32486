"""Groups of rows that continue one prompt: the prompt is computed once, and all rows of the group attend to it.

Completions of one prompt (RLOO, GRPO) have their first P entries in common, and so the keys, values and hidden states there.
Packed, a group of G rows of P + N tokens is one row of P + G N tokens. Everything that a layer computes token by token runs
on the packed row as it is; attention splits it into the prompt and the completions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pgjax.core.checks import check_whole
from pgjax.models.attention import attention


def firsts(x: jax.Array, group_size: int) -> jax.Array:
    """Take the first row of each group: x [B, ...] to [B / G, ...].

    >>> firsts(jnp.arange(6), 3).tolist()
    [0, 3]
    """
    # By a reshape: a strided slice would send rows from device to device.
    return x.reshape(-1, group_size, *x.shape[1:])[:, 0]


def repeated(x: jax.Array, group_size: int) -> jax.Array:
    """Repeat each group's entry for all of its rows: x [B / G, ...] to [B, ...].

    >>> repeated(jnp.arange(2), 3).tolist()
    [0, 0, 0, 1, 1, 1]
    """
    wide = jnp.broadcast_to(x[:, None], (len(x), group_size, *x.shape[1:]))
    return wide.reshape(-1, *x.shape[1:])


def packed(x: jax.Array, prompt_length: int, group_size: int) -> jax.Array:
    """Join the prompt and all completions of each group into one row: x [B, P + N, ...] to [B / G, P + G N, ...].

    >>> packed(jnp.array([[7, 1, 2], [7, 3, 4]]), prompt_length=1, group_size=2).tolist()
    [[7, 1, 2, 3, 4]]
    """
    prompts, own = firsts(x[:, :prompt_length], group_size), x[:, prompt_length:]
    return jnp.concatenate([prompts, own.reshape(len(prompts), -1, *x.shape[2:])], axis=1)


def unpacked(x: jax.Array, prompt_length: int, group_size: int) -> jax.Array:
    """Undo `packed`: x [B / G, P + G N, ...] to [B, P + N, ...].

    >>> unpacked(jnp.array([[7, 1, 2, 3, 4]]), prompt_length=1, group_size=2).tolist()
    [[7, 1, 2], [7, 3, 4]]
    """
    prompts, own = repeated(x[:, :prompt_length], group_size), x[:, prompt_length:]
    return jnp.concatenate([prompts, own.reshape(len(prompts), -1, *x.shape[2:])], axis=1)


def group_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    attend: Callable[..., jax.Array] = attention,
    *,
    prompt_length: int,
    group_size: int,
) -> jax.Array:
    """Attend within packed rows: the prompt to itself, each completion to the prompt and to itself.

    Args:
        query: [B / G, H, P + G N, hd].
        key, value: [B / G, Hkv, P + G N, hd].
        mask: [B, P + N, P + N] of the unpacked rows, True where a query (second axis) attends to a key (third axis).
        attend: (query, key, value, mask) -> output, as `attention`.
        prompt_length: P.
        group_size: G.

    Returns:
        [B / G, H, P + G N, hd]: `attention` of the unpacked rows, packed.

    >>> x = jnp.ones((1, 2, 5, 4))
    >>> mask = jnp.tril(jnp.ones((2, 3, 3), bool))
    >>> group_attention(x, x, x, mask, prompt_length=1, group_size=2).shape
    (1, 2, 5, 4)
    """

    (query, own_query), (key, own_key), (value, own_value) = (
        _parts(x, prompt_length, group_size) for x in (query, key, value)
    )
    once = firsts(mask, group_size)[:, :prompt_length, :prompt_length]
    prompts = attend(query, key, value, once)
    keys, values = (
        jnp.concatenate([repeated(prompt, group_size), own], axis=2)
        for prompt, own in ((key, own_key), (value, own_value))
    )
    own = attend(own_query, keys, values, mask[:, prompt_length:])
    own = own.reshape(-1, group_size, *own.shape[1:]).swapaxes(1, 2)
    return jnp.concatenate([prompts, own.reshape(*prompts.shape[:2], -1, prompts.shape[3])], axis=2)


def _parts(x: jax.Array, prompt_length: int, group_size: int) -> tuple[jax.Array, jax.Array]:
    """Split x [B / G, H, P + G N, hd] into prompts [B / G, H, P, hd] and completions [B, H, N, hd]."""
    prompts, own = x[:, :, :prompt_length], x[:, :, prompt_length:]
    groups, heads, length, head_dim = own.shape
    own = own.reshape(groups, heads, group_size, -1, head_dim).swapaxes(1, 2)
    return prompts, own.reshape(groups * group_size, heads, length // group_size, head_dim)


def same_prompts(tokens: jax.Array, attention_mask: jax.Array, prompt_length: int, group_size: int) -> jax.Array:
    """Return for each row whether its prompt equals that of its group's first row: [B] bool.

    >>> tokens = jnp.array([[7, 1], [7, 2], [7, 3], [8, 4]])
    >>> same_prompts(tokens, tokens > 0, prompt_length=1, group_size=2).tolist()
    [True, True, True, False]
    """
    shown = jnp.where(attention_mask, tokens, -1)[:, :prompt_length]
    return (shown == repeated(firsts(shown, group_size), group_size)).all(1)


def check_groups(shape: Any, prompt_length: int, group_size: int) -> None:
    """Refuse a group size that does not divide the rows of a shape [B, T], or a prompt longer than a row.

    Raises:
        ValueError: with the numbers.

    >>> check_groups((4, 8), 8, 3)
    Traceback (most recent call last):
    ValueError: 4 rows do not divide into groups of group_size=3
    """
    rows, length = shape
    check_whole("group_size", group_size, 1)
    if rows % group_size:
        raise ValueError(f"{rows} rows do not divide into groups of group_size={group_size}")
    if not 0 <= prompt_length <= length:
        raise ValueError(f"prompt_length must be from 0 to the {length} tokens of a row, got {prompt_length}")
