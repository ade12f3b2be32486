"""A reward model: a causal LM's body with a linear score head, read at the last real token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.core.cached import cached
from pgjax.models.architecture import Architecture
from pgjax.models.causal_lm import CausalLM, causal_lm

Params = dict[str, Any]


class RewardModel(NamedTuple):
    """The functions of one architecture; every one is pure and takes the parameters as its first argument.

    Parameters are {"lm": the causal LM's parameters without its unembedding, "score": {"kernel": [D]}}.
    """

    arch: Architecture
    dtype: Any  # of activations; scores are float32
    init: Callable[..., Params]  # (key) -> params
    apply: Callable[..., jax.Array]  # (params, tokens[B,T], attention_mask=None) -> scores[B] float32
    features: Callable[..., jax.Array]  # (params, tokens[B,T], attention_mask=None) -> [B,D] float32, the head's input


@cached  # one architecture, one set of functions, so that compiled programs are shared
def reward_model(
    arch: Architecture, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, remat: bool = False
) -> RewardModel:
    """Build the pure functions of a reward model on a decoder-only transformer.

    score = kernel . hidden[last], where last is the last True of the row's attention mask (Stiennon et al. 2020). Padding may
    be on either side. Its id does not matter, and may be the end-of-sequence id.

    Args:
        arch: of the body; its fields `tied`, `logit_scale` and `logit_cap` have no effect.
        dtype: of activations.
        param_dtype: of the parameters that `init` makes.
        remat: recompute each layer in the backward pass.

    Returns:
        A `RewardModel`.

    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    >>> rm = reward_model(architecture_of(config))
    >>> params = rm.init(jax.random.key(0))
    >>> tokens, padded = jnp.array([[5, 6, 7]]), jnp.array([[5, 6, 7, 0, 0]])
    >>> mask = jnp.array([[True, True, True, False, False]])
    >>> bool(jnp.allclose(rm.apply(params, tokens), rm.apply(params, padded, mask)))
    True
    """
    # The score reads what the last norm gives, which a model's scale of logits does not touch.
    lm = causal_lm(dataclasses.replace(arch, logit_scale=None), dtype=dtype, param_dtype=param_dtype, remat=remat)

    def init(key: jax.Array) -> Params:
        body_key, head_key = jax.random.split(key)
        body = {name: part for name, part in lm.init(body_key).items() if name != "head"}
        return {"lm": body, "score": init_score_head(head_key, arch.width, dtype=param_dtype)}

    def features(params: Params, tokens: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        hidden = lm.hidden(params["lm"], tokens, attention_mask)
        last = last_index(jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask)
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0].astype(jnp.float32)

    def apply(params: Params, tokens: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        kernel = params["score"]["kernel"].astype(jnp.float32)
        return jnp.sum(features(params, tokens, attention_mask) * kernel[None, :], axis=-1)

    return RewardModel(arch, dtype, init, apply, features)


def last_index(attention_mask: jax.Array) -> jax.Array:
    """Find the last real token of each row, whichever side is padded.

    Args:
        attention_mask: [B, T] bool or integer, with a real token in every row.

    Returns:
        [B] int32 columns.

    >>> last_index(jnp.array([[False, True, True], [True, True, False]])).tolist()
    [2, 1]
    """
    real = attention_mask.astype(bool)
    return real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1).astype(jnp.int32)


def init_score_head(key: jax.Array, width: int, *, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Draw a score head: normal, standard deviation 1 / sqrt(width + 1) (Stiennon et al. 2020).

    The hidden state has about unit mean square, so the initial scores are of order 1, whatever the width.

    Args:
        key: typed.
        width: D of the hidden states.
        dtype: of the parameters.

    Returns:
        {"kernel": [D]}.

    >>> init_score_head(jax.random.key(0), 8)["kernel"].shape
    (8,)
    """
    return {"kernel": (jax.random.normal(key, (width,), jnp.float32) / math.sqrt(width + 1)).astype(dtype)}


def from_causal_lm(lm: CausalLM, params: Params, key: jax.Array, *, remat: bool = False) -> tuple[RewardModel, Params]:
    """Turn a causal LM into a reward model: the same body, no unembedding, and a new score head.

    Args:
        lm: the language model, ideally the one that the policy starts from (Ouyang et al. 2022).
        params: of the language model; the arrays are shared, not copied.
        key: typed, for the head.
        remat: as in `reward_model`.

    Returns:
        The reward model and its parameters.

    >>> from pgjax.models.io.config import architecture_of
    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    >>> lm = causal_lm(architecture_of(config))
    >>> rm, params = from_causal_lm(lm, lm.init(jax.random.key(0)), jax.random.key(1))
    >>> sorted(params), params["score"]["kernel"].shape
    (['lm', 'score'], (16,))
    """
    dtype = params["norm"]["scale"].dtype
    body = {name: part for name, part in params.items() if name != "head"}
    rm = reward_model(lm.arch, dtype=lm.dtype, param_dtype=dtype, remat=remat)
    return rm, {"lm": body, "score": init_score_head(key, lm.arch.width, dtype=dtype)}


def normalized(params: Params, features: np.ndarray, *, ridge: float = 1e-2) -> tuple[Params, dict[str, float]]:
    """Shift and scale a reward model's scores to mean 0 and standard deviation 1 on reference samples.

    Stiennon et al. (2020) normalise once, too, before reinforcement learning. The saved layout has one linear map and no bias.
    So the scale goes into the kernel. The shift goes into the last norm's bias, along the kernel, if the norm has one (GPT-2):
    it is then the same constant for every input. An RMS norm has no bias. There a multiple of v is subtracted from the
    kernel, where v is the ridge regression of the constant 1 on the features, scaled so that v . mean(features) = 1. The
    mean over the reference samples is then 0 up to the rounding of the parameters' dtype. On another input the shift is
    the constant times v . features, which is near 1; its spread is reported.

    Args:
        params: of a reward model.
        features: [N, D] from `RewardModel.features` for the reference samples, N >= 2.
        ridge: penalty on v, in units of the mean square of a feature times N.

    Returns:
        The new parameters, and a dict: "mean" and "std" of the scores before, and "shift_spread", the standard deviation of
        the shift over the reference samples, in units of the normalised score; 0 if the shift is a constant.

    Raises:
        ValueError: fewer than 2 samples, features that are not finite, or scores that are all the same.

    >>> score = {"kernel": jnp.array([1.0, 0.0])}
    >>> params = {"lm": {"norm": {"scale": jnp.ones(2), "bias": jnp.zeros(2)}}, "score": score}
    >>> new, report = normalized(params, np.array([[1.0, 0.0], [5.0, 0.0]]))
    >>> report["mean"], report["std"], new["score"]["kernel"].tolist(), new["lm"]["norm"]["bias"].tolist()
    (3.0, 2.0, [0.5, 0.0], [-3.0, 0.0])
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {features.shape}: normalising needs [N, D] with at least 2 samples")
    if not np.isfinite(features).all():
        raise ValueError("the reference samples have features that are not finite")
    norm, kernel = params["lm"]["norm"], np.asarray(params["score"]["kernel"], np.float64)
    scores = features @ kernel
    mean = scores.mean()
    if "bias" in norm:
        bias, direction = np.asarray(norm["bias"], np.float64), None
        norm = {**norm, "bias": _like(bias - mean * kernel / (kernel @ kernel), norm["bias"])} if mean else norm
        shifted = scores - mean
    else:
        direction = _constant_direction(features, ridge)
        kernel = kernel - mean * direction
        shifted = features @ kernel
    std = shifted.std()
    if not std > 1e-12 * np.abs(scores).max():
        raise ValueError(f"all {len(scores)} reference samples score {mean:.6g}: there is nothing to normalise by")
    spread = 0.0 if direction is None else float(abs(mean) * (features @ direction).std() / std)
    new = {
        **params,
        "lm": {**params["lm"], "norm": norm},
        "score": {"kernel": _like(kernel / std, params["score"]["kernel"])},
    }
    return new, {"mean": float(mean), "std": float(std), "shift_spread": spread}


def _constant_direction(features: np.ndarray, ridge: float) -> np.ndarray:
    """Solve the ridge regression of the constant 1 on the features; scale v so that v . features has mean 1."""
    gram = features.T @ features
    penalty = ridge * np.trace(gram) / len(gram)
    direction = np.linalg.solve(gram + penalty * np.eye(len(gram)), features.sum(0))
    return direction / (features.mean(0) @ direction)


def _like(value: np.ndarray, leaf: jax.Array) -> jax.Array:
    """Convert a host array to the dtype and sharding of the leaf that it replaces."""
    return jax.device_put(value.astype(leaf.dtype), leaf.sharding)
