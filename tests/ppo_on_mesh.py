"""The programs of PPO on a tiny model, on one device or on a mesh: what the tests of sharded programs compare."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import pgjax as pg
from pgjax.learning import programs
from pgjax.learning.algorithm import Batch
from pgjax.learning.optimizer import adamw, init_state
from pgjax.parallel.sharding import make_mesh, param_shardings, place
from tests.tiny import ARCHITECTURES, left_padded, noise_on_every_leaf

LAYOUTS = (
    {"data": 4},
    {"fsdp": 4},
    {"tensor": 4},  # more than the two key-value heads of the tiny Llama
    {"data": 2, "fsdp": 2},
    {"fsdp": 2, "tensor": 2},
)
ROWS, NEW = 16, 5
PROMPTS, PROMPT_MASK = left_padded((7, 4, 1, 5, 3, 6, 2, 7) * 2, 7)
OPTIMIZER = adamw(1e-2, updates=4, max_grad_norm=None)


def tiny_lm(name: str) -> pg.CausalLM:
    """A tiny model of one layer whose vocabulary four devices can share."""
    return pg.causal_lm(dataclasses.replace(ARCHITECTURES[name], vocab_size=24, depth=1))


def host_params(lm: pg.CausalLM) -> dict:
    """Parameters on the host, every leaf with noise: {"lm", "value"}."""
    rng = np.random.default_rng(2)
    head = {"kernel": rng.standard_normal(lm.arch.width).astype(np.float32), "bias": np.float32(0.1)}
    return {"lm": noise_on_every_leaf(lm), "value": head}


@contextlib.contextmanager
def placed(axes: dict | None, tree):
    """Enter a mesh, with a tree of parameters on it; None: one device."""
    if axes is None:
        yield jax.device_put(tree)
        return
    mesh = make_mesh(**axes)
    with jax.set_mesh(mesh):
        yield place(tree, param_shardings(mesh, tree))


def sample(lm: pg.CausalLM, params, temperature: float) -> pg.Rollout:
    """Sample from the fixed prompts with the fixed key."""
    options = {"max_new_tokens": NEW, "eos_ids": (3,), "temperature": temperature}
    return pg.sample(lm, params["lm"], PROMPTS, PROMPT_MASK, jax.random.key(5), **options)


def acted(lm: pg.CausalLM, params) -> dict:
    """Sample greedily and not, and teacher-force what was sampled in two parts, as the policy and as a reference."""
    greedy, rollout = sample(lm, params, 0.0), sample(lm, params, 1.0)
    given = rollout.tokens, rollout.attention_mask, jnp.float32(1.0)
    policy = programs.teacher_force(lm, params, *given, window=NEW + 1, parts=2)
    ref_logprobs = programs.reference_logprobs(lm, params["lm"], *given, window=NEW + 1, parts=2)
    return jax.device_get({"greedy": greedy, "rollout": rollout, "policy": policy, "ref_logprobs": ref_logprobs})


@functools.cache
def experience() -> tuple[Batch, np.ndarray]:
    """What there is to learn from, and in which order, on the host."""
    rng = np.random.default_rng(4)
    mask = np.arange(NEW + 1)[None, :] >= 1 + rng.integers(0, NEW, (ROWS, 1))
    tokens = np.concatenate([PROMPTS, rng.integers(0, 24, (ROWS, NEW))], axis=1).astype(np.int32)
    seen = np.concatenate([PROMPT_MASK, np.ones((ROWS, NEW), bool)], axis=1)
    old, values, returns, advantages, frozen = rng.standard_normal((5, ROWS, NEW + 1)).astype(np.float32)
    batch = Batch(tokens, seen, mask, old - 3, values, returns, advantages, frozen - 3)
    return batch, np.random.default_rng(5).permutation(ROWS).reshape(2, -1).astype(np.int32)


def update(lm: pg.CausalLM, state, number: int):
    """Learn from one of the two minibatches of `experience`, in two microbatches."""
    batch, order = experience()
    return programs.update(
        state, batch, order, jnp.int32(number), lm=lm, optimizer=OPTIMIZER, microbatches=2,
        algorithm=pg.ppo(kl_loss_coef=0.1, entropy_coef=0.1),
    )  # fmt: skip


def learned(lm: pg.CausalLM, params) -> dict:
    """Take two updates; the first state is kept on the host, the last one where it is too."""
    state = init_state(params, OPTIMIZER)
    layout = jax.tree.map(lambda x: x.sharding, state)
    state, losses = update(lm, state, 0)
    found = jax.device_get({"losses": losses, "first": state})
    state, _ = update(lm, state, 1)
    assert jax.tree.map(lambda x: x.sharding, state) == layout
    return found | {"second": jax.device_get(state), "state": state, "layout": layout}
