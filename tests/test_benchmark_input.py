"""Wrong input of a benchmark ends before any work, in one line that names its field; every field is explained in --help."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest
import tyro

from benchmarks import __main__ as suite
from benchmarks import (
    checks,
    compile,
    iteration,
    learner,
    logprobs,
    pictures,
    random_model,
    rollout,
    scaling,
    teacher_force,
)

MEASURING = (rollout, teacher_force, learner, logprobs, iteration, compile)
FOLDER = Path(suite.__file__).parent


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """Nothing may be loaded, measured or compiled before the input is known to be good."""

    def work(*args, **kwargs):
        raise AssertionError("work began")

    monkeypatch.setattr("pgjax.load", work)
    for module, name in ((logprobs, "begun"), (compile, "begun"), (scaling, "begun")):
        monkeypatch.setattr(module, name, work)


@pytest.mark.parametrize("module", [*MEASURING, scaling])
def test_a_count_below_one_is_refused_by_its_name(module):
    counts = [field for field in dataclasses.fields(module.Config) if field.type in ("int", "int | None")]
    assert {"repeats"} < {field.name for field in counts}
    for field in counts:
        if field.name != "seed":
            for value in (0, -2):
                with pytest.raises(ValueError, match=f"^{field.name} must be at least 1, got {value}$"):
                    module.main(module.Config(**{field.name: value}))
    with pytest.raises(AssertionError, match="work began"):
        module.main(module.Config())


@pytest.mark.parametrize("module", MEASURING)
def test_a_dtype_that_would_be_another_or_none_is_refused(module, capsys):
    for dtypes in (("float64",), ("float32", "float16"), ()):
        with pytest.raises(ValueError, match=r"^dtypes must be one or more of float32, bfloat16, got \("):
            module.main(module.Config(dtypes=dtypes))
    with pytest.raises(SystemExit):
        tyro.cli(module.Config, args=["--dtypes", "float64"])
    said = capsys.readouterr().err
    assert "float64" in said and "bfloat16" in said


@pytest.mark.parametrize("module", MEASURING)
def test_a_report_that_can_not_be_written_is_refused_and_its_folder_is_made(module, tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    for path in (file / "report.json", folder):
        with pytest.raises(ValueError, match=f"^json={path} can't be written: "):
            module.main(module.Config(json=path))
    with pytest.raises(AssertionError, match="work began"):
        module.main(module.Config(json=tmp_path / "a" / "b" / "report.json"))
    assert not list((tmp_path / "a" / "b").iterdir())  # no empty report is left there


def test_a_model_that_has_no_shape_is_refused():
    with pytest.raises(ValueError, match=r"^model must be one of 135M, .*got '136M'"):
        compile.main(compile.Config(model="136M"))


def test_the_suite_refuses_its_folder_and_interpreters_before_any_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "run_all", lambda *_: pytest.fail("work began"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^output=.*file/rollout.json can't be written: "):
        suite.main(suite.Config(output=tmp_path / "file"))
    with pytest.raises(ValueError, match=r"^peer_pythons: nowhere/python does not run"):
        suite.main(suite.Config(output=tmp_path / "new", peer_pythons=("nowhere/python",)))


def test_the_command_line_says_so_in_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks.rollout", "--repeats", "0"])
    with pytest.raises(SystemExit) as stopped:
        checks.command(rollout.main, rollout.Config, rollout.__doc__)
    assert stopped.value.code == "error: repeats must be at least 1, got 0"


def test_reports_of_a_trial_do_not_fall_among_the_committed_ones():
    assert suite.Config().output.parts[0] == "runs"
    assert "runs/" in (FOLDER.parent / ".gitignore").read_text().splitlines()
    assert suite.Config().output != pictures.Config().folder


def test_every_field_of_every_benchmark_is_explained_where_it_stands():
    """tyro shows the comment behind a field as its help, and a function's docstring; a comment on another line is lost."""
    programs = [
        path.stem for path in FOLDER.glob("*.py") if re.search(r"^ .*(tyro.cli|command)\(", path.read_text(), re.M)
    ]
    assert {"__main__", "scaling", "pod", "frontier", "pictures"} | {one.__name__[11:] for one in MEASURING} <= set(
        programs
    )
    for name in set(programs) - {"checks", "random_model"}:
        config = importlib.import_module(f"benchmarks.{name}").Config
        lines = [line for kind in config.__mro__[:-1] for line in inspect.getsource(kind).splitlines()]
        for field in dataclasses.fields(config):
            line = next(line for line in lines if line.strip().startswith(f"{field.name}:"))
            assert line.partition("  # ")[2], f"{name}: {line}"
    for name in inspect.signature(random_model.main).parameters:
        assert re.search(rf"^ +{name}: \w", random_model.main.__doc__, re.M), name
