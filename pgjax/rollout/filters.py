"""From logits to one token a row: temperature, top-k, top-p and min-p as numbers that recompile nothing."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp


def filter_logits(
    logits: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    top_k: jax.typing.ArrayLike | None = None,
    top_p: jax.typing.ArrayLike | None = None,
    min_p: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Return the log-probabilities of the distribution that is sampled from, -inf where a token is filtered out.

    In the order of Hugging Face: z = logits / temperature; keep the top_k largest; of these the fewest whose
    probabilities reach top_p (Holtzman et al. 2020); of these the ones at least min_p times as likely as the likeliest
    (Nguyen et al. 2024); then normalise. Tokens that tie with the last one kept are kept. Temperature 0 leaves the
    likeliest token, with log-probability 0.

    Args:
        logits: [B, V].
        temperature: [] not below 0.
        top_k: [] at least 1; None keeps all.
        top_p: [] in (0, 1]; None keeps all.
        min_p: [] in [0, 1]; None keeps all.

    Returns:
        [B, V] float32 log-probabilities.

    >>> import jax.numpy as jnp
    >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    >>> [f"{p:.3f}" for p in jnp.exp(filter_logits(logits, top_p=0.7))[0]]
    ['0.625', '0.375', '0.000']
    >>> filter_logits(logits, temperature=0.0).tolist()
    [[0.0, -inf, -inf]]
    """
    kept = kept_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return jax.nn.log_softmax(kept)


def kept_logits(
    logits: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    top_k: jax.typing.ArrayLike | None = None,
    top_p: jax.typing.ArrayLike | None = None,
    min_p: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Divide by the temperature, and put -inf where `filter_logits` filters a token out: its result, not normalised.

    Where nothing is filtered, a sampler needs no copy of the logits.

    Args:
        logits, temperature, top_k, top_p, min_p: as of `filter_logits`.

    Returns:
        [B, V] float32; greedy divides by 1.

    >>> kept_logits(jnp.array([[1.0, 3.0]]), temperature=0.0).tolist()
    [[-inf, 3.0]]
    """
    chex.assert_rank(logits, 2)
    vocab = logits.shape[1]
    temperature = jnp.asarray(temperature, jnp.float32)
    top_k = jnp.asarray(vocab if top_k is None else top_k, jnp.int32)
    top_p = jnp.asarray(1.0 if top_p is None else top_p, jnp.float32)
    min_p = jnp.asarray(0.0 if min_p is None else min_p, jnp.float32)
    divisor = jnp.where(temperature == 0, 1.0, temperature)

    filtered = (top_k < vocab) | (top_p < 1) | (min_p > 0)
    which = jnp.where(temperature == 0, 2, filtered.astype(jnp.int32))
    ways = [
        lambda logits: logits,
        lambda logits: jnp.where(_likely(jax.nn.log_softmax(logits / divisor), top_k, top_p, min_p), logits, -jnp.inf),
        lambda logits: jnp.where(_best(logits), logits, -jnp.inf),
    ]
    return jax.lax.switch(which, ways, logits.astype(jnp.float32)) / divisor


def _best(logits: jax.Array) -> jax.Array:  # not of log-softmax, which rounds near ones to a tie
    return jnp.arange(logits.shape[1])[None, :] == jnp.argmax(logits, axis=1)[:, None]


def _likely(z: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    largest = at_or_above_threshold(z, lambda keep: keep.sum(1, dtype=jnp.int32) >= top_k)
    z = jax.nn.log_softmax(jnp.where(largest, z, -jnp.inf))
    nucleus = at_or_above_threshold(z, lambda keep: jnp.where(keep, jnp.exp(z), 0.0).sum(1) >= top_p)
    nucleus |= top_p >= 1  # a rounded sum reaches 1 before the unlikely tokens are in it
    return largest & nucleus & (z >= z.max(1, keepdims=True) + jnp.log(min_p))


def at_or_above_threshold(x: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Mark the fewest largest entries of each row that are `enough`; all of them where even all are not.

    The threshold is found by bisection over the 2^32 ordered bit patterns of float32: exact, without a sort, in 32 passes.

    Args:
        x: [B, V] float32 without NaN.
        enough: maps marks [B, V] to [B]; once True for a row, it stays True when more entries are marked.

    Returns:
        [B, V] boolean; entries that tie with the smallest marked one are marked.

    >>> import jax.numpy as jnp
    >>> at_or_above_threshold(jnp.array([[0.5, -1.0, 2.0]]), lambda keep: keep.sum(1) >= 2).tolist()
    [[True, False, True]]
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(0x80000000)
    bits = jnp.where(bits == sign, jnp.uint32(0), bits)  # -0.0 ties with 0.0
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)  # grows with x

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # low is enough (or 0), high is not
        middle = low + (high - low) // jnp.uint32(2)
        holds = enough(ordered >= middle[:, None])
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    low = ordered[:, 0] & jnp.uint32(0)  # zeros that vary over the devices of a `shard_map` as x does
    low, _ = jax.lax.fori_loop(0, 32, halve, (low, jnp.full_like(low, 0xFFFFFFFF)))
    return ordered >= low[:, None]


def draw(
    logits: jax.Array, row_keys: jax.Array, positions: jax.Array, *, block: int = 256
) -> tuple[jax.Array, jax.Array]:
    """Draw a token for each row from its own key and position: [B] int32, and its log-probability, [B] float32.

    First the block of tokens, by the sum of its probabilities, then the token within it, both by Gumbel-max: as exact as
    one Gumbel a token, which for a large vocabulary costs more than the model's last product. Row i's randomness is
    fold_in(row_keys[i], positions[i]); nothing else of the batch enters. The logits are read twice and never copied.

    Args:
        logits: [B, V], normalised or not; -inf is never drawn.
        row_keys: [B] typed keys.
        positions: [B] int32, the position of the token to draw.
        block: tokens a block.

    >>> import jax, jax.numpy as jnp
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> token, logprob = draw(jnp.array([[-jnp.inf, 5.0], [7.0, -jnp.inf]]), keys, jnp.array([3, 7]))
    >>> token.tolist(), logprob.tolist()
    ([1, 0], [0.0, 0.0])
    """
    batch, vocab = logits.shape
    block = min(block, vocab)
    padded = jnp.pad(logits, ((0, 0), (0, -vocab % block)), constant_values=-jnp.inf) if vocab % block else logits
    blocks = padded.reshape(batch, -1, block)
    top = blocks.max(axis=(1, 2), keepdims=True)
    # Behind a barrier, as XLA would sum all entries anew for the row's total.
    sums = jax.lax.optimization_barrier(jnp.exp(blocks - top).sum(2))
    keys = jax.vmap(lambda key, position: jax.random.split(jax.random.fold_in(key, position)))(row_keys, positions)
    categorical = jax.vmap(jax.random.categorical)
    chosen = categorical(keys[:, 0], jnp.log(sums))
    within = jnp.take_along_axis(blocks, chosen[:, None, None], axis=1)[:, 0] - top[:, 0]
    inside = categorical(keys[:, 1], within)
    picked = jnp.take_along_axis(within, inside[:, None], axis=1)[:, 0]
    return (chosen * block + inside).astype(jnp.int32), picked - jnp.log(sums.sum(1))
