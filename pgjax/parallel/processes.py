"""Several processes as one: how they meet, how they agree, and how they all stop where one of them fails.

All but `leave_soon` are collective: all processes call the same ones in the same order. With one process none
costs anything.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from pgjax.core.errors import UserError
from pgjax.parallel import failures
from pgjax.parallel.rendezvous import detected, meet

T = TypeVar("T")

_DETECTED = (
    "address and numbers that were not given are those of the TPU pod, SLURM or Open MPI; coordinator, or "
    "JAX_COORDINATOR_ADDRESS, names another address"
)
_SETTINGS = (  # of jax, on which numbers depend
    "jax_enable_x64", "jax_threefry_partitionable", "jax_default_prng_impl", "jax_default_matmul_precision",
)  # fmt: skip
_SMALLEST = 256  # bytes of the smallest exchange; larger ones are powers of 4 of it, so that few programs are compiled


class FailedElsewhere(Exception):
    """Another process failed, so this one stops with it."""


def initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, timeout: float = 60.0
) -> None:
    """Join the processes of a run by `jax.distributed.initialize`, before anything is computed; a second call does nothing.

    What is not given comes from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and what is missing still from
    the TPU pod, SLURM or Open MPI, as jax reads them. Then the processes meet at the coordinator's port first and compare
    their counts.

    Args:
      coordinator: host:port of process 0; the port must be free there.
      processes: how many they are.
      process: the number of this one, from 0.
      timeout: seconds that they wait for each other.

    Raises:
      ValueError: an argument that cannot be meant, a coordinator that cannot be reached in time, processes that do not come,
        or that disagree about how many they are; the same on every process that can be told.

    Example:
      >>> initialize("localhost:1", 2, 2)
      Traceback (most recent call last):
      pgjax.UserError: process 2 of 2: there is at least 1, and they are counted from 0
    """
    if jax.distributed.is_initialized():
        return
    if not 0 < timeout < math.inf:
        raise UserError(f"the processes need some seconds to meet, got {timeout}")
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _from_environment("JAX_NUM_PROCESSES") if processes is None else processes
    process = _from_environment("JAX_PROCESS_ID") if process is None else process
    given = coordinator, processes, process
    with _plain_words():
        coordinator, processes, process = detected(*given, timeout)
    if coordinator is not None and processes is not None and process is not None:
        try:
            meet(coordinator, processes, process, timeout)
        except ValueError as error:
            if None not in given:
                raise
            raise UserError(f"{error} ({_DETECTED})") from error
    with _plain_words():
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=math.ceil(timeout))
    if threading.current_thread() is threading.main_thread():  # jax took SIGTERM to itself, and would swallow it
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    failures.watch()
    # Now, while all are here: gloo gives the first exchange of a group 30 seconds, and any later one as long as it takes
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:  # told before any exchange, which would fail on it
        told = ", ".join(f"{count} on process {number}" for number, count in sorted(counts.items()))
        raise UserError(f"the processes must have equally many devices, but there are {told}")
    settings = {name: jax.config.values[name] for name in _SETTINGS}
    agree("the installation", {"processes": jax.process_count(), "jax": jax.__version__, **settings})


def gather(value: T) -> list[T]:
    """Exchange a small value of the host: what each process holds, in the order of the processes.

    Args:
      value: anything that `pickle` takes.

    Returns:
      One value a process; the same list on all.

    Example:
      >>> gather({"scores": [0.5]})
      [{'scores': [0.5]}]
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([data.size], np.int32), tiled=True)
    room = _SMALLEST
    while room < sizes.max():
        room *= 4
    rows = multihost_utils.process_allgather(np.pad(data, (0, room - data.size)))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def any_process(flag: bool) -> bool:
    """Say whether the flag is up on any process; the same answer on all.

    Example:
      >>> any_process(False)
      False
    """
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array([flag], np.int32), tiled=True).any())


def agree(what: str, value: Any) -> None:
    """Check that all processes hold the same value.

    Args:
      what: its name.
      value: compared by `==`; of a mapping, the differing keys are named.

    Raises:
      ValueError: on all processes, with what differs and on which of them.

    Example:
      >>> agree("the steps", 3)
    """
    values = gather(value)
    for process, other in enumerate(values):
        if other != values[0]:
            told = _difference(values[0], other, process)
            raise UserError(f"{what}: not the same on all processes ({told}); give all the same")


def all_or_none(work: Callable[[], T]) -> T:
    """Do work of the host that may fail on one process, and fail on all where it does.

    Args:
      work: each process does its own.

    Returns:
      What it returned here.

    Raises:
      FailedElsewhere: where another process failed and this one did not; it names the process and its error.
      Exception: what `work` raised here.

    Example:
      >>> all_or_none(lambda: 1 + 1)
      2
    """
    results: list[T] = []
    gather_results(lambda: results.append(work()))
    return results[0]


def gather_results(work: Callable[[], T]) -> list[T]:
    """Do work of the host as `all_or_none` does, and give every process the results of all.

    Args:
      work: returns a small value; each process does its own.

    Returns:
      One value a process; the same list on all.

    Raises:
      FailedElsewhere: as in `all_or_none`.
      Exception: what `work` raised here.

    Example:
      >>> gather_results(lambda: 1 + 1)
      [2]
    """
    if jax.process_count() == 1:
        return [work()]
    failure: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as error:
        failure = error
    outcomes = gather((None if failure is None else f"{type(failure).__name__}: {failure}", result))
    if failure is not None:
        raise failure
    for process, (message, _) in enumerate(outcomes):
        if message is not None:
            raise FailedElsewhere(f"process {process} failed, so all stop: {message}")
    return [value for _, value in outcomes]


def on_process_0(work: Callable[[], T]) -> T:
    """Do work of the host on process 0 alone, such as writing a file, and give all its result or its failure.

    Args:
      work: returns a small value.

    Returns:
      What it returned on process 0.

    Raises:
      ValueError: where it raised one on process 0: the same on all.
      FailedElsewhere: on the other processes, where it raised anything else on process 0.

    Example:
      >>> on_process_0(lambda: "the run's folder")
      "the run's folder"
    """

    def on_the_first() -> tuple[T | None, str | None]:
        if jax.process_index() != 0:
            return None, None
        try:
            return work(), None
        except ValueError as error:
            return None, str(error)

    result, refused = gather_results(on_the_first)[0]
    if refused is not None:
        raise UserError(refused)
    return result  # type: ignore[return-value]


def fetch(tree: Any) -> Any:
    """Bring arrays to the host whole, those too that lie on devices of other processes.

    Args:
      tree: of arrays; small ones, since every process gets all of them.

    Returns:
      The same tree of NumPy arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> fetch({"x": jnp.arange(3)})
      {'x': array([0, 1, 2], dtype=int32)}
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def leave_soon(error: BaseException, seconds: float = 20.0) -> None:
    """Tell the other processes of a failure, and end this one for sure a while from now.

    On its way out jax waits minutes for processes that themselves wait for this one. With one process nothing happens.

    Args:
      error: what failed; this process says so itself.
      seconds: time to do that, and for the others to leave as well.

    Example:
      >>> leave_soon(ValueError("no such prompt"))
    """
    failures.tell(error)
    if jax.distributed.is_initialized():
        timer = threading.Timer(seconds, os._exit, (1,))
        timer.daemon = True
        timer.start()


@contextlib.contextmanager
def _plain_words() -> Iterator[None]:
    """Say what jax found amiss in the way that the user can mend it."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, IndexError, OSError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"the processes could not join: {why}. Where no TPU pod, SLURM or Open MPI tells them, give coordinator "
            "(host:port), number of processes and number of this process"
        ) from error


def _from_environment(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} in the environment is not a number")
    return int(text)


def _difference(mine: Any, other: Any, process: int) -> str:
    if isinstance(mine, Mapping) and isinstance(other, Mapping):
        names = [name for name in {**mine, **other} if mine.get(name) != other.get(name)]
        return "; ".join(
            f"{name} is {mine.get(name)!r} on process 0, {other.get(name)!r} on process {process}" for name in names
        )
    return f"{mine!r} on process 0, {other!r} on process {process}"
