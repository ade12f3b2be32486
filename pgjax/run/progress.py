"""Show a run as it goes: a progress bar on a terminal, plain lines elsewhere, samples with their scores."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from pgjax.parallel.processes import is_process_0

SHOWN = (
    ("score", "objective/scores", ".3f"),
    ("cross-entropy", "loss/cross_entropy", ".3f"),
    ("kl", "objective/kl", ".3f"),
    ("tok/s", "perf/tokens_per_second", ",.0f"),
)


def format_seconds(seconds: float) -> str:
    """Write a time as hours, minutes and seconds.

    Args:
        seconds: a time, in seconds.

    Returns:
        "m:ss" or "h:mm:ss".

    Example:
        >>> from pgjax.run.progress import format_seconds
        >>> format_seconds(75.2), format_seconds(3661)
        ('1:15', '1:01:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours > 0 else f"{minutes}:{rest:02d}"


def printable(text: str, encoding: str = "utf-8") -> str:
    """Make a model's text safe to print: it may hold terminal escapes, or letters the terminal has not.

    Args:
        text: what a model wrote.
        encoding: of the terminal.

    Returns:
        The text, lines kept; other white space is a space each, and what cannot be printed a mark.

    Example:
        >>> from pgjax.run.progress import printable
        >>> printable("a\\tcaf\u00e9\\x1b[2J", "ascii")
        'a caf??[2J'
    """
    safe = "".join(c if c.isprintable() or c == "\n" else " " if c.isspace() else "\ufffd" for c in text)
    return safe.encode(encoding, errors="replace").decode(encoding)


def samples_table(
    title: str, rows: Sequence[Mapping[str, Any]], scores: Sequence[str] = ("score",), *, encoding: str = "utf-8"
) -> Table:
    """Lay samples out with their scores.

    Args:
        title: above the table.
        rows: each a `prompt`, a `completion` and the scores.
        scores: their names; a column is named by what follows the last slash.
        encoding: of the terminal.

    Returns:
        A table for rich to print.

    Example:
        >>> from pgjax.run.progress import samples_table
        >>> row = {"prompt": "p", "completion": "c", "rewards/length": 1.0}
        >>> [column.header for column in samples_table("samples", [row], ["rewards/length"]).columns]
        ['prompt', 'completion', 'length']
    """
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("completion", ratio=4, overflow="fold")
    for name in scores:
        table.add_column(name.rpartition("/")[2], justify="right", no_wrap=True)
    for row in rows:
        texts = (printable(str(row[name]), encoding).strip("\n") for name in ("prompt", "completion"))
        # Text, not str: a completion with [brackets] is no markup
        table.add_row(*map(Text, texts), *(f"{float(row[name]):.3f}" for name in scores))
    return table


class Progress:
    """Show steps done, score, KL, tokens a second and time left.

    On a terminal this is one live bar; elsewhere (a log file, a pipe) a plain line now and then, with no
    control characters. Time left counts from the first update, so compilation does not inflate it.

    Args:
        total: the steps of the whole run.
        start: steps that were finished before (a resumed run).
        every: seconds between plain lines where there is no terminal.
        console: where to print; None for standard output, on process 0 alone.

    Example:
        >>> from pgjax.run.progress import Progress
        >>> with Progress(2) as progress:
        ...     progress.update(1, {"objective/scores": 0.25})
        ...     progress.update(2, {"objective/scores": 0.5})
        step 1/2  score 0.250
        step 2/2  score 0.500  left 0:00
    """

    def __init__(self, total: int, *, start: int = 0, every: float = 10.0, console: Console | None = None) -> None:
        self._console = Console(quiet=not is_process_0()) if console is None else console
        self._total = total
        self._every = every
        self._first: tuple[int, float] | None = None
        self._printed_at: float | None = None
        self._told = False  # that there are completions to which no reward applies
        self._bar: Bar | None = None
        if self._console.is_terminal:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=self._console, refresh_per_second=2)
            self._task = self._bar.add_task("compiling", total=total, completed=start)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the state after a step.

        Args:
            step: the number of steps finished so far, 1 to `total`.
            metrics: the step's metrics by name; those that the bar does not know are left out.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        if metrics.get("completions/not_judged", 0) > 0 and not self._told:
            self._told = True
            self.print(
                f"in step {step} no reward applies to {metrics['completions/not_judged']:.0f} completions: they are left out of "
                "the update, and completions/not_judged counts them from here on"
            )
        figures = self._figures(step, metrics, now)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=figures)
        elif self._printed_at is None or now - self._printed_at >= self._every or step >= self._total:
            self._printed_at = now
            self.print(f"step {step}/{self._total}  {figures}".rstrip())

    def _figures(self, step: int, metrics: Mapping[str, Any], now: float) -> str:
        parts = [f"{label} {float(metrics[name]):{form}}" for label, name, form in SHOWN if name in metrics]
        first_step, first_time = (step, now) if self._first is None else self._first
        if step > first_step:
            left = (now - first_time) / (step - first_step) * max(0, self._total - step)
            parts.append(f"left {format_seconds(left)}")
        return "  ".join(parts)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print an evaluation on held-out prompts: score with its standard error, and KL.

        Args:
            step: steps done.
            metrics: with "eval/scores", "eval/kl" and maybe "eval/scores_stderr".
        """
        error = f" +- {metrics['eval/scores_stderr']:.3f}" if "eval/scores_stderr" in metrics else ""
        self.print(
            f"held-out score after {step} steps: {metrics['eval/scores']:.3f}{error}, KL {metrics['eval/kl']:.2f}"
        )

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print a few samples with their scores as a table.

        Args:
            step: the step they were drawn at.
            rows: each a `prompt`, a `completion` and a `score`.
        """
        self._console.print(samples_table(f"samples at step {step}", rows, encoding=self._console.encoding))

    def print(self, text: str) -> None:
        """Print a line above the bar.

        Args:
            text: what to print, as it is: no markup, no highlighting.
        """
        text = printable(text, self._console.encoding)
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
