"""Seconds until the sampler and the learner of a 30-layer model can run: cold, and with jax's persistent compilation cache.

    python -m benchmarks.compile
    python -m benchmarks.compile --json benchmarks/results/compile.json

The sampler is `pg.sample`, prefill and decode loop; the learner is `programs.update`, the gradient of PPO's loss and AdamW. Both
are compiled from shapes alone, so no weights are read or made. Each measurement is a new process. A round compiles both programs
with an empty cache folder (cold: the compiler runs and writes its result to the folder), then both again with the same folder
(cached: the program is traced again, and the compiler's result is read from the folder).

    trace   = seconds to trace and lower to StableHLO
    compile = seconds of XLA, or of reading the cache
    total   = trace + compile; "both" is the sum of the two programs' totals

Python's imports and the backend's start come before the clock; what the imports take is shown beside.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.checks import Dtype, check, command
from benchmarks.compile_once import PROGRAMS, Sizes
from benchmarks.pod_programs import MODELS
from benchmarks.random_model import Size
from benchmarks.timing import Row, begun, save, show
from pgjax.core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CACHES = ("cold", "cached")


@dataclasses.dataclass(frozen=True)
class Config:
    """One benchmark. The defaults are SmolLM2's shape and the sizes that `rollout` and `learner` work on."""

    model: Size = "135M"  # of pod_programs.MODELS: a shape, not weights
    depth: int | None = None  # layers; None for the model's own
    dtypes: tuple[Dtype, ...] = ("float32",)  # of activations, and of weights while decoding
    sampler_rows: int = 16  # prompts
    prompt_length: int = 16  # tokens a prompt
    new_tokens: int = 64  # sampled for each prompt
    learner_rows: int = 8  # sequences
    length: int = 128  # tokens a sequence
    window: int = 65  # entries of the token frame that the losses see
    microbatches: int = 1  # parts whose gradients are added up
    repeats: int = 3  # rounds
    json: Path | None = None  # write the report here too


def main(config: Config) -> Row:
    """Run the benchmark; return and print the report."""
    check(config)
    if config.model not in MODELS:
        raise UserError(f"model must be one of {', '.join(MODELS)}, got {config.model!r}")
    report = begun(config, None)
    for dtype in config.dtypes:
        rounds = [one_round(config, dtype) for _ in range(config.repeats)]
        report["rows"] += [
            measure(dtype, cache, program, rounds) for cache in CACHES for program in (*PROGRAMS, "both")
        ]
    show(f"compilation, {config.model} shape, sampler and learner", report, COLUMNS)
    save(report, config.json)
    return report


def one_round(config: Config, dtype: str) -> dict[str, dict[str, Row]]:
    """Compile each program cold and then cached, in new processes that share a new cache folder; [cache][program] -> figures."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name in Sizes._fields}
    layers = {} if config.depth is None else {"num_hidden_layers": config.depth}
    request = {"model": {**MODELS[config.model], **layers}, "sizes": {"dtype": dtype, **fields}}
    with tempfile.TemporaryDirectory() as folder:
        return {
            cache: {program: once({**request, "program": program, "cache": folder}) for program in PROGRAMS}
            for cache in CACHES
        }


def once(request: dict[str, Any]) -> Row:
    """Have a new process compile one program.

    Raises:
        RuntimeError: it failed; the end of what it printed is in the message.
    """
    command = [sys.executable, "-m", "benchmarks.compile_once", json.dumps(request)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compiling the {request['program']} ended with {done.returncode}: {done.stderr[-2000:]}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(dtype: str, cache: str, program: str, rounds: list[dict[str, dict[str, Row]]]) -> Row:
    """Summarise the rounds of one program, or of both together, which are compiled one after the other.

    >>> seconds = {"trace": 1.0, "compile": 2.0, "cpu": 4.0, "hits": 0, "misses": 1, "import": 0.5}
    >>> row = measure("float32", "cold", "both", [{"cold": {"sampler": seconds, "learner": seconds}}])
    >>> row["seconds"], row["compile_seconds"], row["cache_misses"]
    (6.0, 4.0, 2)
    """
    names = PROGRAMS if program == "both" else (program,)
    summed = [{key: sum(one[cache][name][key] for name in names) for key in one[cache][names[0]]} for one in rounds]
    column: Callable[[str], list[float]] = lambda key: [one[key] for one in summed]
    totals = [one["trace"] + one["compile"] for one in summed]
    return {
        "who": "pgjax",
        "dtype": dtype,
        "program": program,
        "cache": cache,
        "seconds": statistics.median(totals),
        "fastest_seconds": min(totals),
        "slowest_seconds": max(totals),
        "round_seconds": totals,
        "cpu_seconds": statistics.median(column("cpu")),
        "trace_seconds": statistics.median(column("trace")),
        "compile_seconds": statistics.median(column("compile")),
        "import_seconds": statistics.median(column("import")),
        "cache_hits": summed[0]["hits"],
        "cache_misses": summed[0]["misses"],
    }


COLUMNS: dict[str, Callable[[Row], str]] = {
    "program": lambda row: row["program"],
    "cache": lambda row: row["cache"],
    "seconds (spread)": lambda row: (
        f"{row['seconds']:.2f} ({row['fastest_seconds']:.2f} to {row['slowest_seconds']:.2f})"
    ),
    "trace and lower": lambda row: f"{row['trace_seconds']:.2f}",
    "compile": lambda row: f"{row['compile_seconds']:.2f}",
    "CPU s": lambda row: f"{row['cpu_seconds']:.2f}",
    "hits, misses": lambda row: f"{row['cache_hits']}, {row['cache_misses']}",
    "imports": lambda row: f"{row['import_seconds']:.2f}",
}


if __name__ == "__main__":
    command(main, Config, __doc__)
