"""The options in which decoder-only transformers differ, as frozen data."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021), plain or scaled for contexts longer than it was trained on.

    Without scaling, pair i of a head is rotated by the angle `position * theta^(-2i / dims)`. `models.rope` has the equations of
    the scalings.

    >>> Rope(theta=10000.0).factor is None
    True
    """

    theta: float
    factor: float | None = None  # the context is this many times as long; None: no scaling, and nothing below matters
    low_freq_factor: float | None = (
        None  # llama3, yarn: pairs with fewer turns over the original context are scaled whole
    )
    high_freq_factor: float | None = None  # those with more are kept, and those in between are interpolated
    original_max_positions: int | None = None
    scaling: str = "llama3"  # or "linear", "dynamic", "yarn", "longrope"
    whole_pairs: bool = True  # yarn: between whole numbers of pairs
    short_factors: tuple[float, ...] | None = None  # longrope: one a pair, for arrays up to the original length
    long_factors: tuple[float, ...] | None = None  # and for longer ones
    table_scale: float = 1.0  # cosine and sine are multiplied by it
    dims: int | None = None  # of a head, the first ones, that are rotated; None: all
    interleaved: bool = False  # pairs are neighbours; otherwise a pair's two numbers are half of `dims` apart


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts (Shazeer et al. 2017) in place of every MLP: each token goes through the few that its router chooses.

    >>> Experts(number=8, per_token=2).normalized
    True
    """

    number: int
    per_token: int
    normalized: bool = True  # the chosen ones' weights sum to 1; otherwise they are those of a softmax over all


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

    family: str  # a key of models.io.families.FAMILIES: how config and weights are named on disk
    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int  # fewer than heads: grouped queries (Ainslie et al. 2023)
    head_dim: int
    mlp_width: int  # of one expert, where there are experts
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
    # The norms.
    norm_offset: float = 0.0  # a norm multiplies by this plus its scale (Gemma: 1)
    norm_bias: bool = True  # of layer norms
    qk_norm_whole: bool = False  # one norm over all query heads, and one over all key heads, in place of one a head
    pre_norms: bool = True  # on what attention and MLP read
    post_norms: bool = False  # on what they return, before it is added
    # The residual stream.
    parallel: bool = False  # x + attention(norm(x)) + mlp(norm(x)): the MLP does not read what attention adds
    one_norm: bool = False  # parallel, and both read the same norm
    embedding_scale: float | None = None  # embeddings are multiplied by it, rounded to the dtype of activations
    residual_scale: float | None = None  # what attention and MLP return is multiplied by it
    # Attention and logits.
    attention_scale: float | None = None  # of scores; None: head_dim^-1/2
    attention_cap: float | None = None  # scores become cap * tanh(scores / cap)
    logit_scale: float | None = None  # hidden states behind the last norm are multiplied by it
    logit_cap: float | None = None  # logits become cap * tanh(logits / cap)
    known_ids: int | None = None  # ids from here on pad the embedding and have probability 0; None: there are none
    # What differs from layer to layer.
    window: int | None = None  # keys that a query of a windowed layer sees, the token itself included
    windowed: tuple[bool, ...] | None = None  # which layers have the window; None: all
    window_rope: Rope | None = None  # of windowed layers; None: the same as of others
    rotated: tuple[bool, ...] | None = None  # which layers rotate queries and keys; None: all
    experts: Experts | None = None


class LayerKind(NamedTuple):
    """What one layer has otherwise than another."""

    window: int | None  # keys that a query sees, itself included; None: all up to it
    rope: Rope | None  # None: queries and keys are not rotated


def layer_kinds(arch: Architecture, length: int | None = None) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    """List the kinds of layers, and which of them each layer is.

    Args:
        arch: the architecture.
        length: of the rows; a window that is not shorter is none. None: of any length.

    Returns:
        The different kinds in the order of their first layers, and for each layer the index of its kind.

    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 4}
    >>> layer_kinds(architecture_of(config))
    ((LayerKind(window=None, rope=None),), (0, 0, 0))
    """

    def kind(layer: int) -> LayerKind:
        windowed = arch.window is not None and (arch.windowed is None or arch.windowed[layer])
        rope = arch.window_rope if windowed and arch.window_rope is not None else arch.rope
        window = arch.window if windowed and (length is None or arch.window < length) else None  # type: ignore[operator]
        return LayerKind(window, rope if arch.rotated is None or arch.rotated[layer] else None)

    of_layer = [kind(layer) for layer in range(arch.depth)]
    kinds = tuple(dict.fromkeys(of_layer))
    return kinds, tuple(kinds.index(kind) for kind in of_layer)
