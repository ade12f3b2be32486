"""Four fake CPU devices, quick compilations, strict promotion: for every test, set before jax makes its backend."""

import fcntl
import gc
import os
import shutil
import tempfile
from pathlib import Path

from tests.compile_options import xla_flags

# Neither what XLA leaves out nor how it makes code changes what a program means. Who sets these variables wants it otherwise, as
# the last part of .ci/run does.
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} {xla_flags(4)}".strip()
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What one test compiles, no other has to: xdist's workers and the processes that tests start inherit the folder. It is a new
# one for each session, so nothing that is older than the code decides what a test finds.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.TemporaryDirectory(
        prefix="pgjax-programs-", ignore_cleanup_errors=True
    )  # gone with the session
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402  the flags above must come first
import pytest  # noqa: E402

gc.set_threshold(100_000, 50, 100)  # tracing makes many small objects, few of them in cycles: a fifteenth of the time

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """Let the longest test be the first: last, it would keep one worker busy while the others have nothing left to do."""
    items.sort(key=lambda item: item.path.name != "test_kills.py")


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Let compiled programs go before they fill the process's memory maps: at Linux's limit of 65,530 the compiler crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Make a folder in one of xdist's workers, for all of them: (name, make) -> folder. Tests leave what is in it as it is."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name, make):
        folder, done = root / name, root / f"{name}.done"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct as the installed package ships it, in float32, read once: (lm, params, tokenizer)."""
    from pgjax.models.io.load import load

    return load("SmolLM2-135M-Instruct", dtype=jax.numpy.float32)


@pytest.fixture(scope="module")
def full_compiles():
    """Let XLA run all its passes: for tests that look at compiled programs, or that compute much with few of them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def no_pictures():
    """Leave out the picture of a run's curves: for tests of whole scripts that look at something else."""
    from pgjax.run import session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "plot_curves", lambda folder: None)
        yield
