"""How pg.sample runs: compiled once for a bucket, no hidden transfer, early exit, under jit, and one clear error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.core.logprobs import token_logprobs
from pgjax.rollout.sample import sample
from tests.tiny import left_padded, tiny_apply, tiny_lm, tiny_params

PROMPTS, PROMPT_MASK = left_padded((7, 4, 1, 5), 7)
NEW, KEY = 9, jax.random.key(11)


def counting_lm():
    """A model that counts how often it is traced and how many decode steps run."""
    lm, traces, steps = tiny_lm("gpt2"), [], []

    def prefill(*args):
        traces.append(1)
        return lm.prefill(*args)

    def decode(*args):
        jax.debug.callback(lambda: steps.append(1))
        return lm.decode(*args)

    return lm._replace(prefill=prefill, decode=decode), traces, steps


def test_options_ids_keys_and_lengths_in_a_bucket_compile_nothing_new_and_rows_that_ended_stop_the_loop():
    lm, traces, steps = counting_lm()
    params = tiny_params("gpt2")

    def run(prompts=PROMPTS, mask=PROMPT_MASK, key=KEY, **options):
        steps.clear()
        rollout = jax.block_until_ready(sample(lm, params, prompts, mask, key, max_new_tokens=NEW, **options))
        jax.effects_barrier()
        return rollout, len(steps)

    greedy, ran = run(temperature=0.0)
    assert ran == NEW - 1  # the first token comes from the prefill
    ends = np.asarray(greedy.tokens)[:, 7 + 1].tolist()
    stopped, ran = run(temperature=0.0, eos_ids=ends)  # every row has ended after its second token at the latest
    assert ran <= 1 and np.asarray(stopped.mask).sum(1).max() <= 2
    rollout, ran = run(eos_ids=range(23)[:8], pad_id=9)
    assert ran == np.asarray(rollout.mask).sum(1).max() - 1

    run(temperature=0.7, top_k=3, top_p=0.9, min_p=0.05)
    run(temperature=np.float32(2), top_p=1.0, eos_ids=(1,))
    run(temperature=jnp.float32(0.5), top_k=jnp.int32(5), key=jax.random.key(3))
    run(temperature=1, eos_ids=[4, 5, 6], pad_id=3)
    for width in (8, 12, 16):
        run(*left_padded((7, 4, 1, 5), width))
    run(jnp.asarray(PROMPTS), jnp.asarray(PROMPT_MASK))
    assert len(traces) == 1


@pytest.mark.parametrize("put", [np.asarray, jax.device_put])
def test_a_second_call_makes_no_hidden_transfer(put):
    lm, params, prompts, mask = tiny_lm("gpt2"), tiny_params("gpt2"), put(PROMPTS), put(PROMPT_MASK)
    run = lambda temperature: sample(
        lm, params, prompts, mask, KEY, max_new_tokens=NEW, temperature=temperature, eos_ids=(2,), top_p=0.9
    )
    run(1.0)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(run(0.8))


def test_sample_works_inside_a_users_jit():
    lm, params = tiny_lm("gpt2"), tiny_params("gpt2")
    call = lambda params, prompts, mask, key, temperature: sample(
        lm, params, prompts, mask, key, max_new_tokens=NEW, temperature=temperature, top_k=6, eos_ids=(2, 5)
    )
    args = params, PROMPTS, PROMPT_MASK, KEY
    inside, outside = jax.jit(call)(*args, jnp.float32(0.9)), call(*args, 0.9)
    for x, y in zip(inside[:3], outside[:3], strict=True):
        assert np.array_equal(x, y)
    np.testing.assert_allclose(inside.logprobs, outside.logprobs, atol=1e-5)


def right_padded(mask):
    return mask[:, ::-1]


def hole(mask):
    return mask & (np.arange(7) != 3)


def empty_row(mask):
    return mask & (np.arange(4) != 2)[:, None]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_new_tokens": 250}, ["7 tokens", "250", "257", "256"]),
        ({"max_new_tokens": 0}, ["max_new_tokens", "0"]),
        ({"pad_id": -5}, ["pad_id", "-5"]),
        ({"max_new_tokens": 2.0}, ["max_new_tokens", "2.0"]),
        ({"group_size": 2.0}, ["group_size", "2.0"]),
        ({"temperature": -0.5}, ["temperature", "-0.5"]),
        ({"temperature": float("nan")}, ["temperature", "nan"]),
        ({"temperature": float("inf")}, ["temperature", "inf"]),
        ({"top_k": 0}, ["top_k", "0"]),
        ({"top_k": 2.5}, ["top_k", "2.5"]),
        ({"top_k": 2**40}, ["top_k", "1099511627776"]),
        ({"temperature": np.ones(2)}, ["temperature", "[1. 1.]"]),
        ({"top_p": 0.0}, ["top_p", "0.0"]),
        ({"top_p": np.float32(1.5)}, ["top_p", "1.5"]),
        ({"min_p": -0.25}, ["min_p", "-0.25"]),
        ({"min_p": 2}, ["min_p", "2"]),
        ({"eos_ids": (1, 23)}, ["eos_ids", "23"]),
        ({"eos_ids": (-1,)}, ["eos_ids", "-1", "23"]),
        ({"eos_ids": (2.5,)}, ["eos_ids", "2.5"]),
        ({"eos_ids": 2}, ["eos_ids", "2"]),
        ({"prompts": PROMPTS * 0.5}, ["prompts", "float64"]),
        ({"prompt_mask": PROMPT_MASK[:, 1:]}, ["(4, 7)", "(4, 6)"]),
        ({"prompts": PROMPTS[0], "prompt_mask": PROMPT_MASK[0]}, ["(7,)"]),
        ({"prompts": PROMPTS[:0], "prompt_mask": PROMPT_MASK[:0]}, ["(0, 7)"]),
        ({"prompt_mask": right_padded(PROMPT_MASK)}, ["row 1", "prompt_mask"]),
        ({"prompt_mask": hole(PROMPT_MASK)}, ["row 0", "prompt_mask"]),
        ({"prompt_mask": empty_row(PROMPT_MASK)}, ["row 2", "prompt_mask"]),
    ],
)
def test_what_cannot_be_meant_is_one_error_with_its_numbers(changes, named):
    arguments = {"prompts": PROMPTS, "prompt_mask": PROMPT_MASK, "key": KEY, "max_new_tokens": NEW, **changes}
    with pytest.raises(ValueError) as raised:
        sample(tiny_lm("gpt2"), tiny_params("gpt2"), **arguments)
    assert all(text in str(raised.value) for text in named), str(raised.value)


def test_a_prompt_that_just_fits_is_sampled():
    prompts, mask = left_padded((256 - NEW,), 256 - NEW)
    lm, params = tiny_lm("gpt2"), tiny_params("gpt2")
    rollout = sample(lm, params, prompts, mask, KEY, max_new_tokens=NEW)
    assert rollout.tokens.shape == (1, 256) and np.asarray(rollout.mask).sum() == NEW
    expected = token_logprobs(tiny_apply("gpt2")(params, rollout.tokens), rollout.tokens)
    np.testing.assert_allclose(rollout.logprobs[:, -NEW:], expected[:, -NEW:], atol=1e-4)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_prompts_that_cannot_be_meant_are_refused_wherever_they_lie(array):
    lm, params = tiny_lm("gpt2"), tiny_params("gpt2")
    good, mask = np.ones((2, 3), np.int32), np.ones((2, 3), bool)
    right_padded = np.array([[True, True, True], [True, True, False]])
    options = {"key": jax.random.key(0), "max_new_tokens": 1}
    with pytest.raises(ValueError, match="row 1 of prompt_mask"):
        sample(lm, params, array(good), array(right_padded), **options)
    with pytest.raises(ValueError, match="row 0 of prompts holds the id 100000"):
        sample(lm, params, array(good * 100_000), array(mask), **options)
    with pytest.raises(ValueError, match="top_p must be above 0"):
        sample(lm, params, array(good), array(mask), **options, top_p=jnp.float32(-2.0))


def test_positions_beyond_the_table_are_never_clamped_in_silence():
    lm, params = tiny_lm("gpt2"), tiny_params("gpt2")
    tokens = jnp.ones((1, lm.arch.max_positions + 1), jnp.int32)
    with pytest.raises(ValueError, match=f"but the model has {lm.arch.max_positions} positions"):
        lm.apply(params, tokens)
    logits = lm.apply(params, tokens, jnp.ones(tokens.shape, bool))
    assert np.isnan(logits[:, -1]).all()
