"""Read the text of a compiled program: its collectives, the loops around them, and the compiler's cycle estimates.

`jax.stages.Compiled.as_text()` is the program after the partitioner, so every size in it is of one device. XLA's CPU and TPU
compilers write a collective in several forms, and all are read: one instruction, a pair of start and done, a call of an
asynchronous computation, or a part of a fusion. The TPU's fusion `all-reduce-scatter` is a reduce-scatter, and a chain of its
fusions that each move a part beside other work is one collective.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip


class Loop(NamedTuple):
    """A `while` of the program."""

    name: str
    trips: int | None  # how often its body runs; None: known only when it runs
    op_name: str  # where jax made it, such as jit(update)/while


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str  # of the result, with its layout
    opcode: str
    operands: tuple[str, ...]
    line: str


class Computation(NamedTuple):
    """A block of instructions."""

    name: str
    instructions: dict[str, Instruction]
    root: str


class Placed(NamedTuple):
    """An instruction at one of the places where the program reaches it from its entry."""

    instruction: Instruction
    computation: Computation
    loops: tuple[Loop, ...]  # that enclose it, outermost first
    conditional: bool  # in a branch that need not be taken


class Collective(NamedTuple):
    """A communication between devices."""

    kind: str  # of KINDS, whatever form it has in the text
    name: str
    shapes: tuple[str, ...]  # of the larger side, operands or results, on one device, as bf16[4,8]
    bytes: int  # of that side, for one run: what an all-gather ends with, what a reduce-scatter starts from
    participants: int  # devices of one group
    loops: tuple[Loop, ...]
    conditional: bool
    op_name: str


def collectives(text: str) -> list[Collective]:
    """List the collectives of a compiled program, each once for every place that it is called from.

    Args:
        text: of `jax.jit(f).lower(...).compile().as_text()`.

    Returns:
        One entry a collective; a start and its done are one. Those of one participant are left out: they move nothing.

    >>> text = '''HloModule m, num_partitions=4
    ... body {
    ...   p = (s32[], f32[2,8]) parameter(0)
    ...   x = f32[2,8] get-tuple-element(p), index=1
    ...   gathered = f32[8,8] all-gather(x), replica_groups=[1,4]<=[4], dimensions={0}
    ... }
    ... ENTRY main {
    ...   start = (s32[], f32[2,8]) parameter(0)
    ...   end = (s32[], f32[2,8]) while(start), condition=cond, body=body, backend_config={"known_trip_count":{"n":"3"}}
    ... }'''
    >>> [(c.kind, c.bytes, c.participants, [loop.trips for loop in c.loops]) for c in collectives(text)]
    [('all-gather', 256, 4, [3])]
    """
    devices = _devices(text)
    found = []
    for placed in instructions(text):
        one = placed.instruction
        kind = one.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        participants = _participants(one.line, devices)
        if participants == 1 or _continues(placed):
            continue
        if placed.computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        shapes = _larger_side(placed)
        size = sum(map(bytes_of, shapes))
        where = placed.loops, placed.conditional, _op_name(one.line)
        found.append(Collective(kind, one.name, shapes, size, participants, *where))
    return found


def _continues(placed: Placed) -> bool:
    """Say whether this is a later part of a collective that the TPU started in another fusion."""
    ends = [one.line for one in placed.computation.instructions.values() if one.opcode == "custom-call"]
    return "chain_id=" in placed.instruction.line and not any("AsyncCollectiveStart" in line for line in ends)


def cycles(text: str) -> list[tuple[int, tuple[Loop, ...]]]:
    """List the compiler's cycle estimates, each with the loops around it; empty where it makes none (CPU, GPU).

    >>> cycles('ENTRY m {\\n  a = f32[2] add(b, c), backend_config={"estimated_cycles":"17"}\\n}')
    [(17, ())]
    """
    found = []
    for placed in instructions(text):
        match = re.search(r'"estimated_cycles":"(\d+)"', placed.instruction.line)
        if match is not None:
            found.append((int(match[1]), placed.loops))
    return found


def bytes_of(shape: str) -> int:
    """Count the bytes of one array's type.

    >>> bytes_of("bf16[2,3]{1,0:T(8,128)(2,1)}"), bytes_of("pred[]"), bytes_of("u32[4]")
    (12, 1, 16)
    """
    match = re.match(r"([a-z]+)(\d*)[a-z\d]*\[([\d,]*)\]", shape)
    if match is None or (match[1] != "pred" and not match[2]):
        return 0  # a token, an opaque handle
    bits = 8 if match[1] == "pred" else int(match[2])
    return math.prod(int(n) for n in match[3].split(",") if n) * bits // 8


def instructions(text: str) -> Iterator[Placed]:
    """Give every instruction that a program reaches from its entry, through loops, branches, calls and fusions."""
    blocks, entry = parse(text)
    yield from _walk(blocks, entry, (), False)


def _walk(blocks: dict[str, Computation], name: str, loops: tuple[Loop, ...], conditional: bool) -> Iterator[Placed]:
    block = blocks.get(name)
    if block is None:
        return
    for one in block.instructions.values():
        yield Placed(one, block, loops, conditional)
        if one.opcode in ("async-update", "async-done"):  # they repeat the computation of their start
            continue
        called = re.findall(r"\b(?:calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)", one.line)
        branches = conditional or one.opcode == "conditional"
        for inner in re.findall(r"[\w.\-]+", " ".join(called)):
            yield from _walk(blocks, inner, loops, branches)
        if one.opcode == "while":
            inside = (*loops, Loop(one.name, _trips(blocks, block, one), _op_name(one.line)))
            for part in ("condition", "body"):
                yield from _walk(blocks, _attribute(one.line, part), inside, conditional)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Split a program into its computations by name, and name the entry.

    >>> blocks, entry = parse("ENTRY %main (x: f32[2]) -> f32[2] {\\n  ROOT %x = f32[2]{0} parameter(0)\\n}")
    >>> entry, blocks["main"].instructions["x"].type
    ('main', 'f32[2]{0}')
    """
    blocks: dict[str, Computation] = {}
    found: dict[str, Instruction] = {}
    entry = name = root = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$", line)
        if header is not None:
            name, root, found = header[2], "", {}
            entry = name if header[1] else entry
        elif line.startswith("}"):
            blocks[name] = Computation(name, found, root)
        elif (one := _instruction(line)) is not None:
            found[one.name] = one
            root = one.name if line.lstrip().startswith("ROOT ") else root
    return blocks, entry


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    rest = line[match.end() :]
    cut = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = re.match(r"\s*([\w\-]+)\(", rest[cut:])
    if opcode is None:
        return None
    start = cut + opcode.end() - 1
    inside = rest[start + 1 : start + _closing(rest[start:])]
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(inside) if part.strip())
    return Instruction(match[1], rest[:cut], opcode[1], operands, line)


def _closing(text: str) -> int:
    """Find the parenthesis that closes the one which `text` starts with."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i
    return len(text)


def _split(text: str) -> list[str]:
    """Split at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _arrays(type_: str) -> tuple[str, ...]:
    """List the arrays of a type, those of nested tuples too, without their layouts."""
    return tuple(re.findall(r"\b[a-z]\w*\[[\d,]*\]", type_))


def _larger_side(placed: Placed) -> tuple[str, ...]:
    one = placed.instruction
    known = placed.computation.instructions
    operands = [shape for name in one.operands if name in known for shape in _arrays(known[name].type)]
    results = list(_arrays(one.type))
    if one.opcode.endswith("-start") and one.opcode != "all-reduce-start":
        results = results[len(operands) : 2 * len(operands)]  # (operands, results, contexts)
    return tuple(max(operands, results, key=lambda side: sum(map(bytes_of, side))))


def _attribute(line: str, name: str) -> str:
    match = re.search(rf"\b{name}=%?([\w.\-]+)", line)
    return "" if match is None else match[1]


def _op_name(line: str) -> str:
    match = re.search(r'op_name="([^"]*)"', line)
    return "" if match is None else match[1]


def _devices(text: str) -> int:
    head = text.split("\n", 1)[0]
    counts = (re.search(rf"{name}=(\d+)", head) for name in ("num_partitions", "replica_count"))
    return math.prod(int(match[1]) for match in counts if match is not None)


def _participants(line: str, devices: int) -> int:
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs is not None:
        return _ring(re.findall(r"(\d+),(\d+)", pairs[1]))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line)
    if mesh is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    tiles = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if tiles is not None:
        return int(tiles[1])
    first = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return devices if first is None else first[1].count(",") + 1


def _ring(pairs: Iterable[tuple[str, str]]) -> int:
    """Count the devices that one message passes, from the first source on."""
    to = dict(pairs)
    seen, at = set(), next(iter(to), "")
    while at not in seen:
        seen.add(at)
        at = to.get(at, at)
    return len(seen)


def _trips(blocks: dict[str, Computation], block: Computation, loop: Instruction) -> int | None:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.line)
    if known is not None:
        return int(known[1])
    # The TPU's text has no trip count; it shows the counter's start and the limit that it is compared with.
    condition = blocks.get(_attribute(loop.line, "condition"))
    test = None if condition is None else condition.instructions.get(condition.root)
    if condition is None or test is None or test.opcode != "compare" or "direction=LT" not in test.line:
        return None
    counter, limit = (condition.instructions.get(name) for name in test.operands)
    end = _constant(condition, limit)
    if counter is None or counter.opcode != "get-tuple-element" or end is None:
        return None
    start = block.instructions.get(loop.operands[0])
    index = re.search(r"index=(\d+)", counter.line)
    if start is None or start.opcode != "tuple" or index is None:
        return None
    begin = _constant(block, block.instructions.get(start.operands[int(index[1])]))
    return None if begin is None else end - begin


def _constant(block: Computation, one: Instruction | None) -> int | None:
    while one is not None and one.opcode in ("copy", "bitcast", "convert"):
        one = block.instructions.get(one.operands[0])
    return None if one is None or one.opcode != "constant" else int(one.operands[0])
