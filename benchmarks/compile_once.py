"""Trace and compile one program in this process, from shapes alone, and print the seconds as one line of JSON.

    python -m benchmarks.compile_once '{"program": "sampler", "cache": "/folder", "dtype": "float32", ...}'

`benchmarks.compile` starts it: a program can be compiled cold only once in a process.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, NamedTuple

_STARTED = time.perf_counter()

import jax  # noqa: E402  importing is part of what is timed
import jax.numpy as jnp  # noqa: E402

import pgjax as pg  # noqa: E402
from pgjax.learning import programs  # noqa: E402
from pgjax.learning.optimizer import TrainState, init_state  # noqa: E402
from pgjax.models.io.config import architecture_of  # noqa: E402

_IMPORTED = time.perf_counter()
PROGRAMS = ("sampler", "learner")
HITS, MISSES = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


class Sizes(NamedTuple):
    """What the two programs work on."""

    dtype: str  # of activations, and of weights while decoding
    sampler_rows: int
    prompt_length: int
    new_tokens: int
    learner_rows: int
    length: int
    window: int  # entries of the token frame that the losses see
    microbatches: int


def lower_sampler(lm: pg.CausalLM, sizes: Sizes) -> jax.stages.Lowered:
    """Trace `pg.sample`, prefill and decode loop, as inside a user's jit."""

    def sample(params: Any, prompts: jax.Array, mask: jax.Array, key: jax.Array) -> Any:
        return pg.sample(lm, params, prompts, mask, key, max_new_tokens=sizes.new_tokens)

    prompts = (sizes.sampler_rows, sizes.prompt_length)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(lm.init, key)
    return jax.jit(sample).lower(
        params, jax.ShapeDtypeStruct(prompts, jnp.int32), jax.ShapeDtypeStruct(prompts, jnp.bool_), key
    )


def lower_learner(lm: pg.CausalLM, sizes: Sizes) -> jax.stages.Lowered:
    """Trace `programs.update`: gradient of PPO's loss, clipping by the global norm, AdamW."""
    optimizer = pg.adamw(1e-5, updates=1000)

    def init(key: jax.Array) -> TrainState:
        return init_state({"lm": lm.init(key), "value": pg.init_value_head(lm.arch.width)}, optimizer)

    state = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    array: Any = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    rows, window = sizes.learner_rows, sizes.window
    batch = pg.Batch(
        array(jnp.int32, rows, sizes.length), array(bool, rows, sizes.length), array(bool, rows, window),
        *(array(jnp.float32, rows, window) for _ in range(5)),
    )  # fmt: skip
    return programs.update.lower(
        state, batch, array(jnp.int32, 1, rows), array(jnp.int32), lm=lm, optimizer=optimizer,
        algorithm=pg.ppo(), microbatches=sizes.microbatches,
    )  # fmt: skip


def measure(program: str, model: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Lower and compile one program, and count the hits and misses of the persistent cache.

    Args:
        program: of PROGRAMS.
        model: fields of a config.json.
        sizes: of the work.

    Returns:
        "trace" and "compile" seconds, "cpu" seconds of all threads, "hits" and "misses" of the cache.
    """
    found = {HITS: 0, MISSES: 0}

    def count(event: str, **_: Any) -> None:
        if event in found:
            found[event] += 1

    jax.devices()  # the backend starts before the clock does
    jax.monitoring.register_event_listener(count)
    lm = pg.causal_lm(architecture_of(model), dtype=jnp.dtype(sizes.dtype))
    lower = lower_sampler if program == "sampler" else lower_learner
    cpu, start = time.process_time(), time.perf_counter()
    lowered = lower(lm, sizes)
    traced = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    return {
        "trace": traced - start,
        "compile": end - traced,
        "cpu": time.process_time() - cpu,
        "hits": found[HITS],
        "misses": found[MISSES],
    }


def main(line: str) -> None:
    """Compile the program that one line of JSON describes, and print the seconds."""
    request = json.loads(line)
    jax.config.update("jax_compilation_cache_dir", request["cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    found = measure(request["program"], request["model"], Sizes(**request["sizes"]))
    print(json.dumps({**found, "import": _IMPORTED - _STARTED}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
