"""What the options of other families cost: time of a gradient and of a decode step, beside Llama's at the same sizes.

    python -m benchmarks.families --layers 4

All have the widths and the vocabulary of Qwen2.5-0.5B, so that FLOPs and bytes are the same, and times compare. Each round
runs every family once; the table shows medians of seconds of all cores (`time.process_time`), which a shared machine disturbs
least. Gemma 3's windows are shorter than the rows here: its cache is smaller.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import pgjax as pg
from benchmarks.timing import machine
from pgjax.models.io.config import architecture_of

SIZES = {
    "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"hidden_activation": "silu"},  # the same activation: gelu's costs more
    "gemma3_text": {"hidden_activation": "silu", "sliding_window": 64, "query_pre_attn_scalar": 64},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """One benchmark."""

    layers: int = 24  # of each model
    batch_size: int = 8  # sequences
    length: int = 128  # tokens a sequence, and slots of the cache
    rounds: int = 7  # of all families in turn; the medians are shown


def programs(name: str, config: Config) -> dict[str, Callable[[], Any]]:
    """Compile a family's gradient and its decode step; return them with their arguments."""
    arch = architecture_of({**SIZES, **SHAPES[name], "model_type": name, "num_hidden_layers": config.layers})
    lm = pg.causal_lm(arch)
    params = lm.init(jax.random.key(0))
    drawn = np.random.default_rng(0).integers(0, arch.vocab_size, (config.batch_size, config.length))
    tokens = jnp.asarray(drawn, jnp.int32)

    def loss(params: Any) -> jax.Array:
        return -pg.linear_token_logprobs(lm.hidden(params, tokens), lm.unembedding(params), tokens).mean()

    ready = jax.jit(lm.decode_params)(params)
    cache, last = lm.init_cache(config.batch_size, config.length), config.length - 1
    positions, slots = jnp.full(config.batch_size, last, jnp.int32), jnp.ones(tokens.shape, bool)
    gradient = jax.jit(jax.grad(loss))
    step = jax.jit(lambda ready, cache: lm.decode(ready, tokens[:, -1], positions, jnp.int32(last), slots, cache)[0])
    return {"gradient": lambda: gradient(params), "decode step": lambda: step(ready, cache)}


def main(config: Config) -> dict[str, dict[str, float]]:
    """Run every family in turn; print and return the medians in seconds."""
    runs = {name: programs(name, config) for name in SHAPES}
    seconds: dict[str, dict[str, list[float]]] = {name: {what: [] for what in each} for name, each in runs.items()}
    for number in range(config.rounds + 1):  # the first compiles
        for name, each in runs.items():
            for what, run in each.items():
                started = time.process_time()
                jax.block_until_ready(run())
                if number:
                    seconds[name][what].append(time.process_time() - started)
    medians = {name: {what: statistics.median(x) for what, x in each.items()} for name, each in seconds.items()}
    print(machine())
    print("| family | gradient | of llama's | decode step | of llama's |\n| --- | --- | --- | --- | --- |")
    for name, found in medians.items():
        cells = [f"{x:.3f} s | {x / medians['llama'][what]:.2f}" for what, x in found.items()]
        print(f"| {name} | {' | '.join(cells)} |")
    return medians


if __name__ == "__main__":
    main(tyro.cli(Config))
