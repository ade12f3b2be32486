"""One contender of `benchmarks.uneven`, which hands this text to an interpreter in a checkout of pgjax: `python -c TEXT`.

An iteration of RLOO for every request. In a checkout without packed rows it is that one's own benchmark at the limit, in which no
completion ends early: that build scores and learns all columns whatever is written, and samples until the longest row ends.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pgjax as pg
from benchmarks import iteration
from benchmarks.peers.protocol import Parent


def own_benchmark(lm: Any, params: Any, pairs: Any, limit: int, group_size: int, microbatches: int) -> Any:
    """Build the checkout's own iteration, every completion as long as the limit."""
    longest = max(of_prompt for of_prompt, _ in pairs)
    config = iteration.Config(
        peer=False,
        batch_size=len(pairs),
        prompt_length=longest,
        new_tokens=limit,
        group_size=group_size,
        parts=microbatches,
    )
    prompts = np.random.default_rng(0).integers(1, lm.arch.vocab_size - 1, (len(pairs), longest))
    return iteration.contender(config, lm, params, prompts, "pgjax RLOO")


def forced(lengths: Any) -> Any:
    """Make what stands in for `draws.ends`: row i of a whole batch ends after lengths[i] tokens; states count what is left."""

    def ends(token: jax.Array, state: jax.Array, eos: jax.Array, stop_table: jax.Array) -> tuple[jax.Array, jax.Array]:
        begun = jnp.asarray(lengths, jnp.int32) if token.shape == (len(lengths),) else state
        left = jnp.where(state == 0, begun, state) - 1
        return left <= 0, jnp.where(left <= 0, -1, left)

    return ends


def uneven(
    lm: Any,
    params: Any,
    pairs: Any,
    limit: int,
    group_size: int,
    microbatches: int,
    pack_tokens: int | None,
) -> Any:
    """Build an iteration whose completions end where the list says."""
    import pgjax.rollout.sample as sampler

    vars(sampler)["ends"] = forced([new for _, new in pairs])
    longest = max(of_prompt for of_prompt, _ in pairs)
    mask = np.arange(longest)[None] >= longest - np.array([of_prompt for of_prompt, _ in pairs])[:, None]
    prompts = np.random.default_rng(0).integers(1, lm.arch.vocab_size - 1, (len(pairs) // group_size, longest))
    prompts = np.where(mask, np.repeat(prompts, group_size, axis=0), 0)
    it = pg.iteration(
        lm, pg.rloo(group_size=group_size, kl_coef=0.05), pg.adamw(3e-6, updates=1_000_000), reference=params,
        max_new_tokens=limit, microbatches=microbatches, pack_tokens=pack_tokens,
        stop_table=np.zeros((1, lm.arch.vocab_size), np.int32),
    )  # fmt: skip
    held = [it.init(params, jax.random.key(0))]

    def run() -> dict[str, float]:
        start = time.perf_counter()
        rollout = it.sample(held[0], prompts, mask)
        tokens, sampled = np.asarray(rollout.tokens), time.perf_counter()
        jax.block_until_ready(rollout)
        scored = time.perf_counter()
        held[0], metrics = it.learn(held[0], rollout, (tokens % 2).mean(1, dtype=np.float32))
        jax.block_until_ready((held[0], metrics))
        assert np.asarray(rollout.mask).sum(1).tolist() == [new for _, new in pairs]
        return {"rollout": sampled - start, "score": scored - sampled, "update": time.perf_counter() - scored}

    return run


def peak_bytes() -> int:
    """Read this program's high-water mark of resident memory."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    parent = Parent()
    if not Path(pg.__file__).is_relative_to(Path.cwd()):
        raise ImportError(f"pgjax comes from {pg.__file__}, and not from {Path.cwd()}")
    setup = dict(parent.setup)
    lm, params, _ = pg.load(setup.pop("model"))
    work = (own_benchmark if "pack_tokens" not in setup else uneven)(lm, params, **setup)

    def run() -> dict[str, float]:
        found = work()
        parts = found.result if hasattr(found, "result") else found
        return {**{name: float(x) for name, x in parts.items()}, "peak_bytes": peak_bytes()}

    parent.ready()
    parent.serve(run)
