"""Every family against torch: logits, greedy tokens, the cache, what is saved, reward models; and gradients, meshes, adapters."""

import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import pgjax as pg
from pgjax.models.causal_lm import decode_params, logits_of
from pgjax.models.io.config import architecture_of, classifier_config_of, config_of
from pgjax.rollout.sample import sample
from tests.compare import assert_close, assert_same_bits
from tests.family_models import CASES, GOLDENS, drawn, padded_batch, write_model
from tests.sizes import campaign_but_for

HELD = json.loads((GOLDENS / "families.json").read_text())["cases"]
LOGITS = np.load(GOLDENS / "families.npz")
TOKENS, MASK = padded_batch()
SOME = campaign_but_for(CASES, "gemma3", "qwen3_moe")  # windows, thetas, norms; experts


@functools.cache
def opened(case):
    """Load a case from a folder that transformers would open: (lm, params)."""
    with tempfile.TemporaryDirectory() as folder:
        lm, params, _ = pg.load(write_model(Path(folder), HELD[case]["config"], HELD[case]["tensors"]))
    return lm, params


def logits(case, tokens, mask):
    lm, params = opened(case)
    return np.asarray(jax.jit(lm.apply)(params, tokens, mask))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_torchs(case):
    # Torch's are of rows alone. Longrope goes by the length of the whole array, so there its rows are alone here too.
    if case == "phi3_longrope":
        found = [logits(case, row[None, real], None)[0] for row, real in zip(TOKENS, MASK, strict=True)]
    else:
        found = [logits(case, TOKENS, MASK)[MASK]]
    assert_close(np.concatenate(found), LOGITS[case], of_max=1e-5)
