"""Every family against torch: what `tests/family_checks.py` checks, a few families in the default run, all in the campaign."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax.models.causal_lm import causal_lm
from pgjax.models.heads import head_logprobs
from pgjax.models.io.families import FAMILIES
from pgjax.models.reward_model import from_causal_lm
from pgjax.rollout.sample import sample
from tests.compare import assert_close
from tests.family_checks import (
    MASK,
    TOKENS,
    applied,
    greedy,
    logits,
    lora,
    of_page,
    opened,
    reward_model,
    save,
    sharded,
)
from tests.family_models import CASES
from tests.sizes import campaign_but_for

WINDOWS, EXPERTS = "gemma3", "qwen3_moe"  # windows, two thetas, norms behind; experts


@pytest.mark.parametrize("case", CASES)
def test_logits_are_torchs(case):
    logits(case)


@pytest.mark.parametrize("case", campaign_but_for(CASES, WINDOWS, EXPERTS))
def test_greedy_tokens_are_those_of_generate_and_the_cache_is_teacher_forcing(case):
    greedy(case)


@pytest.mark.parametrize("case", campaign_but_for(CASES, WINDOWS))
def test_gradients_are_finite_and_the_same_on_every_mesh(case):
    sharded(case)


@pytest.mark.parametrize("case", campaign_but_for(CASES, "phi3"))
def test_adapters_beside_and_inside_the_kernels_are_one_function(case):
    lora(case)


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_is_the_file_that_transformers_wrote(case):
    save(case)


@pytest.mark.parametrize("case", campaign_but_for(CASES, "gpt_neox", "granite"))
def test_a_reward_model_scores_as_torchs_and_is_saved_as_it_was_read(case):
    reward_model(case)


LM, PARAMS = opened(WINDOWS)


def test_a_fused_kernel_has_the_windows_and_the_thetas_of_each_layer():
    fused = causal_lm(LM.arch, kernel="xla")
    found, expected = (np.asarray(applied(lm, PARAMS, TOKENS, MASK))[MASK] for lm in (fused, LM))
    assert_close(found, expected, of_max=1e-5)


@pytest.mark.campaign
def test_rows_of_a_group_and_texts_in_one_row_see_the_windows_that_they_see_alone():
    row, width = TOKENS[0], TOKENS.shape[1]
    alone = np.asarray(applied(LM, PARAMS, row[None], None))[0]
    group = np.stack([row, np.where(np.arange(width) < 7, row, 63 - row)])
    states = [LM.hidden(PARAMS, group, None, **options) for options in ({}, {"prompt_length": 7, "group_size": 2})]
    assert_close(states[1], states[0], of_max=1e-5)
    packed, ids = np.concatenate([row[:5], row]), np.repeat([1, 2], [5, width])
    found = jax.jit(LM.apply)(PARAMS, packed[None], None, ids[None].astype(np.int32))[0]
    assert_close(found, np.concatenate([alone[:5], alone]), of_max=1e-5)


def test_a_layer_with_a_window_caches_no_more_than_the_window():
    sizes = [keys.shape[2] for keys, _ in LM.init_cache(1, 20)]
    assert sizes == [4, 20, 20, 4] and {keys.shape[2] for keys, _ in LM.init_cache(1, 4)} == {4}


def test_a_cap_on_scores_is_not_left_out_by_a_kernel_that_has_none():
    with pytest.raises(pg.UserError, match="kernel='xla' has no cap on the scores"):
        causal_lm(opened("gemma2")[0].arch, kernel="xla")


@pytest.mark.campaign
def test_what_was_drawn_has_the_probability_that_one_pass_gives_it():
    lm, params = opened("gemma2")  # windows that the completion leaves behind, capped scores and logits
    rollout = sample(lm, params, TOKENS, MASK, jax.random.key(0), max_new_tokens=8)
    states = jax.jit(lm.hidden)(params, rollout.tokens, rollout.attention_mask)
    found = head_logprobs(states, lm.unembedding(params), rollout.tokens, logit_cap=lm.arch.logit_cap)
    assert_close(np.where(rollout.mask, found, 0.0), rollout.logprobs, 1e-5)


def test_a_reward_model_reads_states_before_the_scale_of_logits():
    lm, params = opened("granite")
    rm, new = from_causal_lm(lm, params, jax.random.key(0))
    states = jax.jit(lm.hidden)(params, TOKENS, MASK)[:, -1]
    assert_close(jax.jit(rm.features)(new, TOKENS, MASK), 7.0 * states, of_max=1e-6)


@pytest.mark.parametrize("case", campaign_but_for(["gemma2", "qwen3_moe", "cohere2"], "gemma2"))
def test_in_16_bits_logits_are_near_those_in_32(case):
    lm, params = opened(case)
    exact, rounded = (applied(lm, params, TOKENS, MASK) for lm in (lm, causal_lm(lm.arch, dtype=jnp.bfloat16)))
    off = np.abs(np.asarray(rounded) - np.asarray(exact))[MASK]
    assert np.median(off) < 0.03 * np.abs(exact).max()  # a router may choose otherwise for a few tokens


def test_the_page_has_a_row_for_every_family_and_none_that_fails():
    rows = [line.strip("| \n").split(" | ") for line in of_page().splitlines()[2:]]
    assert {row[0] for row in rows} == FAMILIES.keys() - {"gpt2"}  # it has tests of its own
    assert all(cell == "yes" for row in rows for cell in row[1:])
