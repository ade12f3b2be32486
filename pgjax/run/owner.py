"""One owner a run folder: the process that writes in it, told apart from one that is gone, on a disk that hosts share too.

The file names host, pid and when the process started. A process of the same machine is looked for; one of another machine is
known by its beat, a number that it writes every few seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pgjax.core.errors import UserError
from pgjax.run.checkpoint.records import write_whole

FILE = "owner.json"
BEAT = 10.0  # seconds between signs of life
SILENCE = 4  # beats without one after which an owner on another machine is taken to be gone


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own a run folder, and give it back in the end.

    Args:
      folder: of the run; it is there.

    Raises:
      UserError: a living process owns it, on this host or another.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with owned(Path(folder)):
      ...         sorted(json.loads(Path(folder, FILE).read_text()))
      ...     list(Path(folder).iterdir())
      ['beat', 'boot', 'host', 'id', 'pid', 'process_started', 'since']
      []
    """
    path, me = folder / FILE, _me()
    while not _made(path, me):
        there = _read(path)
        if there is None:
            continue  # it has gone meanwhile
        if _lives(path, there):
            raise UserError(
                f"{folder} is in use: process {there.get('pid')} on host {there.get('host')} has run in it since "
                f"{there.get('since')}; stop that one, or choose another output folder"
            )
        _take_away(path, there)
    done = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, me, done), daemon=True, name="owner")
    beats.start()
    try:
        yield
    finally:
        done.set()
        beats.join()
        there = _read(path)
        if there is not None and there.get("id") == me["id"]:
            path.unlink(missing_ok=True)


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(), "pid": os.getpid(), "process_started": _started(os.getpid()), "boot": _machine(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"), "id": uuid.uuid4().hex, "beat": 0,
    }  # fmt: skip


def _started(pid: int) -> str | None:
    """When a process of this machine started, in ticks since its boot; None: there is no such process, or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie writes nothing


def _machine() -> str | None:
    """This boot of this machine, and the room of process numbers in it: containers have their own."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _lives(path: Path, owner: dict[str, Any]) -> bool:
    if owner.get("host") == socket.gethostname() and owner.get("boot") == _machine():
        if owner["boot"] is not None:
            return _started(owner["pid"]) == owner["process_started"]
        return _answers(owner["pid"])
    # of another machine; clocks differ between them, so its beat is watched rather than its age
    print(
        f"{path.parent} was left in use by process {owner.get('pid')} on host {owner.get('host')}: waiting for a sign of life",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    end = time.monotonic() + SILENCE * BEAT
    while time.monotonic() < end:
        time.sleep(min(1.0, BEAT))
        now = _read(path)
        if now is None:
            return False
        if now != owner:
            return True
    return False


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _made(path: Path, me: dict[str, Any]) -> bool:
    """Make the file, whole, unless there is one."""
    part = path.with_name(f"{path.name}.{me['id']}")
    try:
        part.write_text(json.dumps(me))
        os.link(part, path)  # atomic, on NFS too
    except FileExistsError:
        return False
    except OSError:  # a disk without links
        try:
            with path.open("x") as file:
                file.write(json.dumps(me))
        except FileExistsError:
            return False
    finally:
        part.unlink(missing_ok=True)
    return True


def _take_away(path: Path, owner: dict[str, Any]) -> None:
    """Remove the file of an owner that is gone, unless another process was faster."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) != owner:
        with contextlib.suppress(OSError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    """Read an owner; None where there is none, an empty one where the file is damaged."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _beat(path: Path, me: dict[str, Any], done: threading.Event) -> None:
    """Write signs of life; where another process has taken the folder over, as after a long sleep, end at once."""
    while not done.wait(BEAT):
        there = _read(path)
        if there is None or there.get("id") in (me["id"], None):
            me["beat"] += 1
            with contextlib.suppress(OSError):  # a full disk: the run itself will tell
                write_whole(path, json.dumps(me))
            continue
        who = f"process {there.get('pid')} on host {there.get('host')}"
        print(f"error: {path.parent} was taken over by {who}", file=sys.stderr, flush=True)
        os._exit(1)
