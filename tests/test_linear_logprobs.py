"""Log-probabilities and entropies without [B, T, V]: same numbers, same gradients, little memory, any mesh."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from pgjax.core.linear_logprobs import linear_token_logprobs, linear_token_logprobs_and_entropy
from pgjax.core.logprobs import token_entropy, token_logprobs
from pgjax.models.heads import head_logprobs, head_logprobs_and_entropy
from tests import core_in_numpy
from tests.compare import assert_close
from tests.compile_options import AS_FOR_USERS
from tests.sizes import campaign_but_for

pytestmark = pytest.mark.usefixtures("full_compiles")  # some look at memory and at what is sent

RNG = np.random.default_rng(0)
BATCH, LENGTH, VOCAB, WIDTH = 4, 6, 11, 3
HIDDEN = jnp.asarray(RNG.standard_normal((BATCH, LENGTH, WIDTH)), jnp.float32)
UNEMBEDDING = jnp.asarray(RNG.standard_normal((VOCAB, WIDTH)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32)
WEIGHTS = jnp.asarray(RNG.standard_normal((BATCH, LENGTH)), jnp.float32)


def plain(hidden, unembedding, tokens, temperature=1.0):
    logits = jnp.einsum("btd,vd->btv", hidden, unembedding, preferred_element_type=jnp.float32)
    return token_logprobs(logits, tokens, temperature=temperature)


def plain_loss(hidden, unembedding, tokens=TOKENS, weights=WEIGHTS, temperature=1.0):
    return jnp.sum(weights * jnp.sin(plain(hidden, unembedding, tokens, temperature)))


def linear_loss(hidden, unembedding, tokens=TOKENS, weights=WEIGHTS, **options):
    return jnp.sum(weights * jnp.sin(linear_token_logprobs(hidden, unembedding, tokens, **options)))


def plain_both(hidden, unembedding, tokens=TOKENS, temperature=1.0):
    logits = jnp.einsum("btd,vd->btv", hidden, unembedding, preferred_element_type=jnp.float32)
    return token_logprobs(logits, tokens, temperature=temperature), token_entropy(logits, temperature=temperature)


def mixed_loss(function, hidden, unembedding, tokens=TOKENS, weights=WEIGHTS, **options):
    """A loss to which every token's log-probability and entropy contributes, each with a weight of its own."""
    logprobs, entropy = function(hidden, unembedding, tokens, **options)
    return jnp.sum(weights * jnp.sin(logprobs) + (weights - 0.5) * jnp.square(entropy))


def linear_mixed_loss(*arrays, **options):
    return mixed_loss(linear_token_logprobs_and_entropy, *arrays, **options)


def plain_mixed_loss(*arrays, **options):
    return mixed_loss(plain_both, *arrays, **options)


def mesh_of(data, fsdp):
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def assert_same(tree, expected, *, rtol=1e-5, atol=5e-6):
    assert_close(tree, expected, atol, rtol=rtol, equal_nan=True)  # ids outside of the vocabulary


def both(loss, *arrays, **options):
    """Value and gradients of a loss with respect to hidden and unembedding."""
    return jax.jit(jax.value_and_grad(partial(loss, **options), argnums=(0, 1)))(*arrays)


EXPECTED = both(plain_loss, HIDDEN, UNEMBEDDING)


@pytest.mark.parametrize(
    ("chunk_size", "temperature"),
    campaign_but_for([(1, 0.7), (4, 1.0), (10, 0.7), (11, 1.0), (1000, 0.7)], (4, 1.0), (1000, 0.7)),
)
def test_values_and_gradients_equal_the_plain_ones(chunk_size, temperature):
    expected = both(plain_loss, HIDDEN, UNEMBEDDING, temperature=temperature)
    assert_same(both(linear_loss, HIDDEN, UNEMBEDDING, temperature=temperature, chunk_size=chunk_size), expected)
    logprobs = linear_token_logprobs(HIDDEN, UNEMBEDDING, TOKENS, temperature=temperature, chunk_size=chunk_size)
    assert_same(logprobs, jax.jit(plain)(HIDDEN, UNEMBEDDING, TOKENS, temperature))
    expected = both(plain_mixed_loss, HIDDEN, UNEMBEDDING, temperature=temperature)
    found = both(linear_mixed_loss, HIDDEN, UNEMBEDDING, temperature=temperature, chunk_size=chunk_size)
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["logprobs", "entropy"])
def test_each_output_alone_equals_the_plain_one(name):
    pick = lambda function: lambda h, w: function(h, w, TOKENS)[name == "entropy"]
    plain_one, linear_one = pick(plain_both), pick(partial(linear_token_logprobs_and_entropy, chunk_size=4))
    assert_same(linear_one(HIDDEN, UNEMBEDDING), plain_one(HIDDEN, UNEMBEDDING))
    loss = lambda function: lambda h, w: jnp.sum(WEIGHTS * function(h, w))
    assert_same(both(loss(linear_one), HIDDEN, UNEMBEDDING), both(loss(plain_one), HIDDEN, UNEMBEDDING))


@pytest.mark.parametrize("chunk_size", [3, 11])
def test_float64_equals_numpy_to_its_last_digits(chunk_size):
    hidden, unembedding, weights = (np.asarray(x, np.float64) for x in (HIDDEN * 5, UNEMBEDDING, WEIGHTS))
    tokens, temperature = np.asarray(TOKENS), 0.7
    z = hidden @ unembedding.T / temperature
    log_p = z - z.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    p, entropy = np.exp(log_p), -(np.exp(log_p) * log_p).sum(-1)
    one_hot = np.eye(VOCAB)[np.roll(tokens, -1, axis=1)]
    of_logprob, of_entropy = np.roll(weights, -1, axis=1), np.roll(weights - 0.5, -1, axis=1)  # at the positions
    of_logprob[:, -1] = of_entropy[:, -1] = 0  # the last position predicts no token
    d_logits = of_logprob[..., None] * (one_hot - p) - of_entropy[..., None] * p * (log_p + entropy[..., None])
    d_logits /= temperature
    expected = d_logits @ unembedding, np.einsum("btv,btd->vd", d_logits, hidden)
    with jax.enable_x64(True):
        options = {"temperature": temperature, "chunk_size": chunk_size}
        function = lambda h, w: linear_token_logprobs_and_entropy(h, w, jnp.asarray(tokens), **options)
        loss = lambda h, w: jnp.sum(weights * function(h, w)[0] + (weights - 0.5) * function(h, w)[1])
        arrays = jnp.asarray(hidden), jnp.asarray(unembedding)
        logprobs, entropies = jax.jit(function)(*arrays)
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(*arrays)
        assert {x.dtype.name for x in (logprobs, entropies, *gradients)} == {"float64"}
    exact = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(logprobs, core_in_numpy.token_logprobs(z, tokens), **exact)
    np.testing.assert_allclose(entropies, core_in_numpy.token_entropy(z), **exact)
    assert_same(gradients, expected, **exact)


def test_check_grads():
    loss = jax.jit(partial(linear_loss, chunk_size=4))
    check_grads(loss, (HIDDEN, UNEMBEDDING), 1, ["rev"], rtol=1e-2)
    check_grads(jax.jit(partial(linear_mixed_loss, chunk_size=4)), (HIDDEN, UNEMBEDDING), 1, ["rev"], rtol=1e-2)


def test_second_derivatives_are_there_where_the_first_is_zero():
    """At the reference itself every KL has gradient 0, and its second derivative is the Fisher matrix."""

    def product(function):
        kl = lambda w: jnp.square(function(HIDDEN, w, TOKENS) - function(HIDDEN, UNEMBEDDING, TOKENS)).sum() / 2
        along = jnp.asarray(np.random.default_rng(1).standard_normal(UNEMBEDDING.shape), jnp.float32)
        return jax.jit(lambda w: jax.jvp(jax.grad(kl), (w,), (along,))[1])(UNEMBEDDING)

    expected = product(plain)
    assert np.abs(expected).max() > 1
    assert_same(product(partial(linear_token_logprobs, chunk_size=4)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", [None, "tensor"])
def test_second_derivatives_of_both_outputs(split):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharded = {"mesh": mesh, "batch_axes": ("data",), "unembedding_axes": ("tensor", None)}
    hidden, unembedding = HIDDEN[:, :, :2], jnp.concatenate([UNEMBEDDING, UNEMBEDDING[:1]])[:, :2]
    along = jnp.asarray(np.random.default_rng(1).standard_normal(unembedding.shape), jnp.float32)

    def product(loss, **options):
        gradient = jax.grad(lambda w: loss(hidden, w, **options))
        return jax.jit(lambda w: jax.jvp(gradient, (w,), (along,))[1])(unembedding)

    expected = product(plain_mixed_loss)
    found = product(linear_mixed_loss, chunk_size=4, **({} if split is None else sharded))
    assert_same(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [300.0, -300.0, 1e30, 1e35])
def test_large_logits_need_the_running_maximum(scale):
    hidden = HIDDEN * scale
    found = linear_token_logprobs_and_entropy(hidden, UNEMBEDDING, TOKENS, chunk_size=4)
    expected = jax.jit(plain_both)(hidden, UNEMBEDDING)
    assert np.isfinite(expected[1]).all()
    assert_same(found, expected, rtol=1e-5, atol=1e-3)
    assert_same(linear_token_logprobs(hidden, UNEMBEDDING, TOKENS, chunk_size=4), expected[0], rtol=1e-5, atol=1e-3)
    gradients = both(linear_mixed_loss, hidden, UNEMBEDDING, chunk_size=4)[1]
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [5], [10], list(range(10))], ids=str)
def test_an_infinitely_unlikely_token_adds_nothing(ids):
    """Logits of -inf in a whole block, in part of one, and everywhere but at one token."""
    hidden = jnp.abs(HIDDEN) + 0.1
    unembedding = UNEMBEDDING.at[jnp.array(ids)].set(-jnp.inf)
    tokens = jnp.where(jnp.isin(TOKENS, jnp.array(ids)), 10 if 10 not in ids else 0, TOKENS)
    found = linear_token_logprobs_and_entropy(hidden, unembedding, tokens, chunk_size=4)
    assert_same(found, plain_both(hidden, unembedding, tokens))
    assert np.isfinite(found[0]).all() and np.isfinite(found[1]).all()
    assert_same(linear_token_logprobs(hidden, unembedding, tokens, chunk_size=4), found[0])


def test_logits_that_overflow_to_minus_infinity_have_finite_gradients():
    hidden = jnp.abs(HIDDEN) + 10.0
    unembedding = UNEMBEDDING.at[2].set(-3e38).at[8:].set(-3e38)
    tokens = jnp.where((TOKENS == 2) | (TOKENS >= 8), 0, TOKENS)
    found = both(linear_mixed_loss, hidden, unembedding, tokens, chunk_size=4)
    expected = both(plain_mixed_loss, hidden, unembedding, tokens)
    assert_same(found, expected, rtol=1e-4, atol=1e-3)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_entropy_is_not_below_zero_and_zero_where_one_token_is_certain():
    certain = linear_token_logprobs_and_entropy(HIDDEN * 1e4, UNEMBEDDING, TOKENS, chunk_size=4)[1]
    np.testing.assert_array_equal(certain, 0)
    near = linear_token_logprobs_and_entropy(HIDDEN * 30, UNEMBEDDING, TOKENS, chunk_size=1)[1]
    assert (near >= 0).all()
    even = linear_token_logprobs_and_entropy(HIDDEN, UNEMBEDDING * 0, TOKENS, chunk_size=4)[1]
    np.testing.assert_allclose(even[:, 1:], np.log(VOCAB), rtol=1e-6)


def test_bfloat16_products_accumulate_in_float32():
    hidden, unembedding = HIDDEN.astype(jnp.bfloat16), UNEMBEDDING.astype(jnp.bfloat16)
    value, gradients = both(linear_loss, hidden, unembedding, chunk_size=4)
    exact, expected = both(plain_loss, hidden.astype(jnp.float32), unembedding.astype(jnp.float32))
    assert value.dtype == jnp.float32
    assert_same(value, exact)
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2
    assert_same([g.astype(jnp.float32) for g in gradients], list(expected), rtol=2e-2, atol=2e-2)
    assert both(linear_loss, hidden, UNEMBEDDING)[1][1].dtype == jnp.float32
    mixed, gradients = both(linear_mixed_loss, hidden, unembedding, chunk_size=4)
    exact, expected = both(plain_mixed_loss, hidden.astype(jnp.float32), unembedding.astype(jnp.float32))
    assert mixed.dtype == jnp.float32
    assert_same(mixed, exact)
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2
    assert_same([g.astype(jnp.float32) for g in gradients], list(expected), rtol=2e-2, atol=2e-2)


def test_length_one_and_the_first_token():
    short = linear_token_logprobs(HIDDEN[:, :1], UNEMBEDDING, TOKENS[:, :1])
    np.testing.assert_array_equal(short, 0)
    np.testing.assert_array_equal(linear_token_logprobs(HIDDEN, UNEMBEDDING, TOKENS)[:, 0], 0)
    np.testing.assert_array_equal(linear_token_logprobs_and_entropy(HIDDEN, UNEMBEDDING, TOKENS)[1][:, 0], 0)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_garbage_hidden_states_do_not_leak_through_a_mask(garbage):
    mask = jnp.ones((BATCH, LENGTH), bool).at[1, 3].set(False)
    dirty = HIDDEN.at[1, 2].set(garbage).at[:, -1].set(garbage)

    def loss(h, w):
        return jnp.sum(jnp.where(mask, linear_token_logprobs(h, w, TOKENS, chunk_size=4), 0.0))

    def with_entropy(h, w):
        found = linear_token_logprobs_and_entropy(h, w, TOKENS, chunk_size=4)
        return sum(jnp.sum(jnp.where(mask, x, 0.0)) for x in found)

    for function in (loss, with_entropy):
        run = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
        jax.tree.map(np.testing.assert_array_equal, run(dirty, UNEMBEDDING), run(HIDDEN, UNEMBEDDING))


def test_an_id_outside_the_vocabulary_is_nan_and_has_no_gradient():
    tokens = TOKENS.at[0, 2].set(VOCAB).at[1, 3].set(-1)
    logprobs = linear_token_logprobs(HIDDEN, UNEMBEDDING, tokens, chunk_size=4)
    assert np.argwhere(np.isnan(logprobs)).tolist() == [[0, 2], [1, 3]]
    gradient = jax.grad(lambda h: jnp.nansum(linear_token_logprobs(h, UNEMBEDDING, tokens)))(HIDDEN)
    assert jnp.all(jnp.isfinite(gradient))
    np.testing.assert_array_equal(gradient[0, 1], 0)

    def entropy_loss(function):  # the log-probabilities of those ids take part, with a cotangent that must not matter
        def loss(h, w):
            logprobs, entropy = function(h, w, tokens)
            return jnp.nansum(logprobs) + jnp.sum(WEIGHTS * entropy)

        return loss

    found = both(entropy_loss(partial(linear_token_logprobs_and_entropy, chunk_size=4)), HIDDEN, UNEMBEDDING)
    assert_same(found, both(entropy_loss(plain_both), HIDDEN, UNEMBEDDING))
    assert np.abs(found[1][0][0, 1]).max() > 0


def test_a_traced_temperature_traces_once():
    traces = []

    @jax.jit
    def run(temperature):
        traces.append(temperature)
        return linear_token_logprobs(HIDDEN, UNEMBEDDING, TOKENS, temperature=temperature)

    for temperature in (0.5, 1.0):
        assert_same(run(temperature), plain(HIDDEN, UNEMBEDDING, TOKENS, temperature))
    assert len(traces) == 1


def _temporaries(function, *shapes):
    compiled = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(*shapes).compile(AS_FOR_USERS)
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("dtype", "bound"), campaign_but_for([(jnp.float32, 0.02), (jnp.bfloat16, 0.05)], (jnp.bfloat16, 0.05))
)
def test_temporaries_are_a_small_fraction_of_those_of_whole_logits(dtype, bound):
    # The bug: a loop over 16-bit rows, of which XLA on CPU holds a copy in 32 bits, and of their gradient another.
    batch, length, vocab, width = 4, 1024, 49_152, 576  # SmolLM2's head
    shapes = (
        jax.ShapeDtypeStruct((batch, length, width), dtype),
        jax.ShapeDtypeStruct((vocab, width), dtype),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.float32),
    )
    whole = _temporaries(lambda h, w, *rest: jnp.vdot(rest[1], token_logprobs(h @ w.T, rest[0])), *shapes)
    assert whole > batch * length * vocab * 4  # what the measure says of the plain way
    assert _temporaries(linear_loss, *shapes) < bound * whole
    assert _temporaries(linear_mixed_loss, *shapes) < 1.5 * bound * whole


def test_second_derivatives_of_16_bit_rows():
    hidden, unembedding = HIDDEN.astype(jnp.bfloat16), UNEMBEDDING.astype(jnp.bfloat16)
    along = jnp.asarray(np.random.default_rng(1).standard_normal(UNEMBEDDING.shape), jnp.bfloat16)

    def product(loss, *arrays, **options):
        gradient = jax.grad(lambda w: loss(arrays[0], w, **options))
        return jax.jit(lambda w: jax.jvp(gradient, (w,), (arrays[2],))[1])(arrays[1])

    expected = product(plain_loss, *(x.astype(jnp.float32) for x in (hidden, unembedding, along)))
    found = product(linear_loss, hidden, unembedding, along, chunk_size=4)
    assert found.dtype == jnp.bfloat16 and np.abs(expected).max() > 1
    assert_same(found.astype(jnp.float32), expected, rtol=5e-2, atol=0.15)


def test_no_array_of_the_compiled_program_has_the_size_of_the_logits():
    batch, length, vocab, width = 2, 24, 640, 8  # no product of other sizes is as large
    shapes = (
        jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.float32),
    )

    def largest(loss, **options):
        gradient = jax.jit(jax.value_and_grad(partial(loss, **options), argnums=(0, 1)))
        text = gradient.lower(*shapes).compile(AS_FOR_USERS).as_text()
        return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text))

    logits = batch * length * vocab
    assert largest(plain_mixed_loss) >= logits
    assert largest(linear_mixed_loss, chunk_size=64) <= max(logits // 10, vocab * width)


@pytest.mark.parametrize("spec", [P("fsdp", None), P(None, "fsdp")])
@pytest.mark.parametrize("with_mesh", campaign_but_for([True, False], False))
def test_sharded_under_jit(spec, with_mesh):
    mesh = mesh_of(2, 2)
    unembedding = jnp.concatenate([UNEMBEDDING, UNEMBEDDING[:1]])[:, :2]  # 12 x 2 divides over fsdp either way
    hidden = HIDDEN[:, :, :2]
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    options = {"chunk_size": 5, "mesh": mesh} if with_mesh else {"chunk_size": 5}
    step = jax.jit(jax.value_and_grad(lambda *args: linear_loss(*args, **options), argnums=(0, 1)))
    placed = [jax.device_put(x, rows) for x in (hidden, TOKENS, WEIGHTS)]
    found = step(placed[0], jax.device_put(unembedding, NamedSharding(mesh, spec)), *placed[1:])
    assert_same(found, both(plain_loss, hidden, unembedding))
    mixed = jax.jit(jax.value_and_grad(lambda *args: linear_mixed_loss(*args, **options), argnums=(0, 1)))
    found = mixed(placed[0], jax.device_put(unembedding, NamedSharding(mesh, spec)), *placed[1:])
    assert_same(found, both(plain_mixed_loss, hidden, unembedding))


@pytest.mark.parametrize(
    ("batch", "split"),
    [
        pytest.param((), ("tensor", None), id="tensor", marks=pytest.mark.campaign),
        pytest.param(("data",), ("tensor", None), id="rows", marks=pytest.mark.campaign),
        pytest.param(("data", "fsdp"), ("tensor", "fsdp"), id="both"),
    ],
)
def test_an_unembedding_that_stays_split_gives_the_same(batch, split):
    sizes = {"data": 1, "fsdp": 2, "tensor": 2} if split[1] else {"data": 2, "tensor": 2} if batch else {"tensor": 4}
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    unembedding = jnp.concatenate([UNEMBEDDING, UNEMBEDDING[:1]])[:, :2]  # 12 x 2, so 3 or 6 ids on a device
    hidden, tokens = HIDDEN[:, :, :2], TOKENS.at[0, 1].set(12).at[1, 2].set(-1)  # two ids outside of the vocabulary

    def loss(function, h, w, **options):
        logprobs = function(h, w, tokens, **options)
        return jnp.sum(jnp.where(jnp.isnan(logprobs), 0.0, WEIGHTS * jnp.sin(logprobs))), logprobs

    def with_entropy(function, h, w, **options):
        logprobs, entropy = function(h, w, tokens, **options)
        mixed = jnp.where(jnp.isnan(logprobs), 0.0, WEIGHTS * jnp.sin(logprobs)) + (WEIGHTS - 0.5) * jnp.square(entropy)
        return jnp.sum(mixed), (logprobs, entropy)

    def found(function, loss=loss, **options):
        step = jax.value_and_grad(partial(loss, function, **options), argnums=(0, 1), has_aux=True)
        return jax.jit(step)(hidden, unembedding)

    options = {"chunk_size": 4, "mesh": mesh, "batch_axes": batch, "unembedding_axes": split}
    expected = found(lambda h, w, ids: linear_token_logprobs(h, w, ids))
    assert np.isnan(expected[0][1]).sum() == 2
    assert_same(found(linear_token_logprobs, **options), expected)
    expected = found(plain_both, with_entropy)
    assert_same(found(linear_token_logprobs_and_entropy, with_entropy, **options), expected)


def test_the_heads_take_the_ambient_mesh():
    unembedding, hidden = jnp.concatenate([UNEMBEDDING, UNEMBEDDING[:1]])[:, :2], HIDDEN[:, :, :2]
    value_and_grad = jax.value_and_grad(partial(mixed_loss, head_logprobs_and_entropy), argnums=(0, 1))
    expected = both(plain_mixed_loss, hidden, unembedding, temperature=0.7)
    step = jax.jit(lambda h, w: value_and_grad(h, w, temperature=0.7))
    assert_same(step(hidden, unembedding), expected)
    mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        assert_same(step(hidden, unembedding), expected)
        _, inside, outside = _collectives_inside_loops(step.lower(hidden, unembedding).compile(AS_FOR_USERS).as_text())
        assert inside == 0 and outside >= 2
        logprobs = jax.jit(head_logprobs)(hidden, unembedding, TOKENS)
    assert_same(logprobs, plain(hidden, unembedding, TOKENS))


def _collectives_inside_loops(text):
    """Count collectives in the computations that a while loop runs, and in the rest."""
    computations, name = {}, ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            name = line.split("%", 1)[1].split(" ", 1)[0]
        computations.setdefault(name, []).append(line)
    words = ("all-gather(", "all-reduce(", "reduce-scatter(", "all-to-all(", "collective-permute(")
    words += ("all-gather-start(", "all-reduce-start(")
    bodies = {line.split("body=%")[1].split(",")[0] for line in text.splitlines() if "body=%" in line}
    reached = set(bodies)
    while True:
        called = {n for n in computations if any(f"%{n}" in line for r in reached for line in computations[r])}
        if called <= reached:
            break
        reached |= called
    count = {n: sum(any(w in line for w in words) for line in lines) for n, lines in computations.items()}
    return len(bodies), sum(count[n] for n in reached), sum(c for n, c in count.items() if n not in reached)


def test_no_collective_inside_the_loop_with_a_mesh():
    mesh = mesh_of(2, 2)
    vocab, width = 64, 8
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    shapes = (
        jax.ShapeDtypeStruct((8, 16, width), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"))),
        jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=rows),
        jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=rows),
    )

    def loss(*args):
        return linear_loss(*args, chunk_size=16, mesh=mesh)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    loops, inside, outside = _collectives_inside_loops(step.lower(*shapes).compile(AS_FOR_USERS).as_text())
    assert loops == 2 and inside == 0 and outside >= 2
    step = jax.jit(jax.value_and_grad(partial(linear_mixed_loss, chunk_size=16, mesh=mesh), argnums=(0, 1)))
    loops, inside, outside = _collectives_inside_loops(step.lower(*shapes).compile(AS_FOR_USERS).as_text())
    assert loops == 2 and inside == 0 and outside >= 2


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_the_callers_shard_map(check_vma):
    mesh = mesh_of(2, 2)
    rows = P(("data", "fsdp"))

    def local(hidden, unembedding, tokens, weights):
        loss = linear_loss(hidden, unembedding, tokens, weights, chunk_size=4)
        return jax.lax.psum(loss, ("data", "fsdp"))

    specs = (rows, P(), rows, rows)
    loss = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(HIDDEN, UNEMBEDDING, TOKENS, WEIGHTS)
    assert_same(found, EXPECTED)

    def local_mixed(*arrays):
        return jax.lax.psum(linear_mixed_loss(*arrays, chunk_size=4), ("data", "fsdp"))

    mixed = jax.shard_map(local_mixed, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    found = jax.jit(jax.value_and_grad(mixed, argnums=(0, 1)))(HIDDEN, UNEMBEDDING, TOKENS, WEIGHTS)
    assert_same(found, both(plain_mixed_loss, HIDDEN, UNEMBEDDING))


def test_gradient_taken_inside_shard_map_sums_a_replicated_unembedding():
    rows = P(("data", "fsdp"))

    def local(*args):
        return jax.grad(lambda *xs: linear_loss(*xs, chunk_size=4), argnums=(0, 1))(*args)

    step = jax.shard_map(local, mesh=mesh_of(2, 2), in_specs=(rows, P(), rows, rows), out_specs=(rows, P()))
    found = jax.jit(step)(HIDDEN, UNEMBEDDING, TOKENS, WEIGHTS)
    assert_same(found, EXPECTED[1])


def test_under_pmap_vmap_and_scan():
    def gradients(hidden, tokens, weights):
        def loss(h, w):
            return linear_loss(h, w, tokens, weights, chunk_size=4)

        return jax.grad(loss, argnums=(0, 1))(hidden, UNEMBEDDING)

    stacked = tuple(x.reshape(4, 1, *x.shape[1:]) for x in (HIDDEN, TOKENS, WEIGHTS))
    runs = {
        "pmap": jax.pmap(gradients)(*stacked),
        "vmap": jax.jit(jax.vmap(gradients))(*stacked),
        "scan": jax.jit(lambda xs: jax.lax.scan(lambda c, x: (c, gradients(*x)), 0, xs)[1])(stacked),
    }
    for found in runs.values():
        assert_same((found[0].reshape(HIDDEN.shape), found[1].sum(0)), EXPECTED[1])


def test_rows_without_tokens_have_no_logprobs():
    assert linear_token_logprobs(HIDDEN[:, :0], UNEMBEDDING, TOKENS[:, :0]).shape == (len(HIDDEN), 0)
    found = linear_token_logprobs_and_entropy(HIDDEN[:, :0], UNEMBEDDING, TOKENS[:, :0])
    assert [x.shape for x in found] == [(len(HIDDEN), 0)] * 2


def test_bad_arguments_are_refused():
    for function in (linear_token_logprobs, linear_token_logprobs_and_entropy):
        with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
            function(HIDDEN, UNEMBEDDING, TOKENS, chunk_size=0)
    with pytest.raises(ValueError, match=r"chunk_size must be a whole number, got 2\.5"):
        linear_token_logprobs(HIDDEN, UNEMBEDDING, TOKENS, chunk_size=2.5)
    with pytest.raises(ValueError, match="temperature must be above 0, got -2"):
        linear_token_logprobs(HIDDEN, UNEMBEDDING, TOKENS, temperature=-2)
    with pytest.raises(ValueError, match=r"'rows'.*not axes of the mesh"):
        linear_token_logprobs(HIDDEN, UNEMBEDDING, TOKENS, mesh=mesh_of(2, 2), batch_axes=("rows",))
    with pytest.raises(ValueError, match="the axis of the vocabulary must not be one of batch_axes"):
        linear_token_logprobs(HIDDEN, UNEMBEDDING, TOKENS, mesh=mesh_of(2, 2), unembedding_axes=("fsdp", None))
    with pytest.raises(AssertionError):
        linear_token_logprobs(HIDDEN, UNEMBEDDING[:, :2], TOKENS)


def capped_loss(hidden, unembedding, tokens=TOKENS, weights=WEIGHTS, *, cap, known, temperature=0.7):
    """The naive computation: whole logits, capped, those of padding rows -inf."""
    logits = jnp.einsum("btd,vd->btv", hidden, unembedding)
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    if known is not None:
        logits = jnp.where(jnp.arange(logits.shape[-1])[None, None] < known, logits, -jnp.inf)
    one, two = token_logprobs(logits, tokens, temperature=temperature), token_entropy(logits, temperature=temperature)
    return jnp.sum(weights * jnp.sin(one) + (weights - 0.5) * jnp.square(two))


@pytest.mark.parametrize(
    ("cap", "known", "chunk_size"),
    campaign_but_for([(1.5, None, 4), (None, 7, 3), (1.5, 9, 4), (0.5, 1, 100), (30.0, 8, 4)], (1.5, 9, 4)),
)
def test_a_soft_cap_and_padding_rows_equal_the_naive_computation(cap, known, chunk_size):
    tokens = TOKENS % (known or VOCAB)
    expected = both(capped_loss, HIDDEN, UNEMBEDDING, tokens, cap=cap, known=known)
    options = {"temperature": 0.7, "chunk_size": chunk_size, "logit_cap": cap, "vocab_size": known}
    found = both(linear_mixed_loss, HIDDEN, UNEMBEDDING, tokens, **options)
    assert_same(found, expected)
    if known is not None:
        np.testing.assert_array_equal(found[1][1][known:], 0)
        outside = linear_token_logprobs(HIDDEN, UNEMBEDDING, TOKENS.at[0, 1].set(known), vocab_size=known)
        assert np.isnan(outside[0, 1])
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    split = {"mesh": mesh, "unembedding_axes": ("tensor", None)}
    padded = jnp.concatenate([UNEMBEDDING, UNEMBEDDING[:1]])  # 12 rows, 6 on each device
    options |= {"vocab_size": known or VOCAB}
    value, (of_hidden, of_rows) = both(linear_mixed_loss, HIDDEN, padded, tokens, **options, **split)
    assert_same((value, (of_hidden, of_rows[:VOCAB])), expected)
    np.testing.assert_array_equal(of_rows[known or VOCAB :], 0)


def test_no_cap_and_no_padding_cost_nothing():
    def lowered(**options):
        return jax.jit(jax.grad(partial(linear_mixed_loss, **options))).lower(HIDDEN, UNEMBEDDING).as_text()

    assert lowered(vocab_size=VOCAB, logit_cap=None) == lowered()
    assert "tanh" not in lowered() and "tanh" in lowered(logit_cap=2.0)
    for options, message in [
        ({"logit_cap": 0.0}, "logit_cap must be above 0 and finite, got 0"),
        ({"vocab_size": 12}, "vocab_size=12 is more than the 11 rows"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"batch_axes": ("data",)}, "pass mesh too"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_token_logprobs(HIDDEN, UNEMBEDDING, TOKENS, **options)
