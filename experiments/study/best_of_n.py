"""Best-of-n from the fine-tuned model: many completions of each prompt, of which the proxy chooses the best."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pgjax as pg
from experiments import ppo
from experiments.study.gao_forms import best_of, best_of_kl
from pgjax.data.prompts import check_prompts
from pgjax.data.sources import load_rows
from pgjax.models.io.stops import set_stops, told_stops
from pgjax.rollout import rewards
from pgjax.rollout.task import make_task
from pgjax.run import checks
from pgjax.run.session import templated
from pgjax.run.stages import Done, run_stage, write_json
from pgjax.run.statistics import clustered_stderr


def stage(
    folder: Path, base: ppo.Config, sizes: Sequence[int], samples: int, held_out_rows: int, *, made_from: Sequence[Done]
) -> Done:
    """Sample completions of each held-out prompt and choose among them, unless that is done already.

    Args:
      folder: of the stage.
      base: model, reward model, prompts and gold score of the study.
      sizes: n, each at most `samples`; the last one is the largest.
      samples: completions of each prompt that the subsets of n are taken from.
      held_out_rows: how many prompts the study evaluates on.
      made_from: the stages that made the models.

    Returns:
      The stage; its metrics hold kl, proxy and gold for each n, and gold_stderr where there are two prompts or more.
    """
    config = {"samples": samples, "best_of": sizes[-1], "held_out_rows": held_out_rows}
    return run_stage(folder, config, functools.partial(sample, base, sizes, samples), made_from=made_from)


def sample(base: ppo.Config, sizes: Sequence[int], samples: int, folder: Path, resume: bool) -> dict[str, Any]:
    """Score the samples with proxy and gold, and keep the scores beside the curve."""
    del resume
    assert base.reward_model is not None and base.held_out is not None  # the study sets them
    lm, params, tokenizer = pg.load(base.model)
    tokenizer = set_stops(tokenizer, base.stop_tokens, base.stop_strings)
    rm, rm_params, _ = pg.load_reward_model(base.reward_model)
    scorer = jax.jit(rm.apply)
    placed = load_rows(base.held_out, check_prompts)
    proxy: list[float] = []
    gold: list[float] = []
    task = make_task(
        lm, templated(tokenizer, base), [rewards.load_reward(base.rewards[0])], None,
        [[row for _, row in placed]], places=[[place for place, _ in placed]], chat=base.chat,
        max_new_tokens=base.max_new_tokens, temperature=base.temperature,
    )  # fmt: skip
    prompts = [prompt for prompt in task.prompt_sets[0] for _ in range(samples)]
    print(f"sampling {samples} completions for each of {len(task.prompt_sets[0])} held-out prompts")
    print(told_stops(tokenizer))
    size = min(base.batch_size, len(prompts))
    for fed, count, rollout in task.rollouts(params, prompts, size, jax.random.key(base.seed)):
        proxy += jax.device_get(scorer(rm_params, rollout.tokens, rollout.attention_mask))[:count].tolist()
        gold += task.judge(fed, rollout).scores[:count].tolist()
    checks.require(
        bool(np.isfinite(gold).all()),
        f"{base.rewards[0]} does not apply to every completion, which the best of n needs",
    )
    both = {"proxy": np.reshape(proxy, (-1, samples)), "gold": np.reshape(gold, (-1, samples))}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "scores.json", {name: x.tolist() for name, x in both.items()})
    of_prompts = {name: [best_of(both["proxy"], x, n) for n in sizes] for name, x in both.items()}  # [P] for each n
    errors = [clustered_stderr(x, range(len(x))) for x in of_prompts["gold"]]
    return {
        "kl": [best_of_kl(n) for n in sizes],
        **{name: [float(x.mean()) for x in values] for name, values in of_prompts.items()},
        **({} if None in errors else {"gold_stderr": errors}),
    }
