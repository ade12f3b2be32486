#!/usr/bin/env bash
# optax's Muon over a flax model with scanned layers trains every layer by Adam, and orthogonalises the embedding.
#
# Versions: optax 0.2.8, flax 0.12.8, jax 0.10.2 (CPU), Python 3.11.
# Behaviour: `optax.contrib.muon` takes the leaves of two dimensions and leaves the others to Adam. `flax.linen.scan`
#   stacks the kernels of all layers into one leaf of three dimensions. So Muon gets the embedding, which its authors
#   leave out, and none of the kernels, for which it was made; nothing says so.
# One would guess: the hidden kernels are orthogonalised, layer by layer.
# What to do: give `muon_weight_dimension_numbers`, by name: None for the embedding, axes (1, 2) for stacked kernels.
# Seen on 2026-11-30, largest over smallest singular value of the update from one random gradient (1: orthogonal, nearly):
#   embedding 1.7, kernel of layer 0 1108.3; with dimension numbers: embedding 4.7, kernel of layer 0 1.7
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile optax==0.2.8 flax==0.12.8 jax==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(32, use_bias=False)(nn.relu(x)), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(64, 32)(tokens)
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return layers()(x, None)[0]


def spread(matrix):
    values = jnp.linalg.svd(matrix, compute_uv=False)
    return float(values[0] / values[-1])


def spreads(optimizer):
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    return [spread(updates["Embed_0"]["embedding"]), spread(updates["ScanLayer_0"]["Dense_0"]["kernel"][0])]


params = Model().init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
print(jax.tree.map(jnp.shape, params))
keys = iter(jax.random.split(jax.random.key(1), 2))
gradients = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), params)
numbers = {
    "Embed_0": {"embedding": None},
    "ScanLayer_0": {"Dense_0": {"kernel": optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)}},
}
plain = spreads(optax.contrib.muon(1e-3))
named = spreads(optax.contrib.muon(1e-3, muon_weight_dimension_numbers=numbers))
print(
    f"embedding {plain[0]:.1f}, kernel of layer 0 {plain[1]:.1f}; "
    f"with dimension numbers: embedding {named[0]:.1f}, kernel of layer 0 {named[1]:.1f}"
)
assert plain[0] < 2.5, "changed: the embedding is no longer orthogonalised"
assert plain[1] > 10, "changed: the stacked kernels are orthogonalised"
assert named[1] < 2.5 < named[0], "changed: dimension numbers by name no longer choose the kernels"
PYTHON
