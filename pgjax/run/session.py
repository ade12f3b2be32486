"""What every training script opens and closes: the run folder, its snapshots, the log and the progress bar."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pgjax.core.errors import UserError
from pgjax.models.io.chat_template import set_template
from pgjax.models.io.tokenizer import missing_tokenizer
from pgjax.parallel import processes
from pgjax.run import checks, devices, logs, stop
from pgjax.run.checkpoint.checkpoints import Checkpoints
from pgjax.run.checkpoint.resume import From, go_on, last_step, open_checkpoints
from pgjax.run.curves import plot_curves
from pgjax.run.devices import MACHINE, Flags
from pgjax.run.owner import owned
from pgjax.run.progress import Progress
from pgjax.run.report.page import report_at_end
from pgjax.run.report.versions import record_versions
from pgjax.run.summary import has_metric
from pgjax.run.trackers import Tracker, Trackers

Dtype = Literal["float32", "bfloat16", "float16"] | None


@dataclasses.dataclass(frozen=True)
class RunFlags(Flags):
    """What every training script has beside where it runs: its folder, how it goes on, its precision, its adapters."""

    output: Path = Path("runs/run")  # the run folder: config, metrics, curves, checkpoints, model
    resume: bool = False  # go on with the run in `output`
    resume_from: From = None  # last-good: go on, from the newest snapshot that is whole where later ones are damaged
    resize_embedding: bool = False  # the tokenizer's tokens beyond the embedding get rows, the mean of the others
    template_args: str | None = None  # variables of the chat template in JSON, as {"enable_thinking": false}
    template_date: str | None = None  # that chat templates write, as 2026-11-30; None: the day when the run starts
    seed: int = 0  # of everything that is drawn at random
    dtype: Dtype = None  # of activations; None: bfloat16 on TPU and GPU, float32 on CPU and for a model from scratch
    lora_rank: int | None = None  # train adapters of this rank, at some ten times the rate; None: all parameters
    lora_alpha: float = 32.0  # the adapters' weight times the rank
    save_every: int = 50  # updates between checkpoints
    keep: int = 2  # how many of the latest checkpoints stay
    keep_best: bool = False  # keep the best checkpoint too, and save its model
    track: tuple[Tracker, ...] = ()  # send the metrics to these too: wandb, trackio
    track_project: str = "pgjax"  # under which they file the run

    @property
    def goes_on(self) -> bool:
        """Whether the run in `output` is gone on with."""
        return self.resume or self.resume_from is not None


ConfigT = TypeVar("ConfigT", bound=RunFlags)


def settled(config: ConfigT) -> ConfigT:
    """Settle what a config leaves open: where all processes find its folder, and which date chat templates write.

    A run that goes on keeps the date of its beginning, so that it reads the same prompts on another day.

    Args:
        config: of the script.

    Returns:
        The config with `output` and `template_date` filled in.

    Raises:
        UserError: as in `devices.shared_folder`, or the config of the run that is gone on with is damaged.

    Example:
        >>> settled(RunFlags(template_date="2026-11-30")).template_date
        '2026-11-30'
    """
    config = dataclasses.replace(config, output=devices.shared_folder(config.output))
    before = recorded(config, "template_date")
    today = processes.on_process_0(lambda: datetime.date.today().isoformat())
    return dataclasses.replace(config, template_date=config.template_date or before or today)


def recorded(config: RunFlags, field: str) -> Any:
    """Read a field that the run which is gone on with was started with, or went on with last.

    Args:
        config: of the script, settled.
        field: its name.

    Returns:
        Its value; None for a new run.

    Raises:
        UserError: the config of that run is damaged.

    Example:
        >>> recorded(RunFlags(), "seed") is None
        True
    """
    return processes.on_process_0(lambda: logs.recorded(config.output, field) if config.goes_on else None)


def load_options(config: RunFlags) -> dict[str, Any]:
    """Give the arguments of `pgjax.load` that a script's config holds.

    Args:
        config: of the script.

    Returns:
        The arguments dtype, remat and resize_embedding.

    Example:
        >>> load_options(RunFlags(dtype="bfloat16"))
        {'dtype': 'bfloat16', 'remat': False, 'resize_embedding': False}
    """
    return {name: getattr(config, name) for name in ("dtype", "remat", "resize_embedding")}


def templated(tokenizer: Any, config: Any) -> Any:
    """Fix in a tokenizer what its chat template is given, by what a script's config says of it.

    Args:
        tokenizer: changed in place; None: there is none.
        config: with the fields model, template_args and template_date.

    Returns:
        The same tokenizer.

    Raises:
        UserError: there is no tokenizer; or as in `checks.json_object` and `chat_template.set_template`.

    Example:
        >>> import types
        >>> templated(None, types.SimpleNamespace(model="models/tiny"))
        Traceback (most recent call last):
        pgjax.UserError: models/tiny holds no tokenizer: add its files
    """
    if tokenizer is None:
        raise UserError(missing_tokenizer(config.model))
    return set_template(tokenizer, args=checks.json_object(config, "template_args"), date=config.template_date)


def session_options(config: RunFlags) -> dict[str, Any]:
    """Give `open_session` what a script's config says of it.

    Args:
        config: of the script.

    Returns:
        The arguments config, keep, keep_best, resume, resume_from, track and track_project.

    Example:
        >>> session_options(RunFlags(keep=3))["keep"]
        3
    """
    names = ("keep", "keep_best", "resume", "resume_from", "track", "track_project")
    return {"config": dataclasses.asdict(config), **{name: getattr(config, name) for name in names}}


# Fields on which no result depends: any run may change them when it goes on
INCIDENTAL = frozenset({"output", "resume", "resume_from", "keep", "keep_best", "track", "track_project", *MACHINE})


class Session(NamedTuple):
    """A run that is open."""

    folder: Path
    state: Any  # to start or to go on from
    start: int  # steps that are done already
    checkpoints: Checkpoints
    writer: logs.Writer  # active on process 0 alone
    progress: Progress

    def report(self, done: int, metrics: dict[str, float], samples: Any = None, samples_every: int = 1) -> None:
        """Write and show the metrics of a step, an evaluation among them, and now and then its samples."""
        self.writer.write(done, metrics)
        if done > 0:  # the time that is left is reckoned from the first update on
            self.progress.update(done, metrics)
        if "eval/scores" in metrics:
            self.progress.evaluation(done, metrics)
        if samples and (done % samples_every == 0 or done == 1):
            self.writer.write_samples(done, samples)
            self.progress.samples(done, samples[:3])

    def evaluate(self, done: int, name: str, work: Callable[[], dict[str, float]], show: Callable[..., Any]) -> None:
        """Do the evaluation of a step, unless the metrics hold it, as those of a run that goes on may not.

        Args:
            done: steps done.
            name: of a metric that it gives.
            work: gives the metrics; all processes call it alike.
            show: (done, metrics) -> None; a report of them.
        """
        if not processes.on_process_0(lambda: has_metric(self.folder, done, name)):
            figures = work()
            processes.all_or_none(lambda: show(done, figures))


@contextlib.contextmanager
def open_session(
    folder: Path,
    state: Any,
    *,
    config: Mapping[str, Any],
    steps: int,
    may_change: Collection[str] = INCIDENTAL,
    keep: int = 2,
    keep_best: bool = False,
    resume: bool = False,
    resume_from: From = None,
    track: Collection[str] = (),
    track_project: str = "pgjax",
    **made_from: Any,
) -> Iterator[Session]:
    """Open a run, go on from its last snapshot where that is asked for, and close all of it in the end.

    One process at a time owns the folder (`owner.owned`). Signals to stop are heard from here on (`stop.stop_signals`). On the
    way out the curves and the report page are drawn and the snapshots closed, whatever has happened. All processes call this
    alike; files are written by process 0, but for the snapshots, of which each writes its part.

    Args:
        folder: of the run, as `devices.shared_folder` gives it; made where it is not there.
        state: a tree of arrays to start from; freed where a saved one takes its place.
        config: the fields of the run's config. A run goes on only with those that it was started with.
        steps: of the whole run.
        may_change: names of fields that may differ when a run goes on.
        keep: how many of the latest snapshots stay.
        keep_best: whether the one with the best score stays too.
        resume: whether to go on with the run in the folder.
        resume_from: as in `resume.go_on`; anything but None resumes.
        track: trackers that get the metrics too (`trackers.OPEN`).
        track_project: under which they file the run.
        made_from: fingerprints of data and frozen models; a snapshot goes on with no others.

    Yields:
        The open run.

    Raises:
        UserError: a folder that is not empty or in which another process runs, another config, or more steps done than `steps`.
        BadCheckpoint: a snapshot that is damaged or of another run.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with open_session(Path(folder, "run"), {"w": jnp.zeros(2)}, config={"seed": 0}, steps=3) as run:
        ...         run.writer.write(0, {"loss": 0.5})
        ...     run.start, sorted(path.name for path in run.folder.iterdir() if "events" not in path.name)
        (0, ['config.json', 'metrics.jsonl', 'report.html', 'samples.jsonl', 'versions.jsonl'])
    """
    resume = resume or resume_from is not None

    def open_folder() -> None:
        if resume and (folder / logs.CONFIG).exists():  # who runs in it is told before what does not fit it
            closing.enter_context(owned(folder))
        if resume and resume_from is None:  # before the new config is written
            _check_steps(steps, last_step(folder), folder)
        claim = lambda folder: None if resume else closing.enter_context(owned(folder))
        logs.open_run(folder, config, resume=resume, may_change=may_change, claim=claim)

    with contextlib.ExitStack() as closing:
        closing.enter_context(stop.stop_signals())
        processes.on_process_0(open_folder)
        checkpoints = open_checkpoints(folder, config, may_change, keep=keep, keep_best=keep_best, **made_from)
        closing.callback(checkpoints.close)
        state, start = go_on(checkpoints, state, resume=resume, resume_from=resume_from)
        _check_steps(steps, start, folder)
        writes, log_from = processes.is_process_0(), start + 1 if start else 0
        with (
            processes.all_or_none(lambda: logs.Writer(folder, start_step=log_from, active=writes)) as writer,
            Progress(steps, start=start) as progress,
        ):
            if writes:
                record_versions(folder, start)
                writer.also = Trackers(track, project=track_project, folder=folder, config=config)
            try:
                yield Session(folder, state, start, checkpoints, writer, progress)
            finally:
                if writes:
                    plot_curves(folder)
                    report_at_end(folder)


def _check_steps(steps: int, done: int, folder: Path) -> None:
    """Refuse to go on to a step that lies behind the run."""
    if done > steps:
        raise UserError(f"steps={steps} lies below the {done} steps that {folder} has done already")
