"""Chapter 1: the black box. Climb R(x) = -(x - 2)^2 + 10 with its gradient, then without.

    python -m experiments.chapters.ch1_black_box         # 2 seconds; --help explains every field

Part one knows the formula, so jax.grad gives the way up. Part two may only ask what R is at a point, as one may only ask
a reader what a poem is worth. It finds the way up by finite differences, and by the score function.

What to expect: all three reach the peak, x = 2. Finite differences stand at 1.95 after 40 queries; the score function needs
some 400, and then wanders within about 0.3 of the peak. On one smooth, noiseless dimension differences are hard to beat. But
they need two queries for every dimension, and a reward that a small step changes. The score function needs neither, and a
language model has millions of parameters, and words for actions. Chapter 2 makes REINFORCE of it.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.study.pictures import picture_path
from pgjax.run.curves import EVAL, GREY, INK, LINE

Query = Callable[[float], float]
Points = list[tuple[int, float]]  # (queries so far, x), before the first step and after each


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    start: float = -2.0  # x at first
    rate: float = 0.1  # of all three ascents: x <- x + rate * gradient
    steps: int = 30  # of the ascent with the gradient
    width: float = 0.5  # h of the finite differences
    sigma: float = 1.0  # spread of the score function's samples around x
    samples: int = 20  # queries that the score function averages in a step
    queries: int = 800  # what each of the two blind ascents may spend
    runs: int = 10  # of the score function, a seed each; the first is the one that is told
    seed: int = 0  # of the first
    picture: Path = Path("runs/chapters/ch1_black_box.png")  # where it is drawn
    refresh_pictures: bool = False  # draw over the picture that the tutorial shows


def parabola(x: Any) -> Any:
    """Compute R(x) = -(x - 2)^2 + 10 of a number or an array."""
    return -((x - 2.0) ** 2) + 10.0


def black_box() -> tuple[Query, list[float]]:
    """Close the parabola in a box: a function that only answers, and the list of what it was asked."""
    asked: list[float] = []

    def query(x: float) -> float:
        asked.append(float(x))  # a number of the host: jax cannot trace through it, nor differentiate it
        return float(parabola(asked[-1]))

    return query, asked


def finite_difference(query: Query, x: float, width: float) -> float:
    """Estimate dR/dx from both sides: (R(x + h) - R(x - h)) / 2h. Two queries."""
    return (query(x + width) - query(x - width)) / (2 * width)


def score_function(query: Query, x: float, sigma: float, samples: int, rng: np.random.Generator) -> float:
    """Estimate dR/dx as the mean of R(z) (z - x) / sigma^2 over z ~ N(x, sigma^2). One query a sample.

    Its expectation is the gradient of E[R(z)], of R blurred by sigma; the blur moves no parabola's peak.
    """
    return float(np.mean([query(z) * (z - x) / sigma**2 for z in rng.normal(x, sigma, samples)]))


def ascend(gradient: Callable[[float], float], start: float, rate: float, asked: list[float], queries: int) -> Points:
    """Step x <- x + rate * gradient(x) until the queries are spent."""
    path = [(0, start)]
    while len(asked) < queries:
        x = path[-1][1]
        x = x + rate * gradient(x)
        path.append((len(asked), x))
    return path


def with_gradient(config: Config) -> Points:
    """Part one: the formula is known, and jax differentiates it."""
    print("Part one, with the gradient: R(x) = -(x - 2)^2 + 10, dR/dx = -2 (x - 2), x <- x + rate * dR/dx")
    path = [(0, config.start)]
    for step in range(config.steps):
        x = path[-1][1]
        slope = float(jax.grad(parabola)(x))
        path.append((step + 1, x + config.rate * slope))
        if step < 3:
            print(f"  x = {x:6.3f}   R = {parabola(x):6.3f}   dR/dx = {slope:6.3f}   ->   x = {path[-1][1]:6.3f}")
    print(f"  ... and after {config.steps} steps x = {path[-1][1]:.3f}.\n")
    return path


def without_gradient(config: Config) -> tuple[Points, list[Points]]:
    """Part two: only query(x), which answers with a number. One path by differences, several by the score function."""
    query, asked = black_box()
    slope = functools.partial(finite_difference, query, width=config.width)
    differences = ascend(slope, config.start, config.rate, asked, config.queries)
    scores = []
    for seed in range(config.seed, config.seed + config.runs):
        query, asked = black_box()
        rng = np.random.default_rng(seed)
        slope = functools.partial(score_function, query, sigma=config.sigma, samples=config.samples, rng=rng)
        scores.append(ascend(slope, config.start, config.rate, asked, config.queries))
    return differences, scores


def side_by_side(config: Config, differences: Points, scores: Points) -> None:
    """Print where both blind paths stood at equal numbers of queries."""
    query, _ = black_box()
    print("Part two, only query(x):")
    print(f"  query(4) = {query(4.0):g} and query(0) = {query(0.0):g}: an answer alone does not say which way is up.")
    print(f"  finite differences:  (R(x + h) - R(x - h)) / 2h, h = {config.width:g}; 2 queries a step")
    print(
        f"  score function:      mean of R(z) (z - x) / sigma^2, z ~ N(x, sigma^2); {config.samples} queries a step\n"
    )
    print("  queries   x by finite differences   x by the score function")
    for queries in [config.queries * part // 40 for part in (0, 1, 2, 4, 10, 20, 40)]:
        one, other = ([x for spent, x in path if spent <= queries][-1] for path in (differences, scores))
        print(f"  {queries:7d}   {one:23.3f}   {other:23.3f}")


def draw(picture: Path, gradient: Points, differences: Points, scores: list[Points]) -> None:
    """Draw the parabola with the three paths, and x against queries."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    hill, race = figure.subplots(1, 2, width_ratios=(3, 4))
    hill.plot(line := np.linspace(-2.6, 5.0, 200), parabola(line), color=GREY, linewidth=1.5)
    for path in scores[1:]:
        race.step(*zip(*path, strict=True), where="post", color=EVAL, linewidth=0.7, alpha=0.35)
    names, paths = ("gradient", "finite differences", "score function"), (gradient, differences, scores[0])
    for number, (name, path, colour) in enumerate(zip(names, paths, (INK, LINE, EVAL), strict=True)):
        x = np.array([x for _, x in path])
        hill.plot(x, parabola(x) - 1.6 * number, ".-", color=colour, linewidth=0.8, markersize=7, label=name)
        race.step(*zip(*path, strict=True), where="post", color=colour, linewidth=1.8, label=name)
    race.axhline(2.0, color=GREY, linestyle="--", linewidth=1.0)
    race.set(xlabel="queries (with the gradient: gradients)", ylabel="x", title="What they cost; the peak is dashed")
    race.set(xscale="symlog", xlim=(0, 1.05 * differences[-1][0]))
    hill.set(xlabel="x", ylabel="R(x); two paths are shifted down", title="Three paths up the parabola")
    for axes in (hill, race):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)
    print(f"\n  picture: {picture}")


def main(config: Config) -> dict[str, float]:
    """Tell both parts and draw them; return where the paths led."""
    gradient = with_gradient(config)
    differences, scores = without_gradient(config)
    side_by_side(config, differences, scores[0])
    draw(picture_path(config.picture, config.refresh_pictures), gradient, differences, scores)
    late = np.array([x for path in scores for spent, x in path if spent > config.queries / 2])
    return {
        "gradient/first_x": gradient[1][1],
        "gradient/x": gradient[-1][1],
        "finite_difference/x": differences[-1][1],
        "score_function/x": scores[0][-1][1],
        "score_function/rms": float(np.sqrt(np.mean((late - 2) ** 2))),  # distance to the peak in the second half
    }


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
