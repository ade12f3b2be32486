"""Stages of a long experiment, each in its own folder: done once, skipped when complete, resumed when interrupted.

A stage is complete when `complete.json` lies in its folder. That file is written last; it holds the config of the
stage, what it was made from, its seconds and its metrics. A stage under way has `NAME.begun.json` beside its folder.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pgjax.core.errors import UserError
from pgjax.models.io.tensors import read_json
from pgjax.parallel import processes
from pgjax.run.checkpoint.records import other_fields, write_whole

COMPLETE = "complete.json"
RUN_CONFIG = "config.json"  # pgjax.run.logs.open_run writes it: a folder with it can be gone on with


@dataclasses.dataclass(frozen=True)
class Done:
    """A complete stage."""

    folder: Path
    id: str  # of this very execution; stages made from it name it
    seconds: float  # of work, over all its starts
    metrics: dict[str, Any]
    config: dict[str, Any]  # everything that decides it
    skipped: bool  # it was complete before


class Stage(NamedTuple):
    """What is to be done in one folder."""

    config: Mapping[str, Any]  # everything that decides the result, as in `run_stage`
    work: Callable[[Path, bool], Mapping[str, Any]]  # as in `run_stage`
    made_from: Sequence[str] = ()  # names of the stages whose output goes in


def run_stage(
    folder: Path,
    config: Mapping[str, Any],
    work: Callable[[Path, bool], Mapping[str, Any]],
    *,
    made_from: Sequence[Done] = (),
    redo: str = "give another folder",
) -> Done:
    """Do a stage, go on with it, or skip it. Of several processes the first alone reads and writes what says so.

    Args:
      folder: of this stage alone.
      config: everything that decides the stage's result, as JSON would hold it; paths only of the user's own files.
      work: (folder, resume) -> metrics; writes its files into the folder. With resume, the folder holds a run to go on with.
      made_from: the stages whose output goes in.
      redo: what the user can do where the stage at hand is not the one that is asked for.

    Returns:
      The stage.

    Raises:
      ValueError: the folder holds this stage made with another config or from another input.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as root:
      ...     folder = Path(root, "sums")
      ...     work = lambda folder, resume: print("adding") or {"sum": 3}
      ...     stages = [run_stage(folder, {"terms": [1, 2]}, work) for _ in range(2)]
      sums: starting
      adding
      sums: complete, skipped
      >>> stages[1].metrics, stages[1].skipped
      ({'sum': 3}, True)
    """
    new = {"config": _plain(config), "made_from": {stage.folder.name: stage.id for stage in made_from}}
    done, resume, spent = processes.on_process_0(lambda: _begin(folder, new, redo))
    if done is not None:
        processes.print_once(f"{folder.name}: complete, skipped")
        return Done(**done)
    processes.print_once(f"{folder.name}: {'going on' if resume else 'starting'}")
    start = time.perf_counter()
    try:
        metrics = dict(work(folder, resume))
    except BaseException:  # a stopped stage keeps count of its time, whatever stopped it
        if jax.process_index() == 0:
            write_json(_begun(folder), {**new, "seconds": spent + time.perf_counter() - start})
        raise
    seconds = spent + time.perf_counter() - start
    return Done(**processes.on_process_0(lambda: vars(_complete(folder, new, seconds, metrics))))


def run_stages(
    root: Path,
    stages: Mapping[str, Stage],
    *,
    redo_from: str | None = None,
    redo: Callable[[str], str] = lambda name: f"move {name} away to redo it",
) -> dict[str, Done]:
    """Do stages in order, each in the folder of its name; of several processes all call this alike.

    Args:
      root: the folder of all stages.
      stages: by name; one is made from stages before it.
      redo_from: the name of a stage: it and those after it are moved aside first (`move_aside`) and done again.
      redo: name -> what the user can do where the stage in the folder is not the one asked for.

    Returns:
      The stages by name.

    Raises:
      UserError: as in `run_stage`; then nothing after that stage has moved.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as root:
      ...     stages = {"a": Stage({}, lambda folder, resume: {"x": 1}), "b": Stage({}, lambda folder, resume: {}, ("a",))}
      ...     list(run_stages(Path(root), stages))
      a: starting
      b: starting
      ['a', 'b']
    """
    done: dict[str, Done] = {}
    names = list(stages)
    for name, stage in stages.items():
        if name == redo_from:  # not before: a stage in front of it may be refused, and then nothing has moved
            later = [root / other for other in names[names.index(name) :]]
            for moved in processes.on_process_0(functools.partial(_names_of_moved, later)):
                processes.print_once(f"moved the old stage to {moved}")
        inputs = [done[other] for other in stage.made_from]
        done[name] = run_stage(root / name, stage.config, stage.work, made_from=inputs, redo=redo(name))
    return done


def _begun(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.begun.json")


def _begin(folder: Path, new: Mapping[str, Any], redo: str) -> tuple[dict[str, Any] | None, bool, float]:
    """Find a complete stage; or make ready for one, and say whether to go on with what is there and what time it took."""
    old = _record(folder / COMPLETE)
    if old is not None:
        _refuse_other(f"the complete stage {folder}", old, new, redo)
        done = Done(folder, old["id"], old["seconds"], old["metrics"], old["config"], skipped=True)
        return vars(done), False, 0.0
    old = _record(_begun(folder))
    resume = old is not None and (folder / RUN_CONFIG).exists()
    if resume and old is not None:  # of one that has not come that far nothing is kept, so it may be another
        _refuse_other(f"the unfinished stage {folder}", old, new, redo)
    if not resume:
        _clear(folder)
    spent = old["seconds"] if resume and old is not None else 0.0
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(_begun(folder), {**new, "seconds": spent})
    return None, resume, spent


def _complete(folder: Path, new: Mapping[str, Any], seconds: float, metrics: Mapping[str, Any]) -> Done:
    done = Done(folder, uuid.uuid4().hex, seconds, _plain(metrics), new["config"], skipped=False)
    folder.mkdir(exist_ok=True)
    write_json(folder / COMPLETE, {**new, "id": done.id, "seconds": done.seconds, "metrics": done.metrics})
    _begun(folder).unlink()
    return done


def finished(folder: Path) -> Done | None:
    """Read a complete stage; None where it is not complete.

    Args:
      folder: of the stage.

    Returns:
      The stage.

    Example:
      >>> finished(Path("a folder that is not there")) is None
      True
    """
    old = _record(folder / COMPLETE)
    return None if old is None else Done(folder, old["id"], old["seconds"], old["metrics"], old["config"], skipped=True)


def move_aside(folders: Sequence[Path]) -> list[Path]:
    """Move folders, where there are any, to NAME.1, NAME.2, ...: the same number for all, the first that is free.

    Args:
      folders: of stages; their `NAME.begun.json` go along.

    Returns:
      The new places.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as root:
      ...     Path(root, "ppo").mkdir()
      ...     [path.name for path in move_aside([Path(root, "ppo"), Path(root, "never-there")])]
      ['ppo.1']
    """
    moved = []
    there = [folder for folder in folders if folder.exists()]
    taken = lambda number: any(folder.with_name(f"{folder.name}.{number}").exists() for folder in folders)
    number = next(number for number in itertools.count(1) if not taken(number))
    for folder in folders:
        _begun(folder).unlink(missing_ok=True)
    for folder in there:
        moved.append(folder.rename(folder.with_name(f"{folder.name}.{number}")))
    return moved


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all.

    Args:
      path: the file.
      value: what it is to hold.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as root:
      ...     write_json(Path(root, "x.json"), {"a": 1})
      ...     json.loads(Path(root, "x.json").read_text())
      {'a': 1}
    """
    write_whole(path, json.dumps(value, indent=1) + "\n")


def _names_of_moved(folders: Sequence[Path]) -> list[str]:
    return [str(path) for path in move_aside(folders)]


def _record(path: Path) -> dict[str, Any] | None:
    """Read what a stage has written of itself; None where there is nothing."""
    return read_json(path) if path.exists() else None


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(value), default=str))


def _refuse_other(stage: str, old: Mapping[str, Any], new: Mapping[str, Any], redo: str) -> None:
    other = other_fields(old["config"], new["config"], ("there", "asked for"))
    stale = [name for name, made in new["made_from"].items() if old["made_from"].get(name) != made]
    other += [f"it was made from another {name} than the one that is there now" for name in stale]
    if other:
        raise UserError(f"{stage} is not the one asked for ({'; '.join(other)}): {redo}")


def _clear(folder: Path) -> None:
    """Make room for a stage that starts over; what an unfinished one left is of no use, anything else is not ours."""
    if not folder.exists():
        return
    unfinished = _begun(folder).exists()
    if folder.is_dir() and unfinished:
        shutil.rmtree(folder)
    elif not folder.is_dir() or any(folder.iterdir()):
        raise UserError(
            f"{folder} is in the way, and no stage of this experiment left it: move it or give another folder"
        )
