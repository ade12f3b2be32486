"""The stages of `experiments.rlhf`: what decides each, which script does its work, and with which config."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments import ppo, reward_model, sft
from experiments.study.pairs import make_pairs
from pgjax.data.prompts import check_prompts
from pgjax.data.sources import load_row_sets
from pgjax.data.tables import Placed, Row
from pgjax.parallel import processes
from pgjax.run import devices, stages
from pgjax.run.logs import recorded

if TYPE_CHECKING:
    from experiments.rlhf import Config

StageName = Literal["sft", "pairs", "reward_model", "ppo"]
MADE_FROM: dict[StageName, tuple[StageName, ...]] = {
    "sft": (), "pairs": ("sft",), "reward_model": ("sft", "pairs"), "ppo": ("sft", "reward_model"),
}  # fmt: skip
ALIKE = ("chat", "template_args", "template_date", "seed", "dtype")  # that decide the result of every stage
SHARED = (*ALIKE, *devices.MACHINE)  # fields of this script that every other one has too
DECIDING = {  # fields of this script that decide the result of a stage
    "sft": ("model", "data", "held_out_data", *ALIKE),
    "pairs": ("prompts", "held_out_prompts", "gold", "max_new_tokens", "stop_tokens", "stop_strings", *ALIKE),
    "reward_model": ("pairs", "held_out_pairs", *ALIKE),
    "ppo": ("prompts", "held_out_prompts", "gold", "max_new_tokens", "stop_tokens", "stop_strings", *ALIKE),
}


def to_do(config: Config) -> dict[str, stages.Stage]:
    """List the stages: what decides each, its work, and the stages that it is made from."""
    names = [name for name in MADE_FROM if name != "pairs" or config.pairs is None]
    return {
        name: stages.Stage(
            stage_config(config, name), functools.partial(WORK[name], config), [x for x in MADE_FROM[name] if x in names]
        )
        for name in names
    }  # fmt: skip


def stage_config(config: Config, stage: str) -> Row:
    """Name everything that decides a stage's result, the results of the stages before it aside."""
    section = "pair" if stage == "pairs" else stage
    not_own = {"keep", "keep_best", *from_above(config).get(stage, ())}
    own = {f"{section}.{name}": x for name, x in dataclasses.asdict(config)[section].items() if name not in not_own}
    aside = {"ppo.held_out_rows": config.ppo.held_out_rows} if stage == "pairs" else {}  # kept out of the pairs too
    return {name: getattr(config, name) for name in DECIDING[stage]} | aside | own


def from_above(config: Config) -> dict[str, dict[str, Any]]:
    """Give the fields of each script that follow from those of this one."""
    model, folder = str(config.output / "sft" / "model"), config.output / "pairs"
    sampled = {"pairs": str(folder / "train.jsonl"), "held_out": str(folder / "held_out.jsonl"), "eos": False}
    given = {"pairs": config.pairs, "held_out": config.held_out_pairs, "eos": True}
    watched = () if config.gold is None else (config.gold,)
    fields: dict[str, dict[str, Any]] = {
        "sft": {"model": config.model, "data": config.data, "held_out": config.held_out_data},
        # sampled answers hold the token that ended them, if one did
        "reward_model": {"model": model, **(sampled if config.pairs is None else given)},
        "ppo": {
            "model": model, "reward_model": str(config.output / "reward_model" / "model"), "prompts": config.prompts,
            "held_out": config.held_out_prompts, "rewards": watched, "reward_weights": (0.0,) * len(watched),
            "max_new_tokens": config.max_new_tokens, "stop_tokens": config.stop_tokens,
            "stop_strings": config.stop_strings,
        },
    }  # fmt: skip
    shared = {name: getattr(config, name) for name in SHARED}
    return {
        name: shared | {"output": config.output / name, "resume": False, "resume_from": None} | own
        for name, own in fields.items()
    }


def script_config(config: Config, stage: str) -> Any:
    """Give a script's config: its own numbers, and what follows from this script's."""
    return dataclasses.replace(getattr(config, stage), **from_above(config)[stage])


def run_script(stage: str, config: Config, folder: Path, resume: bool) -> dict[str, float]:
    """Run the script of a stage, or go on with it; chat templates write the date that they wrote in the first stage."""
    mains: dict[str, Callable[[Any], dict[str, float]]] = {
        "sft": sft.main, "reward_model": reward_model.main, "ppo": ppo.main,
    }  # fmt: skip
    going_on = {"resume": resume, "resume_from": config.resume_from if resume else None}
    date = config.template_date or processes.on_process_0(lambda: recorded(config.output / "sft", "template_date"))
    script = dataclasses.replace(script_config(config, stage), output=folder, template_date=date, **going_on)
    return mains[stage](script)


def sample_pairs(config: Config, folder: Path, resume: bool) -> dict[str, float]:
    """Sample pairs from the fine-tuned model and let the judge prefer one of each; a stopped one starts over."""
    del resume
    with devices.on_devices(config) as mesh:
        return make_pairs(
            config.pair, folder, config.output / "sft" / "model", read_prompts(config), gold=str(config.gold), chat=config.chat,
            max_new_tokens=config.max_new_tokens, seed=config.seed, stop_tokens=config.stop_tokens,
            stop_strings=config.stop_strings, dtype=config.dtype, mesh=mesh,
        )  # fmt: skip


WORK: dict[str, Callable[[Config, Path, bool], dict[str, float]]] = {
    name: functools.partial(run_script, name) for name in ("sft", "reward_model", "ppo")
} | {"pairs": sample_pairs}


def read_prompts(config: Config) -> tuple[Placed, Placed]:
    """Read the prompts to train on and those kept aside, as experiments.ppo will, with their locations."""
    return load_row_sets(config.prompts, config.held_out_prompts, config.ppo.held_out_rows, check_prompts)
