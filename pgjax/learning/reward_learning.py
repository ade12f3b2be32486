"""Learn a reward model from preferences: the update, scores of held-out pairs, and how far they can be believed."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.core.losses import preference_loss
from pgjax.data.padding import bucket_length, right_pad
from pgjax.data.preferences import EncodedPair
from pgjax.learning.optimizer import Metrics, TrainState, Transformation, accumulate, apply_gradient
from pgjax.models.lora import with_lora
from pgjax.models.reward_model import RewardModel, normalized
from pgjax.parallel.processes import fetch
from pgjax.parallel.sharding import batch_sharding, mesh_of, place
from pgjax.run import stop
from pgjax.run.statistics import clustered_stderr


class PairBatch(NamedTuple):
    """Pairs side by side; the chosen answer comes first."""

    tokens: Any  # [B, 2, T] int32
    attention_mask: Any  # [B, 2, T] bool
    margin: Any  # [B] float32


def pair_batch(pairs: Sequence[EncodedPair], *, most: int, longest: int | None = None) -> PairBatch:
    """Put pairs side by side, padded to a bucket's length: few lengths, few programs.

    Args:
      pairs: B of them.
      most: the longest T, the model's positions.
      longest: tokens of the longest answer that the bucket is to hold, where these pairs are a process's part of a batch and
        another's may be longer; None: of these pairs.

    Returns:
      The batch, on the host.

    Example:
      >>> pair_batch([EncodedPair([1, 2], [1, 3, 4], 0.5)], most=64).tokens.shape
      (1, 2, 16)
    """
    rows = [ids for pair in pairs for ids in (pair.chosen, pair.rejected)]
    length = min(bucket_length(max(map(len, rows)) if longest is None else longest), most)
    tokens, mask = right_pad(rows, length)
    margin = np.array([pair.margin for pair in pairs], np.float32)
    return PairBatch(tokens.reshape(-1, 2, length), mask.reshape(-1, 2, length), margin)


@functools.partial(jax.jit, static_argnames=("rm", "optimizer", "microbatches"), donate_argnames="state")
def update(
    state: TrainState, batch: PairBatch, center_coef: jax.Array, frozen: dict[str, Any] | None = None,
    *, rm: RewardModel, optimizer: Transformation, microbatches: int,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Take one step down the Bradley-Terry loss of a batch; both answers of a pair go through the model in one batch.

    L = mean -log sigmoid(chosen - rejected - margin) + center_coef * mean (chosen + rejected)^2: `preference_loss`. The
    body's parameters, or adapters to them, learn as well as the head's.

    Args:
      state: consumed.
      batch: [B, 2, T].
      center_coef: [] weight of the pull of a pair's sum towards 0.
      frozen: {"lm": parameters} where `state.params["lm"]` are adapters to them (`lora`); None: all are trained.
      rm: the model's functions.
      optimizer: the one that made the state.
      microbatches: divides B; the gradient is the same, the memory less.

    Returns:
      The state after the step, and {"loss/preference", "train/accuracy", "train/margin", "train/scores",
      "train/grad_norm", "train/healthy", "lr"}.

    Example:
      >>> from pgjax.learning.optimizer import adamw, init_state
      >>> from pgjax.models.io.config import architecture_of
      >>> from pgjax.models.reward_model import reward_model
      >>> config = {"model_type": "gpt2", "vocab_size": 8, "n_embd": 4, "n_layer": 1, "n_head": 2}
      >>> rm, optimizer = reward_model(architecture_of(config)), adamw(1e-3, updates=1)
      >>> state = init_state(rm.init(jax.random.key(0)), optimizer)
      >>> batch = pair_batch([EncodedPair([1, 2], [1, 3], 0.0)], most=64)
      >>> state, metrics = update(state, batch, jnp.float32(0.0), rm=rm, optimizer=optimizer, microbatches=1)
      >>> int(state.updates), bool(metrics["loss/preference"] > 0)
      (1, True)
    """

    def loss_fn(params: Any, part: PairBatch) -> tuple[jax.Array, Metrics]:
        scores = _scores(rm, with_lora(frozen, params), part)
        chosen, rejected = scores[:, 0], scores[:, 1]
        loss = preference_loss(chosen, rejected, margin=part.margin, center_coef=center_coef)
        right = jnp.mean((jnp.sign(chosen - rejected) + 1) / 2)  # a tie is half right
        return loss, {
            "train/accuracy": right,
            "train/margin": (chosen - rejected).mean(),
            "train/scores": scores.mean(),
        }

    weight = jnp.ones(batch.margin.shape[0], jnp.float32)
    gradient, metrics = accumulate(loss_fn, state.params, batch, weight, microbatches)
    loss = metrics.pop("loss")
    state, stepped = apply_gradient(state, gradient, loss, optimizer)
    return state, {"loss/preference": loss, **metrics, **stepped}


def pair_scores(rm: RewardModel, params: Any, pairs: Sequence[EncodedPair], *, batch_size: int) -> np.ndarray:
    """Score both answers of any number of pairs.

    Args:
      rm: the model's functions.
      params: its parameters.
      pairs: N of them.
      batch_size: pairs that are scored at a time.

    Returns:
      [N, 2] float32, chosen and rejected.

    Example:
      >>> from pgjax.models.io.config import architecture_of
      >>> from pgjax.models.reward_model import reward_model
      >>> config = {"model_type": "gpt2", "vocab_size": 8, "n_embd": 4, "n_layer": 1, "n_head": 2}
      >>> rm = reward_model(architecture_of(config))
      >>> pair_scores(rm, rm.init(jax.random.key(0)), [EncodedPair([1, 2], [1, 3], 0.0)], batch_size=4).shape
      (1, 2)
    """
    rows = [ids for pair in pairs for ids in (pair.chosen, pair.rejected)]
    return _in_batches(_score_rows, rm, params, rows, 2 * batch_size).reshape(-1, 2)


def features(rm: RewardModel, params: Any, rows: Sequence[Sequence[int]], *, batch_size: int) -> np.ndarray:
    """Compute what the head scores of any number of rows, for `models.reward_model.normalized`.

    Args:
      rm: the model's functions.
      params: its parameters.
      rows: token ids of N rows.
      batch_size: rows at a time.

    Returns:
      [N, D] float32.

    Example:
      >>> from pgjax.models.io.config import architecture_of
      >>> from pgjax.models.reward_model import reward_model
      >>> config = {"model_type": "gpt2", "vocab_size": 8, "n_embd": 4, "n_layer": 1, "n_head": 2}
      >>> rm = reward_model(architecture_of(config))
      >>> features(rm, rm.init(jax.random.key(0)), [[1, 2], [1], [3]], batch_size=2).shape
      (3, 4)
    """
    return _in_batches(_feature_rows, rm, params, rows, batch_size)


def pair_metrics(scores: np.ndarray, prompts: Sequence[Hashable] | None = None) -> dict[str, float]:
    """Measure how well scores agree with preferences.

    With the gaps g_i = chosen_i - rejected_i: accuracy = share of g > 0 (a tie is half right); margin = mean g; loss =
    mean -log sigmoid(g), log 2 where nothing is known; calibration_error as `calibration` bins them (Guo et al. 2017).

    Args:
      scores: [N, 2], chosen and rejected.
      prompts: [N] which prompt each pair belongs to; None: each to its own.

    Returns:
      The four, and accuracy_stderr (`statistics.clustered_stderr` over prompts) where there are two prompts or more.

    Example:
      >>> {name: round(x, 2) for name, x in pair_metrics(np.array([[2.0, 0.0], [0.0, 1.0]])).items()}
      {'accuracy': 0.5, 'accuracy_stderr': 0.5, 'margin': 0.5, 'loss': 0.72, 'calibration_error': 0.43}
    """
    gaps = np.asarray(scores, np.float64) @ np.array([1.0, -1.0])
    right = (np.sign(gaps) + 1) / 2
    stderr = clustered_stderr(right, range(len(gaps)) if prompts is None else prompts)
    bins = calibration(gaps)
    return {
        "accuracy": float(np.mean(right)),
        **({} if stderr is None else {"accuracy_stderr": stderr}),
        "margin": float(gaps.mean()),
        "loss": float(np.logaddexp(0, -gaps).mean()),
        "calibration_error": float(sum(b.pairs * abs(b.predicted - b.measured) for b in bins) / len(gaps)),
    }


def normalized_on(
    rm: RewardModel,
    params: Any,
    references: Sequence[Sequence[int]],
    held_out: Sequence[EncodedPair],
    *,
    batch_size: int,
) -> tuple[Any, dict[str, float]]:
    """Shift and scale a reward model's scores to mean 0 and standard deviation 1 over reference answers.

    Args:
      rm: the model's functions.
      params: its parameters, adapters joined.
      references: token ids of the answers.
      held_out: pairs on which the shifted scores are measured.
      batch_size: pairs that are scored at a time.

    Returns:
      The parameters of the normalised model, and reference/NAME of `models.reward_model.normalized` with
      normalized/accuracy and normalized/margin.

    Raises:
      ValueError: all references have one score.
    """
    hidden = features(rm, params, references, batch_size=2 * batch_size)
    params, constants = normalized(params, hidden)
    after = pair_metrics(pair_scores(rm, params, held_out, batch_size=batch_size))
    figures = {f"reference/{name}": value for name, value in constants.items()}
    return params, figures | {f"normalized/{name}": after[name] for name in ("accuracy", "margin")}


class Bin(NamedTuple):
    """Pairs of about equal confidence."""

    predicted: float  # mean probability that the model gives to the answer that it prefers
    measured: float  # how often that answer was the preferred one
    pairs: int


def calibration(gaps: np.ndarray, *, bins: int = 10) -> list[Bin]:
    """Compare a reward model's confidence with how often it is right, in bins of equal width from 1/2 to 1.

    Confidence of a pair = sigmoid(|gap|), which Bradley and Terry (1952) take for the probability that the higher score is
    preferred; averaged over a bin, it should be the share of gaps above 0.

    Args:
      gaps: [N] score of the chosen answer - score of the rejected one.
      bins: how many.

    Returns:
      The bins that hold a pair, from the least sure on.

    Example:
      >>> [(round(b.predicted, 2), b.measured, b.pairs) for b in calibration(np.array([2.0, 2.0, -2.0, 0.1]))]
      [(0.52, 1.0, 1), (0.88, 0.6666666666666666, 3)]
    """
    gaps = np.asarray(gaps, np.float64)
    confidence, right = 1 / (1 + np.exp(-np.abs(gaps))), (np.sign(gaps) + 1) / 2
    number = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        Bin(float(confidence[number == i].mean()), float(right[number == i].mean()), int((number == i).sum()))
        for i in range(bins)
        if (number == i).any()
    ]


def _scores(rm: RewardModel, params: Any, batch: PairBatch) -> jax.Array:
    length = batch.tokens.shape[-1]
    return rm.apply(params, batch.tokens.reshape(-1, length), batch.attention_mask.reshape(-1, length)).reshape(-1, 2)


@functools.partial(jax.jit, static_argnames="rm")
def _score_rows(rm: RewardModel, params: Any, tokens: jax.Array, attention_mask: jax.Array) -> jax.Array:
    return rm.apply(params, tokens, attention_mask)


@functools.partial(jax.jit, static_argnames="rm")
def _feature_rows(rm: RewardModel, params: Any, tokens: jax.Array, attention_mask: jax.Array) -> jax.Array:
    return rm.features(params, tokens, attention_mask)


def _in_batches(
    program: Any, rm: RewardModel, params: Any, rows: Sequence[Sequence[int]], batch_size: int
) -> np.ndarray:
    """Run a program over rows of like length together; a short last batch is filled up. It gives up where the run is to stop."""
    rows_sharding = batch_sharding(mesh_of(params), batch_size)
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    out: list[np.ndarray] = [np.empty(0)] * len(rows)
    for begin in range(0, len(order), batch_size):
        stop.check()
        numbers = order[begin : begin + batch_size]
        length = min(bucket_length(len(rows[numbers[0]])), rm.arch.max_positions)
        batch = right_pad([rows[number] for number in (numbers * batch_size)[:batch_size]], length)
        found = fetch(program(rm, params, *place(batch, rows_sharding)))
        for number, value in zip(numbers, found, strict=False):
            out[number] = value
    return np.stack(out)
