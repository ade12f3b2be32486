"""Where the processes of a run meet before jax joins them, so that what is amiss is said in a line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from typing import Any

from pgjax.core.errors import UserError

_BEYOND = "process {} of {}: there is at least 1, and they are counted from 0"
_GRACE = 3.0  # seconds in which the coordinator still hears the others out once two processes disagree
_KNOCKING = 1.0  # seconds in which a coordinator is looked for by a process that fails in any case


def detected(
    coordinator: str | None, processes: int | None, process: int | None, timeout: float
) -> tuple[str | None, int | None, int | None]:
    """Fill in what is not given from a TPU pod, SLURM or Open MPI, as `jax.distributed.initialize` itself would.

    Args:
      coordinator: host:port of process 0, or None.
      processes: how many they are, or None.
      process: the number of this one, or None.
      timeout: seconds that a TPU pod has for its first host to be known.

    Returns:
      The three; None is left where nothing tells.

    Example:
      >>> detected("10.0.0.1:8476", 2, 1, 1.0)
      ('10.0.0.1:8476', 2, 1)
    """
    if coordinator is not None and processes is not None and process is not None:
        return coordinator, processes, process
    from jax._src.clusters import ClusterEnv  # there is no public name for it

    return ClusterEnv.auto_detect_unset_distributed_params(
        coordinator, processes, process, None, None, math.ceil(timeout)
    )[:3]


def meet(coordinator: str, processes: int, process: int, timeout: float) -> None:
    """Wait for the other processes at the coordinator's port, and compare their counts.

    Process 0 listens there until all have come, and tells them the verdict; the port is free again afterwards. (Where jax
    itself waits for a process in vain, it ends this one with a stack trace of C++.)

    Args:
      coordinator: host:port of process 0. There, JAX_COORDINATOR_BIND_ADDRESS may name another port to listen at.
      processes: how many they are.
      process: the number of this one, from 0.
      timeout: seconds.

    Raises:
      ValueError: an argument that cannot be meant, a coordinator that cannot be reached in time, processes that do not come,
        or that disagree about how many they are; the same on every process that can be told.

    Example:
      >>> meet("localhost:8476", 2, 2, 1.0)
      Traceback (most recent call last):
      pgjax.UserError: process 2 of 2: there is at least 1, and they are counted from 0
    """
    host, port = _address(coordinator)
    if processes < 1 or not 0 <= process < processes:
        told = _told_there(host, port, processes, process)  # so that the others hear of it
        raise UserError(told or _BEYOND.format(process, processes))
    if process > 0:
        problem = _visit(host, port, processes, process, timeout)
    else:
        _, port = _address(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator))
        problem = _host(coordinator, port, processes, timeout)
    if problem:
        raise UserError(problem)


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"the coordinator is host:port, such as 10.0.0.1:8476, got {text!r}")
    return host.strip("[]"), int(port)


def _host(address: str, port: int, processes: int, timeout: float) -> str:
    """Receive the other processes, compare their counts, and tell all of them the verdict; give it."""
    deadline = time.monotonic() + timeout
    counts, visitors = {0: processes}, []
    try:
        server = _listen(port)
    except OSError as error:
        if told := _told_there("localhost", port, processes, 0):  # by another process 0
            return told
        raise UserError(f"port {port} of {address} cannot be used here ({error}): choose another one") from error
    problem = ""
    with server:
        while len(counts) < max(counts.values()) and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                visitor, _ = server.accept()
            except TimeoutError:
                break
            said = _hear(visitor, ("process", "processes"), wait=2.0)
            if said is None:  # somebody else's knock at the port
                visitor.close()
                continue
            visitors.append(visitor)
            if said["process"] in counts:
                problem = f"two processes have the number {said['process']}: each needs its own"
            counts[said["process"]] = said["processes"]
            if said["processes"] != processes or not 0 <= said["process"] < processes or problem:
                deadline = min(deadline, time.monotonic() + _GRACE)
        problem = problem or _problem(address, counts, processes, timeout)
        for visitor in visitors:
            with visitor, contextlib.suppress(OSError):  # one that has left meanwhile
                _say(visitor, {"problem": problem})
    return problem


def _problem(address: str, counts: dict[int, int], processes: int, timeout: float) -> str:
    if len(set(counts.values())) > 1:
        said = ", ".join(f"process {number} says {count}" for number, count in sorted(counts.items()))
        return f"the processes disagree about how many they are ({said}): give all the same number"
    if beyond := [number for number in counts if not 0 <= number < processes]:
        return _BEYOND.format(beyond[0], processes)
    missing = [str(number) for number in range(processes) if number not in counts]
    if not missing:
        return ""
    return (
        f"{len(counts)} of {processes} processes came to the coordinator {address} within {timeout:g} s; these did not: "
        f"{', '.join(missing)}; start them all, with the same address, or give them longer (init_timeout)"
    )


def _told_there(host: str, port: int, processes: int, process: int) -> str:
    """Ask for the coordinator's verdict where there may well be no coordinator: nothing then."""
    try:
        return _visit(host, port, processes, process, _KNOCKING)
    except ValueError:
        return ""


def _visit(host: str, port: int, processes: int, process: int, timeout: float) -> str:
    """Knock at the coordinator until it answers, and give its verdict: what is amiss, or nothing."""
    deadline = time.monotonic() + timeout
    reason: Exception | str = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as door:
                _say(door, {"process": process, "processes": processes})
                verdict = _hear(door, ("problem",), wait=timeout + 2 * _GRACE)  # it waits for the others meanwhile
        except OSError as error:  # refused, timed out, or a name that nobody knows
            reason = error
            time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
            continue
        if verdict is None:
            reason = "what listens there is not the coordinator of this run"
            time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
        else:
            return verdict["problem"]
    raise UserError(
        f"process {process} of {processes} could not reach the coordinator {host}:{port} within {timeout:g} s ({reason}): "
        "start process 0 there, and check the address"
    )


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _say(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _hear(connection: socket.socket, names: tuple[str, ...], *, wait: float) -> dict[str, Any] | None:
    """Read one line of JSON with these names; None for anything else."""
    connection.settimeout(wait)
    line = b""
    try:
        while not line.endswith(b"\n"):
            piece = connection.recv(4096)
            if not piece or len(line) > 1 << 16:
                return None
            line += piece
        message = json.loads(line)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) and set(message) == set(names) else None
