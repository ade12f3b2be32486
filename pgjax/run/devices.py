"""Where a script runs: on one device, on a mesh of them, in several processes. The flags for it, and the way in and out.

    python -m experiments.ppo                                       # one device
    python -m experiments.ppo --mesh data=4,fsdp=2                  # eight devices of this machine
    python -m experiments.ppo --mesh fsdp=-1 --distributed          # all devices of a TPU pod, or of a SLURM job
    python -m experiments.ppo --distributed --coordinator 10.0.0.1:8476 --num-processes 2 --process-id 0     # and 1, there

With several processes each runs the same command. All read the same files; of each batch a process feeds the rows that its
own devices hold, and runs the rewards on a part of them (parallel/batch_rows.py). Process 0 alone prints what the library has to
say, and writes the run's logs; what a reward prints, each process prints.

Compiled programs are kept in a folder of the user's, for the next run: --compilation-cache names another, or None for none. Where
JAX_COMPILATION_CACHE_DIR is set it is that one. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from pgjax.core.errors import UserError
from pgjax.parallel import batch_rows, processes, sharding
from pgjax.run.checkpoint.resume import rows_digest


def users_cache() -> Path:
    """Say where compiled programs are kept unless told: in pgjax/xla under XDG_CACHE_HOME, or else under ~/.cache.

    Example:
      >>> users_cache().name
      'xla'
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pgjax" / "xla"


USERS_CACHE = users_cache()


@dataclasses.dataclass(frozen=True)
class Flags:
    """Where to run; what is computed does not depend on it."""

    mesh: str | None = None  # sizes of data, fsdp, tensor, as data=4,fsdp=-1; None: one device; distributed: data=-1
    distributed: bool = False  # this is one of several processes, which all run this command
    coordinator: str | None = None  # host:port of process 0; None: of TPU pod, SLURM, JAX_COORDINATOR_ADDRESS
    num_processes: int | None = None  # how many processes; None: likewise, or JAX_NUM_PROCESSES
    process_id: int | None = None  # which one this is, from 0; None: likewise, or JAX_PROCESS_ID
    init_timeout: float = 60.0  # seconds that the processes wait for each other at the start
    remat: bool = False  # compute each layer again in the backward pass: less memory, up to a third more time
    compilation_cache: Path | None = USERS_CACHE  # keeps compiled programs for later runs; None: none are kept


MACHINE = tuple(field.name for field in dataclasses.fields(Flags))  # what a run may change when it goes on
_PER_PROCESS = {"coordinator", "process_id", "init_timeout", "compilation_cache"}  # what may differ between processes


@contextlib.contextmanager
def on_devices(config: Flags) -> Iterator[Mesh | None]:
    """Join the other processes, build the mesh and enter it.

    Args:
      config: a script's, the same on every process.

    Yields:
      The mesh; None for one device.

    Raises:
      ValueError: flags that do not go together, processes that do not meet or have other configs, or a mesh that does not fit
        the devices.

    Example:
      >>> with on_devices(Flags(mesh="data=-1")) as mesh:
      ...     print(mesh.axis_names)
      ('data',)
    """
    mesh = start(config)
    if mesh is None:
        _tell_idle(jax.device_count())
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield mesh


def start(config: Flags) -> Mesh | None:
    """Join the other processes and build the mesh.

    Args:
      config: a script's.

    Returns:
      The mesh; None for one device.

    Raises:
      ValueError: as in `on_devices`.

    Example:
      >>> start(Flags(process_id=1))
      Traceback (most recent call last):
      pgjax.UserError: process_id=1 is for several processes: it needs distributed=True
    """
    sizes = None if config.mesh is None else sharding.parse_mesh(config.mesh)
    if config.distributed:
        processes.initialize(config.coordinator, config.num_processes, config.process_id, timeout=config.init_timeout)
        fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in _PER_PROCESS}
        processes.agree("the config", json.loads(json.dumps(fields, default=str)))
        sizes = sizes or {"data": -1}
    else:
        for name in ("coordinator", "num_processes", "process_id"):
            if vars(config)[name] is not None:
                raise UserError(f"{name}={vars(config)[name]} is for several processes: it needs distributed=True")
    keep_programs(config.compilation_cache)
    return None if sizes is None else sharding.make_mesh(devices=jax.devices(), **sizes)


def keep_programs(folder: Path | None) -> None:
    """Keep what jax compiles in a folder for later processes, and take from it what earlier ones compiled.

    A program is found by everything it was compiled from, so no result depends on it. Where jax has a folder already, that one
    stays. Several processes use the folder of process 0, which alone writes: were it not to be seen by all, those that compile
    would wait for it to do its part, as they do on GPUs. Such a folder, and one that cannot be written, is a warning.

    Args:
      folder: made if it is not there; None: nothing is kept.

    Example:
      >>> keep_programs(None)
    """
    wanted = folder is not None and jax.config.values["jax_compilation_cache_dir"] is None
    if processes.any_process(not wanted):
        return
    assert folder is not None
    kept, wrong, seen = _seen_by_all(folder)
    if kept is not None and not seen:
        wrong = f"not all processes see {kept}; choose a folder that they share"
    if wrong is not None and processes.is_process_0():
        print(f"warning: compiled programs are not kept: {wrong}", file=sys.stderr)
    if kept is not None and seen:
        jax.config.update("jax_compilation_cache_dir", kept)
        # jax itself keeps only what takes a second; a run compiles dozens of smaller programs
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def check_batch_divides(mesh: Mesh | None, batch_size: int, *, group_size: int = 1, **parts: int) -> None:
    """Refuse a batch that the devices cannot share evenly, whole and in the parts that are learned from.

    Args:
      mesh: or None for one device.
      batch_size: its rows.
      group_size: so many adjacent rows have one prompt, and are judged by one process.
      parts: into how many it is split, by what the user calls them; they divide it.

    Raises:
      UserError: with the numbers.

    Example:
      >>> check_batch_divides(None, 6, minibatches=2, microbatches=3)
    """
    sharding.check_batch(mesh, batch_size, "batch_size")
    batch_rows.rows_to_judge(mesh, batch_size, group_size)
    quotient = " / ".join(f"{name}={count}" for name, count in {"batch_size": batch_size, **parts}.items())
    sharding.check_batch(mesh, batch_size // math.prod(parts.values()), quotient)


def agree_on(what: str, value: Any) -> None:
    """Check that all processes have read the same.

    Args:
      what: it is.
      value: as `rows_digest` takes it.

    Raises:
      ValueError: on all processes, where they have not.

    Example:
      >>> agree_on("the rows", [{"prompt": "a"}])
    """
    if jax.process_count() > 1:
        processes.agree(what, {"its digest": rows_digest(value)})


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """Put host values whole on every device.

    Args:
      mesh: None: on the default device.
      tree: of host arrays and numbers, the same on every process.

    Returns:
      The same tree on the devices.

    Example:
      >>> import numpy as np
      >>> replicate(None, np.arange(2)).tolist()
      [0, 1]
    """
    return sharding.place(tree, sharding.replicated(mesh))


def shared_folder(folder: Path) -> Path:
    """Say where the processes write and read together: the folder as process 0 has it, which all must see.

    Args:
      folder: it need not be there.

    Returns:
      Its absolute path on process 0; with one process what was given.

    Raises:
      ValueError: on all processes, where one of them does not see what process 0 writes beside it.

    Example:
      >>> shared_folder(Path("runs/ppo")).as_posix()
      'runs/ppo'
    """
    if jax.process_count() == 1:
        return folder
    path = Path(processes.on_process_0(lambda: str(folder.absolute())))
    made, wrong, seen = _seen_by_all(path.parent)
    if made is None:
        unwritable = f"no file can be made in {path.parent} ({wrong}): choose another output folder"
        raise processes.raised_on_all(UserError(unwritable))
    if not seen:
        unseen = f"not all processes see {path.parent}: choose an output folder on a disk that they share"
        raise processes.raised_on_all(UserError(unseen))
    return path


def _seen_by_all(folder: Path) -> tuple[str | None, str | None, bool]:
    """Make a folder on process 0, unless it is there: its path, or why it takes no file; and whether all processes see it."""
    mark, wrong = processes.on_process_0(lambda: _mark(folder))
    if mark is None:
        return None, wrong, False
    seen = not processes.any_process(not _appears(Path(mark)))
    if processes.is_process_0():
        os.remove(mark)
    return str(Path(mark).parent), None, seen


def _appears(path: Path) -> bool:
    """Wait some seconds for a file: between hosts it may take that long."""
    end = time.monotonic() + 10
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _mark(folder: Path) -> tuple[str | None, str | None]:
    """Leave an empty file in a folder: its path, or why that cannot be."""
    try:
        folder = folder.expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=folder, prefix="seen-by-all-")
        os.close(handle)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home
        return None, str(error)
    return path, None


@functools.cache  # once is enough
def _tell_idle(devices: int) -> None:
    if devices > 1:
        processes.print_once(f"one of {devices} devices is used: a mesh of data=-1 or fsdp=-1 uses all of them")
