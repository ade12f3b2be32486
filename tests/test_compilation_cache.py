"""Compiled programs kept between processes: they are found again, they change no bit, and a run does without where it must."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tyro

from pgjax.run import devices, session
from tests import compilation_cache_processes, kill_campaign, pair


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of three processes: what each left behind, its counts, and the programs."""
    root = tmp_path_factory.mktemp("cache")
    environment = {name: x for name, x in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERSIST"))}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.compilation_cache_processes", str(root)], cwd=Path(__file__).parents[1], env=environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    return root


@pytest.mark.campaign
def test_a_second_process_compiles_nothing_that_the_first_one_did(trained):
    without, writes, reads = (
        json.loads((trained / f"{name}.json").read_text()) for name in compilation_cache_processes.NAMES
    )
    assert without["cache_hits"] == without["cache_misses"] == 0
    files = list((trained / "programs").glob("*-cache"))
    assert len(files) == writes["cache_misses"] > 20  # that many were compiled and written
    assert reads["cache_misses"] == 0 and reads["cache_hits"] == reads["compile_requests_use_cache"] > 20
    assert reads["compile_requests_use_cache"] == writes["compile_requests_use_cache"]


@pytest.mark.campaign
def test_nothing_of_a_result_depends_on_where_its_programs_came_from(trained):
    """The state, the exported policies, every figure but the clock's, and the samples: bit for bit."""
    without, writes, reads = (kill_campaign.results(trained / name) for name in compilation_cache_processes.NAMES)
    assert without["step"] == 2 and len(without["policy"]) > 1000
    assert not kill_campaign.differing_results(without, writes) and not kill_campaign.differing_results(without, reads)


@pytest.fixture
def unset():
    """As where jax was told of no folder; what this process compiles stays where it was."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [(name, getattr(jax.config, name)) for name in names]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before:
        jax.config.update(name, value)


def test_a_folder_is_made_and_left_empty_until_something_is_compiled(unset, tmp_path, capsys):
    devices.start(devices.Flags(compilation_cache=tmp_path / "a" / "b"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == [] and capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_is_a_warning(unset, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    devices.start(devices.Flags(compilation_cache=tmp_path / "file" / "programs"))
    assert jax.config.jax_compilation_cache_dir is None
    said = capsys.readouterr().err
    assert said.startswith("warning: compiled programs are not kept: ") and str(tmp_path / "file") in said


def test_the_folder_that_jax_was_told_of_stays(unset, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    devices.start(devices.Flags(compilation_cache=tmp_path / "other"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine") and not (tmp_path / "other").exists()


def test_it_is_on_unless_turned_off_and_may_change_when_a_run_goes_on(unset):
    assert tyro.cli(devices.Flags, args=[]).compilation_cache == devices.USERS_CACHE
    off = tyro.cli(devices.Flags, args=["--compilation-cache", "None"])
    assert off.compilation_cache is None
    devices.start(off)
    assert jax.config.jax_compilation_cache_dir is None
    assert "compilation_cache" in session.INCIDENTAL


@pytest.mark.parametrize(
    ("xdg", "folder"),
    [("/somewhere", "/somewhere/pgjax/xla"), ("", "~/.cache/pgjax/xla"), (None, "~/.cache/pgjax/xla")],
)
def test_the_default_is_under_the_users_cache(monkeypatch, xdg, folder):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert devices.users_cache() == Path(folder)


SHARE = """
import sys
from pathlib import Path
import jax
from pgjax.run import devices
port, process, root = sys.argv[1:]

def start(folder):
    devices.start(devices.Flags(
        distributed=True, coordinator="localhost:" + port, num_processes=2, process_id=int(process), compilation_cache=folder))
    print(jax.config.jax_compilation_cache_dir)

start(None if process == "1" else Path(root, "wanted by one"))
if process == "1":
    exists, Path.exists = Path.exists, lambda path: False
start(Path(root, "seen by one"))
if process == "1":
    Path.exists = exists
start(Path(root, "of " + process))
"""


@pytest.mark.campaign
def test_processes_share_a_folder_or_use_none(tmp_path, monkeypatch):
    """One wants none, then one cannot see the folder, as on another machine; then all use the folder of process 0."""
    for name in [name for name in os.environ if name.startswith(("JAX_COMPILATION", "JAX_PERSIST"))]:
        monkeypatch.delenv(name)
    port = str(pair.free_port())
    ended = pair.finish([pair.start(["-c", SHARE, port, str(i), str(tmp_path)]) for i in range(2)], seconds=120)
    assert [code for code, _, _ in ended] == [0, 0], ended
    for _, said, _ in ended:
        assert said.splitlines()[-3:] == ["None", "None", str(tmp_path / "of 0")], said
    warnings = [[line for line in errors.splitlines() if "not kept" in line] for _, _, errors in ended]
    assert len(warnings[0]) == 1 and not warnings[1]
    assert f"not all processes see {tmp_path / 'seen by one'}" in warnings[0][0]
    assert not list((tmp_path / "seen by one").iterdir())
