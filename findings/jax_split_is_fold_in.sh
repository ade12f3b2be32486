#!/usr/bin/env bash
# In jax, `split(key, n)[i]` and `fold_in(key, i)` are the same key.
#
# Versions: jax 0.10.2 (CPU), Python 3.11.
# Behaviour: with `jax_threefry_partitionable`, the default, both derive the same key for every i, whatever n is. A program
#   that splits a key for its rows and folds step numbers into the same key draws the same numbers twice. Without
#   that option the two differ.
# One would guess: two ways to derive keys give independent ones.
# What to do: derive from one key in one way only; give each purpose a key of its own first.
# Seen on 2026-11-30:
#   keys in common of split(key, 8) and fold_in(key, 0..7): 8 by default, 0 with jax_threefry_partitionable=False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile jax==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import numpy as np


def in_common():
    key = jax.random.key(0)
    split = np.asarray(jax.random.key_data(jax.random.split(key, 8)))
    folded = np.stack([jax.random.key_data(jax.random.fold_in(key, i)) for i in range(8)])
    return int((split == folded).all(axis=1).sum())


by_default = in_common()
jax.config.update("jax_threefry_partitionable", False)
without = in_common()
print(
    f"keys in common of split(key, 8) and fold_in(key, 0..7): {by_default} by default, "
    f"{without} with jax_threefry_partitionable=False"
)
assert by_default == 8, "changed: split and fold_in differ"
assert without == 0, "changed: they agree without the option, too"
PYTHON
