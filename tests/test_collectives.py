"""What the compiled programs of a mesh send, and from inside which loops; read from their text, on four devices."""

import collections
import functools

import jax
import jax.numpy as jnp
import pytest

import pgjax as pg
from benchmarks.hlo import collectives
from pgjax.learning import programs
from pgjax.learning.algorithm import Batch
from pgjax.learning.optimizer import adamw, init_state
from pgjax.models.causal_lm import causal_lm
from pgjax.parallel.sharding import batch_sharding, make_mesh, param_shardings, replicated
from pgjax.rollout import sample
from tests.compile_options import AS_FOR_USERS
from tests.sizes import campaign_but_for
from tests.tiny import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("full_compiles")

ROWS, PROMPT, NEW = 16, 8, 7
SHAPE = {"width": 64, "head_dim": 16, "kv_heads": 4, "mlp_width": 160}
CHUNKS = 3
ARCH = pg.Architecture(**{**vars(ARCHITECTURES["llama"]), **SHAPE, "vocab_size": CHUNKS * 1024})
OPTIMIZER = adamw(1e-3, updates=4)
MATRIX = (
    32 * 64 * 4
)  # bytes of the smallest matrix of a layer, split in two; what rows send in a decode step is smaller


def shapes(mesh, tree):
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, param_shardings(mesh, tree)
    )


def compiled(program: str, arch: pg.Architecture, rows: int, *, group_size: int = 1, **axes: int):
    """Compile one of PPO's programs for a mesh, from shapes alone."""
    mesh, lm = make_mesh(**axes), causal_lm(arch)
    state = shapes(
        mesh,
        jax.eval_shape(
            lambda key: init_state({"lm": lm.init(key), "value": pg.init_value_head(arch.width)}, OPTIMIZER),
            jax.random.key(0),
        ),
    )
    whole = functools.partial(jax.ShapeDtypeStruct, sharding=replicated(mesh))
    split = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    tokens, mask = (split((rows, PROMPT + NEW), dtype) for dtype in (jnp.int32, jnp.bool_))
    number, index = whole((), jnp.float32), whole((), jnp.int32)
    with jax.set_mesh(mesh):
        if program == "sample":
            prompts, prompt_mask = (split((rows, PROMPT), dtype) for dtype in (jnp.int32, jnp.bool_))
            options = {"temperature": number, "top_k": index, "top_p": number, "min_p": number}
            lowered = sample._generate.lower(
                lm, state.params["lm"], prompts, prompt_mask, jax.random.key(0), options, whole((8,), jnp.int32), index,
                max_new_tokens=NEW, group_size=group_size,
            )  # fmt: skip
        else:
            inside, x = (split((rows, NEW + 1), dtype) for dtype in (jnp.bool_, jnp.float32))
            batch, order = Batch(tokens, mask, inside, x, x, x, x, x), whole((2, rows // 2), jnp.int32)
            lowered = programs.update.lower(
                state, batch, order, index, lm=lm, optimizer=OPTIMIZER, microbatches=2, algorithm=pg.ppo(),
                group_size=group_size,
            )  # fmt: skip
        return lowered.compile(AS_FOR_USERS)


@pytest.mark.parametrize(
    "axes", campaign_but_for([{"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2}], {"fsdp": 2, "tensor": 2}), ids=str
)
def test_the_sampler_gathers_its_parameters_once_and_none_inside_the_decode_loop(axes):
    found = collectives(compiled("sample", ARCH, ROWS, **axes).as_text())
    decoding = [x for x in found if any(loop.trips is None for loop in x.loops)]
    if "tensor" in axes:  # the logits change hands, so that every device draws for rows of its own
        exchanged = [x for x in decoding if x.bytes >= MATRIX]
        assert [(x.kind, x.bytes) for x in exchanged] == [("all-to-all", ROWS // 2 * ARCH.vocab_size // 2 * 4)]
    else:  # whether any row goes on
        assert [(x.kind, x.bytes) for x in decoding] == [("all-reduce", 1)]
    stacked = [x for x in found if not x.loops and x.shapes[0].startswith(f"f32[{ARCH.depth},")]
    assert [x.kind for x in stacked] == ["all-gather"] * len(("q", "k", "v", "o", "gate", "up", "down"))


def test_the_learners_head_sends_nothing_inside_its_loops_and_scatters_its_gradient():
    text = compiled("update", ARCH, ROWS, data=2, fsdp=2).as_text()
    found = collectives(text)
    assert text.count(f'"known_trip_count":{{"n":"{CHUNKS}"}}') == 2  # the loops over the vocabulary, forward and back
    assert not [x for x in found if any(loop.trips == CHUNKS for loop in x.loops)]
    scattered = [x for x in found if x.kind == "reduce-scatter"]
    assert [x.bytes for x in scattered] == [ARCH.vocab_size * ARCH.width * 4]
    # Every layer's matrices are gathered one layer at a time, forward and back.
    gathered = [x for x in found if x.kind == "all-gather" and ARCH.depth in [loop.trips for loop in x.loops[1:]]]
    assert len(gathered) == 2 * len(("q", "k", "v", "o", "gate", "up", "down"))
    assert max(x.bytes for x in gathered) == ARCH.width * ARCH.mlp_width * 4


def test_fsdp_divides_the_learners_memory():
    arch = pg.Architecture(**{**vars(ARCH), "depth": 12, "width": 128, "mlp_width": 512, "vocab_size": 64})
    size = 4 * sum(x.size for x in jax.tree.leaves(jax.eval_shape(causal_lm(arch).init, jax.random.key(0))))
    memory = compiled("update", arch, 16, fsdp=4).memory_analysis()
    assert memory.argument_size_in_bytes < 1.05 * 3 * size / 4  # parameters and two moments
    assert memory.temp_size_in_bytes < size


@pytest.mark.campaign
@pytest.mark.parametrize("program", ["sample", pytest.param("update", marks=pytest.mark.campaign)])
def test_rows_that_share_a_prompt_send_nothing_more(program):
    found = [collectives(compiled(program, ARCH, 4 * ROWS, data=2, fsdp=2, group_size=g).as_text()) for g in (1, 2)]
    alone, grouped = (collections.Counter((x.kind, tuple(loop.trips for loop in x.loops)) for x in y) for y in found)
    assert alone == grouped
    assert sum(x.bytes for x in found[1]) <= sum(x.bytes for x in found[0])
