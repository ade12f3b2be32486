#!/usr/bin/env bash
# jax draws from bfloat16 logits as if the later tokens of a vocabulary were all but impossible.
#
# Versions: jax 0.10.2 (CPU), Python 3.11.
# Behaviour: `jax.random.categorical` makes its Gumbel noise in the dtype of the logits. In bfloat16 many entries share the
#   largest noise, and the first of them wins: of 1,024 equal logits the first 512 are drawn 98% of the time.
# One would guess: 50%, with some loss of precision.
# What to do: cast the logits of a bfloat16 model to float32 before sampling.
# Seen on 2026-11-30:
#   share of draws among the first 512 of 1,024 equal logits: float32 0.499, bfloat16 0.984
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile jax==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp


def share_of_first_half(dtype):
    logits = jnp.zeros((10_000, 1024), dtype)
    return float((jax.random.categorical(jax.random.key(0), logits) < 512).mean())


float32, bfloat16 = share_of_first_half(jnp.float32), share_of_first_half(jnp.bfloat16)
print(f"share of draws among the first 512 of 1,024 equal logits: float32 {float32:.3f}, bfloat16 {bfloat16:.3f}")
assert abs(float32 - 0.5) < 0.01, "changed: float32 is no longer even"
assert bfloat16 > 0.9, "changed: bfloat16 logits no longer favour the first half"
PYTHON
