"""Run peers, the libraries to compare with, in processes of their own, whose threads and memory do not disturb each other.

A peer is a program `PYTHON -m benchmarks.peers.NAME`. It reads its set-up, one line of JSON, answers that it is ready, and
then does its work once for every further line and answers with the seconds by its own clocks. While it works the parent
waits in a blocking read, and between runs the peer does, so that only one side computes at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import pgjax as pg
from benchmarks.interpreters import Peer, choose, parsed
from benchmarks.timing import OURS, Contender, PeerError, Row, Sample, Timing, add_ratios, begun, with_peaks
from pgjax.run.peaks import Peaks

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Beside:
    """The fields that every benchmark beside peers has."""

    model: str = "SmolLM2-135M-Instruct"  # folder, .gguf file, hub id, or a model that an installed package ships
    repeats: int = 5  # timed rounds
    peer: bool = True  # alternate with the peers that are installed
    peer_pythons: tuple[str, ...] = ()  # interpreters to look for the peers in, in this order; none: this one
    peer_threads: int | None = None  # of torch, None for its own choice; 1 may be faster on a busy machine
    seed: int = 0  # of the random inputs
    json: Path | None = None  # write the report here too


class Worker:
    """A peer's process, which keeps its set-up until it is closed."""

    def __init__(self, who: str, command: Sequence[str], setup: Mapping[str, Any], *, folder: Path = ROOT) -> None:
        """Start it in a working directory, and wait until it is ready.

        Raises:
            PeerError: it ended before or gave no answer, with what it printed.
        """
        self.who = who
        self.failure: str | None = None  # why it can't go on, with what it printed
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115  of stderr: a pipe that nobody reads would fill up
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._printed, text=True, cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        try:
            self.versions: dict[str, str] = self._ask(setup, "versions")["versions"]
        except BaseException:
            self.close()
            raise

    def run(self, **request: Any) -> Sample:
        """Let it do its work once.

        Raises:
            PeerError: it can't, now or since an earlier run, with what it printed.
        """
        answer = self._ask(request, "wall", "cpu")
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
        self.failure = self._end_of_output(text)
        raise PeerError(f"{self.who} {self.failure}")

    def _end_of_output(self, text: str) -> str:
        if text.endswith("\n"):  # it lives, but its next answer could be to this request
            self._process.kill()
            self._process.wait()
            ended = f"answered {text[:200].strip()!r}"
        else:
            ended = f"ended with status {self._process.wait()}"
        self._printed.seek(0)
        printed = self._printed.read().decode(errors="replace")[-3000:].strip()
        return f"{ended}; it printed:\n{printed}" if printed else f"{ended}; it printed nothing"

    def close(self) -> None:
        """End it: its input is closed, and after ten seconds it is killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._printed.close()


@contextlib.contextmanager
def workers(
    peers: Sequence[Peer], pythons: Mapping[str, str], setups: Mapping[str, Mapping[str, Any]], failures: dict[str, str]
) -> Iterator[dict[str, Worker]]:
    """Start those of the peers that have an interpreter and a set-up, one after the other; end them afterwards.

    Args:
        peers: to start.
        pythons: name of a peer to its interpreter.
        setups: name of a peer to its set-up.
        failures: the messages of those that could not start, and at the end of those that could not go on, are added here.
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
    """Add to a report's missing peers those that failed in a dtype, with their last line; all they printed goes to stderr.

    >>> report = {"peer": None}
    >>> leave_out(report, "float32", {"torch": "torch ended with status 1; it printed:\\nTraceback\\nMemoryError: 2 GB"})
    >>> report["peer"]
    'left out in float32: torch ended with status 1; it printed: MemoryError: 2 GB'
    """
    lines = []
    for message in failures.values():
        print(f"left out in {dtype}: {message}", file=sys.stderr, flush=True)
        first, *rest = message.splitlines()
        lines.append(" ".join([f"left out in {dtype}: {first}", *rest[-1:]]))
    report["peer"] = "\n".join([*filter(None, [report["peer"]]), *lines]) or None


@contextlib.contextmanager
def model_folder(lm: pg.CausalLM, params: Any) -> Iterator[str]:
    """Write the model to a temporary folder for the peers, in Hugging Face layout."""
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
    measure: Callable[[str, str, Peaks, Mapping[str, Timing]], Row],
) -> Row:
    """Time our runs in turn with those of the peers that were found, dtype by dtype, between two measurements of the peaks.

    Args:
        config: of the benchmark.
        dtypes: of the arithmetic, one after the other.
        peers: to look for.
        lm: the model.
        params: of it; the peers read them from a folder.
        setups: (folder, dtype) -> the set-up of each peer; one without a set-up does not run.
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
