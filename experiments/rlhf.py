"""RLHF, whole: fine-tune a language model, learn a reward from preferences, optimise against it (Ouyang et al. 2022).

    python -m experiments.rlhf                        # film reviews, a small model from scratch
    python -m experiments.rlhf smollm2                # the same with SmolLM2-135M-Instruct, in smaller numbers
    python -m experiments.rlhf --from ppo --ppo.kl-coef 0.1     # redo a stage and those after it
    python -m experiments.rlhf --data answers.jsonl --pairs judged.jsonl --prompts asked.txt     # on your own data
    python -m experiments.rlhf --mesh data=-1         # on all devices; --distributed: of several hosts (pgjax/run/devices.py)

    sft           texts > a language model that writes such texts           (experiments/sft.py)
    pairs         two completions of each prompt > which one is preferred   (experiments/study/pairs.py)
    reward_model  pairs > a model whose score says which one is preferred   (experiments/reward_model.py)
    ppo           prompts > a policy that scores high and stays near SFT    (experiments/ppo.py)

Each stage has its folder in `--output`. Where its `complete.json` is there, it is skipped; one that was stopped goes on;
`--from STAGE` moves it and those after it aside (NAME.1, NAME.2, ...) and redoes them. By default the preferences are
drawn from a Bradley-Terry model of a known gold score (experiments/tasks/gold.py), so that proxy and gold can be compared.

Measured with seed 0, on held-out data: perplexity 2,109 > 63.5; the reward model agrees with the judge in 47.9% > 60.5% of
pairs (the judge with gold in 84%), calibration error 0.278 > 0.054; PPO takes the proxy from -0.11 to 1.86 and gold from
0.122 to 0.544 at a KL of 8.9 nats. 12 minutes on 2 cores that other work shared.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from experiments import ppo, reward_model, sft
from experiments.study.pairs import Pairs, check_pairs
from experiments.study.rlhf_report import report
from experiments.study.rlhf_stages import StageName, from_above, read_prompts, script_config, to_do
from pgjax.core.errors import UserError
from pgjax.parallel import processes
from pgjax.rollout import rewards
from pgjax.run import checks, devices, exits, presets, stages
from pgjax.run.checkpoint.resume import From
from pgjax.run.session import Dtype

SFT = sft.Config()
REWARD_MODEL = reward_model.Config(epochs=2.0, batch_size=32, microbatches=1, learning_rate=2e-3, warmup_updates=20)
PPO = ppo.Config(
    steps=60, batch_size=64, minibatches=1, microbatches=1, learning_rate=1e-3, kl_coef=0.1, eval_samples=1,
    eval_every=20, samples_every=60, save_every=30,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(devices.Flags):
    """One run: what all stages share, then each stage's own numbers."""

    output: Path = Path("runs/rlhf")  # folders sft, pairs, reward_model, ppo, and a picture
    from_stage: Annotated[StageName | None, tyro.conf.arg(name="from")] = None  # redo this stage and those after it
    resume_from: From = None  # last-good: a stopped stage goes on from its newest snapshot that is whole
    model: str | None = None  # what is fine-tuned: any source that experiments.sft takes; None: from scratch
    data: str = "experiments.tasks.reviews:train_rows"  # to fine-tune on: sources as for experiments.sft
    held_out_data: str | None = "experiments.tasks.reviews:held_out_rows"  # for the perplexity; None: rows of `data`
    prompts: str = "experiments.tasks.reviews:prompt_rows"  # to complete, in `pairs` and `ppo`
    held_out_prompts: str | None = "experiments.tasks.reviews:held_out_prompt_rows"  # None: rows of `prompts`
    pairs: str | None = None  # your own rows of prompt, chosen, rejected; None: sampled, and judged by `gold`
    held_out_pairs: str | None = None  # likewise; None: rows of `pairs`, kept aside
    chat: bool = False  # put prompts through the tokenizer's chat template
    template_args: str | None = None  # variables of the chat template in JSON, as {"enable_thinking": false}
    template_date: str | None = None  # that chat templates write, as 2026-11-30; None: the day when `sft` starts
    gold: str | None = (
        "experiments.tasks.gold:gold_reward"  # module:function; judges sampled pairs, only watched in `ppo`
    )
    max_new_tokens: int = 20  # the longest completion
    stop_tokens: tuple[str, ...] = ()  # texts or ids of the tokens that end a completion; none given: the model's own
    stop_strings: tuple[str, ...] = ()  # texts, of any number of tokens, at which a completion ends too
    seed: int = 0  # of everything
    dtype: Dtype = None  # of activations; None: bfloat16 on TPU and GPU, float32 on CPU and for a model from scratch
    refresh_pictures: bool = False  # draw over the picture that the tutorial shows, not into `output`
    sft: sft.Config = SFT
    pair: Pairs = Pairs()  # noqa: RUF009  it is frozen
    reward_model: reward_model.Config = REWARD_MODEL
    ppo: ppo.Config = PPO


PRESETS = {
    "reviews": Config(),
    "smollm2": Config(
        output=Path("runs/rlhf-smollm2"), model="SmolLM2-135M-Instruct", data="experiments.tasks.reviews:few_train_rows",
        sft=dataclasses.replace(SFT, epochs=1), pair=Pairs(train=512, held_out=128, batch_size=64),
        reward_model=dataclasses.replace(REWARD_MODEL, epochs=1.0, batch_size=16, microbatches=2, learning_rate=3e-5),
        ppo=dataclasses.replace(
            PPO, steps=12, batch_size=32, microbatches=2, learning_rate=3e-5, eval_every=None, samples_every=6, save_every=6
        ),
    ),
}  # fmt: skip
GOES_WITH = {"data": {"held_out_data": None}, "prompts": {"held_out_prompts": None}, "pairs": {"gold": None}}


def main(config: Config) -> dict[str, float]:
    """Do what is left of the stages; return the figures of all of them, as STAGE/name."""
    check(config)
    with devices.on_devices(config):
        processes.all_or_none(lambda: read_prompts(config))  # now, since the stages that read them come late
        done = stages.run_stages(
            config.output, to_do(config), redo_from=config.from_stage,
            redo=lambda name: f"--from {name} puts the old one aside and redoes it",
        )  # fmt: skip
        if processes.is_process_0():
            report(config, done)
    return {f"{name}/{key}": x for name, stage in done.items() for key, x in stage.metrics.items()}


def check(config: Config) -> None:
    """Refuse a run that cannot work, before anything is read or computed."""
    shipped = Config()
    for stage, names in from_above(config).items():
        for name in names:
            fits = getattr(getattr(config, stage), name) == getattr(getattr(shipped, stage), name)
            checks.require(fits, f"{stage}.{name} follows from the fields that all stages share: set those")
    for source, held_out in (("data", "held_out_data"), ("prompts", "held_out_prompts")):
        fits = getattr(config, source).startswith("experiments.") or getattr(config, held_out) != getattr(
            shipped, held_out
        )
        checks.require(
            fits, f"{held_out} are still film reviews: give your own, or None to keep rows of {source} aside"
        )
    sampled = config.pairs is None
    checks.require(
        not sampled or config.held_out_pairs is None, "held_out_pairs go with pairs of your own: give pairs too"
    )
    checks.require(
        not sampled or config.gold is not None,
        "without pairs of your own, sampled ones are judged by gold: name a module:function",
    )
    check_pairs(config.pair)
    for stage, script in {"sft": sft, "reward_model": reward_model, "ppo": ppo}.items():
        try:
            script.check(script_config(config, stage))
        except UserError as error:
            raise UserError(f"{stage}: {error}") from error
    if config.gold is not None:
        rewards.load_reward(config.gold)


if __name__ == "__main__":
    with exits.plain_errors("the same command, without --from, goes on"):
        main(presets.parse(PRESETS, description=__doc__, goes_with=GOES_WITH))
