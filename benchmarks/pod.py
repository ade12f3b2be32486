"""Compile the four programs of PPO for TPU pods on a machine without one, and check memory, collectives and time.

    pip install 'jax[tpu]'                      # libtpu, the compiler; no TPU is needed
    python -m benchmarks.pod                    # four pods, four models, four programs: hours on two cores
    python -m benchmarks.pod --topologies v5e:4x4 --models 135M --no-search

Shapes only: no weight exists. The programs are those that training runs: the sampler, `programs.teacher_force` (scoring),
`programs.reference_logprobs`, `programs.update` (learner); over float32 parameters and Adam moments with bfloat16 arithmetic,
prompts of 256 and completions of 256 tokens. Of each it prints

    memory       bytes a chip, those of the compiler and those that training keeps beside the program, against the chip's;
                 parameters, moments, gradient, gathered weights and cache are worked out on paper, "other" is the rest
    collectives  from the compiled text: how many, their bytes a chip in all runs of their loops, and how many are inside loops
    at best      the longest of FLOPs on paper / peak, bytes that must be read / bandwidth, bytes that must arrive / links
    compiler     the compiler's own estimate: its cycles of every fusion, times the loops' trips, at the chip's clock;
                 collectives have none. (`optimal_seconds` of its cost analysis counts the body of a loop once, and is -1 and less
                 where something has no estimate: it goes to the JSON where it is above 0.)
    largest      rows at once that fit, found by compiling again with more

A decode step is one iteration of the sampler's loop; prefill is all that comes before it, the gather of the parameters included.
A program that does not fit, or that has a collective where there should be none, is a defect: it is printed, and the benchmark
ends with an error.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu compiles here and runs nothing: look for no TPU,
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # and lock none against other processes

import tyro

from benchmarks.pod_judge import judge, largest_rows
from benchmarks.pod_programs import MODELS, PROGRAMS, TOPOLOGIES, Case, make_case
from benchmarks.pod_report import picture, show
from benchmarks.timing import Row, machine, plain, save
from pgjax.core.errors import MissingPackageError, UserError
from pgjax.run.exits import plain_errors


@dataclasses.dataclass(frozen=True)
class Config:
    """One benchmark. The defaults are what the committed figures were made with."""

    topologies: tuple[str, ...] = tuple(TOPOLOGIES)  # of the pods
    models: tuple[str, ...] = tuple(MODELS)  # by their number of weights
    programs: tuple[str, ...] = PROGRAMS  # that are compiled
    mesh: str | None = None  # for all of them, as data=4,fsdp=4; None: `pod_programs.MESHES`
    prompt_length: int = 256  # tokens
    new_tokens: int = 256  # sampled for each prompt
    sampler_rows: int = 16  # at once, for each part of data x fsdp
    scoring_rows: int = 4  # likewise, of policy and reference; the batch is two parts of it
    learner_rows: int = 2  # likewise; the minibatch is two microbatches of it
    search: bool = True  # look for the largest batches afterwards
    go_on: bool = False  # keep what the JSON holds already
    json: Path | None = None  # write the report here, row by row
    picture: Path | None = None  # draw the memory here


def main(config: Config) -> Row:
    """Run the benchmark; return and print the report."""
    check(config)
    report: Row = {
        "machine": machine() | {"libtpu": importlib.metadata.version("libtpu")},
        "config": plain(config),
        "chips": {},
        "rows": [],
    }
    if config.go_on and config.json is not None and config.json.is_file():
        report["rows"] = rows_of(config.json, report["machine"])
    shown = {row["topology"] for row in report["rows"]}.union(config.topologies)
    report["chips"] = {name: chip._asdict() for name, chip in TOPOLOGIES.items() if name in shown}
    done = {(row["topology"], row["model"], row["program"]) for row in report["rows"]}
    scored = config.scoring_rows
    rows = dict(zip(PROGRAMS, (config.sampler_rows, scored, scored, config.learner_rows), strict=True))
    for one in itertools.product(config.topologies, config.models, config.programs):
        if one not in done:
            print("compiling", *one, file=sys.stderr, flush=True)
            report["rows"].append(judge(case_of(config, *one[:2]), one[2], rows[one[2]]))
            save(rounded(report), config.json)
    order = list(itertools.product(TOPOLOGIES, MODELS, PROGRAMS))
    report["rows"].sort(key=lambda row: order.index((row["topology"], row["model"], row["program"])))
    wanted = set(itertools.product(config.topologies, config.models, config.programs)) if config.search else set()
    for row in report["rows"]:
        if (row["topology"], row["model"], row["program"]) in wanted and "largest_rows" not in row:
            print("searching", row["topology"], row["model"], row["program"], file=sys.stderr, flush=True)
            row["largest_rows"] = largest_rows(case_of(config, row["topology"], row["model"]), row)
            save(rounded(report), config.json)
    save(rounded(report), config.json)
    show(report)
    if config.picture is not None:
        picture(config.picture, report)
    return report


def rows_of(path: Path, here: Row) -> list[Row]:
    """Read the rows to go on from; those of another compiler are refused."""
    report = json.loads(path.read_text(encoding="utf-8"))
    for name in ("libtpu", "jax"):
        if report["machine"][name] != here[name]:
            raise UserError(
                f"{path} was made with {name} {report['machine'][name]}, here is {here[name]}: leave out --go-on"
            )
    return report["rows"]


def case_of(config: Config, topology: str, model: str) -> Case:
    """Lay a model out over a pod, as the config says."""
    lengths = {"prompt_length": config.prompt_length, "new_tokens": config.new_tokens}
    return make_case(topology, model, config.mesh, **lengths)


def check(config: Config) -> None:
    """Refuse unknown names, and a machine without libtpu, before anything is compiled."""
    for name, given, known in (
        ("topologies", config.topologies, tuple(TOPOLOGIES)),
        ("models", config.models, tuple(MODELS)),
        ("programs", config.programs, PROGRAMS),
    ):
        if odd := [x for x in given if x not in known]:
            raise UserError(f"{name}: {', '.join(odd)} not known; there are {', '.join(known)}")
    if importlib.util.find_spec("libtpu") is None:
        raise MissingPackageError("libtpu, which compiles for TPUs, is not installed: pip install 'jax[tpu]'")


def rounded(x: Any) -> Any:
    """Keep four digits of every fraction of a report.

    >>> rounded({"a": [0.123456, 1], "b": None})
    {'a': [0.1235, 1], 'b': None}
    """
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


if __name__ == "__main__":
    with plain_errors():
        found = main(tyro.cli(Config, description=__doc__))
    if any(row["defects"] for row in found["rows"]):
        sys.exit("defects: see above")
