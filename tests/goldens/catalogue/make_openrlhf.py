"""Make openrlhf.json: what OpenRLHF computes under the catalogue's names, by the stand-ins of ../peers/make_openrlhf.py.

python3.11 -m venv peers && peers/bin/pip install torch==2.13.0 transformers
peers/bin/pip install --no-deps openrlhf==0.11.2
peers/bin/python tests/goldens/catalogue/make_openrlhf.py
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))

import shared
from make_openrlhf import PolicyLoss
from torch_inputs import X, value_and_gradient


def policy_loss(**settings):
    """Run the policy loss and its gradient; what sampled is the reference."""
    loss = PolicyLoss(shared.CLIP, shared.CLIP_HIGH, **settings)
    return value_and_gradient(
        lambda x: loss(x, X.old_logprobs, X.advantages, X.mask, rollout_log_probs=X.ref_logprobs)[0], X.logprobs
    )


def main() -> None:
    """Write every entry."""
    token = {"is_correction_level": "token"}
    entries = {
        "gspo": shared.entry("PolicyLoss, policy_loss_type=gspo", *policy_loss(policy_loss_type="gspo")),
        "icepop": shared.entry(
            "PolicyLoss, is_correction_level=token", *policy_loss(is_correction_threshold=(0.8, 1.5), **token)
        ),
        "truncated": shared.entry(
            "PolicyLoss, is_correction_level=token, is_correction_mode=clip",
            *policy_loss(is_correction_mode="clip", is_correction_threshold=(0.0, 1.2), **token),
        ),
        "geometric_mask": shared.entry(
            "PolicyLoss, is_correction_level=seq",
            *policy_loss(is_correction_level="seq", is_correction_threshold=(0.9, 1.1)),
        ),
    }
    shared.write("openrlhf", version("openrlhf"), "make_openrlhf.py", entries, folder="catalogue")


if __name__ == "__main__":
    main()
