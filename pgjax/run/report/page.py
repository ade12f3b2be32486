"""Write runs as one page, `report.html`, which opens from disk and loads nothing from anywhere."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pgjax.core.errors import UserError
from pgjax.run import logs
from pgjax.run.checkpoint.records import write_whole
from pgjax.run.report.versions import read_versions

REPORT = "report.html"
POINTS = 1000  # of a curve, at most
COMPLETIONS = 20_000  # of a run, at most
LETTERS = 20_000  # of a text, at most
PARTS = {"sampler": "timing/rollout", "reward": "timing/reward", "learner": "timing/update"}


def curve(rows: Sequence[Mapping[str, float]], name: str) -> dict[str, Any]:
    """Give the points of a metric, at most `POINTS` of them.

    Longer curves are averaged over neighbours; where a standard error is logged, every so many points are taken as they are.

    Args:
        rows: of a run's `metrics.jsonl`.
        name: of the metric; its standard errors are under NAME_stderr.

    Returns:
        steps, values and errors (None where none is logged) of the points; `lost`, the steps whose value is not finite;
        `every`, how many logged values a point stands for.

    Example:
        >>> curve([{"step": 0, "x": 0.5}, {"step": 1, "x": float("nan")}, {"step": 2, "x": 1.0, "x_stderr": 0.1}], "x")
        {'steps': [0, 2], 'values': [0.5, 1.0], 'errors': [None, 0.1], 'lost': [1], 'every': 1}
    """
    there = [row for row in rows if name in row]
    lost = [row["step"] for row in there if not math.isfinite(row[name])]
    points = [
        (row["step"], row[name], error if math.isfinite(error := row.get(f"{name}_stderr", math.nan)) else None)
        for row in there
        if math.isfinite(row[name])
    ]
    every = max(1, math.ceil(len(points) / POINTS))
    groups = [points[i : i + every] for i in range(0, len(points), every)]
    if any(error is not None for _, _, error in points):
        kept = [group[-1] for group in groups]
    else:
        kept = [(group[-1][0], math.fsum(value for _, value, _ in group) / len(group), None) for group in groups]
    steps, values, errors = (list(column) for column in zip(*kept, strict=True)) if kept else ([], [], [])
    return {"steps": steps, "values": values, "errors": errors, "lost": lost[:POINTS], "every": every}


def seconds(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Add up where the time of a run went, by its logged seconds.

        models = sum of max(0, timing/score - timing/reward),    rest = sum of timing/iteration - all others

    Args:
        rows: of a run's `metrics.jsonl`.

    Returns:
        Seconds by part: sampler, reward, "other models" (what the reference, critic and reward model took beyond the reward),
        learner, and "rest": evaluation, logs, snapshots and idle. Parts that are not logged are left out.

    Example:
        >>> times = {"rollout": 2.0, "reward": 1.0, "score": 1.5, "update": 3.0, "iteration": 7.0}
        >>> seconds([{f"timing/{name}": value for name, value in times.items()}])
        {'sampler': 2.0, 'reward': 1.0, 'other models': 0.5, 'learner': 3.0, 'rest': 0.5}
    """
    total = lambda name: math.fsum(row[name] for row in rows if math.isfinite(row.get(name, math.nan)))
    found = {part: total(name) for part, name in PARTS.items() if any(name in row for row in rows)}
    if any("timing/score" in row for row in rows):
        found["other models"] = max(0.0, total("timing/score") - total("timing/reward"))
    if any("timing/iteration" in row for row in rows):
        found["rest"] = max(0.0, total("timing/iteration") - sum(found.values()))
    return {part: found[part] for part in ("sampler", "reward", "other models", "learner", "rest") if part in found}


def completions(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Give the samples of a run as columns: the first half and the last where there are more than `COMPLETIONS`.

    Args:
        rows: of a run's `samples.jsonl`.

    Returns:
        step, prompt, completion and score, a list each, and `left_out`, how many samples are not among them.

    Example:
        >>> completions([{"step": 1, "prompt": "p", "completion": "c", "score": 0.5}])
        {'step': [1], 'prompt': ['p'], 'completion': ['c'], 'score': [0.5], 'left_out': 0}
    """
    half = COMPLETIONS // 2
    kept = rows if len(rows) <= COMPLETIONS else [*rows[:half], *rows[-half:]]
    number = lambda x: float(x) if isinstance(x, (int, float)) and math.isfinite(x) else None
    return {
        "step": [row["step"] for row in kept],
        **{name: [_text(row.get(name)) for row in kept] for name in ("prompt", "completion")},
        "score": [number(row.get("score")) for row in kept],
        "left_out": len(rows) - len(kept),
    }


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    return text if len(text) <= LETTERS else f"{text[:LETTERS]} [... {len(text) - LETTERS:,} more characters]"


def run_data(folder: Path) -> dict[str, Any]:
    """Read what the page shows of a run.

    Args:
        folder: of the run.

    Returns:
        Its name, folder, config, versions, curves by metric, seconds by part, and completions.

    Raises:
        UserError: there is no run in the folder, or one of its files is damaged.
    """
    if not (folder / logs.CONFIG).is_file():
        raise UserError(f"there is no run in {folder} (no {logs.CONFIG})")
    rows = logs.read_metrics(folder)
    names = {name: None for row in rows for name in row if name != "step"}
    return {
        "name": folder.resolve().name,
        "folder": str(folder),
        "config": logs.read_config(folder / logs.CONFIG),
        "versions": read_versions(folder),
        "curves": {name: curve(rows, name) for name in names if not name.endswith("_stderr")},
        "seconds": seconds(rows),
        "iterations": sum("timing/update" in row for row in rows),
        "completions": completions(logs.read_lines(folder / logs.SAMPLES)),
    }


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """Lay runs out as a page of HTML.

    All that comes from a run is JSON in ASCII without `<`, `>` and `&`, and the page's script writes it as text, never as markup.

    Args:
        runs: as `run_data` gives them; their curves are drawn over each other.

    Returns:
        The page, with its style and its script in it.

    Example:
        >>> "</script><b>" in page([{"name": "</script><b>"}])
        False
    """
    part = lambda name: Path(__file__).with_name(name).read_text(encoding="utf-8")
    data = json.dumps(list(runs))
    for letter in "<>&":
        data = data.replace(letter, f"\\u{ord(letter):04x}")
    title = html.escape(", ".join(str(run["name"]) for run in runs)).encode("ascii", "xmlcharrefreplace").decode()
    pieces = {"TITLE": title, "STYLE": part("page.css"), "SCRIPT": part("page.js"), "DATA": data}
    first, *rest = part("page.html").split("{{")
    return first + "".join(pieces[name] + text for name, text in (piece.split("}}", 1) for piece in rest))


def write_report(folders: Sequence[Path], path: Path) -> Path:
    """Write the page of runs.

    Args:
        folders: of the runs.
        path: of the page.

    Returns:
        The path.

    Raises:
        UserError: a folder without a run, or a damaged file in it.
    """
    text = page([run_data(folder) for folder in folders])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path


def report_at_end(folder: Path) -> None:
    """Write a run's page into its folder; what goes wrong is told in a line, and ends no run.

    Args:
        folder: of the run.
    """
    try:
        write_report([folder], folder / REPORT)
    except Exception as error:  # of whatever kind: the run has something to say that this must not hide
        print(f"no report page: {type(error).__name__}: {error}")
