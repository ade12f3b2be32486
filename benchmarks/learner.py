"""Tokens a second of PPO's loss and gradient, beside the machine's limits and beside the same in torch.

    python -m benchmarks.learner
    python -m benchmarks.learner --peer-pythons ONE/bin/python OTHER/bin/python --json benchmarks/results/learner.json

One run is the forward and backward pass of `pgjax.learning.policy_loss` for PPO (clipped surrogate + value loss, the value
head on the shared body) over a batch, without the optimizer:

    tokens/s = batch_size * length / seconds
    FLOPs    = training_flops(tokens, context = length / 2, head_tokens = batch_size * new_tokens)
    bytes    = every float32 weight once in each of the two passes
    MFU      = FLOPs / (seconds * measured matrix peak of that dtype)
    limit    = max(FLOPs / matrix peak, bytes / read bandwidth)

Log-probabilities are computed on the last `new_tokens` tokens only, here as in torch. In bfloat16 parameters stay
float32 and are cast inside: torch does that by autocast; its model with bfloat16 weights (which training should not
use: small updates vanish) is shown too. The report holds all losses, to show that the work is the same.
Tunix, whose critic is a second network, computes the policy loss alone (benchmarks/peers/tunix.py). Peers are processes of
their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pgjax as pg
from benchmarks.checks import Dtype, check, command
from benchmarks.interpreters import Need, Peer, beyond_tunix
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
from pgjax.learning.policy_loss import policy_loss
from pgjax.run.flops import training_flops
from pgjax.run.peaks import Peaks

CLIP_EPS, VALUE_COEF = 0.2, 0.5  # of PPO's loss, here as in torch
TORCH = (Need("torch"), Need("transformers"))
PEERS = (
    *(
        Peer(who, "benchmarks.peers.torch_model", TORCH)
        for who in ("torch", "torch autocast", "torch bfloat16 weights")
    ),
    Peer("Tunix, policy loss alone", "benchmarks.peers.tunix", (Need("google-tunix"),), beyond_tunix),
)


@dataclasses.dataclass(frozen=True)
class Config(Beside):
    """One benchmark. The defaults are the shapes that the committed table was measured at."""

    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")  # of activations; parameters and gradients are float32
    batch_size: int = 8  # sequences
    length: int = 128  # tokens a sequence
    new_tokens: int = 64  # of them sampled: the window of the log-probabilities


def main(config: Config) -> Row:
    """Run the benchmark; return and print the report."""
    check(config)
    if not 0 < config.new_tokens < config.length:
        raise UserError(f"new_tokens={config.new_tokens} must be between 0 and length={config.length}")
    lm, params, _ = pg.load(config.model)
    batch = make_batch(config, lm, params)
    report = compare(
        config, config.dtypes, PEERS, lm, params,
        setups=lambda folder, dtype: peer_setups(config, folder, batch, dtype),
        runs=lambda dtype, peers: {
            OURS: contender(lm, params, batch, dtype), **{who: peers[who].run for who in peers}
        },
        measure=lambda dtype, who, peaks, times: measure(config, lm.arch, peaks, times[who]),
    )  # fmt: skip
    show(f"learner, {config.batch_size} x {config.length} tokens, window {config.new_tokens}", report, COLUMNS)
    save(report, config.json)
    return report


def make_batch(config: Config, lm: pg.CausalLM, params: Any) -> pg.Batch:
    """Make random experience whose old log-probabilities differ a little from the model's own, so that some are clipped."""
    draw = np.random.default_rng(config.seed)
    rows, window = config.batch_size, config.new_tokens + 1
    tokens = jnp.asarray(draw.integers(1, lm.arch.vocab_size, (rows, config.length)), jnp.int32)
    mask = jnp.broadcast_to(jnp.arange(window)[None, :] > 0, (rows, window))
    hidden = lm.hidden(params, tokens)[:, -window:]
    logprobs = pg.linear_token_logprobs(hidden, lm.unembedding(params), tokens[:, -window:])
    noise = lambda scale: jnp.asarray(draw.normal(0, scale, (rows, window)), jnp.float32)
    return pg.Batch(
        tokens=tokens,
        attention_mask=jnp.ones(tokens.shape, bool),
        mask=mask,
        old_logprobs=logprobs + noise(0.2),
        old_values=jnp.zeros((rows, window)),
        returns=noise(1.0),
        advantages=noise(1.0),
    )


def contender(lm: pg.CausalLM, params: Any, batch: pg.Batch, dtype: str) -> Contender:
    """Make our run: the loss and its gradient, jitted."""
    ours, algorithm = pg.causal_lm(lm.arch, dtype=jnp.dtype(dtype)), pg.ppo(clip_eps=CLIP_EPS, value_coef=VALUE_COEF)

    def loss(params: Any, batch: pg.Batch) -> jax.Array:
        return policy_loss(params, batch, lm=ours, algorithm=algorithm, temperature=1.0)[0]

    step = jax.jit(jax.value_and_grad(loss))
    both = {"lm": params, "value": pg.init_value_head(lm.arch.width)}

    def run() -> dict[str, float]:
        found, _ = jax.block_until_ready(step(both, batch))
        return {"loss": float(found)}

    return timed(run)


def peer_setups(config: Config, folder: str, batch: pg.Batch, dtype: str) -> dict[str, Row]:
    """Make the set-ups of the peers of a dtype.

    Entry 0 of our window is the prompt's last token, which is not sampled; the peers' window begins after it.
    """
    shared = {
        "task": "learner", "folder": folder, "dtype": "float32", "autocast": False, "threads": config.peer_threads,
        "device": device(), "tokens": np.asarray(batch.tokens).tolist(), "window": config.new_tokens,
        "clip_eps": CLIP_EPS, "value_coef": VALUE_COEF,
        **{
            name: np.asarray(x)[:, 1:].tolist()
            for name, x in (("old_logprobs", batch.old_logprobs), ("returns", batch.returns), ("advantages", batch.advantages))
        },
    }  # fmt: skip
    if dtype == "float32":
        return {"torch": shared, "Tunix, policy loss alone": shared}
    return {"torch autocast": shared | {"autocast": True}, "torch bfloat16 weights": shared | {"dtype": "bfloat16"}}


def measure(config: Config, arch: pg.Architecture, peaks: Peaks, timing: Timing) -> Row:
    """Turn times into the figures of the table."""
    tokens = config.batch_size * config.length
    flops = training_flops(
        arch, tokens=tokens, context=config.length / 2, head_tokens=config.batch_size * config.new_tokens
    )
    row = figures(timing, tokens)
    limit = roofline(row["seconds"], flops, weight_bytes(arch, 4, passes=2), peaks)
    return {"loss": median_result(timing, "loss"), **row, **limit}


COLUMNS: dict[str, Callable[[Row], str]] = {
    **SPEED,
    "MFU": lambda row: f"{row['mfu']:.0%}",
    **LIMIT,
    "loss": lambda row: f"{row['loss']:.5f}",
}


if __name__ == "__main__":
    command(main, Config, __doc__)
