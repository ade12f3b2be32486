"""Four fake CPU devices and strict promotion for every test; set before jax makes its backend."""

import os

_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} --xla_force_host_platform_device_count=4".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402  the flags above must come first
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct as the installed package ships it, in float32, read once: (lm, params, tokenizer)."""
    from pgjax.models.load import load

    return load("SmolLM2-135M-Instruct", dtype=jax.numpy.float32)


@pytest.fixture(scope="module")
def quick_compiles():
    """Leave out the compiler's costly passes: for tests of whole scripts on tiny models, which mostly compile."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
