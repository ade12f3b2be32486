"""One of two processes that load and save a model together: python tests/two_processes_weights.py PORT PROCESS FOLDER."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

import pgjax as pg
from pgjax.models.io import load as loading
from pgjax.parallel import processes
from pgjax.parallel.sharding import make_mesh

GOLDENS = Path(__file__).parent / "goldens"


def numbers_read(counts):
    """Let `load` count the numbers that it reads."""
    plain = loading.safetensors_of

    def counted(folder):
        tensors = plain(folder)

        def read(name, box):
            counts.append(int(np.prod([last - first for first, last in box])))
            return tensors.read(name, box)

        return tensors._replace(read=read)

    loading.safetensors_of = counted


def error_of(work):
    """Give the error of work that must not succeed."""
    try:
        work()
    except (ValueError, OSError, processes.FailedElsewhere) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main(port, process, folder):
    """Load on a mesh across the processes, save, load again; fail on one process alone."""
    processes.initialize(f"localhost:{port}", 2, process)
    mesh, counts = make_mesh(fsdp=4), []
    numbers_read(counts)
    lm, params, _ = pg.load(GOLDENS / "qwen3", mesh=mesh)
    read = sum(counts)
    kernel = params["layers"]["q"]["kernel"]
    pg.save_pretrained(folder / "together", lm, params, None)  # process 1 returns when the files are there
    _, again, _ = pg.load(folder / "together", mesh=make_mesh(data=2, tensor=2))
    pg.save_pretrained(folder / "again", lm, again, None)
    (folder / "file").touch()
    result = {
        "numbers": read,
        "of": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "whole": kernel.is_fully_addressable,
        "another model": error_of(lambda: pg.load(GOLDENS / "reward_qwen3", mesh=mesh)),
        "other weights": error_of(lambda: pg.load(folder / f"other{process}", mesh=mesh)),
        "other depth": error_of(lambda: pg.load(GOLDENS / ("qwen2", "qwen3")[process], mesh=mesh)),
        "absent here": error_of(lambda: pg.load(GOLDENS / ("qwen3" if process == 0 else "none"), mesh=mesh)),
        "not a folder": error_of(lambda: pg.save_pretrained(folder / "file", lm, params, None)),
        "cannot write": error_of(lambda: pg.save_pretrained(folder / "file" / "out", lm, params, None)),
    }
    (folder / f"{process}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
