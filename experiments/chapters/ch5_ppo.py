"""Chapter 5, PPO (Schulman et al. 2017): several steps on one rollout, on a leash: the ratio, the clip, and the KL.

    python -m experiments.chapters.ch5_ppo                  # 55 s on 2 quiet cores; the model: small_lm.py
    python -m experiments.chapters.ch5_ppo --model smollm2  # SmolLM2-135M-Instruct, 3 rollouts: 2.5 min of processor time

Chapter 4's log pi becomes a ratio r_t = pi / pi_old, so that a rollout can be used more than once. The minimum takes away
the reward for going further than the clip; the KL to the model before any reward, in the reward, keeps it a language model:

    J = E[ sum_t min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) ],    reward_t = [t is last] R - beta log(pi / ref)

What to expect: both kinds of run take steps seven times as long as in chapter 4, and four on each rollout. Without clip
and KL the scores fall from 0.56 to 0.02 and from 0.50 to 0.15 (seeds 0 and 1) at a KL of 187 and 44 nats a poem, and the
poems are words in a heap. With both, the scores rise to 0.74 and 0.88 at a KL of 9 and 14, and the poems read as before.
Seeds 2 and 3: 0.53 to 0.40 and 0.55 to 0.23, beside 0.87 and 0.93 at a KL of 23 and 15.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pgjax as pg
from experiments.chapters import small_lm
from experiments.chapters.ch4_actor_critic import fit_critic
from experiments.study.pictures import picture_path
from experiments.tasks.haiku import haiku_reward
from pgjax.data.prompts import completion_texts
from pgjax.models.io.stops import stop_ids


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    model: str = "small"  # made on the spot; "smollm2" or anything else that pg.load takes
    pretrain_steps: int = 400  # supervised updates of the small model, before any reward
    seed: int = 0  # of the small model and of the first run; the other runs count on from it
    runs: int = 2  # training runs of each kind, each with its own seed
    steps: int = 60  # rollouts
    epochs: int = 4  # updates on each rollout
    topics: int = 8  # prompts
    repeat: int = 8  # poems on each prompt in a rollout
    max_new_tokens: int = 28  # the longest poem, in tokens
    learning_rate: float = 2e-3  # of AdamW
    value_coef: float = 0.5  # weight of the value loss beside the policy loss
    clip_eps: float = 0.2  # range of the ratio, 1 - eps to 1 + eps
    kl_coef: float = 0.01  # beta, score a nat
    fit_repeat: int = 64  # poems on each prompt that the critic is fitted on
    picture: Path = Path("runs/chapters/ch5_ppo.png")  # where it is drawn
    refresh_pictures: bool = False  # draw over the picture that the tutorial shows


LARGE = {
    "runs": 1, "steps": 3, "epochs": 2, "topics": 4, "repeat": 2, "max_new_tokens": 32, "learning_rate": 1e-4, "fit_repeat": 2
}  # fmt: skip


def ppo(*, clip_eps: float, kl_coef: float, value_coef: float) -> pg.Algorithm:
    """Say what is new: returns with the KL in them, less the critic's value; and the ratio, clipped, in place of log pi."""

    def token_loss(logprobs: jax.Array, batch: pg.Batch) -> jax.Array:
        return pg.clipped_surrogate_loss(
            logprobs, batch.old_logprobs, batch.advantages, batch.mask, clip_eps=clip_eps, reduce="none"
        )

    return pg.Algorithm(
        advantages=lambda experience: experience.returns - experience.values, token_loss=token_loss,
        reduce="sequence_sum", value_coef=value_coef, kl_coef=kl_coef,
    )  # fmt: skip


def learn(
    config: Config,
    lm: pg.CausalLM,
    params: Any,
    tokenizer: Any,
    asked: small_lm.Prompts,
    algorithm: pg.Algorithm,
    seed: int,
) -> tuple[Any, list[dict[str, float]]]:
    """Train by the library's iteration: sample, score, and take several steps on one rollout."""
    it = pg.iteration(
        lm, algorithm, pg.adamw(config.learning_rate, updates=config.steps * config.epochs), reference=params["lm"],
        max_new_tokens=config.max_new_tokens, eos_ids=stop_ids(tokenizer), pad_id=tokenizer.pad_token_id, epochs=config.epochs,
    )  # fmt: skip
    state, history = it.init(params["lm"], jax.random.key(seed), critic=params["value"]), []
    for _ in range(config.steps):
        rollout = it.sample(state, asked.tokens, asked.mask)
        poems = completion_texts(rollout.tokens, rollout.mask, tokenizer)
        scores = haiku_reward(asked.texts, poems)
        state, metrics = it.learn(state, rollout, scores)
        history.append({"score": float(np.mean(scores)), "kl": float(metrics["objective/kl"])})
    return state.learner.params, history


def surrogate(ratio: jax.Array, advantage: jax.Array, clip_eps: float) -> jax.Array:
    """Compute PPO's objective for one token: what `clipped_surrogate_loss` minimises, with the other sign."""
    return -pg.clipped_surrogate_loss(jnp.log(ratio), jnp.zeros_like(ratio), advantage, clip_eps=clip_eps)


def clip_curves(clip_eps: float) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Compute ratio, objective and its slope over a range of ratios, for A = 1 and A = -1."""
    ratios, rule = jnp.linspace(0.4, 1.6, 241), jax.vmap(jax.value_and_grad(surrogate), (0, None, None))
    return {sign: jax.device_get((ratios, *rule(ratios, jnp.float32(sign), clip_eps))) for sign in (1, -1)}


def draw(config: Config, clips: dict[int, Any], histories: dict[str, list[list[dict[str, float]]]]) -> None:
    """Draw the two clip pictures, and score and KL of every run."""
    with small_lm.picture(picture_path(config.picture, config.refresh_pictures), 2, rows=2) as (above, below):
        for axes, (sign, (ratios, objective, slope)) in zip(above, clips.items(), strict=True):
            axes.plot(ratios, sign * ratios, ":", color="0.6", label="unclipped, $rA$")
            axes.plot(ratios, objective, color="tab:blue", label="objective")
            axes.plot(ratios, slope, "--", color="tab:red", linewidth=1, label="its slope")
            for edge in (1 - config.clip_eps, 1 + config.clip_eps):
                axes.axvline(edge, color="0.85", linewidth=0.8, zorder=0)
            axes.set(xlabel="ratio $r$", title=f"A {'>' if sign > 0 else '<'} 0 (here {sign})")
            axes.legend(frameon=False, loc="upper left" if sign > 0 else "lower left")
        for axes, name, unit in zip(
            below, ("score", "kl"), ("mean score of a rollout", "KL, nats a poem"), strict=True
        ):
            for color, (label, histories_of_kind) in zip(("tab:red", "tab:blue"), histories.items(), strict=True):
                for i, history in enumerate(histories_of_kind):
                    curve = [metrics[name] for metrics in history]
                    axes.plot(curve, color=color, linewidth=1, label=None if i else label)
            axes.set(xlabel="rollout", ylabel=unit)
            axes.legend(frameon=False)


def main(config: Config) -> dict[str, Any]:
    """Run the chapter from beginning to end."""
    clips = clip_curves(config.clip_eps)
    lm, weights, tokenizer = small_lm.load(config.model, seed=config.seed, pretrain_steps=config.pretrain_steps)
    params = {"lm": weights, "value": pg.init_value_head(lm.arch.width)}
    play = functools.partial(small_lm.play, lm, max_new_tokens=config.max_new_tokens)

    many = small_lm.prompts(tokenizer, config.topics, repeat=config.fit_repeat)
    rollout, _, scores = play(weights, tokenizer, many, jax.random.key(config.seed + 1001))
    params = fit_critic(lm, params, rollout, scores)

    asked = small_lm.prompts(tokenizer, config.topics, repeat=config.repeat)
    histories: dict[str, list[list[dict[str, float]]]] = {}
    for name, clip_eps, kl_coef in (("no clip, no KL", math.inf, 0.0), ("PPO", config.clip_eps, config.kl_coef)):
        algorithm = ppo(clip_eps=clip_eps, kl_coef=kl_coef, value_coef=config.value_coef)
        histories[name] = []
        for seed in range(config.seed, config.seed + config.runs):
            trained, history = learn(config, lm, params, tokenizer, asked, algorithm, seed)
            histories[name].append(history)
            print(f"{name}, run {seed}: {small_lm.progress(history)}, KL {history[-1]['kl']:.1f} nats a poem")
        _, completions, scores = play(trained["lm"], tokenizer, asked, jax.random.key(config.seed + 2000))
        for text, score in list(zip(completions, scores.tolist(), strict=True))[:: max(1, len(completions) // 2)]:
            print(f"\n{text.strip()}\n({score:.2f})")
        print()
    draw(config, clips, histories)
    return {"clips": clips, "histories": histories}


if __name__ == "__main__":
    main(small_lm.parse(Config, **LARGE))
