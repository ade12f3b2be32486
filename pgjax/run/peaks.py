"""The most that a device can do: as its maker publishes it, and as measured on it through jax."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Peaks(NamedTuple):
    """The most that one jax device can do, published or measured.

    matmul_flops: operations a second of a large square matrix product.
    copy_bytes: bytes a second read plus written by a copy.
    read_bytes: bytes a second of an operation that only reads.
    """

    matmul_flops: float
    copy_bytes: float
    read_bytes: float


# `device.device_kind` -> bfloat16 operations a second of dense matrix products, bytes of device memory a second; of one jax
# device. Where a maker gives only a figure "with sparsity", half of it stands here. float32 is left out: by default jax computes
# its products in bfloat16 passes on a TPU and may use TF32 on an NVIDIA GPU, so that no published figure is its limit.
# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. A v4 or v5p chip is one device (megacore, jax's default); a TPU7x
# chip, of 2307 TFLOP/s and 7380 GB/s, is two.
PUBLISHED: dict[str, tuple[float, float]] = {
    "TPU v4": (275e12, 1200e9),
    "TPU v5 lite": (197e12, 819e9),
    "TPU v5e": (197e12, 819e9),
    "TPU v5": (459e12, 2765e9),
    "TPU v5p": (459e12, 2765e9),
    "TPU v6 lite": (918e12, 1638e9),
    "TPU v6e": (918e12, 1638e9),
    "TPU7x": (2307e12 / 2, 7380e9 / 2),
    # NVIDIA's data sheets of the A100, H100, H200, DGX B200, A10, L4 and L40S.
    "NVIDIA A100-PCIE-40GB": (312e12, 1555e9),
    "NVIDIA A100-SXM4-40GB": (312e12, 1555e9),
    "NVIDIA A100 80GB PCIe": (312e12, 1935e9),
    "NVIDIA A100-SXM4-80GB": (312e12, 2039e9),
    "NVIDIA H100 PCIe": (756e12, 2000e9),
    "NVIDIA H100 NVL": (835e12, 3900e9),
    "NVIDIA H100 80GB HBM3": (989e12, 3350e9),  # SXM
    "NVIDIA H200": (989e12, 4800e9),  # SXM
    "NVIDIA B200": (2250e12, 8000e9),
    "NVIDIA A10": (125e12, 600e9),
    "NVIDIA L4": (121e12, 300e9),
    "NVIDIA L40S": (362e12, 864e9),
    # NVIDIA's white papers on GA102 and Ada: products of 16 bits with float32 sums.
    "NVIDIA GeForce RTX 3090": (71e12, 936e9),
    "NVIDIA GeForce RTX 4090": (165.2e12, 1008e9),
}


def known_peaks(device: jax.Device, dtype: DTypeLike) -> Peaks | None:
    """Look up what the maker of a device publishes of it.

    Nothing is computed and nothing allocated. A copy and a read are both given the bandwidth of the memory.

    Args:
        device: one of `jax.devices()`; its `device_kind` names the chip.
        dtype: of the matrix products.

    Returns:
        Operations and bytes a second of one device; None where none are published for this chip and dtype, as for any CPU.

    Example:
        >>> import jax
        >>> from pgjax.run.peaks import known_peaks
        >>> known_peaks(jax.devices("cpu")[0], "bfloat16") is None
        True
    """
    if jnp.dtype(dtype) != jnp.bfloat16 or device.device_kind not in PUBLISHED:
        return None
    flops, memory = PUBLISHED[device.device_kind]
    return Peaks(matmul_flops=flops, copy_bytes=memory, read_bytes=memory)


def _median_seconds(run: Callable[[], object], device: jax.Device, *, repeats: int = 7, budget: float = 0.4) -> float:
    """Time a call after one warm-up, until it was timed `repeats` times or used up the budget (seconds).

    A call on an accelerator is the mean of several that queue up: for one alone, which takes a millisecond or less, the way
    there and back counts too.
    """
    calls = 1 if device.platform == "cpu" else 16
    jax.block_until_ready(run())
    times: list[float] = []
    while len(times) < repeats and (len(times) < 2 or math.fsum(times) < budget):
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def _matmul_seconds(size: int, dtype: DTypeLike, device: jax.Device) -> float:
    """Time a product with a result in `dtype` or in float32, whichever is faster: some kernels exist for one only."""
    x = jax.device_put(jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype), device)
    products = [jax.jit(functools.partial(jnp.matmul, preferred_element_type=y)) for y in (dtype, jnp.float32)]
    return min(_median_seconds(functools.partial(product, x, x), device) for product in products)


def _copy_seconds(x: jax.Array, device: jax.Device) -> float:
    """Time a copy into memory that is there already: on a CPU a fresh buffer costs page faults, not bandwidth."""
    copy = jax.jit(lambda source, target: -source, donate_argnums=1, keep_unused=True)
    target = [jnp.zeros_like(x)]

    def run() -> jax.Array:
        target[0] = copy(x, target[0])
        return target[0]

    return _median_seconds(run, device)


def _read_seconds(x: jax.Array, device: jax.Device) -> float:
    """Time the faster of two operations that read a matrix and write next to nothing."""
    vector = jnp.ones_like(x[0])
    product = jax.jit(jnp.matmul)
    maxima = jax.jit(lambda x: x.max(axis=1))
    ways = functools.partial(product, x, vector), functools.partial(maxima, x)
    return min(_median_seconds(run, device) for run in ways)


def measured_peaks(
    dtype: DTypeLike = jnp.float32,
    *,
    device: jax.Device | None = None,
    matmul_size: int | None = None,
    buffer_bytes: int | None = None,
) -> Peaks:
    """Measure what one device does at its best, through jax, as a model would meet it.

        matmul_flops = 2 * n^3 / seconds of an [n, n] @ [n, n] product in `dtype`
        copy_bytes   = 2 * bytes / seconds of an elementwise pass from one float32 buffer into another
        read_bytes   = bytes / seconds of a matrix-vector product or a row maximum, whichever is faster

    Each is the median of up to seven runs after a warm-up. It takes about two seconds on a CPU, and two buffers on the device.
    Nothing else should run meanwhile: it is for benchmarks, and training looks its peaks up by `known_peaks`.

    Args:
        dtype: of the matrix product, at jax's default precision for it.
        device: where; None for jax's default device.
        matmul_size: n; None for 2048 on a CPU and 8192 elsewhere.
        buffer_bytes: size of the buffers, which should not fit in any cache; None for 256 MiB on a CPU and
            2 GiB elsewhere.

    Returns:
        Operations and bytes a second of one device.

    Example:
        >>> from pgjax.run.peaks import measured_peaks
        >>> peaks = measured_peaks(matmul_size=128, buffer_bytes=1 << 20)
        >>> min(peaks) > 0
        True
    """
    device = jax.devices()[0] if device is None else device
    on_cpu = device.platform == "cpu"
    size = (2048 if on_cpu else 8192) if matmul_size is None else matmul_size
    buffer = (1 << 28 if on_cpu else 1 << 31) if buffer_bytes is None else buffer_bytes
    matmul = _matmul_seconds(size, dtype, device)
    columns = 8192
    x = jax.device_put(jnp.ones((max(1, buffer // (4 * columns)), columns), jnp.float32), device)
    return Peaks(
        matmul_flops=2.0 * size**3 / matmul,
        copy_bytes=2.0 * x.nbytes / _copy_seconds(x, device),
        read_bytes=x.nbytes / _read_seconds(x, device),
    )
