"""`import pgjax`: every public name resolves, what is not used is not imported, and types are seen from outside."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pgjax as pg
from tests.sizes import campaign_but_for

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("flax", "transformers", "orbax", "optax", "grain", "rich", "safetensors", "gguf")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_resolves():
    assert {"masked_mean", "sample", "load", "UserError"} <= set(pg.__all__) <= set(dir(pg))
    for name in pg.__all__:
        assert getattr(pg, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'pgjax' has no attribute 'masked_median'"):
        pg.masked_median  # noqa: B018


def test_the_losses_import_nothing_heavy():
    code = f"import sys, pgjax; pgjax.masked_mean; print([name for name in {HEAVY} if name in sys.modules])"
    assert run(code).strip() == "[]"


def test_the_core_imports_where_only_jax_and_chex_are_installed():
    """The other libraries that pyproject asks for are hidden."""
    code = """
import importlib, pkgutil, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import pgjax.core
rooms = pkgutil.iter_modules(pgjax.core.__path__)
print(len([importlib.import_module("pgjax.core." + room.name) for room in rooms]))
""".replace("{hidden}", repr(set(HEAVY)))
    assert int(run(code)) >= 9


USER = """
from typing import Any
import jax
import jax.numpy as jnp
import optax
import pgjax as pg
from pgjax.run.checkpoint.checkpoints import Checkpoints

def hidden(params: Any, tokens: jax.Array) -> jax.Array:
    return jnp.cumsum(params["table"][tokens], axis=1)

def advantages(experience: pg.Experience) -> jax.Array:
    return pg.masked_whiten(experience.returns, experience.mask)

def token_loss(logprobs: jax.Array, batch: pg.Batch) -> jax.Array:
    return -batch.advantages * logprobs

def main(folder: str, key: jax.Array) -> float:
    lm = pg.bundle(hidden, lambda params: params["table"], vocab_size=4, max_positions=16)
    params = {"table": jnp.ones((4, 2))}
    rollout: pg.Rollout = pg.sample(lm, params, [[1]], [[True]], key, max_new_tokens=2, top_p=0.9)
    for optimizer in (optax.adam(1e-3), pg.adamw(1e-3, updates=3)):
        it = pg.iteration(lm, pg.Algorithm(advantages, token_loss, "token_mean"), optimizer, max_new_tokens=3)
        state = it.init(params, key)
        sampled = it.sample(state, jnp.ones((2, 1), int), jnp.ones((2, 1), bool))
        state, metrics = it.learn(state, sampled, [0.0, 1.0])
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state.learner, {"version": pg.__version__})
    loss: jax.Array = pg.policy_gradient_loss(rollout.logprobs, jnp.ones(3), rollout.mask)
    return float(loss) + float(metrics["objective/entropy"])

reveal_type(pg.masked_mean)
reveal_type(pg.CausalLM)
pg.no_such_name
pg.adamw(1e-3)
"""

STRICTNESS = [[], ["--strict"]]


@pytest.mark.campaign
@pytest.mark.parametrize("options", campaign_but_for(STRICTNESS, []))
def test_a_type_checker_sees_the_types_of_public_names(options, tmp_path):
    """Every public name has a type in the stub, it is the one that its home gives, and a script by it has no error."""
    user = tmp_path / "user.py"
    user.write_text(USER)
    command = [sys.executable, "-m", "mypy", *options, "--no-error-summary", "--ignore-missing-imports", str(user)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert "def (x: " in told and "pgjax.models.causal_lm.CausalLM" in told
    errors = [line for line in told.splitlines() if "user.py" in line and " error: " in line]
    assert len(errors) == 2 and 'Module has no attribute "no_such_name"' in errors[0], told
    assert 'Missing named argument "updates" for "adamw"' in errors[1], told
    assert (ROOT / "pgjax" / "py.typed").is_file()


def test_the_version_is_the_installed_one():
    assert pg.__version__ == importlib.metadata.version("pgjax")


def test_the_wheel_takes_every_room_and_the_marker_for_type_checkers():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["packages"]["find"]["include"] == ["pgjax*"]
    assert set(settings["package-data"]["pgjax"]) == {"py.typed", "*.pyi"}
    assert settings["package-dir"] == {"": "."}, (
        "else an editable install is an import hook, which type checkers do not follow"
    )
    assert settings["package-data"]["pgjax.run.report"] == ["page.*"]  # its style and its script
    folders = {path.parent for path in (ROOT / "pgjax").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)  # a folder without one is no package


def test_the_source_archive_takes_every_folder():
    lines = (ROOT / "MANIFEST.in").read_text().splitlines()
    held = {line.removeprefix("graft ") for line in lines if line.startswith("graft ")} | {"pgjax"}
    code = {folder.name for folder in ROOT.iterdir() if folder.is_dir() and next(folder.rglob("*.py"), None)}
    assert {name for name in code if name not in ("runs", "build") and not name.startswith(".venv")} <= held
    assert {"tests", "experiments", "benchmarks", "findings", ".ci"} <= held
