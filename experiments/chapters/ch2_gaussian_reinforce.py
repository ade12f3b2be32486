"""Chapter 2: REINFORCE (Williams 1992) on a Gaussian: the black box of chapter 1, and a policy that guesses.

    python -m experiments.chapters.ch2_gaussian_reinforce        # 8 seconds; --help explains every field

The policy is N(mu, sigma). It samples x, the box answers with a score, and mu moves by score * (x - mu) / sigma^2: towards
what scored well, away from what scored badly. Chapter 3 trains a language model by the same few functions: play, loss, update.

What to expect: mu walks from -2 to 2 and nobody has differentiated the reward. The estimate is right on average and its
spread falls as 1 / sqrt(N). With N = 1 mu still arrives, but staggers; subtracting a running mean of past scores, a
baseline, leaves the average as it was and takes some four fifths of the variance at the peak.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import pgjax as pg
from experiments.chapters.ch1_black_box import parabola
from experiments.study.pictures import picture_path
from pgjax.run.curves import EVAL, GREY, INK, LINE


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    start: float = -2.0  # mu at first
    sigma: float = 1.0  # of the policy; it stays
    rate: float = 0.01  # mu <- mu - rate * gradient of the loss
    steps: int = 400  # of each training
    samples: int = 16  # N, drawn in a step of the first training; the later ones draw one
    memory: float = 0.1  # how fast the running mean follows the scores
    runs: int = 10  # trainings with N = 1, a seed each, without and with a baseline
    repeats: int = 2000  # estimates from which a spread is measured
    sizes: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)  # the N whose spread is measured
    seed: int = 0  # of everything
    picture: Path = Path("runs/chapters/ch2_gaussian_reinforce.png")  # where it is drawn
    refresh_pictures: bool = False  # draw over the picture that the tutorial shows


def play(mu: Any, sigma: float, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, np.ndarray]:
    """Let the policy sample x ~ N(mu, sigma), and put x before the black box, on the host."""
    x = mu + sigma * jax.random.normal(key, shape)
    return x, parabola(np.asarray(x))


def log_density(mu: Any, sigma: float, x: Any) -> jax.Array:
    """Compute log N(x; mu, sigma); its derivative by mu is the score (x - mu) / sigma^2."""
    return -0.5 * ((x - mu) / sigma) ** 2 - jnp.log(sigma * jnp.sqrt(2 * jnp.pi))


def loss_fn(mu: Any, sigma: float, x: Any, advantages: Any) -> jax.Array:
    """Compute the loss whose gradient is minus the REINFORCE estimate: -mean(advantages * log N(x; mu, sigma))."""
    return pg.policy_gradient_loss(log_density(mu, sigma, x), advantages)


@jax.jit
def update(mu: Any, sigma: float, x: Any, advantages: Any, rate: float) -> jax.Array:
    """Make one step up the estimated gradient."""
    return mu - rate * jax.grad(loss_fn)(mu, sigma, x, advantages)


def learn(config: Config, key: jax.Array, samples: int, memory: float) -> np.ndarray:
    """Train; give mu before the first step and after each. memory=0 keeps the baseline at 0, so there is none."""
    mu, baseline, path = jnp.float32(config.start), 0.0, [config.start]
    for step in range(config.steps):
        x, scores = play(mu, config.sigma, jax.random.fold_in(key, step), (samples,))
        mu = update(mu, config.sigma, x, scores - baseline, config.rate)
        baseline += memory * (float(scores.mean()) - baseline)  # only now: it must not know the scores that it judges
        path.append(float(mu))
    return np.array(path)


def estimates(config: Config, key: jax.Array, mu: float, samples: int, baseline: float = 0.0) -> np.ndarray:
    """Estimate the policy gradient at mu many times over, each from its own samples: [repeats]."""
    x, scores = play(mu, config.sigma, key, (config.repeats, samples))
    gradient = jax.jit(jax.vmap(jax.grad(loss_fn), in_axes=(None, None, 0, 0)))
    return -np.asarray(gradient(mu, config.sigma, x, scores - baseline))


def one_update(config: Config) -> dict[str, float]:
    """Follow one sample, x = 1.89, through one update."""
    x, scores = jnp.array([1.89]), parabola(np.array([1.89]))
    score = jax.grad(log_density)(config.start, config.sigma, 1.89)
    term = -jax.grad(loss_fn)(config.start, config.sigma, x, scores)
    mu = update(config.start, config.sigma, x, scores, config.rate)
    print(f"One update, mu = {config.start:g}, sigma = {config.sigma:g}, and the policy happens to sample x = 1.89:")
    print(f"  score    d log N(x; mu, sigma) / d mu = (x - mu) / sigma^2   = {score:5.2f}")
    print(f"  reward   R(x), from the black box                           = {scores[0]:5.2f}")
    print(f"  term     R(x) * score, minus the gradient of the loss       = {term:5.2f}")
    print(f"  update   mu + rate * term, rate = {config.rate:g}                      = {mu:5.2f}\n")
    return {"score": float(score), "reward": float(scores[0]), "term": float(term), "mu": float(mu)}


def the_loop(config: Config, key: jax.Array) -> np.ndarray:
    """Do it again and again with fresh samples."""
    path = learn(config, key, config.samples, memory=0.0)
    print(f"The loop, N = {config.samples} samples a step: play, loss, update")
    for step in [config.steps * part // 8 for part in (0, 1, 2, 4, 8)]:
        print(f"  step {step:4d}   mu = {path[step]:6.3f}")
    return path


def as_n_grows(config: Config, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Hold the estimate against the gradient that the formula gives; return its mean and its spread for each N."""
    print(f"\nThe estimate at mu = {config.start:g} as N grows, where -2 (mu - 2) = {-2 * (config.start - 2):g}:")
    guesses = [estimates(config, jax.random.fold_in(key, n), config.start, n) for n in config.sizes]
    means, spreads = np.mean(guesses, axis=1), np.std(guesses, axis=1)
    for n, mean, spread in zip(config.sizes, means, spreads, strict=True):
        error = spread / config.repeats**0.5
        print(f"  N = {n:4d}   spread {spread:6.3f}   mean of {config.repeats}: {mean:6.3f} ± {error:.3f}")
    return means, spreads


def one_sample(config: Config, key: jax.Array) -> tuple[list[np.ndarray], dict[str, float]]:
    """Train with N = 1 without and with a baseline; measure the variance of a term at the peak and how far mu wanders."""
    print(
        f"\nN = 1, {config.runs} seeds each, without and with a baseline b, the running mean of past scores: (R(x) - b) * score"
    )
    keys = jax.random.split(key, config.runs)
    expected = 10.0 - config.sigma**2  # E[R] at mu = 2, where the running mean settles
    paths, metrics = [], dict[str, float]()
    for name, memory, baseline in (("without", 0.0, 0.0), ("with", config.memory, expected)):
        paths.append(np.stack([learn(config, k, 1, memory) for k in keys]))
        variance = estimates(config, key, 2.0, 1, baseline).var()
        wander = np.sqrt(np.mean((paths[-1][:, config.steps // 2 :] - 2) ** 2))
        print(
            f"  b = {baseline:g} at mu = 2: variance of a term {variance:4.1f}; mu, late in training: 2 ± {wander:.2f} (rms)"
        )
        metrics |= {f"{name}/variance": float(variance), f"{name}/wander": float(wander)}
    return paths, metrics


def draw(config: Config, loop: np.ndarray, spreads: np.ndarray, paths: list[np.ndarray]) -> None:
    """Draw the walk of mu, the spread against N, and the walks with N = 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), dpi=110, layout="constrained")
    walk, spread, single = figure.subplots(1, 3)
    walk.plot(loop, color=LINE, linewidth=1.5, label=f"REINFORCE, N = {config.samples}")
    exact = 2 + (config.start - 2) * (1 - 2 * config.rate) ** np.arange(config.steps + 1)
    walk.plot(exact, color=INK, linewidth=1.0, label="by the analytic gradient")
    walk.set(xlabel="step", ylabel="mu", title="The loop")
    spread.loglog(config.sizes, spreads, "o", color=LINE, label="measured")
    spread.loglog(config.sizes, spreads[0] / np.sqrt(config.sizes), color=GREY, label="falls as 1 / sqrt(N)")
    spread.set(xlabel="N, samples in an estimate", ylabel="its standard deviation")
    spread.set_title(f"The estimate at mu = {config.start:g} (gradient: {-2 * (config.start - 2):g})")
    for group, colour, name in zip(paths, (EVAL, LINE), ("no baseline", "running mean"), strict=True):
        single.plot(group.T, color=colour, linewidth=0.6, alpha=0.6, label=[name] + [""] * (len(group) - 1))
    single.set(xlabel="step", ylabel="mu", title=f"N = 1, {config.runs} seeds each")
    for axes in (walk, spread, single):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    picture = picture_path(config.picture, config.refresh_pictures)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)
    print(f"\npicture: {picture}")


def main(config: Config) -> dict[str, float]:
    """Tell it in order: one update, the loop, N growing, N = 1; return the numbers told."""
    first, second, third = jax.random.split(jax.random.key(config.seed), 3)
    metrics = one_update(config)
    loop = the_loop(config, first)
    means, spreads = as_n_grows(config, second)
    paths, single = one_sample(config, third)
    draw(config, loop, spreads, paths)
    return metrics | single | {"loop/mu": float(loop[-1]), "last_n/mean": means[-1], "last_n/spread": spreads[-1]}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
