"""A training that is killed again and again ends where one that is left in peace does."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_a_training_that_is_killed_four_times_ends_with_the_same_bits(tmp_path):
    """The whole campaign, and moves from mesh to mesh: python -m tests.kill_campaign --kills 20 --steps 16 --moves."""
    campaign = subprocess.run(
        [sys.executable, "-m", "tests.kill_campaign", "--kills", "4", "--steps", "6"],
        cwd=Path(__file__).parents[1], env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    printed = campaign.stdout
    assert campaign.returncode == 0, printed[-2000:] + campaign.stderr[-4000:]
    kills = re.findall(r"^\d+: (SIG\w+) after .*, saving: (\w+), (\d+) steps", printed, re.MULTILINE)
    assert [by for by, _, _ in kills] == ["SIGKILL", "SIGTERM", "SIGINT", "SIGKILL"]
    assert [saving for _, saving, _ in kills[::2]] == ["True", "True"] and any(int(steps) > 0 for _, _, steps in kills)
    assert "every run ended bit for bit as the undisturbed one" in printed
