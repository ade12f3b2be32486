"""What only an NVIDIA GPU can show. By hand, there: JAX_PLATFORMS=cuda pytest --numprocesses 0 tests/test_gpu.py"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax.learning import programs
from pgjax.models.attention import cuda_capability
from pgjax.models.decode_attention import slot_attention
from tests.compare import assert_close
from tests.test_slot_attention import case, plainly
from tests.tiny import ARCHITECTURES, left_padded

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "gpu" or cuda_capability() is None, reason="no NVIDIA GPU"),
    pytest.mark.usefixtures("full_compiles"),
]

ARCH = dataclasses.replace(ARCHITECTURES["qwen3"], head_dim=64, width=64, mlp_width=96, vocab_size=600)
PROMPTS, PROMPT_MASK = left_padded((30, 4, 1, 17), 30, vocab=600)
NEW = 20


def lm_of(**options) -> pg.CausalLM:
    """The functions of a small model whose heads the kernels take."""
    return pg.causal_lm(ARCH, **options)


@functools.cache
def params():
    """Weights that give logits some nats apart."""
    return jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, lm_of().init(jax.random.key(0)))


def relative(x, exact) -> float:
    """|x - exact| / |exact|; 0 where both are 0."""
    x, exact = np.asarray(x, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(x - exact) / max(np.linalg.norm(exact), 1e-30))


def test_whole_sequences_by_cudnn_are_as_exact_as_under_a_mask():
    mask = np.ones((4, 61), bool)
    mask[1, :20] = mask[2, 40:] = mask[3, :10] = mask[3, 50:] = False
    draw = np.random.default_rng(0)
    tokens, direction = draw.integers(0, 600, mask.shape), draw.standard_normal((*mask.shape, ARCH.width))

    def states_and_gradient(lm):
        def total(params):
            hidden = lm.hidden(params, tokens, mask)
            return jnp.sum(jnp.where(mask[..., None], hidden.astype(jnp.float32) * direction, 0)), hidden

        (_, hidden), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params())
        return np.asarray(hidden, np.float32)[mask], gradient

    with jax.default_matmul_precision("highest"):
        exact, wanted = states_and_gradient(lm_of())
    errors = {}
    for kernel in ("masked", "cudnn"):
        found, gradient = states_and_gradient(lm_of(dtype=jnp.bfloat16, kernel=kernel))
        errors[kernel] = max(relative(found, exact), *jax.tree.leaves(jax.tree.map(relative, gradient, wanted)))
    assert errors["cudnn"] < 1.5 * errors["masked"] < 0.45  # these weights are large for 16 bits


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "head_dim", "index"),
    [(14, 2, 512, 64, 400), (9, 3, 130, 64, 129), (16, 4, 300, 128, 200), (8, 8, 7, 16, 3), (40, 2, 90, 32, 64)],
)
def test_the_decode_kernel_equals_attention_under_a_mask(heads, kv_heads, length, head_dim, index):
    arguments = case(5, heads, kv_heads, length, head_dim, index, jnp.bfloat16)
    assert_close(jax.jit(slot_attention)(*arguments), jax.jit(plainly)(*arguments), 0.02)


@pytest.mark.parametrize(("dtype", "precision", "bound"), [("float32", "highest", 1e-4), ("bfloat16", None, 0.1)])
def test_the_samplers_logprobs_are_those_of_a_teacher_forced_pass(dtype, precision, bound):
    lm, both = lm_of(dtype=jnp.dtype(dtype)), {"lm": params(), "value": pg.init_value_head(ARCH.width)}
    with jax.default_matmul_precision(precision):
        rolled, policy = pg.sample_scored(lm, both, PROMPTS, PROMPT_MASK, jax.random.key(1), max_new_tokens=NEW)
        again = pg.sample(lm, params(), PROMPTS, PROMPT_MASK, jax.random.key(1), max_new_tokens=NEW)
        given = rolled.tokens, rolled.attention_mask, jnp.float32(1.0)
        forced = programs.teacher_force(lm, both, *given, window=NEW + 1, parts=2)
        ref_logprobs = programs.reference_logprobs(lm, params(), *given, window=NEW + 1, parts=2)
    assert np.array_equal(rolled.tokens, again.tokens)
    mask = np.asarray(rolled.mask)[:, -NEW - 1 :]
    assert_close(np.asarray(policy.logprobs)[mask], np.asarray(forced.logprobs)[mask], bound)
    assert_close(np.asarray(policy.entropy)[mask], np.asarray(forced.entropy)[mask], bound)
    assert np.array_equal(np.asarray(ref_logprobs)[mask], np.asarray(forced.logprobs)[mask]), "the KL to itself is 0"


def test_training_climbs_its_reward_and_compiles_once():
    lm, scores = lm_of(dtype=jnp.bfloat16), []
    it = pg.iteration(
        lm, pg.ppo(kl_coef=0.01, value_coef=0.1), pg.adamw(2e-2, updates=1000), reference=params(), max_new_tokens=NEW,
        microbatches=2,
    )  # fmt: skip
    state = it.init(params(), jax.random.key(0))
    prompts, mask = np.repeat(PROMPTS, 16, axis=0), np.repeat(PROMPT_MASK, 16, axis=0)
    for _ in range(30):
        rollout = it.sample(state, prompts, mask)
        score = (np.asarray(rollout.tokens)[:, -NEW:] % 2).mean(1, dtype=np.float32)
        state, _ = it.learn(state, rollout, score)
        scores.append(float(score.mean()))
    assert scores[0] < 0.6 and np.mean(scores[-3:]) > 0.8
    assert programs.update._cache_size() == 1
