"""Sampling prompts whose completions end when they end: all rows at once, and through fewer lanes.

    python -m benchmarks.lanes
    python -m benchmarks.lanes --lanes 8 16 --rows 64 --max-new-tokens 256

The completions are SmolLM2's of the haiku prompts, the same in every way of sampling, which is checked. All ways run in turn.

    tokens/s = sampled tokens / seconds
    work for tokens that exist = sampled tokens / (rows * longest completion), where all rows are in the loop until the last ends:
               a loop without other costs could be faster by its inverse, the limit
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import pgjax as pg
from benchmarks.checks import Dtype, check, command
from benchmarks.timing import Row, alternate, machine, plain, save, timed
from experiments.tasks.haiku import train_rows
from pgjax.core.errors import UserError
from pgjax.data.padding import left_pad
from pgjax.data.prompts import encode_prompts
from pgjax.models.io.stops import stop_ids


@dataclasses.dataclass(frozen=True)
class Config:
    """One benchmark."""

    model: str = "SmolLM2-135M-Instruct"  # a source of `pgjax.load`
    rows: int = 64  # completions
    lanes: tuple[int, ...] = (8, 16)  # rows in the loop at once, beside all of them
    max_new_tokens: int = 256  # the longest completion
    dtypes: tuple[Dtype, ...] = ("float32",)  # of activations and the cache
    repeats: int = 3  # timed rounds
    seed: int = 0  # of the completions
    json: Path | None = None  # write the report here


def main(config: Config) -> Row:
    """Run the benchmark; return and print the report."""
    check(config)
    lm, params, tokenizer = pg.load(config.model)
    if tokenizer is None:
        raise UserError(f"{config.model} holds no tokenizer, which prompts need")
    prompts = [row["prompt"] for row in train_rows()]
    ids = encode_prompts([prompts[i % len(prompts)] for i in range(config.rows)], tokenizer, chat=True)
    tokens, mask = left_pad(ids, 0)
    report: Row = {"machine": machine(), "config": plain(config), "rows": []}
    for dtype in config.dtypes:
        ours = pg.causal_lm(lm.arch, dtype=jnp.dtype(dtype))
        sample = functools.partial(
            pg.sample, ours, params, tokens, mask, jax.random.key(config.seed), max_new_tokens=config.max_new_tokens,
            eos_ids=stop_ids(tokenizer),
        )  # fmt: skip
        expected = jax.device_get(sample())
        lengths = expected.mask.sum(1)
        ways = {"all at once": None, **{f"{lanes} lanes": lanes for lanes in config.lanes}}
        same = {who: bool(np.array_equal(sample(lanes=n).tokens, expected.tokens)) for who, n in ways.items() if n}
        runs = {who: timed(functools.partial(sample, lanes=lanes)) for who, lanes in ways.items()}
        for who, timing in alternate(runs, config.repeats).items():
            seconds = statistics.median(timing.wall)
            report["rows"].append(
                {
                    "who": who, "dtype": dtype, "seconds": seconds, "round_seconds": timing.wall,
                    "tokens": int(lengths.sum()), "tokens_per_second": float(lengths.sum() / seconds),
                    "live": float(lengths.sum() / (lengths.max() * config.rows)) if ways[who] is None else None,
                    "same_tokens": same.get(who, True),
                }
            )  # fmt: skip
        report["lengths"] = {
            "mean": float(lengths.mean()),
            "longest": int(lengths.max()),
            "shortest": int(lengths.min()),
        }
    show(config, report)
    save(report, config.json)
    return report


def show(config: Config, report: Row) -> None:
    """Print the report as a table."""
    found = report["lengths"]
    title = f"{config.rows} completions of {found['shortest']} to {found['longest']} tokens, {found['mean']:.0f} on the mean"
    table = Table(
        "who", "dtype", "tokens/s", "seconds", "times as fast", "work for tokens that exist", "same", title=title
    )
    first: dict[str, float] = {}
    for row in report["rows"]:
        base = first.setdefault(row["dtype"], row["seconds"])
        live = "" if row["live"] is None else f"{row['live']:.0%}"
        cells = f"{row['tokens_per_second']:.0f}", f"{row['seconds']:.2f}", f"{base / row['seconds']:.2f}", live
        table.add_row(row["who"], row["dtype"], *cells, "yes" if row["same_tokens"] else "NO")
    Console(width=None if Console().is_terminal else 160).print(table)


if __name__ == "__main__":
    command(main, Config, __doc__)
