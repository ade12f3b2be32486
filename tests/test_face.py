"""`import pgjax`: every public name resolves, what is not used is not imported, and types are seen from outside."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pgjax as pg

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


def test_a_type_checker_sees_the_types_of_public_names(tmp_path):
    """Every public name has a type in the stub, and it is the one that its home gives."""
    user = tmp_path / "user.py"
    user.write_text("import pgjax as pg\nreveal_type(pg.masked_mean)\nreveal_type(pg.CausalLM)\npg.no_such_name\n")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--ignore-missing-imports", str(user)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert "def (x: " in said and "pgjax.models.causal_lm.CausalLM" in said
    assert 'Module has no attribute "no_such_name"' in said
    assert (ROOT / "pgjax" / "py.typed").is_file()


def test_the_version_is_the_installed_one():
    assert pg.__version__ == importlib.metadata.version("pgjax")


def test_the_wheel_takes_every_room_and_the_marker_for_type_checkers():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["packages"]["find"]["include"] == ["pgjax*"]
    assert set(settings["package-data"]["pgjax"]) == {"py.typed", "*.pyi"}
    assert settings["package-data"]["pgjax.run.report"] == ["page.*"]  # its style and its script
    folders = {path.parent for path in (ROOT / "pgjax").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)  # a folder without one is no package
