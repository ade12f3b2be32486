"""A training that is killed again and again ends where one that is left in peace does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")


# Two kills are one in a save and one out of it; the campaign has each signal, rare moments, and moves from mesh to mesh.
@pytest.mark.parametrize(
    ("kills", "steps", "flags"), [(2, 5, []), pytest.param(20, 16, ["--moves"], marks=pytest.mark.campaign)]
)
def test_a_training_that_is_killed_ends_with_the_same_bits(tmp_path, kills, steps, flags):
    campaign = subprocess.run(
        [sys.executable, "-m", "tests.kill_campaign", "--kills", str(kills), "--steps", str(steps), *flags],
        cwd=Path(__file__).parents[1], env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    printed = campaign.stdout
    assert campaign.returncode == 0, printed[-2000:] + campaign.stderr[-4000:]
    met = re.findall(r"^\d+: (SIG\w+) after .*, saving: (\w+), (\d+) steps", printed, re.MULTILINE)
    assert [by for by, _, _ in met] == [SIGNALS[i % 3] for i in range(kills)]
    assert {saving for _, saving, _ in met[::2]} == {"True"} and any(int(done) > 0 for _, _, done in met)
    assert "every run ended bit for bit as the undisturbed one" in printed
