"""The log-probabilities that never hold [B, T, V]: same numbers, same gradients, little memory, any mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from pgjax.core.linear_logprobs import linear_token_logprobs
from pgjax.core.logprobs import token_logprobs
from tests.compare import assert_close
from tests.compile_options import AS_FOR_USERS

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


def mesh_of(data, fsdp):
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def assert_same(tree, expected, *, rtol=1e-5, atol=5e-6):
    assert_close(tree, expected, atol, rtol=rtol)


def both(loss, *arrays, **options):
    """Value and gradients of a loss with respect to hidden and unembedding."""
    return jax.jit(jax.value_and_grad(partial(loss, **options), argnums=(0, 1)))(*arrays)


EXPECTED = both(plain_loss, HIDDEN, UNEMBEDDING)


@pytest.mark.parametrize(("chunk_size", "temperature"), [(1, 0.7), (4, 1.0), (10, 0.7), (11, 1.0), (1000, 0.7)])
def test_values_and_gradients_equal_the_plain_ones(chunk_size, temperature):
    expected = both(plain_loss, HIDDEN, UNEMBEDDING, temperature=temperature)
    assert_same(both(linear_loss, HIDDEN, UNEMBEDDING, temperature=temperature, chunk_size=chunk_size), expected)
    logprobs = linear_token_logprobs(HIDDEN, UNEMBEDDING, TOKENS, temperature=temperature, chunk_size=chunk_size)
    assert_same(logprobs, jax.jit(plain)(HIDDEN, UNEMBEDDING, TOKENS, temperature))


def test_check_grads():
    loss = jax.jit(partial(linear_loss, chunk_size=4))
    check_grads(loss, (HIDDEN, UNEMBEDDING), 1, ["rev"], rtol=1e-2)


def test_second_derivatives_are_there_where_the_first_is_zero():
    """At the reference itself every KL has gradient 0, and its second derivative is the Fisher matrix."""

    def product(function):
        kl = lambda w: jnp.square(function(HIDDEN, w, TOKENS) - function(HIDDEN, UNEMBEDDING, TOKENS)).sum() / 2
        along = jnp.asarray(np.random.default_rng(1).standard_normal(UNEMBEDDING.shape), jnp.float32)
        return jax.jit(lambda w: jax.jvp(jax.grad(kl), (w,), (along,))[1])(UNEMBEDDING)

    expected = product(plain)
    assert np.abs(expected).max() > 1
    assert_same(product(partial(linear_token_logprobs, chunk_size=4)), expected, rtol=1e-4, atol=1e-4)


def test_large_logits_need_the_running_maximum():
    hidden = HIDDEN * 300.0
    logprobs = linear_token_logprobs(hidden, UNEMBEDDING, TOKENS, chunk_size=4)
    assert_same(logprobs, jax.jit(plain)(hidden, UNEMBEDDING, TOKENS), rtol=1e-5, atol=1e-3)


def test_bfloat16_products_accumulate_in_float32():
    hidden, unembedding = HIDDEN.astype(jnp.bfloat16), UNEMBEDDING.astype(jnp.bfloat16)
    value, gradients = both(linear_loss, hidden, unembedding, chunk_size=4)
    exact, expected = both(plain_loss, hidden.astype(jnp.float32), unembedding.astype(jnp.float32))
    assert value.dtype == jnp.float32
    assert_same(value, exact)
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2
    assert_same([g.astype(jnp.float32) for g in gradients], list(expected), rtol=2e-2, atol=2e-2)
    assert both(linear_loss, hidden, UNEMBEDDING)[1][1].dtype == jnp.float32


def test_length_one_and_the_first_token():
    short = linear_token_logprobs(HIDDEN[:, :1], UNEMBEDDING, TOKENS[:, :1])
    np.testing.assert_array_equal(short, 0)
    np.testing.assert_array_equal(linear_token_logprobs(HIDDEN, UNEMBEDDING, TOKENS)[:, 0], 0)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_garbage_hidden_states_do_not_leak_through_a_mask(garbage):
    mask = jnp.ones((BATCH, LENGTH), bool).at[1, 3].set(False)
    dirty = HIDDEN.at[1, 2].set(garbage).at[:, -1].set(garbage)

    def loss(h, w):
        return jnp.sum(jnp.where(mask, linear_token_logprobs(h, w, TOKENS, chunk_size=4), 0.0))

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    jax.tree.map(np.testing.assert_array_equal, run(dirty, UNEMBEDDING), run(HIDDEN, UNEMBEDDING))


def test_an_id_outside_the_vocabulary_is_nan_and_has_no_gradient():
    tokens = TOKENS.at[0, 2].set(VOCAB).at[1, 3].set(-1)
    logprobs = linear_token_logprobs(HIDDEN, UNEMBEDDING, tokens, chunk_size=4)
    assert np.argwhere(np.isnan(logprobs)).tolist() == [[0, 2], [1, 3]]
    gradient = jax.grad(lambda h: jnp.nansum(linear_token_logprobs(h, UNEMBEDDING, tokens)))(HIDDEN)
    assert jnp.all(jnp.isfinite(gradient))
    np.testing.assert_array_equal(gradient[0, 1], 0)


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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_temporaries_are_a_small_fraction_of_the_logits(dtype):
    batch, length, vocab, width = 4, 256, 49_152, 64
    shapes = (
        jax.ShapeDtypeStruct((batch, length, width), dtype),
        jax.ShapeDtypeStruct((vocab, width), dtype),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.float32),
    )
    logits_bytes = batch * length * vocab * 4
    assert _temporaries(linear_loss, *shapes) < 0.15 * logits_bytes
    if dtype == jnp.float32:  # what the measure says of the plain way
        assert _temporaries(plain_loss, *shapes) > logits_bytes


@pytest.mark.parametrize("spec", [P("fsdp", None), P(None, "fsdp")])
@pytest.mark.parametrize("with_mesh", [True, False])
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


@pytest.mark.parametrize(
    ("batch", "split"), [((), ("tensor", None)), (("data", "fsdp"), ("tensor", "fsdp"))], ids=["tensor", "both"]
)
def test_an_unembedding_that_stays_split_gives_the_same(batch, split):
    sizes = {"data": 1, "fsdp": 2, "tensor": 2} if batch else {"tensor": 4}
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    unembedding = jnp.concatenate([UNEMBEDDING, UNEMBEDDING[:1]])[:, :2]  # 12 x 2, so 3 or 6 ids on a device
    hidden, tokens = HIDDEN[:, :, :2], TOKENS.at[0, 1].set(12).at[1, 2].set(-1)  # two ids outside of the vocabulary

    def loss(function, h, w, **options):
        logprobs = function(h, w, tokens, **options)
        return jnp.sum(jnp.where(jnp.isnan(logprobs), 0.0, WEIGHTS * jnp.sin(logprobs))), logprobs

    def found(function, **options):
        step = jax.value_and_grad(partial(loss, function, **options), argnums=(0, 1), has_aux=True)
        return jax.jit(step)(hidden, unembedding)

    mended = {"chunk_size": 4, "mesh": mesh, "batch_axes": batch, "unembedding_axes": split}
    expected = found(lambda h, w, ids: linear_token_logprobs(h, w, ids))
    assert np.isnan(expected[0][1]).sum() == 2
    assert_same(found(linear_token_logprobs, **mended), expected)


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


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        linear_token_logprobs(HIDDEN, UNEMBEDDING, TOKENS, chunk_size=0)
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
