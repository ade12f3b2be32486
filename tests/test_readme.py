"""What README shows runs as it stands: its Python, its commands, its flags and its links."""

import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax.rollout.rewards import check_reward
from tests.tiny_task import save_tiny_model

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
LOSSES, MODEL, ALGORITHM, REWARD = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SCRIPTS = ("export", "ppo", "sft", "reward_model", "rlhf", "overoptimisation")
# flags of other programs: pip, gcloud, srun
FOREIGN = {"no-deps", "recurse", "write", "worker", "zone", "command", "nodes", "ntasks-per-node", "gpus-per-node"}


@pytest.fixture
def readers(once, monkeypatch):
    """Run code as a reader would, with a tiny model in place of the one that it loads; gives what it has defined."""
    folder = once("readme_model", lambda folder: save_tiny_model(folder, max_positions=256))
    load = pg.load
    monkeypatch.setattr(pg, "load", lambda source: load(folder))

    def run(code: str) -> dict:
        names: dict = {"__name__": "readme"}
        exec(compile(code, "README.md", "exec"), names)
        return names

    return run


def test_the_losses_of_the_front_page_train_policy_and_critic(readers):
    names = readers(LOSSES)
    sampled = np.asarray(names["rollout"].mask)
    assert sampled.any() and not np.asarray(names["advantages"])[~sampled].any()
    for part in ("lm", "value"):
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(names["gradient"][part]))
        assert 0 < largest < np.inf, part
    ahead = jax.tree.map(lambda x, slope: x - 1e-3 * slope, names["policy"], names["gradient"])
    assert names["loss"](ahead) < names["loss"](names["policy"])


@pytest.mark.filterwarnings("ignore:this model has no cache")
def test_a_model_of_another_library_samples(readers):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        names = readers(MODEL)
    assert np.asarray(names["rollout"].mask)[:, 1:].all()


def test_a_new_algorithm_is_a_script_of_at_most_60_lines(readers, capsys):
    names = readers(ALGORITHM)
    assert len(ALGORITHM.splitlines()) <= 60
    assert len(capsys.readouterr().out.splitlines()) == 10
    assert all(np.isfinite(float(value)) for value in names["metrics"].values())
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), names["params"], names["state"].learner.params["lm"])
    assert all(jax.tree.leaves(moved))


def test_the_new_algorithm_is_the_one_of_its_paper(readers):
    """The gradient by a log-probability is -min(r, 1 + cap) A, at every ratio: what is clipped still learns."""
    cispo = readers(ALGORITHM.partition("lm, params")[0])["cispo"](cap=0.2)
    ratios, advantages = jnp.array([[0.5, 1.0, 2.0]]), jnp.array([[1.0, -1.0, 3.0]])

    class Batch:
        old_logprobs = jnp.zeros((1, 3))

    Batch.advantages = advantages
    slope = jax.grad(lambda logprobs: cispo.token_loss(logprobs, Batch).sum())(jnp.log(ratios))
    np.testing.assert_allclose(slope, [[-0.5, 1.0, -3.6]], rtol=1e-6)


def test_the_reward_of_the_front_page_is_one(readers):
    politeness = readers(REWARD)["politeness"]
    check_reward(politeness, ["topic"])
    assert politeness(["Ask", "Ask"], ["Please!", "Now"], topic=["a", "b"]) == [1.0, 0.0]


@pytest.mark.parametrize("name", sorted({*re.findall(r"python3? -m ((?:experiments|benchmarks)[\w.]*)", README)}))
def test_every_command_names_a_module(name):
    name = name.rstrip(".")
    found = importlib.util.find_spec(name)
    assert found is not None
    if found.submodule_search_locations is not None:
        assert importlib.util.find_spec(f"{name}.__main__") is not None, f"python -m {name} has nothing to run"


def test_every_flag_is_one_of_a_script():
    fields = {
        field.name.replace("_", "-")
        for script in SCRIPTS
        for value in vars(importlib.import_module(f"experiments.{script}")).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
        for field in dataclasses.fields(value)
    }
    install = re.compile(r"^python3 -m venv .*$", flags=re.MULTILINE)
    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)\b(?!_)", install.sub("", README)))
    unknown = sorted(
        flags - fields - {f"no-{field}" for field in fields} - FOREIGN - {"help", "from"}
    )  # from is a word of Python, and no field
    assert not unknown, f"README names --{unknown[0]}, which no script has"


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "pgjax/core/README.md",
        "experiments/README.md",
        "findings/README.md",
    ],
)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", (ROOT / page).read_text())
    missing = [link for link, _ in links if "://" not in link and not ((ROOT / page).parent / link).exists()]
    assert not missing


def test_every_finding_is_listed_once_and_only_findings_are():
    listed = re.findall(r"^\| `(\w+\.sh)` \|", (ROOT / "findings" / "README.md").read_text(), flags=re.MULTILINE)
    assert listed == sorted(path.name for path in (ROOT / "findings").glob("*.sh"))
