"""From logits to a token: the filters against NumPy and transformers, the draws against their distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from pgjax.rollout import filters
from pgjax.rollout.filters import at_or_above_threshold, draw, filter_logits
from tests.compare import assert_close
from tests.core_in_numpy import log_softmax

VOCAB = 12
filter_jit = jax.jit(filter_logits)  # options are data: one program for all of them


def filtered(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """filter_logits with every option given as a number, None being the value that keeps all."""
    rows = np.atleast_2d(np.asarray(logits, np.float32))
    options = {"top_k": rows.shape[1] if top_k is None else top_k, "top_p": top_p or 1.0, "min_p": min_p or 0.0}
    out = np.asarray(filter_jit(rows, temperature=temperature, **options))
    return out if np.ndim(logits) == 2 else out[0]


def numpy_filter(row, temperature, top_k, top_p, min_p):
    """One row in float64 by sorting, in the order of Hugging Face; also how near any decision was to its border."""
    z, margin = log_softmax(np.asarray(row, np.float64) / temperature), np.inf
    z = np.where(z >= np.sort(z)[::-1][min(top_k, len(z)) - 1], z, -np.inf)
    z = log_softmax(z)
    if top_p < 1:
        best_first = np.sort(z)[::-1]
        reached = np.cumsum(np.exp(best_first))
        margin = np.abs(reached - top_p).min()
        z = np.where(z >= best_first[np.argmax(reached >= top_p)], z, -np.inf)
        z = log_softmax(z)
    probabilities = np.exp(z)
    margin = min(margin, np.abs(probabilities - min_p * probabilities.max()).min() if min_p > 0 else np.inf)
    return log_softmax(np.where(probabilities >= min_p * probabilities.max(), z, -np.inf)), margin


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    eighths=st.lists(st.integers(-64, 64), min_size=VOCAB, max_size=VOCAB),  # ties are common
    temperature=st.sampled_from([0.25, 0.7, 1.0, 1.5]),
    top_k=st.integers(1, VOCAB + 3),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.6]),
)
def test_filters_equal_numpy_in_the_order_of_hugging_face(eighths, temperature, top_k, top_p, min_p):
    row = np.array(eighths) / 8
    expected, margin = numpy_filter(row, temperature, top_k, top_p, min_p)
    assume(margin > 1e-5)
    actual = filtered(row, temperature, top_k, top_p, min_p)
    assert np.array_equal(np.isneginf(actual), np.isneginf(expected))
    kept = np.isfinite(expected)
    assert_close(actual[kept], expected[kept], 1e-4)


def test_filters_equal_the_warpers_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    logits = np.random.default_rng(0).standard_normal((64, 40)).astype(np.float32) * 3
    for temperature, top_k, top_p, min_p in [(0.7, 5, 0.9, 0.1), (1.3, 40, 0.5, 0.01), (1.0, 20, 0.95, 0.3)]:
        theirs = torch.tensor(logits)
        warpers = [hf.TemperatureLogitsWarper(temperature), hf.TopKLogitsWarper(top_k)]
        for warper in [*warpers, hf.TopPLogitsWarper(top_p), hf.MinPLogitsWarper(min_p)]:
            theirs = warper(None, theirs)
        expected, actual = torch.log_softmax(theirs, -1).numpy(), filtered(logits, temperature, top_k, top_p, min_p)
        assert np.array_equal(np.isneginf(actual), np.isneginf(expected))
        assert_close(np.exp(actual), np.exp(expected), 1e-5)


ROW = np.array([1.0, 3.0, -2.0, 3.0, 0.5, -np.inf], np.float32)  # a tie for the best, a forbidden token
ALL = [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, ALL),
        ({"top_k": 1}, [1, 3]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 3}, [0, 1, 3]),
        ({"top_k": 1000}, ALL),
        ({"top_p": 1.0}, ALL),
        ({"top_p": 1e-9}, [1, 3]),
        ({"min_p": 0.0}, ALL),
        ({"min_p": 1.0}, [1, 3]),
        ({"top_k": 6, "top_p": 0.99999, "min_p": 1e-9}, ALL),
        ({"temperature": 0.0}, [1]),
        ({"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.5}, [1]),
        ({"temperature": 1e-4}, [1, 3]),
    ],
)
def test_edges_keep_what_they_should_and_stay_normalised(options, kept):
    out = filtered(ROW, **options)
    assert np.flatnonzero(np.exp(out) > 0).tolist() == kept or options == {"temperature": 1e-4}
    assert np.flatnonzero(np.exp(out) > 1e-9).tolist() == kept
    assert not np.isnan(out).any() and np.exp(out).sum() == pytest.approx(1, abs=1e-6)


def test_top_p_of_one_drops_nothing_beside_another_filter():
    # The bug: the sum of float32 probabilities reaches 1 before the unlikely tokens are in it.
    out = filtered([0.0, -20.0, -30.0, -40.0], top_k=3, top_p=1.0)
    assert_close(out[:3], [0.0, -20.0, -30.0], 1e-4)
    assert np.isneginf(out[3])


def test_none_is_off_and_other_dtypes_become_float32():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((3, VOCAB)), jnp.bfloat16)
    out = filter_logits(logits, temperature=2.0, top_k=None, top_p=None, min_p=None)
    assert out.dtype == jnp.float32
    assert_close(out, log_softmax(np.asarray(logits, np.float64) / 2), 1e-5)
    with pytest.raises(AssertionError):
        filter_logits(logits[0])


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_a_shard_map_rows_are_filtered_alike(check_vma):
    logits, options = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32), {"top_k": 5, "top_p": 0.8}
    mesh, rows = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,)), jax.P("rows")
    mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=rows)
    found = jax.jit(mapped(lambda x: filter_logits(x, **options), check_vma=check_vma))(logits)
    np.testing.assert_array_equal(found, filter_logits(logits, **options))


NUMBERS = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 1e-45])
marked = jax.jit(lambda x, count: at_or_above_threshold(x, lambda keep: keep.sum(1) >= count))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(row=st.lists(NUMBERS, min_size=8, max_size=8), count=st.integers(1, 10))
def test_the_threshold_is_exact_with_ties_signs_zeros_and_infinities(row, count):
    x = np.array([row], np.float32)
    expected = x >= np.sort(x[0])[::-1][min(count, 8) - 1]
    assert np.array_equal(marked(x, count), expected)


def chi_square(counts, probabilities):
    """Pearson's statistic and its 1 - 1e-4 quantile; tokens of probability 0 must not occur."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = counts.sum() * probabilities[possible]
    assert expected.min() > 5
    return ((counts[possible] - expected) ** 2 / expected).sum(), chi2.isf(1e-4, possible.sum() - 1)


@functools.partial(jax.jit, static_argnums=2)
def draws(logprobs, key, count):
    """Draw `count` rows at two positions each, with the row's own key."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    rows = jnp.broadcast_to(logprobs, (count, logprobs.shape[0]))
    return [draw(rows, keys, jnp.full(count, p, jnp.int32))[0] for p in (3, 4)]


LOGITS = np.array([0.6, -1.5, 2.4, 0.0, -0.7, 1.4, -3.0, 1.0], np.float32)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1, "temperature": 1.3}]
)
def test_draws_have_the_distribution_that_is_reported_and_no_other(options):
    logprobs = filtered(LOGITS, **options)
    first, second = (np.asarray(x) for x in draws(logprobs, jax.random.key(7), 40_000))
    assert first.dtype == np.int32
    p = np.exp(np.float64(logprobs))
    p /= p.sum()
    for tokens in (first, second):
        statistic, limit = chi_square(np.bincount(tokens, minlength=8), p)
        assert statistic < limit
    wrong = np.where(p > 0, p, 1) ** (1 / 1.1) * (p > 0)  # a temperature 10% off is seen
    statistic, limit = chi_square(np.bincount(np.concatenate([first, second]), minlength=8), wrong / wrong.sum())
    assert statistic > limit


def test_greedy_tells_apart_logits_that_log_softmax_rounds_to_a_tie():
    logits = np.zeros((1, 1000), np.float32)
    logits[0, 3] = 1e-7
    assert np.flatnonzero(filtered(logits, temperature=0.0)[0] == 0).tolist() == [3]


def test_rows_and_positions_are_independent():
    # The bug: one draw used twice, along the sequence or across the rows.
    first, second = (np.asarray(x) for x in draws(filtered(LOGITS, temperature=2.0), jax.random.key(3), 20_000))
    p = np.exp(np.float64(filtered(LOGITS, temperature=2.0)))
    joint = np.outer(p, p).reshape(-1) / p.sum() ** 2
    for one, other in ((first, second), (first, np.roll(first, 1))):
        statistic, limit = chi_square(np.bincount(one * 8 + other, minlength=64), joint)
        assert statistic < limit
    statistic, limit = chi_square(np.bincount(first * 9, minlength=64), joint)
    assert statistic > limit


def test_a_draw_is_a_function_of_its_row_key_and_position():
    keys = jax.random.split(jax.random.key(0), 64)
    rows = jnp.broadcast_to(jnp.asarray(filtered(LOGITS)), (64, 8))
    positions = jnp.arange(64, dtype=jnp.int32)
    draw = jax.jit(lambda *args: filters.draw(*args)[0])
    tokens = draw(rows, keys, positions)
    assert np.array_equal(draw(rows[::-1], keys[::-1], positions[::-1]), tokens[::-1])
    elsewhere = jnp.where(positions[:, None] == 5, rows, rows[:, ::-1])  # the other rows want other tokens
    assert draw(elsewhere, keys, positions)[5] == tokens[5]
    assert not np.array_equal(draw(rows, keys, positions + 1), tokens)
    assert not np.array_equal(draw(rows, keys[::-1], positions), tokens)
