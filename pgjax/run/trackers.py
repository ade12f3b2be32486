"""Trackers of experiments beside a run's own files: Weights & Biases and Trackio, under the same names of metrics."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pgjax.core.errors import MissingPackageError
from pgjax.run.checkpoint.records import write_whole

Tracker = Literal["wandb", "trackio"]
FILE = "tracked.json"  # in the run folder: the id under which the trackers know the run


class Tracked(NamedTuple):
    """A run that a tracker has open."""

    log: Callable[[int, dict[str, float]], Any]  # step, finite metrics
    finish: Callable[[], Any]


def check_trackers(names: Collection[str]) -> None:
    """Refuse trackers whose packages are not installed, before anything is computed.

    Args:
        names: of the trackers.

    Raises:
        MissingPackageError: one is not installed.

    Example:
        >>> check_trackers([])
        >>> check_trackers(["no_such_tracker"])
        Traceback (most recent call last):
        pgjax.MissingPackageError: tracking needs no_such_tracker: pip install 'pgjax[trackers]'
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, such as wandb leaves, is no package
            raise MissingPackageError(f"tracking needs {name}: pip install 'pgjax[trackers]'")


def open_wandb(project: str, run: str, folder: Path, config: dict[str, Any]) -> Tracked:
    """Open a run of Weights & Biases; its files are in the run folder. WANDB_MODE=offline keeps it off the network.

    A step that it has already, as of a run that goes on from an earlier snapshot, it leaves as it is.
    """
    import wandb

    opened = wandb.init(
        project=project, id=run, name=run, dir=str(folder), config=config, resume="allow",
        settings=wandb.Settings(console="off", silent=True),
    )  # fmt: skip
    return Tracked(lambda step, metrics: opened.log(metrics, step=step), opened.finish)


def open_trackio(project: str, run: str, folder: Path, config: dict[str, Any]) -> Tracked:
    """Open a run of Trackio, which keeps it on this machine in the folder that TRACKIO_DIR names, or sends it to a space.

    Steps that a killed run had sent after its last snapshot stand there twice when it has gone on.
    """
    import trackio

    opened = trackio.init(
        project=project, name=run, config=config, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
    )
    return Tracked(lambda step, metrics: opened.log(metrics, step=step), opened.finish)


OPEN: dict[str, Callable[[str, str, Path, dict[str, Any]], Tracked]] = {"wandb": open_wandb, "trackio": open_trackio}


class Trackers:
    """Send metrics to trackers. What fails there, such as a network, is said once and counted; it never ends a run.

    Args:
        names: of the trackers, of `OPEN`.
        project: under which they file the run.
        folder: of the run; `tracked.json` in it holds the run's id, under which a run that goes on is appended to.
        config: the fields of the run's config.

    Example:
        >>> trackers = Trackers([], project="haiku", folder="runs/haiku", config={})
        >>> trackers.write(1, {"objective/scores": 0.5})
        >>> trackers.close()
    """

    def __init__(self, names: Collection[str], *, project: str, folder: str | Path, config: Mapping[str, Any]) -> None:
        self.failures: dict[str, int] = {}  # how often each failed
        self._opened: dict[str, Tracked] = {}
        if not names:
            return
        run, fields = run_id(Path(folder)), json.loads(json.dumps(dict(config), default=str))
        for name in dict.fromkeys(names):
            opened = self._try(name, functools.partial(OPEN[name], project, run, Path(folder), fields))
            if opened is not None:
                self._opened[name] = opened

    def _try(self, name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # of any kind: these packages talk to services
            if name not in self.failures:
                print(
                    f"warning: {name} failed, the run goes on without it: {type(error).__name__}: {error}", flush=True
                )
            self.failures[name] = self.failures.get(name, 0) + 1

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step; those that are not finite are left out, as services refuse them.

        Args:
            step: the training step.
            metrics: numbers by name.
        """
        for name, tracked in self._opened.items():
            finite = {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
            self._try(name, functools.partial(tracked.log, int(step), finite))

    def close(self) -> None:
        """Finish the tracked runs, and say how often each tracker failed."""
        for name, tracked in self._opened.items():
            self._try(name, tracked.finish)
        for name, count in self.failures.items():
            print(f"warning: {name} failed {count} times; metrics.jsonl holds all metrics", flush=True)
        self._opened = {}


def run_id(folder: Path) -> str:
    """Give the id under which trackers know the run in a folder: the folder's name and eight digits, made once.

    Args:
        folder: of the run.

    Returns:
        The id; another run in a folder of the same name has another.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run_id(Path(folder)) == run_id(Path(folder))
        True
    """
    path = folder / FILE
    if path.exists():
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["id"])
        except (ValueError, KeyError, TypeError):
            print(f"warning: {path} is damaged: trackers get a new run", flush=True)
    allowed = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in folder.resolve().name)
    made = f"{allowed[:80]}-{uuid.uuid4().hex[:8]}"
    write_whole(path, json.dumps({"id": made}) + "\n")
    return made
