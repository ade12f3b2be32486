"""What every loss, advantage and correction by name is an estimate of: cosine, bias and variance, exactly, on and off policy.

    python -m experiments.laboratory.catalogue                                # print the tables, draw the picture
    python -m experiments.laboratory.catalogue --write --refresh-pictures     # into experiments/README.md and its pictures

On the token MDP (`experiments/laboratory/token_mdp.py`) every batch of two sequences is enumerated, so nothing here is sampled:
the expected gradient and its variance are sums over all 65,536 of them, in float64.

    cosine   of the expected gradient to the exact one, that of the present policy's expected score
    rows     sequences until the noise of the mean is as long as the expected gradient: trace of the variance of one / length^2
    bias     |expected - exact| / |exact|

Off policy means that the samples are k updates old: each update moves every logit by 0.1 in its gradient's direction, as Adam's
first ones do. A sequence's KL (sampler || policy) is then 0.019 nats at k = 1, 0.28 at k = 4 and 1.0 at k = 8.

2 minutes on 2 quiet cores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro

from experiments.laboratory import exact_moments as em
from experiments.laboratory import token_mdp as mdp
from experiments.laboratory.catalogue_picture import plot
from experiments.laboratory.catalogue_rows import ADVANTAGES, CORRECTIONS, LOSSES, Known, Row
from experiments.study.pictures import picture_path

PAGE = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- python -m experiments.laboratory.catalogue --write: {} -->\n"
END = "<!-- end of the table -->\n"
AGES = (0, 1, 4)  # updates between sampler and policy, in the tables of losses and advantages
STALE = (1, 2, 4, 8, 12, 16)  # and of corrections
BATCH = 1024  # sequences, for the error of a whole batch


@dataclasses.dataclass(frozen=True)
class Config:
    """Where what is measured goes."""

    write: bool = False  # put the tables into experiments/README.md
    picture: Path = Path("runs/laboratory/catalogue.png")  # where it is drawn
    refresh_pictures: bool = False  # draw over the picture that the page shows


class Measured(NamedTuple):
    """What became of one estimator in one place."""

    cosine: float
    rows: float  # sequences until noise and signal are as long
    bias: float
    error: float  # |gradient of a batch of BATCH - exact| / |exact|, root mean square


def known(sampler: np.ndarray, prox: np.ndarray) -> Known:
    """Gather what is known of all 256 sequences, sampled by one policy, with another one between it and the present one."""
    logits = sampler[mdp.PREFIXES]
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    entropy = -(chances * np.log(np.where(chances > 0, chances, 1.0))).sum(-1)
    expected = np.full(mdp.COUNT, np.exp(mdp.exact_logprobs(sampler).sum(1)) @ em.SCORES)
    return Known(
        em.framed(mdp.exact_logprobs(sampler)), em.framed(mdp.exact_logprobs(prox)), em.framed(entropy),
        em.framed((chances**2).sum(-1)), em.SCORES, expected, mdp.MASK,
    )  # fmt: skip


def measure(row: Row, table: np.ndarray, sampler: np.ndarray, prox: np.ndarray | None = None) -> Measured:
    """Measure an estimator at a policy, on samples of another one."""
    found = em.moments(row.loss, known(sampler, sampler if prox is None else prox), table, sampler, em.PAIRS)
    exact = em.exact_gradient(table)
    variance = found.variance * em.PAIRS.shape[1] / float(exact @ exact)  # of one sequence
    bias = found.bias(exact)
    rows = found.noise * em.PAIRS.shape[1]
    return Measured(found.cosine(exact), rows, bias, float(np.sqrt(bias**2 + variance / BATCH)))


def at_age(row: Row, age: int) -> Measured:
    """Measure an estimator on samples that are so many updates old."""
    tables = em.policies(age)
    return measure(row, tables[age], tables[0], tables[age // 2])


def name_of(age: int) -> str:
    """Say how old samples are."""
    return {0: "on policy", 1: "1 update old"}.get(age, f"{age} updates old")


def samplers() -> dict[str, np.ndarray]:
    """Give the samplers that are the present policy, but for precision or a filter."""
    half = np.asarray(jnp.asarray(mdp.POLICY, jnp.float8_e4m3fn).astype(jnp.float32), np.float64)
    order = np.sort(np.exp(mdp.POLICY) / np.exp(mdp.POLICY).sum(1, keepdims=True), axis=1)[:, ::-1]
    last = np.argmax(np.cumsum(order, axis=1) >= 0.8, axis=1)  # the fewest tokens that reach the probability
    least = np.take_along_axis(order, last[:, None], axis=1)
    chances = np.exp(mdp.POLICY) / np.exp(mdp.POLICY).sum(1, keepdims=True)
    return {"float8 logits": half, "top-p 0.8": np.where(chances >= least, mdp.POLICY, -1e9)}


def table_of(rows: Mapping[str, Row], names: set[str] | None = None) -> str:
    """Measure losses or advantages: a table in Markdown, or only its rows of these names."""
    head = "| | of a token | estimates the gradient of |" + "".join(f" {name_of(age)}: cosine | rows |" for age in AGES)
    lines = [head, "|" + " --- |" * (3 + 2 * len(AGES))] if names is None else []
    for name, row in rows.items():
        if names is None or name in names:
            found = [at_age(row, age) for age in AGES]
            numbers = " | ".join(f"{x.cosine:.3f} | {x.rows:.0f}" for x in found)
            lines.append(f"| `{name}` | {row.formula} | {row.estimates} | {numbers} |")
    return "\n".join(lines) + "\n"


def table_of_corrections(measured: Mapping[str, Mapping[str, Measured]]) -> str:
    """Lay out bias and error of the corrections, a column a sampler."""
    places = list(next(iter(measured.values())))
    head = "| | weight of a token |" + "".join(f" {place}: bias | error |" for place in places)
    lines = [head, "|" + " --- |" * (2 + 2 * len(places))]
    for name, found in measured.items():
        numbers = " | ".join(f"{x.bias:.2f} | {x.error:.2f}" for x in found.values())
        lines.append(f"| {name} | {CORRECTIONS[name].formula} | {numbers} |")
    return "\n".join(lines) + "\n"


def correct(names: set[str] | None = None) -> dict[str, dict[str, Measured]]:
    """Measure every correction, or those of these names, for each sampler of the table."""
    chosen = {name: row for name, row in CORRECTIONS.items() if names is None or name in names}
    found = {name: {name_of(age): at_age(row, age) for age in AGES[1:]} for name, row in chosen.items()}
    for place, sampler in samplers().items():
        for name, row in chosen.items():
            found[name][place] = measure(row, mdp.POLICY, sampler)
    return found


def of_page(which: str) -> str:
    """Read a table that the page shows."""
    return PAGE.read_text().split(BEGIN.format(which))[1].split(END)[0]


def write(which: str, table: str) -> None:
    """Put a table into the page."""
    before, after = PAGE.read_text().split(BEGIN.format(which))
    PAGE.write_text(before + BEGIN.format(which) + table + END + after.split(END, 1)[1])


def main(config: Config) -> dict[str, float]:
    """Measure everything; return the bias of each correction at the greater age."""
    corrections = correct()
    tables = {"losses": table_of(LOSSES), "advantages": table_of(ADVANTAGES)}
    tables["corrections"] = table_of_corrections(corrections)
    for which, table in tables.items():
        print(table)
        if config.write:
            write(which, table)
    ages = {name: [at_age(row, age) for age in STALE] for name, row in CORRECTIONS.items()}
    divergences = [em.divergence(mdp.POLICY, em.policies(age)[age]) for age in STALE]
    of_losses = {name: [at_age(row, age) for age in AGES] for name, row in {**LOSSES, **ADVANTAGES}.items()}
    picture = picture_path(config.picture, config.refresh_pictures)
    plot(of_losses, AGES, ages, divergences, BATCH, picture)
    print(f"picture: {picture}")
    return {name: found[name_of(AGES[-1])].bias for name, found in corrections.items()}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
