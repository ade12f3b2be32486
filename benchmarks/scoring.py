"""Tokens a second of a teacher-forced pass over a batch, beside the machine's limits and beside the same in torch.

    python -m benchmarks.scoring
    python -m benchmarks.scoring --peer-pythons ONE/bin/python OTHER/bin/python --json benchmarks/results/scoring.json

One run is `pgjax.learning.programs.teacher_force`: a forward pass without a gradient, and on the last `new_tokens` tokens
log-probabilities, entropy and values. PPO runs it on the policy where it learns from a rollout more than once.

    tokens/s = batch_size * length / seconds
    FLOPs    = forward_flops(tokens, context = length / 2, head_tokens = batch_size * new_tokens)
    bytes    = every weight once, as it is stored
    MFU      = FLOPs / (seconds * measured matrix peak of that dtype)
    limit    = max(FLOPs / matrix peak, bytes / read bandwidth)

torch computes log-probabilities and entropy of the same window, in inference mode, the values left out; in bfloat16 it is
shown with float32 weights under autocast, as ours are stored, and with bfloat16 weights. The report holds the means of both,
to show that the work is the same. Peers are processes of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import pgjax as pg
from benchmarks.checks import Dtype, check, command
from benchmarks.interpreters import Need, Peer
from benchmarks.timing import (
    LIMIT,
    OURS,
    SPEED,
    Contender,
    Row,
    Timing,
    figures,
    median_result,
    roofline,
    save,
    show,
    timed,
    weight_bytes,
)
from benchmarks.worker import Beside, compare, device
from pgjax.core.errors import UserError
from pgjax.learning import programs
from pgjax.run.flops import forward_flops
from pgjax.run.peaks import Peaks

HALF = "torch bfloat16 weights"
PEERS = tuple(
    Peer(who, "benchmarks.peers.torch_model", (Need("torch"), Need("transformers")))
    for who in ("torch", "torch autocast", HALF)
)


@dataclasses.dataclass(frozen=True)
class Config(Beside):
    """One benchmark. The defaults are the shapes that the committed table was measured at."""

    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")  # of activations; parameters are float32
    batch_size: int = 8  # sequences
    length: int = 128  # tokens a sequence
    new_tokens: int = 64  # of them sampled: the window of the log-probabilities
    parts: int = 1  # into which the batch is split, so that the logits of one part exist at a time


def main(config: Config) -> Row:
    """Run the benchmark; return and print the report."""
    check(config)
    if not 0 < config.new_tokens < config.length:
        raise UserError(f"new_tokens={config.new_tokens} must be between 0 and length={config.length}")
    if config.batch_size % config.parts:
        raise UserError(f"batch_size={config.batch_size} does not divide into parts={config.parts}")
    lm, params, _ = pg.load(config.model)
    tokens = np.random.default_rng(config.seed).integers(1, lm.arch.vocab_size, (config.batch_size, config.length))
    report = compare(
        config, config.dtypes, PEERS, lm, params,
        setups=lambda folder, dtype: peer_setups(config, folder, tokens, dtype),
        runs=lambda dtype, peers: {
            OURS: contender(config, lm, params, tokens, dtype), **{who: peers[who].run for who in peers}
        },
        measure=lambda dtype, who, peaks, times: measure(config, lm.arch, peaks, times[who], 2 if who == HALF else 4),
    )  # fmt: skip
    show(f"scoring, {config.batch_size} x {config.length} tokens, window {config.new_tokens}", report, COLUMNS)
    save(report, config.json)
    return report


def contender(config: Config, lm: pg.CausalLM, params: Any, tokens: np.ndarray, dtype: str) -> Contender:
    """Make our run: `programs.teacher_force` on the whole batch."""
    ours = pg.causal_lm(lm.arch, dtype=jnp.dtype(dtype))
    both = {"lm": params, "value": pg.init_value_head(lm.arch.width)}
    ids, temperature = jnp.asarray(tokens, jnp.int32), jnp.float32(1.0)
    attended = jnp.ones(ids.shape, bool)

    def run() -> dict[str, float]:
        # entry 0 of the window is the prompt's last token: nothing is sampled there
        found = programs.teacher_force(
            ours, both, ids, attended, temperature, window=config.new_tokens + 1, parts=config.parts
        )
        logprobs, _, entropy = (np.asarray(x)[:, 1:] for x in found)
        return {"logprob": float(logprobs.mean()), "entropy": float(entropy.mean())}

    return timed(run)


def peer_setups(config: Config, folder: str, tokens: np.ndarray, dtype: str) -> dict[str, Row]:
    """Make the set-ups of the peers of a dtype."""
    shared = {
        "task": "scoring", "folder": folder, "dtype": "float32", "autocast": False, "threads": config.peer_threads,
        "device": device(), "tokens": tokens.tolist(), "window": config.new_tokens,
    }  # fmt: skip
    if dtype == "float32":
        return {"torch": shared}
    return {"torch autocast": shared | {"autocast": True}, HALF: shared | {"dtype": "bfloat16"}}


def measure(config: Config, arch: pg.Architecture, peaks: Peaks, timing: Timing, stored: int) -> Row:
    """Turn times into the figures of the table; `stored` are the bytes of a weight."""
    tokens = config.batch_size * config.length
    flops = forward_flops(
        arch, tokens=tokens, context=config.length / 2, head_tokens=config.batch_size * config.new_tokens
    )
    row = figures(timing, tokens)
    means = {name: median_result(timing, name) for name in ("logprob", "entropy")}
    return {**means, **row, **roofline(row["seconds"], flops, weight_bytes(arch, stored), peaks)}


COLUMNS: dict[str, Callable[[Row], str]] = {
    **SPEED,
    "MFU": lambda row: f"{row['mfu']:.0%}",
    **LIMIT,
    "logprob": lambda row: f"{row['logprob']:.4f}",
    "entropy": lambda row: f"{row['entropy']:.4f}",
}


if __name__ == "__main__":
    command(main, Config, __doc__)
