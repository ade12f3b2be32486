"""Run what one would use instead in processes of their own, so that neither side's threads and memory disturb the other.

A peer is a program `PYTHON -m benchmarks.peers.NAME`. It reads one line of JSON, its set-up, says that it is ready, and
then does its work once for every further line; it answers with the seconds by its own clocks. The parent waits in a
blocking read meanwhile, and between runs the peer waits in one, so that only one side computes at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import pgjax as pg
from benchmarks.timing import OURS, Contender, PeerError, Row, Sample, Timing, add_ratios, begun, with_peaks
from pgjax import perf

ROOT = Path(__file__).resolve().parent.parent
ASK = (
    "import importlib.metadata as m, json, platform, sys\n"
    "found = {d.name.lower(): d.version for d in m.distributions() if d.name}\n"
    "print(json.dumps({'python': platform.python_version(), **{p: found[p] for p in sys.argv[1:] if p in found}}))"
)


@dataclasses.dataclass(frozen=True)
class Beside:
    """What every benchmark beside peers asks."""

    model: str = "SmolLM2-135M-Instruct"  # folder, .gguf file, hub id, or a model that an installed package ships
    repeats: int = 5  # timed rounds
    peer: bool = True  # alternate with the peers that are installed
    peer_pythons: tuple[str, ...] = ()  # interpreters that are asked, in order, for the peers; none: this one
    peer_threads: int | None = None  # of torch, None for its own choice; 1 may be faster on a busy machine
    seed: int = 0  # of what is drawn
    json: Path | None = None  # write the report here too


class Need(NamedTuple):
    """A package that a peer needs, and the range of its versions; "" is open."""

    package: str
    at_least: str = ""
    below: str = ""

    def met_by(self, versions: Mapping[str, str]) -> bool:
        """Say whether an interpreter with these versions has it.

        >>> Need("trl", below="1.13").met_by({"trl": "1.12.0"}), Need("trl", at_least="1.13").met_by({"trl": "1.9.1"})
        (True, False)
        """
        if self.package not in versions:
            return False
        version = numbers(versions[self.package])
        return numbers(self.at_least) <= version and (not self.below or version < numbers(self.below))

    def __str__(self) -> str:
        at_least = f" >= {self.at_least}" if self.at_least else ""
        return self.package + at_least + (f" < {self.below}" if self.below else "")


class Peer(NamedTuple):
    """A program to compare with."""

    who: str  # its name in the tables
    program: str  # its module
    needs: tuple[Need, ...]
    beyond: Callable[[pg.Architecture], str | None] = lambda arch: None  # why it does not have a model


def beyond_tunix(arch: pg.Architecture) -> str | None:
    """Say why Tunix's Llama is not this model; None where it is.

    Its rope has no scaling, and its projections no biases.
    """
    if arch.family != "llama":
        return f"only its Llama is compared with, and this model is of the family {arch.family}"
    if arch.rope is None or arch.rope.factor is not None:
        return "its Llama does not scale its rope, and this model does"
    if arch.qkv_bias or arch.out_bias or arch.mlp_bias or arch.qk_norm or arch.activation != "silu":
        return "its Llama has no biases, no norm of queries and keys, and silu alone"
    return None


def numbers(version: str) -> tuple[int, ...]:
    """Read the leading numbers of a version.

    >>> numbers("2.13.0+cpu"), numbers("1.12.0rc1"), numbers("")
    ((2, 13, 0), (1, 12), ())
    """
    found: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


@functools.cache
def installed(python: str, packages: tuple[str, ...]) -> dict[str, str]:
    """Ask an interpreter for its own version and those of packages; absent ones are left out.

    What is no Python has none of them: its answer stands under "unfit".

    Raises:
        ValueError: it does not run.
    """
    try:
        done = subprocess.run([python, "-c", ASK, *packages], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"peer_pythons: {python} does not run ({error})") from error
    if done.returncode != 0:
        raise ValueError(f"peer_pythons: {python} does not run:\n{done.stderr[-1000:]}")
    found = parsed(done.stdout)
    return (
        found if "python" in found else {"unfit": f"{Path(python).name}, asked for its packages, said {done.stdout!r}"}
    )


def parsed(text: str) -> dict[str, Any]:
    """Read an object of JSON; anything else is an empty one.

    >>> parsed('{"wall": 1.5}'), parsed("Segmentation fault"), parsed("")
    ({'wall': 1.5}, {}, {})
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def choose(
    peers: Sequence[Peer], pythons: Sequence[str], arch: pg.Architecture, *, wanted: bool
) -> tuple[dict[str, str], str | None]:
    """Find for each peer the first interpreter that has all that it needs.

    Args:
        peers: to look for.
        pythons: interpreters, asked in this order; none given: this one.
        arch: of the model that they are to run.
        wanted: False looks for none.

    Returns:
        name to interpreter, for the peers that are there; and which are not and why, one line each, None when all are.
    """
    if not wanted:
        return {}, "peers left out: --no-peer"
    found: dict[str, str] = {}
    absent: list[str] = []
    for peer in peers:
        if (why := peer.beyond(arch)) is not None:
            absent.append(f"{peer.who} left out: {why}")
            continue
        packages = tuple(need.package for need in peer.needs)
        asked = [(python, installed(python, packages)) for python in pythons or (sys.executable,)]
        serving = [
            python
            for python, versions in asked
            if "unfit" not in versions and all(need.met_by(versions) for need in peer.needs)
        ]
        if serving:
            found[peer.who] = serving[0]
        else:
            absent.append(missing(peer, [versions for _, versions in asked]))
    return found, "\n".join(absent) or None


def missing(peer: Peer, asked: Sequence[Mapping[str, str]]) -> str:
    """Name a peer that is not there, what it needs, and what each interpreter has instead.

    >>> missing(Peer("TRL PPO", "", (Need("trl", below="1.13"), Need("torch"))), [{"python": "3.11.7", "torch": "2.13.0"}])
    'TRL PPO missing: needs trl < 1.13, torch; Python 3.11.7 has trl not installed, torch 2.13.0 (--peer-pythons names others)'
    """
    has = [
        versions.get("unfit")
        or f"Python {versions['python']} has "
        + ", ".join(f"{need.package} {versions.get(need.package, 'not installed')}" for need in peer.needs)
        for versions in asked
    ]
    needs = ", ".join(str(need) for need in peer.needs)
    return f"{peer.who} missing: needs {needs}; {'; '.join(has)} (--peer-pythons names others)"


class Worker:
    """A peer's process; it holds what it has set up until it is closed."""

    def __init__(self, who: str, command: Sequence[str], setup: Mapping[str, Any]) -> None:
        """Start it and wait until it is ready.

        Raises:
            PeerError: it ended before or gave no answer, with what it printed.
        """
        self.who = who
        self.failure: str | None = None  # why it can't go on, with what it printed
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  of stderr: a pipe that nobody reads would fill up
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        try:
            self.versions: dict[str, str] = self._ask(setup, "versions")["versions"]
        except BaseException:
            self.close()
            raise

    def run(self, **ask: Any) -> Sample:
        """Let it do its work once.

        Raises:
            PeerError: it can't, now or since an earlier run, with what it printed.
        """
        answer = self._ask(ask, "wall", "cpu")
        return Sample(answer.pop("wall"), answer.pop("cpu"), answer)

    def _ask(self, line: Mapping[str, Any], *needed: str) -> dict[str, Any]:
        if self.failure is not None:
            raise PeerError(f"{self.who} {self.failure}")
        assert self._process.stdin is not None and self._process.stdout is not None
        text = ""
        with contextlib.suppress(BrokenPipeError):  # it has ended: the error below says so
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
            text = self._process.stdout.readline()
        answer = parsed(text)
        if answer.keys() >= set(needed):
            return answer
        self.failure = self._last_words(text)
        raise PeerError(f"{self.who} {self.failure}")

    def _last_words(self, text: str) -> str:
        if text.endswith("\n"):  # it lives, but nobody knows what it would say next
            self._process.kill()
            self._process.wait()
            ended = f"answered {text[:200].strip()!r}"
        else:
            ended = f"ended with status {self._process.wait()}"
        self._said.seek(0)
        printed = self._said.read().decode(errors="replace")[-3000:].strip()
        return f"{ended}; it printed:\n{printed}" if printed else f"{ended}; it printed nothing"

    def close(self) -> None:
        """End it: it sees the end of its input, and has ten seconds to go."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()


@contextlib.contextmanager
def workers(
    peers: Sequence[Peer], pythons: Mapping[str, str], setups: Mapping[str, Mapping[str, Any]], failures: dict[str, str]
) -> Iterator[dict[str, Worker]]:
    """Start those of the peers that have an interpreter and a set-up, one after the other; end them afterwards.

    Args:
        peers: to start.
        pythons: name of a peer to its interpreter.
        setups: name of a peer to what it needs to know.
        failures: takes the words of those that could not start, and at the end of those that could not go on.
    """
    with contextlib.ExitStack() as stack:
        running: dict[str, Worker] = {}
        for peer in peers:
            if peer.who in pythons and peer.who in setups:
                command = [pythons[peer.who], "-m", peer.program]
                try:
                    running[peer.who] = Worker(peer.who, command, setups[peer.who])
                except PeerError as error:
                    failures[peer.who] = str(error)
                else:
                    stack.callback(running[peer.who].close)
        yield running
        failures |= {who: f"{who} {worker.failure}" for who, worker in running.items() if worker.failure is not None}


def leave_out(report: Row, dtype: str, failures: Mapping[str, str]) -> None:
    """Add to a report's missing peers those that failed in a dtype: how, and their last line; all they said goes to stderr.

    >>> report = {"peer": None}
    >>> leave_out(report, "float32", {"torch": "torch ended with status 1; it printed:\\nTraceback\\nMemoryError: 2 GB"})
    >>> report["peer"]
    'left out in float32: torch ended with status 1; it printed: MemoryError: 2 GB'
    """
    lines = []
    for words in failures.values():
        print(f"left out in {dtype}: {words}", file=sys.stderr, flush=True)
        first, *rest = words.splitlines()
        lines.append(" ".join([f"left out in {dtype}: {first}", *rest[-1:]]))
    report["peer"] = "\n".join([*filter(None, [report["peer"]]), *lines]) or None


@contextlib.contextmanager
def model_folder(lm: pg.CausalLM, params: Any) -> Iterator[str]:
    """Write the model where peers read it, in Hugging Face layout; gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        pg.save_pretrained(Path(folder) / "model", lm, params, None)
        yield str(Path(folder) / "model")


def compare(
    config: Beside,
    dtypes: Sequence[str],
    peers: Sequence[Peer],
    lm: pg.CausalLM,
    params: Any,
    *,
    setups: Callable[[str, str], Mapping[str, Row]],
    runs: Callable[[str, Mapping[str, Worker]], Mapping[str, Contender]],
    measure: Callable[[str, str, perf.Peaks, Mapping[str, Timing]], Row],
) -> Row:
    """Time our runs in turn with those of the peers that are there, dtype by dtype, between two measurements of the peaks.

    Args:
        config: of the benchmark.
        dtypes: that it is made in.
        peers: to look for.
        lm: the model.
        params: of it; the peers read them from a folder.
        setups: (folder, dtype) -> what each peer needs to know; one that is not named does not run.
        runs: (dtype, the peers' processes) -> all contenders.
        measure: (dtype, who, peaks, times of all contenders) -> the figures of ours, or of one peer.

    Returns:
        The report: a row for ours and each peer in each dtype, ours with the ratios.
    """
    pythons, absent = choose(peers, config.peer_pythons, lm.arch, wanted=config.peer)
    report = begun(config, absent)
    with model_folder(lm, params) as folder:
        for dtype in dtypes:
            failures: dict[str, str] = {}
            with workers(peers, pythons, setups(folder, dtype), failures) as running:
                report["peers"] |= {who: worker.versions for who, worker in running.items()}
                peaks, times = with_peaks(report, dtype, runs(dtype, running), config.repeats)
            leave_out(report, dtype, failures)
            report["rows"] += [
                {"who": who, "dtype": dtype, **measure(dtype, who, peaks, times)}
                for who in (OURS, *running)
                if who not in failures
            ]
    add_ratios(report["rows"])
    return report


def device() -> str:
    """Name the device as torch names it."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"
