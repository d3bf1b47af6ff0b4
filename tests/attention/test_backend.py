import jax
import jax.numpy as jnp
import pytest
from jax._src import lib

from dlm_jax.attention import AttentionMask, AttentionSpec, Choice, attend, backend, choose_backend
from dlm_jax.errors import ConfigError

FITS = AttentionSpec("bfloat16", 64)


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes JAX's first device a GPU of this compute capability."""
    def pretend(*capability):
        monkeypatch.setattr(lib, "cuda_versions", object())
        monkeypatch.setattr(backend, "_capability", lambda: capability)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return pretend


def test_auto_follows_the_platform(gpu):
    assert choose_backend("auto", FITS) == choose_backend("auto", FITS, "cpu") == Choice("xla")
    assert choose_backend("auto", FITS, "tpu") == Choice("tpu")
    gpu(8, 0)
    assert choose_backend("auto", FITS) == choose_backend("auto", FITS, "gpu") == Choice("cudnn")


@pytest.mark.parametrize("capability, work, why, remedy", [
    ((7, 5), FITS, "needs compute capability 8.0, and this GPU has 7.5", ""),
    ((9, 0), AttentionSpec("float32", 64), "computes in bfloat16, and the model in float32", ", or model.dtype=bfloat16"),
    ((9, 0), AttentionSpec("bfloat16", 100), "takes a head_dim of a multiple of 8 up to 256, and the model's is 100", ""),
    ((8, 6), AttentionSpec("bfloat16", 160), "takes a head_dim of a multiple of 8 up to 128, and the model's is 160", ""),
    ((9, 0), AttentionSpec("bfloat16", 64, dropout=True),
     "has no attention dropout that is the same on every mesh, and the model's is not 0",
     ", or model.dropout=0"),
])
def test_what_cudnn_cannot_do_falls_to_dense_or_is_refused_by_name(gpu, capability, work, why, remedy):
    gpu(*capability)
    assert choose_backend("auto", work) == Choice("xla", f"cudnn {why}")
    with pytest.raises(ConfigError) as error:
        choose_backend("cudnn", work, "gpu")
    assert str(error.value) == f"the attention backend cudnn {why}; set model.attention=xla{remedy}"


def test_head_dims_of_later_gpus(gpu):
    gpu(9, 0)
    assert choose_backend("auto", AttentionSpec("float16", 256)) == Choice("cudnn")


def test_a_gpu_without_cudnn():
    assert choose_backend("auto", FITS, "gpu") == Choice("xla", "cudnn needs cuDNN, which JAX does not find")


def test_a_backend_is_refused_where_it_cannot_run():
    with pytest.raises(ConfigError, match="tpu needs a TPU, and these devices are cpu; set model.attention"):
        choose_backend("tpu", FITS, "cpu")
    with pytest.raises(ConfigError, match="cudnn needs an NVIDIA GPU, and these devices are tpu"):
        choose_backend("cudnn", FITS, "tpu")
    with pytest.raises(ConfigError, match="tpu evaluates masks by rule, and this one is an explicit matrix"):
        choose_backend("tpu", AttentionSpec("bfloat16", 64, matrix=True))
    with pytest.raises(ConfigError, match="unknown attention backend 'flash'"):
        choose_backend("flash", FITS)


def test_auto_looks_at_the_arrays(gpu):
    """In float32 on a GPU, or with dropout, `attend` is the xla backend, without a word."""
    gpu(9, 0)
    tensors = [jnp.ones((1, 4, 2, 8))] * 3
    assert attend(*tensors, AttentionMask.causal()).dtype == jnp.float32
    seeds = jnp.zeros(1, jnp.uint32)
    attend(*(x.astype(jnp.bfloat16) for x in tensors), AttentionMask.causal(), dropout_rate=0.5, dropout_seeds=seeds)


def test_auto_takes_the_dense_one_for_a_matrix_on_a_tpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choose_backend("auto", AttentionSpec("bfloat16", 64, matrix=True)).backend == "xla"
    attend(*[jnp.ones((1, 4, 2, 8))] * 3, AttentionMask.matrix(jnp.ones((4, 4), bool)))
