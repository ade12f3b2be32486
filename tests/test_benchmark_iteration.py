"""One whole iteration on a tiny model: it learns, its parts add up, and its work is counted as by hand."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import pgjax as pg
from benchmarks import iteration, timing
from pgjax.run.peaks import Peaks
from tests.sizes import campaign_but_for

ARCH = pg.Architecture(
    family="llama", vocab_size=64, width=16, depth=2, heads=2, kv_heads=1, head_dim=8, mlp_width=32, max_positions=64,
    activation="silu", norm="rms", norm_eps=1e-5, rope=pg.Rope(theta=10000.0), gated_mlp=True, qkv_bias=False,
    out_bias=False, mlp_bias=False, qk_norm=False, tied=True,
)  # fmt: skip
PEAKS = Peaks(matmul_flops=1e9, copy_bytes=1e8, read_bytes=1e8)
SIZES = {"batch_size": 4, "prompt_length": 3, "new_tokens": 5, "group_size": 2}
TRAINED = SIZES | {"batch_size": 32, "group_size": 4, "learning_rate": 3e-2, "kl_coef": 0.0}  # what is really compiled


@pytest.fixture(scope="module")
def model():
    lm = pg.causal_lm(ARCH)
    return lm, lm.init(jax.random.key(0))


@pytest.mark.campaign
def test_the_benchmark_runs_from_start_to_end_though_its_peers_do_not(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "measured_peaks", lambda dtype: PEAKS)
    pg.save_pretrained(tmp_path / "tiny", *model, None)
    python = tmp_path / "python"  # it has what TRL's PPO needs, and crashes
    has = {"python": "3.11.0", "trl": "1.12.0"} | dict.fromkeys(
        ("torch", "transformers", "datasets", "accelerate"), "1"
    )
    python.write_text(f"#!/bin/sh\n[ $1 = -c ] && echo '{json.dumps(has)}' && exit\necho 'no disk' >&2\nexit 3\n")
    python.chmod(0o755)
    config = iteration.Config(
        model=str(tmp_path / "tiny"), peer_pythons=(str(python),), repeats=1, json=tmp_path / "report.json", **TRAINED
    )
    report = iteration.main(config)
    assert [row["who"] for row in report["rows"]] == ["pgjax PPO", "pgjax RLOO"] and (tmp_path / "report.json").exists()
    missing, crashed = report["peer"].splitlines()
    assert missing.startswith("TRL RLOO missing: ") and crashed.startswith(
        "left out in float32: TRL PPO ended with status 3"
    )
    assert len(report["measured_peaks"]["float32"]) == 2  # one measurement before and after each pair
    for row in report["rows"]:
        parts = row["parts"]
        assert set(parts) == {"rollout", "teacher_force", "update"} and row["tokens_per_second"] == 160 / row["seconds"]
        assert 0 < sum(part["seconds"] for part in parts.values()) <= row["seconds"]
        assert sum(part["flops"] for part in parts.values()) == pytest.approx(row["flops"])
        assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"] / 1e9) and 0 <= row["score"] <= 1
    assert "pgjax RLOO" in capsys.readouterr().out


@pytest.mark.parametrize("who", campaign_but_for(["pgjax PPO", "pgjax RLOO"], "pgjax RLOO"))
def test_iterations_climb_the_reward_that_they_are_given(model, who):
    lm, params = model
    config = iteration.Config(**TRAINED)
    prompts = np.repeat(np.random.default_rng(0).integers(1, 64, (8, 3)), 4, axis=0)
    run = iteration.contender(config, lm, params, prompts, who)
    scores = [run().result["score"] for _ in range(12)]
    assert abs(scores[0] - 0.5) < 0.1 and np.mean(scores[-2:]) > 0.7  # by chance 0.5, with a standard error of 0.03


def test_rloo_samples_each_prompt_as_often_as_the_group_is_large(model, monkeypatch):
    given = []

    class EnoughSeenError(Exception):
        pass

    def sample(state, prompts, prompt_mask):
        given.append(prompts.tolist())
        raise EnoughSeenError

    monkeypatch.setattr(pg, "iteration", lambda *_, **__: pg.Iteration(lambda params, key: None, sample, None))
    prompts = np.arange(1, 13).reshape(4, 3)
    for who in ("pgjax PPO", "pgjax RLOO"):
        with pytest.raises(EnoughSeenError):
            iteration.contender(iteration.Config(**SIZES), *model, prompts, who)()
    assert given == [prompts.tolist(), [[1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6]]]


def test_the_work_of_an_iteration_on_paper():
    config = iteration.Config(**SIZES)
    body, head, heads = 2 * (2 * 256 + 2 * 128 + 3 * 512), 1024, 2 * 2 * 8  # layers x heads x head_dim
    counted = iteration.work(config, ARCH, 4, "pgjax PPO")
    prefill = 2 * body * 12 + 4 * heads * 1.5 * 12 + 2 * head * 4
    step = 2 * body * 4 + 4 * heads * 5.5 * 4 + 2 * head * 4
    forward = 2 * body * 32 + 4 * heads * 4 * 32 + 2 * head * 20
    cache = 4 * 2 * 2 * 1 * 8 * 5.5 * 4  # bytes, keys and values, layers, heads, head_dim, positions, rows
    weights = 4 * (body + head)
    assert counted["rollout"] == pytest.approx((prefill + 4 * step, 5 * weights + 4 * cache))
    assert counted["teacher_force"] == pytest.approx((forward, weights))  # the sampler gives the policy's part
    more = iteration.work(dataclasses.replace(config, epochs=2), ARCH, 4, "pgjax PPO")
    assert more["teacher_force"] == pytest.approx((2 * forward, 2 * weights))
    assert counted["update"] == pytest.approx((3 * forward, 6 * weights))
    second_network = iteration.work(config, ARCH, 4, "TRL PPO")["update"]
    assert second_network == pytest.approx((6 * forward, 12 * weights))
    grouped = iteration.work(config, ARCH, 4, "pgjax RLOO")  # two completions of each of two prompts of three tokens
    prefill = 2 * body * 6 + 4 * heads * 1.5 * 6 + 2 * head * 4
    forward = 2 * body * 26 + 4 * heads * (6 * 1.5 + 20 * 5.5) + 2 * head * 20
    assert grouped["rollout"][0] == pytest.approx(prefill + 4 * step) and grouped["teacher_force"][0] == pytest.approx(
        forward
    )
    assert iteration.work(config, ARCH, 4, "TRL RLOO")["teacher_force"] == pytest.approx(
        (2 * counted["teacher_force"][0], 2 * weights)
    )


def test_a_peers_row_has_no_parts_and_a_batch_that_does_not_divide_is_refused():
    config = iteration.Config(**SIZES)
    row = iteration.measure(
        config, ARCH, "float32", PEAKS, "TRL RLOO", timing.Timing([2.0], [3.0], [{"iterations": 1}])
    )
    assert row["parts"] == {} and row["tokens_per_second"] == 10
    assert all(column(row) for column in iteration.COLUMNS.values())
    with pytest.raises(ValueError, match="batch_size=5 must be a multiple of group_size=2"):
        iteration.main(iteration.Config(batch_size=5, group_size=2))
