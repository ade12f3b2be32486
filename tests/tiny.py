"""Tiny models of every family, with every parameter random, so that no bias, norm or position can be lost unseen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.models.architecture import Architecture, Rope
from pgjax.models.causal_lm import CausalLM, Params, causal_lm

_LLAMA = {
    "family": "llama",
    "vocab_size": 23,
    "width": 16,
    "depth": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 4,
    "mlp_width": 24,
    "max_positions": 256,
    "activation": "silu",
    "norm": "rms",
    "norm_eps": 1e-5,
    "rope": Rope(theta=100.0),
    "gated_mlp": True,
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "tied": True,
}
_GPT2 = {
    "family": "gpt2",
    "kv_heads": 4,
    "activation": "gelu_tanh",
    "norm": "layer",
    "rope": None,
    "gated_mlp": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
}
LLAMA3_ROPE = Rope(theta=100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
ARCHITECTURES = {
    "llama": Architecture(**_LLAMA),  # grouped queries, tied
    "llama3_rope": Architecture(**{**_LLAMA, "tied": False, "head_dim": 6, "rope": LLAMA3_ROPE}),
    "qwen2": Architecture(**{**_LLAMA, "family": "qwen2", "qkv_bias": True}),
    "qwen3": Architecture(**{**_LLAMA, "family": "qwen3", "qk_norm": True, "tied": False, "head_dim": 8}),
    "gpt2": Architecture(**{**_LLAMA, **_GPT2}),
}
FAMILIES = tuple(ARCHITECTURES)


@functools.cache
def _lm(name: str, dtype: str, remat: bool) -> CausalLM:
    return causal_lm(ARCHITECTURES[name], dtype=jnp.dtype(dtype), remat=remat)


def tiny_lm(name: str, dtype: str = "float32", remat: bool = False) -> CausalLM:
    """The functions of a tiny model, the same objects at every call: jit knows a model by them."""
    return _lm(name, dtype, remat)


def noise_on_every_leaf(lm: CausalLM) -> Params:
    """Parameters on the host, norms and biases random too, large enough for logits that differ by whole nats."""
    rng = np.random.default_rng(1)

    def draw(path, leaf) -> np.ndarray:
        return (0.4 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale")).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lm.init, jax.random.key(0)))


@functools.cache
def tiny_params(name: str) -> Params:
    """The parameters of a tiny model on the first device, the same arrays at every call."""
    return jax.tree.map(jnp.asarray, noise_on_every_leaf(tiny_lm(name)))


@functools.partial(jax.jit, static_argnums=0)
def _apply(lm: CausalLM, *arguments: jax.Array) -> jax.Array:
    return lm.apply(*arguments)


def tiny_apply(name: str, dtype: str = "float32"):
    """`lm.apply` under jit, so that tests share its programs."""
    return functools.partial(_apply, tiny_lm(name, dtype))


def left_padded(lengths, width: int, *, vocab: int = 23, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random rows, each a function of its number and length alone, with random garbage under the padding."""
    mask = np.arange(width)[None, :] >= width - np.asarray(lengths)[:, None]
    tokens = np.random.default_rng(seed + 1000).integers(0, vocab, mask.shape)
    for row, length in enumerate(lengths):
        tokens[row, width - length :] = np.random.default_rng([seed, row, length]).integers(0, vocab, length)
    return tokens.astype(np.int32), mask
