"""What a finished run changed, read off its metrics file."""

from __future__ import annotations

import math
from pathlib import Path

from pgjax.core.errors import UserError
from pgjax.run import logs


def before_and_after(folder: Path, name: str, *, last: str) -> dict[str, float]:
    """Compare the first and the last evaluation of a run.

    rise = (after - before) / sqrt(stderr_before^2 + stderr_after^2), where both evaluations have a standard error

    Args:
        folder: of the run.
        name: of the metric that is compared, such as "eval/scores"; its standard error is under NAME_stderr.
        last: a metric that each step has; of the last such step all metrics are returned.

    Returns:
        "eval/before", "eval/after", maybe "eval/rise_in_stderr"; the last step's and the last evaluation's metrics.

    Raises:
        UserError: fewer than two evaluations are in the file.
    """
    rows = logs.read_metrics(folder)
    evaluations = [row for row in rows if name in row]
    if len(evaluations) < 2:
        raise UserError(
            f"{folder / logs.METRICS} holds {len(evaluations)} of the run's evaluations, and the first and the last are "
            "compared: it was cut or removed"
        )
    before, after = evaluations[0], evaluations[-1]
    figures = {"eval/before": before[name], "eval/after": after[name]}
    errors = [row[f"{name}_stderr"] for row in (before, after) if f"{name}_stderr" in row]
    if len(errors) == 2:
        error, rise = math.hypot(*errors), after[name] - before[name]
        figures["eval/rise_in_stderr"] = rise / error if error else math.copysign(math.inf, rise) if rise else 0.0
    return {**figures, **[row for row in rows if last in row][-1], **after}


def has_metric(folder: Path, step: int, name: str) -> bool:
    """Say whether a run's metrics hold a metric of a step.

    Example:
        >>> has_metric(Path("no-such-run"), 3, "eval/scores")
        False
    """
    return any(row["step"] == step and name in row for row in logs.read_metrics(folder))


def comparison(figures: dict[str, float]) -> str:
    """Write the comparison of `before_and_after` as a line.

    Example:
        >>> comparison({"eval/before": 0.25, "eval/after": 0.5, "eval/rise_in_stderr": 8.0})
        'held-out score 0.250 -> 0.500, a rise of 8.0 standard errors'
    """
    line = f"held-out score {figures['eval/before']:.3f} -> {figures['eval/after']:.3f}"
    if "eval/rise_in_stderr" not in figures:
        return line
    return f"{line}, a rise of {figures['eval/rise_in_stderr']:.1f} standard errors"
