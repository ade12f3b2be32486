"""Tokens a second of sampling, beside the machine's limits and beside other libraries on the same weights.

    python -m benchmarks.rollout
    python -m benchmarks.rollout --peer-pythons ONE/bin/python OTHER/bin/python --json benchmarks/results/rollout.json

Two programs are timed, one that samples a single token and one that samples them all; the difference is decode:

    prefill  = seconds of the one-token program (it holds the prompts' forward pass and one draw)
    decode   = (seconds of the whole program - prefill) / (new_tokens - 1), a step
               left out where the whole program took no longer than the one-token program, within the noise
    tokens/s = batch_size * new_tokens / seconds of the whole program
    MBU      = decode_bytes(batch_size, context = prompt + new_tokens / 2) / (decode * measured read bandwidth)
    MFU      = forward_flops of the same step / (decode * measured matrix peak of that dtype)
    limit    = max(FLOPs / matrix peak, bytes / read bandwidth), of prefill, of a decode step, and of both together

Every round runs each contender once, in turn; peers are processes of their own. A figure is the median of the rounds,
with the fastest and slowest.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pgjax as pg
from benchmarks.checks import Dtype, check, command
from benchmarks.interpreters import Need, Peer, beyond_tunix
from benchmarks.timing import (
    LIMIT,
    SPEED,
    Contender,
    Row,
    Timing,
    figures,
    roofline,
    save,
    show,
    timed,
    weight_bytes,
)
from benchmarks.worker import Beside, Worker, compare, device
from pgjax.core.errors import UserError
from pgjax.run.flops import decode_bytes, forward_flops
from pgjax.run.peaks import Peaks

PEERS = (
    Peer("torch generate", "benchmarks.peers.torch_model", (Need("torch"), Need("transformers"))),
    Peer("Tunix sampler", "benchmarks.peers.tunix", (Need("google-tunix"),), beyond_tunix),
)


@dataclasses.dataclass(frozen=True)
class Config(Beside):
    """One benchmark. The defaults are the shapes that the committed table was measured at."""

    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")  # of activations, weights while decoding, and the cache
    batch_size: int = 16  # prompts
    prompt_length: int = 16  # tokens a prompt
    new_tokens: int = 64  # sampled for each prompt; none ends early


def main(config: Config) -> Row:
    """Run the benchmark; return and print the report."""
    check(config)
    if config.new_tokens < 2:
        raise UserError(f"new_tokens must be at least 2, to tell decode from prefill, got {config.new_tokens}")
    lm, params, _ = pg.load(config.model)
    prompts = np.random.default_rng(config.seed).integers(
        1, lm.arch.vocab_size, (config.batch_size, config.prompt_length)
    )
    report = compare(
        config, config.dtypes, PEERS, lm, params,
        setups=lambda folder, dtype: dict.fromkeys(
            (peer.who for peer in PEERS), peer_setup(config, folder, prompts, dtype)
        ),
        runs=lambda dtype, peers: contenders(config, lm, params, prompts, dtype, peers),
        measure=lambda dtype, who, peaks, times: measure(
            config, lm.arch, dtype, peaks, times[f"{who} first"], times[f"{who} all"]
        ),
    )  # fmt: skip
    show(f"rollout, {config.batch_size} x ({config.prompt_length} + {config.new_tokens}) tokens", report, COLUMNS)
    save(report, config.json)
    return report


def peer_setup(config: Config, folder: str, prompts: np.ndarray, dtype: str) -> Row:
    """Make the set-up of a peer."""
    return {
        "task": "rollout", "folder": folder, "dtype": dtype, "autocast": False, "threads": config.peer_threads,
        "device": device(), "prompts": prompts.tolist(), "new_tokens": config.new_tokens,
    }  # fmt: skip


def contenders(
    config: Config, lm: pg.CausalLM, params: Any, prompts: np.ndarray, dtype: str, peers: Mapping[str, Worker]
) -> dict[str, Contender]:
    """Give, for each contender, a run that samples one token a prompt and a run that samples all."""
    ours = pg.causal_lm(lm.arch, dtype=jnp.dtype(dtype))
    mask = np.ones(prompts.shape, bool)
    key = jax.random.key(config.seed)

    def generate(new_tokens: int) -> object:
        return pg.sample(ours, params, prompts, mask, key, max_new_tokens=new_tokens)

    runs = {
        "pgjax first": timed(functools.partial(generate, 1)),
        "pgjax all": timed(functools.partial(generate, config.new_tokens)),
    }
    for who, worker in peers.items():
        runs[f"{who} first"] = functools.partial(worker.run, new_tokens=1)
        runs[f"{who} all"] = functools.partial(worker.run, new_tokens=config.new_tokens)
    return runs


def measure(config: Config, arch: pg.Architecture, dtype: str, peaks: Peaks, first: Timing, whole: Timing) -> Row:
    """Turn times into the figures of the table."""
    size, rows, steps = jnp.dtype(dtype).itemsize, config.batch_size, config.new_tokens - 1
    prefill = statistics.median(first.wall)
    between = statistics.median(whole.wall) - prefill
    decode = between / steps if between > 0 else None  # None: within the noise
    cpu = max(statistics.median(whole.cpu) - statistics.median(first.cpu), 0.0) / steps
    a_step, prompts = decode_work(config, arch, size), prefill_work(config, arch, size)
    flops, read = (begin + steps * step for begin, step in zip(prompts, a_step, strict=True))
    row = figures(whole, rows * config.new_tokens)
    parts = {"prefill": {"seconds": prefill, **roofline(prefill, *prompts, peaks)}}
    if decode is not None:
        parts["decode"] = {"seconds": decode, **roofline(decode, *a_step, peaks)}
    of_decode = parts.get("decode", {"mbu": None, "mfu": None})
    return {
        **row,
        **roofline(row["seconds"], flops, read, peaks),
        "prefill_seconds": prefill,
        "decode_step_seconds": decode,
        "decode_step_cpu_seconds": None if decode is None else cpu,
        "decode_mbu": of_decode["mbu"],
        "decode_mfu": of_decode["mfu"],
        "prefill_round_seconds": first.wall,
        "parts": parts,
    }


def prefill_work(config: Config, arch: pg.Architecture, size: int) -> tuple[float, float]:
    """Count operations and bytes of the prompts' forward pass: logits of the last token only, every weight read once."""
    tokens = config.batch_size * config.prompt_length
    flops = forward_flops(arch, tokens=tokens, context=config.prompt_length / 2, head_tokens=config.batch_size)
    return flops, weight_bytes(arch, size)


def decode_work(config: Config, arch: pg.Architecture, size: int) -> tuple[float, float]:
    """Count operations and bytes of one decode step, the cache half full of new tokens."""
    rows, context = config.batch_size, config.prompt_length + config.new_tokens / 2
    flops = forward_flops(arch, tokens=rows, context=context, head_tokens=rows)
    return flops, decode_bytes(arch, batch=rows, context=context, weight_bytes=size, cache_bytes=size)


COLUMNS: dict[str, Callable[[Row], str]] = {
    **SPEED,
    "prefill ms": lambda row: f"{1e3 * row['prefill_seconds']:.0f}",
    "decode ms a step": lambda row: (
        "-" if row["decode_step_seconds"] is None else f"{1e3 * row['decode_step_seconds']:.1f}"
    ),
    "decode MBU": lambda row: "-" if row["decode_mbu"] is None else f"{row['decode_mbu']:.0%}",
    "decode MFU": lambda row: "-" if row["decode_mfu"] is None else f"{row['decode_mfu']:.0%}",
    **LIMIT,
}


if __name__ == "__main__":
    command(main, Config, __doc__)
