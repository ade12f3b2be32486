"""Learn a reward model from preferences: a language model's body, one linear score, and Bradley and Terry's loss.

    python -m experiments.reward_model --model runs/sft/model --pairs pairs.jsonl      # your own
    python -m experiments.reward_model                     # SmolLM2-135M-Instruct on pairs of film reviews
    python -m experiments.reward_model --help              # every field
    python -m experiments.reward_model --resume            # go on with a run that was stopped (--resume-from: see --help)
    python -m experiments.reward_model --mesh data=-1      # on all devices; --distributed: of several hosts (see devices.py)

pairs > ids > scores at the last token > -log sigmoid(chosen - rejected - margin) > update > mean 0, std 1 > saved

A row holds `prompt`, `chosen` and `rejected`, texts or lists of messages, and maybe `margin` (Touvron et al. 2023). The
whole model learns, from a head of standard deviation 1 / sqrt(d + 1); in the end its scores are shifted and scaled once, to
mean 0 and standard deviation 1 over reference answers (Stiennon et al. 2020). OUTPUT/model opens in `transformers` as
AutoModelForSequenceClassification, and in experiments.ppo as --reward-model.

What to expect, on held-out pairs of experiments.tasks.review_pairs, seed 0: SmolLM2-135M-Instruct goes from 43% to 61% (+- 4%)
right in 24 updates of 16 pairs, 30 seconds an update on 2 busy cores; a 1.33M-parameter model made on the spot from 51%
to 57% (+- 3%) in 96 updates of 64. The labels are a coin's: nobody could be right in more than 83%.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

import pgjax as pg
from experiments.study.reward_picture import plot_calibration
from pgjax.core.errors import UserError
from pgjax.data import preferences
from pgjax.data.batches import batches, split_rows
from pgjax.data.sources import load_rows
from pgjax.learning import reward_learning
from pgjax.learning.optimizer import TrainState, adamw, init_state, revived
from pgjax.models.io.classifier import with_padding_token
from pgjax.models.lora import freeze
from pgjax.models.reward_model import from_causal_lm, normalized
from pgjax.parallel import batch_rows, processes
from pgjax.run import checks, logs, loop
from pgjax.run.checkpoint.resume import From, frozen_model, go_on, open_checkpoints, rows_digest, to_best
from pgjax.run.checks import check_lora, require
from pgjax.run.devices import MACHINE, Flags, agree_on, check_batch_divides, on_devices, replicate, shared_folder
from pgjax.run.exits import plain_errors
from pgjax.run.progress import Progress


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """One run. Every number that decides it stands here."""

    model: str = "SmolLM2-135M-Instruct"  # the language model to start from, best the one that PPO starts from
    pairs: str = (
        "experiments.tasks.review_pairs:train_rows"  # .jsonl, .csv or .parquet file, data set, or module:function
    )
    held_out: str | None = None  # likewise, for the evaluation; None: rows of `pairs`, kept aside
    held_out_rows: int = 256  # how many rows are kept aside where `held_out` is None
    reference: str | None = None  # rows with prompt and completion to normalise on; None: both answers of the pairs
    reference_rows: int = 1024  # the first so many of them, in pairs or in rows
    chat: bool = False  # put prompts that are texts through the chat template; messages always go through it
    eos: bool = True  # end each answer with the end of sequence; False where answers hold it themselves, if they ended
    max_length: int | None = None  # longest prompt with answer, in tokens; None: the model's positions
    use_margin: bool = True  # ask for the margin of the column `margin`, where there is one
    output: Path = Path("runs/reward_model")  # the run folder: config, metrics, picture, checkpoints, model
    resume: bool = False  # go on with the run in `output`
    resume_from: From = None  # last-good: go on, from the newest snapshot that is whole where later ones are damaged
    seed: int = 0  # of the head's start and the order of pairs

    epochs: float = 1.0  # passes over the pairs
    batch_size: int = 32  # pairs an update
    microbatches: int = 2  # parts of a batch, for memory; the gradient is the same
    learning_rate: float = 3e-5  # of AdamW, reached after the warm-up
    lora_rank: int | None = None  # train adapters of this rank, at some ten times the rate; None: all parameters
    lora_alpha: float = 32.0  # the adapters' weight times the rank
    warmup_updates: int = 10  # updates over which the rate rises linearly
    decay: bool = True  # fall linearly to 0 over the run
    weight_decay: float = 0.0  # of AdamW, decoupled, on matrices only
    max_grad_norm: float = 1.0  # clip the gradient to this global norm
    center_coef: float = 0.01  # of the pull of a pair's sum towards 0 (Eisenstein et al. 2023); 0: none
    save_every: int = 50  # updates between checkpoints
    keep: int = 2  # how many of the latest checkpoints stay
    keep_best: bool = False  # evaluate at each, keep the one of the lowest held-out loss too, and save its model


MAY_CHANGE = {"output", "resume", "resume_from", "save_every", "keep", "keep_best", *MACHINE}  # when a run goes on


def main(config: Config) -> dict[str, float]:
    """Learn; return the figures on held-out pairs before and after, and those of the normalisation."""
    config = dataclasses.replace(config, resume=config.resume or config.resume_from is not None)
    check(config)
    with on_devices(config) as mesh:
        return run(config, mesh)


def run(config: Config, mesh: Mesh | None) -> dict[str, float]:
    """Do the work of `main` on the devices of a mesh, or on one; all processes of a run call this alike."""
    config = dataclasses.replace(config, output=shared_folder(config.output))
    check_batch_divides(mesh, config.batch_size, microbatches=config.microbatches)
    pair_sets = processes.all_or_none(lambda: read_pairs(config))
    lm, lm_params, tokenizer = pg.load(config.model, mesh=mesh, remat=config.remat)
    if tokenizer is None:
        raise UserError(f"{config.model} holds no tokenizer, and pairs are text: add its tokenizer files")
    rm, params = from_causal_lm(lm, lm_params, jax.random.key(config.seed), remat=config.remat)
    del lm_params
    rm, params, tokenizer = with_padding_token(rm, params, tokenizer)
    kept = pair_sets["training"].kept
    tokenizer.init_kwargs[preferences.TEMPLATED] = config.chat or not isinstance(kept[0].chosen.prompt, str)
    train_pairs, held_out, references = processes.all_or_none(lambda: encoded(config, rm, tokenizer, pair_sets))
    agree_on(f"what the tokenizer makes of {config.pairs}", (train_pairs, held_out, references))
    folder = processes.on_process_0(
        lambda: logs.open_run(config.output, dataclasses.asdict(config), resume=config.resume, may_change=MAY_CHANGE)
    )
    deal = batches(
        train_pairs, config.batch_size, seed=config.seed, own=batch_rows.rows_to_feed(mesh, config.batch_size)
    )
    lengths = [max(len(pair.chosen), len(pair.rejected)) for pair in train_pairs]
    all_lengths = batches(lengths, config.batch_size, seed=config.seed)  # all processes take one program
    steps = max(1, round(config.epochs * len(train_pairs) / config.batch_size))

    optimizer = adamw(
        config.learning_rate, updates=steps, warmup=min(config.warmup_updates, steps), decay=config.decay,
        max_grad_norm=config.max_grad_norm, weight_decay=config.weight_decay,
    )  # fmt: skip
    frozen, trained = freeze(params, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed, mesh=mesh)
    state = init_state(trained, optimizer)
    del params, trained
    checkpoints = open_checkpoints(
        folder, dataclasses.asdict(config), MAY_CHANGE, keep=config.keep, keep_best=config.keep_best,
        data=rows_digest(train_pairs), frozen=None if frozen is None else frozen_model(config.model, frozen),
    )  # fmt: skip
    state, start = go_on(checkpoints, state, resume=config.resume, resume_from=config.resume_from)
    state = revived(state)
    center_coef = replicate(mesh, np.float32(config.center_coef))
    log_from = start + 1 if start else 0

    def prepare(state: TrainState, i: int) -> Any:
        batch = reward_learning.pair_batch(deal[i], most=rm.arch.max_positions, longest=max(all_lengths[i]))
        margin = batch.margin if config.use_margin else np.zeros_like(batch.margin)
        return batch_rows.feed(mesh, batch._replace(margin=margin))

    def step(state: TrainState, i: int, batch: Any) -> tuple[TrainState, dict[str, Any], None]:
        state, metrics = reward_learning.update(
            state, batch, center_coef, frozen=frozen, rm=rm, optimizer=optimizer, microbatches=config.microbatches
        )
        figures: dict[str, float] = {}
        if config.keep_best and ((i + 1) % config.save_every == 0 or i + 1 == steps):
            params = pg.with_lora(frozen, state.params)
            scores = reward_learning.pair_scores(rm, params, held_out, batch_size=config.batch_size)
            figures = reward_learning.pair_metrics(scores)
        return state, {**metrics, **{f"eval/{name}": x for name, x in figures.items()}}, None

    with (
        processes.all_or_none(
            lambda: logs.Writer(folder, start_step=log_from, active=processes.is_process_0())
        ) as writer,
        Progress(steps, start=start) as progress,
    ):

        def report(done: int, metrics: dict[str, float], samples: None) -> None:
            writer.write(done, metrics)
            progress.update(done, metrics)

        def evaluate(trained: Any, done: int) -> np.ndarray:
            params = pg.with_lora(frozen, trained)
            scores = reward_learning.pair_scores(rm, params, held_out, batch_size=config.batch_size)
            figures = reward_learning.pair_metrics(scores)
            processes.all_or_none(lambda: writer.write(done, {f"eval/{name}": x for name, x in figures.items()}))
            progress.print(
                f"after {done} of {steps} steps, on {len(held_out)} held-out pairs: accuracy {figures['accuracy']:.3f} +- "
                f"{figures['accuracy_stderr']:.3f}, margin {figures['margin']:.3f}, loss {figures['loss']:.3f}, "
                f"calibration error {figures['calibration_error']:.3f}"
            )
            return scores

        def save(trained: Any, to: Path) -> dict[str, float]:
            params = pg.with_lora(frozen, trained)
            hidden = reward_learning.features(rm, params, references, batch_size=2 * config.batch_size)
            params, constants = normalized(params, hidden)  # once: nothing is refitted from here on
            shifted = reward_learning.pair_scores(rm, params, held_out, batch_size=config.batch_size)
            after = reward_learning.pair_metrics(shifted)
            progress.print(
                f"scores shifted by {-constants['mean']:.3f} and divided by {constants['std']:.3f}, over {len(references)} "
                f"references; the shift varies by {constants['shift_spread']:.3f}; accuracy {after['accuracy']:.3f}"
            )
            pg.save_reward_model(to, rm, params, tokenizer)
            figures = {f"reference/{name}": value for name, value in constants.items()}
            return figures | {"normalized/accuracy": after["accuracy"], "normalized/margin": after["margin"]}

        try:
            if start == 0:
                evaluate(state.params, 0)
            state = loop.run(
                state, steps=steps, start=start, prepare=prepare, step=step, check=loop.check_finite, report=report,
                checkpoints=checkpoints, save_every=config.save_every,
                score=lambda metrics: -metrics["eval/loss"] if "eval/loss" in metrics else None,
            )  # fmt: skip
            if not processes.on_process_0(lambda: finished(folder)):
                scores = evaluate(state.params, steps)
                if processes.is_process_0():
                    plot_calibration(folder / "calibration.png", np.asarray(scores))
                figures = save(state.params, folder / "model")
                if config.keep_best:
                    state, best = to_best(checkpoints, state)
                    progress.print(f"model_best is the model after step {best}")
                    save(state.params, folder / "model_best")
                processes.all_or_none(lambda: writer.write(steps, figures))
        finally:
            checkpoints.close()
    return processes.on_process_0(lambda: summary(folder))


def read_pairs(config: Config) -> dict[str, preferences.Kept]:
    """Read the pairs to learn from and those kept aside."""
    pairs = load_rows(config.pairs, preferences.check_pairs)
    if config.held_out is None:
        kept, aside = split_rows(pairs.kept, config.held_out_rows, seed=0)
        return {"training": pairs._replace(kept=kept), "held-out": preferences.Kept(aside, {})}
    return {"training": pairs, "held-out": load_rows(config.held_out, preferences.check_pairs)}


def encoded(
    config: Config, rm: pg.RewardModel, tokenizer: Any, pair_sets: dict[str, preferences.Kept]
) -> tuple[list[preferences.Encoded], list[preferences.Encoded], list[list[int]]]:
    """Turn pairs and references into ids, saying which rows are left out: training pairs, held-out pairs, references."""
    limit = rm.arch.max_positions
    if config.max_length is not None and config.max_length > limit:
        raise UserError(f"max_length={config.max_length} is more than the model's {limit} positions")
    length = limit if config.max_length is None else config.max_length
    sets = []
    for name, pairs in pair_sets.items():
        found = preferences.encode_pairs(pairs, tokenizer, chat=config.chat, eos=config.eos, max_length=length)
        for note in found.notes():
            processes.print_once(f"{name} pairs: {note}")
        sets.append(found.kept)
    if config.reference is None:
        references = [ids for pair in sets[0][: config.reference_rows] for ids in (pair.chosen, pair.rejected)]
    else:
        answers = load_rows(config.reference, preferences.check_answers)
        answers = answers._replace(kept=answers.kept[: config.reference_rows])
        found = preferences.encode_references(answers, tokenizer, chat=config.chat, eos=config.eos, max_length=length)
        for note in found.notes():
            processes.print_once(f"references: {note}")
        references = found.kept
        if len(set(map(tuple, references))) < 2:
            raise UserError(
                f"{config.reference}: all references are the same: normalising needs at least 2 that differ"
            )
    return sets[0], sets[1], references


def finished(folder: Path) -> bool:
    """Say whether a run has been evaluated and its model saved."""
    return (folder / "model").exists() and any("normalized/accuracy" in row for row in logs.read_metrics(folder))


def summary(folder: Path) -> dict[str, float]:
    """Read off a finished run what it came to: before/NAME and eval/NAME on held-out pairs, and all of the last step."""
    rows = logs.read_metrics(folder)
    before, *_, after = [row for row in rows if "eval/accuracy" in row]
    last: dict[str, float] = {}
    for row in rows:
        if row["step"] == rows[-1]["step"]:
            last |= row
    start = {f"before/{name.removeprefix('eval/')}": value for name, value in before.items() if name != "step"}
    return {**start, **last, **after}


def check(config: Config) -> None:
    """Refuse a run that cannot work, before anything is read or computed."""
    checks.at_least_one(config, "held_out_rows", "reference_rows", "batch_size", "microbatches", "save_every", "keep")
    require(
        config.batch_size % config.microbatches == 0,
        f"batch_size={config.batch_size} does not divide into microbatches={config.microbatches}",
    )
    checks.above_zero(config, "epochs")
    require(
        config.max_length is None or config.max_length >= 2,
        f"max_length must be at least 2, or None, got {config.max_length}",
    )
    checks.not_negative(config, "learning_rate", "warmup_updates", "weight_decay", "center_coef")
    checks.seed_fits(config)
    check_lora(config)


if __name__ == "__main__":
    with plain_errors():
        figures = main(tyro.cli(Config, description=__doc__))
    if processes.is_process_0():
        print(
            f"held-out accuracy {figures['before/accuracy']:.3f} -> {figures['eval/accuracy']:.3f} +- "
            f"{figures['eval/accuracy_stderr']:.3f}"
        )
