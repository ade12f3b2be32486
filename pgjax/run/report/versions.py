"""What a run was made with: packages, devices and the commit of a checkout, a line in its folder for each start."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from pgjax.core.errors import UserError
from pgjax.run.checkpoint.records import write_whole
from pgjax.run.logs import read_lines

VERSIONS = "versions.jsonl"
PACKAGES = ("pgjax", "jax", "jaxlib", "flax", "optax", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Name what runs now: Python, packages, devices, and the commit where pgjax is a checkout.

    Example:
        >>> sorted(versions())[:2]
        ['commit', 'devices']
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    devices = jax.devices()
    return {**found, "devices": f"{len(devices)} x {devices[0].device_kind}", "commit": _commit(Path(__file__).parent)}


def _commit(folder: Path) -> str:
    """The commit that git tracks a folder's files in, ending in -dirty where a file differs from it."""
    git = lambda *command: subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=10)
    try:
        if not git("ls-files", ".").stdout:  # pgjax may be installed inside a checkout of something else
            return "unknown"
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def record_versions(folder: Path, step: int) -> None:
    """Append what runs now to a run's folder; a disk that takes no line ends no run.

    Args:
        folder: of the run.
        step: that the run starts or goes on from.
    """
    try:
        rows = [*read_versions(folder), {"step": step, **versions()}]  # without a line that was cut short
        write_whole(folder / VERSIONS, "".join(json.dumps(row) + "\n" for row in rows))
    except (OSError, UserError) as error:
        print(f"no versions are recorded: {error}")


def read_versions(folder: Path) -> list[dict[str, Any]]:
    """Read what each start of a run was made with, oldest first.

    Example:
        >>> read_versions(Path("no-such-run"))
        []
    """
    return read_lines(folder / VERSIONS)
