import pytest
from jax._src import lib
from jax._src.cudnn import fused_attention_stablehlo as inner


@pytest.fixture
def pretend_cudnn(monkeypatch):
    """JAX lowers for CUDA without a GPU, once it believes in cuDNN."""
    monkeypatch.setattr(lib, "cuda_versions", object())
    monkeypatch.setattr(inner, "check_cudnn_version", lambda: 91000)
