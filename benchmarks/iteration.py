"""Seconds of one whole iteration, rollout to update, beside the machine's limits and beside TRL's trainers.

    python -m benchmarks.iteration
    python -m benchmarks.iteration --peer-pythons ONE/bin/python OTHER/bin/python --json benchmarks/results/iteration.json

One iteration is that of `pg.iteration`, as in experiments/ppo.py: sample `batch_size` completions, compute the reference's
log-probabilities of them, score them on the host (here: the share of odd ids), turn scores into advantages, and take one AdamW
update from the whole batch in each epoch. With one epoch the sampler keeps the policy's log-probabilities and values; with more
they come from a pass of the policy over its samples. The policy is trained on from iteration to iteration.

    pgjax PPO    a critic on the policy's body; peer: TRL's PPO, whose value model is a second network
    pgjax RLOO   `group_size` completions of each of batch_size / group_size prompts, each prompt computed once; peer: the
                 newest TRL's RLOO, which computes it for every completion
    tokens/s     = batch_size * new_tokens / seconds: tokens of completions
    FLOPs        = rollout + forward passes of scoring + 3 forward passes for each pass of learning (`PASSES`), on paper
    bytes        = what the decode steps read, every weight once a forward pass and twice a pass of learning, and in AdamW's
                   step four arrays of its size: weights, gradient, two moments
    MFU          = FLOPs / (seconds * measured matrix peak)

A peer's FLOPs are those of its own way: TRL's PPO takes old log-probabilities from the logits of sampling, but runs its value
model too. TRL's times go from one iteration's end to the next one's, by a callback; loading and set-up are outside, and
so is the first iteration. Every completion has the full length, here as there. Peers are processes of their own, and
each pair has the machine's memory to itself.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pgjax as pg
from benchmarks.checks import Dtype, check, command
from benchmarks.interpreters import Need, Peer, choose
from benchmarks.timing import (
    LIMIT,
    SPEED,
    Contender,
    Row,
    Timing,
    add_ratios,
    begun,
    figures,
    median_result,
    roofline,
    save,
    show,
    timed,
    weight_bytes,
    with_peaks,
)
from benchmarks.worker import Beside, device, leave_out, model_folder, workers
from pgjax.core.errors import UserError
from pgjax.parallel.sharding import whole_groups
from pgjax.run.flops import decode_bytes, forward_flops, sequence_sizes
from pgjax.run.peaks import Peaks

SHARED = tuple(Need(name) for name in ("torch", "transformers", "datasets", "accelerate"))
PEERS = (
    Peer("TRL PPO", "benchmarks.peers.trl_ppo", (Need("trl", at_least="1.0", below="1.13"), *SHARED)),
    Peer("TRL RLOO", "benchmarks.peers.trl_rloo", (Need("trl", at_least="1.13"), *SHARED)),
)
VERSUS = dict(zip(("pgjax PPO", "pgjax RLOO"), PEERS, strict=True))
PARTS = ("rollout", "scoring", "update")


class Passes(NamedTuple):
    """How often a batch goes through a network of the model's size, the sampling left out."""

    scoring: int  # forward
    learning: int  # forward and backward, in one epoch


PASSES = {
    "pgjax PPO": Passes(1, 1),  # reference; with more than one epoch the policy too
    "pgjax RLOO": Passes(1, 1),
    "TRL PPO": Passes(2, 2),  # reference, value model; policy and value model
    "TRL RLOO": Passes(2, 1),
}


@dataclasses.dataclass(frozen=True)
class Config(Beside):
    """One benchmark. The defaults are the shapes that the committed table was measured at."""

    dtypes: tuple[Dtype, ...] = ("float32",)  # of activations; parameters are float32, TRL casts inside by autocast
    batch_size: int = 16  # completions an iteration
    prompt_length: int = 16  # tokens a prompt
    new_tokens: int = 32  # sampled for each prompt; none ends early
    group_size: int = 4  # completions of a prompt, for RLOO
    epochs: int = 1  # passes of learning over an iteration's completions, in PPO; RLOO has one
    learning_rate: float = 3e-6  # of AdamW
    kl_coef: float = 0.05  # of the penalty on the log-ratio to the reference
    parts: int = 1  # of the batch, in scoring and learning, for memory


def main(config: Config) -> Row:
    """Run the benchmark; return and print the report."""
    check(config)
    if config.group_size < 2 or config.batch_size % config.group_size or config.batch_size % config.parts:
        raise UserError(
            f"batch_size={config.batch_size} must be a multiple of group_size={config.group_size}, at least 2, "
            f"and of parts={config.parts}"
        )
    lm, params, _ = pg.load(config.model)
    pythons, absent = choose(PEERS, config.peer_pythons, lm.arch, wanted=config.peer)
    prompts = np.random.default_rng(config.seed).integers(
        1, lm.arch.vocab_size - 1, (config.batch_size, config.prompt_length)
    )
    report = begun(config, absent)
    with model_folder(lm, params) as folder:
        for dtype in config.dtypes:
            ours = pg.causal_lm(lm.arch, dtype=jnp.dtype(dtype))
            found: dict[str, Timing] = {}
            failures: dict[str, str] = {}
            setups = peer_setups(config, folder, prompts, dtype)
            for who, peer in VERSUS.items():
                run = contender(config, ours, params, prompts, who)
                with workers((peer,), pythons, setups, failures) as running:
                    report["peers"] |= {who: worker.versions for who, worker in running.items()}
                    pair = {who: run} | {who: worker.run for who, worker in running.items()}
                    peaks, times = with_peaks(report, dtype, pair, config.repeats)
                found |= times
            leave_out(report, dtype, failures)
            report["rows"] += [
                {"who": who, "dtype": dtype, **measure(config, lm.arch, dtype, peaks, who, timing)}
                for who, timing in found.items()
            ]
    add_ratios(report["rows"], {who: (peer.who,) for who, peer in VERSUS.items()})
    show(f"iteration, {config.batch_size} x ({config.prompt_length} + {config.new_tokens}) tokens", report, COLUMNS)
    save(report, config.json)
    return report


def contender(config: Config, lm: pg.CausalLM, params: Any, prompts: np.ndarray, who: str) -> Contender:
    """Make an iteration of PPO or of RLOO that trains a policy of its own, from each run to the next."""
    if who == "pgjax PPO":
        algorithm, epochs = pg.ppo(kl_coef=config.kl_coef), config.epochs
    else:
        algorithm, epochs = pg.rloo(group_size=config.group_size, kl_coef=config.kl_coef), 1
        prompts = np.repeat(prompts[: len(prompts) // config.group_size], config.group_size, axis=0)
    it = pg.iteration(
        lm, algorithm, pg.adamw(config.learning_rate, updates=1_000_000), reference=params,
        max_new_tokens=config.new_tokens, epochs=epochs, microbatches=config.parts,
    )  # fmt: skip
    held = [it.init(params, jax.random.key(config.seed))]
    prompt_mask = np.ones(prompts.shape, bool)

    def run() -> dict[str, float]:
        """Do one iteration; give the seconds of its parts and the mean score."""
        start = time.perf_counter()
        rollout = it.sample(held[0], prompts, prompt_mask)
        tokens = np.asarray(rollout.tokens)
        sampled = time.perf_counter()
        scores = odd_ids(tokens[:, -config.new_tokens :])
        jax.block_until_ready(rollout)
        scored = time.perf_counter()
        held[0], metrics = it.learn(held[0], rollout, scores)
        jax.block_until_ready((held[0], metrics))
        done = time.perf_counter()
        if not metrics["train/healthy"]:
            raise FloatingPointError("an update was not finite")
        return {
            "rollout": sampled - start, "scoring": scored - sampled, "update": done - scored, "score": float(scores.mean()),
        }  # fmt: skip

    return timed(run)


def odd_ids(completions: np.ndarray) -> np.ndarray:
    """Score completions on the host by the share of odd ids.

    >>> odd_ids(np.array([[1, 2, 3, 4], [1, 3, 5, 7]])).tolist()
    [0.5, 1.0]
    """
    return (completions % 2).mean(axis=1, dtype=np.float32)


def peer_setups(config: Config, folder: str, prompts: np.ndarray, dtype: str) -> dict[str, Row]:
    """Make the set-up of each peer."""
    shared = {
        "folder": folder, "dtype": dtype, "threads": config.peer_threads, "device": device(), "seed": config.seed,
        "new_tokens": config.new_tokens, "learning_rate": config.learning_rate, "kl_coef": config.kl_coef,
    }  # fmt: skip
    few = prompts[: len(prompts) // config.group_size]
    return {
        "TRL PPO": shared | {"prompts": prompts.tolist(), "epochs": config.epochs},
        "TRL RLOO": shared | {"prompts": few.tolist(), "epochs": 1, "group_size": config.group_size},
    }


def work(config: Config, arch: pg.Architecture, itemsize: int, who: str) -> dict[str, tuple[float, float]]:
    """Count, on paper, operations and bytes of each part of an iteration."""
    rows, new = config.batch_size, config.new_tokens
    shared = config.group_size if who == "pgjax RLOO" else 1  # rows whose prompt is computed once
    in_parts = whole_groups(None, rows // config.parts, shared)
    passes, epochs = PASSES[who], config.epochs if who.endswith("PPO") else 1
    scoring = passes.scoring + (who == "pgjax PPO" and epochs > 1)
    begun = forward_flops(
        arch, tokens=rows * config.prompt_length / shared, context=config.prompt_length / 2, head_tokens=rows
    )
    context = config.prompt_length + new / 2
    step = forward_flops(arch, tokens=rows, context=context, head_tokens=rows)
    read = decode_bytes(arch, batch=rows, context=context, weight_bytes=itemsize, cache_bytes=itemsize)
    sizes = sequence_sizes(rows, prompt_length=config.prompt_length, new_tokens=new, group_size=in_parts)
    forward = forward_flops(arch, **sizes, head_tokens=rows * new)
    learned = passes.learning * epochs
    return {
        "rollout": (begun + (new - 1) * step, weight_bytes(arch, itemsize) + (new - 1) * read),
        "scoring": (scoring * forward, weight_bytes(arch, 4, passes=scoring)),
        "update": (3 * learned * forward, weight_bytes(arch, 4, passes=6 * learned)),
    }


def measure(config: Config, arch: pg.Architecture, dtype: str, peaks: Peaks, who: str, timing: Timing) -> Row:
    """Turn times into the figures of the table; the parts are known of ours alone."""
    row = figures(timing, config.batch_size * config.new_tokens)
    counted = work(config, arch, jnp.dtype(dtype).itemsize, who)
    flops, read = (sum(part) for part in zip(*counted.values(), strict=True))
    parts = {
        name: {"seconds": seconds, **roofline(seconds, *counted[name], peaks)}
        for name, seconds in (
            (name, median_result(timing, name)) for name in PARTS if all(name in told for told in timing.results)
        )
    }
    told = {"score": median_result(timing, "score")} if parts else {}
    return {**row, **roofline(row["seconds"], flops, read, peaks), **told, "parts": parts}


def seconds_of(name: str) -> Callable[[Row], str]:
    """Make the column of a part."""
    return lambda row: f"{row['parts'][name]['seconds']:.3f}" if row["parts"] else "-"


COLUMNS: dict[str, Callable[[Row], str]] = {
    **SPEED,
    **{f"{name} s": seconds_of(name) for name in PARTS},
    "MFU": lambda row: f"{row['mfu']:.0%}",
    **LIMIT,
}


if __name__ == "__main__":
    command(main, Config, __doc__)
