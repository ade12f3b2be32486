"""RLHF, whole: fine-tune a language model, learn a reward from preferences, optimise against it (Ouyang et al. 2022).

    python -m experiments.rlhf                        # film reviews, a small model from scratch
    python -m experiments.rlhf smollm2                # the same with SmolLM2-135M-Instruct, in smaller numbers
    python -m experiments.rlhf --from ppo --ppo.kl-coef 0.1     # redo a stage and those after it
    python -m experiments.rlhf --data answers.jsonl --pairs judged.jsonl --prompts asked.txt     # on your own data
    python -m experiments.rlhf --mesh data=-1         # on all devices; --distributed: of several hosts (pgjax/run/devices.py)

    sft           texts > a language model that writes such texts           (experiments/sft.py)
    pairs         two completions of each prompt > which one is preferred   (experiments/study/pairs.py)
    reward_model  pairs > a model whose score says which one is preferred   (experiments/reward_model.py)
    ppo           prompts > a policy that scores high and stays near SFT    (experiments/ppo.py)

Each stage has its folder in `--output`. Where its `complete.json` is there, it is skipped; one that was stopped goes on;
`--from STAGE` moves it and those after it aside (NAME.1, NAME.2, ...) and redoes them. By default the preferences come
from a known gold score through a Bradley-Terry coin (experiments/tasks/gold.py), so that the end can be told from the proxy.

Measured with seed 0, on held-out data: perplexity 2,109 > 63.5; the reward model agrees with the judge in 47.9% > 60.5% of
pairs (standard error 2.2; the judge with gold in 84%), calibration error 0.278 > 0.054; PPO takes the proxy from -0.11 to 1.86
and gold from 0.122 to 0.544 at a KL of 8.9 nats. 12 minutes on 2 cores that other work shared.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments import ppo, reward_model, sft
from experiments.study.pairs import Pairs, make_pairs
from experiments.study.rlhf_report import report
from experiments.tasks import reviews
from pgjax.core.errors import UserError
from pgjax.data.prompts import check_rows
from pgjax.data.sources import load_row_sets
from pgjax.data.tables import Row
from pgjax.parallel import processes
from pgjax.rollout import rewards
from pgjax.run.checkpoint.resume import From
from pgjax.run.checks import at_least_one, require
from pgjax.run.devices import MACHINE, Flags, on_devices
from pgjax.run.exits import plain_errors
from pgjax.run.stages import Done, put_aside, run_stage

Stage = Literal["sft", "pairs", "reward_model", "ppo"]
STAGES: tuple[Stage, ...] = ("sft", "pairs", "reward_model", "ppo")
MADE_FROM: dict[Stage, tuple[Stage, ...]] = {
    "sft": (), "pairs": ("sft",), "reward_model": ("sft", "pairs"), "ppo": ("sft", "reward_model"),
}  # fmt: skip


SFT = sft.Config()
PAIRS = Pairs()
REWARD_MODEL = reward_model.Config(epochs=2.0, batch_size=32, microbatches=1, learning_rate=2e-3, warmup_updates=20)
PPO = ppo.Config(
    steps=60, batch_size=64, minibatches=1, microbatches=1, learning_rate=1e-3, kl_coef=0.1, eval_samples=1,
    eval_every=20, samples_every=60, save_every=30,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """One run: what all stages share, then each stage's own numbers."""

    output: Path = Path("runs/rlhf")  # folders sft, pairs, reward_model, ppo
    from_stage: Annotated[Stage | None, tyro.conf.arg(name="from")] = None  # redo this stage and those after it
    resume_from: From = None  # last-good: a stopped stage goes on from its newest snapshot that is whole
    model: str | None = None  # what is fine-tuned: any source that experiments.sft takes; None: from scratch
    data: str = "experiments.tasks.reviews:train_rows"  # to fine-tune on: sources as for experiments.sft
    held_out_data: str | None = (
        "experiments.tasks.reviews:held_out_rows"  # for the perplexity; None: rows of `data`, kept aside
    )
    prompts: str = "experiments.tasks.reviews:prompt_rows"  # to complete, in `pairs` and `ppo`
    held_out_prompts: str | None = (
        "experiments.tasks.reviews:held_out_prompt_rows"  # None: rows of `prompts`, kept aside
    )
    pairs: str | None = None  # your own rows of prompt, chosen, rejected; None: sampled, and judged by `gold`
    held_out_pairs: str | None = None  # likewise; None: rows of `pairs`, kept aside
    chat: bool = False  # put prompts through the tokenizer's chat template
    gold: str | None = (
        "experiments.tasks.gold:gold_reward"  # module:function; judges sampled pairs, and is watched in `ppo`
    )
    max_new_tokens: int = 20  # the longest completion
    seed: int = 0  # of everything
    sft: sft.Config = SFT
    pair: Pairs = PAIRS
    reward_model: reward_model.Config = REWARD_MODEL
    ppo: ppo.Config = PPO
    picture: Path = Path(__file__).parent / "pictures" / "rlhf.png"


PRESETS = {
    "reviews": Config(),
    "smollm2": Config(
        output=Path("runs/rlhf-smollm2"), picture=Path("runs/rlhf-smollm2/rlhf.png"),
        model="SmolLM2-135M-Instruct", data="experiments.rlhf:few_reviews",
        sft=dataclasses.replace(SFT, epochs=1), pair=Pairs(train=512, held_out=128, batch_size=64),
        reward_model=dataclasses.replace(
            REWARD_MODEL, epochs=1.0, batch_size=16, microbatches=2, learning_rate=3e-5
        ),
        ppo=dataclasses.replace(
            PPO, steps=12, batch_size=32, microbatches=2, learning_rate=3e-5, eval_every=None, samples_every=6, save_every=6
        ),
    ),
}  # fmt: skip
FROM_ABOVE = {
    "sft": ("model", "data", "held_out", "chat", "seed", "output", "resume", "resume_from", *MACHINE),
    "reward_model": ("model", "pairs", "held_out", "chat", "eos", "seed", "output", "resume", "resume_from", *MACHINE),
    "ppo": (
        "model", "prompts", "held_out", "chat", "rewards", "reward_weights", "reward_model", "max_new_tokens", "seed",
        "output", "resume", "resume_from", *MACHINE,
    ),
}  # fmt: skip  # fields of the stages that the shared ones decide
KEPT = {"keep", "keep_best"}  # which snapshots stay: nothing of the result


def main(config: Config) -> dict[str, float]:
    """Do what is left of the stages; return the figures of all of them, as STAGE/name."""
    check(config)
    with on_devices(config):
        return run(config)


def run(config: Config) -> dict[str, float]:
    """Do the work of `main`; all processes of a run call this alike."""
    # now, since the stages that read them come late
    processes.all_or_none(lambda: read_prompts(config))
    folders = {name: config.output / name for name in STAGES}
    done: dict[str, Done] = {}
    for name, made_from in MADE_FROM.items():
        if name == config.from_stage:  # not before: what comes first may be refused, and then nothing has moved
            later = [folders[other] for other in STAGES[STAGES.index(name) :]]
            for moved in processes.on_process_0(functools.partial(put_aside, later)):
                processes.print_once(f"moved the old stage to {moved}")
        if name == "pairs" and config.pairs is not None:
            processes.print_once(f"pairs: those of {config.pairs}")
            continue
        work = functools.partial(WORK[name], config)
        inputs = [done[other] for other in made_from if other in done]
        redo = f"--from {name} puts the old one aside and redoes it"
        done[name] = run_stage(folders[name], asked(config, name), work, made_from=inputs, redo=redo)
    if processes.is_process_0():
        report(config, done)
    return {f"{name}/{key}": x for name, stage in done.items() for key, x in stage.metrics.items()}


def asked(config: Config, stage: str) -> Row:
    """Name everything that decides a stage's result, the results of the stages before it aside."""
    shared = {
        "sft": ("model", "data", "held_out_data", "chat", "seed"),
        "pairs": ("prompts", "held_out_prompts", "chat", "gold", "max_new_tokens", "seed"),
        "reward_model": ("pairs", "held_out_pairs", "chat", "seed"),
        "ppo": ("prompts", "held_out_prompts", "chat", "gold", "max_new_tokens", "seed"),
    }[stage]
    section = "pair" if stage == "pairs" else stage
    own = dataclasses.asdict(config)[section]
    kept = {f"{section}.{name}": x for name, x in own.items() if name not in KEPT.union(FROM_ABOVE.get(stage, ()))}
    aside = {"ppo.held_out_rows": config.ppo.held_out_rows}  # keeps prompts out of the pairs too
    return {name: vars(config)[name] for name in shared} | (aside if stage == "pairs" else {}) | kept


def machine(config: Config) -> dict[str, Any]:
    """Tell a stage where it runs: where all of them do."""
    return {name: vars(config)[name] for name in MACHINE}


def read_prompts(config: Config) -> tuple[list[Row], list[Row]]:
    """Read the prompts to train on and those kept aside, as experiments.ppo will."""
    return load_row_sets(config.prompts, config.held_out_prompts, config.ppo.held_out_rows, check_rows)


def few_reviews() -> list[Row]:
    """Write the first thousand reviews to fine-tune on: what a model of 135 million parameters gets through in minutes."""
    return reviews.train_rows()[:1000]


def sft_config(config: Config, folder: Path, resume: bool = False) -> sft.Config:
    """Say how the model is fine-tuned, or made from scratch."""
    return dataclasses.replace(
        config.sft, model=config.model, data=config.data, held_out=config.held_out_data, chat=config.chat,
        seed=config.seed, output=folder, resume=resume,
        resume_from=config.resume_from if resume else None, **machine(config),
    )  # fmt: skip


def do_pairs(config: Config, folder: Path, resume: bool) -> dict[str, float]:
    """Sample pairs from the fine-tuned model and let the judge prefer one of each; a stopped one starts over."""
    del resume
    assert config.gold is not None  # check() saw to it
    row_sets = read_prompts(config)
    with on_devices(config) as mesh:
        return make_pairs(
            config.pair, folder, config.output / "sft" / "model", row_sets, gold=config.gold, chat=config.chat,
            max_new_tokens=config.max_new_tokens, seed=config.seed, mesh=mesh,
        )  # fmt: skip


def reward_model_config(config: Config, folder: Path, resume: bool = False) -> reward_model.Config:
    """Say how the reward is learned from the pairs, starting from the fine-tuned model."""
    if config.pairs is not None:
        pairs, held_out = config.pairs, config.held_out_pairs
    else:
        pairs, held_out = (str(config.output / "pairs" / f"{name}.jsonl") for name in ("train", "held_out"))
    return dataclasses.replace(
        config.reward_model, model=str(config.output / "sft" / "model"), pairs=pairs, held_out=held_out,
        eos=config.pairs is not None,  # sampled pairs carry the tokens that ended them
        chat=config.chat, seed=config.seed, output=folder, resume=resume,
        resume_from=config.resume_from if resume else None, **machine(config),
    )  # fmt: skip


def ppo_config(config: Config, folder: Path, resume: bool = False) -> ppo.Config:
    """Say how the fine-tuned model is optimised against the reward model; the gold score is only watched."""
    watched = () if config.gold is None else (config.gold,)
    return dataclasses.replace(
        config.ppo, model=str(config.output / "sft" / "model"),
        reward_model=str(config.output / "reward_model" / "model"),
        prompts=config.prompts, held_out=config.held_out_prompts, chat=config.chat, rewards=watched,
        reward_weights=(0.0,) * len(watched), max_new_tokens=config.max_new_tokens, seed=config.seed,
        output=folder, resume=resume,
        resume_from=config.resume_from if resume else None, **machine(config),
    )  # fmt: skip


WORK: dict[str, Callable[[Config, Path, bool], dict[str, float]]] = {
    "sft": lambda *given: sft.main(sft_config(*given)),
    "pairs": do_pairs,
    "reward_model": lambda *given: reward_model.main(reward_model_config(*given)),
    "ppo": lambda *given: ppo.main(ppo_config(*given)),
}


def check(config: Config) -> None:
    """Refuse a run that cannot work, before anything is read or computed."""
    for stage, names in FROM_ABOVE.items():
        given, shipped = vars(vars(config)[stage]), vars(vars(Config())[stage])
        for name in names:
            require(
                given[name] == shipped[name],
                f"{stage}.{name} follows from the fields that all stages share: set those, see --help",
            )
    shipped = Config()
    require(
        config.data.startswith("experiments.") or config.held_out_data != shipped.held_out_data,
        "held_out_data are still film reviews: give your own, or None to keep rows of data aside",
    )
    require(
        config.prompts == shipped.prompts or config.held_out_prompts != shipped.held_out_prompts,
        "held_out_prompts are still film reviews: give your own, or None to keep rows of prompts aside",
    )
    require(
        config.pairs is not None or config.held_out_pairs is None,
        "held_out_pairs go with pairs of your own: give pairs too",
    )
    require(
        config.pairs is not None or config.gold is not None,
        "without pairs of your own, sampled ones are judged by gold: name a module:function",
    )
    at_least_one(config.pair, "train", "held_out", "batch_size", of="pair.")
    for name in ("temperature", "scale"):
        value = vars(config.pair)[name]
        require(0 < value < math.inf, f"pair.{name} must be finite and above 0, got {value}")
    for stage, refuse in {
        "sft": lambda: sft.check(sft_config(config, config.output / "sft")),
        "reward_model": lambda: reward_model.check(reward_model_config(config, config.output / "reward_model")),
        "ppo": lambda: ppo.check(ppo_config(config, config.output / "ppo")),
    }.items():
        try:
            refuse()
        except ValueError as error:
            raise UserError(f"{stage}: {error}") from error
    if config.gold is not None:
        rewards.load_reward(config.gold)


def without_reviews(preset: Config, arguments: Sequence[str]) -> Config:
    """Drop what a preset has beside a source that the command line replaces: its held-out rows, the gold score of its pairs.

    Example:
      >>> without_reviews(Config(), ["--pairs", "judged.jsonl"]).gold is None
      True
    """
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    go_with = {"--data": "held_out_data", "--prompts": "held_out_prompts", "--pairs": "gold"}
    dropped: dict[str, Any] = {name: None for flag, name in go_with.items() if flag in given}
    return dataclasses.replace(preset, **dropped)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    preset = PRESETS[arguments.pop(0) if arguments and arguments[0] in PRESETS else "reviews"]
    with plain_errors("the same command, without --from, goes on"):
        main(tyro.cli(Config, default=without_reviews(preset, arguments), args=arguments, description=__doc__))
