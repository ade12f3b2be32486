"""The files a run leaves behind: its config, its metrics (JSON Lines and TensorBoard), its samples."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pgjax.core.errors import UserError
from pgjax.parallel.encoding import plain
from pgjax.run import owner
from pgjax.run.checkpoint.records import other_fields, write_whole
from pgjax.run.packages import of_scripts
from pgjax.run.trackers import Trackers

CONFIG, METRICS, SAMPLES = "config.json", "metrics.jsonl", "samples.jsonl"


def open_run(
    folder: str | Path,
    config: Mapping[str, Any],
    *,
    resume: bool,
    may_change: Collection[str] = (),
    claim: Callable[[Path], Any] = lambda folder: None,
) -> Path:
    """Open a run folder: a fresh one for a new run, the old one to go on with a run.

    Args:
        folder: where the run writes all its files; made if it is not there.
        config: the fields of the run's config; values that JSON does not know are written as `str(value)`.
        resume: False starts a run, True goes on with the one that the folder holds.
        may_change: names of fields that may differ on resume (a longer run, another way to show it).
        claim: called with the folder, which is there, before anything is written in it.

    Returns:
        The folder, with `config.json` in it.

    Raises:
        ValueError: a new run in a folder that is not empty, a resume where there is no run, or a resume with
            another config (every differing field is named with both values).

    Example:
        >>> import tempfile
        >>> from pgjax.run.logs import open_run
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = open_run(folder, {"steps": 10}, resume=False)
        ...     (run / "config.json").exists()
        True
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the output {folder} is a file, not a folder: choose another one")
    path = folder / CONFIG
    if resume and not path.exists():
        raise UserError(f"there is no run to resume in {folder} (no {CONFIG}): a new run starts without resuming")
    left_over = (CONFIG + ".part", owner.FILE)  # of a run that was killed while it wrote its first file; who asks this
    if not resume and folder.exists() and any(not path.name.startswith(left_over) for path in folder.iterdir()):
        go_on = "resume to go on with the run in it, or " if path.exists() else ""
        raise UserError(f"the output folder {folder} is not empty: {go_on}choose another one")
    new = json.loads(json.dumps(dict(config), default=str))
    if resume:
        lines = other_fields(read_config(path), new, ("in the run", "now"), may_change)
        if lines:
            raise UserError(f"the run in {folder} was started with another config: " + "; ".join(lines))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"the output folder {folder} can't be made ({error}): choose another one") from error
    claim(folder)
    write_whole(path, json.dumps(new, indent=2) + "\n")
    return folder


def recorded(folder: str | Path, field: str) -> Any:
    """Read a field of the config that a run was started with.

    Args:
        folder: the run folder.
        field: its name.

    Returns:
        Its value; None where there is no run, or none with such a field.

    Raises:
        UserError: the file is damaged.

    Example:
        >>> recorded("a folder that is not there", "seed") is None
        True
    """
    path = Path(folder) / CONFIG
    return read_config(path).get(field) if path.exists() else None


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's config.

    Raises:
      UserError: the file is damaged.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: it holds no config")
    return config


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file; a last line cut short by a killed run is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(rows[-1], dict) or "step" not in rows[-1]:
            raise UserError(f"{path}, line {number} is no row: it has no step")
    return rows


def _dump(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


class Writer:
    """Append metrics and samples of a run to its files.

    Metrics go to `metrics.jsonl` (one JSON object a line, out of this process when `write` returns) and to TensorBoard
    event files in the same folder. JSON has no NaN and no infinity: such a value is written as null.

    Args:
        folder: the run folder.
        start_step: the first step that will be written; lines of this step and later ones, left by a run
            that was killed after its last checkpoint, are dropped so that no step stands there twice.
        active: False writes nothing at all: for the processes of a run that do not keep its logs.

    Attributes:
        also: trackers that get the metrics of each step as well, and are closed with the files.

    Example:
        >>> import tempfile
        >>> from pgjax.run.logs import Writer, read_metrics
        >>> with tempfile.TemporaryDirectory() as folder, Writer(folder) as writer:
        ...     writer.write(0, {"objective/scores": 0.5})
        ...     read_metrics(folder)
        [{'step': 0, 'objective/scores': 0.5}]
    """

    def __init__(self, folder: str | Path, *, start_step: int = 0, active: bool = True) -> None:
        self.folder, self.active = Path(folder), active
        self.also: Trackers | None = None
        if active:
            self._open(start_step)

    def _open(self, start_step: int) -> None:
        # Written here and now: SummaryWriter has a thread for that, and where that thread meets a full disk nobody hears of it
        # and the next write waits for ever.
        events = of_scripts("tensorboardX.event_file_writer")

        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, SAMPLES):
            rows = [row for row in read_lines(self.folder / name) if row["step"] < start_step]
            write_whole(self.folder / name, "".join(_dump(row) for row in rows))
        self._metrics = (self.folder / METRICS).open("a", encoding="utf-8")
        self._samples = (self.folder / SAMPLES).open("a", encoding="utf-8")
        # the suffix keeps a run that is resumed within the second off the first event file
        self._events = events.EventsWriter(str(self.folder / "events"), filename_suffix=f".{start_step}")
        if start_step > 0:  # TensorBoard then leaves out what older files say of later steps
            self._event(start_step, file_version="brain.Event:2")
            self._event(start_step, session_log={"status": 1})

    def _event(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(step=step, wall_time=time.time(), **what))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the metrics of a step.

        Args:
            step: the training step.
            metrics: scalars by name: Python, NumPy or JAX numbers.
        """
        if not self.active:
            return
        numbers = {name: float(value) for name, value in metrics.items()}
        row = {"step": int(step)} | {name: _finite(value) for name, value in numbers.items()}
        self._metrics.write(_dump(row))
        self._metrics.flush()
        for name, value in numbers.items():
            self._event(int(step), summary={"value": [{"tag": name, "simple_value": value}]})
        self._events.flush()
        if self.also is not None:
            self.also.write(int(step), numbers)

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append samples of a step to `samples.jsonl`, one a line.

        Args:
            step: the training step.
            rows: a prompt, a completion, a score, and what else the caller has of each sample: dates, decimals and others that
                JSON has not are written as text (`encoding.plain`), NaN and infinities as null.
        """
        if not self.active:
            return
        for row in rows:
            self._samples.write(_dump({"step": int(step)} | plain(row, finite=True)))
        self._samples.flush()

    def close(self) -> None:
        """Close the files."""
        if not self.active:
            return
        self._metrics.close()
        self._samples.close()
        self._events.close()
        if self.also is not None:
            self.also.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """Read the metrics of a run, oldest first.

    Args:
        folder: the run folder.

    Returns:
        One dict a line, with its `step`; a value that was NaN or infinite comes back as NaN. Empty when
        there are no metrics yet.

    Raises:
        ValueError: a line other than an unfinished last one is not JSON.

    Example:
        >>> from pgjax.run.logs import read_metrics
        >>> read_metrics("a folder that is not there")
        []
    """
    rows = read_lines(Path(folder) / METRICS)
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]
