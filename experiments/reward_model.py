"""Learn a reward model from preferences: a language model's body, one linear score, and Bradley and Terry's loss.

    python -m experiments.reward_model --model runs/sft/model --pairs pairs.jsonl      # your own
    python -m experiments.reward_model                     # SmolLM2-135M-Instruct on pairs of film reviews
    python -m experiments.reward_model --help              # every field; --resume goes on with a run that was stopped
    python -m experiments.reward_model --mesh data=-1      # on all devices; --distributed: of several hosts (see devices.py)

pairs > ids > scores at the last token > -log sigmoid(chosen - rejected - margin) > update > mean 0, std 1 > saved

A row holds `prompt`, `chosen` and `rejected`, texts or lists of messages, maybe `tools` and `margin` (Touvron et al. 2023). At
the end scores are shifted and scaled once, to mean 0 and standard deviation 1 over reference answers (Stiennon et al. 2020).
OUTPUT/model opens in `transformers` as AutoModelForSequenceClassification, and in experiments.ppo as --reward-model.

On held-out pairs of reviews (seed 0), where the random labels let no judge be right in more than 83%, SmolLM2-135M-Instruct
goes from 43% to 61% (+- 4%) right in 24 updates of 16 pairs, 30 seconds an update on 2 busy cores.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import pgjax as pg
from experiments.study.reward_picture import plot_calibration
from pgjax.data import preferences
from pgjax.data.batches import batches, steps_of
from pgjax.data.sources import load_rows
from pgjax.learning import reward_learning
from pgjax.learning.optimizer import TrainState, adamw, init_state, revived
from pgjax.models.io.classifier import with_padding_token
from pgjax.models.lora import freeze
from pgjax.models.reward_model import from_causal_lm
from pgjax.parallel import batch_rows, processes
from pgjax.run import checks, devices, exits, logs, loop, presets, stop
from pgjax.run.checkpoint.resume import frozen_model, rows_digest, to_best
from pgjax.run.session import INCIDENTAL, RunFlags, load_options, open_session, session_options, settled, templated
from pgjax.run.summary import has_metric


@dataclasses.dataclass(frozen=True)
class Config(RunFlags):
    """One run. Every number that decides it stands here."""

    model: str = "SmolLM2-135M-Instruct"  # the language model to start from, best the one that PPO starts from
    # .jsonl, .csv or .parquet file, a data set as NAME:SPLIT, or module:function giving rows
    pairs: str = "experiments.tasks.review_pairs:train_rows"
    held_out: str | None = None  # likewise, for the evaluation; None: rows of `pairs`, kept aside
    held_out_rows: int = 256  # how many rows are kept aside where `held_out` is None
    reference: str | None = None  # rows with prompt and completion to normalise on; None: both answers of the pairs
    reference_rows: int = 1024  # the first so many of them, in pairs or in rows
    chat: bool = False  # put prompts that are texts through the chat template; messages always go through it
    eos: bool = True  # end each answer with the end of sequence; False where answers hold it themselves, if they ended
    max_length: int | None = None  # longest prompt with answer, in tokens; None: the model's positions
    use_margin: bool = True  # ask for the margin of the column `margin`, where there is one
    output: Path = Path("runs/reward_model")  # the run folder: config, metrics, picture, checkpoints, model
    epochs: float = 1.0  # passes over the pairs
    end_after: int | None = None  # updates after which the run ends, its model saved; None: all passes
    batch_size: int = 32  # pairs an update
    microbatches: int = 2  # parts of a batch, for memory; the gradient is the same
    learning_rate: float = 3e-5  # of AdamW, reached after the warm-up
    warmup_updates: int = 10  # updates over which the rate rises linearly
    decay: bool = True  # fall linearly to 0 over the run
    weight_decay: float = 0.0  # of AdamW, decoupled, on matrices only
    max_grad_norm: float = 1.0  # clip the gradient to this global norm
    center_coef: float = 0.01  # of the pull of a pair's sum towards 0 (Eisenstein et al. 2023); 0: none


def main(config: Config) -> dict[str, float]:
    """Learn; return the figures on held-out pairs before and after, and those of the normalisation."""
    check(config)
    with devices.on_devices(config) as mesh:
        return run(settled(config), mesh)


def run(config: Config, mesh: Mesh | None) -> dict[str, float]:
    """Do the work of `main` on the devices of a mesh, or on one; all processes of a run call this alike."""
    devices.check_batch_divides(mesh, config.batch_size, microbatches=config.microbatches)
    pair_sets, answers = processes.all_or_none(lambda: read_rows(config))
    lm, params, tokenizer = pg.load(config.model, mesh=mesh, **load_options(config))
    model = frozen_model(params)
    judge = from_causal_lm(lm, params, jax.random.key(config.seed), remat=config.remat)
    rm, params, tokenizer = with_padding_token(*judge, templated(tokenizer, config))
    checks.check_length(config.max_length, rm.arch.max_positions)
    (train_pairs, held_out), references, notes = processes.all_or_none(
        lambda: preferences.encode_sets(
            pair_sets, answers, tokenizer, chat=config.chat, eos=config.eos, reference_rows=config.reference_rows,
            max_length=rm.arch.max_positions if config.max_length is None else config.max_length,
        )
    )  # fmt: skip
    processes.print_once("\n".join(notes))
    differ = config.reference is None or len(set(map(tuple, references))) > 1
    checks.require(differ, f"{config.reference}: all references are the same: normalising needs at least 2 that differ")
    devices.agree_on(f"what the tokenizer makes of {config.pairs}", (train_pairs, held_out, references))
    updates = steps_of(config.epochs, len(train_pairs), config.batch_size)  # of all passes
    steps, warmup = min(updates, config.end_after or updates), min(config.warmup_updates, updates)
    optimizer = adamw(
        config.learning_rate, updates=updates, warmup=warmup, decay=config.decay, max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    frozen, trained = freeze(params, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed, mesh=mesh)
    state = init_state(trained, optimizer)
    del params, trained  # updates consume their buffers
    fed = batch_rows.rows_to_feed(mesh, config.batch_size)
    deal = batches(train_pairs, config.batch_size, seed=config.seed, places=fed)
    lengths = [max(len(pair.chosen), len(pair.rejected)) for pair in train_pairs]
    all_lengths = batches(lengths, config.batch_size, seed=config.seed)  # all processes take one program
    center_coef = devices.replicate(mesh, np.float32(config.center_coef))
    prompts = [pair.prompt for pair in held_out]

    def evaluate(trained: Any) -> tuple[np.ndarray, dict[str, float]]:
        scores = reward_learning.pair_scores(rm, pg.with_lora(frozen, trained), held_out, batch_size=config.batch_size)
        return scores, {f"eval/{name}": x for name, x in reward_learning.pair_metrics(scores, prompts).items()}

    def prepare(state: TrainState, i: int) -> Any:
        batch = reward_learning.pair_batch(deal[i], most=rm.arch.max_positions, longest=max(all_lengths[i]))
        return batch_rows.feed(mesh, batch if config.use_margin else batch._replace(margin=0 * batch.margin))

    def step(state: TrainState, i: int, batch: Any) -> tuple[TrainState, dict[str, Any], None]:
        state, metrics = reward_learning.update(
            state, batch, center_coef, frozen=frozen, rm=rm, optimizer=optimizer, microbatches=config.microbatches
        )
        saved = config.keep_best and ((i + 1) % config.save_every == 0 or i + 1 == steps)
        return state, metrics | (stop.unless_stopped(lambda: evaluate(state.params)[1]) if saved else {}), None

    with open_session(
        config.output, state, **session_options(config), steps=steps, data=rows_digest([train_pairs, held_out]), model=model,
        may_change=INCIDENTAL | {"save_every", "end_after", "model", "pairs", "held_out"},
    ) as session:  # fmt: skip

        def show(trained: Any, done: int) -> np.ndarray:
            scores, figures = evaluate(trained)
            processes.all_or_none(lambda: session.writer.write(done, figures))
            found = ", ".join(f"{name.removeprefix('eval/')} {x:.3f}" for name, x in figures.items())
            session.progress.print(f"after {done} of {steps} steps, on {len(held_out)} held-out pairs: {found}")
            return scores

        def save(trained: Any, to: Path) -> dict[str, float]:
            params, figures = reward_learning.normalized_on(
                rm, pg.with_lora(frozen, trained), references, held_out, batch_size=config.batch_size
            )  # once: nothing is refitted from here on
            session.progress.print(", ".join(f"{name} {x:.3f}" for name, x in figures.items()))
            pg.save_reward_model(to, rm, params, tokenizer)
            return figures

        if session.start == 0:
            show(session.state.params, 0)
        state = loop.run(
            revived(session.state), steps=steps, start=session.start, prepare=prepare, step=step, check=loop.check_finite,
            report=session.report, checkpoints=session.checkpoints, save_every=config.save_every,
            score=lambda metrics: -metrics["eval/loss"] if "eval/loss" in metrics else None,
        )  # fmt: skip
        if not processes.on_process_0(lambda: has_metric(config.output, steps, "normalized/accuracy")):
            scores = show(state.params, steps)
            if processes.is_process_0():
                plot_calibration(config.output / "calibration.png", scores)
            figures = save(state.params, config.output / "model")
            if config.keep_best:
                state, best = to_best(session.checkpoints, state)
                session.progress.print(f"model_best is the model after step {best}")
                save(state.params, config.output / "model_best")
            processes.all_or_none(lambda: session.writer.write(steps, figures))
        return processes.on_process_0(lambda: summary(config.output))


def read_rows(config: Config) -> tuple[dict[str, preferences.Kept], preferences.Kept | None]:
    """Read the pairs to learn from, those kept aside, and the references where they are not answers of the pairs."""
    pair_sets = preferences.load_pair_sets(config.pairs, config.held_out, config.held_out_rows)
    return pair_sets, None if config.reference is None else load_rows(config.reference, preferences.check_answers)


def summary(folder: Path) -> dict[str, float]:
    """Read off a finished run: before/NAME and eval/NAME on held-out pairs, and all metrics of the last step."""
    rows = logs.read_metrics(folder)
    before, *_, after = [row for row in rows if "eval/accuracy" in row]
    last = {name: x for row in rows if row["step"] == rows[-1]["step"] for name, x in row.items()}
    start = {f"before/{name.removeprefix('eval/')}": value for name, value in before.items() if name != "step"}
    return {**start, **last, **after}


def check(config: Config) -> None:
    """Refuse a run that cannot work, before anything is read or computed."""
    checks.check_run(config)
    checks.at_least_one(config, "reference_rows", "end_after")
    checks.above_zero(config, "epochs")
    checks.not_negative(config, "center_coef")
    checks.at_least(config, 2, "max_length")


if __name__ == "__main__":
    with exits.plain_errors():
        figures = main(presets.parse({"": Config()}, description=__doc__))
    if processes.is_process_0():
        print(f"held-out accuracy {figures['before/accuracy']:.3f} -> {figures['eval/accuracy']:.3f}")
