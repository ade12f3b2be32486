"""Three processes that train alike: one without a folder for compiled programs, two with the same.

    python -m tests.compilation_cache_processes FOLDER

What they import is imported once, before they are forked; nothing of jax has run by then.
"""

import collections
import dataclasses
import json
import os
import sys
from pathlib import Path

import jax

from experiments import ppo
from pgjax.run import session
from tests import kill_campaign
from tests.tiny_task import save_tiny_model

NAMES = ("without", "writes", "reads")
EVENTS = ("compile_requests_use_cache", "cache_misses", "cache_hits")


def train(root: Path, name: str) -> None:
    """Train for two steps and write down jax's own counts."""
    counts: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
    session.plot_curves = lambda folder: None
    if name == "without":
        save_tiny_model(root / "model")
    programs = None if name == "without" else root / "programs"
    ppo.main(
        dataclasses.replace(kill_campaign.configuration(root, steps=2), output=root / name, compilation_cache=programs)
    )
    (root / f"{name}.json").write_text(json.dumps({event: counts[event] for event in EVENTS}))


def main(root: Path) -> None:
    """Let one process after the other train; a failure of one ends all."""
    for name in NAMES:
        child = os.fork()
        if not child:
            train(root, name)
            sys.stdout.flush()
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"the process {name!r} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
