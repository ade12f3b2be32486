"""The table of the core's functions under JAX's transformations, for pgjax/core/README.md. Each cell is compared with the plain
function's value, and with its gradient.

python -m tests.transform_table           # print it
python -m tests.transform_table --write   # and put it into the page
"""

import os
import sys
from functools import partial

from tests.compile_options import xla_flags

if __name__ == "__main__":  # before jax makes its devices; in a test, tests/conftest.py has done it
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(4)}".strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests import core_cases as cases
from tests import page_table
from tests.compare import assert_close
from tests.core_cases import BATCH, CASES, PARTS, WHOLE, eager, eager_by_part, function, in_parts, inputs, of

PAGE = "pgjax/core/README.md", "tests.transform_table"
OF_VOCABULARY = {"theta": P("vocabulary"), **dict.fromkeys(("logits", "ref_logits"), P("data", None, "vocabulary"))}
REVERSE_ONLY = ("linear_token_logprobs", "linear_token_logprobs_and_entropy")

assert_same = partial(assert_close, atol=5e-6, rtol=2e-5)


class LeftOut(Exception):
    """A transformation has no meaning for a function: the message is what the cell says."""


def fields(name):
    return CASES[name].inputs.split()


def under_jit(name):
    assert_same(jax.jit(of(name))(*inputs(name)), eager(name))


def under_grad(name):
    """Nothing outside the mask reaches a value or a gradient, and these are finite."""
    if CASES[name].no_gradient:
        raise LeftOut(CASES[name].no_gradient)
    masked = "mask" in fields(name)
    outside = lambda x: jnp.where(BATCH["mask"], x, jnp.nan) if masked and x.shape == BATCH["mask"].shape else x
    spoilt = [outside(x) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in inputs(name)]
    given, gradients = jax.jit(of(name))(*spoilt)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    assert_same((given, gradients), eager(name))


def under_jvp(name):
    """A derivative along a direction is the gradient's product with it."""
    if CASES[name].no_gradient:
        raise LeftOut(CASES[name].no_gradient)
    if name in REVERSE_ONLY:
        raise LeftOut("reverse mode only")
    args, rng = inputs(name), np.random.default_rng(1)
    floats = [i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not floats:
        raise LeftOut("whole numbers")
    along = [jnp.asarray(rng.standard_normal(args[i].shape), jnp.float32) for i in floats]

    def forward(*xs):
        given = function(name)(*[xs[floats.index(i)] if i in floats else x for i, x in enumerate(args)])
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(given))

    _, slope = jax.jvp(forward, [args[i] for i in floats], along)
    product = sum(jnp.sum(x * y) for x, y in zip(along, eager(name)[1], strict=True))
    assert_close(slope, product, atol=1e-4, rtol=1e-4)


def under_vmap(name):
    assert_same(jax.jit(jax.vmap(of(name)))(*in_parts(name)), eager_by_part(name))


def under_scan(name):
    step = lambda carry, part: (carry, of(name)(*part))
    assert_same(jax.jit(lambda *parts: jax.lax.scan(step, 0, parts)[1])(*in_parts(name)), eager_by_part(name))


def whole(call, name):
    """Return `found` of a function that is mapped over the rows."""
    return partial(cases.found, call, differentiable=not CASES[name].no_gradient)


def under_shard_map(name):
    mesh = jax.make_mesh((PARTS,), ("data",), axis_types=(AxisType.Auto,))
    specs = tuple(P() if field in WHOLE else P("data") for field in fields(name))
    out = P() if CASES[name].reduces else P("data")
    mapped = jax.shard_map(function(name, "data"), mesh=mesh, in_specs=specs, out_specs=out)
    assert_same(jax.jit(whole(mapped, name))(*inputs(name)), eager(name))


def under_pmap(name):
    axes = tuple(None if field in WHOLE else 0 for field in fields(name))
    if not any(axis == 0 for axis in axes):
        raise LeftOut("no rows")
    mapped = jax.pmap(function(name, "data"), axis_name="data", in_axes=axes)

    def joined(*args):
        parts = [x if axis is None else x.reshape(PARTS, -1, *x.shape[1:]) for x, axis in zip(args, axes, strict=True)]
        last = lambda x: x[-1] if CASES[name].reduces else x.reshape(-1, *x.shape[2:])
        return jax.tree.map(last, mapped(*parts))

    assert_same(whole(joined, name)(*inputs(name)), eager(name))


def on_explicit_mesh(name, mesh, specs):
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(inputs(name), specs, strict=True)]
    assert_same(jax.jit(of(name))(*placed), eager(name))
    with jax.set_mesh(mesh):
        assert_same(function(name)(*placed), eager(name)[0])


def on_explicit_data(name):
    mesh = jax.make_mesh((PARTS,), ("data",))  # the axis is Explicit: that is the default
    on_explicit_mesh(name, mesh, [P() if field in WHOLE else P("data") for field in fields(name)])


def on_explicit_vocabulary(name):
    if not set(fields(name)) & set(OF_VOCABULARY):
        raise LeftOut("no vocabulary")
    mesh = jax.make_mesh((2, 2), ("data", "vocabulary"))
    on_explicit_mesh(name, mesh, [OF_VOCABULARY.get(field, P("data")) for field in fields(name)])


def in_64_bits(name):
    """Entries keep 64 bits, and so do gradients; the numbers of losses come back in 32."""
    with jax.enable_x64(True):
        wide = [
            x.astype(jnp.float64) if x.dtype == jnp.float32 else x.astype(jnp.int64) if x.dtype == jnp.int32 else x
            for x in inputs(name)
        ]
        given, gradients = jax.jit(of(name))(*wide)
        assert_close((given, gradients), eager(name), atol=2e-5, rtol=1e-4)
        assert all(x.dtype == jnp.float64 for x in gradients)
        if any(x.dtype == jnp.float64 for x in wide):  # whole numbers become float32
            floats = [x for x in jax.tree.leaves(given) if jnp.issubdtype(x.dtype, jnp.floating)]
            assert all(x.dtype == (jnp.float64 if x.ndim else jnp.float32) for x in floats)


def in_strict_promotion(name):
    """Plain numbers have no say in the dtype, and nothing is broadcast unsaid."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        given = jax.jit(of(name))(*inputs(name))
    assert_same(given, eager(name))
    assert jax.tree.map(lambda x: x.dtype, given) == jax.tree.map(lambda x: x.dtype, eager(name))


TRANSFORMATIONS = {
    "jit": under_jit,
    "grad": under_grad,
    "jvp": under_jvp,
    "vmap": under_vmap,
    "scan": under_scan,
    "shard_map": under_shard_map,
    "pmap": under_pmap,
    "Explicit data": on_explicit_data,
    "Explicit data, vocabulary": on_explicit_vocabulary,
    "64 bits": in_64_bits,
    "strict promotion": in_strict_promotion,
}


def cell(name, transformation):
    try:
        TRANSFORMATIONS[transformation](name)
    except LeftOut as why:
        return str(why)
    except Exception as error:  # whatever it is, the cell is not right
        print(f"{name} {transformation}: {type(error).__name__} {str(error)[:1500]}", file=sys.stderr)
        return "**no**"
    return "yes"


def row(name):
    """Try everything with one function: a row of the table in Markdown."""
    return f"| `{name}` | {' | '.join(cell(name, transformation) for transformation in TRANSFORMATIONS)} |\n"


def head():
    return f"| function | {' | '.join(TRANSFORMATIONS)} |\n|{' --- |' * (len(TRANSFORMATIONS) + 1)}\n"


def table():
    """Try everything with every function."""
    return head() + "".join(map(row, CASES))


def of_page():
    """Read the table that the page shows."""
    return page_table.of_page(*PAGE)


if __name__ == "__main__":
    page_table.show(*PAGE, table())
