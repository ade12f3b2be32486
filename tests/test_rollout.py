"""What pg.sample returns: masks, log-probabilities of what was sampled from, rows that are on their own."""

import importlib.metadata

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.stats import chi2

from pgjax.core.logprobs import token_logprobs
from pgjax.rollout.filters import filter_logits
from pgjax.rollout.sample import Rollout, sample
from tests.compare import assert_close
from tests.sizes import SOME_FAMILIES, campaign_but_for
from tests.tiny import left_padded, tiny_apply, tiny_lm, tiny_params

LENGTHS = (7, 4, 1, 5)
WIDTH, NEW = 7, 9
PROMPTS, PROMPT_MASK = left_padded(LENGTHS, WIDTH)
KEY = jax.random.key(11)


def roll(name="gpt2", prompts=PROMPTS, mask=PROMPT_MASK, key=KEY, dtype="float32", **options):
    """Sample from a tiny model; all calls of one model and batch share a program."""
    options = {"max_new_tokens": NEW, **options}
    return jax.device_get(sample(tiny_lm(name, dtype), tiny_params(name), prompts, mask, key, **options))


def forced(rollout: Rollout, name="gpt2", dtype="float32"):
    """The logits of the whole sequence at once, without a cache."""
    return tiny_apply(name, dtype)(tiny_params(name), rollout.tokens, rollout.attention_mask)


def completions(rollout: Rollout):
    """The sampled tokens of each row."""
    return [row[mask].tolist() for row, mask in zip(rollout.tokens, rollout.mask, strict=True)]


filter_rows = jax.jit(filter_logits)
FILTERS_OFF = {"temperature": 1.0, "top_k": 23, "top_p": 1.0, "min_p": 0.0}
EOS = (3, 8, 17, 21, 5)  # so many that rows stop at different lengths


@pytest.mark.campaign
@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01}, {"temperature": 0.0}])
def test_with_64_bits_enabled_the_same_is_sampled(options):
    expected = roll("llama", **options)
    with jax.enable_x64(True):
        found = roll("llama", **options)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pad_id", [3, 0])
def test_fields_mean_what_they_say_also_when_pad_is_an_end_of_sequence(pad_id):
    # The bugs: mask = tokens != pad loses the real end of sequence; positions after the end that look sampled.
    # An end of sequence in the prompt ends nothing.
    prompts = PROMPTS.copy()
    prompts[0, 0] = prompts[1, -1] = 3
    rollout = roll(prompts=prompts, eos_ids=EOS, pad_id=pad_id)
    assert {x.shape for x in rollout} == {(4, WIDTH + NEW)}
    assert [x.dtype.name for x in rollout] == ["int32", "bool", "bool", "float32"]
    ends = []
    for row, length in enumerate(LENGTHS):
        tokens = rollout.tokens[row, WIDTH:]
        stops = np.flatnonzero(np.isin(tokens, EOS))
        end = stops[0] + 1 if len(stops) else NEW
        ends.append(end)
        assert rollout.mask[row].tolist() == [False] * WIDTH + [True] * end + [False] * (NEW - end)
        assert (tokens[end:] == pad_id).all() and (rollout.tokens[row, : WIDTH - length] == pad_id).all()
        assert np.array_equal(rollout.tokens[row, WIDTH - length : WIDTH], prompts[row, WIDTH - length :])
    prompt = np.pad(PROMPT_MASK, ((0, 0), (0, NEW)))
    assert np.array_equal(rollout.attention_mask, prompt | rollout.mask)
    assert (rollout.logprobs[~rollout.mask] == 0).all() and (rollout.logprobs[rollout.mask] < 0).all()
    assert len(set(ends)) > 1 and min(ends) < NEW  # so the above says something


def test_whichever_stop_token_is_set_ends_the_row_and_none_never():
    # The bug: a stop token other than the tokenizer's own never fires.
    free = roll()
    assert free.mask.sum(1).tolist() == [NEW] * 4
    for stop in {int(free.tokens[0, WIDTH + 2]), int(free.tokens[3, WIDTH + 5])}:
        stopped = completions(roll(eos_ids=[stop]))
        for row, whole in enumerate(completions(free)):
            end = whole.index(stop) + 1 if stop in whole else NEW
            assert stopped[row] == whole[:end]


def test_the_same_key_samples_the_same_and_every_other_key_and_row_something_else():
    # The bug: a fixed key, or one draw for all rows.
    prompts, mask = (np.repeat(x[:1], 4, axis=0) for x in (PROMPTS, PROMPT_MASK))
    once, again, other = (completions(roll(prompts=prompts, mask=mask, key=k)) for k in (KEY, KEY, jax.random.key(12)))
    assert once == again
    assert len({tuple(row) for row in once + other}) == 8


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_row_depends_on_its_number_and_prompt_not_on_neighbours_padding_or_batch(name):
    rows = completions(roll(name, eos_ids=EOS))
    wide_prompts, wide_mask = left_padded(LENGTHS, 15)  # one more prompt width
    assert completions(roll(name, wide_prompts, wide_mask, eos_ids=EOS)) == rows
    others, other_mask = left_padded((7, 6, 1, 2), 9)  # rows 0 and 2 as before, between other neighbours
    mixed = completions(roll(name, others, other_mask, eos_ids=EOS))
    assert (mixed[0], mixed[2]) == (rows[0], rows[2]) and mixed[1] != rows[1]
    if name == "gpt2":  # other shapes are other programs: one model will do
        far, far_mask = left_padded(LENGTHS[:1], 256 - NEW)  # alone, and in the longest bucket
        assert completions(roll(name, far, far_mask, eos_ids=EOS)) == rows[:1]


def test_sharding_the_batch_changes_nothing():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    prompts, mask = jax.device_put((PROMPTS, PROMPT_MASK), split)
    params = jax.device_put(tiny_params("gpt2"), whole)
    rollout = sample(tiny_lm("gpt2"), params, prompts, mask, KEY, max_new_tokens=NEW, eos_ids=EOS)
    expected = roll(eos_ids=EOS)
    for x, y in zip(rollout[:3], expected[:3], strict=True):
        assert np.array_equal(x, y)
    assert_close(rollout.logprobs, expected.logprobs, 1e-5)


@pytest.mark.parametrize("check_vma", campaign_but_for([True, False], False))
def test_inside_the_callers_shard_map_each_device_samples_its_rows(check_vma):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def here(params, prompts, mask):
        key = jax.random.fold_in(KEY, jax.lax.axis_index("data"))
        return sample(tiny_lm("llama"), params, prompts, mask, key, max_new_tokens=NEW, eos_ids=EOS)

    mapped = jax.shard_map(here, mesh=mesh, in_specs=(whole, rows, rows), out_specs=rows, check_vma=check_vma)
    found = jax.jit(mapped)(tiny_params("llama"), PROMPTS, PROMPT_MASK)
    for device, half in enumerate((slice(2), slice(2, 4))):
        key = jax.random.fold_in(KEY, device)
        expected = roll("llama", PROMPTS[half], PROMPT_MASK[half], key, eos_ids=EOS)
        for x, y in zip(found[:3], expected[:3], strict=True):
            assert np.array_equal(x[half], y)
        assert_close(found.logprobs[half], expected.logprobs, 1e-5)


@pytest.mark.parametrize("name", SOME_FAMILIES)
def test_sampled_logprobs_equal_teacher_forcing_at_the_same_temperature(name):
    for temperature in (1.0, 0.7, 2.0):
        rollout = roll(name, temperature=temperature, eos_ids=EOS)
        expected = token_logprobs(forced(rollout, name), rollout.tokens, temperature=temperature)
        assert_close(rollout.logprobs, np.where(rollout.mask, expected, 0), 1e-4)
    off = token_logprobs(forced(rollout, name), rollout.tokens, temperature=1.0)
    assert np.abs(rollout.logprobs - off)[rollout.mask].max() > 0.1  # another temperature would be seen


@pytest.mark.parametrize("options", [{"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2, "temperature": 1.5}])
def test_with_filters_logprobs_are_those_of_the_filtered_distribution(options):
    rollout = roll(**options)
    logits = np.asarray(forced(rollout))
    expected = filter_rows(logits[:, WIDTH - 1 : -1].reshape(-1, 23), **{**FILTERS_OFF, **options})
    expected = np.asarray(expected)[np.arange(4 * NEW), rollout.tokens[:, WIDTH:].reshape(-1)]
    assert_close(rollout.logprobs[:, WIDTH:].reshape(-1), expected, 1e-4)
    plain = np.asarray(token_logprobs(logits, rollout.tokens))
    assert (rollout.logprobs - plain)[rollout.mask].max() > 0.1


@pytest.mark.parametrize("name", SOME_FAMILIES)
def test_greedy_takes_the_likeliest_token_at_every_step(name):
    rollout = roll(name, temperature=0.0, top_k=7)
    best = np.asarray(forced(rollout, name)).argmax(-1)
    assert np.array_equal(rollout.tokens[:, WIDTH:], best[:, WIDTH - 1 : -1])
    assert (rollout.logprobs == 0).all()
    assert np.array_equal(roll(name, temperature=0, key=jax.random.key(99)).tokens, rollout.tokens)


@pytest.mark.skipif(
    importlib.metadata.version("jaxlib") == "0.10.0" and jax.default_backend() == "cpu",
    reason="XLA of jaxlib 0.10.0 cannot run this product of bfloat16 on a CPU",
)
def test_bfloat16_samples_and_stays_near_its_own_teacher_forcing():
    rollout = roll("llama", dtype="bfloat16")
    expected = token_logprobs(forced(rollout, "llama", "bfloat16"), rollout.tokens)
    assert rollout.logprobs.dtype == np.float32
    assert_close(rollout.logprobs, np.where(rollout.mask, expected, 0), 0.15)


@pytest.mark.campaign
def test_pairs_of_tokens_occur_as_often_as_teacher_forcing_says():
    # Every step may be right and the whole wrong: one draw used at two steps, a cache that belongs to another row.
    count, prompts, mask = 4096, *left_padded((3,), 3)
    many = {"prompts": prompts.repeat(count, 0), "mask": mask.repeat(count, 0)}
    rollout = roll(**many, temperature=0.8, top_k=4, max_new_tokens=2)
    grid = np.array([[a, b] for a in range(23) for b in range(23)], np.int32)
    pairs = np.concatenate([prompts.repeat(529, 0), grid], axis=1)
    logits = np.asarray(tiny_apply("gpt2")(tiny_params("gpt2"), pairs))
    of_token = [np.asarray(filter_logits(x, temperature=0.8, top_k=4)) for x in (logits[:, 2], logits[:, 3])]
    pair = sum(x[np.arange(529), grid[:, i]].astype(np.float64) for i, x in enumerate(of_token))
    expected = count * np.exp(pair)
    counts = np.bincount(rollout.tokens[:, 3] * 23 + rollout.tokens[:, 4], minlength=529)
    assert expected.sum() == pytest.approx(count, rel=1e-4) and counts[expected == 0].sum() == 0
    often = expected > 5
    assert often.sum() >= 8

    def statistic(expected):
        pooled = [np.append(x[often], x[~often].sum()) for x in (counts, expected)]
        return ((pooled[0] - pooled[1]) ** 2 / np.maximum(pooled[1], 1)).sum()

    limit = chi2.isf(1e-4, often.sum())
    assert statistic(expected) < limit
    independent = np.outer(*(expected.reshape(23, 23).sum(axis) for axis in (1, 0))).reshape(-1) / count
    assert statistic(independent) > limit
