"""Rotary position embeddings: the angles, with the scalings for long contexts, and the rotation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pgjax.models.architecture import Rope

Table = tuple[jax.Array, jax.Array]  # cosine and sine of every angle


def rope_frequencies(rope: Rope, head_dim: int, length: int | None = None) -> jax.Array:
    """Return the rotation angle per position of every pair that is rotated, [dims / 2] in radians.

    With f = theta^(-2i / dims), s = `factor` and L = `original_max_positions`:

        linear:    f / s
        dynamic:   f up to L positions; there is none beyond, because the angles of earlier tokens would depend on later ones
        llama3:    keep f + (1 - keep) f / s, where keep rises from 0 to 1 as the turns L f / 2 pi of a pair rise from
                   `low_freq_factor` to `high_freq_factor` (Llama 3.1, 2024)
        yarn:      the same, but keep rises evenly with i between the pairs that have those turns (Peng et al. 2023)
        longrope:  f over one factor a pair, `short_factors` in arrays of up to L positions, else `long_factors`, for every row
                   of the array, however short (Ding et al. 2024)

    Args:
        rope: the embedding.
        head_dim: of a head.
        length: of the whole array of positions, prompt and what is decoded; longrope reads it. None: at most L.

    >>> from pgjax.models.architecture import Rope
    >>> rope_frequencies(Rope(theta=100.0), 4).tolist()
    [1.0, 0.10000000149011612]
    """
    dims = head_dim if rope.dims is None else rope.dims
    frequencies = rope.theta ** (-jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)
    if rope.scaling == "longrope":
        assert rope.original_max_positions is not None
        long = length is not None and length > rope.original_max_positions
        return frequencies / jnp.asarray(rope.long_factors if long else rope.short_factors, jnp.float32)
    if rope.factor is None or rope.scaling == "dynamic":
        return frequencies
    if rope.scaling == "linear":
        return frequencies / rope.factor
    assert rope.low_freq_factor is not None and rope.high_freq_factor is not None
    assert rope.original_max_positions is not None
    if rope.scaling == "yarn":
        keep = 1 - _ramp(rope, dims)
    else:
        turns = rope.original_max_positions * frequencies / (2 * math.pi)  # over the original context
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = jnp.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor


def _ramp(rope: Rope, dims: int) -> jax.Array:
    """Rise from 0 at the pair that turns `high_freq_factor` times over the original context to 1 at `low_freq_factor`."""

    def pair(turns: float) -> float:
        return dims * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))  # type: ignore[operator]

    low, high = pair(rope.high_freq_factor), pair(rope.low_freq_factor)  # type: ignore[arg-type]
    if rope.whole_pairs:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    return jnp.clip((jnp.arange(dims // 2, dtype=jnp.float32) - low) / (high - low or 0.001), 0.0, 1.0)


def rotary_table(rope: Rope, head_dim: int, positions: jax.Array, length: int | None = None) -> Table:
    """Return cosine and sine, each [B, 1, T, dims / 2] float32, for positions [B, T].

    >>> import jax.numpy as jnp
    >>> from pgjax.models.architecture import Rope
    >>> [x.shape for x in rotary_table(Rope(theta=100.0), 4, jnp.zeros((2, 3), jnp.int32))]
    [(2, 1, 3, 2), (2, 1, 3, 2)]
    """
    frequencies = rope_frequencies(rope, head_dim, length)
    angles = positions.astype(jnp.float32)[:, None, :, None] * frequencies[None, None, None, :]
    if rope.scaling == "dynamic":  # NaN rather than a wrong number
        assert rope.original_max_positions is not None
        angles = jnp.where(positions[:, None, :, None] < rope.original_max_positions, angles, jnp.nan)
    if rope.table_scale == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * rope.table_scale, jnp.sin(angles) * rope.table_scale


def rotate(x: jax.Array, table: Table, interleaved: bool = False) -> jax.Array:
    """Rotate the first dims of every head by the table's angles.

    Args:
        x: [B, H, T, head_dim].
        table: of [B, 1, T, dims / 2]; the rest of a head is left as it is.
        interleaved: pair neighbours; otherwise the two halves of the rotated dims (the rotate-half convention of Hugging Face).

    >>> import jax.numpy as jnp
    >>> quarter_turn = jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1))
    >>> rotate(jnp.array([[[[1.0, 0.0]]]]), quarter_turn).tolist()
    [[[[0.0, 1.0]]]]
    """
    cosine, sine = table
    dims = 2 * cosine.shape[-1]
    if dims < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :dims], table, interleaved), x[..., dims:]], axis=-1)
    if interleaved:
        one, other = (x.astype(jnp.float32)[..., i::2] for i in (0, 1))
        pairs = jnp.stack([one * cosine - other * sine, other * cosine + one * sine], axis=-1)
        return pairs.reshape(x.shape).astype(x.dtype)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)
