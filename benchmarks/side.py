"""One build's side of `benchmarks.against`, which hands this text to an interpreter in that build's checkout: `python -c TEXT`.

It loads the model, then does its part of the work once for every request, and answers with the seconds and its peak memory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

import pgjax as pg
from benchmarks import iteration, learner, rollout
from benchmarks.peers.protocol import Parent


def contender(part: str, model: str) -> Any:
    """Build one part with the checkout's own benchmark, at its default shapes."""
    lm, params, _ = pg.load(model)
    if part == "learner":
        learned = learner.Config(peer=False)
        return learner.contender(lm, params, learner.make_batch(learned, lm, params), "float32")
    config: Any = rollout.Config(peer=False) if part == "rollout" else iteration.Config(peer=False)
    prompts = np.random.default_rng(0).integers(1, lm.arch.vocab_size - 1, (config.batch_size, config.prompt_length))
    if part == "rollout":
        return rollout.contenders(config, lm, params, prompts, "float32", {})["pgjax all"]
    return iteration.contender(config, lm, params, prompts, f"pgjax {part}")


def peak_bytes() -> int:
    """Read this program's high-water mark of resident memory; that of getrusage may be the process's that started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    parent = Parent()
    if not Path(pg.__file__).is_relative_to(Path.cwd()):
        raise ImportError(f"pgjax comes from {pg.__file__}, and not from {Path.cwd()}")
    work = contender(**parent.setup)

    def run() -> dict[str, float]:
        work()
        return {"peak_bytes": peak_bytes()}

    parent.ready()
    parent.serve(run)
