"""A task: prompts in, completions out, and the black box's scores beside them. What every LLM experiment here shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from pgjax.core.errors import UserError
from pgjax.data.padding import bucket_length, left_pad
from pgjax.data.prompts import TOOLS, as_tools, check_prompts, completion_ids, completion_texts, encode_prompts
from pgjax.data.sources import load_row_sets
from pgjax.data.stop_strings import ends_at_string, stop_table
from pgjax.data.tables import Row, left_out_notes
from pgjax.data.templates import names_tools
from pgjax.models.causal_lm import CausalLM
from pgjax.models.io.stops import stop_ids, stop_strings
from pgjax.parallel import batch_rows, processes
from pgjax.parallel.encoding import plain
from pgjax.parallel.sharding import fold_in, whole_groups
from pgjax.rollout import rewards, scoring
from pgjax.rollout.attempts import Attempts, attempt_figures, votes_of
from pgjax.rollout.calling import Caller
from pgjax.rollout.judge import REWARD_MODEL, ModelJudge
from pgjax.rollout.judged import SHOWN, Judged, joined, judged_only, mean
from pgjax.rollout.sample import Rollout, sample
from pgjax.run import stop
from pgjax.run.devices import agree_on
from pgjax.run.statistics import clustered_stderr


class Encoded(NamedTuple):
    """A row and the token ids of its prompt."""

    row: Row
    ids: list[int]


class Task(NamedTuple):
    """How to sample and judge; parameters come with each call. Batches are sampled whole, and judged by those who feed them."""

    lm: CausalLM
    tokenizer: Any
    judges: Sequence[rewards.Reward]
    weights: Sequence[float] | None  # None: 1 each
    prompt_sets: list[list[Encoded]]  # of each row set
    widths: tuple[int, ...]  # rising, in tokens: of each bucket of lengths, the longest prompt in it
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    eos_ids: tuple[int, ...]
    stop_table: np.ndarray | None  # of the texts that end a completion too
    pad_id: int  # never looked at: masks say what is padding
    reward_model: ModelJudge | None = None  # one more judge, on the device
    mesh: Mesh | None = None  # over which the rows of a batch are spread
    group_size: int = 1  # so many adjacent rows of a batch have one prompt, and are judged by one process
    caller: Caller | None = None  # how black boxes are called; None: one after the other
    lanes: int | None = None  # rows that are sampled at once
    min_new_tokens: int = 0  # of a completion
    eval_max_new_tokens: int | None = None  # of a completion in an evaluation; None: max_new_tokens
    attempts: Attempts | None = None  # what several completions of a prompt reach in an evaluation; None: not looked at

    def for_evaluation(self) -> Task:
        """Give the task with the longest completion that evaluations allow."""
        return self._replace(max_new_tokens=self.eval_max_new_tokens or self.max_new_tokens)

    def generate(self, params: Any, batch: Sequence[Encoded], key: jax.Array) -> Rollout:
        """Sample a completion for each prompt of a batch, given as to `padded`; returns while the device is still at it."""
        return sample(
            self.lm, params, *self.padded(batch), key,
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            group_size=whole_groups(self.mesh, len(batch), self.group_size), lanes=self.lanes,
            min_new_tokens=self.min_new_tokens, **self.ends(),
        )  # fmt: skip

    def ends(self) -> dict[str, Any]:
        """Give the arguments of `sample` that say where completions end."""
        return {"eos_ids": self.eos_ids, "stop_table": self.stop_table, "pad_id": self.pad_id}

    def padded(self, batch: Sequence[Encoded]) -> tuple[Any, Any]:
        """Pad prompts on the left, on the devices where there is a mesh: tokens and mask, [B, P] each.

        P is that of the longest prompt of all in the same bucket as the batch's longest: few shapes, few programs, and a prompt
        much longer than the others costs its own batches alone.

        Args:
            batch: all prompts of the batch, so that all processes choose the same P; each puts its own rows on its devices.
        """
        longest = max(len(prompt.ids) for prompt in batch)
        length = next(width for width in self.widths if width >= longest)
        fed = batch_rows.rows_to_feed(self.mesh, len(batch))
        tokens, mask = left_pad([batch[row].ids for row in fed], self.pad_id, length=length)
        return (tokens, mask) if self.mesh is None else batch_rows.feed(self.mesh, (tokens, mask))

    def judge(self, prompts: Sequence[Encoded], rollout: Rollout, *, vote: bool = False) -> Judged:
        """Decode the completions and put them before the black boxes, while the reward model scores them on the device.

        Each process decodes and judges its own rows; where a black box fails on one, all stop. With `vote` the completions are
        asked for their answers too, where `attempts` says how.
        """
        model_scores, size = self.queue_reward_model(prompts, rollout), len(rollout.tokens)
        group = whole_groups(None, size, self.group_size)
        judged_here = batch_rows.rows_to_judge(self.mesh, size, group)  # a part of those that are fed
        fed = dict(zip(batch_rows.rows_to_feed(self.mesh, size), prompts, strict=True))

        def judge_rows() -> tuple[list[int], Judged]:
            rows = [fed[i].row for i in judged_here]
            sampled = self._sampled(rollout, judged_here)
            completions = completion_texts(*sampled, self.tokenizer)
            numbered = zip(judged_here, rows, completions, strict=True)
            shown = [(i, plain(row["prompt"]), text) for i, row, text in numbered if i < SHOWN]
            ended = self._ended(*sampled)
            answers = self.attempts.answers if vote and self.attempts else None
            asking = [*self.judges, *([] if answers is None else [answers])]
            more = on_request(asking, *sampled, self.tokenizer, ended)
            lengths = sampled[1].sum(1)
            scores, parts = score_rows(
                self.judges, self.weights, rows, completions, more,
                lengths=lengths.tolist(), group_size=group, caller=self.caller,
            )  # fmt: skip
            of_tokens = None
            if scores.ndim == 2:
                of_tokens = np.pad(scores, ((0, 0), (0, self.max_new_tokens - scores.shape[1])))
                scores = scores.sum(1)
            votes = None if answers is None else votes_of(answers, rows, completions, more)
            return judged_here, Judged(scores, parts, ended, lengths, shown, of_tokens, votes)

        judged = joined(processes.gather_results(judge_rows), self.max_new_tokens)
        if model_scores is None or self.reward_model is None:
            return judged
        text_of = lambda i: completion_texts(*self._sampled(rollout, [i]), self.tokenizer)[0]
        more = self.reward_model.fetch(model_scores, lambda i: (fed[i].row["prompt"], text_of(i)), judged_here)
        parts = judged.parts | {REWARD_MODEL: more}
        weighted = np.float32(self.reward_model.weight) * more
        return judged.plus(weighted, applies=self.reward_model.weight != 0)._replace(parts=parts)

    def queue_reward_model(self, prompts: Sequence[Encoded], rollout: Rollout) -> jax.Array | None:
        """Queue the reward model's scores of a rollout; None without one."""
        if self.reward_model is None:
            return None
        fed = batch_rows.rows_to_feed(self.mesh, len(rollout.tokens))

        def read() -> tuple[list[str], np.ndarray]:  # with special tokens, which it sees where it takes ids too
            sampled = self._sampled(rollout, fed)
            return completion_texts(*sampled, self.tokenizer, keep_special=True), self._ended(*sampled)

        return self.reward_model.queue([prompt.row for prompt in prompts], rollout, read)

    def _sampled(self, rollout: Rollout, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Read rows of a rollout that this process feeds: tokens, and which of them were sampled."""
        tokens, mask = (batch_rows.local_rows(x, rows) for x in (rollout.tokens, rollout.mask))
        return tokens, mask

    def _ended(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        ended = np.isin(last_sampled(tokens, mask), self.eos_ids)
        return (
            ended if self.stop_table is None else ended | ends_at_string(self.stop_table, completion_ids(tokens, mask))
        )

    def rollouts(
        self, params: Any, prompts: Sequence[Encoded], batch_size: int, key: jax.Array
    ) -> Iterator[tuple[list[Encoded], int, Rollout]]:
        """Sample a completion for each prompt, batch by batch: those fed here, how many rows count, and what came of the batch.

        A short last batch is filled up with prompts of its own, so that it needs no program of its own.
        """
        fed = batch_rows.rows_to_feed(self.mesh, batch_size)
        for begin in range(0, len(prompts), batch_size):
            wanted = prompts[begin : begin + batch_size]
            batch = [wanted[i % len(wanted)] for i in range(batch_size)]
            yield [batch[i] for i in fed], len(wanted), self.generate(params, batch, fold_in(key, begin))

    def evaluate(
        self,
        params: Any,
        prompts: Sequence[Encoded],
        samples: int,
        batch_size: int,
        key: jax.Array,
        kl: Callable[[Rollout], jax.Array] | None = None,
    ) -> dict[str, float]:
        """Judge `samples` completions of each prompt: means over all of them, with standard errors clustered by prompt.

        `kl` gives nats a sequence [B], to the reference; "ended" is the share that ended by itself. There are no standard
        errors of a single prompt. With `attempts`, pass@k and majority@k of each prompt's completions are among them
        (`attempts.attempt_figures`). Completions to which no reward applies count in no mean; "not_judged" counts them. Between
        batches it gives up where the run is to stop (`stop.check`).
        """
        task = self.for_evaluation()._replace(group_size=whole_groups(None, samples, self.group_size))
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        found: dict[str, list[np.ndarray]] = {}
        votes: list[np.ndarray] = []
        for fed, count, rollout in task.rollouts(params, repeated, batch_size, key):
            stop.check()
            judged = task.judge(fed, rollout, vote=True)
            if judged.votes is not None:
                votes.append(judged.votes[:count])
            figures = {"scores": judged.scores, "ended": judged.ended}
            figures |= {f"rewards/{name}": part for name, part in judged.parts.items()}
            if kl is not None:
                figures["kl"] = processes.fetch(kl(rollout))
            for name, figure in figures.items():
                found.setdefault(name, []).append(figure[:count])
        whole = {name: np.concatenate(pieces).astype(np.float64) for name, pieces in found.items()}
        clusters = np.repeat(np.arange(len(prompts)), samples)

        def stderr(values: np.ndarray) -> float | None:
            applies = ~np.isnan(values)
            return clustered_stderr(values[applies], clusters[applies].tolist()) if applies.any() else None

        errors = {f"{name}_stderr": stderr(values) for name, values in whole.items()}
        known = {name: error for name, error in errors.items() if error is not None}
        not_judged = int(np.isnan(whole["scores"]).sum())
        counts = {"not_judged": float(not_judged)} if not_judged else {}
        reached = {}
        if self.attempts is not None:
            metric = "scores" if self.attempts.metric == "scores" else f"rewards/{self.attempts.metric}"
            if metric not in whole:
                names = ", ".join(name.removeprefix("rewards/") for name in whole if name.startswith("rewards/"))
                raise UserError(f"success_metric={self.attempts.metric!r} is none of scores, {names}")
            scores = whole[metric]
            voted = np.concatenate(votes).reshape(-1, samples) if votes else None
            reached = attempt_figures(scores.reshape(-1, samples), voted, self.attempts.success)
        return {name: mean(judged_only(values)) for name, values in whole.items()} | known | counts | reached


def read_task(
    specs: Sequence[str], prompts: str, held_out: str | None, held_out_rows: int
) -> tuple[list[rewards.Reward], tuple[list[Row], list[Row]], tuple[list[str], list[str]]]:
    """Load the rewards and the rows of a task, and check that they go together, alike on all processes.

    Args:
        specs: the rewards, each as module:function.
        prompts: source of the rows to train on, as for `data.sources.load_rows`.
        held_out: likewise, of those for evaluations; None: rows of `prompts`, kept aside.
        held_out_rows: how many are kept aside then.

    Returns:
        The rewards; the rows to train on and the held-out ones; the locations of both.

    Raises:
        UserError: a source or a reward that cannot be loaded, rows that are not prompts, or columns that a reward lacks.
    """

    def read() -> tuple[list[rewards.Reward], tuple[list[Row], list[Row]], tuple[list[str], list[str]]]:
        judges = [rewards.load_reward(spec) for spec in specs]
        train, aside = load_row_sets(prompts, held_out, held_out_rows, check_prompts)
        row_sets = [row for _, row in train], [row for _, row in aside]
        for rows in row_sets:
            check_columns(rows, judges)
        return judges, row_sets, ([place for place, _ in train], [place for place, _ in aside])

    judges, row_sets, places = processes.all_or_none(read)
    agree_on(f"the rows of {prompts}", row_sets)
    return judges, row_sets, places


def make_task(
    lm: CausalLM,
    tokenizer: Any,
    judges: Sequence[rewards.Reward],
    weights: Sequence[float] | None,
    row_sets: Sequence[Sequence[Row]],
    *,
    places: Sequence[Sequence[str]] | None = None,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    reward_model: ModelJudge | None = None,
    mesh: Mesh | None = None,
    group_size: int = 1,
    caller: Caller | None = None,
    lanes: int | None = None,
    min_new_tokens: int = 0,
    eval_max_new_tokens: int | None = None,
    attempts: Attempts | None = None,
) -> Task:
    """Encode the prompts of every row set; those that leave too little room in the model's positions are left out, and told.

    Args:
        lm: the policy's model.
        tokenizer: the policy's.
        judges: the black boxes.
        weights: one for each; None: 1 each.
        row_sets: rows with prompts; a column ``tools`` goes to the chat template of its row's prompt.
        places: the rows' locations, for messages; None: their numbers.
        chat: put prompts through the chat template.
        max_new_tokens: the longest completion.
        temperature: as of `sample`, like top_k and top_p.
        top_k: likewise.
        top_p: likewise.
        reward_model: one more judge.
        mesh: over which the rows of a batch are spread.
        group_size: so many adjacent rows of a batch have one prompt.
        caller: how black boxes are called; None: one after the other.
        lanes: as of `sample`, like min_new_tokens.
        min_new_tokens: likewise.
        eval_max_new_tokens: the longest completion in evaluations; None: max_new_tokens.
        attempts: what several completions of a prompt reach in evaluations; None: that is not looked at.

    Returns:
        The task.

    Raises:
        UserError: no tokenizer, a prompt that cannot be encoded, or a set of which no row is left.
    """
    if tokenizer is None:
        raise UserError("the model's source holds no tokenizer, and prompts are text: add its tokenizer files")
    positions = {"the model": lm.arch.max_positions}
    if reward_model is not None:
        positions["the reward model"] = reward_model.rm.arch.max_positions
    limits = [(max_new_tokens, "max_new_tokens")]
    if eval_max_new_tokens is not None:
        limits.append((eval_max_new_tokens, "eval_max_new_tokens"))
    for longest, name in limits:
        for whose, most in positions.items():
            if most - longest < 1:
                raise UserError(f"{name}={longest} leaves no room for a prompt in {most} positions of {whose}")
    apart = len(row_sets) == len(_SETS)  # the last is for evaluations alone
    if attempts is not None and attempts.answers is not None:
        for rows in row_sets:
            check_columns(rows, [attempts.answers])
    encoded = []
    for number, rows in enumerate(row_sets):
        prompts = [row["prompt"] for row in rows]
        names = [f"row {i} (counted from 0)" for i in range(len(rows))] if places is None else places[number]
        ids = encode_prompts(prompts, tokenizer, chat=chat, places=names, tools=[row.get(TOOLS) for row in rows])
        lengths = {"the model": list(map(len, ids))}
        if reward_model is not None:
            lengths["the reward model"] = reward_model.prompt_lengths(rows, ids)
        limit = limits[min(number, len(limits) - 1)] if apart else max(limits)
        fits = _fitting(names, lengths, positions, limit, _SETS[number] if apart else "")
        encoded.append([Encoded(rows[i], ids[i]) for i in fits])
    _tell_unused_tools(tokenizer, [prompt.row for prompts in encoded for prompt in prompts], chat)
    rising = sorted({len(prompt.ids) for prompts in encoded for prompt in prompts})
    longest_of = {bucket_length(length): length for length in rising}  # the last of each bucket stays
    widths = tuple(longest_of.values())
    agree_on("what the tokenizer makes of the rows", encoded)
    pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    eos_ids, strings = stop_ids(tokenizer), stop_table(stop_strings(tokenizer), tokenizer, lm.arch.vocab_size)
    return Task(
        lm, tokenizer, judges, weights, encoded, widths, max_new_tokens, temperature, top_k, top_p, eos_ids, strings,
        pad_id, reward_model, mesh, group_size, caller, lanes, min_new_tokens,
        eval_max_new_tokens, attempts,
    )  # fmt: skip


_SETS = ("training prompts: ", "held-out prompts: ")  # what row sets are called where there are two


def _fitting(
    places: Sequence[str],
    lengths: Mapping[str, Sequence[int]],
    positions: Mapping[str, int],
    limit: tuple[int, str],
    which: str,
) -> list[int]:
    """Number the prompts that leave room for a completion in every model's positions, and tell which do not.

    `limit` is the longest completion, and what its number is called.
    """
    left_out: dict[str, list[str]] = {}
    fits = []
    for i, place in enumerate(places):
        short = [whose for whose, counts in lengths.items() if counts[i] + limit[0] > positions[whose]]
        if not short:
            fits.append(i)
            continue
        why = f"whose prompt leaves no room for {limit[1]}={limit[0]} in the {positions[short[0]]} positions of "
        left_out.setdefault(why + short[0], []).append(f"{place} ({lengths[short[0]][i]:,} tokens)")
    notes = [f"{which}{note}" for note in left_out_notes(left_out)]
    if not fits:
        raise UserError(
            f"no row is left: {'; '.join(notes)}. Shorten the prompts, ask for fewer new tokens, or use a model with more "
            "positions"
        )
    if notes:
        processes.print_once("\n".join(notes))
    return fits


def _tell_unused_tools(tokenizer: Any, rows: Sequence[Row], chat: bool) -> None:
    """Tell that the tools of prompts are left out: by a chat template, or for want of one."""
    with_tools = [tools for row in rows if (tools := as_tools("a row", row.get(TOOLS))) is not None]
    if with_tools and not (chat and names_tools(tokenizer, with_tools[0])):
        why = "the chat template names no tools" if chat else "without a chat template no tools are written"
        processes.print_once(f"{why}: of the column 'tools', which {len(with_tools)} rows fill, prompts show nothing")


def on_request(
    judges: Sequence[rewards.Reward], tokens: Any, mask: Any, tokenizer: Any, ended: np.ndarray
) -> dict[str, list[Any]]:
    """Give of sampled rows what rewards name beside their texts, and nothing that none of them names.

    Args:
        judges: the rewards.
        tokens: [B, T] token ids, prompt and all.
        mask: [B, T] bool, True where the policy sampled the token.
        tokenizer: the policy's.
        ended: [B] True where the completion ended by itself.

    Returns:
        [B] values for each name.
    """
    make: dict[str, Callable[[], list[Any]]] = {
        "completion_ids": lambda: completion_ids(tokens, mask),
        "raw_completions": lambda: completion_texts(tokens, mask, tokenizer, keep_special=True),
        "ended": ended.tolist,
    }
    return {name: make[name]() for name in rewards.named_on_request(judges)}


def last_sampled(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Pick the last sampled token of each row, [B].

    Example:
      >>> last_sampled(np.array([[5, 6, 7], [5, 8, 0]]), np.array([[0, 1, 1], [0, 1, 0]]))
      array([7, 8])
    """
    return tokens[np.arange(len(tokens)), tokens.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)]


def score_rows(
    judges: Sequence[rewards.Reward],
    weights: Sequence[float] | None,
    rows: Sequence[Row],
    completions: Sequence[str],
    more: Mapping[str, Sequence[Any]] | None = None,
    **options: Any,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Put completions and their rows' columns before the black boxes: weighted sums, and each one's own scores.

    Without black boxes all sums are 0. `more` is what `on_request` gives; options and result are as of `scoring.score`.

    Example:
      >>> length = lambda prompts, completions, **columns: [float(len(text)) for text in completions]
      >>> score_rows([length], None, [{"prompt": "a"}], ["abc"])[0]
      array([3.], dtype=float32)
    """
    if not (judges and rows):
        nothing = np.zeros(len(rows), np.float32)
        return nothing, dict.fromkeys(rewards.reward_names(judges), nothing)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return scoring.score(judges, weights, columns.pop("prompt"), completions, columns, more, **options)


def check_columns(rows: Sequence[Row], judges: Sequence[rewards.Reward]) -> None:
    """Check that the rewards take the columns that the rows have."""
    for judge in judges:
        rewards.check_reward(judge, [name for name in rows[0] if name != "prompt"])
