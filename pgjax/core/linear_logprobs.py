"""Log-probabilities and entropies from hidden states, block by block of the vocabulary.

Neither the forward nor the backward pass ever holds logits [B, T, V]: the rule is in `vocabulary_blocks`. On a mesh, each device
runs it on its own part (`linear_on_mesh`).
"""

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from pgjax.core.checks import check_ids, check_number, check_whole
from pgjax.core.linear_on_mesh import layout_of, logprobs_by_layout
from pgjax.core.logprobs import next_tokens, token_frame
from pgjax.core.masking import as_float
from pgjax.core.vocabulary_blocks import Options, Outputs


def linear_token_logprobs(
    hidden: ArrayLike,
    unembedding: ArrayLike,
    tokens: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    chunk_size: int = 1024,
    mesh: Mesh | AbstractMesh | None = None,
    batch_axes: tuple[str, ...] | None = None,
    unembedding_axes: tuple[str | None, str | None] | None = None,
    logit_cap: float | None = None,
    vocab_size: int | None = None,
) -> jax.Array:
    """Compute the tokens' log-probabilities from hidden states, never holding the logits of the whole batch.

    The values and gradients of `token_logprobs(hidden @ unembedding.T, tokens, temperature=temperature)`. A loop over the
    vocabulary holds the logits of `chunk_size` entries at a time. The backward pass computes them again from the saved
    normalizer, log sum_v exp(logit_v / temperature). Memory: a few times B * T * chunk_size floats. Through whole logits
    it is a few times B * T * V.

    On a mesh with Explicit axes (jax's default), the layout is read off the arguments' types, under `jit` and outside: rows,
    and time, stay split as `hidden` has them. On a mesh with Auto axes (`parallel.mesh`), pass `mesh`. In both, the unembedding
    is gathered over axes of the mesh that split rows once before the loop, and its gradient is reduced once after it, so the
    loop does no communication. A split of the vocabulary over other axes is kept: each device loops over its own part, and
    the sums are added up over devices after the loop.

    Reverse mode only, but the gradient can be differentiated again, in both modes. For `jax.jvp` and `jax.linearize` of the
    function itself, take `token_logprobs` of whole logits.

    Args:
      hidden: [B, T, D], the model's last hidden states, float32 or bfloat16 (products accumulate in float32).
      unembedding: [V, D]; the product is taken in the dtype of `hidden`.
      tokens: [B, T] integer ids in [0, V), or below `vocab_size`; another gives NaN at its place.
      temperature: [] above 0, the sampler's; may be traced; carries no gradient.
      chunk_size: how many entries of the vocabulary a step of the loop takes; V need not be a multiple of it.
      mesh: with Auto axes, to split the rows over, under `jit`. None: on a mesh with Explicit axes, inside the caller's own
        `shard_map` or `pmap`, or on one device.
      batch_axes: the axes of `mesh` that split B; the product of their sizes divides B. None: data and fsdp, where `mesh`
        has them.
      unembedding_axes: the axes of `mesh` that split V and D of the unembedding; None where it is not split. The axis of
        V must not be one of `batch_axes`. The axis of D must be one of them: its gradient comes back as a reduce-scatter.
      logit_cap: above 0; logits become logit_cap * tanh(logits / logit_cap) before the temperature (Gemma 2). None: no cap.
      vocab_size: how many of the V rows are ids, the first ones. The others pad the unembedding: their logits are -inf, and
        they get no gradient. None: all of them.

    Returns:
      [B, T] float32, in nats; entry 0 is 0. Gradients come back in the dtypes of `hidden` and `unembedding`.

    Raises:
      ValueError: `temperature` or `logit_cap` is a number not above 0, `chunk_size` is below 1, `vocab_size` is not in
        [1, V], or the axes do not fit the mesh.
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> hidden, unembedding = jnp.ones((1, 3, 2)), jnp.zeros((4, 2))
      >>> print(linear_token_logprobs(hidden, unembedding, jnp.array([[0, 1, 2]])))
      [[ 0.        -1.3862944 -1.3862944]]
    """
    logprobs, _ = _in_token_frame(
        hidden, unembedding, tokens, temperature, mesh, batch_axes, unembedding_axes,
        Options(chunk_size, False, logit_cap, vocab_size),
    )  # fmt: skip
    return logprobs


def linear_token_logprobs_and_entropy(
    hidden: ArrayLike,
    unembedding: ArrayLike,
    tokens: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    chunk_size: int = 1024,
    mesh: Mesh | AbstractMesh | None = None,
    batch_axes: tuple[str, ...] | None = None,
    unembedding_axes: tuple[str | None, str | None] | None = None,
    logit_cap: float | None = None,
    vocab_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute the tokens' log-probabilities and the entropies of their distributions in one pass over the vocabulary.

    With z = logits / temperature, top = max_v z_v and S = sum_v exp(z_v - top):

      entropy = log S - sum_v exp(z_v - top) (z_v - top) / S,    d entropy / d z_v = -p_v (log p_v + entropy).

    The values and gradients of `token_logprobs` and `token_entropy` of `hidden @ unembedding.T`, in the memory of
    `linear_token_logprobs`. Use that one where the entropy is not needed: it does less work.

    Args:
      hidden: [B, T, D], as in `linear_token_logprobs`, and so are the arguments that follow.
      unembedding: [V, D].
      tokens: [B, T] integer ids in [0, V); an id outside gives a log-probability of NaN, and an entropy all the same.
      temperature: [] above 0, the sampler's; may be traced; carries no gradient.
      chunk_size: how many entries of the vocabulary a step of the loop takes.
      mesh: devices to split the rows over, under `jit`.
      batch_axes: the axes of `mesh` that split B.
      unembedding_axes: the axes of `mesh` that split V and D of the unembedding.
      logit_cap: the bound of the logits; None: no cap.
      vocab_size: how many of the V rows are ids; None: all of them.

    Returns:
      (logprobs, entropy), each [B, T] float32, in nats; entry 0 is 0. entropy[:, t] is that of the distribution from which
      `tokens[:, t]` was drawn, and is not below 0.

    Raises:
      ValueError: `temperature` or `logit_cap` is a number not above 0, `chunk_size` is below 1, `vocab_size` is not in
        [1, V], or the axes do not fit the mesh.
      AssertionError: the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> hidden, unembedding = jnp.ones((1, 3, 2)), jnp.zeros((4, 2))
      >>> logprobs, entropy = linear_token_logprobs_and_entropy(hidden, unembedding, jnp.array([[0, 1, 2]]))
      >>> print(entropy)
      [[0.        1.3862944 1.3862944]]
    """
    logprobs, entropy = _in_token_frame(
        hidden, unembedding, tokens, temperature, mesh, batch_axes, unembedding_axes,
        Options(chunk_size, True, logit_cap, vocab_size),
    )  # fmt: skip
    assert entropy is not None
    return logprobs, entropy


def _in_token_frame(
    hidden: ArrayLike, unembedding: ArrayLike, tokens: ArrayLike, temperature: ArrayLike,
    mesh: Mesh | AbstractMesh | None, batch_axes: tuple[str, ...] | None,
    unembedding_axes: tuple[str | None, str | None] | None, options: Options,
) -> Outputs:  # fmt: skip
    """Check the arguments, run the rule on each device's rows, and shift its outputs to the tokens they speak of."""
    check_number("temperature", temperature, 0, strict=True)
    hidden, unembedding, tokens = jnp.asarray(hidden), jnp.asarray(unembedding), jnp.asarray(tokens)
    chex.assert_rank([hidden, unembedding, tokens], [3, 2, 2])
    chex.assert_equal_shape_prefix([hidden, tokens], 2)
    chex.assert_axis_dimension(unembedding, 1, hidden.shape[2])
    caller = "linear_token_logprobs" + ("_and_entropy" if options.with_entropy else "")
    check_ids(f"{caller}: tokens", tokens)
    for name, x in (("hidden", hidden), ("unembedding", unembedding)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{caller}: {name} must be of a floating type, got {x.dtype}")
    options = _checked(options, unembedding.shape[0])
    scale = jnp.asarray(temperature).astype(as_float(hidden).dtype)
    layout = layout_of(hidden, unembedding, tokens, mesh, batch_axes, unembedding_axes)
    found = logprobs_by_layout(hidden, unembedding, next_tokens(tokens), scale, layout, options)
    return jax.tree.map(token_frame, found)


def _checked(options: Options, rows: int) -> Options:
    check_whole("chunk_size", options.chunk_size, 1)
    cap, known = options.logit_cap, options.vocab_size
    if cap is not None:
        if isinstance(cap, jax.core.Tracer):
            raise ValueError("logit_cap must be a number that is known when the function is traced, got a traced one")
        check_number("logit_cap", cap, 0, jnp.inf, strict=True)
        options = options._replace(logit_cap=float(cap))
    if known is not None:
        check_whole("vocab_size", known, 1)
        if known > rows:
            raise ValueError(f"vocab_size={known} is more than the {rows} rows of the unembedding")
        options = options._replace(vocab_size=None if known == rows else int(known))
    return options
