"""The benchmarks run from start to end on a tiny model, and their figures follow from their times."""

import functools
import json
import subprocess
from pathlib import Path

import jax
import pytest

import pgjax as pg
from benchmarks import interpreters, learner, pictures, rollout, teacher_force, timing, worker
from pgjax.run.flops import decode_bytes
from pgjax.run.peaks import Peaks
from tests.tiny import tiny_lm, tiny_params

ARCH = pg.Architecture(
    family="llama", vocab_size=64, width=16, depth=2, heads=2, kv_heads=1, head_dim=8, mlp_width=32, max_positions=64,
    activation="silu", norm="rms", norm_eps=1e-5, rope=pg.Rope(theta=10000.0), gated_mlp=True, qkv_bias=False,
    out_bias=False, mlp_bias=False, qk_norm=False, tied=True,
)  # fmt: skip
PEAKS = Peaks(matmul_flops=1e12, copy_bytes=1e10, read_bytes=1e10)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    lm = pg.causal_lm(ARCH)
    pg.save_pretrained(folder, lm, lm.init(jax.random.key(0)), None)
    return str(folder)


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch):
    monkeypatch.setattr(timing, "measured_peaks", lambda dtype: PEAKS)


def test_contenders_run_in_turn_after_a_warm_up_each():
    order = []
    contenders = {name: timing.timed(functools.partial(order.append, name)) for name in "ab"}
    timing.alternate(contenders, 2)
    assert "".join(order) == "ababab"
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        timing.alternate(contenders, 0)


def test_contenders_own_samples_are_taken_without_the_warm_up():
    samples = iter(
        [timing.Sample(99.0, 99.0, {"loss": 99.0})] + [timing.Sample(x, x / 2, {"loss": -x}) for x in (3.0, 1.0, 8.0)]
    )
    found = timing.alternate({"a": lambda: next(samples)}, 3)["a"]
    assert found.wall == [3.0, 1.0, 8.0] and found.cpu == [1.5, 0.5, 4.0]
    assert timing.median_result(found, "loss") == -3.0
    row = timing.figures(found, tokens=6)
    assert (row["seconds"], row["tokens_per_second"], row["cpu_seconds"]) == (3.0, 2.0, 1.5)
    assert (row["fastest_seconds"], row["slowest_seconds"]) == (1.0, 8.0) and row["round_seconds"] == [3.0, 1.0, 8.0]


def test_both_measurements_of_the_peaks_are_kept_and_the_best_counts(monkeypatch):
    measured = iter([Peaks(1.0, 5.0, 3.0), Peaks(2.0, 4.0, 2.0), Peaks(1.0, 6.0, 1.0), PEAKS])
    monkeypatch.setattr(timing, "measured_peaks", lambda dtype: next(measured))
    report = {"peaks": {}, "measured_peaks": {}}
    best, times = timing.with_peaks(report, "float32", {"a": timing.timed(dict)}, 2)
    assert best == Peaks(2.0, 5.0, 3.0) and report["peaks"] == {"float32": best._asdict()} and len(times["a"].wall) == 2
    (both,) = report["measured_peaks"]["float32"]
    assert both["before"]["matmul_flops"] == 1.0 and both["after"]["matmul_flops"] == 2.0
    assert timing.with_peaks(report, "float32", {}, 1)[0] == PEAKS  # of a second pair, the best of all four
    assert [len(report["measured_peaks"]["float32"]), report["peaks"]["float32"]] == [2, PEAKS._asdict()]


def test_a_report_says_the_time_of_day_in_utc(monkeypatch):
    monkeypatch.setattr(timing.time, "gmtime", lambda: (2026, 1, 2, 3, 4, 5, 4, 2, 0))
    assert timing.machine()["date"] == "2026-01-02T03:04Z"


def test_a_report_names_the_commit_of_its_code(tmp_path, monkeypatch):
    def git(*arguments):
        names = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert timing.commit(tmp_path) == "unknown"
    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-m", "first")
    assert timing.commit(tmp_path) == git("rev-parse", "HEAD")[:12]
    (tmp_path / "code.py").write_text("2")
    assert timing.commit(tmp_path) == git("rev-parse", "HEAD")[:12] + "-dirty"
    assert timing.machine()["commit"] == timing.commit(Path(timing.__file__).parent)
    monkeypatch.setenv("PATH", "")
    assert timing.commit(tmp_path) == "unknown"


def test_a_call_in_this_process_is_timed_until_its_arrays_are_there():
    ticks = iter([1.0, 1.75])
    sample = timing.timed(lambda: {"loss": 2.0, "count": 3}, clock=lambda: next(ticks))()
    assert sample.wall == 0.75 and sample.cpu >= 0 and sample.result == {"loss": 2.0, "count": 3}
    assert timing.timed(lambda: jax.numpy.ones(3))().result == {}


def test_the_roofline_is_the_longer_of_products_and_reading():
    # 2 TFLOP at 1 TFLOP/s are 2 s, 5 GB at 10 GB/s half a second: products set the limit, and 4 s are half of it
    row = timing.roofline(4.0, flops=2e12, read=5e9, peaks=PEAKS)
    assert row == {"flops": 2e12, "bytes": 5e9, "mfu": 0.5, "mbu": 0.125, "limit": "matrix product", "achieved": 0.5}
    row = timing.roofline(4.0, flops=2e12, read=30e9, peaks=PEAKS)
    assert row["limit"] == "memory" and row["achieved"] == pytest.approx(0.75)


def test_ratios_are_taken_with_the_peers_that_do_the_same_work():
    def row(who, seconds, dtype="float32"):
        return {
            "who": who,
            "dtype": dtype,
            "seconds": seconds,
            "fastest_seconds": seconds / 2,
            "cpu_seconds": 3 * seconds,
        }

    rows = [
        row("pgjax PPO", 2.0),
        row("pgjax RLOO", 1.0),
        row("TRL PPO", 8.0),
        row("TRL RLOO", 5.0),
        row("TRL PPO", 1.0, "bfloat16"),
    ]
    timing.add_ratios(rows, {"pgjax PPO": ["TRL PPO"], "pgjax RLOO": ["TRL RLOO"]})
    assert rows[0]["times_as_fast_as"] == {"TRL PPO": {"wall": 4.0, "fastest": 4.0, "cpu": 4.0}}
    assert rows[1]["times_as_fast_as"] == {"TRL RLOO": {"wall": 5.0, "fastest": 5.0, "cpu": 5.0}}
    timing.add_ratios(rows)
    assert set(rows[0]["times_as_fast_as"]) == {"TRL PPO", "TRL RLOO"}


@pytest.mark.campaign
def test_rollout_reports_every_dtype_and_writes_what_it_returns(model, tmp_path, capsys):
    sizes = {"batch_size": 2, "prompt_length": 4, "new_tokens": 5, "repeats": 1}
    config = rollout.Config(model=model, peer=False, json=tmp_path / "new" / "report.json", **sizes)
    report = rollout.main(config)
    assert [(row["who"], row["dtype"]) for row in report["rows"]] == [("pgjax", "float32"), ("pgjax", "bfloat16")]
    assert all(row["tokens_per_second"] > 0 and set(row["parts"]) >= {"prefill"} for row in report["rows"])
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == json.loads(json.dumps(report))
    assert "--no-peer" in capsys.readouterr().out


def test_a_peer_that_is_not_installed_is_named(model, monkeypatch, capsys):
    monkeypatch.setattr(interpreters, "installed", lambda python, packages: {"python": "3.11.0", "transformers": "5.0"})
    quick = {"pgjax first": timing.timed(dict), "pgjax all": timing.timed(dict)}
    monkeypatch.setattr(rollout, "contenders", lambda *_: quick)
    report = rollout.main(
        rollout.Config(model=model, dtypes=("float32",), batch_size=1, prompt_length=2, new_tokens=2, repeats=1)
    )
    assert "torch not installed" in report["peer"] and [row["who"] for row in report["rows"]] == ["pgjax"]
    assert "torch not installed" in " ".join(capsys.readouterr().out.split())


@pytest.mark.campaign
def test_learner_gives_the_same_loss_in_both_dtypes(model):
    report = learner.main(learner.Config(model=model, peer=False, batch_size=2, length=12, new_tokens=6, repeats=1))
    exact, half = (row["loss"] for row in report["rows"])
    assert half == pytest.approx(exact, abs=0.02) and exact != 0


def test_learner_in_torch_does_the_same_work(model):
    pytest.importorskip("torch")
    report = learner.main(learner.Config(model=model, batch_size=2, length=12, new_tokens=6, repeats=1))
    ours, theirs, _, autocast, half = report["rows"]
    assert theirs["who"] == "torch" and theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5)
    assert (autocast["who"], half["who"]) == ("torch autocast", "torch bfloat16 weights")
    assert autocast["loss"] == pytest.approx(ours["loss"], abs=0.02) and autocast["loss"] != theirs["loss"]
    assert half["loss"] == pytest.approx(ours["loss"], abs=0.02) and half["loss"] != autocast["loss"]
    assert set(ours["times_as_fast_as"]) == {"torch"} and "2" in report["peers"]["torch"]["torch"]


def test_teacher_forcing_of_a_gpt2_in_torch_gives_the_same_logprobs_and_entropy(tmp_path):
    pytest.importorskip("torch")
    pg.save_pretrained(tmp_path / "gpt2", tiny_lm("gpt2"), tiny_params("gpt2"), None)
    report = teacher_force.main(
        teacher_force.Config(
            model=str(tmp_path / "gpt2"), dtypes=("float32",), batch_size=2, length=12, new_tokens=6, repeats=1
        )
    )
    ours, theirs = report["rows"]
    assert theirs["logprob"] == pytest.approx(ours["logprob"], abs=1e-5) and ours["logprob"] < -1
    assert theirs["entropy"] == pytest.approx(ours["entropy"], abs=1e-5) and ours["entropy"] > 1


def test_teacher_forcing_and_learning_report_the_work_counted_by_hand():
    sizes = {"batch_size": 2, "length": 12, "new_tokens": 5}  # 24 tokens, each sees 6 on average; logits of 10
    times = timing.Timing([2.0], [1.0], [{"logprob": -3.0, "entropy": 3.0, "loss": 1.0}])
    # a layer: q, o 16 x 16 each, k, v 16 x 8 each, gate, up, down 16 x 32 each; the head is 64 x 16
    body, head = 2 * (2 * 256 + 2 * 128 + 3 * 512), 1024
    work = 2 * body * 24 + 4 * 2 * 16 * 6 * 24 + 2 * head * 10
    row = teacher_force.measure(teacher_force.Config(**sizes), ARCH, PEAKS, times, 4)
    assert row["bytes"] == 4 * (body + head) and row["tokens_per_second"] == 12
    assert row["flops"] == work and row["mfu"] == work / 2e12
    assert teacher_force.measure(teacher_force.Config(**sizes), ARCH, PEAKS, times, 2)["bytes"] == row["bytes"] / 2
    row = learner.measure(learner.Config(**sizes), ARCH, PEAKS, times)  # forward and back: three times the products
    assert row["flops"] == 3 * work and row["bytes"] == 2 * 4 * (body + head) and row["tokens_per_second"] == 12


def test_a_share_is_of_the_better_of_the_measurements_before_and_after(monkeypatch):
    measured = iter([Peaks(2.0, 1.0, 8.0), Peaks(4.0, 1.0, 5.0)])
    monkeypatch.setattr(timing, "measured_peaks", lambda dtype: next(measured))
    report = worker.compare(
        worker.Beside(peer=False, repeats=1), ("float32",), (), tiny_lm("llama"), tiny_params("llama"),
        setups=lambda folder, dtype: {},
        runs=lambda dtype, peers: {timing.OURS: lambda: timing.Sample(1.0, 1.0)},
        measure=lambda dtype, who, peaks, times: timing.roofline(1.0, 2.0, 2.0, peaks),
    )  # fmt: skip
    assert (report["rows"][0]["mfu"], report["rows"][0]["mbu"]) == (2 / 4, 2 / 8)


def test_rollout_in_torch_samples_as_many_tokens(model):
    pytest.importorskip("torch")
    config = rollout.Config(model=model, dtypes=("float32",), batch_size=2, prompt_length=4, new_tokens=5, repeats=1)
    ours, theirs = rollout.main(config)["rows"]
    assert theirs["who"] == "torch generate" and theirs["tokens_per_second"] > 0
    assert set(ours["times_as_fast_as"]) == {"torch generate"} and ours["parts"]["prefill"]["mbu"] > 0


def test_decode_is_what_lies_between_the_two_programs():
    config = rollout.Config(batch_size=4, new_tokens=11)
    first, whole = timing.Timing([1.0, 1.0, 9.0], [1.0] * 3), timing.Timing([6.0, 6.0, 6.0], [3.0] * 3)
    row = rollout.measure(config, ARCH, "bfloat16", PEAKS, first, whole)
    assert row["decode_step_seconds"] == pytest.approx(0.5) and row["decode_step_cpu_seconds"] == pytest.approx(0.2)
    assert row["tokens_per_second"] == pytest.approx(44 / 6)
    read = decode_bytes(ARCH, batch=4, context=16 + 5.5, weight_bytes=2, cache_bytes=2)
    assert row["decode_mbu"] == pytest.approx(read / 0.5 / 1e10)
    prefill, decode = row["parts"]["prefill"], row["parts"]["decode"]
    assert (prefill["seconds"], decode["seconds"]) == (1.0, pytest.approx(0.5))
    assert row["flops"] == pytest.approx(prefill["flops"] + 10 * decode["flops"])
    assert row["bytes"] == pytest.approx(prefill["bytes"] + 10 * decode["bytes"])
    assert decode["limit"] == "memory" and decode["achieved"] == row["decode_mbu"]


def test_a_decode_that_is_lost_in_the_noise_has_no_figures():
    config, first = rollout.Config(batch_size=4, new_tokens=11), timing.Timing([2.0], [2.0])
    for whole in (2.0, 1.5):
        row = rollout.measure(config, ARCH, "float32", PEAKS, first, timing.Timing([whole], [3.0]))
        none = ("decode_step_seconds", "decode_step_cpu_seconds", "decode_mbu", "decode_mfu")
        assert [row[name] for name in none] == [None] * 4 and set(row["parts"]) == {"prefill"}
        cells = {name: column(row) for name, column in rollout.COLUMNS.items()}
        assert [cells[name] for name in ("decode ms a step", "decode MBU", "decode MFU")] == ["-"] * 3
        report = {"rows": [row | {"who": "pgjax", "dtype": "float32"}], "peaks": {"float32": PEAKS._asdict()}}
        assert [point["name"].split()[1] for point in pictures.points_of({"rollout": report})] == ["prefill"]
        assert json.loads(json.dumps(row))["decode_mbu"] is None


def test_a_window_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="new_tokens=8 must be between 0 and length=8"):
        learner.main(learner.Config(length=8, new_tokens=8))
