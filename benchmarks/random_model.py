"""Write a model of random weights in a known shape: speed depends on the shapes alone.

    python -m benchmarks.random_model 0.5B folder
    python -m benchmarks.rollout --model folder --batch-size 256 --dtypes bfloat16

The shapes are those of SmolLM2-135M, Qwen2.5 and Llama 3.1 (`pod_programs.MODELS`). Every peer reads the same folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import jax
import tyro

import pgjax as pg
from benchmarks.pod_programs import MODELS
from pgjax.models.io.config import architecture_of

Size = Literal["135M", "0.5B", "1.5B", "8B"]


def main(size: tyro.conf.Positional[Size], folder: tyro.conf.Positional[Path], seed: int = 0) -> None:
    """Draw the weights and write them in Hugging Face layout.

    Args:
        size: shape of the model, named by its number of weights.
        folder: to write it to.
        seed: of the weights.
    """
    lm = pg.causal_lm(architecture_of(MODELS[size]))
    pg.save_pretrained(folder, lm, jax.jit(lm.init)(jax.random.key(seed)), None)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
