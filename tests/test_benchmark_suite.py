"""Log-probabilities, compilation, growth and the whole suite run from start to end on tiny sizes, and say what they measured."""

import itertools
import json
import math

import pytest

from benchmarks import __main__ as suite
from benchmarks import compile, logprobs, pictures, scaling, timing
from pgjax.run.peaks import Peaks

PEAKS = Peaks(matmul_flops=1e12, copy_bytes=1e10, read_bytes=1e10)
TINY = {"batch": 2, "length": 4, "vocabulary": 32, "depth": 1, "width": 16, "doublings": 1, "repeats": 1}


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch):
    monkeypatch.setattr(timing, "measured_peaks", lambda dtype: PEAKS)


def test_log_probabilities_of_all_programs_agree_and_ours_hold_less(tmp_path):
    config = logprobs.Config(batch_size=2, length=32, vocab_size=2048, width=16, chunk_size=64, repeats=1)
    report = logprobs.main(config)
    rows = {(row["who"], row["dtype"]): row for row in report["rows"]}
    assert [who for who, dtype in rows if dtype == "float32"] == ["pgjax", logprobs.NAIVE]
    assert [who for who, dtype in rows if dtype == "bfloat16"] == ["pgjax", logprobs.NAIVE, logprobs.WIDE]
    for (who, dtype), row in rows.items():
        assert row["value"] == pytest.approx(rows["pgjax", dtype]["value"], abs=0.2 if dtype == "bfloat16" else 1e-3)
        assert row["gradient_error"] < (0.02 if dtype == "bfloat16" else 1e-5)
        assert row["temp_share"] == row["temp_bytes"] / rows[logprobs.NAIVE, dtype]["temp_bytes"]
        assert row["flops"] == 6 * 64 * 2048 * 16
        assert who != "pgjax" or row["temp_share"] < 1
    assert rows["pgjax", "float32"]["temp_share"] < 0.5
    assert logprobs.NAIVE in rows["pgjax", "float32"]["times_as_fast_as"]


@pytest.mark.campaign
def test_a_second_process_finds_both_programs_in_the_cache():
    sizes = {"sampler_rows": 2, "prompt_length": 4, "new_tokens": 2, "learner_rows": 2, "length": 8, "window": 5}
    report = compile.main(compile.Config(depth=1, repeats=1, **sizes))
    rows = {(row["program"], row["cache"]): row for row in report["rows"]}
    assert set(rows) == {(program, cache) for program in ("sampler", "learner", "both") for cache in ("cold", "cached")}
    for program, count in (("sampler", 1), ("learner", 1), ("both", 2)):
        cold, cached = rows[program, "cold"], rows[program, "cached"]
        assert (cold["cache_hits"], cold["cache_misses"]) == (0, count)
        assert (cached["cache_hits"], cached["cache_misses"]) == (count, 0)
    for cache in ("cold", "cached"):
        parts = rows["sampler", cache]["seconds"] + rows["learner", cache]["seconds"]
        assert rows["both", cache]["seconds"] == pytest.approx(parts)
        assert rows["both", cache]["round_seconds"] == [rows["both", cache]["seconds"]]


@pytest.mark.campaign
def test_a_program_that_does_not_compile_is_named_with_its_last_words():
    with pytest.raises(RuntimeError, match=r"(?s)compiling the sampler.*KeyError.*'sizes'"):
        compile.once({"program": "sampler", "cache": None, "model": {}})


@pytest.mark.parametrize("power", [-1.0, 0.0, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found_whatever_its_factor(power):
    sizes = [3, 6, 12, 48]
    assert scaling.exponent(sizes, [7.5 * n**power for n in sizes]) == pytest.approx(power, abs=1e-12)


def test_a_fixed_part_lowers_the_exponent_and_least_at_the_largest_sizes():
    curve = [
        {"who": "pgjax learner", "dtype": "float32", "dimension": "batch", "size": n, "seconds": 4.0 + n, "temp_bytes": n,
         "held_bytes": n**2, "flops": 1.0, "round_seconds": [n, n**2]} for n in (1, 2, 4, 8)
    ]  # fmt: skip
    row = scaling.exponents(curve)
    assert row["rounds_exponents"] == pytest.approx([1.0, 2.0])
    assert row["exponents"] == pytest.approx({**row["exponents"], "temp_bytes": 1.0, "held_bytes": 2.0, "flops": 0.0})
    assert row["last_exponents"]["seconds"] == pytest.approx(math.log2(12 / 8))
    assert row["exponents"]["seconds"] < row["last_exponents"]["seconds"] < 1


def test_an_exponent_of_nothing_is_refused():
    for sizes, values in (([1], [1.0]), ([1, 2], [1.0, 0.0])):
        with pytest.raises(ValueError, match="two sizes or more"):
            scaling.exponent(sizes, values)


@pytest.mark.campaign
def test_growth_is_told_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "DIMENSIONS", {"learner": ("batch", "microbatches"), "decode": ("vocabulary",)})
    report = scaling.main(scaling.Config(**TINY))
    curves = [(row["who"], row["dimension"]) for row in report["exponents"]]
    assert curves == [(f"pgjax {name}", x) for name, of in scaling.DIMENSIONS.items() for x in of]
    fits = {curve: row["exponents"] for curve, row in zip(curves, report["exponents"], strict=True)}
    assert fits["pgjax learner", "batch"]["flops"] == pytest.approx(1.0)
    assert fits["pgjax learner", "microbatches"]["flops"] == pytest.approx(0.0)
    assert 0 < fits["pgjax decode", "vocabulary"]["held_bytes"] < 1
    assert len(report["rows"]) == 2 * len(curves) and all(row["mfu"] > 0 for row in report["rows"])
    base = [row["seconds"] for row in report["rows"] if row["who"] == "pgjax learner"][::2]
    assert base[0] == base[1]  # one program, and not one measurement a curve
    assert [path.name for path in pictures.draw(tmp_path, {"scaling": report})] == ["growth.png"]


def test_names_beside_the_roofline_stand_apart_and_inside():
    heights = pictures.spread([1.0, 0.99, 0.98, 0.5, 0.49, 0.0], 0.05)
    assert all(above - below >= 0.05 - 1e-9 for above, below in itertools.pairwise(heights))
    assert max(heights) <= 1


def report_of(seconds: float) -> timing.Row:
    row = {"who": "pgjax", "dtype": "float32", "seconds": seconds, "flops": 1e9, "bytes": 1e8, "achieved": 0.5}
    peaks = {"float32": PEAKS._asdict()}
    return {"peaks": peaks, "rows": [{**row, "limit": "memory"}, {**row, "who": "torch", "seconds": 2 * seconds}]}


class Part:
    """A benchmark that reports at once, or fails."""

    def __init__(self, report):
        self.report = report

    def main(self, config):
        if isinstance(self.report, Exception):
            raise self.report
        timing.save(self.report, config.json)
        return self.report


def test_a_benchmark_that_fails_is_named_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    parts = {name: Part(report_of(1.0)) for name in suite.BENCHMARKS}
    parts["logprobs"].report = MemoryError("no room for [4, 1024, 49152]")
    for name, part in parts.items():
        monkeypatch.setattr(suite.BENCHMARKS[name], "main", part.main)
    status = suite.main(suite.Config(output=tmp_path, only=("rollout", "logprobs", "learner")))
    assert status == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["learner.json", "rollout.json", "roofline.png"]
    assert json.loads((tmp_path / "learner.json").read_text()) == parts["learner"].report
    assert "FAILED logprobs: MemoryError: no room for [4, 1024, 49152]" in capsys.readouterr().out
    drawn = []
    monkeypatch.setattr(pictures, "draw", lambda folder, reports: drawn.append((folder, set(reports))) or [])
    assert suite.main(suite.Config(output=tmp_path, only=("rollout",))) == 0
    assert drawn == [(tmp_path, {"rollout", "learner"})]  # what an earlier run reported stays in the picture


def test_every_benchmark_is_given_its_file_and_the_peers_it_knows(tmp_path):
    config = suite.Config(output=tmp_path, peer=False, peer_pythons=("other/python",))
    made = {name: suite.configured(name, config) for name in suite.BENCHMARKS}
    assert {name: x.json for name, x in made.items()} == {name: tmp_path / f"{name}.json" for name in made}
    for name in ("rollout", "teacher_force", "learner", "iteration"):
        assert made[name].peer is False and made[name].peer_pythons == ("other/python",)


def test_every_target_is_of_a_benchmark_and_set_beside_its_row():
    assert {name for name, _, _ in suite.TARGETS} <= set(suite.BENCHMARKS)
    cells = suite.summary_rows({"learner": report_of(2.0), "scaling": report_of(1.0)})
    assert cells == [("learner", "float32", "2.00", "", "50% of memory", "", suite.TARGETS["learner", "", "float32"])]
