"""Tokens a second of sampling, beside the machine's memory bandwidth and beside torch's `generate` on the same weights.

    python -m benchmarks.rollout
    python -m benchmarks.rollout --json benchmarks/results/rollout.json

Two programs are timed, one that samples a single token and one that samples them all; what is between them is decode:

    prefill  = seconds of the one-token program (it holds the prompts' forward pass and one draw)
    decode   = (seconds of the whole program - prefill) / (new_tokens - 1), a step
    tokens/s = batch_size * new_tokens / seconds of the whole program
    MBU      = perf.decode_bytes(batch_size, context = prompt + new_tokens / 2) / (decode * measured read bandwidth)
    MFU      = perf.forward_flops of the same step / (decode * measured matrix peak of that dtype)

Every round runs each contender once, in turn. A figure is the median of the rounds, with the fastest and slowest.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import pgjax as pg
from benchmarks.timing import (
    Contender,
    Row,
    Timing,
    add_ratios,
    figures,
    machine,
    missing_peer,
    plain,
    save,
    show,
    timed,
    with_peaks,
)
from pgjax import perf


@dataclasses.dataclass(frozen=True)
class Config:
    """One benchmark. The defaults are the shapes that the committed table was measured at."""

    model: str = "SmolLM2-135M-Instruct"  # folder, .gguf file, hub id, or a model that an installed package ships
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # of activations, weights while decoding, and the cache
    batch_size: int = 16  # prompts
    prompt_length: int = 16  # tokens a prompt
    new_tokens: int = 64  # sampled for each prompt; none ends early
    repeats: int = 5  # timed rounds
    peer: bool = True  # alternate with torch where it is installed
    peer_threads: int | None = None  # of torch, None for its own choice; 1 may be faster on a busy machine
    seed: int = 0  # of the prompts
    json: Path | None = None  # write the report here too


def main(config: Config) -> Row:
    """Run the benchmark; return and print the report."""
    lm, params, _ = pg.load(config.model)
    absent = missing_peer() if config.peer else "peer left out: --no-peer"
    prompts = np.random.default_rng(config.seed).integers(
        1, lm.arch.vocab_size, (config.batch_size, config.prompt_length)
    )
    report: Row = {"machine": machine(), "config": plain(config), "peer": absent, "peaks": {}, "rows": []}
    for dtype in config.dtypes:
        runs: dict[str, Contender] = {}
        for who, generate in contenders(config, lm, params, prompts, dtype, absent is None).items():
            runs |= {
                f"{who} first": timed(functools.partial(generate, 1)),
                f"{who} all": timed(functools.partial(generate, config.new_tokens)),
            }
        peaks, times = with_peaks(dtype, runs, config.repeats)
        report["peaks"][dtype] = peaks._asdict()
        whose = dict.fromkeys(name.rsplit(" ", 1)[0] for name in runs)
        report["rows"] += [
            {
                "who": who,
                "dtype": dtype,
                **measure(config, lm.arch, dtype, peaks, times[f"{who} first"], times[f"{who} all"]),
            }
            for who in whose
        ]
    add_ratios(report["rows"])
    show(f"rollout, {config.batch_size} x ({config.prompt_length} + {config.new_tokens}) tokens", report, COLUMNS)
    save(report, config.json)
    return report


def contenders(
    config: Config, lm: pg.CausalLM, params: Any, prompts: np.ndarray, dtype: str, peer: bool
) -> dict[str, Callable[[int], object]]:
    """Give, for each contender, a call that samples so many tokens a prompt."""
    ours = pg.causal_lm(lm.arch, dtype=jnp.dtype(dtype))
    mask = np.ones(prompts.shape, bool)
    key = jax.random.key(config.seed)

    def generate(new_tokens: int) -> object:
        return pg.sample(ours, params, prompts, mask, key, max_new_tokens=new_tokens)

    if not peer:
        return {"pgjax": generate}
    from benchmarks.peer import generator, torch_model

    return {
        "pgjax": generate,
        "torch generate": generator(torch_model(lm, params, dtype, config.peer_threads), prompts),
    }


def measure(config: Config, arch: pg.Architecture, dtype: str, peaks: perf.Peaks, first: Timing, whole: Timing) -> Row:
    """Turn times into the figures of the table."""
    size = jnp.dtype(dtype).itemsize
    context = config.prompt_length + config.new_tokens / 2
    prefill = statistics.median(first.wall)
    decode = max(statistics.median(whole.wall) - prefill, 1e-9) / (config.new_tokens - 1)
    cpu = max(statistics.median(whole.cpu) - statistics.median(first.cpu), 0.0) / (config.new_tokens - 1)
    must_read = perf.decode_bytes(arch, batch=config.batch_size, context=context, weight_bytes=size, cache_bytes=size)
    must_do = perf.forward_flops(arch, tokens=config.batch_size, context=context, head_tokens=config.batch_size)
    return {
        **figures(whole, config.batch_size * config.new_tokens),
        "prefill_seconds": prefill,
        "decode_step_seconds": decode,
        "decode_step_cpu_seconds": cpu,
        "decode_mbu": perf.mbu(must_read, decode, peaks.read_bytes),
        "decode_mfu": perf.mfu(must_do, decode, peaks.matmul_flops),
    }


COLUMNS: dict[str, Callable[[Row], str]] = {
    "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
    "seconds (spread)": lambda row: (
        f"{row['seconds']:.3f} ({row['fastest_seconds']:.3f} to {row['slowest_seconds']:.3f})"
    ),
    "CPU s": lambda row: f"{row['cpu_seconds']:.2f}",
    "prefill ms": lambda row: f"{1e3 * row['prefill_seconds']:.0f}",
    "decode ms a step": lambda row: f"{1e3 * row['decode_step_seconds']:.1f}",
    "decode MBU": lambda row: f"{row['decode_mbu']:.0%}",
    "decode MFU": lambda row: f"{row['decode_mfu']:.0%}",
}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
