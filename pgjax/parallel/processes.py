"""Several processes as one: how they join, exchange small values and agree, and how an error on one stops them all.

What exchanges anything is collective: all processes call the same functions in the same order. With one process none costs
anything, and errors pass through untouched.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from pgjax.core.errors import UserError
from pgjax.parallel.encoding import decode, encode

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

_SETTINGS = (  # of jax, on which numbers depend
    "jax_enable_x64", "jax_threefry_partitionable", "jax_default_prng_impl", "jax_default_matmul_precision",
)  # fmt: skip
_SMALLEST = 256  # bytes of the smallest exchange; larger ones are powers of 4 of it, so that few programs are compiled
_LOST = (
    60  # seconds without a sign of life after which jax ends all processes, and that those that end wait for the others
)
_RAISED_ON_ALL = "raised on all processes"  # a note on such an error


class FailedElsewhere(Exception):
    """Another process failed, so this one stops with it."""


def initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, timeout: float = 60.0
) -> None:
    """Join the processes of a run by `jax.distributed.initialize`, before anything is computed; a second call does nothing.

    What is not given comes from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and what is missing still from
    the TPU pod, SLURM or Open MPI, as jax reads them. A process that dies ends the others within a minute, by jax's heartbeats.
    A process that ends waits up to a minute for the others to end as well.

    Args:
      coordinator: host:port of process 0; the port must be free there.
      processes: how many there are.
      process: the number of this one, from 0.
      timeout: seconds that they wait for each other; jax ends a process that waits in vain.

    Raises:
      UserError: an address or a number that is missing or cannot be, or processes with other settings or numbers of devices.

    Example:
      >>> initialize("localhost:1", 2, 2)
      Traceback (most recent call last):
      pgjax.UserError: process 2 of 2: there is at least 1, and they are counted from 0
    """
    if jax.distributed.is_initialized():
        return
    if not 0 < timeout < math.inf:
        raise UserError(f"the processes need some seconds to join, got {timeout}")
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _from_environment("JAX_NUM_PROCESSES") if processes is None else processes
    process = _from_environment("JAX_PROCESS_ID") if process is None else process
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"the coordinator is host:port, such as 10.0.0.1:8476, got {coordinator!r}")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(f"process {process} of {processes}: there is at least 1, and they are counted from 0")
    with _join_errors():
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=math.ceil(timeout),
            heartbeat_timeout_seconds=_LOST,
            shutdown_timeout_seconds=_LOST,
        )
    if threading.current_thread() is threading.main_thread():  # jax took SIGTERM to itself, and would swallow it
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:  # before any exchange, which would fail on it
        devices = ", ".join(f"{count} on process {number}" for number, count in sorted(counts.items()))
        raise raised_on_all(UserError(f"the processes must have equally many devices, but there are {devices}"))
    # Now, while all are here: gloo gives the first exchange of a group 30 seconds, and any later one as long as it takes
    settings = {name: jax.config.values[name] for name in _SETTINGS}
    agree("the installation", {"processes": jax.process_count(), "jax": jax.__version__, **settings})


def is_process_0() -> bool:
    """Say whether this is the process that prints and writes files.

    Example:
      >>> is_process_0()
      True
    """
    # jax is asked for the number only where there are several: the question would start its backend, too early to join
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def print_once(*values: Any) -> None:
    """Print on process 0 alone.

    Example:
      >>> print_once("step", 3)
      step 3
    """
    if is_process_0():
        print(*values, flush=True)


def gather(value: T) -> list[T]:
    """Exchange a small value of the host: what each process holds, in the order of the processes.

    Args:
      value: what JSON holds, NumPy arrays and paths; with several processes tuples come back as lists.

    Returns:
      One value a process; the same list on all.

    Example:
      >>> gather({"scores": [0.5]})
      [{'scores': [0.5]}]
    """
    return [value] if jax.process_count() == 1 else [decode(text) for text in _gather_bytes(encode(value))]


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
      value: as for `gather`, compared by `==`; of a mapping, the differing keys are named.

    Raises:
      UserError: on all processes, with what differs and on which of them.

    Example:
      >>> agree("the steps", 3)
    """
    values = gather(value)
    for process, other in enumerate(values):
        if other != values[0]:
            found = _difference(values[0], other, process)
            raise raised_on_all(UserError(f"{what}: not the same on all processes ({found}); give all the same"))


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
      work: returns a small value, as for `gather`; each process does its own.

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
    outcome = b""
    try:
        outcome = encode([None, work()])
    except Exception as error:
        failure = error
        outcome = encode([f"{type(error).__name__}: {error}", None])
    outcomes = [decode(text) for text in _gather_bytes(outcome)]
    if failure is not None:
        raise raised_on_all(failure)
    for process, (message, _) in enumerate(outcomes):
        if message is not None:
            raise raised_on_all(FailedElsewhere(f"process {process} failed, so all stop: {message}"))
    return [result for _, result in outcomes]


def on_process_0(work: Callable[[], T]) -> T:
    """Do work of the host on process 0 alone, such as writing a file, and give all its result or its failure.

    Args:
      work: returns a small value, as for `gather`.

    Returns:
      What it returned on process 0.

    Raises:
      UserError: on the other processes, where it raised one on process 0: with the same words.
      FailedElsewhere: on the other processes, where it raised anything else on process 0.
      Exception: on process 0, what `work` raised.

    Example:
      >>> on_process_0(lambda: "the run's folder")
      "the run's folder"
    """
    if jax.process_count() == 1:
        return work()
    refusal: UserError | None = None

    def here() -> list[Any]:
        nonlocal refusal
        try:
            return [work() if is_process_0() else None, None]
        except UserError as error:
            refusal = error
            return [None, str(error)]

    result, words = gather_results(here)[0]
    if words is not None:
        raise raised_on_all(refusal or UserError(words))
    return result


def raised_on_all(error: E) -> E:
    """Note on an error that all processes raise it, or another one for the same cause, at this very place.

    So they can still do things together before they end, such as saving; see `is_raised_on_all`.

    Args:
      error: about to be raised.

    Returns:
      The error.

    Example:
      >>> raise raised_on_all(UserError("no such prompt"))
      Traceback (most recent call last):
      pgjax.UserError: no such prompt
    """
    if jax.process_count() > 1 and not is_raised_on_all(error):
        error.add_note(_RAISED_ON_ALL)
    return error


def is_raised_on_all(error: BaseException) -> bool:
    """Say whether all processes have raised an error together; with one process every error is such a one.

    Example:
      >>> is_raised_on_all(ValueError("no such prompt"))
      True
    """
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    return not several or _RAISED_ON_ALL in getattr(error, "__notes__", ())


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


def _gather_bytes(data: bytes) -> list[bytes]:
    mine = np.frombuffer(data, np.uint8)
    sizes = multihost_utils.process_allgather(np.array([mine.size], np.int32), tiled=True)
    room = _SMALLEST
    while room < sizes.max():
        room *= 4
    rows = multihost_utils.process_allgather(np.pad(mine, (0, room - mine.size)))
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def _join_errors() -> Iterator[None]:
    """Add to jax's error what the user can give."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, OSError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"the processes cannot join: {why}. Where no TPU pod, SLURM or Open MPI tells them, give coordinator "
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
