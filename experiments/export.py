"""Export a kept snapshot of a run as a model: the policy, the fine-tuned model or the reward model, as the run's end saves it.

    python -m experiments.export runs/haiku               # the newest snapshot, to runs/haiku/exported/STEP
    python -m experiments.export runs/sft --step 300      # another one that is kept
    python -m experiments.export runs/sft --best          # the one with the best held-out score, of a run with --keep-best

The run may be under way, or stopped for good. The snapshot is checked to the bit, and the model that it started from too.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from tyro.conf import Positional

import pgjax as pg
from experiments import reward_model, sft
from pgjax.data import preferences
from pgjax.learning import reward_learning
from pgjax.learning.optimizer import adamw, init_state
from pgjax.models.io.classifier import with_padding_token
from pgjax.models.io.stops import set_stops
from pgjax.models.lora import freeze
from pgjax.models.reward_model import from_causal_lm
from pgjax.run import checks, devices, exits, logs, presets
from pgjax.run.checkpoint.checkpoints import Checkpoints
from pgjax.run.checkpoint.files import read_record
from pgjax.run.checkpoint.resume import frozen_model
from pgjax.run.session import load_options, templated

OPTIMIZER = adamw(1.0, updates=1)  # its state has the form of every script's


@dataclasses.dataclass(frozen=True)
class Config:
    """What is exported, and where to."""

    run: Positional[Path]  # the run folder
    step: int | None = None  # of a snapshot that is kept; None: the newest
    best: bool = False  # the snapshot with the best score in place of the newest
    model: str | None = None  # where the model now lies that the run started from; None: where the run found it
    output: Path | None = None  # folder of the exported model; None: exported/STEP in the run folder


def main(config: Config) -> Path:
    """Export a snapshot; return the folder of the model."""
    checks.require(not (config.best and config.step is not None), f"best=True and step={config.step}: give one of them")
    fields = config.run / logs.CONFIG
    checks.require(fields.exists(), f"there is no run in {config.run} (no {logs.CONFIG})")
    of_run = SimpleNamespace(**json.loads(fields.read_text()))
    of_run.output, of_run.goes_on, of_run.model = config.run, True, config.model or of_run.model
    with Checkpoints(config.run / "checkpoints") as snapshots:
        step = config.step if config.step is not None else snapshots.best() if config.best else snapshots.latest()
        kept = snapshots.steps()
        checks.require(bool(kept), f"{snapshots.folder} holds no snapshot yet")
        if step is None:
            raise pg.UserError(f"no snapshot in {snapshots.folder} has a score: the run needs --keep-best")
        checks.require(step in kept, f"{snapshots.folder} holds no snapshot of step {step}: those of {kept} are kept")
        folder = config.output or config.run / "exported" / str(step)
        devices.keep_programs(devices.USERS_CACHE)
        kind = reward_judge if hasattr(of_run, "pairs") else tuned if hasattr(of_run, "data") else policy
        kind(of_run, snapshots, step, folder)
    print(f"{folder} is the model after step {step}")
    return folder


def policy(config: Any, snapshots: Checkpoints, step: int, folder: Path) -> None:
    """Export the policy of a run of experiments.ppo."""
    lm, base, tokenizer = pg.load(config.model, **load_options(config))
    check_same(snapshots, step, "reference", base)
    frozen, trained = adapted(config, base)
    head = pg.init_value_head(lm.arch.width)
    like = pg.State(init_state({"lm": trained, "value": head}, OPTIMIZER), jnp.float32(0), jnp.int32(0), None)
    state, _ = snapshots.restore(like, step)
    tokenizer = set_stops(templated(tokenizer, config), config.stop_tokens, config.stop_strings)
    pg.save_pretrained(folder, lm, pg.with_lora(frozen, state.learner.params["lm"]), tokenizer)


def tuned(config: Any, snapshots: Checkpoints, step: int, folder: Path) -> None:
    """Export the model of a run of experiments.sft."""
    config.config = None if config.config is None else Path(config.config)
    lm, base, tokenizer = sft.load_or_make(config, [], None)
    check_same(snapshots, step, "model", base if config.model is not None else None)
    frozen, trained = adapted(config, base)
    state, _ = snapshots.restore(init_state(trained, OPTIMIZER), step)
    pg.save_pretrained(folder, lm, pg.with_lora(frozen, state.params), templated(tokenizer, config))


def reward_judge(config: Any, snapshots: Checkpoints, step: int, folder: Path) -> None:
    """Export the reward model of a run of experiments.reward_model, its scores normalised as at the end of that."""
    pair_sets, answers = reward_model.read_rows(config)
    lm, base, tokenizer = pg.load(config.model, **load_options(config))
    check_same(snapshots, step, "model", base)
    rm, params = from_causal_lm(lm, base, jax.random.key(config.seed))
    rm, params, tokenizer = with_padding_token(rm, params, templated(tokenizer, config))
    (_, held_out), references, _ = preferences.encode_sets(
        pair_sets, answers, tokenizer, chat=config.chat, eos=config.eos, reference_rows=config.reference_rows,
        max_length=rm.arch.max_positions if config.max_length is None else config.max_length,
    )  # fmt: skip
    frozen, trained = adapted(config, params)
    state, _ = snapshots.restore(init_state(trained, OPTIMIZER), step)
    params, figures = reward_learning.normalized_on(
        rm, pg.with_lora(frozen, state.params), references, held_out, batch_size=config.batch_size
    )
    print(", ".join(f"{name} {x:.3f}" for name, x in figures.items()))
    pg.save_reward_model(folder, rm, params, tokenizer)


def adapted(config: Any, params: Any) -> tuple[Any, Any]:
    """Tell parameters that are frozen from those that the run trained."""
    return freeze(params, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed, mesh=None)


def check_same(snapshots: Checkpoints, step: int, name: str, params: Any) -> None:
    """Refuse another model in the place of the one that the run started from."""
    there, here = read_record(snapshots.folder / str(step))["made_from"][name], frozen_model(params)
    checks.require(
        there == here, f"the run started from another model ({there}, not {here}): --model gives its place now"
    )


if __name__ == "__main__":
    with exits.plain_errors():
        main(presets.parse({"": Config(Path("runs/haiku"))}, description=__doc__))
