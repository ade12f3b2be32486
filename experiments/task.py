"""A task: prompts in, completions out, and the black box's scores beside them. What every LLM experiment here shares."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

import pgjax as pg
from experiments.devices import put_rows
from experiments.model_judge import REWARD_MODEL, ModelJudge
from pgjax import data, distributed, rewards
from pgjax.models.tokenizer import stop_ids
from pgjax.sharding import whole_groups
from pgjax.tables import Row


class Encoded(NamedTuple):
    """A row and the token ids of its prompt."""

    row: Row
    ids: list[int]


class Judged(NamedTuple):
    """What the black box says of a rollout, whole; on the host of every process."""

    completions: list[str]
    scores: np.ndarray  # [B] float32, weighted sum
    parts: dict[str, np.ndarray]  # each reward's own, [B]
    ended: np.ndarray  # [B] True where the completion ended by itself

    def samples(self, prompts: Sequence[Encoded], count: int) -> list[Row]:
        """Pair the first few prompts with what became of them."""
        parts = {f"rewards/{name}": part.tolist() for name, part in self.parts.items()}
        return [
            {
                "prompt": prompts[i].row["prompt"],
                "completion": self.completions[i],
                "score": float(self.scores[i]),
                **{name: part[i] for name, part in parts.items()},
            }
            for i in range(min(count, len(prompts)))
        ]


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
    reward_model: ModelJudge | None = None  # one more judge, on the device
    mesh: Mesh | None = None  # over which the rows of a batch are spread
    group_size: int = 1  # so many adjacent rows of a batch have one prompt, whose prefill they share

    def generate(self, params: Any, prompts: Sequence[Encoded], key: jax.Array) -> pg.Rollout:
        """Sample a completion for each prompt; returns while the device is still at it.

        All prompts are padded to the longest of all: one shape, so that nothing compiles once training is under way.
        """
        return pg.sample(
            self.lm, params, *self._padded(prompts), key,
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            eos_ids=self.eos_ids, pad_id=self.pad_id, group_size=self.group_size,
        )  # fmt: skip

    def generate_scored(self, params: Any, prompts: Sequence[Encoded], key: jax.Array) -> tuple[pg.Rollout, pg.Scored]:
        """Sample likewise, without filters, from {"lm", "value"}, and keep what these said on the way."""
        return pg.sample_scored(
            self.lm, params, *self._padded(prompts), key,
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, eos_ids=self.eos_ids, pad_id=self.pad_id,
            group_size=self.group_size,
        )  # fmt: skip

    def _padded(self, prompts: Sequence[Encoded]) -> tuple[Any, Any]:
        tokens, mask = data.left_pad([prompt.ids for prompt in prompts], self.pad_id, length=self.longest)
        return (tokens, mask) if self.mesh is None else put_rows(self.mesh, (tokens, mask))

    def judge(self, prompts: Sequence[Encoded], rollout: pg.Rollout, asked: jax.Array | None = None) -> Judged:
        """Decode the completions and put them before the black boxes; `asked` is what `ask` has queued, for its score.

        Each process decodes and judges its own rows; where a black box fails on one, all stop.
        """
        own = distributed.own_rows(len(prompts))
        tokens, mask = distributed.fetch((rollout.tokens, rollout.mask))
        pieces = distributed.shared(lambda: self._judge_rows(prompts[own], tokens[own], mask[own]))
        completions = [text for piece in pieces for text in piece.completions]
        scores, ended = (np.concatenate(x) for x in zip(*((y.scores, y.ended) for y in pieces), strict=True))
        parts = {name: np.concatenate([piece.parts[name] for piece in pieces]) for name in pieces[0].parts}
        if asked is not None and self.reward_model is not None:
            texts = [prompt.row["prompt"] for prompt in prompts]
            parts[REWARD_MODEL] = self.reward_model.fetch(asked, texts, completions)
            scores = scores + np.float32(self.reward_model.weight) * parts[REWARD_MODEL]
        return Judged(completions, scores, parts, ended)

    def _judge_rows(self, prompts: Sequence[Encoded], tokens: np.ndarray, mask: np.ndarray) -> Judged:
        completions, ended = self._texts(tokens, mask)
        if not self.judges:
            return Judged(completions, np.zeros(len(prompts), np.float32), {}, ended)
        rows = [prompt.row for prompt in prompts]
        return Judged(completions, *score_rows(self.judges, self.weights, rows, completions), ended)

    def _texts(self, tokens: np.ndarray, mask: np.ndarray) -> tuple[list[str], np.ndarray]:
        ended = np.isin(last_sampled(tokens, mask), self.eos_ids)
        return data.completion_texts(tokens, mask, self.tokenizer), ended

    def read(self, rollout: pg.Rollout) -> tuple[list[str], np.ndarray]:
        """Bring a rollout to the host whole: each completion, and whether it ended by itself."""
        return self._texts(*distributed.fetch((rollout.tokens, rollout.mask)))

    def ask(self, prompts: Sequence[Encoded], rollout: pg.Rollout) -> jax.Array | None:
        """Queue the reward model's scores of a rollout; None without one."""
        if self.reward_model is None:
            return None
        texts = [prompt.row["prompt"] for prompt in prompts]
        return self.reward_model.queue(texts, rollout, functools.partial(self.read, rollout))

    def rollouts(
        self, params: Any, prompts: Sequence[Encoded], batch_size: int, key: jax.Array
    ) -> Iterator[tuple[list[Encoded], int, pg.Rollout]]:
        """Sample a completion for each prompt, batch by batch: the batch's prompts, how many of them count, and what came of it.

        A short last batch is filled up with prompts of its own: one shape, one program.
        """
        for begin in range(0, len(prompts), batch_size):
            wanted = list(prompts[begin : begin + batch_size])
            filled = (wanted * batch_size)[:batch_size]
            yield filled, len(wanted), self.generate(params, filled, fold_in(key, begin))

    def evaluate(
        self,
        params: Any,
        prompts: Sequence[Encoded],
        samples: int,
        batch_size: int,
        key: jax.Array,
        kl: Callable[[pg.Rollout], jax.Array] | None = None,
    ) -> dict[str, float]:
        """Judge `samples` completions of each prompt: means over all of them, taken as independent for standard errors.

        `kl` gives nats a sequence [B], to the reference.
        """
        task = self._replace(group_size=whole_groups(None, samples, self.group_size))
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        found: dict[str, list[np.ndarray]] = {}
        for filled, count, rollout in task.rollouts(params, repeated, batch_size, key):
            judged = self.judge(filled, rollout, self.ask(filled, rollout))
            figures = {"scores": judged.scores, **{f"rewards/{name}": part for name, part in judged.parts.items()}}
            if kl is not None:
                figures["kl"] = distributed.fetch(kl(rollout))
            for name, figure in figures.items():
                found.setdefault(name, []).append(figure[:count])
        whole = {name: np.concatenate(pieces).astype(np.float64) for name, pieces in found.items()}
        errors = {f"{name}_stderr": _standard_error(whole[name]) for name in ("scores", "kl") if name in whole}
        return {name: float(np.mean(values)) for name, values in whole.items()} | errors


def _standard_error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


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
    reward_model: ModelJudge | None = None,
    mesh: Mesh | None = None,
    group_size: int = 1,
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
    if reward_model is not None:
        texts = [prompt.row["prompt"] for prompts in encoded for prompt in prompts]
        reward_model.check(texts, longest, max_new_tokens)
    pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    eos_ids = stop_ids(tokenizer)
    return Task(
        lm, tokenizer, judges, weights, encoded, longest, max_new_tokens, temperature, top_k, top_p, eos_ids, pad_id,
        reward_model, mesh, group_size,
    )  # fmt: skip


def last_sampled(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Pick the last sampled token of each row, [B].

    Example:
      >>> last_sampled(np.array([[5, 6, 7], [5, 8, 0]]), np.array([[0, 1, 1], [0, 1, 0]]))
      array([7, 8])
    """
    return tokens[np.arange(len(tokens)), tokens.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)]


def score_rows(
    judges: Sequence[rewards.Reward], weights: Sequence[float] | None, rows: Sequence[Row], completions: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Put completions and their rows' columns before the black boxes: weighted sums [B], and each one's own scores.

    Example:
      >>> length = lambda prompts, completions, **columns: [float(len(text)) for text in completions]
      >>> score_rows([length], None, [{"prompt": "a"}], ["abc"])[0]
      array([3.], dtype=float32)
    """
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return rewards.score(judges, weights, columns.pop("prompt"), completions, columns)


def fold_in(key: jax.Array, number: int) -> jax.Array:
    """Derive a key from a number of the host, sent to the device in the open."""
    return jax.random.fold_in(key, jax.device_put(np.uint32(number)))


def check_columns(rows: Sequence[Row], judges: Sequence[rewards.Reward]) -> None:
    """Check that the rewards take the columns that the rows have."""
    for judge in judges:
        rewards.check_reward(judge, [name for name in rows[0] if name != "prompt"])
