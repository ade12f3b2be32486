"""Tokens a second of PPO's loss and gradient, beside the machine's matrix peak and beside the same in torch.

    python -m benchmarks.learner
    python -m benchmarks.learner --json benchmarks/results/learner.json

One run is the forward and backward pass of `pgjax.ppo.ppo_loss` (clipped surrogate + value loss, the value head on
the shared body) over a batch, without the optimizer:

    tokens/s = batch_size * length / seconds
    MFU      = perf.training_flops(tokens, context = length / 2, head_tokens = batch_size * new_tokens)
               / (seconds * measured matrix peak of that dtype)

Log-probabilities are computed on the last `new_tokens` tokens only, here as in torch. In bfloat16 parameters stay
float32 and are cast inside: torch does that by autocast; its model with bfloat16 weights (which training should not
use: small updates vanish) is shown beside. Losses of all are in the report, so that one sees that the work is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import pgjax as pg
from benchmarks.timing import (
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
from experiments.ppo import Config as PPO
from pgjax import perf, ppo


@dataclasses.dataclass(frozen=True)
class Config:
    """One benchmark. The defaults are the shapes that the committed table was measured at."""

    model: str = "SmolLM2-135M-Instruct"  # folder, .gguf file, hub id, or a model that an installed package ships
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # of activations; parameters and gradients are float32
    batch_size: int = 8  # sequences
    length: int = 128  # tokens a sequence
    new_tokens: int = 64  # of them sampled: the window of the log-probabilities
    repeats: int = 5  # timed rounds
    peer: bool = True  # alternate with torch where it is installed
    peer_threads: int | None = None  # of torch, None for its own choice; 1 may be faster on a busy machine
    seed: int = 0  # of the batch
    json: Path | None = None  # write the report here too


def main(config: Config) -> Row:
    """Run the benchmark; return and print the report."""
    if not 0 < config.new_tokens < config.length:
        raise ValueError(f"new_tokens={config.new_tokens} must be between 0 and length={config.length}")
    lm, params, _ = pg.load(config.model)
    absent = missing_peer() if config.peer else "peer left out: --no-peer"
    batch = make_batch(config, lm, params)
    report: Row = {"machine": machine(), "config": plain(config), "peer": absent, "peaks": {}, "rows": []}
    for dtype in config.dtypes:
        runs = contenders(config, lm, params, batch, dtype, absent is None)
        peaks, times = with_peaks(dtype, {who: timed(run) for who, run in runs.items()}, config.repeats)
        report["peaks"][dtype] = peaks._asdict()
        report["rows"] += [
            {"who": who, "dtype": dtype, "loss": loss_of(run), **measure(config, lm.arch, peaks, times[who])}
            for who, run in runs.items()
        ]
    add_ratios(report["rows"])
    show(f"learner, {config.batch_size} x {config.length} tokens, window {config.new_tokens}", report, COLUMNS)
    save(report, config.json)
    return report


def make_batch(config: Config, lm: pg.CausalLM, params: Any) -> ppo.Batch:
    """Make random experience whose old log-probabilities lie a little beside the model's own, so that some are clipped."""
    draw = np.random.default_rng(config.seed)
    rows, window = config.batch_size, config.new_tokens + 1
    tokens = jnp.asarray(draw.integers(1, lm.arch.vocab_size, (rows, config.length)), jnp.int32)
    mask = jnp.broadcast_to(jnp.arange(window)[None, :] > 0, (rows, window))
    hidden = lm.hidden(params, tokens)[:, -window:]
    logprobs = pg.linear_token_logprobs(hidden, lm.unembedding(params), tokens[:, -window:])
    noise = lambda scale: jnp.asarray(draw.normal(0, scale, (rows, window)), jnp.float32)
    return ppo.Batch(
        tokens=tokens,
        attention_mask=jnp.ones(tokens.shape, bool),
        mask=mask,
        old_logprobs=logprobs + noise(0.2),
        old_values=jnp.zeros((rows, window)),
        returns=noise(1.0),
        advantages=noise(1.0),
    )


def contenders(
    config: Config, lm: pg.CausalLM, params: Any, batch: ppo.Batch, dtype: str, peer: bool
) -> dict[str, Callable[[], Any]]:
    """Give, for each contender, a call that computes the loss and its gradient."""
    ours = pg.causal_lm(lm.arch, dtype=jnp.dtype(dtype))
    defaults = PPO()
    options: dict[str, Any] = {"clip_eps": defaults.clip_eps, "value_coef": defaults.value_coef}

    def loss(params: Any, batch: ppo.Batch) -> jax.Array:
        return ppo.ppo_loss(params, batch, lm=ours, temperature=1.0, value_clip_eps=None, entropy_coef=0.0, **options)[
            0
        ]

    step = jax.jit(jax.value_and_grad(loss))
    both = {"lm": params, "value": pg.init_value_head(lm.arch.width)}
    runs: dict[str, Callable[[], Any]] = {"pgjax": lambda: step(both, batch)}
    if peer:
        from benchmarks.peer import learner, torch_model

        mixed = dtype != "float32"
        name = "torch autocast" if mixed else "torch"
        runs[name] = learner(torch_model(lm, params, "float32", config.peer_threads), batch, autocast=mixed, **options)
        if mixed:
            runs[f"torch {dtype} weights"] = learner(
                torch_model(lm, params, dtype, config.peer_threads), batch, autocast=False, **options
            )
    return runs


def loss_of(run: Callable[[], Any]) -> float:
    """Read the loss of a run, which is alone or beside a gradient."""
    result = run()
    return float(result[0] if isinstance(result, tuple) else result)


def measure(config: Config, arch: pg.Architecture, peaks: perf.Peaks, timing: Timing) -> Row:
    """Turn times into the figures of the table."""
    tokens = config.batch_size * config.length
    flops = perf.training_flops(
        arch, tokens=tokens, context=config.length / 2, head_tokens=config.batch_size * config.new_tokens
    )
    row = figures(timing, tokens)
    return {**row, "flops": flops, "mfu": perf.mfu(flops, row["seconds"], peaks.matmul_flops)}


COLUMNS: dict[str, Callable[[Row], str]] = {
    "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
    "seconds (spread)": lambda row: (
        f"{row['seconds']:.3f} ({row['fastest_seconds']:.3f} to {row['slowest_seconds']:.3f})"
    ),
    "CPU s": lambda row: f"{row['cpu_seconds']:.2f}",
    "MFU": lambda row: f"{row['mfu']:.0%}",
    "loss": lambda row: f"{row['loss']:.5f}",
}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
