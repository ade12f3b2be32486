"""Operations and bytes on paper agree with the model's own arrays and with XLA's count; a step's speed with a count by hand."""

import dataclasses
import time
import types

import jax
import jax.numpy as jnp
import pytest

from pgjax.models.architecture import Architecture, Rope
from pgjax.models.causal_lm import causal_lm
from pgjax.parallel.mesh import make_mesh
from pgjax.run import peaks as peaks_module
from pgjax.run.flops import decode_bytes, forward_flops, mbu, mfu, parameter_counts, training_flops
from pgjax.run.peaks import PUBLISHED, Peaks, _median_seconds, known_peaks, measured_peaks
from pgjax.run.speed import policy_speed, step_speed

LLAMA = Architecture(
    family="llama",
    vocab_size=96,
    width=48,
    depth=3,
    heads=6,
    kv_heads=2,
    head_dim=8,
    mlp_width=128,
    max_positions=64,
    activation="silu",
    norm="rms",
    norm_eps=1e-5,
    rope=Rope(theta=10000.0),
    gated_mlp=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tied=True,
)
# head_dim * heads is not the width: a count that takes one for the other is off
QWEN3 = dataclasses.replace(LLAMA, family="qwen3", head_dim=16, qk_norm=True, tied=False)
GPT2 = dataclasses.replace(
    LLAMA,
    family="gpt2",
    kv_heads=6,
    norm="layer",
    rope=None,
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    activation="gelu_tanh",
)


@pytest.mark.parametrize("arch", [LLAMA, QWEN3, GPT2], ids=lambda arch: arch.family)
def test_counts_are_those_of_the_models_kernels(arch):
    params = jax.eval_shape(causal_lm(arch).init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(params["layers"])
    body = sum(leaf.size for path, leaf in leaves if "kernel" in jax.tree_util.keystr(path))
    head = params["embed"]["tokens"].size if arch.tied else params["head"]["kernel"].size
    assert parameter_counts(arch) == (body, head)


@pytest.mark.parametrize("arch", [LLAMA, QWEN3, GPT2], ids=lambda arch: arch.family)
def test_forward_flops_agree_with_xla(arch):
    arch = dataclasses.replace(arch, depth=1)  # XLA counts the body of a loop over layers once
    lm, batch, length = causal_lm(arch), 2, 32
    params = jax.eval_shape(lm.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    counted = jax.jit(lm.apply).lower(params, tokens).compile().cost_analysis()["flops"]
    # a plain kernel computes the masked half of attention too, so every token meets all keys
    paper = forward_flops(arch, tokens=batch * length, context=length, head_tokens=batch * length)
    assert paper <= counted <= 1.15 * paper  # the rest: norms, activations, softmax


def test_training_is_six_operations_a_parameter_and_six_a_key():
    length, tokens = 32, 64
    n = sum(parameter_counts(QWEN3))
    expected = tokens * (6 * n + 6 * QWEN3.depth * QWEN3.heads * QWEN3.head_dim * length)
    assert training_flops(QWEN3, tokens=tokens, context=length / 2, head_tokens=tokens) == expected


def test_head_is_counted_for_its_own_tokens_only():
    without, some = (forward_flops(LLAMA, tokens=10, context=5, head_tokens=n) for n in (0, 4))
    assert some - without == 2 * 4 * LLAMA.vocab_size * LLAMA.width


@pytest.mark.parametrize("arch", [LLAMA, QWEN3, GPT2], ids=lambda arch: arch.family)
def test_decode_bytes_are_those_of_kernels_and_cache(arch):
    batch, length = 4, 16
    cache = jax.eval_shape(lambda: causal_lm(arch, dtype=jnp.bfloat16).init_cache(batch, length))
    cache_size = sum(leaf.size for leaf in jax.tree.leaves(cache))
    expected = 2 * sum(parameter_counts(arch)) + 4 * cache_size
    assert decode_bytes(arch, batch=batch, context=length, weight_bytes=2, cache_bytes=4) == expected


def test_peaks_count_a_copy_twice_and_a_read_once(monkeypatch):
    monkeypatch.setattr(peaks_module, "_median_seconds", lambda run, device: 0.5)
    peaks = measured_peaks(matmul_size=64, buffer_bytes=1 << 20)
    assert peaks == Peaks(matmul_flops=4.0 * 64**3, copy_bytes=4.0 * (1 << 20), read_bytes=2.0 * (1 << 20))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_peaks_are_measured_on_the_device_asked_for(dtype):
    peaks = measured_peaks(dtype, device=jax.devices()[2], matmul_size=256, buffer_bytes=1 << 22)
    assert all(peak > 1e6 for peak in peaks)


@pytest.mark.parametrize(("platform", "together", "seconds"), [("cpu", 1, 3.0), ("gpu", 16, 25.5)])
def test_timing_waits_for_the_device_and_leaves_out_the_warm_up(monkeypatch, platform, together, seconds):
    clock, calls, waited = [0.0], [], []

    def run():
        calls.append(1)
        clock[0] += 100.0 if len(calls) == 1 else len(calls)  # the first call compiles

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(len(calls)))
    device = types.SimpleNamespace(platform=platform)
    # On a CPU the median of 2, 3 and 4 seconds; elsewhere of the means of 2 to 17, 18 to 33 and 34 to 49.
    assert _median_seconds(run, device, repeats=3, budget=1e9) == seconds
    assert waited == [1, *(1 + together * i for i in (1, 2, 3))]


def test_share_of_a_peak_refuses_no_time_and_no_peak():
    assert mfu(3.0, 2.0, 6.0) == mbu(3.0, 2.0, 6.0) == 0.25
    for seconds, peak in ((0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="above 0"):
            mfu(1.0, seconds, peak)


def device(kind):
    return types.SimpleNamespace(device_kind=kind)


def test_published_peaks_are_of_a_chip_and_dtype_that_are_known():
    assert known_peaks(device("NVIDIA H200"), "bfloat16") == Peaks(989e12, 4.8e12, 4.8e12)
    assert known_peaks(device("TPU7x"), jnp.bfloat16) == Peaks(1153.5e12, 3.69e12, 3.69e12)  # a device is half a chip
    for kind, dtype in (("NVIDIA H200", "float32"), ("NVIDIA H200 MIG 1g.18gb", "bfloat16"), ("cpu", "bfloat16")):
        assert known_peaks(device(kind), dtype) is None


def test_published_peaks_are_dense_and_in_units():
    for flops, memory in PUBLISHED.values():
        assert 5e13 < flops < 3e15 and 2e11 < memory < 1e13
        # 295 operations a byte on an H100, 420 on an L40S: a figure with sparsity, or a slip in a unit, is out of this range
        assert 75 < flops / memory < 600


def test_published_peaks_compute_nothing(monkeypatch):
    monkeypatch.setattr(peaks_module, "measured_peaks", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(jax, "device_put", lambda *_, **__: pytest.fail("allocated"))
    known_peaks(device("TPU v4"), "bfloat16")
    known_peaks(jax.devices()[0], "bfloat16")


STEP = {
    "dtype": "bfloat16", "batch_size": 8, "prompt_length": 6, "new_tokens": 4, "mean_length": 3.0, "max_length": 4.0,
    "rollout_seconds": 2.0, "score_seconds": 1.0, "update_seconds": 5.0,
}  # fmt: skip
BODY, HEAD = 3 * (2 * 48 * 48 + 2 * 48 * 16 + 3 * 48 * 128), 96 * 48  # of LLAMA: q o, k v, gate up down; unembedding


def test_a_steps_speed_is_that_counted_by_hand():
    found = step_speed(LLAMA, Peaks(1e9, 1e8, 1e7), **STEP, epochs=1.5)
    # twelve rows of ten tokens that see five on average, log-probabilities of five positions each
    forward = 2 * BODY * 120 + 4 * 3 * 48 * 5 * 120 + 2 * HEAD * 60
    # four steps, each reads the weights and eight rows of 7.5 positions, keys and values of 2 heads of 8 in 3 layers
    read = 4 * 2 * (BODY + HEAD + 2 * 3 * 2 * 8 * 7.5 * 8)
    assert found == pytest.approx({
        "perf/tokens_per_second": 8 * 3 / 8, "perf/mfu": 3 * forward / 5e9, "perf/decode_mbu": read / 2e7,
    })  # fmt: skip


def test_without_peaks_a_step_has_no_shares():
    assert step_speed(LLAMA, None, **STEP) == {"perf/tokens_per_second": 3.0}


def test_a_steps_shares_are_of_all_devices_and_every_replica_reads_the_weights():
    peaks = Peaks(1e9, 1e8, 1e7)
    one, four = step_speed(LLAMA, peaks, **STEP), step_speed(LLAMA, peaks, **STEP, devices=4, replicas=2)
    assert four["perf/mfu"] == pytest.approx(one["perf/mfu"] / 4)
    weights = 4 * 2 * (BODY + HEAD) / 2e7
    cache = one["perf/decode_mbu"] - weights  # the rows are split over the replicas
    assert four["perf/decode_mbu"] == pytest.approx((2 * weights + cache) / 4)


def test_a_prompt_in_common_is_counted_once_and_frozen_weights_have_no_gradient():
    peaks, forward_of = Peaks(1e9, 1e8, 1e7), lambda x: x["perf/mfu"] * 5e9
    grouped = forward_of(step_speed(LLAMA, peaks, **STEP, group_size=2))
    # eight rows of 3 + 4 tokens; half a prompt of six sees three, four tokens see eight
    forward = 2 * BODY * 56 + 4 * 3 * 48 * 8 * (3 * 3 + 4 * 8) + 2 * HEAD * 40
    assert grouped == pytest.approx(3 * forward)
    weights = 2 * BODY * 80 + 2 * HEAD * 40
    whole, adapted = (forward_of(step_speed(LLAMA, peaks, **STEP, adapters=x)) for x in (False, True))
    assert whole - adapted == pytest.approx(weights)


def test_a_steps_metrics_give_its_speed_on_the_chips_of_the_mesh(monkeypatch):
    metrics = {
        "timing/rollout": 2.0, "timing/score": 1.0, "timing/update": 5.0, "train/updates": 3,
        "completions/padded_prompt": 6, "completions/padded_length": 10,
        "completions/mean_length": 3.0, "completions/max_length": 4.0,
    }  # fmt: skip
    monkeypatch.setattr(jax, "local_devices", lambda: [device("NVIDIA H200")])
    mesh = make_mesh(data=2, tensor=2)  # a replica is two chips
    found = policy_speed(metrics, arch=LLAMA, dtype="bfloat16", mesh=mesh, batch_size=8, minibatches=2, group_size=2)
    peaks = known_peaks(device("NVIDIA H200"), "bfloat16")
    assert found == step_speed(LLAMA, peaks, **STEP, epochs=1.5, group_size=2, devices=4, replicas=2)
