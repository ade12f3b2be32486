"""On a mesh with Explicit axes, jax's default: the numbers of one device, whatever splits what."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pgjax as pg
from pgjax.core.linear_logprobs import linear_token_logprobs, linear_token_logprobs_and_entropy
from pgjax.core.logprobs import token_frame
from tests.compare import assert_close
from tests.compile_options import AS_FOR_USERS
from tests.sizes import campaign_but_for
from tests.test_linear_logprobs import _collectives_inside_loops

RNG = np.random.default_rng(0)
BATCH, LENGTH, VOCAB, WIDTH = 4, 6, 12, 4
HIDDEN = jnp.asarray(RNG.standard_normal((BATCH, LENGTH, WIDTH)), jnp.float32)
UNEMBEDDING = jnp.asarray(RNG.standard_normal((VOCAB, WIDTH)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(0, VOCAB - 1, (BATCH, LENGTH)), jnp.int32)
OPTIONS = {"temperature": 0.7, "chunk_size": 4, "logit_cap": 3.0, "vocab_size": 11}
both = partial(linear_token_logprobs_and_entropy, **OPTIONS)

# The names of the axes are nobody's convention. Each: what splits hidden, the unembedding and the tokens.
LAYOUTS = {
    "rows": (P(("x", "y")), P(), P(("x", "y"))),
    "rows and vocabulary": (P("x"), P("y"), P("x")),
    "vocabulary and width": (P("x"), P("y", "x"), P("x")),
    "vocabulary over the rows' axis": (P("x"), P("x", "y"), P("x")),
    "width of both": (P("x", None, "y"), P(None, "y"), P("x")),
    "time": (P("x", "y"), P("x"), P("x", "y")),
    "tokens alone": (P(), P("y"), P("x")),
    "vocabulary alone": (P(), P(("x", "y")), P()),
    "nothing": (P(), P(), P()),
}
PICKED = ("vocabulary and width", "time")


def placed(layout):
    mesh = jax.make_mesh((2, 2), ("x", "y"))  # the axes are Explicit: that is the default
    arrays = zip((HIDDEN, UNEMBEDDING, TOKENS), LAYOUTS[layout], strict=True)
    return mesh, [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in arrays]


def mixed(hidden, unembedding, tokens):
    logprobs, entropy = both(hidden, unembedding, tokens)
    return jnp.sum(jnp.sin(logprobs) + jnp.square(entropy))


@pytest.fixture(scope="module")
def expected():
    return jax.jit(jax.value_and_grad(mixed, (0, 1)))(HIDDEN, UNEMBEDDING, TOKENS)


assert_same = partial(assert_close, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", campaign_but_for(LAYOUTS, *PICKED))
@pytest.mark.parametrize("entered", campaign_but_for([True, False], False))
def test_layouts_are_read_off_the_types_under_jit(layout, entered, expected):
    mesh, arrays = placed(layout)
    step = jax.jit(jax.value_and_grad(mixed, (0, 1)))
    if entered:
        with jax.set_mesh(mesh):
            found = step(*arrays)
    else:
        found = step(*arrays)
    assert_same(found, expected)
    for gradient, array in zip(found[1], arrays, strict=False):  # a gradient lies as its array does
        assert jax.typeof(gradient).sharding.spec == jax.typeof(array).sharding.spec


@pytest.mark.parametrize("layout", campaign_but_for(LAYOUTS, "rows and vocabulary"))
def test_layouts_are_read_off_the_types_outside_jit(layout, expected):
    mesh, arrays = placed(layout)
    assert_same(both(*arrays), both(HIDDEN, UNEMBEDDING, TOKENS))  # no mesh is entered
    with jax.set_mesh(mesh):  # which jax itself wants for a gradient of any sum
        assert_same(jax.value_and_grad(mixed, (0, 1))(*arrays), expected)


def test_inside_a_shard_map_over_some_of_the_axes(expected):
    mesh, arrays = placed("rows and vocabulary")

    def local(hidden, unembedding, tokens):  # x is Manual here; y is Explicit, and splits the vocabulary
        return jax.lax.psum(mixed(hidden, unembedding, tokens), "x")

    outer = jax.shard_map(local, in_specs=(P("x"), P(), P("x")), out_specs=P(), axis_names={"x"}, mesh=mesh)
    with jax.set_mesh(mesh):
        assert_same(jax.jit(jax.grad(outer, (0, 1)))(*arrays), expected[1])


def test_neither_logits_nor_a_collective_in_the_loop(full_compiles):
    batch, length, vocab, width = 4, 24, 640, 8
    mesh = jax.make_mesh((2, 2), ("x", "y"))

    def text(of_hidden, of_unembedding):
        on = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        shapes = (
            on((batch, length, width), jnp.float32, of_hidden),
            on((vocab, width), jnp.float32, of_unembedding),
            on((batch, length), jnp.int32, P("x")),
        )
        loss = lambda *arrays: jnp.sum(linear_token_logprobs(*arrays, chunk_size=64))
        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile(AS_FOR_USERS).as_text()

    for specs in ((P("x"), P("y", "x")), (P("x", None, "y"), P("x", "y"))):
        program = text(*specs)
        loops, inside, outside = _collectives_inside_loops(program)
        assert loops == 2 and inside == 0 and outside >= 2
        sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", program)]
        assert max(sizes) <= max(batch // 2 * length * vocab // 2 // 4, vocab * width)


def test_a_layout_that_is_told_twice_or_not_at_all_is_refused():
    _mesh, arrays = placed("rows")
    with pytest.raises(
        ValueError, match=r"Explicit axes \('x', 'y'\).* leave mesh, batch_axes and unembedding_axes out"
    ):
        linear_token_logprobs(*arrays, batch_axes=("x",))
    auto = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match=r"\('dp', 'tp'\), none of them data or fsdp: .* batch_axes"):
        linear_token_logprobs(HIDDEN, UNEMBEDDING, TOKENS, mesh=auto)


def test_groups_and_sequences_that_lie_on_several_devices():
    mesh = jax.make_mesh((4,), ("x",))
    rng = np.random.default_rng(1)
    scores, rewards = rng.standard_normal(8).astype(np.float32), rng.standard_normal((2, 8)).astype(np.float32)
    mask = np.arange(8)[None] % 3 < np.array([[2], [1]])

    def rows(scores):
        return pg.leave_one_out_baseline(scores, group_size=4), pg.group_advantages(scores, group_size=4)

    def times(rewards, mask):
        returns = pg.monte_carlo_returns(rewards, mask, discount=0.9)
        return returns, token_frame(rewards), pg.monte_carlo_advantages(rewards, returns * 0.5, mask)

    split = jax.device_put(scores, NamedSharding(mesh, P("x")))
    over_time = [jax.device_put(x, NamedSharding(mesh, P(None, "x"))) for x in (rewards, mask)]
    found = jax.jit(rows)(split), jax.jit(times)(*over_time)
    assert_same(found, (rows(jnp.asarray(scores)), times(jnp.asarray(rewards), jnp.asarray(mask))))
    assert {str(jax.typeof(x)) for x in found[0]} == {"float32[8@x]"}
    assert {str(jax.typeof(x)) for x in found[1]} == {"float32[2,8@x]"}


def test_policies_that_lie_on_several_devices():
    # The bug: under vmap, the rule took over the axis that splits the policies.
    mesh = jax.make_mesh((2, 2), ("policy", "rows"))
    several = jnp.stack([UNEMBEDDING, 2 * UNEMBEDDING])
    total = lambda weights, hidden, tokens: jnp.sum(jax.vmap(lambda w: mixed(hidden, w, tokens))(weights))
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in ((several, P("policy")), (HIDDEN, P("rows")), (TOKENS, P("rows")))
    ]
    each = jax.jit(jax.grad(mixed, 1))
    expected = jnp.stack([each(HIDDEN, w, TOKENS) for w in several])
    with jax.set_mesh(mesh):  # which jax itself wants for any loop under such a vmap
        assert_same(jax.jit(jax.grad(total))(*placed), expected)
        assert_same(jax.jit(jax.grad(total))(placed[0], HIDDEN, TOKENS), expected)  # nothing else is split


def test_compared_samples_and_their_tokens_that_lie_on_several_devices():
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    rng = np.random.default_rng(1)
    scores, returns, logprobs = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (8, (8, 6), (8, 6)))
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    compared = jax.jit(partial(pg.group_advantages, group_size=4))
    both_axes = P(("x", "y"))
    assert_same(compared(put(scores, both_axes), mask=put(scores > 0, both_axes)), compared(scores, mask=scores > 0))
    baseline = jax.jit(partial(pg.optimal_token_baseline, group_size=4))
    split = [put(x, P("x", "y")) for x in (returns, logprobs, logprobs)]
    assert_same(baseline(*split), baseline(returns, logprobs, logprobs))
