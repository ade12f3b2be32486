"""Work on paper against the work that XLA counts; what hot programs keep in memory, and that none of them turns to the host.

XLA counts the body of a loop once, so models have one layer and the head is the plain product. It counts the program as traced:
its passes would merge what the backward pass of a single layer computes again, which between two loops over layers they can't.
What paper leaves out on purpose: the half of attention that is masked is computed all the same (so paper is asked for all keys),
the backward pass computes attention again from its inputs (two of its products, q . k and weights . v), and norms, activations
and softmax are no products.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

import pgjax as pg
from benchmarks.compile_once import Sizes, lower_learner, lower_sampler
from pgjax.learning import programs
from pgjax.learning.optimizer import init_state
from pgjax.rollout import sample
from pgjax.run.flops import adapter_flops, forward_flops, training_flops
from tests.compile_options import AS_FOR_USERS
from tests.sizes import campaign_but_for
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


def lower_pass(function, lm: pg.CausalLM, params, parts: int) -> jax.stages.Lowered:
    """Lower a teacher-forced pass."""
    frame = functools.partial(jax.ShapeDtypeStruct, (FORCED_ROWS, SIZES.length))
    temperature = jax.ShapeDtypeStruct((), jnp.float32)
    return function.lower(lm, params, frame(jnp.int32), frame(jnp.bool_), temperature, window=SIZES.window, parts=parts)


def lower_plain_logprobs(lm: pg.CausalLM) -> jax.stages.Lowered:
    """Lower the same by way of the logits."""

    def plain(params, tokens, mask):
        hidden = lm.hidden(params, tokens, mask)[:, -SIZES.window :]
        return pg.token_logprobs(hidden @ lm.unembedding(params).T, tokens[:, -SIZES.window :])

    frame = functools.partial(jax.ShapeDtypeStruct, (FORCED_ROWS, SIZES.length))
    return jax.jit(plain).lower(with_head(lm)["lm"], frame(jnp.int32), frame(jnp.bool_))


def lower_update_with_entropy(lm: pg.CausalLM) -> jax.stages.Lowered:
    optimizer = pg.adamw(1e-5, updates=10)
    x = jax.ShapeDtypeStruct((FORCED_ROWS, SIZES.window), jnp.float32)
    frame = functools.partial(jax.ShapeDtypeStruct, (FORCED_ROWS, SIZES.length))
    inside = jax.ShapeDtypeStruct(x.shape, jnp.bool_)
    return programs.update.lower(
        jax.eval_shape(functools.partial(init_state, optimizer=optimizer), with_head(lm)),
        pg.Batch(frame(jnp.int32), frame(jnp.bool_), inside, x, x, x, x),
        jax.ShapeDtypeStruct((1, FORCED_ROWS), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32), lm=lm,
        algorithm=pg.ppo(entropy_coef=0.1), optimizer=optimizer,
    )  # fmt: skip


LM = pg.causal_lm(ARCHITECTURES["llama"])
LARGE = pg.causal_lm(dataclasses.replace(ARCHITECTURES["llama"], vocab_size=4096))  # logits outweigh all else
FORCED_ROWS = 8
LOWERED = {
    "sample": lambda: lower_sampler(LM, SIZES),
    "sample_scored": lambda: lower_scored_sampler(LM),
    "update": lambda: lower_learner(LM, SIZES),
    "update with entropy": lambda: lower_update_with_entropy(LARGE),
    "teacher_force": lambda: lower_pass(programs.teacher_force, LARGE, with_head(LARGE), 4),
    "reference_logprobs": lambda: lower_pass(programs.reference_logprobs, LARGE, with_head(LARGE)["lm"], 1),
    "by way of the logits": lambda: lower_plain_logprobs(LARGE),
}


@functools.cache
def program(name: str) -> jax.stages.Compiled:
    return LOWERED[name]().compile(AS_FOR_USERS)


@pytest.mark.parametrize(
    "name",
    campaign_but_for(["sample", "sample_scored", "update", "teacher_force", "reference_logprobs"], "sample", "update"),
)
def test_a_compiled_program_never_turns_to_the_host(name):
    text = program(name).as_text()
    assert re.search(r"= .* while\(", text)  # there is a loop that could
    assert not re.search(r"callback|outfeed|infeed|\bsend\(|\brecv\(|MoveToHost", text)


def largest(text: str) -> int:
    """Count the elements of a program's largest array of floats."""
    shapes = re.findall(r"\b(?:f64|f32|bf16|f16)\[([\d,]+)\]", text)
    return max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)


@pytest.mark.parametrize("name", ["teacher_force", "reference_logprobs", "update with entropy"])
def test_nothing_holds_the_logits_of_a_window(name):
    """The bugs: the reference's pass built logits, entropy and values for its log-probabilities; an entropy built logits."""
    logits = FORCED_ROWS * SIZES.window * LARGE.arch.vocab_size
    assert logits > 2 * LARGE.arch.vocab_size * LARGE.arch.width, "the unembedding is smaller"
    assert largest(program("by way of the logits").as_text()) >= logits
    assert largest(program(name).as_text()) < logits / 2
    if name != "update with entropy":  # which holds gradients too
        memory, plain = (program(x).memory_analysis().temp_size_in_bytes for x in (name, "by way of the logits"))
        assert memory < plain / 2


def test_a_reference_gives_logprobs_and_computes_no_more(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("more than log-probabilities")

    monkeypatch.setattr(programs, "head_logprobs_and_entropy", refuse)
    monkeypatch.setattr(programs, "token_values", refuse)
    lm = pg.causal_lm(dataclasses.replace(ARCHITECTURES["llama"], vocab_size=29))  # that nothing has traced yet
    lower_pass(programs.reference_logprobs, lm, with_head(lm)["lm"], 2)
    with pytest.raises(AssertionError, match="more than log-probabilities"):
        lower_pass(programs.teacher_force, lm, with_head(lm), 2)


def test_an_update_takes_the_states_memory_over():
    parameters = 4 * sum(x.size for x in jax.tree.leaves(with_head(LM)))
    assert program("update").memory_analysis().alias_size_in_bytes >= 3 * parameters  # and AdamW's two moments


def test_a_callback_would_be_seen():
    def told(x):
        jax.debug.callback(lambda x: None, x)
        return x + 1

    assert "callback" in jax.jit(told).lower(jnp.zeros(3)).compile(AS_FOR_USERS).as_text()
