"""Sets eight host CPU devices, exact float32 products and quick compilation, before JAX starts.

Eight devices on few cores may wait long for each other; XLA's default is to give up after 40 seconds. A collective
blocks one of XLA's threads per device, and without NPROC there are only as many threads as cores: two collectives at a
time would wait forever for threads that the other holds.
"""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "64")
# One compilation cache per run: the processes that it starts inherit it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"dlm_jax-tests-{os.getpid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Without fusion emitters, compilation takes half the time; JAX 0.12 lacks the flag.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
                           " --xla_cpu_collective_call_terminate_timeout_seconds=600"
                           " --xla_cpu_parallel_codegen_split_count=1"
                           + " --xla_cpu_use_fusion_emitters=false" * (importlib.metadata.version("jax") < "0.12"))

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # compilation dominates; programs are small


@pytest.fixture(scope="session")
def tfds_folder(tmp_path_factory) -> pathlib.Path:
    """Where a real dataset of TensorFlow Datasets is prepared; see `tests/named_datasets.py`."""
    from tests.named_datasets import build_tfds

    folder = tmp_path_factory.mktemp("tfds")
    build_tfds(folder)
    return folder


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
    """The folder of real data that DLM_TEST_DATA names."""
    if not os.environ.get("DLM_TEST_DATA"):
        pytest.skip("DLM_TEST_DATA is not set: it names the folder of real data")
    return pathlib.Path(os.environ["DLM_TEST_DATA"]).resolve()


def pytest_collection_finish():
    """Keeps the garbage collector from visiting, again and again, the millions of objects that stay."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_sessionfinish(session):
    """Removes the run's own compilation cache; one that the environment names is kept."""
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if cache.endswith(f"dlm_jax-tests-{os.getpid()}"):
        shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def _clear_programs():
    """Thousands of compiled programs at once exhaust a process's memory maps, and the next one crashes."""
    yield
    limit, maps = pathlib.Path("/proc/sys/vm/max_map_count"), pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > int(limit.read_text()) // 2:
        jax.clear_caches()
