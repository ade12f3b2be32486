"""Which parameters are matrices, vectors and embeddings: labels for weight decay, muon, `optax.masked` and `multi_transform`."""

from __future__ import annotations

import re
from typing import Any, Literal

import jax

Label = Literal["matrices", "norms", "embeddings"]
_EMBEDDINGS = re.compile(r"embed|^(wte|wpe|head|lm_head|unembedding)$", re.IGNORECASE)


def layer_axes(path: tuple[Any, ...], x: Any) -> int:
    """Count the axes of a parameter in its own layer.

    Args:
        path: as `jax.tree_util` gives it. Under "layers", parameters are stacked over depth, [L, ...], unless the layers are in
            a list or numbered: ["layers"][0], ["layers"]["layer_0"].
        x: an array.

    >>> import jax.numpy as jnp
    >>> stacked, listed = {"layers": {"norm": jnp.ones((3, 2))}}, {"layers": [{"up": jnp.ones((3, 2))}]}
    >>> [layer_axes(*jax.tree_util.tree_leaves_with_path(params)[0]) for params in (stacked, listed)]
    [1, 2]
    """
    steps = [jax.tree_util.keystr((step,), simple=True) for step in path]
    if "layers" not in steps[:-1]:
        return int(x.ndim)
    numbered = re.search(r"(^|_)\d+$", steps[steps.index("layers") + 1])
    return int(x.ndim) - (numbered is None)


def parameter_labels(params: Any) -> Any:
    """Label each parameter: "matrices", "norms" or "embeddings".

    "norms" are all that is a vector or a number in its layer: scales of norms, biases, the value head. "embeddings" are
    matrices of one row a token or a position, by their names: "embed...", "head" (the unembedding), "lm_head", "wte", "wpe".
    "matrices" are all others: the kernels, and adapters' factors. pgjax's transformer stacks its layers, so that a norm's
    scale is [L, D] and a kernel [L, D, F]: what optax makes of the number of axes alone is wrong there.

    Args:
        params: of a causal LM, alone or in another tree, as {"lm", "value"}; or of another model.

    Returns:
        A tree like `params`.

    >>> import optax
    >>> import jax.numpy as jnp
    >>> layers = {"q": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}}
    >>> params = {"embed": {"tokens": jnp.ones((5, 2))}, "layers": layers}
    >>> parameter_labels(params)
    {'embed': {'tokens': 'embeddings'}, 'layers': {'q': {'bias': 'norms', 'kernel': 'matrices'}}}
    >>> rates = {"matrices": optax.adam(1e-3), "embeddings": optax.adam(1e-4), "norms": optax.set_to_zero()}
    >>> _ = optax.multi_transform(rates, parameter_labels).init(params)
    """

    def label(path: tuple[Any, ...], x: Any) -> Label:
        if layer_axes(path, x) < 2:
            return "norms"
        named = any(_EMBEDDINGS.search(jax.tree_util.keystr((step,), simple=True)) for step in path)
        return "embeddings" if named else "matrices"

    return jax.tree_util.tree_map_with_path(label, params)


def matrix_mask(params: Any) -> Any:
    """Mark what weight decay is for: True for matrices and embeddings, False for what is a vector in its layer.

    >>> import optax
    >>> import jax.numpy as jnp
    >>> matrix_mask({"layers": {"norm": jnp.ones((3, 2)), "up": jnp.ones((3, 2, 4))}})
    {'layers': {'norm': False, 'up': True}}
    >>> decaying = optax.lion(1e-4, weight_decay=0.1, mask=matrix_mask)
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: layer_axes(path, x) > 1, params)
