"""Operations and bytes that a model's work needs on paper, and their share of what a device can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pgjax.core.errors import UserError

if TYPE_CHECKING:
    from pgjax.models.architecture import Architecture


class ParameterCounts(NamedTuple):
    """Parameters that take part in matrix products.

    body: projections of attention and MLP, over all layers.
    head: the unembedding, `[V, D]`.
    """

    body: int
    head: int


def parameter_counts(arch: Architecture) -> ParameterCounts:
    """Count the parameters that take part in matrix products.

        body = L * (2 * D * H * hd + 2 * D * Hkv * hd + m * D * F),   head = V * D

    m is 3 for a gated MLP and 2 for a plain one. Of experts, those that a token goes through are counted, and the
    router, D * E. Embedding look-ups, norms and biases are not counted: they do no matrix product, and together
    they are well under 1% of the work of a forward pass.

    Args:
        arch: the model's sizes.

    Returns:
        The counts of body and head.

    Example:
        >>> from pgjax.models.architecture import Architecture, Rope
        >>> from pgjax.run.flops import parameter_counts
        >>> arch = Architecture(
        ...     family="llama", vocab_size=49152, width=576, depth=30, heads=9, kv_heads=3, head_dim=64,
        ...     mlp_width=1536, max_positions=8192, activation="silu", norm="rms", norm_eps=1e-5,
        ...     rope=Rope(theta=100000.0), gated_mlp=True, qkv_bias=False, out_bias=False, mlp_bias=False,
        ...     qk_norm=False, tied=True)
        >>> parameter_counts(arch)
        ParameterCounts(body=106168320, head=28311552)
    """
    attention = 2 * arch.width * arch.heads * arch.head_dim + 2 * arch.width * arch.kv_heads * arch.head_dim
    mlp = (3 if arch.gated_mlp else 2) * arch.width * arch.mlp_width
    if arch.experts is not None:
        mlp = 3 * arch.width * arch.mlp_width * arch.experts.per_token + arch.width * arch.experts.number
    return ParameterCounts(body=arch.depth * (attention + mlp), head=arch.vocab_size * arch.width)


def forward_flops(arch: Architecture, *, tokens: float, context: float, head_tokens: float) -> float:
    """Count the operations of a forward pass, a multiplication and an addition counting as two.

        2 * N_body * tokens  +  4 * L * H * hd * context * tokens  +  2 * V * D * head_tokens

    The middle term is attention: q . k and weights . v, each 2 * H * hd operations a key. It counts the keys
    that a token attends to, not those that a kernel also computes and masks away. So over T causal tokens
    `context` is (T + 1) / 2, or T / 2 for short; in a decode step it is the filled length of the cache.

    Paper: Chowdhery et al. 2022 (PaLM), appendix B, which counts attention without the causal half.

    Args:
        arch: the model's sizes.
        tokens: tokens that go through the body.
        context: keys that a token attends to, on average.
        head_tokens: tokens whose logits are computed.

    Returns:
        Floating-point operations.

    Example:
        >>> from pgjax.run.flops import forward_flops
        >>> from pgjax.models.io.config import architecture_of
        >>> config = {"model_type": "gpt2", "vocab_size": 10, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
        >>> arch = architecture_of(config)
        >>> forward_flops(arch, tokens=1, context=0, head_tokens=0)     # 2 * (4 * 4 * 4 + 2 * 4 * 16)
        384.0
    """
    counts = parameter_counts(arch)
    attention = 4.0 * arch.depth * arch.heads * arch.head_dim * context * tokens
    return 2.0 * counts.body * tokens + attention + 2.0 * counts.head * head_tokens


def sequence_sizes(rows: float, *, prompt_length: float, new_tokens: float, group_size: int = 1) -> dict[str, float]:
    """Count the tokens of rows whose prompt is computed once a group, and the keys that they attend to on average.

        tokens  = B * (P / G + N)
        context = ((P / G) * P / 2 + N * (P + N / 2)) / (P / G + N)

    Args:
        rows: B.
        prompt_length: P, in tokens.
        new_tokens: N, sampled for each row.
        group_size: G, rows that have a prompt in common.

    Returns:
        `tokens` and `context` of `forward_flops`.

    Example:
        >>> from pgjax.run.flops import sequence_sizes
        >>> sequence_sizes(8, prompt_length=4, new_tokens=2), sequence_sizes(8, prompt_length=4, new_tokens=2, group_size=2)
        ({'tokens': 48.0, 'context': 3.0}, {'tokens': 32.0, 'context': 3.5})
    """
    prompts = prompt_length / group_size
    seen = prompts * prompt_length / 2 + new_tokens * (prompt_length + new_tokens / 2)
    return {"tokens": rows * (prompts + new_tokens), "context": seen / (prompts + new_tokens)}


def training_flops(arch: Architecture, *, tokens: float, context: float, head_tokens: float) -> float:
    """Count the operations of a forward and a backward pass.

        3 * forward_flops

    A backward pass does twice the work of the forward pass. With `head_tokens == tokens` and `context == T / 2`
    this is 6 * N + 6 * L * H * hd * T a token. What rematerialisation computes again is not counted: it is a
    cost, not progress (model FLOPs, not hardware FLOPs).

    Args:
        arch: the model's sizes.
        tokens: tokens that go through the body.
        context: keys that a token attends to, on average.
        head_tokens: tokens whose logits are computed.

    Returns:
        Floating-point operations.

    Example:
        >>> from pgjax.run.flops import training_flops
        >>> from pgjax.models.io.config import architecture_of
        >>> config = {"model_type": "gpt2", "vocab_size": 10, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
        >>> arch = architecture_of(config)
        >>> training_flops(arch, tokens=1, context=0, head_tokens=0)
        1152.0
    """
    return 3.0 * forward_flops(arch, tokens=tokens, context=context, head_tokens=head_tokens)


def adapter_flops(arch: Architecture, *, tokens: float, context: float, head_tokens: float) -> float:
    """Count the operations of a forward and a backward pass that trains low-rank adapters beside frozen weights.

        3 * forward_flops - forward_flops(context = 0)

    Gradients flow through the weights, but their own, a third of the products with them, are not computed. The products with
    the adapters, r (D + F) / (D F) of those with the weights, are left out.

    Args:
        arch: the model's sizes.
        tokens: tokens that go through the body.
        context: keys that a token attends to, on average.
        head_tokens: tokens whose logits are computed.

    Returns:
        Floating-point operations.

    Example:
        >>> from pgjax.run.flops import adapter_flops
        >>> from pgjax.models.io.config import architecture_of
        >>> config = {"model_type": "gpt2", "vocab_size": 10, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
        >>> arch = architecture_of(config)
        >>> adapter_flops(arch, tokens=1, context=0, head_tokens=0)
        768.0
    """
    weights = forward_flops(arch, tokens=tokens, context=0, head_tokens=head_tokens)
    return training_flops(arch, tokens=tokens, context=context, head_tokens=head_tokens) - weights


def decode_bytes(arch: Architecture, *, batch: float, context: float, weight_bytes: float, cache_bytes: float) -> float:
    """Count the bytes that one decode step must read.

        weight_bytes * (N_body + V * D)  +  cache_bytes * 2 * L * Hkv * hd * context * batch

    Every weight is read once for the whole batch, every row reads its own keys and values. Activations and the
    one position that is written are left out: they are under 1% of this.

    Args:
        arch: the model's sizes.
        batch: rows decoded together.
        context: filled positions of the cache, the mean over rows.
        weight_bytes: bytes a parameter (2 for bfloat16).
        cache_bytes: bytes an entry of the cache.

    Returns:
        Bytes read a step.

    Example:
        >>> from pgjax.run.flops import decode_bytes
        >>> from pgjax.models.io.config import architecture_of
        >>> config = {"model_type": "gpt2", "vocab_size": 10, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
        >>> arch = architecture_of(config)
        >>> decode_bytes(arch, batch=1, context=5, weight_bytes=2, cache_bytes=4)    # 2 * 232 + 4 * 8 * 5
        624.0
    """
    counts = parameter_counts(arch)
    cache = 2.0 * arch.depth * arch.kv_heads * arch.head_dim * context * batch
    return float(weight_bytes * (counts.body + counts.head) + cache_bytes * cache)


def mfu(flops: float, seconds: float, peak_flops: float) -> float:
    """Give the model-FLOPs utilisation.

        flops / (seconds * peak_flops)

    Paper: Chowdhery et al. 2022 (PaLM), appendix B.

    Args:
        flops: operations the model needs (`training_flops`, `forward_flops`), over all devices.
        seconds: the time they took.
        peak_flops: operations a second of all devices together.

    Returns:
        A fraction of the peak.

    Raises:
        UserError: `seconds` or `peak_flops` is not above 0.

    Example:
        >>> from pgjax.run.flops import mfu
        >>> mfu(2e12, 4.0, 1e12)
        0.5
    """
    return _fraction(flops, seconds, peak_flops)


def mbu(bytes_read: float, seconds: float, peak_bytes: float) -> float:
    """Give the memory-bandwidth utilisation.

        bytes_read / (seconds * peak_bytes)

    Args:
        bytes_read: bytes that had to be read (`decode_bytes`), over all devices.
        seconds: the time it took.
        peak_bytes: bytes a second of all devices together: `Peaks.read_bytes` for decoding, which only reads.

    Returns:
        A fraction of the peak.

    Raises:
        UserError: `seconds` or `peak_bytes` is not above 0.

    Example:
        >>> from pgjax.run.flops import mbu
        >>> mbu(1e9, 0.5, 8e9)
        0.25
    """
    return _fraction(bytes_read, seconds, peak_bytes)


def _fraction(amount: float, seconds: float, peak: float) -> float:
    if not (seconds > 0 and peak > 0):
        raise UserError(f"seconds and the peak must be above 0, got {seconds} s and {peak}")
    return amount / (seconds * peak)
