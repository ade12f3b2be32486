"""Every family against torch: what `tests/family_checks.py` checks, a few families in the default run, all in the campaign."""

import pytest

from tests.family_checks import greedy, logits, lora, reward_model, save, sharded
from tests.family_models import CASES
from tests.sizes import campaign_but_for

WINDOWS, EXPERTS = "gemma3", "qwen3_moe"  # windows, two thetas, norms behind; experts


@pytest.mark.parametrize("case", CASES)
def test_logits_are_torchs(case):
    logits(case)


@pytest.mark.parametrize("case", campaign_but_for(CASES, WINDOWS, "smollm3", "gpt_neox_serial", EXPERTS))
def test_greedy_tokens_are_those_of_generate_and_the_cache_is_teacher_forcing(case):
    greedy(case)


@pytest.mark.parametrize("case", campaign_but_for(CASES, WINDOWS, EXPERTS))
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
