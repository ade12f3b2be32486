"""The sampler on a real model: torch's greedy tokens for a padded batch, and log-probabilities of what was sampled."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.core.linear_logprobs import linear_token_logprobs
from pgjax.data.padding import left_pad
from pgjax.rollout.sample import sample

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "smollm2_greedy.json").read_text())
PAD = EOS = GOLDEN["eos_id"]  # one id for both, as SmolLM2 has it


def roll(smollm2, temperature):
    lm, params, _ = smollm2
    prompts, mask = left_pad(GOLDEN["prompts"], PAD)
    assert not mask.all()  # a padded batch
    new = GOLDEN["max_new_tokens"]
    options = {"temperature": temperature, "eos_ids": (EOS,), "pad_id": PAD}
    return sample(lm, params, prompts, mask, jax.random.key(0), max_new_tokens=new, **options)


def test_greedy_equals_torch_token_by_token_for_a_padded_batch(smollm2):
    rollout = jax.device_get(roll(smollm2, 0.0))
    ours = [row[mask].tolist() for row, mask in zip(rollout.tokens, rollout.mask, strict=True)]
    assert ours == GOLDEN["new_tokens"]
    assert ours[-1][-1] == EOS and len(ours[-1]) < GOLDEN["max_new_tokens"]  # one row ends early


@pytest.mark.campaign
def test_sampled_logprobs_equal_teacher_forcing(smollm2):
    lm, params, _ = smollm2
    rollout = roll(smollm2, 0.7)

    @jax.jit
    def forced(params, rollout):
        hidden = lm.hidden(params, rollout.tokens, rollout.attention_mask)
        return linear_token_logprobs(hidden, lm.unembedding(params), rollout.tokens, temperature=0.7, chunk_size=16384)

    gap = jnp.where(rollout.mask, rollout.logprobs - forced(params, rollout), 0)
    assert np.abs(gap).max() < 1e-4
    assert np.asarray(rollout.logprobs).min() < -1
