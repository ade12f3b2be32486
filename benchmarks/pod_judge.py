"""Check a program compiled for a pod: its memory, its collectives, its time at best, and its defects."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks import hlo
from benchmarks.pod_programs import GIB, PARTS, Case, bytes_a_chip, lower, training_state
from benchmarks.timing import Row
from pgjax.run.flops import decode_bytes, forward_flops, parameter_counts, training_flops

HEAD_CHUNK = 1024  # entries of the vocabulary a step of `linear_token_logprobs`
MOST_ROWS = 4096  # beyond which `largest` tries nothing


def judge(case: Case, program: str, rows: int) -> Row:
    """Compile one program and make its row of the report.

    Args:
        case: the model on its pod.
        program: of `pod_programs.PROGRAMS`.
        rows: at once, for each part of data x fsdp; halved until they fit.

    Returns:
        A row of the report.
    """
    start = time.perf_counter()
    rows, compiled, memory = fitting(case, program, rows)
    seconds = time.perf_counter() - start
    text = compiled.as_text() or ""
    found = hlo.collectives(text)
    optimal = (compiled.cost_analysis() or {}).get("optimal_seconds", 0.0)
    return {
        "topology": case.topology, "model": case.model, "program": program, "chips": case.mesh.size,
        "mesh": {name: size for name, size in case.mesh.shape.items() if size > 1},
        "rows": rows * case.shares, "memory": memory, "limit": case.chip.memory,
        "phases": phases(case, program, rows, text, found),
        "optimal_seconds": optimal if optimal > 0 else None, "compile_seconds": round(seconds, 1),
        "defects": too_large(memory["used"], case.chip.memory) + misplaced(case, program, found),
    }  # fmt: skip


def largest_rows(case: Case, row: Row) -> int:
    """Find how many rows at once fit, over all chips, going on from a row of the report."""
    memory = row["memory"]
    fixed = sum(memory[kind] for kind in ("parameters", "moments", "gathered", "gradient", "beside"))
    used = functools.partial(used_by, case, row["program"])
    return case.shares * largest(used, row["limit"], row["rows"] // case.shares, memory["used"], fixed)


def too_large(used: float, limit: float) -> list[str]:
    """Name the defect of a program that does not fit.

    >>> too_large(3 * GIB, 2 * GIB), too_large(GIB, GIB)
    (['it does not fit: 3.00 GiB of 2.00'], [])
    """
    return [] if used <= limit else [f"it does not fit: {used / GIB:.2f} GiB of {limit / GIB:.2f}"]


def memory_of(case: Case, program: str, rows: int, compiled: jax.stages.Compiled) -> dict[str, int]:
    """Split the bytes of a chip by kind.

    used = arguments + results - what they share + temporaries + code, as the compiler counts them, + beside: what training
    keeps on the chip that this program is not given (the frozen reference; Adam's moments, but for the learner). On paper:
    parameters and moments are arguments; gathered (the decode loop's bfloat16 weights), cache and gradient are temporaries.
    """
    stats: Any = compiled.memory_analysis()
    state, arch = training_state(case), case.lm.arch
    parameters, moments = bytes_a_chip(state.params), bytes_a_chip(state.opt_state)
    tensor, sampling, learning = case.size("tensor"), program == "sampler", program == "learner"
    heads = arch.kv_heads // (tensor if arch.kv_heads % tensor == 0 else 1)
    slots = rows * (case.prompt_length + case.new_tokens)
    kinds = {
        "parameters": parameters,
        "moments": moments * learning,
        "gradient": parameters * learning,
        "gathered": 2 * sum(parameter_counts(arch)) // tensor * sampling,
        "cache": 2 * 2 * arch.depth * heads * arch.head_dim * slots * sampling,
    }
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    code, temporaries = stats.generated_code_size_in_bytes, stats.temp_size_in_bytes
    total = stats.argument_size_in_bytes + results + temporaries + code
    beside = parameters + moments * (not learning)
    compiler = {"arguments": stats.argument_size_in_bytes, "results": results, "temporaries": temporaries, "code": code}
    return {**kinds, "other": total - sum(kinds.values()), "beside": beside, "used": total + beside, **compiler}


def fitting(case: Case, program: str, rows: int) -> tuple[int, jax.stages.Compiled, dict[str, int]]:
    """Compile with so many rows, halved until they fit; one row is accepted even if it does not."""
    while True:
        try:
            compiled = lower(case, program, rows).compile()
            memory = memory_of(case, program, rows, compiled)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or rows == 1:
                raise
        else:
            if memory["used"] <= case.chip.memory or rows == 1:
                return rows, compiled, memory
        rows //= 2


def used_by(case: Case, program: str, rows: int) -> float:
    """Compile with another batch, for its bytes alone; infinity where the compiler finds no room."""
    try:
        return memory_of(case, program, rows, lower(case, program, rows).compile())["used"]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf


def largest(used: Callable[[int], float], limit: float, rows: int, first: float, fixed: float) -> int:
    """Find how many rows fit, by lines through the sizes compiled so far: two or three compilations, mostly.

    Args:
        used: rows -> bytes, a compilation; infinity where it finds no room.
        limit: bytes.
        rows: where to start.
        first: used(rows).
        fixed: bytes of `first` that no row adds to, as far as is known.

    Returns:
        Rows of three significant bits (8, 10, 12, 14, 16, 20, ...) that fit, where the next such number does not, by a
        compilation or by the line through the last two; `rows` where no more fit, or the half of it, or half of that, that
        does; 0 where not even one row fits.

    >>> asked = []
    >>> largest(lambda n: asked.append(n) or 20.0 + n, 100.0, 2, 22.0, 10.0), asked
    (80, [14, 80])
    """
    if first > limit:
        smaller = (rows >> i for i in range(1, rows.bit_length()))
        return next((n for n in smaller if used(n) <= limit), 0)
    good, size, bad, a_row = rows, first, MOST_ROWS + 1, max(first - fixed, 1.0) / rows
    while (at := three_bits(min(good + (limit - size) / a_row, bad - 1))) > good:
        there = used(at)
        # Without a size the slope is chosen so that the next try is halfway.
        rise = there - size if there < math.inf else 2 * (limit - size)
        a_row = max(rise / (at - good), 1.0)
        if there > limit:
            bad = at
        else:
            good, size = at, there
    return good


def three_bits(x: float) -> int:
    """Round down to a whole number of three significant bits.

    >>> [three_bits(x) for x in (7.9, 9.0, 31.0, 100.0)]
    [7, 8, 28, 96]
    """
    low = max(0, int(x).bit_length() - 3)
    return int(x) >> low << low


def phases(case: Case, program: str, rows: int, text: str, found: Sequence[hlo.Collective]) -> list[Row]:
    """Give the work, the collectives and the time at best of each phase of a program."""
    chip, estimates, result = case.chip, hlo.cycles(text), []
    for name in ("prefill", "decode") if program == "sampler" else (program,):
        decoding = name == "decode"
        sent = [one for one in found if in_decode(program, one.loops) == decoding]
        cycles = sum(count * runs(loops) for count, loops in estimates if in_decode(program, loops) == decoding)
        flops, read = work(case, name, rows)
        times = {
            "products": flops / chip.flops,
            "memory": read / chip.read_bytes,
            "links": sum(arriving(one) * runs(one.loops) for one in sent) / chip.link_bytes,
        }
        estimate = cycles * chip.flops_a_cycle / chip.flops if cycles else None
        result.append({
            "phase": name, "flops": flops, "bytes": read, "times": times, "compiler_seconds": estimate,
            "collectives": summary(sent), "loops": sorted({trips(loops) for _, loops in estimates if loops}, key=str),
        })  # fmt: skip
    return result


def in_decode(program: str, loops: tuple[hlo.Loop, ...]) -> bool:
    """Say whether a place is in the sampler's decode loop, its only loop whose length is not known beforehand."""
    return program == "sampler" and bool(loops) and loops[0].trips is None


def runs(loops: tuple[hlo.Loop, ...]) -> int:
    """Count how often a place is reached; a loop of unknown length counts once.

    >>> runs((hlo.Loop("a", 3, ""), hlo.Loop("b", None, ""), hlo.Loop("c", 2, "")))
    6
    """
    return math.prod(1 if loop.trips is None else loop.trips for loop in loops)


def trips(loops: tuple[hlo.Loop, ...]) -> tuple[int | None, ...]:
    """List the lengths of nested loops."""
    return tuple(loop.trips for loop in loops)


def arriving(one: hlo.Collective) -> float:
    """Count the bytes that a chip must at least receive for one run of a collective, whatever the algorithm."""
    n = one.participants
    passes = {"all-reduce": 2.0 * (n - 1) / n, "collective-permute": 1.0, "collective-broadcast": 1.0}
    return one.bytes * passes.get(one.kind, (n - 1) / n)


def summary(found: Sequence[hlo.Collective]) -> list[Row]:
    """Group the collectives of the same kind, participants and loops: their number, their bytes in all runs, the largest."""
    groups: dict[tuple[Any, ...], list[hlo.Collective]] = {}
    for one in found:
        groups.setdefault((one.kind, one.participants, trips(one.loops)), []).append(one)
    return [
        {
            "kind": kind, "participants": participants, "loops": loops, "count": len(ones),
            "bytes": sum(one.bytes * runs(one.loops) for one in ones),
            "largest": max(ones, key=lambda one: one.bytes).shapes[0],
        }
        for (kind, participants, loops), ones in groups.items()
    ]  # fmt: skip


def work(case: Case, phase: str, rows: int) -> tuple[float, float]:
    """Count the operations and the bytes of a chip that one run of a phase needs on paper, by `pgjax.run.flops`.

    Bytes: the weights in bfloat16, split over tensor, once for each pass through the model (a backward pass is one more); for
    decode the filled cache too; for the learner also parameters, gradient and moments, read and written once.
    """
    arch, tensor = case.lm.arch, case.size("tensor")
    weights = 2.0 * sum(parameter_counts(arch)) / tensor
    length = case.prompt_length + case.new_tokens
    if phase == "decode":
        context = case.prompt_length + case.new_tokens / 2
        flops = forward_flops(arch, tokens=rows, context=context, head_tokens=rows)
        read = decode_bytes(arch, batch=rows, context=context, weight_bytes=2, cache_bytes=2)
        return flops / tensor, read / tensor
    if phase == "prefill":
        tokens, context = rows * case.prompt_length, case.prompt_length / 2
        return forward_flops(arch, tokens=tokens, context=context, head_tokens=rows) / tensor, weights
    sizes = {"tokens": PARTS * rows * length, "context": length / 2, "head_tokens": PARTS * rows * case.new_tokens}
    if phase in ("scoring", "reference"):
        return forward_flops(arch, **sizes) / tensor, PARTS * weights
    state = training_state(case)
    step = 2 * (2 * bytes_a_chip(state.params) + bytes_a_chip(state.opt_state))
    return training_flops(arch, **sizes) / tensor, 2 * PARTS * weights + step


def misplaced(case: Case, program: str, found: Sequence[hlo.Collective]) -> list[str]:
    """Describe the collectives that should not be where they are.

    In the decode loop nothing is sent over data or fsdp but whether all rows are done; over tensor activations are sent, and
    parameters are not (an all-reduce is a sum, so it is of activations). The loop over the vocabulary sends nothing. The learner
    never reduces a whole gradient that fsdp splits.
    """
    tensor, chunks = case.size("tensor"), case.lm.arch.vocab_size // HEAD_CHUNK
    learning, kernels, named = program == "learner" and case.size("fsdp") > 1, kernel_shapes(case), []
    for one in found:
        across_rows = one.participants != tensor
        whole = any(squeezed(shape) in kernels for shape in one.shapes)
        described = f"{one.kind} of {', '.join(one.shapes[:3])} over {one.participants} devices ({one.op_name})"
        parameter = one.bytes > 64 if across_rows else whole and one.kind != "all-reduce"
        if in_decode(program, one.loops) and parameter:
            named.append(f"in the decode loop: {described}")
        elif chunks > 1 and chunks in trips(one.loops):
            named.append(f"in the loop over the vocabulary: {described}")
        elif learning and one.kind == "all-reduce" and across_rows and whole:
            named.append(f"a gradient reduced whole: {described}")
    if learning and not any(one.kind == "reduce-scatter" for one in found):
        named.append("no reduce-scatter of the gradient")
    return named


def kernel_shapes(case: Case) -> set[tuple[int, ...]]:
    """List the sorted sizes of the model's matrices, those of one layer each, whole over fsdp, whole and split over tensor."""
    tensor, bare = case.size("tensor"), jax.eval_shape(lambda: case.lm.init(jax.random.key(0)))
    found: set[tuple[int, ...]] = set()
    for path, x in jax.tree_util.tree_flatten_with_path(bare)[0]:
        shape = x.shape[1:] if path[0].key == "layers" else x.shape
        if len(shape) == 2:
            rows, columns = shape
            layouts = (rows, columns), (rows // tensor, columns), (rows, columns // tensor)
            found |= {(min(sizes), max(sizes)) for sizes in layouts}
    return found


def squeezed(shape: str) -> tuple[int, ...]:
    """Sort the sizes of an array's type, those of 1 left out.

    >>> squeezed("f32[1,8,4]")
    (4, 8)
    """
    return tuple(sorted(int(n) for n in shape.split("[")[1].rstrip("]").split(",") if n not in ("", "1")))
