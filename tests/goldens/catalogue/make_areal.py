"""Make areal.json: M2PO's mask as AReaL computes it, by that function alone, read out of its wheel's own file.

python3.11 -m venv peers && peers/bin/pip install torch==2.13.0
peers/bin/pip install --no-deps areal==1.0.4
peers/bin/python tests/goldens/catalogue/make_areal.py
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))

import shared
import torch
from torch_inputs import X

FILE = Path(importlib.util.find_spec("areal").submodule_search_locations[0]) / "trainer/ppo/actor.py"
WANTED = ("_apply_m2po_masking", "_get_m2po_loss_mask")


def functions() -> dict:
    """Run the definitions of these functions and nothing else of the file, whose imports are a cluster's."""
    tree = ast.parse(FILE.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") in WANTED]
    names = {"torch": torch}
    exec(compile(tree, str(FILE), "exec"), names)
    return names


def main() -> None:
    """Write every entry."""
    apply = functions()["_apply_m2po_masking"]
    entries = {
        f"m2po_{threshold:g}": shared.entry(
            "areal.trainer.ppo.actor._apply_m2po_masking", apply(X.old_logprobs, X.logprobs, X.mask, threshold)
        )
        for threshold in (0.02, 0.1, 1e-9)
    }
    shared.write("areal", version("areal"), "make_areal.py", entries, folder="catalogue")


if __name__ == "__main__":
    main()
