"""Profile a sampler's step and an update: the time of each matrix product, its speed, and the time of all else.

    python -m benchmarks.profile
    python -m benchmarks.profile --dtype bfloat16 --json benchmarks/results/profile_bfloat16.json

Each program runs once to warm up, once without the profiler, and once under `jax.profiler.trace`. The time of each operation is
set beside the work of its instruction in the compiled text:

    FLOPs of a product = 2 * elements of the result * length of the sum
    of the peak        = FLOPs / seconds / measured matrix peak

Products of weights have no batch dimensions, those of attention have. The profile of the sampler is one step of its decode loop.
Operations may run at the same time: each moment is then divided equally among them, so a single product may appear faster than
the peak, but not all of them together. The profiler takes time too: the whole program's time is printed with and without it.
Programs:

    sampler = `pg.sample`, one compiled program: a prefill, then steps of decoding
    update  = `programs.update`: PPO's loss and gradient over a batch of that size, then AdamW
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pgjax as pg
from benchmarks.checks import Dtype, check, command
from benchmarks.hlo import Computation, Instruction, Loop, instructions, parse
from benchmarks.scaling import experience
from benchmarks.timing import Row, begun, save, show
from pgjax.learning import programs
from pgjax.learning.optimizer import init_state
from pgjax.rollout import sample
from pgjax.run.flops import mfu
from pgjax.run.peaks import Peaks, measured_peaks

CONTAINERS = ("while", "conditional", "call")  # their time is that of the operations inside


@dataclasses.dataclass(frozen=True)
class Config:
    """One profile. The defaults are the shapes of benchmarks.rollout and benchmarks.iteration."""

    model: str = "SmolLM2-135M-Instruct"  # folder, .gguf file, hub id, or a model that an installed package ships
    dtype: Dtype = "float32"  # of activations, and of weights while decoding
    batch_size: int = 16  # rows
    prompt_length: int = 16  # tokens a prompt
    new_tokens: int = 32  # of each row sampled, or learned from
    lines: int = 8  # products that are shown one by one, the longest first
    seed: int = 0  # of what is drawn
    json: Path | None = None  # write the report here too


class Product(NamedTuple):
    """A matrix product of a program."""

    kind: str  # "weights" or "attention"
    shape: str  # such as "[3072,576] x [16,576]"
    flops: float


class Program(NamedTuple):
    """A compiled program that can run, and how often the profiled part runs in it."""

    text: str
    run: Callable[[], Any]
    steps: int
    inside: Callable[[tuple[Loop, ...]], bool]  # whether an operation in these loops is profiled


def main(config: Config) -> Row:
    """Profile both programs; return and print the report."""
    check(config)
    lm, params, _ = pg.load(config.model)
    lm = pg.causal_lm(lm.arch, dtype=jnp.dtype(config.dtype))
    report = begun(config, None)
    peaks = measured_peaks(config.dtype)
    report["peaks"][config.dtype] = peaks._asdict()
    for name, build in (("sampler, a step", sampler), ("update", update)):
        report["rows"] += profiled(name, build(config, lm, params), config, peaks)
    show(f"profile, {config.batch_size} x ({config.prompt_length} + {config.new_tokens}) tokens", report, COLUMNS)
    save(report, config.json)
    return report


def sampler(config: Config, lm: pg.CausalLM, params: Any) -> Program:
    """Compile the sampler; its decode loop, the one whose length is not known beforehand, is profiled."""
    prompts = jnp.asarray(
        np.random.default_rng(config.seed).integers(1, lm.arch.vocab_size, (config.batch_size, config.prompt_length)),
        jnp.int32,
    )
    options = {
        "temperature": jnp.float32(1.0), "top_k": jnp.int32(lm.arch.vocab_size), "top_p": jnp.float32(1.0),
        "min_p": jnp.float32(0.0),
    }  # fmt: skip
    key, nothing = jax.random.key(config.seed), jnp.full(8, -1, jnp.int32)
    given = (params, prompts, jnp.ones(prompts.shape, bool), key, options, nothing, jnp.int32(0))
    compiled = sample._generate.lower(lm, *given, max_new_tokens=config.new_tokens).compile()
    open_ended = lambda loops: any(loop.trips is None for loop in loops)
    return Program(compiled.as_text() or "", lambda: compiled(*given), config.new_tokens - 1, open_ended)


def update(config: Config, lm: pg.CausalLM, params: Any) -> Program:
    """Compile PPO's update; each run consumes the state that the run before it left."""
    length, optimizer = config.prompt_length + config.new_tokens, pg.adamw(3e-6, updates=1_000_000)
    start = {"lm": jax.tree.map(jnp.copy, params), "value": pg.init_value_head(lm.arch.width)}
    held = [init_state(start, optimizer)]
    rows = config.batch_size
    batch = experience(np.random.default_rng(config.seed), rows, length, config.new_tokens, lm.arch.vocab_size)
    given = batch._replace(old_logprobs=None), jnp.arange(rows, dtype=jnp.int32)[None, :], jnp.int32(0)
    lowered = programs.update.lower(held[0], *given, lm=lm, algorithm=pg.ppo(value_clip_eps=0.2), optimizer=optimizer)
    compiled = lowered.compile()

    def run() -> Any:
        held[0], metrics = compiled(held[0], *given)
        return metrics

    return Program(compiled.as_text() or "", run, 1, lambda loops: True)


def profiled(name: str, program: Program, config: Config, peaks: Peaks) -> list[Row]:
    """Run a program under the profiler: a row for each kind of operation, and one for each of the longest products."""
    jax.block_until_ready(program.run())
    begin = time.perf_counter()
    jax.block_until_ready(program.run())
    wall = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        with jax.profiler.trace(folder):
            jax.block_until_ready(program.run())
            traced = time.perf_counter() - begin
        runs = operation_spans(Path(folder), program.text)
    print(f"{name}: whole program {wall:.3f} s, under the profiler {traced:.3f} s", flush=True)
    operations, chosen = operation_names(program.text, program.inside)
    taken = divided([x for x in runs if x.name in operations])
    rows = summed(program.text, {name: x for name, x in taken.items() if name in chosen})
    kinds = [added(rows, kind) for kind in dict.fromkeys(row["kind"] for row in rows)]
    total = sum(row["seconds"] for row in kinds)
    shown = kinds + [row for row in rows if row["kind"] != "all else"][: config.lines]
    return [
        {
            **{"who": f"pgjax {name}", "dtype": config.dtype, "kind": row["kind"], "what": row["what"]},
            **{key: row[key] / program.steps for key in ("seconds", "flops", "runs")},
            "share": row["seconds"] / total,
            "of_peak": mfu(row["flops"], row["seconds"], peaks.matmul_flops),
        }
        for row in shown
    ]


def added(rows: Sequence[Row], kind: str) -> Row:
    """Add up the rows of a kind.

    >>> row = {"kind": "weights", "what": "[4,8] x [2,8]", "seconds": 1.0, "flops": 8.0, "runs": 1}
    >>> added([row, row], "weights")
    {'kind': 'weights', 'what': '', 'seconds': 2.0, 'flops': 16.0, 'runs': 2}
    """
    same = [row for row in rows if row["kind"] == kind]
    return {"kind": kind, "what": "", **{key: sum(row[key] for row in same) for key in ("seconds", "flops", "runs")}}


class Span(NamedTuple):
    """One run of an operation, in seconds of the trace's clock."""

    name: str
    begin: float
    returned: float  # when its thread continued with the next
    end: float  # when the last of the parts that other threads took was done


def operation_spans(folder: Path, text: str) -> list[Span]:
    """Read from the profiler's trace when each operation of one program ran."""
    module = re.match(r"HloModule ([\w.\-]+)", text)
    events = [
        event
        for path in folder.rglob("*.trace.json.gz")
        for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        if event.get("ph") == "X"
    ]
    of_program = [event for event in events if module and event.get("args", {}).get("hlo_module") == module[1]]
    if not of_program:
        raise ValueError(
            "the profiler's trace names no operation of the program: this device's traces have another form"
        )
    return spans(of_program, [event for event in events if event["name"].startswith("end: ")])


def spans(begun: Iterable[Row], ends_of: Iterable[Row]) -> list[Span]:
    """Find when each run of each operation began and ended.

    On a CPU some products continue in other threads after their own event; an event "end: name" marks when they are done.

    >>> product = {"name": "dot", "ts": 1e6, "dur": 1.0, "args": {"hlo_op": "dot"}}
    >>> spans([product], [{"name": "end: dot", "ts": 2e6, "dur": 0.0}])
    [Span(name='dot', begin=1.0, returned=1.000001, end=2.0)]
    """
    ends: dict[str, collections.deque[float]] = collections.defaultdict(collections.deque)
    for event in sorted(ends_of, key=lambda event: event["ts"]):
        ends[event["name"].removeprefix("end: ")].append(event["ts"] + event["dur"])
    found = []
    for event in sorted(begun, key=lambda event: event["ts"]):
        name, own = event["args"].get("hlo_op"), event["ts"] + event["dur"]
        if name is not None:
            ended = ends[name].popleft() if ends[name] else own
            found.append(Span(name, event["ts"] / 1e6, own / 1e6, max(own, ended) / 1e6))
    return found


def divided(runs: Sequence[Span]) -> dict[str, tuple[float, int]]:
    """Divide the time among the operations, those that run at the same moment getting equal parts: seconds and runs of each.

    Operations that a thread is executing come first. When there are none, those count that other threads have yet to finish:
    these may only be waiting. The seconds add up to the time in which anything ran.

    >>> divided([Span("a", 0.0, 4.0, 4.0), Span("b", 2.0, 2.0, 5.0), Span("c", 2.0, 4.0, 4.0)])
    {'a': (3.0, 1), 'b': (1.0, 1), 'c': (1.0, 1)}
    """
    steps = sorted(
        step
        for x in runs
        for step in ((x.begin, 1, "in", x.name), (x.returned, -1, "in", x.name), (x.begin, 1, "of", x.name),
                     (x.end, -1, "of", x.name))
    )  # fmt: skip
    under_way: dict[str, collections.Counter[str]] = {"in": collections.Counter(), "of": collections.Counter()}
    seconds: dict[str, float] = dict.fromkeys((x.name for x in runs), 0.0)
    before = 0.0
    for moment, change, kind, name in steps:
        active = under_way["in"] or under_way["of"]
        for one, count in active.items() if moment > before else ():
            seconds[one] += (moment - before) * count / active.total()
        under_way[kind][name] += change
        if not under_way[kind][name]:
            del under_way[kind][name]
        before = moment
    counts = collections.Counter(x.name for x in runs)
    return {name: (x, counts[name]) for name, x in seconds.items()}


def operation_names(text: str, inside: Callable[[tuple[Loop, ...]], bool]) -> tuple[set[str], set[str]]:
    """Name the operations that contain no others, and those of them inside the profiled loops."""
    placed = [x for x in instructions(text) if x.instruction.opcode not in CONTAINERS]
    return {x.instruction.name for x in placed}, {x.instruction.name for x in placed if inside(x.loops)}


def summed(text: str, taken: Mapping[str, tuple[float, int]]) -> list[Row]:
    """Add up the time of equal products, and of all that is no product.

    >>> text = '''HloModule m
    ... ENTRY main {
    ...   a = f32[4,8] parameter(0)
    ...   b = f32[2,8] parameter(1)
    ...   c = f32[4,2] dot(a, b), lhs_contracting_dims={1}, rhs_contracting_dims={1}
    ...   d = f32[2,4] transpose(c), dimensions={1,0}
    ... }'''
    >>> rows = summed(text, {"c": (0.75, 2), "d": (0.125, 1)})
    >>> [(row["kind"], row["what"], row["seconds"], row["flops"]) for row in rows]
    [('weights', '[4,8] x [2,8]', 0.75, 256.0), ('all else', '', 0.125, 0.0)]
    """
    blocks, _ = parse(text)
    rows: dict[tuple[str, str], Row] = {}
    for block in blocks.values():
        for one in block.instructions.values():
            if one.name not in taken:
                continue
            seconds, runs = taken[one.name]
            products = list(products_of(one, block, blocks))
            key = (products[0].kind, " and ".join(x.shape for x in products)) if products else ("all else", "")
            row = rows.setdefault(key, {"kind": key[0], "what": key[1], "seconds": 0.0, "flops": 0.0, "runs": 0})
            row["seconds"] += seconds
            row["flops"] += runs * sum(x.flops for x in products)
            row["runs"] += runs
    return sorted(rows.values(), key=lambda row: (row["kind"] == "all else", -row["seconds"]))


def products_of(one: Instruction, block: Computation, blocks: Mapping[str, Computation]) -> Iterable[Product]:
    """List the matrix products that an operation does, itself or fused into it."""
    if one.opcode == "dot":
        known = block.instructions
        left, right = (known[name].type for name in one.operands)
        sizes = dimensions(left)
        summed_over = math.prod(sizes[i] for i in numbers(one.line, "lhs_contracting_dims"))
        kind = "attention" if numbers(one.line, "lhs_batch_dims") else "weights"
        flops = 2.0 * math.prod(dimensions(one.type)) * summed_over
        yield Product(kind, f"{dimensions(left)} x {dimensions(right)}".replace(" ", "").replace("x", " x "), flops)
    called = re.search(r"\bcalls=%?([\w.\-]+)", one.line)
    if called is not None and called[1] in blocks:
        inner = blocks[called[1]]
        for part in inner.instructions.values():
            yield from products_of(part, inner, blocks)


def dimensions(type_: str) -> list[int]:
    """Read an array's sizes off its type.

    >>> dimensions("f32[3072,576]{1,0}"), dimensions("f32[]")
    ([3072, 576], [])
    """
    match = re.match(r"\w+\[([\d,]*)\]", type_)
    return [int(n) for n in match[1].split(",") if n] if match else []


def numbers(line: str, name: str) -> list[int]:
    """Read a list of numbers off an instruction.

    >>> numbers("dot(a, b), lhs_contracting_dims={1,2}", "lhs_contracting_dims")
    [1, 2]
    """
    match = re.search(rf"\b{name}=\{{([\d,]*)\}}", line)
    return [int(n) for n in match[1].split(",") if n] if match else []


COLUMNS: dict[str, Callable[[Row], str]] = {
    "products of": lambda row: row["kind"],
    "shapes": lambda row: row["what"] or ("all" if row["flops"] else ""),
    "runs": lambda row: f"{row['runs']:.0f}",
    "ms": lambda row: f"{1e3 * row['seconds']:.2f}",
    "share": lambda row: f"{row['share']:.0%}",
    "GFLOP/s": lambda row: f"{row['flops'] / row['seconds'] / 1e9:.0f}" if row["flops"] else "-",
    "of the peak": lambda row: f"{row['of_peak']:.0%}" if row["flops"] else "-",
}


if __name__ == "__main__":
    command(main, Config, __doc__)
