"""Work on paper against the work that the compiler counts in loop-free programs, and no way to the host inside hot loops.

XLA counts the body of a loop once, so models have one layer and the head is the plain product. What paper leaves out on purpose:
the half of attention that is masked is computed all the same (so paper is asked for all keys), the backward pass computes
attention again from its inputs (two of its products, q . k and weights . v), and norms, activations and softmax are no products.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

import pgjax as pg
from benchmarks.compile_once import Sizes, lower_learner, lower_sampler
from pgjax import perf
from tests.compiling import AS_FOR_USERS
from tests.tiny import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("full_compiles")

# Wide enough that products are nearly all there is.
ARCH = dataclasses.replace(
    ARCHITECTURES["llama"], width=256, heads=8, kv_heads=4, head_dim=32, mlp_width=768, vocab_size=512, depth=1
)
ROWS, LENGTH = 2, 32
TOKENS = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
PAPER = {"tokens": ROWS * LENGTH, "context": LENGTH, "head_tokens": ROWS * LENGTH}
SIZES = Sizes(
    "float32", sampler_rows=2, prompt_length=4, new_tokens=5, learner_rows=4, length=8, window=5, microbatches=2
)


def counted(function, lm: pg.CausalLM) -> float:
    params = jax.eval_shape(lm.init, jax.random.key(0))
    return jax.jit(function).lower(params, TOKENS).compile(AS_FOR_USERS).cost_analysis()["flops"]


def attention_once() -> float:
    return 4.0 * ARCH.depth * ARCH.heads * ARCH.head_dim * LENGTH * ROWS * LENGTH


def test_a_forward_pass_is_what_paper_says():
    lm = pg.causal_lm(ARCH)
    paper = perf.forward_flops(ARCH, **PAPER)
    assert paper <= counted(lm.apply, lm) <= 1.03 * paper


@pytest.mark.parametrize("remat", [False, True])
def test_a_gradient_is_what_paper_says_and_what_is_computed_again(remat):
    lm = pg.causal_lm(ARCH, remat=remat)

    def loss(params, tokens):
        return pg.token_logprobs(lm.apply(params, tokens), tokens).sum()

    again = attention_once()
    if remat:  # all of the layer but its last product, whose result no gradient needs; not the head
        last = 2 * ROWS * LENGTH * ARCH.mlp_width * ARCH.width
        again = perf.forward_flops(ARCH, **{**PAPER, "head_tokens": 0}) - last
    paper = perf.training_flops(ARCH, **PAPER)
    found = counted(jax.grad(loss), lm)
    assert found == pytest.approx(paper + again, rel=0.03)


@pytest.mark.parametrize("lower", [lower_sampler, lower_learner])
def test_a_compiled_program_never_turns_to_the_host(lower):
    text = lower(pg.causal_lm(ARCHITECTURES["llama"]), SIZES).compile(AS_FOR_USERS).as_text()
    assert re.search(r"= .* while\(", text)  # there is a loop that could
    assert not re.search(r"callback|outfeed|infeed|\bsend\(|\brecv\(|MoveToHost", text)


def test_a_callback_would_be_seen():
    def told(x):
        jax.debug.callback(lambda x: None, x)
        return x + 1

    assert "callback" in jax.jit(told).lower(jnp.zeros(3)).compile(AS_FOR_USERS).as_text()
