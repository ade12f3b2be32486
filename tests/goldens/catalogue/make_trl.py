"""Make trl.json: what TRL computes under the catalogue's names, by the stand-ins of ../peers/make_trl.py for its trainers.

python3.11 -m venv peers && peers/bin/pip install torch==2.13.0 trl==1.16.0
peers/bin/python tests/goldens/catalogue/make_trl.py
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))

import shared
import torch
from make_trl import batch, grpo_loss, scoring_trainer, trainer
from torch_inputs import X, value_and_gradient
from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

SEQUENCE = {"importance_sampling_level": "sequence"}
ARGS = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1}


def with_args(**args):
    """Give the settings that a loss reads, with these among them."""
    return {"args": SimpleNamespace(**{**ARGS, **args})}


def of_rows(loss_type: str, **fields):
    """Run a loss whose advantages are the sequences' own, [B]."""
    given = {**batch(X.mask), "advantages": X.scores}
    self = lambda x: trainer(x, loss_type=loss_type, **fields)
    return value_and_gradient(lambda x: GRPOTrainer._compute_loss(self(x), None, given), X.logprobs)


def gmpo():
    """Run GMPO's loss on advantages of sequences."""
    given = {**batch(X.mask), "advantages": X.scores}
    self = lambda x: trainer(x, epsilon_low=0.4, epsilon_high=0.4)
    return value_and_gradient(lambda x: GMPOTrainer._compute_loss(self(x), None, given), X.logprobs)


def entropy_mask(fraction: float) -> torch.Tensor:
    """Choose the tokens of high entropy."""
    accelerator = SimpleNamespace(pad_across_processes=lambda x, **_: x, gather=lambda x: x)
    return GRPOTrainer.get_high_entropy_mask(
        SimpleNamespace(accelerator=accelerator), X.values.exp(), X.mask, 1 - fraction
    )


def gdpo() -> torch.Tensor:
    """Run generate-and-score on two rewards, each normalised before they are added."""
    self = scoring_trainer(GRPOTrainer, beta=0.0, scale_rewards="group")
    self.multi_objective_aggregation = "normalize_then_sum"
    self.reward_weights, self.reward_funcs = torch.tensor([1.0, 0.5]), [None, None]
    self.reward_func_names = ["one", "other"]
    self._calculate_rewards = lambda *_: torch.stack([X.scores, X.chosen], 1)
    given = [{"prompt": "text"} for _ in range(shared.ROWS)]
    return GRPOTrainer._generate_and_score_completions(self, given)["advantages"]


def main() -> None:
    """Write every entry."""
    loss, entry = "GRPOTrainer._compute_loss", shared.entry
    taus = with_args(sapo_temperature_pos=1.0, sapo_temperature_neg=1.05)
    vespo = with_args(vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0)
    opsm = GRPOTrainer.get_off_policy_mask(X.scores[:, None], X.logprobs, X.old_logprobs, X.mask.double(), 0.05)
    entries = {
        "gspo": entry(f"{loss}, importance_sampling_level=sequence, loss_type=grpo", *of_rows("grpo", **SEQUENCE)),
        "gspo_bnpo": entry(f"{loss}, importance_sampling_level=sequence, loss_type=bnpo", *of_rows("bnpo", **SEQUENCE)),
        "cispo": entry(
            f"{loss}, loss_type=cispo, epsilon_high=0.2, its default", *grpo_loss("cispo", epsilon_high=0.2)
        ),
        "cispo_5": entry(f"{loss}, loss_type=cispo, epsilon_high=5", *grpo_loss("cispo", epsilon_high=5.0)),
        "sapo": entry(f"{loss}, loss_type=sapo", *grpo_loss("sapo", **taus)),
        "vespo": entry(
            f"{loss}, loss_type=vespo", *grpo_loss("vespo", get_gamma_weights=GRPOTrainer.get_gamma_weights, **vespo)
        ),
        "unbiased_kl": entry(
            f"{loss}, loss_type=bnpo, beta, use_bias_correction_kl",
            *grpo_loss("bnpo", beta=shared.KL_COEF, **with_args(use_bias_correction_kl=True)),
        ),
        "gmpo": entry("trl.experimental.gmpo.GMPOTrainer._compute_loss", *gmpo()),
        "opsm_mask": entry("GRPOTrainer.get_off_policy_mask", opsm),
        "entropy_mask": entry("GRPOTrainer.get_high_entropy_mask", entropy_mask(0.3)),
        "gdpo": entry("GRPOTrainer._generate_and_score_completions, normalize_then_sum", gdpo()),
    }
    shared.write("trl", version("trl"), "make_trl.py", entries, folder="catalogue")


if __name__ == "__main__":
    main()
