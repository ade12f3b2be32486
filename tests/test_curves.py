"""The picture of a run is drawn whatever part of the metrics is there."""

import builtins
import importlib.util
import math

import numpy as np
import pytest

from pgjax.run.curves import PANELS, plot_curves, running_mean, series
from pgjax.run.logs import Writer


def write_run(folder, *, steps, metrics):
    rng = np.random.default_rng(0)
    with Writer(folder) as writer:
        writer.write(0, {"eval/scores": 0.1, "eval/scores_stderr": 0.02})
        for step in range(steps):
            writer.write(step, {name: rng.normal() for name in metrics})
        writer.write(steps, {"eval/scores": 0.6, "eval/scores_stderr": math.nan})


def test_picture_is_small_and_holds_a_panel_a_metric(tmp_path):
    from PIL import Image

    write_run(tmp_path, steps=200, metrics=[panel.metric for panel in PANELS])
    path = plot_curves(tmp_path)
    assert path == tmp_path / "curves.png" and path.stat().st_size < 150_000
    whole = Image.open(path)
    assert 900 <= whole.width <= 1400
    write_run(tmp_path / "few", steps=200, metrics=["objective/scores", "objective/kl"])
    assert Image.open(plot_curves(tmp_path / "few")).height < whole.height


def test_held_out_scores_are_drawn(tmp_path):
    write_run(tmp_path, steps=5, metrics=["objective/scores"])
    with_eval = plot_curves(tmp_path).read_bytes()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(line for line in lines if "eval" not in line))
    assert plot_curves(tmp_path).read_bytes() != with_eval


def test_run_killed_before_its_first_step_has_no_picture(tmp_path):
    assert plot_curves(tmp_path) is None
    assert not (tmp_path / "curves.png").exists()


def test_missing_matplotlib_is_said_once_and_does_not_raise(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, steps=2, metrics=["objective/scores"])
    find, load = importlib.util.find_spec, builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    monkeypatch.setattr(builtins, "__import__", absent)
    assert plot_curves(tmp_path) is None
    assert capsys.readouterr().out.count("matplotlib is not installed") == 1


def test_values_that_are_not_finite_are_left_out():
    rows = [{"step": 0, "x": 1.0}, {"step": 1, "x": math.nan}, {"step": 2}, {"step": 3, "x": 2.0}]
    assert series(rows, "x") == ([0, 3], [1.0, 2.0])


@pytest.mark.parametrize("width", [1, 2, 5, 50])
def test_running_mean_is_centred_and_cut_at_the_ends(width):
    values = list(np.random.default_rng(1).normal(size=17))
    half = width // 2
    expected = [np.mean([v for j, v in enumerate(values) if abs(i - j) <= half]) for i in range(len(values))]
    np.testing.assert_allclose(running_mean(values, width), expected)
