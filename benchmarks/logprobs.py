"""Memory and time of log-probabilities and their gradients that never hold [B, T, V], beside the naive program's.

    python -m benchmarks.logprobs
    python -m benchmarks.logprobs --json benchmarks/results/logprobs.json

Both compute sum_t w_t log pi(token_t), with fixed random weights w, and its gradients for hidden and unembedding:

    pgjax     = pg.linear_token_logprobs(hidden, unembedding, tokens)
    naive jax = pg.token_logprobs(hidden @ unembedding.T, tokens)
    naive jax, float32 logits: the same with the product's sums and result in float32, as in pgjax; in bfloat16 only

    temporaries = compiled.memory_analysis().temp_size_in_bytes, of the program that takes value and gradients
    tokens/s    = batch_size * length / seconds
    flops       = 6 * B * T * V * D: one product forward, two backward. pgjax computes the logits a second time, 8 in all: that
                  is its price, and not counted as work
    bytes       = hidden and unembedding read once, their gradients written once
    MFU         = flops / (seconds * measured matrix peak of that dtype)

The report holds the value of each, and the error of our gradients beside the naive ones, to show that the work is the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pgjax as pg
from benchmarks.checks import Dtype, check, command
from benchmarks.timing import (
    LIMIT,
    SPEED,
    Row,
    Timing,
    add_ratios,
    begun,
    figures,
    roofline,
    save,
    show,
    timed,
    with_peaks,
)
from pgjax.run.peaks import Peaks

Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # hidden, unembedding, tokens, weights
Loss = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """One benchmark. The defaults are SmolLM2's head over four rows of 1024 tokens."""

    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")  # of hidden states and unembedding
    batch_size: int = 4  # rows
    length: int = 1024  # tokens a row
    vocab_size: int = 49152  # rows of the unembedding
    width: int = 576  # of the hidden states
    chunk_size: int = 1024  # entries of the vocabulary that pgjax works on at a time
    repeats: int = 5  # timed rounds
    seed: int = 0  # of all inputs
    json: Path | None = None  # write the report here too


def main(config: Config) -> Row:
    """Run the benchmark; return and print the report."""
    check(config)
    report = begun(config, None)
    for dtype in config.dtypes:
        inputs = make_inputs(config, dtype)
        programs = {
            who: jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()
            for who, loss in losses(config, dtype).items()
        }
        runs = {who: timed(functools.partial(program, *inputs)) for who, program in programs.items()}
        peaks, times = with_peaks(report, dtype, runs, config.repeats)
        exact = programs[NAIVE if dtype == "float32" else WIDE](*inputs)[1]
        report["rows"] += [
            {"who": who, "dtype": dtype, **measure(config, dtype, peaks, times[who]), **checks(program, inputs, exact)}
            for who, program in programs.items()
        ]
    add_shares(report["rows"])
    add_ratios(report["rows"])
    title = f"log-probabilities and gradients, {config.batch_size} x {config.length} tokens, V {config.vocab_size}"
    show(title, report, COLUMNS)
    save(report, config.json)
    return report


def make_inputs(config: Config, dtype: str) -> Inputs:
    """Draw hidden states, unembedding, tokens and weights; logits come out with a spread of about 1."""
    draw = np.random.default_rng(config.seed)
    shape = config.batch_size, config.length
    normal = lambda *sizes: jnp.asarray(draw.standard_normal(sizes, np.float32))
    hidden, unembedding = normal(*shape, config.width), normal(config.vocab_size, config.width)
    tokens = jnp.asarray(draw.integers(0, config.vocab_size, shape), jnp.int32)
    return hidden.astype(dtype), (unembedding * config.width**-0.5).astype(dtype), tokens, normal(*shape)


NAIVE, WIDE = "naive jax", "naive jax, float32 logits"


def losses(config: Config, dtype: str) -> dict[str, Loss]:
    """Give, for each contender, the weighted sum of the log-probabilities."""

    def ours(hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array, weights: jax.Array) -> jax.Array:
        logprobs = pg.linear_token_logprobs(hidden, unembedding, tokens, chunk_size=config.chunk_size)
        return jnp.vdot(weights, logprobs)

    def naive(hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.vdot(weights, pg.token_logprobs(hidden @ unembedding.T, tokens))

    def wide(hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array, weights: jax.Array) -> jax.Array:
        logits = jnp.matmul(hidden, unembedding.T, preferred_element_type=jnp.float32)
        return jnp.vdot(weights, pg.token_logprobs(logits, tokens))

    both: dict[str, Loss] = {"pgjax": ours, NAIVE: naive}
    return both if dtype == "float32" else {**both, WIDE: wide}


def measure(config: Config, dtype: str, peaks: Peaks, timing: Timing) -> Row:
    """Turn times into the figures of the table."""
    tokens, size = config.batch_size * config.length, jnp.dtype(dtype).itemsize
    flops = 6.0 * tokens * config.vocab_size * config.width
    moved = 2.0 * size * (tokens + config.vocab_size) * config.width
    row = figures(timing, tokens)
    return {**row, **roofline(row["seconds"], flops, moved, peaks)}


def checks(program: Any, inputs: Inputs, exact: tuple[jax.Array, ...]) -> Row:
    """Read a program's temporaries, its value, and the error of its gradients.

    error = the largest of |g - exact| / |exact| over the two gradients, by Frobenius norms.
    """
    value, gradients = program(*inputs)
    norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.float32)))
    errors = [
        norm(g.astype(jnp.float32) - e.astype(jnp.float32)) / norm(e) for g, e in zip(gradients, exact, strict=True)
    ]
    temporaries = program.memory_analysis().temp_size_in_bytes
    return {"temp_bytes": temporaries, "value": float(value), "gradient_error": max(errors)}


def add_shares(rows: list[Row]) -> None:
    """Write into each row its temporaries as a share of the naive program's of the same dtype.

    >>> rows = [{"who": "pgjax", "dtype": "float32", "temp_bytes": 1}, {"who": NAIVE, "dtype": "float32", "temp_bytes": 8}]
    >>> add_shares(rows)
    >>> [row["temp_share"] for row in rows]
    [0.125, 1.0]
    """
    naive = {row["dtype"]: row["temp_bytes"] for row in rows if row["who"] == NAIVE}
    for row in rows:
        row["temp_share"] = row["temp_bytes"] / naive[row["dtype"]]


COLUMNS: dict[str, Callable[[Row], str]] = {
    **SPEED,
    "temporaries MB": lambda row: f"{row['temp_bytes'] / 1e6:.1f}",
    "of the naive": lambda row: f"{row['temp_share']:.1%}",
    **LIMIT,
    "value": lambda row: f"{row['value']:.2f}",
    "gradients off by": lambda row: f"{row['gradient_error']:.1e}",
}


if __name__ == "__main__":
    command(main, Config, __doc__)
