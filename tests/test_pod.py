"""A pod is judged without one: the real programs for 16 chips where libtpu is installed, the judgement itself anywhere."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import pod, pod_judge
from benchmarks.hlo import Collective, Loop, bytes_of
from benchmarks.pod_programs import PROGRAMS, Case, lower
from benchmarks.pod_report import KINDS, picture, show
from pgjax.parallel.mesh import make_mesh
from tests.tiny import tiny_lm

ROOT = Path(__file__).resolve().parents[1]
DECODE, LAYERS, CHUNKS = Loop("while.1", None, "jit(f)/while"), Loop("while.2", 30, ""), Loop("while.3", 48, "")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU's compiler: pip install 'jax[tpu]'"
)
@pytest.mark.parametrize("programs", [("sampler", "learner"), pytest.param(PROGRAMS, marks=pytest.mark.campaign)])
def test_the_programs_of_16_chips_fit_and_send_what_they_should(programs, tmp_path):
    # In a process of its own: the tests' process never loads libtpu. Nothing of how the tests compile reaches it.
    quick = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    env = {name: value for name, value in os.environ.items() if name not in quick} | {"JAX_PLATFORMS": "cpu"}
    path = tmp_path / "pod.json"
    command = [sys.executable, "-m", "benchmarks.pod", "--topologies", "v5e:4x4", "--models", "135M", "--no-search"]
    command += [
        "--programs",
        *programs,
        "--prompt-length",
        "32",
        "--new-tokens",
        "32",
    ]  # the same programs, compiled in half the time
    done = subprocess.run([*command, "--json", str(path)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["program"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == set(programs)
    for row in rows.values():
        assert row["chips"] == 16 and row["defects"] == [] and 0 < row["memory"]["used"] <= row["limit"]
    _, decode = rows["sampler"]["phases"]
    assert [(one["kind"], one["loops"], one["bytes"]) for one in decode["collectives"]] == [("all-reduce", [None], 4)]
    (learner,) = rows["learner"]["phases"]
    passes = [phase for program in rows.keys() - {"sampler"} for phase in rows[program]["phases"]]
    assert any(one["kind"] == "reduce-scatter" and 30 in one["loops"] for one in learner["collectives"])
    # The loop over the vocabulary is there (49152 = 48 * 1024), and sends nothing.
    for phase in passes:
        assert any(48 in loops for loops in phase["loops"])
        assert not any(48 in one["loops"] for one in phase["collectives"])


@pytest.fixture(scope="module")
def case():
    return Case("v5e:4x4", "tiny", make_mesh(data=2, fsdp=2), tiny_lm("llama", "bfloat16"), 8, 4)


@pytest.fixture(scope="module")
def judged(once, case):
    def make(folder):
        rows = [pod_judge.judge(case, program, 1) for program in ("sampler", "learner")]
        (folder / "rows.json").write_text(json.dumps(rows))

    return once("pod", make) / "rows.json"


@pytest.fixture
def rows(judged):
    return json.loads(judged.read_text())


@pytest.mark.campaign
def test_the_bytes_of_a_chip_are_all_accounted_for(rows):
    for row in rows:
        memory = row["memory"]
        assert sum(memory[kind] for kind in KINDS) == memory["used"]
        parts = ("arguments", "results", "temporaries", "code", "beside")
        assert sum(memory[part] for part in parts) == memory["used"]
    sampler, learner = (row["memory"] for row in rows)
    assert sampler["moments"] == learner["cache"] == learner["gathered"] == 0
    assert sampler["beside"] == learner["beside"] + learner["moments"]
    assert rows[0]["rows"] == 4  # one for each part of data x fsdp


@pytest.mark.parametrize("program", ["teacher_force", "reference"])
def test_a_pass_over_the_samples_is_that_of_training(case, program):
    lowered = lower(case, program, 1)  # two parts of a row for each part of data x fsdp; a window of 4 new tokens
    assert {x.shape for x in jax.tree.leaves(lowered.out_info)} == {(8, 5)}


def test_prefill_and_decode_are_told_apart(rows):
    prefill, decode = rows[0]["phases"]
    assert any(one["kind"] == "all-gather" for one in prefill["collectives"])  # the parameters, once
    assert [(one["kind"], one["loops"]) for one in decode["collectives"]] == [("all-reduce", [None])]  # all rows done?
    assert (
        prefill["flops"] > decode["flops"] > 0 and prefill["compiler_seconds"] is None
    )  # the CPU's compiler says no cycles


def test_a_gradient_that_is_not_scattered_is_a_defect(rows):
    # The CPU's compiler writes a reduce-scatter as an all-reduce and a slice: just what must not happen on a TPU.
    assert rows[0]["defects"] == []
    assert any("a gradient reduced whole: all-reduce" in defect for defect in rows[1]["defects"])


def collective(kind, shape, participants, *loops):
    return Collective(kind, kind, (shape,), bytes_of(shape), participants, loops, False, "jit(f)/dot")


@pytest.mark.parametrize(
    ("mesh", "program", "found", "defects"),
    [
        (
            {"data": 2, "fsdp": 2},
            "sampler",
            [("all-gather", "bf16[16,24]", 2), ("all-gather", "bf16[16,24]", 2, LAYERS)],
            [],
        ),
        ({"data": 2, "fsdp": 2}, "sampler", [("all-reduce", "u32[]", 4, DECODE)], []),
        ({"data": 2, "fsdp": 2}, "sampler", [("all-gather", "bf16[16,24]", 2, DECODE)], ["in the decode loop"]),
        ({"tensor": 4}, "sampler", [("all-reduce", "bf16[4,1,16]", 4, DECODE)], []),  # activations
        ({"tensor": 4}, "sampler", [("all-gather", "bf16[16,24]", 4, DECODE)], ["in the decode loop"]),
        ({"data": 2, "fsdp": 2}, "learner", [("reduce-scatter", "f32[1,16,24]", 2, LAYERS)], []),
        ({"data": 2, "fsdp": 2}, "learner", [], ["no reduce-scatter of the gradient"]),
        ({"data": 4}, "learner", [("all-reduce", "f32[24,16]", 4, LAYERS)], []),  # nothing is split over fsdp
        (
            {"data": 2, "fsdp": 2},
            "learner",
            [("reduce-scatter", "f32[1,16,24]", 2, LAYERS), ("all-reduce", "f32[24,16]", 2, LAYERS)],
            ["a gradient reduced whole"],
        ),
        (
            {"data": 2, "fsdp": 2},
            "learner",
            [("reduce-scatter", "f32[16,24]", 2), ("all-gather", "bf16[8]", 2, LAYERS, CHUNKS)],
            ["in the loop over the vocabulary"],
        ),
    ],
)
def test_what_is_misplaced_is_named(case, mesh, program, found, defects):
    wide = case.lm._replace(arch=dataclasses.replace(case.lm.arch, vocab_size=48 * 1024))
    case = case._replace(mesh=make_mesh(**mesh), lm=wide)
    named = pod_judge.misplaced(case, program, [collective(*one) for one in found])
    assert [line.split(":")[0] for line in named] == defects


@pytest.mark.parametrize(
    ("used", "rows", "limit", "expected", "compilations"),
    [
        (lambda n: 10 + n, 2, 100, 80, 1),  # the line leads there at once; 96 would be too many
        (lambda n: 20 + n, 2, 100, 80, 2),  # what was taken to grow is fixed in part
        (lambda n: 10 + n * n, 2, 100, 8, 6),  # it leads too far, and is corrected
        (lambda n: 10 + n if n < 17 else math.inf, 4, 100, 16, 5),  # no room, and nobody says how much is missing
        (lambda n: 10.0, 4, 1e6, 4096, 1),  # nothing grows: the most that is tried
        (lambda n: 200 if n > 1 else 50, 8, 100, 1, 3),  # the first is too large already
        (lambda n: 200, 4, 100, 0, 2),  # not even one
    ],
)
def test_the_largest_batch_is_found_with_few_compilations(used, rows, limit, expected, compilations):
    asked = []
    found = pod_judge.largest(lambda n: asked.append(n) or used(n), limit, rows, used(rows), 10)
    assert found == expected and len(asked) == compilations, asked


def test_tables_and_picture_show_every_row_and_defect(rows, tmp_path, capsys):
    report = {"machine": {"libtpu": "0.0", "jax": "0.0"}, "rows": rows}
    show(report)
    out = capsys.readouterr().out
    assert all(word in out for word in ("d2 f2", "prefill", "decode", "learner", "DEFECT v5e:4x4 tiny learner"))
    assert max(map(len, out.splitlines())) <= 100
    assert picture(tmp_path / "new" / "pod.png", report).stat().st_size > 5_000


def test_it_goes_on_from_what_is_there_and_searches_only_what_is_asked_for(rows, tmp_path, monkeypatch):
    path = tmp_path / "pod.json"
    here = {"libtpu": "1", "jax": "2"}
    old = [{**rows[0], "topology": name, "model": "135M"} for name in ("v5e:4x4", "v5e:16x16")]
    path.write_text(json.dumps({"machine": here, "rows": [{**old[0], "largest_rows": 64}, old[1]]}))
    monkeypatch.setattr(pod, "check", lambda config: None)
    monkeypatch.setattr(pod.importlib.metadata, "version", lambda name: "1")
    monkeypatch.setattr(pod, "case_of", lambda config, *names: names)
    judged, searched = [], []
    monkeypatch.setattr(
        pod,
        "judge",
        lambda case, program, rows_: (
            judged.append(case) or {**rows[0], "topology": case[0], "model": case[1], "program": program}
        ),
    )
    monkeypatch.setattr(pod, "largest_rows", lambda case, row: searched.append(case) or 512)
    monkeypatch.setattr(pod, "show", lambda report: None)
    config = pod.Config(topologies=("v5e:4x4",), models=("135M", "0.5B"), programs=("sampler",), go_on=True, json=path)
    with pytest.raises(ValueError, match="made with jax 2, here is 3: leave out --go-on"):
        monkeypatch.setattr(pod, "machine", lambda: {"jax": "3"})
        pod.main(config)
    monkeypatch.setattr(pod, "machine", lambda: {"jax": "2"})
    report = pod.main(config)
    assert judged == searched == [("v5e:4x4", "0.5B")]
    assert [row.get("largest_rows") for row in report["rows"]] == [64, 512, None]
    assert set(report["chips"]) == {"v5e:4x4", "v5e:16x16"}


def test_what_cannot_be_compiled_is_refused_at_once(monkeypatch):
    with pytest.raises(ValueError, match=r"models: 3B not known; there are 135M, 0.5B, 1.5B, 8B"):
        pod.main(pod.Config(models=("135M", "3B")))
    monkeypatch.setattr(pod.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(pod.MissingPackageError, match="libtpu, which compiles for TPUs, is not installed"):
        pod.main(pod.Config())
