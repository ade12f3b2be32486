"""Measure how time and memory of the learner and of a decode step grow with batch, length, vocabulary, depth and microbatches.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --json benchmarks/results/scaling.json

One size at a time is doubled from a small base, a Llama shape with random weights, while the others stay. The figures are

    seconds = the median of runs in which all sizes of all dimensions take turns; the base is one program for all dimensions
    temp    = compiled.memory_analysis().temp_size_in_bytes
    held    = arguments and temporaries: weights, batch or cache, activations
    flops   = on paper: training_flops, forward_flops

and for each of them the exponent p of y = c * size^p, the least-squares slope of log y over log size:

    p = sum (x - mean x) (log y - mean log y) / sum (x - mean x)^2,   x = log size

0: the size costs nothing; 1: in proportion; 2: quadratic; between 0 and 1 a part does not depend on the size. The last exponent
is of the two largest sizes alone, where such a part weighs least. The time's exponent is fitted to each round of runs too: their
range shows the noise of the machine. mfu = flops / seconds / matrix peak. Programs:

    learner = value and gradient of PPO's loss, added up over microbatches (accumulate); half the tokens are sampled
    decode  = one step of sampling: lm.decode, logits, draw; "length" is the filled cache
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pgjax as pg
from benchmarks.checks import Dtype, check, command
from benchmarks.timing import SPEED, Row, Timing, begun, figures, save, show, timed, with_peaks
from pgjax.core.errors import UserError
from pgjax.learning.optimizer import accumulate
from pgjax.learning.policy_loss import policy_loss
from pgjax.models.causal_lm import logits_of
from pgjax.rollout.filters import draw
from pgjax.run.checks import require
from pgjax.run.flops import forward_flops, mfu, training_flops

DIMENSIONS = {
    "learner": ("batch", "length", "vocabulary", "depth", "microbatches"),
    "decode": ("batch", "length", "vocabulary", "depth"),
}
MEASURES = {"seconds": "time", "temp_bytes": "temporaries", "held_bytes": "held", "flops": "flops on paper"}


@dataclasses.dataclass(frozen=True)
class Config:
    """One benchmark: the base, and how often it is doubled."""

    dtype: Dtype = "float32"  # of activations, and of weights while decoding
    batch: int = 8  # rows
    length: int = 64  # tokens a row; of the learner's the last half counts as sampled
    vocabulary: int = 2048  # tokens
    depth: int = 2  # layers
    width: int = 128  # of the hidden states: heads of 32, half as many for keys and values, an MLP three times as wide
    microbatches: int = 1  # of the learner
    doublings: int = 3  # of each size, from the base
    repeats: int = 5  # timed rounds
    programs: tuple[Literal["learner", "decode"], ...] = ("learner", "decode")  # that are measured
    seed: int = 0  # of weights and tokens
    json: Path | None = None  # write the report here too


class Sizes(NamedTuple):
    """One point of a curve."""

    batch: int
    length: int
    vocabulary: int
    depth: int
    microbatches: int


class Program(NamedTuple):
    """A compiled program with its arguments, and its work on paper."""

    compiled: Any
    run: Callable[[], Any]
    flops: float
    tokens: int


def main(config: Config) -> Row:
    """Run the benchmark; return and print the report, with a row for each curve in "exponents"."""
    check(config)
    check_sizes(config)
    report = begun(config, None) | {"exponents": []}
    curves = [curve for name in config.programs for curve in measured_curves(config, name, report)]
    peak = report["peaks"][config.dtype]["matmul_flops"]
    for curve in curves:
        report["exponents"].append(exponents(curve))
        report["rows"] += [row | {"mfu": mfu(row["flops"], row["seconds"], peak)} for row in curve]
    show("scaling: one size at a time, the others as the base", report, COLUMNS)
    show("fitted exponents (of the two largest sizes)", {**report, "rows": report["exponents"]}, EXPONENTS)
    save(report, config.json)
    return report


def check_sizes(config: Config) -> None:
    """Refuse sizes that cannot be doubled so often.

    >>> check_sizes(Config(batch=4, doublings=3))
    Traceback (most recent call last):
    ...
    pgjax.UserError: a batch of 4 does not divide into up to 8 microbatches: give --batch a multiple of 8, or fewer --doublings
    """
    require(config.length >= 2, f"length must be at least 2, got {config.length}")
    most = config.microbatches * 2**config.doublings
    if "learner" in config.programs and config.batch % most:
        raise UserError(
            f"a batch of {config.batch} does not divide into up to {most} microbatches: give --batch a multiple of {most}, or "
            "fewer --doublings"
        )


def measured_curves(config: Config, name: str, report: Row) -> list[list[Row]]:
    """Time one program at each size of each dimension, in turn: a list of rows for each dimension."""
    build = learner_program if name == "learner" else decode_program
    base = Sizes(*(getattr(config, field) for field in Sizes._fields))
    sizes = {
        dimension: [base._replace(**{dimension: getattr(base, dimension) * 2**i}) for i in range(config.doublings + 1)]
        for dimension in DIMENSIONS[name]
    }
    programs = {point: build(config, point) for points in sizes.values() for point in points}
    contenders = {str(point): timed(program.run) for point, program in programs.items()}
    _, times = with_peaks(report, config.dtype, contenders, config.repeats)
    return [
        [
            measure(config, name, dimension, getattr(point, dimension), programs[point], times[str(point)])
            for point in points
        ]
        for dimension, points in sizes.items()
    ]


def architecture(config: Config, sizes: Sizes) -> pg.Architecture:
    """Make a small Llama shape."""
    heads = max(2, config.width // 32)
    return pg.Architecture(
        family="llama", vocab_size=sizes.vocabulary, width=config.width, depth=sizes.depth, heads=heads,
        kv_heads=heads // 2, head_dim=config.width // heads, mlp_width=3 * config.width,
        max_positions=max(sizes.length, 64), activation="silu", norm="rms", norm_eps=1e-5, rope=pg.Rope(theta=10000.0),
        gated_mlp=True, qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=False, tied=True,
    )  # fmt: skip


def learner_program(config: Config, sizes: Sizes) -> Program:
    """Compile the gradient of PPO's loss over random experience."""
    arch = architecture(config, sizes)
    lm = pg.causal_lm(arch, dtype=jnp.dtype(config.dtype))
    params = {"lm": jax.jit(lm.init)(jax.random.key(config.seed)), "value": pg.init_value_head(arch.width)}
    rng = np.random.default_rng(config.seed)
    batch = experience(rng, sizes.batch, sizes.length, sizes.length // 2, sizes.vocabulary)

    def loss(params: Any, batch: pg.Batch) -> tuple[jax.Array, Any]:
        return policy_loss(params, batch, lm=lm, algorithm=pg.ppo(), temperature=1.0)

    def gradient(params: Any, batch: pg.Batch) -> Any:
        return accumulate(loss, params, batch, batch.mask.sum(1), sizes.microbatches)

    compiled = jax.jit(gradient).lower(params, batch).compile()
    tokens = sizes.batch * sizes.length
    flops = training_flops(arch, tokens=tokens, context=sizes.length / 2, head_tokens=tokens / 2)
    return Program(compiled, lambda: compiled(params, batch), flops, tokens)


def experience(draw: np.random.Generator, rows: int, length: int, sampled: int, vocabulary: int) -> pg.Batch:
    """Make random experience, the last tokens of each row sampled."""
    window = sampled + 1
    noise = lambda: jnp.asarray(draw.standard_normal((rows, window)), jnp.float32)
    tokens = jnp.asarray(draw.integers(0, vocabulary, (rows, length)), jnp.int32)
    mask = jnp.broadcast_to(jnp.arange(window)[None, :] > 0, (rows, window))
    guess = jnp.full((rows, window), -math.log(vocabulary))
    return pg.Batch(tokens, jnp.ones(tokens.shape, bool), mask, guess, noise(), noise(), noise())


def decode_program(config: Config, sizes: Sizes) -> Program:
    """Compile one step of the sampler's loop, which writes its cache in place, at the last slot of a full cache."""
    arch = architecture(config, sizes)
    lm = pg.causal_lm(arch, dtype=jnp.dtype(config.dtype))
    ready = lambda params: (lm.decode_params(params), lm.unembedding(params).astype(lm.dtype))
    weights = jax.jit(lambda key: ready(lm.init(key)))(jax.random.key(config.seed))
    keys = jax.random.split(jax.random.key(config.seed), sizes.batch)
    place = jnp.full((sizes.batch,), sizes.length - 1, jnp.int32)
    slots = jnp.ones((sizes.batch, sizes.length), bool)

    def step(cache: Any, weights: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        params, unembedding = weights
        hidden, cache = lm.decode(params, token, place, jnp.int32(sizes.length - 1), slots, cache)
        return cache, draw(logits_of(hidden, unembedding), keys, place)[0]

    held: list[Any] = [lm.init_cache(sizes.batch, sizes.length), jnp.zeros(sizes.batch, jnp.int32)]
    compiled = jax.jit(step, donate_argnums=0).lower(held[0], weights, held[1]).compile()

    def run() -> Any:
        held[:] = compiled(held[0], weights, held[1])
        return held[1]

    flops = forward_flops(arch, tokens=sizes.batch, context=sizes.length, head_tokens=sizes.batch)
    return Program(compiled, run, flops, sizes.batch)


def measure(config: Config, name: str, dimension: str, size: int, program: Program, timing: Timing) -> Row:
    """Turn one point into a row."""
    memory = program.compiled.memory_analysis()
    return {
        "who": f"pgjax {name}",
        "dtype": config.dtype,
        "dimension": dimension,
        "size": size,
        **figures(timing, program.tokens),
        "temp_bytes": memory.temp_size_in_bytes,
        "held_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "flops": program.flops,
    }


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit p of y = c * size^p by least squares of the logarithms.

    Raises:
        ValueError: fewer than two sizes, or a size or a value that is not above 0.

    >>> round(exponent([1, 2, 4, 8], [3, 12, 48, 192]), 12)
    2.0
    """
    if len(sizes) < 2 or min(*sizes, *values) <= 0:
        raise ValueError(f"an exponent needs two sizes or more, all numbers above 0, got {sizes} and {values}")
    x, y = np.log(np.asarray(sizes, np.float64)), np.log(np.asarray(values, np.float64))
    return float((x - x.mean()) @ (y - y.mean()) / ((x - x.mean()) @ (x - x.mean())))


def exponents(curve: Sequence[Row]) -> Row:
    """Fit the exponents of one curve, over all sizes and over the last two, and the time's of each round."""
    sizes = [row["size"] for row in curve]
    column: Callable[[str], list[float]] = lambda key: [row[key] for row in curve]
    by_round = [exponent(sizes, seconds) for seconds in zip(*column("round_seconds"), strict=True)]
    return {
        **{name: curve[0][name] for name in ("who", "dtype", "dimension")},
        "sizes": sizes,
        "exponents": {key: exponent(sizes, column(key)) for key in MEASURES},
        "last_exponents": {key: exponent(sizes[-2:], column(key)[-2:]) for key in MEASURES},
        "rounds_exponents": [min(by_round), max(by_round)],
    }


def meaning(p: float) -> str:
    """Put an exponent into words.

    >>> [meaning(p) for p in (-1.0, 0.05, 0.6, 1.02, 1.4)]
    ['shrinks', 'hardly grows', 'grows, over a fixed part', 'in proportion', 'faster than in proportion']
    """
    names = ((-0.15, "shrinks"), (0.15, "hardly grows"), (0.85, "grows, over a fixed part"), (1.15, "in proportion"))
    return next((name for limit, name in names if p < limit), "faster than in proportion")


COLUMNS: dict[str, Callable[[Row], str]] = {
    "dimension": lambda row: row["dimension"],
    "size": lambda row: str(row["size"]),
    **SPEED,
    "seconds (spread)": lambda row: (
        f"{row['seconds']:.5f} ({row['fastest_seconds']:.5f} to {row['slowest_seconds']:.5f})"
    ),
    "temporaries MB": lambda row: f"{row['temp_bytes'] / 1e6:.2f}",
    "held MB": lambda row: f"{row['held_bytes'] / 1e6:.2f}",
    "GFLOP": lambda row: f"{row['flops'] / 1e9:.3g}",
    "MFU": lambda row: f"{row['mfu']:.0%}",
}


def _fitted(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row['exponents'][key]:.2f} ({row['last_exponents'][key]:.2f})"


EXPONENTS: dict[str, Callable[[Row], str]] = {
    "dimension": lambda row: row["dimension"],
    "sizes": lambda row: ", ".join(map(str, row["sizes"])),
    **{name: _fitted(key) for key, name in MEASURES.items()},
    "time, by rounds": lambda row: "{:.2f} to {:.2f}".format(*row["rounds_exponents"]),
    "time, at the largest": lambda row: meaning(row["last_exponents"]["seconds"]),
}


if __name__ == "__main__":
    command(main, Config, __doc__)
