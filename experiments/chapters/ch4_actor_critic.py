"""Chapter 4, baselines and actor-critic: judge a poem against what was to be expected, and the noise falls.

    python -m experiments.chapters.ch4_actor_critic                  # 70 s on 2 quiet cores; the model: small_lm.py
    python -m experiments.chapters.ch4_actor_critic --model smollm2  # SmolLM2-135M-Instruct, 4 updates each: 4 min

Chapter 3's credit R becomes R - b, with b the other poems on the same prompt, and then R - V(s_t), with V a linear head on
the language model's own hidden states, taught by its squared error. None of it changes what the policy's gradient is on average:

    grad J = E[ sum_t (R - V(s_t)) grad log pi(token_t | s_t) ],    loss of the critic = (V(s_t) - R)^2 / 2

What to expect: on chapter 3's poems (seed 0) the variance falls from 1,034 to 101 with b and to 98.8 with V(s_t): a tenth.
As many updates as in chapter 3 now reach 0.82 and 0.87 with b (seeds 0 and 1) and 0.82 and 0.78 with V(s_t), where R alone,
chapter 3's own runs, ends at 0.74 and 0.71. A critic does no better than b here, but needs no second poem on the prompt.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import pgjax as pg
from experiments.chapters import small_lm
from experiments.chapters.ch3_llm_reinforce import returns_of
from experiments.study.pictures import picture_path
from pgjax.learning.optimizer import Metrics, Optimizer, TrainState, apply_gradient


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    model: str = "small"  # made on the spot; "smollm2" or anything else that pg.load takes
    pretrain_steps: int = 400  # supervised updates of the small model, before any reward
    seed: int = 0  # of the small model and of the first run; the other runs count on from it
    runs: int = 2  # training runs of each baseline, each with its own seed
    steps: int = 120  # rollouts, and as many updates
    topics: int = 8  # prompts
    repeat: int = 8  # poems on each prompt in a rollout
    max_new_tokens: int = 28  # the longest poem, in tokens
    learning_rate: float = 3e-4  # of AdamW
    value_coef: float = 0.5  # weight of the value loss beside the policy loss
    noise_repeat: int = 64  # poems on each prompt where the variance is measured
    picture: Path = Path("runs/chapters/ch4_actor_critic.png")  # where it is drawn
    refresh_pictures: bool = False  # draw over the picture that the tutorial shows


LARGE = {
    "runs": 1, "steps": 4, "topics": 4, "repeat": 2, "max_new_tokens": 32, "learning_rate": 3e-5, "noise_repeat": 2
}  # fmt: skip
BASELINES = {"R": (0.0, 0.0), "R - b": (1.0, 0.0), "R - V(s_t)": (0.0, 1.0)}  # how much of b and of V(s_t) comes off


def baseline_of(shares: tuple[float, float], scores: jax.Array, values: jax.Array, repeat: int) -> jax.Array:
    """Compute what is taken off the return, [B, T]: shares of the other poems' mean on the same prompt and of the value."""
    others = pg.leave_one_out_baseline(scores, group_size=repeat)
    return shares[0] * others[:, None] + shares[1] * values


def forward(params: Any, lm: pg.CausalLM, rollout: pg.Rollout) -> tuple[jax.Array, jax.Array]:
    """Compute the log-probability of every token, and the value of the state before it, each [B, T]."""
    hidden = lm.hidden(params["lm"], rollout.tokens, rollout.attention_mask)
    logprobs = pg.linear_token_logprobs(hidden, lm.unembedding(params["lm"]), rollout.tokens)
    return logprobs, pg.token_values(params["value"], hidden)


def loss_fn(
    params: Any, lm: pg.CausalLM, rollout: pg.Rollout, advantages: jax.Array, returns: jax.Array,
    value_coef: jax.typing.ArrayLike,
) -> jax.Array:  # fmt: skip
    """Compute the actor's loss, as before but for the advantages, and the critic's."""
    logprobs, values = forward(params, lm, rollout)
    policy_loss = pg.policy_gradient_loss(logprobs, advantages, rollout.mask, reduce="sequence_sum")
    return policy_loss + value_coef * pg.value_loss(values, returns, rollout.mask)


@functools.partial(jax.jit, static_argnames=("lm", "optimizer", "repeat"))
def update(
    lm: pg.CausalLM, optimizer: Optimizer, state: TrainState, rollout: pg.Rollout, scores: jax.Array,
    *, shares: tuple[float, float], repeat: int, value_coef: float,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Take one step up the estimated gradient."""
    returns = returns_of(scores, rollout.mask)
    _, values = forward(state.params, lm, rollout)
    advantages = returns - baseline_of(shares, scores, values, repeat)
    loss, grad = jax.value_and_grad(loss_fn)(state.params, lm, rollout, advantages, returns, value_coef)
    return apply_gradient(state, grad, loss, optimizer)


@functools.partial(jax.jit, static_argnames="lm")
def fit_critic(lm: pg.CausalLM, params: Any, rollout: pg.Rollout, scores: jax.Array) -> Any:
    """Teach the head alone to predict the scores of a rollout, before the policy moves; return the parameters."""
    hidden = lm.hidden(params["lm"], rollout.tokens, rollout.attention_mask)
    returns = returns_of(scores, rollout.mask)

    def loss_of(head: Any) -> jax.Array:
        return pg.value_loss(pg.token_values(head, hidden), returns, rollout.mask)

    return {**params, "value": small_lm.fit(loss_of, params["value"], learning_rate=1e-2, steps=300)}


def worked_example() -> list[float]:
    """Print A_t = R - V(s_t) for one poem of three lines; return the advantages."""
    rewards, values = jnp.array([[0.0, 0.0, 0.30]]), jnp.array([[0.10, 0.25, 0.95]])
    advantages = [round(a, 6) for a in pg.monte_carlo_advantages(rewards, values, None)[0].tolist()]
    said = "better than expected: more of it", "about as expected", "much was hoped for by now: this line spoilt it"
    print("\nA poem of three lines scores R = 0.30. Before each line the critic had expected:\n")
    for line, (value, advantage, words) in enumerate(zip(values[0].tolist(), advantages, said, strict=True)):
        print(f"  line {line + 1}: V = {value:.2f}, A = {advantage:+.2f}  {words}")
    return advantages


def draw(curves: dict[str, list[list[float]]], variances: dict[str, float], path: Path) -> None:
    """Draw the variance of the estimate with each baseline, and the learning curves."""
    with small_lm.picture(path, 2) as (left, right):
        for color, (name, value) in zip(("tab:red", "tab:blue", "tab:green"), variances.items(), strict=True):
            left.bar(f"${name}$", value, color=color, width=0.6)
            left.annotate(f"{value:,.1f}", (f"${name}$", value), ha="center", va="bottom")
            for i, curve in enumerate(curves[name]):
                right.plot(curve, color=color, linewidth=1, label=None if i else f"${name}$")
        left.set(ylabel="variance, summed over parameters", title="One poem's gradient: same policy, same poems")
        left.margins(y=0.12)
        right.set(xlabel="update", ylabel="mean score of a rollout", title="Learning, a line a seed")
        right.legend(frameon=False)


def main(config: Config) -> dict[str, Any]:
    """Run the chapter from beginning to end."""
    example = worked_example()
    lm, weights, tokenizer = small_lm.load(config.model, seed=config.seed, pretrain_steps=config.pretrain_steps)
    params = {"lm": weights, "value": pg.init_value_head(lm.arch.width)}
    play = functools.partial(small_lm.play, lm, max_new_tokens=config.max_new_tokens)

    many = small_lm.prompts(tokenizer, config.topics, repeat=config.noise_repeat)
    rollout, _, scores = play(weights, tokenizer, many, jax.random.key(config.seed + 1001))
    params = fit_critic(lm, params, rollout, scores)
    rollout, _, scores = play(weights, tokenizer, many, jax.random.key(config.seed + 1000))  # the poems of chapter 3
    _, values = jax.jit(forward, static_argnums=1)(params, lm, rollout)

    def loss_of(params: Any, rollout: pg.Rollout, advantages: jax.Array) -> jax.Array:
        return pg.policy_gradient_loss(forward(params, lm, rollout)[0], advantages, rollout.mask, reduce="sequence_sum")

    variances: dict[str, float] = {}
    print("\nVariance of one poem's gradient, summed over the parameters:")
    for name, shares in BASELINES.items():
        advantages = returns_of(scores, rollout.mask) - baseline_of(shares, scores, values, config.noise_repeat)
        variances[name] = float(small_lm.gradient_variance(loss_of, params, (rollout, advantages)))
        print(f"  {name:<12}{variances[name]:>10,.1f}   {variances[name] / variances['R']:.0%}")

    asked = small_lm.prompts(tokenizer, config.topics, repeat=config.repeat)
    curves: dict[str, list[list[float]]] = {name: [] for name in BASELINES}
    for name, shares in BASELINES.items():
        step = functools.partial(
            update, lm, shares=shares, repeat=config.repeat, value_coef=config.value_coef * shares[1]
        )
        for seed in range(config.seed, config.seed + config.runs):
            _, history = small_lm.learn(
                lm, params, tokenizer, asked, jax.random.key(seed), step,
                learning_rate=config.learning_rate, steps=config.steps, max_new_tokens=config.max_new_tokens,
            )  # fmt: skip
            curves[name].append([metrics["score"] for metrics in history])
            print(f"{name}, run {seed}: {small_lm.progress(history)}")
    draw(curves, variances, picture_path(config.picture, config.refresh_pictures))
    return {"advantages": example, "variances": variances, "curves": curves}


if __name__ == "__main__":
    main(small_lm.parse(Config, **LARGE))
