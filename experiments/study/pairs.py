"""Pairs for the reward model: two samples of each prompt, and a judge with a known gold score who prefers one of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

import pgjax as pg
from experiments.tasks.gold import prefers_first
from pgjax.data.prompts import completion_ids, completion_texts
from pgjax.data.tables import Placed, Row
from pgjax.data.tokens import added_text
from pgjax.models.io.stops import set_stops, told_stops
from pgjax.parallel import processes, sharding
from pgjax.rollout import rewards
from pgjax.rollout.task import Encoded, Task, make_task, score_rows
from pgjax.run import checks
from pgjax.run.checkpoint.records import write_whole
from pgjax.run.statistics import clustered_stderr


@dataclasses.dataclass(frozen=True)
class Pairs:
    """How pairs are sampled from the fine-tuned model and judged."""

    train: int = 8192  # pairs to learn from
    held_out: int = 512  # pairs to measure on, of prompts kept aside
    scale: float = 8.0  # how sure the judge is: P(first preferred) = sigmoid(scale * (gold_first - gold_second))
    temperature: float = 1.0  # of the samples
    batch_size: int = 256  # completions sampled at once


def check_pairs(config: Pairs) -> None:
    """Refuse numbers that cannot work.

    Example:
      >>> check_pairs(Pairs(scale=0.0))
      Traceback (most recent call last):
      pgjax.UserError: pair.scale must be finite and above 0, got 0.0
    """
    checks.at_least_one(config, "train", "held_out", "batch_size", of="pair.")
    for name in ("temperature", "scale"):
        value = getattr(config, name)
        checks.require(0 < value < math.inf, f"pair.{name} must be finite and above 0, got {value}")


def make_pairs(
    config: Pairs, folder: Path, model: Path, placed_sets: Sequence[Placed],
    *, gold: str, chat: bool, max_new_tokens: int, seed: int, stop_tokens: Sequence[str] = (),
    stop_strings: Sequence[str] = (), dtype: str | None = None, mesh: Mesh | None = None,
) -> dict[str, float]:  # fmt: skip
    """Sample two completions of each prompt, let the judge prefer one, and write train.jsonl and held_out.jsonl.

    Args:
      config: how many, and how.
      folder: where the files go.
      model: source of the model that is sampled from.
      placed_sets: the prompts to train on, and those kept aside, with their locations; taken again from the start where there
        are too few.
      gold: the judge's score, as module:function.
      chat: put prompts through the chat template.
      max_new_tokens: the longest completion.
      seed: of the prompts' order, the samples and the judge's preferences.
      stop_tokens: that end a completion, as of `set_stops`; none: the model's own.
      stop_strings: texts that end one, likewise.
      dtype: of activations, as in `pgjax.load`.
      mesh: of the devices to sample on; None: one.

    Returns:
      Of both files: pairs, gold (mean), gold_stderr (clustered by prompt), gold_std, judge_right (share of pairs whose
      preferred answer has the higher gold).
    """
    processes.on_process_0(lambda: folder.mkdir(parents=True, exist_ok=True))
    lm, params, tokenizer = pg.load(model, dtype=dtype, mesh=mesh)
    tokenizer = set_stops(tokenizer, stop_tokens, stop_strings)
    processes.print_once(told_stops(tokenizer))
    figures: dict[str, float] = {}
    counts = {"train": config.train, "held_out": config.held_out}
    for i, ((name, count), placed) in enumerate(zip(counts.items(), placed_sets, strict=True)):
        task = make_task(
            lm, tokenizer, [], None, [[row for _, row in placed]], places=[[place for place, _ in placed]], chat=chat,
            max_new_tokens=max_new_tokens, temperature=config.temperature, mesh=mesh,
        )  # fmt: skip
        known = task.prompt_sets[0]
        order = np.random.default_rng([seed, i]).permutation(len(known))
        prompts = [known[order[k % len(known)]] for k in range(count) for _ in range(2)]
        processes.print_once(f"sampling two completions for each of {count} prompts ({name})")
        written = complete(task, params, prompts, config.batch_size, jax.random.key(2 * seed + i))
        rows = [prompt.row for prompt in prompts]
        work = functools.partial(
            write_pairs, folder / f"{name}.jsonl", gold, rows, written, scale=config.scale, seed=2 * seed + i
        )
        found = processes.on_process_0(work)
        figures |= {f"{name}_{key}": x for key, x in {"pairs": float(count), **found}.items()}
    return figures


def write_pairs(
    path: Path, gold: str, rows: Sequence[Row], written: Written, *, scale: float, seed: int
) -> dict[str, float]:
    """Judge completions by their gold score, write the pairs, and give the figures of `judge`."""
    more: dict[str, Sequence[Any]] = {"completion_ids": written.ids, "raw_completions": written.raw}
    scores, _ = score_rows([rewards.load_reward(gold)], None, rows, written.texts, more)
    checks.require(
        bool(np.isfinite(scores).all()), f"gold {gold} does not apply to every completion, and pairs need it to"
    )
    answers = [raw + end for raw, end in zip(written.raw, written.ends, strict=True)]
    pairs, found = judge(scores, rows, answers, scale=scale, seed=seed)
    write_lines(path, pairs)
    return found


class Written(NamedTuple):
    """Completions, a value of each list for each."""

    texts: list[str]
    raw: list[str]  # with special tokens, but for the one that ended it
    ends: list[str]  # the text of the token that ended it; "" where none did
    ids: list[list[int]]  # what was sampled


def complete(task: Task, params: Any, prompts: Sequence[Encoded], batch_size: int, key: jax.Array) -> Written:
    """Sample a completion for each prompt."""
    written = Written([], [], [], [])
    size = min(batch_size, len(prompts))
    sharding.check_batch(task.mesh, size, "the completions that are sampled at once")
    for _, count, rollout in task.rollouts(params, prompts, size, key):
        tokens, mask = (x[:count] for x in processes.fetch((rollout.tokens, rollout.mask)))
        ids = completion_ids(tokens, mask)
        written.texts.extend(completion_texts(tokens, mask, task.tokenizer))
        written.raw.extend(completion_texts(tokens, mask, task.tokenizer, keep_special=True))
        written.ends.extend(added_text(x[:-1], x[-1:], task.tokenizer) if x[-1] in task.eos_ids else "" for x in ids)
        written.ids.extend(ids)
    return written


def judge(
    gold: np.ndarray, rows: Sequence[Row], answers: Sequence[str], *, scale: float, seed: int
) -> tuple[list[Row], dict[str, float]]:
    """Let the judge prefer one of each two neighbours; special tokens and the one that ended a completion stay in its answer.

    PPO's reward model will see them, so it must see them while it learns.
    """
    first_wins = prefers_first(gold[::2].tolist(), gold[1::2].tolist(), scale=scale, seed=seed)
    chosen = [2 * k + (not wins) for k, wins in enumerate(first_wins)]
    rejected = [2 * k + wins for k, wins in enumerate(first_wins)]
    pairs = [
        {
            "prompt": rows[good]["prompt"], "chosen": answers[good], "rejected": answers[bad],
            "gold_chosen": float(gold[good]), "gold_rejected": float(gold[bad]),
        }
        for good, bad in zip(chosen, rejected, strict=True)
    ]  # fmt: skip
    right = np.mean(np.sign(gold[chosen] - gold[rejected]) / 2 + 0.5)  # equal scores count half
    stderr = clustered_stderr(gold, [repr(row["prompt"]) for row in rows])
    errors = {} if stderr is None else {"gold_stderr": stderr}
    return pairs, {"gold": float(gold.mean()), **errors, "gold_std": float(gold.std()), "judge_right": float(right)}


def write_lines(path: Path, rows: Sequence[Row]) -> None:
    """Write a JSON Lines file whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
