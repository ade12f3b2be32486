"""The options in which decoder-only transformers differ, as frozen data."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021), optionally with Llama 3's frequency scaling.

    Without scaling, pair i of a head is rotated by the angle `position * theta^(-2i / head_dim)`. With `factor`, wavelengths
    longer than `original_max_positions / low_freq_factor` are multiplied by `factor`, wavelengths shorter than
    `original_max_positions / high_freq_factor` are kept, and the ones in between are interpolated (Llama 3.1, 2024).

    >>> Rope(theta=10000.0).factor is None
    True
    """

    theta: float
    factor: float | None = None  # None: no scaling, and the three below are None too
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_positions: int | None = None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The network's shape and options, as a checkpoint's configuration gives them.

    >>> tiny = Architecture(family="llama", vocab_size=64, width=16, depth=2, heads=4, kv_heads=2, head_dim=4,
    ...                     mlp_width=32, max_positions=128, activation="silu", norm="rms", norm_eps=1e-5,
    ...                     rope=Rope(theta=10000.0), gated_mlp=True, qkv_bias=False, out_bias=False,
    ...                     mlp_bias=False, qk_norm=False, tied=True)
    >>> tiny.heads // tiny.kv_heads
    2
    """

    family: str  # "llama", "qwen2", "qwen3" or "gpt2": how the weights are named on disk
    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int  # fewer than heads: grouped queries (Ainslie et al. 2023)
    head_dim: int
    mlp_width: int
    max_positions: int
    activation: str  # a key of transformer.ACTIVATIONS
    norm: str  # "rms" or "layer"
    norm_eps: float
    rope: Rope | None  # None: learned absolute positions
    gated_mlp: bool  # down(act(gate(x)) * up(x)); otherwise down(act(up(x)))
    qkv_bias: bool
    out_bias: bool  # on the attention's output
    mlp_bias: bool
    qk_norm: bool  # an RMS norm on every query and key head
    tied: bool  # the unembedding is the token embedding
    logit_cap: float | None = None  # logits become cap * tanh(logits / cap)
    known_ids: int | None = None  # ids from here on pad the embedding and have probability 0; None: there are none
