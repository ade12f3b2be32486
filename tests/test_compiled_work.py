"""Work on paper against the work that XLA counts; what hot programs keep in memory, and that none of them turns to the host.

XLA counts the body of a loop once, so models have one layer and the head is the plain product. It counts the program as traced:
its passes would merge what the backward pass of a single layer computes again, which between two loops over layers they can't.
What paper leaves out on purpose: the half of attention that is masked is computed all the same (so paper is asked for all keys),
the backward pass computes attention again from its inputs (two of its products, q . k and weights . v), and norms, activations
and softmax are no products.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

import pgjax as pg
from benchmarks.compile_once import Sizes, lower_learner, lower_sampler
from pgjax.learning import programs
from pgjax.rollout import sample
from pgjax.run.flops import adapter_flops, forward_flops, training_flops
from tests.compile_options import AS_FOR_USERS
from tests.tiny import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("full_compiles")

# Heads wide enough that products are nearly all there is, and rows long enough that attention's are 38% of them.
ARCH = dataclasses.replace(
    ARCHITECTURES["llama"], width=64, heads=2, kv_heads=1, head_dim=128, mlp_width=128, vocab_size=512, depth=1
)
ROWS, LENGTH = 2, 128
TOKENS = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
PAPER = {"tokens": ROWS * LENGTH, "context": LENGTH, "head_tokens": ROWS * LENGTH}
SIZES = Sizes(
    "float32", sampler_rows=2, prompt_length=4, new_tokens=5, learner_rows=4, length=8, window=5, microbatches=2
)


def counted(function, lm: pg.CausalLM) -> float:
    params = jax.eval_shape(lm.init, jax.random.key(0))
    return jax.jit(function).lower(params, TOKENS).cost_analysis()["flops"]


def attention_once() -> float:
    return 4.0 * ARCH.depth * ARCH.heads * ARCH.head_dim * LENGTH * ROWS * LENGTH


def test_a_forward_pass_is_what_paper_says():
    lm = pg.causal_lm(ARCH)
    paper = forward_flops(ARCH, **PAPER)
    assert paper <= counted(lm.apply, lm) <= 1.03 * paper


@pytest.mark.parametrize("remat", [False, True])
def test_a_gradient_is_what_paper_says_and_what_is_computed_again(remat):
    lm = pg.causal_lm(ARCH, remat=remat)

    def loss(params, tokens):
        return pg.token_logprobs(lm.apply(params, tokens), tokens).sum()

    again = attention_once()
    if remat:  # all of the layer but its last product, whose result no gradient needs; not the head
        last = 2 * ROWS * LENGTH * ARCH.mlp_width * ARCH.width
        again = forward_flops(ARCH, **{**PAPER, "head_tokens": 0}) - last
    paper = training_flops(ARCH, **PAPER)
    found = counted(jax.grad(loss), lm)
    assert found == pytest.approx(paper + again, rel=0.03)


def test_a_gradient_of_adapters_computes_none_of_the_kernels():
    lm = pg.causal_lm(ARCH)
    frozen = jax.eval_shape(lm.init, jax.random.key(0))
    trained = jax.eval_shape(functools.partial(pg.init_lora, rank=1), jax.random.key(0), frozen)

    def loss(trained, frozen, tokens):
        return pg.token_logprobs(lm.apply(pg.with_lora(frozen, trained), tokens), tokens).sum()

    found = jax.jit(jax.grad(loss)).lower(trained, frozen, TOKENS).cost_analysis()["flops"]
    assert found == pytest.approx(adapter_flops(ARCH, **PAPER) + attention_once(), rel=0.05)


def with_head(lm: pg.CausalLM):
    init = lambda key: {"lm": lm.init(key), "value": pg.init_value_head(lm.arch.width)}
    return jax.eval_shape(init, jax.random.key(0))


def lower_scored_sampler(lm: pg.CausalLM) -> jax.stages.Lowered:
    program = functools.partial(sample.sample_scored, lm, max_new_tokens=SIZES.new_tokens)
    prompts = functools.partial(jax.ShapeDtypeStruct, (SIZES.sampler_rows, SIZES.prompt_length))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(program).lower(with_head(lm), prompts(jnp.int32), prompts(jnp.bool_), key)


def lower_teacher_forcing(lm: pg.CausalLM, parts: int) -> jax.stages.Lowered:
    frame = functools.partial(jax.ShapeDtypeStruct, (FORCED_ROWS, SIZES.length))
    temperature = jax.ShapeDtypeStruct((), jnp.float32)
    return programs.teacher_force.lower(
        lm, with_head(lm), frame(jnp.int32), frame(jnp.bool_), temperature, window=SIZES.window, parts=parts
    )


LM = pg.causal_lm(ARCHITECTURES["llama"])
LARGE = pg.causal_lm(dataclasses.replace(ARCHITECTURES["llama"], vocab_size=4096))  # logits outweigh all else
FORCED_ROWS = 8
LOWERED = {
    "sample": lambda: lower_sampler(LM, SIZES),
    "sample_scored": lambda: lower_scored_sampler(LM),
    "update": lambda: lower_learner(LM, SIZES),
    "teacher_force": lambda: lower_teacher_forcing(LARGE, 4),
    "teacher_force at once": lambda: lower_teacher_forcing(LARGE, 1),
}


@functools.cache
def program(name: str) -> jax.stages.Compiled:
    return LOWERED[name]().compile(AS_FOR_USERS)


@pytest.mark.parametrize("name", ["sample", "sample_scored", "update", "teacher_force"])
def test_a_compiled_program_never_turns_to_the_host(name):
    text = program(name).as_text()
    assert re.search(r"= .* while\(", text)  # there is a loop that could
    assert not re.search(r"callback|outfeed|infeed|\bsend\(|\brecv\(|MoveToHost", text)


def test_a_teacher_forced_pass_holds_the_logits_of_one_part_at_a_time():
    memory = {
        name: program(name).memory_analysis().temp_size_in_bytes for name in ("teacher_force at once", "teacher_force")
    }
    assert memory["teacher_force at once"] >= 4 * FORCED_ROWS * SIZES.window * LARGE.arch.vocab_size
    assert memory["teacher_force"] < memory["teacher_force at once"] / 2


def test_an_update_takes_the_states_memory_over():
    parameters = 4 * sum(x.size for x in jax.tree.leaves(with_head(LM)))
    assert program("update").memory_analysis().alias_size_in_bytes >= 3 * parameters  # and AdamW's two moments


def test_a_callback_would_be_seen():
    def told(x):
        jax.debug.callback(lambda x: None, x)
        return x + 1

    assert "callback" in jax.jit(told).lower(jnp.zeros(3)).compile(AS_FOR_USERS).as_text()
