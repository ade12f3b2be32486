"""A task: prompts in, completions out, and the black box's scores beside them. What every LLM experiment here shares."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import pgjax as pg
from pgjax import data, rewards
from pgjax.models.tokenizer import stop_ids
from pgjax.prompts import check_rows, read_rows

Row = dict[str, Any]  # a prompt with its further columns


class Encoded(NamedTuple):
    """A row and the token ids of its prompt."""

    row: Row
    ids: list[int]


class Judged(NamedTuple):
    """What the black box says of a rollout; on the host."""

    completions: list[str]
    scores: np.ndarray  # [B] float32, weighted sum
    parts: dict[str, np.ndarray]  # each reward's own, [B]
    ended: np.ndarray  # [B] True where the completion ended by itself

    def samples(self, prompts: Sequence[Encoded], count: int) -> list[Row]:
        """Pair the first few prompts with what became of them."""
        triples = zip(prompts, self.completions, self.scores.tolist(), strict=True)
        return [{"prompt": x.row["prompt"], "completion": text, "score": score} for x, text, score in triples][:count]


class Task(NamedTuple):
    """How to sample and judge; the parameters come with each call."""

    lm: pg.CausalLM
    tokenizer: Any
    judges: Sequence[rewards.Reward]
    weights: Sequence[float] | None  # None: 1 each
    prompt_sets: list[list[Encoded]]  # of each row set
    longest: int  # tokens of the longest prompt of all
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    eos_ids: tuple[int, ...]
    pad_id: int  # never looked at: masks say what is padding

    def generate(self, params: Any, prompts: Sequence[Encoded], key: jax.Array) -> pg.Rollout:
        """Sample a completion for each prompt; returns while the device is still at it.

        All prompts are padded to the longest of all: one shape, so that nothing compiles once training is under way.
        """
        tokens, mask = data.left_pad([prompt.ids for prompt in prompts], self.pad_id, length=self.longest)
        return pg.sample(
            self.lm, params, tokens, mask, key,
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            eos_ids=self.eos_ids, pad_id=self.pad_id,
        )  # fmt: skip

    def judge(self, prompts: Sequence[Encoded], rollout: pg.Rollout) -> Judged:
        """Decode the completions and put them before the black box."""
        tokens, mask = jax.device_get((rollout.tokens, rollout.mask))
        completions = data.completion_texts(tokens, mask, self.tokenizer)
        columns = {name: [x.row[name] for x in prompts] for name in prompts[0].row}
        texts = columns.pop("prompt")
        scores, parts = rewards.score(self.judges, self.weights, texts, completions, columns)
        last = tokens[np.arange(len(tokens)), tokens.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)]
        return Judged(completions, scores, parts, np.isin(last, self.eos_ids))

    def evaluate(
        self, params: Any, prompts: Sequence[Encoded], samples: int, batch_size: int, key: jax.Array
    ) -> dict[str, float]:
        """Score `samples` completions of each prompt: their mean and its standard error, completions taken as independent."""
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        scores: list[float] = []
        for begin in range(0, len(repeated), batch_size):
            wanted = repeated[begin : begin + batch_size]
            filled = (wanted * batch_size)[:batch_size]  # one shape, one program: a short last batch is filled up
            rollout = self.generate(params, filled, fold_in(key, begin))
            scores += self.judge(filled, rollout).scores[: len(wanted)].tolist()
        error = np.std(scores, ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else np.nan
        return {"scores": float(np.mean(scores)), "scores_stderr": float(error)}


def make_task(
    lm: pg.CausalLM,
    tokenizer: Any,
    judges: Sequence[rewards.Reward],
    weights: Sequence[float] | None,
    row_sets: Sequence[Sequence[Row]],
    *,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Task:
    """Encode the prompts of every row set, refusing any that the model's positions cannot hold."""
    if tokenizer is None:
        raise ValueError("the model's source holds no tokenizer, and prompts are text: add its tokenizer files")
    limit = lm.arch.max_positions - max_new_tokens
    if limit < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in {lm.arch.max_positions} positions"
        )
    encoded = []
    for rows in row_sets:
        ids = data.encode_prompts([row["prompt"] for row in rows], tokenizer, chat=chat, max_length=limit)
        encoded.append([Encoded(*pair) for pair in zip(rows, ids, strict=True)])
    longest = max(len(prompt.ids) for prompts in encoded for prompt in prompts)
    pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    eos_ids = stop_ids(tokenizer)
    return Task(
        lm, tokenizer, judges, weights, encoded, longest, max_new_tokens, temperature, top_k, top_p, eos_ids, pad_id
    )


def fold_in(key: jax.Array, number: int) -> jax.Array:
    """Derive a key from a number of the host, sent to the device in the open."""
    return jax.random.fold_in(key, jax.device_put(np.uint32(number)))


def load_rows(source: str) -> list[Row]:
    """Read rows from a prompt file, or from a function given as module:function."""
    source = str(source)
    module, colon, name = source.partition(":")
    if not colon or Path(source).exists():
        return read_rows(source)
    try:
        function: Callable[[], list[Row]] = vars(importlib.import_module(module))[name]
    except (ImportError, KeyError) as error:
        raise ValueError(f"{source!r} is neither a prompt file nor a module:function ({error})") from error
    rows = list(function())
    if not rows:
        raise ValueError(f"{source} gives no rows")
    return check_rows([(f"{source}, row {i}", row) for i, row in enumerate(rows)])


def check_columns(rows: Sequence[Row], judges: Sequence[rewards.Reward]) -> None:
    """Check that the rewards take the columns that the rows have."""
    for judge in judges:
        rewards.check_reward(judge, [name for name in rows[0] if name != "prompt"])
