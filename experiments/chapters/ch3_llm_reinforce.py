"""Chapter 3, REINFORCE on a language model (Williams 1992): one score for a whole haiku moves every token of it.

    python -m experiments.chapters.ch3_llm_reinforce                  # 70 s on 2 quiet cores; the model: small_lm.py
    python -m experiments.chapters.ch3_llm_reinforce --model smollm2  # SmolLM2-135M-Instruct, 4 updates: 100 s of processor time

The Gaussian of chapter 2 becomes a language model, x becomes a poem, and log p(x) a sum over its tokens:

    grad J = E[ R * sum_t grad log pi(token_t | prompt, tokens before t) ]

What to expect: the gradients of two batches of 64 poems point in directions that have nothing to do with each other (mean
cosine 0.00 over 16 pairs; 0.11 at 256 poems), and still 120 such steps take the mean score from 0.52 to 0.74, from 0.51
to 0.71 and from 0.54 to 0.77 (seeds 0, 1 and 2), by paths that go up and down. Four updates of
SmolLM2 show how it goes with a real model, not how far.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import pgjax as pg
from experiments.chapters import small_lm
from experiments.study.pictures import picture_path
from pgjax.data.tokens import added_text
from pgjax.learning.optimizer import Metrics, Optimizer, TrainState, apply_gradient


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    model: str = "small"  # made on the spot; "smollm2" or anything else that pg.load takes
    pretrain_steps: int = 400  # supervised updates of the small model, before any reward
    seed: int = 0  # of the small model and of the first run; the other runs count on from it
    runs: int = 3  # training runs, each with its own seed
    steps: int = 120  # rollouts, and as many updates
    topics: int = 8  # prompts
    repeat: int = 8  # poems on each prompt in a rollout
    max_new_tokens: int = 28  # the longest poem, in tokens
    learning_rate: float = 3e-4  # of AdamW
    noise_repeat: int = 64  # poems on each prompt where the noise is measured
    pairs: int = 16  # pairs of batches whose gradients are compared, for each batch size
    picture: Path = Path("runs/chapters/ch3_llm_reinforce.png")  # where it is drawn
    refresh_pictures: bool = False  # draw over the picture that the tutorial shows


LARGE = {
    "runs": 1, "steps": 4, "topics": 4, "repeat": 2, "max_new_tokens": 32, "learning_rate": 3e-5, "noise_repeat": 2, "pairs": 1
}  # fmt: skip
TABLE = """
  reinforcement learning   a language model writing a haiku
  ----------------------   --------------------------------------------------
  state s_t                the prompt and the tokens so far
  action a_t               the next token
  policy pi(a | s)         the language model's next-token probabilities
  episode                  one completion, up to <end> or the length limit
  reward                   0 at every token but the last, there the score R
  environment              appends the token; only the policy is random
"""


def returns_of(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum what is still to come at every sampled token: [B, T]. Nothing is paid before the end, so it is R everywhere."""
    return pg.monte_carlo_returns(pg.place_scores(scores, mask), mask)


def forward(params: Any, lm: pg.CausalLM, rollout: pg.Rollout) -> jax.Array:
    """Compute the log-probability of every token, [B, T]."""
    hidden = lm.hidden(params["lm"], rollout.tokens, rollout.attention_mask)
    return pg.linear_token_logprobs(hidden, lm.unembedding(params["lm"]), rollout.tokens)


def loss_fn(params: Any, lm: pg.CausalLM, rollout: pg.Rollout, returns: jax.Array) -> jax.Array:
    """Compute the loss whose gradient is minus the REINFORCE estimate: a sum over tokens, a mean over poems."""
    logprobs = forward(params, lm, rollout)
    return pg.policy_gradient_loss(logprobs, returns, rollout.mask, reduce="sequence_sum")


@functools.partial(jax.jit, static_argnames=("lm", "optimizer"))
def update(
    lm: pg.CausalLM, optimizer: Optimizer, state: TrainState, rollout: pg.Rollout, scores: jax.Array
) -> tuple[TrainState, Metrics]:
    """Take one step up the estimated gradient."""
    returns = returns_of(scores, rollout.mask)
    loss, grad = jax.value_and_grad(loss_fn)(state.params, lm, rollout, returns)
    return apply_gradient(state, grad, loss, optimizer)


@functools.partial(jax.jit, static_argnames="lm")
def direction(lm: pg.CausalLM, params: Any, rollout: pg.Rollout, scores: jax.Array) -> jax.Array:
    """Compute the gradient estimate of a batch as one long vector of length 1."""
    grad, _ = ravel_pytree(jax.grad(loss_fn)(params, lm, rollout, returns_of(scores, rollout.mask)))
    return grad / jnp.linalg.norm(grad)


def noise(lm: pg.CausalLM, params: Any, rollout: pg.Rollout, scores: jax.Array, pairs: int) -> dict[int, list[float]]:
    """Compare the gradients of disjoint random batches of 1, 2, 4, ... poems; return the cosines of each batch size."""
    rng = np.random.default_rng(0)
    cosines: dict[int, list[float]] = {2**i: [] for i in range(len(scores).bit_length() - 1)}
    for size, found in cosines.items():
        for _ in range(pairs):
            halves = rng.permutation(len(scores))[: 2 * size].reshape(2, size)
            batches = [jax.tree.map(lambda x, rows=rows: x[rows], (rollout, scores)) for rows in halves]
            first, second = (direction(lm, params, *batch) for batch in batches)
            found.append(float(first @ second))
    return cosines


def show_rollout(tokenizer: Any, rollout: pg.Rollout, scores: jax.Array) -> None:
    """Print the first poem token by token."""
    print(f"\nOne rollout, R = {float(scores[0]):.2f}. Every token gets the same credit, the good and the bad:\n")
    print(f"  {'token':<14}{'log pi':>8}{'credit':>8}")
    arrays = rollout.tokens, rollout.logprobs, returns_of(scores, rollout.mask)
    tokens, logprobs, credits = (np.asarray(x)[0] for x in arrays)
    for t in np.flatnonzero(np.asarray(rollout.mask)[0]):
        text = added_text(tokens[:t].tolist(), [int(tokens[t])], tokenizer)
        print(f"  {text!r:<14}{logprobs[t]:>8.2f}{credits[t]:>8.2f}")


def draw(curves: list[list[float]], cosines: dict[int, list[float]], path: Path) -> None:
    """Draw the learning curves, and how far the gradients of two batches agree."""
    with small_lm.picture(path, 2) as (left, right):
        for i, curve in enumerate(curves):
            left.plot(curve, linewidth=1, label=f"run {i}")
        left.set(xlabel="update", ylabel="mean score of a rollout", title="REINFORCE, the same but for the seed")
        left.legend(frameon=False)
        sizes, found = list(cosines), list(cosines.values())
        right.axhline(0, color="0.7", linewidth=0.8)
        right.plot(sizes, found, "o", color="tab:blue", alpha=0.35, markersize=4)
        right.plot(sizes, np.mean(found, axis=1), color="tab:red", label="mean of the pairs")
        right.set_xscale("log", base=2)
        right.set_xticks(sizes, sizes)
        right.set(xlabel="poems in a batch", ylabel="cosine", title="Two batches' gradients, the same policy")
        right.legend(frameon=False)


def main(config: Config) -> dict[str, Any]:
    """Run the chapter from beginning to end."""
    print(TABLE)
    lm, weights, tokenizer = small_lm.load(config.model, seed=config.seed, pretrain_steps=config.pretrain_steps)
    params = {"lm": weights}
    play = functools.partial(small_lm.play, lm, max_new_tokens=config.max_new_tokens)

    many = small_lm.prompts(tokenizer, config.topics, repeat=config.noise_repeat)
    rollout, completions, scores = play(weights, tokenizer, many, jax.random.key(config.seed + 1000))
    print(f"\n{many.texts[0]}\n\n{completions[0]}")
    show_rollout(tokenizer, rollout, scores)
    cosines = noise(lm, params, rollout, scores, config.pairs)
    print("\nCosine between the gradients of two batches, by batch size, mean over pairs (1 would be no noise):")
    print("  " + "   ".join(f"{size}: {np.mean(found):+.2f}" for size, found in cosines.items()))

    asked, curves = small_lm.prompts(tokenizer, config.topics, repeat=config.repeat), []
    for seed in range(config.seed, config.seed + config.runs):
        trained, history = small_lm.learn(
            lm, params, tokenizer, asked, jax.random.key(seed), functools.partial(update, lm),
            learning_rate=config.learning_rate, steps=config.steps, max_new_tokens=config.max_new_tokens,
        )  # fmt: skip
        curves.append([metrics["score"] for metrics in history])
        print(f"run {seed}: {small_lm.progress(history)}")
    _, completions, _ = play(trained["lm"], tokenizer, asked, jax.random.key(config.seed + 2000))
    print(f"\nA poem of the last run:\n\n{completions[0]}\n")
    draw(curves, cosines, picture_path(config.picture, config.refresh_pictures))
    return {"curves": curves, "cosines": cosines}


if __name__ == "__main__":
    main(small_lm.parse(Config, **LARGE))
