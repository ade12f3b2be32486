"""Find a Python interpreter for each peer: peers need packages that exclude each other, so each may have its own environment."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pgjax as pg
from pgjax.core.errors import UserError

ASK = (
    "import importlib.metadata as m, json, platform, sys\n"
    "found = {d.name.lower(): d.version for d in m.distributions() if d.name}\n"
    "print(json.dumps({'python': platform.python_version(), **{p: found[p] for p in sys.argv[1:] if p in found}}))"
)


class Need(NamedTuple):
    """A package that a peer needs, and the range of its versions; "" is open."""

    package: str
    at_least: str = ""
    below: str = ""

    def met_by(self, versions: Mapping[str, str]) -> bool:
        """Say whether these versions of an interpreter's packages meet the need.

        >>> Need("trl", below="1.13").met_by({"trl": "1.12.0"}), Need("trl", at_least="1.13").met_by({"trl": "1.9.1"})
        (True, False)
        """
        if self.package not in versions:
            return False
        version = numbers(versions[self.package])
        return numbers(self.at_least) <= version and (not self.below or version < numbers(self.below))

    def __str__(self) -> str:
        at_least = f" >= {self.at_least}" if self.at_least else ""
        return self.package + at_least + (f" < {self.below}" if self.below else "")


class Peer(NamedTuple):
    """A program to compare with."""

    who: str  # its name in the tables
    program: str  # its module
    needs: tuple[Need, ...]
    beyond: Callable[[pg.Architecture], str | None] = lambda arch: None  # why it cannot run a model; None: it can


def beyond_tunix(arch: pg.Architecture) -> str | None:
    """Say why Tunix's Llama is not this model; None where it is.

    Its rope has no scaling, and its projections no biases.
    """
    if arch.family != "llama":
        return f"only its Llama is compared with, and this model is of the family {arch.family}"
    if arch.rope is None or arch.rope.factor is not None:
        return "its Llama does not scale its rope, and this model does"
    if arch.qkv_bias or arch.out_bias or arch.mlp_bias or arch.qk_norm or arch.activation != "silu":
        return "its Llama has no biases, no norm of queries and keys, and silu alone"
    return None


def numbers(version: str) -> tuple[int, ...]:
    """Read the leading numbers of a version.

    >>> numbers("2.13.0+cpu"), numbers("1.12.0rc1"), numbers("")
    ((2, 13, 0), (1, 12), ())
    """
    found: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


@functools.cache
def installed(python: str, packages: tuple[str, ...]) -> dict[str, str]:
    """Ask an interpreter for its own version and those of packages; absent ones are left out.

    A program that is no Python has none of them: what it printed is returned under "unfit".

    Raises:
        ValueError: it does not run.
    """
    try:
        done = subprocess.run([python, "-c", ASK, *packages], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"peer_pythons: {python} does not run ({error})") from error
    if done.returncode != 0:
        raise UserError(f"peer_pythons: {python} does not run:\n{done.stderr[-1000:]}")
    found = parsed(done.stdout)
    return (
        found
        if "python" in found
        else {"unfit": f"{Path(python).name}, asked for its packages, printed {done.stdout!r}"}
    )


def parsed(text: str) -> dict[str, Any]:
    """Read an object of JSON; anything else is an empty one.

    >>> parsed('{"wall": 1.5}'), parsed("Segmentation fault"), parsed("")
    ({'wall': 1.5}, {}, {})
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def choose(
    peers: Sequence[Peer], pythons: Sequence[str], arch: pg.Architecture, *, wanted: bool
) -> tuple[dict[str, str], str | None]:
    """Find for each peer the first interpreter that has all that it needs.

    Args:
        peers: to look for.
        pythons: interpreters, tried in this order; none given: this one.
        arch: of the model that they are to run.
        wanted: False looks for no peer.

    Returns:
        peer to interpreter, for the peers that were found; and a line for each other one with the reason, None if there is none.
    """
    if not wanted:
        return {}, "peers left out: --no-peer"
    found: dict[str, str] = {}
    absent: list[str] = []
    for peer in peers:
        if (why := peer.beyond(arch)) is not None:
            absent.append(f"{peer.who} left out: {why}")
            continue
        packages = tuple(need.package for need in peer.needs)
        found_in = [(python, installed(python, packages)) for python in pythons or (sys.executable,)]
        serving = [
            python
            for python, versions in found_in
            if "unfit" not in versions and all(need.met_by(versions) for need in peer.needs)
        ]
        if serving:
            found[peer.who] = serving[0]
        else:
            absent.append(missing(peer, [versions for _, versions in found_in]))
    return found, "\n".join(absent) or None


def missing(peer: Peer, environments: Sequence[Mapping[str, str]]) -> str:
    """Say which peer is missing, what it needs, and what each interpreter has of that.

    >>> missing(Peer("TRL PPO", "", (Need("trl", below="1.13"), Need("torch"))), [{"python": "3.11.7", "torch": "2.13.0"}])
    'TRL PPO missing: needs trl < 1.13, torch; Python 3.11.7 has trl not installed, torch 2.13.0 (--peer-pythons names others)'
    """
    has = [
        versions.get("unfit")
        or f"Python {versions['python']} has "
        + ", ".join(f"{need.package} {versions.get(need.package, 'not installed')}" for need in peer.needs)
        for versions in environments
    ]
    needs = ", ".join(str(need) for need in peer.needs)
    return f"{peer.who} missing: needs {needs}; {'; '.join(has)} (--peer-pythons names others)"
