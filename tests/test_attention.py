"""Attention of whole sequences without a mask: the same numbers as under one, and on an NVIDIA GPU cuDNN's kernel alone."""

import dataclasses
import functools
import inspect
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.learning.algorithm import Batch
from pgjax.learning.algorithms import ppo
from pgjax.learning.policy_loss import policy_loss
from pgjax.models import attention, causal_lm
from pgjax.parallel.sharding import make_mesh, param_shardings, place
from tests.compare import assert_close
from tests.sizes import campaign_but_for
from tests.tiny import ARCHITECTURES, tiny_lm, tiny_params

T = 13  # a number that nothing else has
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 23, (8, T)).astype(np.int32)
# Whole, padded on the left, on the right, on both sides; one token; holes, which packed rows apart no caller makes.
SPANS = np.array([(0, T), (5, T), (0, 7), (3, 9), (T - 1, T), (2, T), (0, T - 1), (6, 10)])
MASK = (np.arange(T)[None, :] >= SPANS[:, :1]) & (np.arange(T)[None, :] < SPANS[:, 1:])
MASK[5, 4] = MASK[6, [2, 3, 8]] = False


def arch_of(name: str):
    """A tiny model of heads that cuDNN takes, of one layer."""
    return dataclasses.replace(ARCHITECTURES[name], head_dim=8, depth=1)


def lm_of(name: str, **options):
    """Its functions."""
    return causal_lm.causal_lm(arch_of(name), **options)


@functools.cache
def params_of(name: str):
    """Its parameters, every leaf with noise."""
    shapes = jax.eval_shape(lm_of(name).init, jax.random.key(0))
    rng = np.random.default_rng(1)
    draw = lambda path, x: (0.4 * rng.standard_normal(x.shape) + (path[-1].key == "scale")).astype(x.dtype)
    return jax.tree_util.tree_map_with_path(draw, shapes)


DIRECTION = RNG.standard_normal((*TOKENS.shape, ARCHITECTURES["llama"].width)).astype(np.float32)


def states_and_gradient(lm, params, mask=MASK, tokens=TOKENS):
    """Hidden states, and the gradient of a random sum over those of real tokens."""

    def total(params):
        hidden = lm.hidden(params, tokens, mask)
        real = jnp.ones(tokens.shape, bool) if mask is None else mask
        return jnp.sum(jnp.where(real[..., None], hidden.astype(jnp.float32) * DIRECTION, 0)), hidden

    (_, hidden), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return np.asarray(hidden, np.float32), gradient


def near(found, expected, tolerance: float) -> None:
    """Assert closeness leaf by leaf, in units of its largest entry; the bias of keys has no gradient but rounding."""
    assert_close(found, expected, 1e-5, of_max=tolerance)


@pytest.mark.parametrize("name", campaign_but_for(["llama", "qwen3", "gpt2"], "qwen3", "gpt2"))
def test_states_and_gradients_are_those_under_a_mask_wherever_the_padding_stands(name):
    # The bugs: positions of the wrong column, rows that are not put back, padding that real tokens see.
    hidden, gradient = states_and_gradient(lm_of(name, kernel="xla"), params_of(name))
    expected, wanted = states_and_gradient(lm_of(name), params_of(name))
    assert np.isfinite(hidden).all()
    assert_close(hidden[MASK], expected[MASK], of_max=1e-5)
    near(gradient, wanted, 1e-5)
    unmasked, _ = states_and_gradient(lm_of(name, kernel="xla"), params_of(name), None)
    assert_close(unmasked[0], hidden[0], 1e-6)
    assert np.abs(unmasked - hidden)[1][MASK[1]].max() > 0.01  # so the above can fail


def test_in_16_bits_states_are_near_those_of_32():
    with jax.numpy_dtype_promotion("standard"):  # the gradient of JAX's own einsum wants it; cuDNN's does not
        hidden, gradient = states_and_gradient(lm_of("llama", kernel="xla", dtype=jnp.bfloat16), params_of("llama"))
    expected, wanted = states_and_gradient(lm_of("llama"), params_of("llama"))
    assert_close(hidden[MASK], expected[MASK], of_max=0.03)
    near(gradient, wanted, 0.05)


def test_padding_beyond_the_last_position_makes_no_nan():
    # The bug: positions of padding that run on past the table, which is NaN there; it would reach every gradient.
    tokens, mask = np.tile(TOKENS[1:3], (1, 20)), np.pad(MASK[1:3], ((0, 0), (0, 19 * T)))
    lm, params = lm_of("gpt2", kernel="xla"), params_of("gpt2")
    assert tokens.shape[1] > lm.arch.max_positions
    hidden = np.asarray(jax.jit(lm.hidden)(params, tokens, mask))
    assert np.isfinite(hidden).all()
    expected = np.asarray(jax.jit(lm.hidden)(params, TOKENS[1:3], MASK[1:3]))
    assert_close(hidden[:, :T][MASK[1:3]], expected[MASK[1:3]], of_max=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prefill_leaves_the_cache_where_decoding_reads_it(name):
    mask = np.arange(T)[None, :] >= np.array([0, 5, 12, 3, 8, 1, 2, 6])[:, None]

    def prefilled(lm):
        return jax.jit(lm.prefill)(params_of(name), TOKENS, mask, lm.init_cache(len(TOKENS), T + 2))

    (hidden, cache), (last, filled) = (prefilled(lm_of(name, kernel=kernel)) for kernel in ("xla", None))
    near(hidden, last, 1e-5)
    for layer, expected in zip(cache, filled, strict=True):
        for x, y in zip(layer, expected, strict=True):
            real = np.asarray(y).swapaxes(1, 2)[:, :T][mask]
            assert_close(np.asarray(x).swapaxes(1, 2)[:, :T][mask], real, of_max=1e-5)
            assert not np.asarray(x)[:, :, T:].any()


def test_orders_are_permutations_that_undo_each_other():
    there, back = (np.asarray(x) for x in attention.real_first(jnp.asarray(MASK)))
    for row, real in enumerate(MASK):
        assert there[row].tolist() == [*np.flatnonzero(real), *np.flatnonzero(~real)]
        assert there[row][back[row]].tolist() == list(range(T))
    x = RNG.standard_normal((8, 3, T, 2)).astype(np.float32)
    moved = attention.permuted(jnp.asarray(x), there, axis=2)
    assert np.array_equal(moved, [x[row][:, there[row]] for row in range(8)])
    assert np.array_equal(attention.permuted(moved, back, axis=2), x)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "taken"),
    [
        (jnp.bfloat16, 64, (8, 0), True),
        (jnp.float16, 128, (9, 0), True),
        (np.dtype("float16"), 8, (12, 0), True),
        (jnp.float32, 64, (9, 0), False),
        (jnp.bfloat16, 64, None, False),  # no NVIDIA GPU
        (jnp.bfloat16, 64, (7, 5), False),  # Turing
        (jnp.bfloat16, 256, (9, 0), False),
        (jnp.bfloat16, 20, (9, 0), False),
    ],
)
def test_cudnn_is_asked_for_what_it_takes(dtype, head_dim, capability, taken):
    assert attention.cudnn_takes(dtype, head_dim, capability) is taken


@pytest.fixture
def nvidia(monkeypatch):
    """Let programs be written for an NVIDIA GPU that is not there."""
    monkeypatch.setattr(causal_lm, "cuda_capability", lambda: (9, 0))
    # JAX asks for the version of cuDNN while it traces, and has no public way to name one.
    by_cudnn = inspect.unwrap(jax.nn.dot_product_attention).__globals__["cudnn_dot_product_attention"]
    versions = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setitem(inspect.unwrap(by_cudnn).__globals__, "cuda_versions", versions)
    causal_lm._built.cache_clear()  # functions that are traced already keep what they chose
    yield
    causal_lm._built.cache_clear()


def for_cuda(function, *args) -> str:
    """Return the program that JAX hands to XLA for a GPU."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def kernels(text: str) -> list[str]:
    """Name the calls of cuDNN's attention, in the order of the program."""
    return re.findall(r"@__cudnn\$fmha(\w+)", text)


def learner(lm):
    """The gradient of PPO's loss."""
    ones = jnp.ones((8, 5), jnp.float32)
    batch = Batch(TOKENS, MASK, MASK[:, -5:], ones - 3, ones, ones, ones)
    params = {"lm": params_of("llama"), "value": {"kernel": jnp.ones(lm.arch.width), "bias": jnp.float32(0)}}
    return jax.grad(lambda params: policy_loss(params, batch, lm=lm, algorithm=ppo(), temperature=1.0)[0]), params


SQUARE = re.compile(rf"x({T}|{T + 1})x(?:\d+x)?({T}|{T + 1})x")  # a tensor with queries and keys for axes


@pytest.mark.parametrize(("remat", "forward"), [(False, 1), (True, 2)])
def test_the_learner_on_a_gpu_holds_no_scores(nvidia, remat, forward):
    text = for_cuda(*learner(lm_of("llama", dtype=jnp.bfloat16, remat=remat)))
    assert kernels(text) == ["Softmax"] * forward + ["SoftmaxBackward"]  # in the bodies of the scan over layers
    assert not SQUARE.search(text)
    assert SQUARE.search(for_cuda(*learner(lm_of("llama", dtype=jnp.bfloat16, kernel="masked"))))
    assert "mask_type\\22: \\22CAUSAL" in text


def test_teacher_forcing_and_prefill_on_a_gpu_use_the_kernel_and_other_programs_do_not(nvidia):
    params, half = params_of("llama"), {"dtype": jnp.bfloat16}
    states = lambda lm: for_cuda(lm.hidden, params, TOKENS, MASK)
    assert kernels(states(lm_of("llama", **half))) == ["Softmax"]
    assert kernels(states(lm_of("llama", **half, kernel="masked"))) == []
    assert kernels(states(lm_of("llama"))) == []  # float32
    lm = lm_of("llama", **half)
    cache = lm.init_cache(8, T + 1)
    assert kernels(for_cuda(lm.prefill, params, TOKENS, MASK, cache)) == ["Softmax"]
    assert kernels(for_cuda(lm.hidden, params, TOKENS, None, MASK.astype(np.int32))) == []  # packed rows
    assert (
        kernels(for_cuda(tiny_lm("llama", "bfloat16").hidden, tiny_params("llama"), TOKENS, MASK)) == []
    )  # heads of 4


def test_without_a_gpu_nothing_is_chosen():
    assert attention.cuda_capability() is None
    for kernel, sorts in ((None, False), ("xla", True)):
        lm = lm_of("llama", dtype=jnp.bfloat16, kernel=kernel)
        jaxpr = jax.make_jaxpr(lm.hidden)(params_of("llama"), TOKENS, MASK)
        assert ("= sort[" in str(jaxpr)) is sorts


@pytest.mark.campaign
@pytest.mark.parametrize("axes", [{"tensor": 4}, {"fsdp": 2, "tensor": 2}])
def test_on_a_mesh_states_and_gradients_are_the_same(axes):
    arch = dataclasses.replace(arch_of("llama"), vocab_size=24)  # two key heads: fewer than the four devices of tensor
    lm, params = causal_lm.causal_lm(arch, kernel="xla"), jax.tree.map(np.asarray, params_of("llama"))
    params["embed"]["tokens"] = np.pad(params["embed"]["tokens"], ((0, 1), (0, 0)))
    expected, wanted = states_and_gradient(lm, params)
    mesh = make_mesh(**axes)
    with jax.set_mesh(mesh):
        hidden, gradient = states_and_gradient(lm, place(params, param_shardings(mesh, params)))
    assert_close(hidden[MASK], expected[MASK], of_max=1e-5)
    near(gradient, wanted, 1e-5)
