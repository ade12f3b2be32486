"""The chips, models, meshes and programs of PPO that `benchmarks.pod` compiles, from shapes alone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import pgjax as pg
from pgjax.learning import programs
from pgjax.learning.optimizer import TrainState, init_state
from pgjax.models.causal_lm import CausalLM
from pgjax.models.io.config import architecture_of
from pgjax.parallel import sharding
from pgjax.parallel.mesh import make_mesh, parse_mesh
from pgjax.rollout import sample
from pgjax.run.peaks import PUBLISHED

GIB = 1 << 30


class Chip(NamedTuple):
    """One chip. Its links as Google publishes them (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e)."""

    memory: float  # bytes, as the compiler reports them
    flops: float  # bfloat16 operations a second
    read_bytes: float  # of its memory, a second
    link_bytes: float  # that may arrive from other chips a second, over all links together
    # Operations a cycle of the matrix units, the power of two above what the compiler's estimate of a product of size 4096
    # comes to (126,898, 252,216 and 455,675); `flops` over it is the clock.
    flops_a_cycle: float


V5E = Chip(15.75 * GIB, *PUBLISHED["TPU v5e"], 200e9, 2**17)
V5P = Chip(95.74 * GIB, *PUBLISHED["TPU v5p"], 600e9, 2**18)
V6E = Chip(31.25 * GIB, *PUBLISHED["TPU v6e"], 400e9, 2**19)
TOPOLOGIES = {"v5e:4x4": V5E, "v5e:16x16": V5E, "v5p:4x4x4": V5P, "v6e:16x16": V6E}

_QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "rope_theta": 1e6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict[str, Any]] = {  # fields of the config.json of SmolLM2, two Qwen2.5 and Llama 3.1
    "135M": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 1e5,
        "tie_word_embeddings": True,
    },
    "0.5B": {
        **_QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    },
    "1.5B": {
        **_QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    },
    "8B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 5e5,
        "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    },
}  # fmt: skip
# fsdp is one side of the torus: over a whole slice at once the compiler reduces gradients whole and cuts them afterwards. The 8B
# model is gathered over fsdp for sampling, so that a chip needs tensor too.
MESHES = {
    "v5e:4x4": {"8B": "fsdp=2,tensor=8", "": "data=4,fsdp=4"},
    "v5e:16x16": {"8B": "data=2,fsdp=16,tensor=8", "": "data=16,fsdp=16"},
    "v5p:4x4x4": {"8B": "data=4,fsdp=4,tensor=4", "": "data=16,fsdp=4"},
    "v6e:16x16": {"8B": "data=4,fsdp=16,tensor=4", "": "data=16,fsdp=16"},
}
PROGRAMS = ("sampler", "scoring", "reference", "learner")
PARTS = 2  # of the batch that is scored, and of the learner's minibatch, so that the programs hold their loops
OPTIMIZER = pg.adamw(1e-5, updates=1000)


class Case(NamedTuple):
    """A model on a pod, and the lengths that it works on."""

    topology: str
    model: str
    mesh: Mesh
    lm: CausalLM
    prompt_length: int
    new_tokens: int

    @property
    def chip(self) -> Chip:
        """Describe one chip of the pod."""
        return TOPOLOGIES[self.topology]

    @property
    def shares(self) -> int:
        """Count the parts of data x fsdp, which split the rows."""
        return self.size("data") * self.size("fsdp")

    def size(self, axis: str) -> int:
        """Give the size of an axis of the mesh, 1 where there is none."""
        return self.mesh.shape[axis] if axis in self.mesh.axis_names else 1


def make_case(topology: str, model: str, mesh: str | None, *, prompt_length: int, new_tokens: int) -> Case:
    """Describe the pod to jax, and lay the model out over it.

    Args:
        topology: of TOPOLOGIES.
        model: of MODELS.
        mesh: as data=4,fsdp=4; None: of MESHES.
        prompt_length: tokens a prompt.
        new_tokens: tokens a completion.
    """
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    sizes = parse_mesh(MESHES[topology].get(model, MESHES[topology][""]) if mesh is None else mesh)
    lm = pg.causal_lm(architecture_of(MODELS[model]), dtype=jnp.bfloat16)
    return Case(topology, model, make_mesh(devices=devices, **sizes), lm, prompt_length, new_tokens)


def training_state(case: Case) -> TrainState:
    """Give the shapes of policy, critic and Adam's moments, laid out over the mesh."""

    def init() -> TrainState:
        params = {"lm": case.lm.init(jax.random.key(0)), "value": pg.init_value_head(case.lm.arch.width)}
        return init_state(params, OPTIMIZER)

    bare = jax.eval_shape(init)
    layout = sharding.param_shardings(case.mesh, bare)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), bare, layout)


def bytes_a_chip(tree: Any) -> int:
    """Add up the bytes that one device holds of a tree of shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def lower(case: Case, program: str, rows: int) -> jax.stages.Lowered:
    """Trace one program as training runs it.

    Args:
        case: the model on its pod.
        program: of PROGRAMS.
        rows: at once, for each part of data x fsdp; scoring and learner get PARTS times as many, one part after the other.
    """
    state, at_once = training_state(case), rows * case.shares
    split, whole = sharding.batch_sharding(case.mesh), sharding.replicated(case.mesh)
    length, window = case.prompt_length + case.new_tokens, case.new_tokens + 1
    key = jax.eval_shape(lambda: jax.random.key(0))

    def array(dtype: Any, *shape: int) -> Any:  # stands for a jax.Array
        return jax.ShapeDtypeStruct(shape, dtype, sharding=split if len(shape) > 1 else whole)

    with jax.set_mesh(case.mesh):
        if program == "sampler":
            scalars = {"temperature": jnp.float32, "top_k": jnp.int32, "top_p": jnp.float32, "min_p": jnp.float32}
            prompts = at_once, case.prompt_length
            return sample._generate.lower(
                case.lm, state.params["lm"], array(jnp.int32, *prompts), array(bool, *prompts), array(key.dtype),
                {name: array(dtype) for name, dtype in scalars.items()}, array(jnp.int32, 8), array(jnp.int32),
                max_new_tokens=case.new_tokens,
            )  # fmt: skip
        batch = PARTS * at_once
        tokens, mask = array(jnp.int32, batch, length), array(bool, batch, length)
        given = tokens, mask, array(jnp.float32)
        if program == "scoring":
            return programs.teacher_force.lower(case.lm, state.params, *given, window=window, parts=PARTS)
        if program == "reference":
            return programs.reference_logprobs.lower(case.lm, state.params["lm"], *given, window=window, parts=PARTS)
        floats: list[Any] = [array(jnp.float32, batch, window) for _ in range(5)]
        experience = pg.Batch(tokens, mask, array(bool, batch, window), *floats)
        order = jax.ShapeDtypeStruct((1, batch), jnp.int32, sharding=whole)
        return programs.update.lower(
            state, experience, order, array(jnp.int32), lm=case.lm, algorithm=pg.ppo(), optimizer=OPTIMIZER,
            microbatches=PARTS,
        )  # fmt: skip
