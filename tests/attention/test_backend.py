import jax
import jax.numpy as jnp
import pytest
from jax._src import lib

from dlm_jax.attention import AttentionMask, AttentionSpec, BackendChoice, attend, backend, choose_backend
from dlm_jax.errors import ConfigError

SPEC = AttentionSpec("bfloat16", 64)
MATRIX = AttentionSpec("bfloat16", 64, matrix=True)


@pytest.fixture
def gpu(monkeypatch):
    """Returns a function that makes JAX's first device a GPU of a compute capability."""
    def pretend(*capability):
        monkeypatch.setattr(lib, "cuda_versions", object())
        monkeypatch.setattr(backend, "_capability", lambda: capability)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return pretend


def test_auto_follows_the_platform(gpu):
    assert choose_backend("auto", SPEC) == choose_backend("auto", SPEC, "cpu") == BackendChoice("xla")
    assert choose_backend("auto", SPEC, "tpu") == BackendChoice("tpu")
    gpu(8, 0)
    assert choose_backend("auto", SPEC) == choose_backend("auto", SPEC, "gpu") == BackendChoice("cudnn")
    gpu(9, 0)
    assert choose_backend("auto", AttentionSpec("float16", 256)) == BackendChoice("cudnn")


@pytest.mark.parametrize("capability, spec, mentions", [
    ((7, 5), SPEC, "7.5"),
    ((9, 0), AttentionSpec("float32", 64), "model.dtype=bfloat16"),
    ((9, 0), AttentionSpec("bfloat16", 100), "head_dim.*256.*100"),
    ((8, 6), AttentionSpec("bfloat16", 160), "head_dim.*128.*160"),
    ((9, 0), AttentionSpec("bfloat16", 64, dropout=True), "model.dropout=0"),
    ((9, 0), AttentionSpec("bfloat16", 256, softcap=True), "soft cap"),
])
def test_unsupported_by_cudnn(gpu, capability, spec, mentions):
    gpu(*capability)
    choice = choose_backend("auto", spec)
    assert choice.backend == "xla" and choice.reason.startswith("cudnn ")
    with pytest.raises(ConfigError, match=f"(?s){mentions}") as error:
        choose_backend("cudnn", spec, "gpu")
    assert "model.attention=xla" in str(error.value)


def test_gpu_without_cudnn():
    assert choose_backend("auto", SPEC, "gpu").backend == "xla"
    with pytest.raises(ConfigError, match="cuDNN"):
        attend(*[jnp.ones((1, 4, 2, 8), jnp.bfloat16)] * 3, AttentionMask.causal(), backend="cudnn")


@pytest.mark.parametrize("name, spec, platform, mentions", [
    ("tpu", SPEC, "cpu", "tpu needs a TPU"),
    ("cudnn", SPEC, "tpu", "cudnn needs an NVIDIA GPU"),
    ("tpu", MATRIX, None, "matrix"),
    ("flash", SPEC, None, "'flash'.*xla, tpu, cudnn"),
])
def test_refused_backends(name, spec, platform, mentions):
    with pytest.raises(ConfigError, match=mentions):
        choose_backend(name, spec, platform)


def test_auto_depends_on_the_arrays(gpu):
    """On a GPU, float32 arrays and dropout run on xla."""
    gpu(9, 0)
    tensors = [jnp.ones((1, 4, 2, 8))] * 3
    assert attend(*tensors, AttentionMask.causal()).dtype == jnp.float32
    seeds = jnp.zeros(1, jnp.uint32)
    attend(*(x.astype(jnp.bfloat16) for x in tensors), AttentionMask.causal(), dropout_rate=0.5, dropout_seeds=seeds)


def test_auto_on_a_tpu_runs_a_matrix_on_xla(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choose_backend("auto", MATRIX).backend == "xla"
    attend(*[jnp.ones((1, 4, 2, 8))] * 3, AttentionMask.matrix(jnp.ones((4, 4), bool)))
