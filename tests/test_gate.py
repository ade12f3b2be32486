"""Format, lint and types, so that one pytest command is the whole gate."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pgjax as pg

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "command",
    [["ruff", "format", "--check", "--quiet", "."], ["ruff", "check", "--quiet", "."], ["mypy"]],
    ids=["format", "lint", "types"],
)
def test_gate(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reference_is_written_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    command, path = [sys.executable, ".ci/reference.py", str(tmp_path)], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **path}, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    page = (tmp_path / "pgjax.html").read_text()
    missing = [name for name in pg.__all__ if f'id="{name}"' not in page]
    assert not missing
    assert "min(r A, clip(r, 1 - clip_eps, 1 + clip_eps_high) A)" in page, "equations are there"
    assert "b<sub>i</sub> = Σ<sub>j ≠ i</sub> s<sub>j</sub> / (G - 1)" in page, "and set"
    assert "logprobs: jax.typing.ArrayLike" in re.sub("<[^>]*>", "", page), (
        "a union that would run off the page has its name"
    )
    assert "jaxlib" not in page
    assert "True where a token is not padding" in page, "comments on fields are there"
