"""The peer's side of `benchmarks.worker`: one line of JSON in, one out. It needs the standard library alone."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any


class Parent:
    """The process that requests runs. What libraries print goes to standard error."""

    def __init__(self) -> None:
        """Keep standard output for the answers, and read the set-up."""
        sys.stdout.flush()
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.setup: dict[str, Any] = self.next()
        self._cpu = self._start = 0.0

    def next(self) -> dict[str, Any]:
        """Wait for the next line; at the end of the input this process ends at once."""
        line = sys.stdin.readline()
        if not line:
            sys.stderr.flush()
            os._exit(0)
        return json.loads(line)

    def ready(self, *packages: str) -> None:
        """Answer that everything is loaded, and with which versions."""
        self._tell(
            {"ready": True, "versions": {"python": platform.python_version()} | {x: version(x) for x in packages}}
        )

    def start(self) -> None:
        """Start the clocks of a run."""
        self._cpu, self._start = time.process_time(), time.perf_counter()

    def stop(self, result: Mapping[str, float]) -> None:
        """Stop the clocks, and answer with the seconds and the run's result."""
        wall = time.perf_counter() - self._start
        self._tell({"wall": wall, "cpu": time.process_time() - self._cpu, **result})

    def serve(self, run: Callable[..., Mapping[str, float]]) -> None:
        """Do the work once for every line, its fields as arguments, until the input ends."""
        while True:
            arguments = self.next()
            self.start()
            self.stop(run(**arguments))

    def _tell(self, line: Mapping[str, Any]) -> None:
        self._answers.write(json.dumps(line) + "\n")
        self._answers.flush()
