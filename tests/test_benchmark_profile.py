"""The profile of a step and of an update: products do the work counted on paper, and no time is lost or counted twice."""

import json

import pytest

import pgjax as pg
from benchmarks import profile
from pgjax.run.flops import forward_flops
from pgjax.run.peaks import Peaks
from tests.tiny_task import save_tiny_model


@pytest.fixture(scope="module")
def report(once):
    def make(folder):
        sizes = {"batch_size": 4, "prompt_length": 8, "new_tokens": 4, "lines": 3}
        model = save_tiny_model(folder / "model")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(profile, "measured_peaks", lambda dtype: Peaks(1e12, 1e10, 1e10))
            profile.main(profile.Config(model=str(model), json=folder / "report.json", **sizes))

    return json.loads((once("profile", make) / "report.json").read_text())


def rows_of(report, name, kind):
    return [
        row for row in report["rows"] if row["who"] == f"pgjax {name}" and row["kind"] == kind and row["what"] == ""
    ]


@pytest.mark.campaign
def test_the_products_of_a_step_are_those_on_paper(report, tmp_path):
    arch = pg.load(save_tiny_model(tmp_path))[0].arch
    weights, attention = (rows_of(report, "sampler, a step", kind) for kind in ("weights", "attention"))
    assert sum(row["flops"] for row in weights) == forward_flops(arch, tokens=4, context=0, head_tokens=4)
    slots = 8 + 4  # the whole cache, what is still empty too
    assert sum(row["flops"] for row in attention) == 4 * 4 * arch.depth * arch.heads * arch.head_dim * slots


@pytest.mark.campaign
def test_an_updates_products_are_forward_and_backward(report, tmp_path):
    arch = pg.load(save_tiny_model(tmp_path))[0].arch
    rows = rows_of(report, "update", "weights")
    once = forward_flops(arch, tokens=4 * 12, context=0, head_tokens=4 * 5)
    assert 3 * once <= sum(row["flops"] for row in rows) < 4.2 * once  # of the head, the logits are computed twice


def test_all_of_the_time_is_counted_once(report):
    for name in ("sampler, a step", "update"):
        rows = [row for row in report["rows"] if row["who"] == f"pgjax {name}"]
        kinds, products = ([row for row in rows if (row["what"] == "") is whole] for whole in (True, False))
        assert sorted(row["kind"] for row in kinds) == ["all else", "attention", "weights"]
        assert sum(row["share"] for row in kinds) == pytest.approx(1) and all(row["seconds"] > 0 for row in kinds)
        assert len(products) == 3 and sum(row["share"] for row in products) < 1  # the longest of them


def test_a_trace_without_the_program_is_refused(tmp_path):
    with pytest.raises(ValueError, match="names no operation of the program"):
        profile.operation_spans(tmp_path, "HloModule jit_f")


def test_operations_at_the_same_moment_get_equal_parts_of_it():
    runs = [
        profile.Span("a", 0.0, 2.0, 2.0), profile.Span("b", 1.0, 4.0, 4.0), profile.Span("a", 1.0, 2.0, 2.0),
        profile.Span("c", 1.0, 1.5, 6.0), profile.Span("d", 7.0, 8.0, 8.0),
    ]  # fmt: skip
    found = profile.divided(runs)
    assert found["a"] == (pytest.approx(1 + 0.5 * 2 / 4 + 0.5 * 2 / 3), 2)
    assert found["b"] == (pytest.approx(0.5 / 4 + 0.5 / 3 + 2), 1)
    assert found["c"] == (pytest.approx(0.5 / 4 + 2), 1)  # from 4 on nothing else goes on
    assert sum(seconds for seconds, _ in found.values()) == pytest.approx(7.0)  # nothing ran from 6 to 7
