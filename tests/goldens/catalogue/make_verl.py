"""Make verl.json: what verl computes under the catalogue's names, from its wheel's own files, without what it runs on.

    python3.11 -m venv peers && peers/bin/pip install torch==2.13.0
    peers/bin/pip install --no-deps verl==0.9.1
    peers/bin/python tests/goldens/catalogue/make_verl.py

Its packages' __init__ files import Ray and vLLM; no function called here uses them, so empty modules stand in for them, and for
the classes of its settings. The arrays are those of tests/goldens/peers.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))

import numpy as np
import shared
import torch
from torch_inputs import X, value_and_gradient

ROOT = Path(importlib.util.find_spec("verl").submodule_search_locations[0])
INDEX = np.arange(shared.ROWS) // shared.GROUP
LAST = X.mask.sum(1) - 1


class Settings(SimpleNamespace):
    """Settings that answer as verl's do."""

    global_batch_info: dict = {}  # noqa: RUF012

    def get(self, name, default=None):
        """Look one up."""
        return getattr(self, name, default)


def stand_in(name: str, folder: Path | None = None, **names) -> None:
    """Put a module of these names, or a package whose __init__ is not run, where an import finds it."""
    module = mock.MagicMock() if folder is None and not names else ModuleType(name)
    module.__path__ = [] if folder is None else [str(folder)]
    module.__spec__ = importlib.util.spec_from_loader(name, None)
    vars(module).update(names)
    sys.modules[name] = module


for missing in ("omegaconf", "tensordict", "transformers", "verl.protocol", "verl.trainer.config.algorithm",
                "verl.utils.device", "verl.workers.config.actor"):  # fmt: skip
    stand_in(missing)
for package in ("", ".trainer", ".trainer.ppo", ".utils", ".workers"):
    stand_in(f"verl{package}", ROOT.joinpath(*package.split(".")))
stand_in("verl.trainer.config", AlgoConfig=type("AlgoConfig", (), {}))
stand_in("verl.workers.config", ActorConfig=Settings)
stand_in("verl.utils.import_utils", deprecated=lambda *_, **__: lambda function: function)
sys.modules["verl.utils"].as_torch_index = sys.modules["verl.utils"].group_mean_std = None

from verl.trainer.ppo import core_algos, rollout_corr_helper  # noqa: E402


def policy(name: str, mode: str = "token-mean", **settings):
    """Run a policy loss and its gradient to the log-probabilities."""
    usual = {"clip_ratio": shared.CLIP, "clip_ratio_low": shared.CLIP, "clip_ratio_high": shared.CLIP_HIGH}
    config = Settings(**{**usual, **settings})
    loss = core_algos.get_policy_loss_fn(name)
    return value_and_gradient(
        lambda x: loss(X.old_logprobs, x, X.advantages, X.mask.double(), mode, config)[0], X.logprobs
    )


def rewards() -> torch.Tensor:
    """Put each score at its sequence's last token."""
    return torch.zeros_like(X.logprobs).scatter(1, LAST[:, None], X.scores[:, None])


def advantages(name: str, **options) -> torch.Tensor:
    """Run an estimator of advantages on scores."""
    estimator = core_algos.get_adv_estimator_fn(name)
    usual = {"config": Settings(gamma=1.0, norm_adv_by_std_in_grpo=False)}
    return estimator(token_level_rewards=rewards(), response_mask=X.mask.double(), index=INDEX, **{**usual, **options})[
        0
    ]


def two_rewards() -> torch.Tensor:
    """Run GDPO on two rewards."""
    config = Settings(gdpo_reward_keys=["one", "other"], gdpo_reward_weights=[1.0, 0.5])
    prompts = torch.zeros(shared.ROWS, shared.PROMPT)
    seen = torch.cat([torch.ones_like(prompts), X.mask], 1).long()
    given = {"one": X.scores.numpy(), "other": X.chosen.numpy()}
    return advantages("gdpo", config=config, non_tensor_batch=given, batch={"prompts": prompts, "attention_mask": seen})


def weights(level: str, threshold: float | str) -> torch.Tensor:
    """Run the correction of the sampler's distribution."""
    ratio = X.logprobs - X.old_logprobs
    none = mock.patch.object(rollout_corr_helper, "compute_is_metrics", lambda **_: {})
    with none:
        return rollout_corr_helper.compute_rollout_correction_weights(ratio, X.mask.double(), level, threshold)[0]


def main() -> None:
    """Write every entry."""
    entry, cov = shared.entry, SimpleNamespace(kl_cov_ratio=0.3, ppo_kl_coef=0.5, dro_beta=0.6)
    rows, squares = "seq-mean-token-mean", X.values.sigmoid()
    core, corr = (
        "verl.trainer.ppo.core_algos.",
        "verl.trainer.ppo.rollout_corr_helper.compute_rollout_correction_weights",
    )
    entries = {
        "gspo": entry(f"{core}compute_policy_loss_gspo", *policy("gspo", rows)),
        "sapo": entry(f"{core}compute_policy_loss_sapo", *policy("sapo", tau_pos=1.0, tau_neg=1.05)),
        "dppo_tv": entry(f"{core}compute_policy_loss_dppo_tv", *policy("dppo_tv", clip_ratio_low=0.1, clip_ratio_high=0.1)),
        "dppo_kl": entry(f"{core}compute_policy_loss_dppo_kl", *policy("dppo_kl", clip_ratio_low=0.02, clip_ratio_high=0.02)),
        "cispo": entry(f"{core}compute_policy_loss_cispo", *policy("cispo")),
        "gmpo": entry(f"{core}compute_policy_loss_geo_mean", *policy("geo_mean")),
        "kl_cov": entry(f"{core}compute_policy_loss_kl_cov", *policy("kl_cov", policy_loss=cov)),
        "dro": entry(f"{core}compute_policy_loss_dro", *policy("dro", policy_loss=cov)),
        "opo": entry(f"{core}compute_opo_outcome_advantage", advantages("opo")),
        "pass_at_k": entry(f"{core}compute_grpo_passk_outcome_advantage", advantages("grpo_passk")),
        "reinforce_plus_plus": entry(f"{core}compute_reinforce_plus_plus_outcome_advantage", advantages("reinforce_plus_plus")),
        "reinforce_plus_plus_baseline": entry(
            f"{core}compute_reinforce_plus_plus_baseline_outcome_advantage", advantages("reinforce_plus_plus_baseline")
        ),
        "gdpo": entry(f"{core}compute_gdpo_outcome_advantage", two_rewards()),
        "optimal_token_baseline": entry(
            f"{core}compute_optimal_token_baseline_advantage",
            advantages("optimal_token_baseline", old_log_probs=X.old_logprobs, sum_pi_squared=squares),
        ),
        "token_truncated": entry(corr, weights("token", 1.2)),
        "sequence_truncated": entry(corr, weights("sequence", 1.2)),
        "icepop": entry(corr, weights("token", "0.8_1.5")),
    }  # fmt: skip
    shared.write("verl", version("verl"), "make_verl.py", entries, folder="catalogue")


if __name__ == "__main__":
    main()
