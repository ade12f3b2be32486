"""A training that is killed again and again, or moved between devices, ends where one that is left in peace does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


# Each of the three signals during a save and at a random moment, once; the campaign is for the moments that are rare.
@pytest.mark.parametrize(("kills", "steps"), [(6, 8), pytest.param(20, 16, marks=pytest.mark.campaign)])
def test_a_killed_training_ends_with_the_same_bits_and_a_moved_one_within_the_tolerance(tmp_path, kills, steps):
    """One campaign for both, since they share what costs most: imports, programs and the undisturbed run."""
    campaign = subprocess.run(
        [sys.executable, "-m", "tests.kill_campaign", "--kills", str(kills), "--steps", str(steps), "--moves"],
        cwd=Path(__file__).parents[1], env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    said = campaign.stdout
    assert campaign.returncode == 0, said[-2000:] + campaign.stderr[-4000:]
    met = re.findall(r"^\d+: (SIG\w+) after .*, saving: (\w+), (\d+) steps", said, re.MULTILINE)
    assert len(met) == kills and {"SIGKILL", "SIGTERM", "SIGINT"} == {by for by, _, _ in met}
    assert sum(saving == "True" for _, saving, _ in met) >= kills // 2 and any(int(saved) > 0 for _, _, saved in met)
    assert "every run ended bit for bit as the undisturbed one" in said
    # 1 device, then fsdp=4, then data=4: the sums round otherwise, and Adam divides by small numbers
    far = json.loads(re.search(r"largest differences: (.*)", said)[1])
    assert far["they moved, at most"] > 0.1 and far["parameters, at most"] < 1e-3
    assert far["objective/scores"] == 0 and far["objective/kl"] < 1e-3 and far["loss/value_avg"] < 1e-3
