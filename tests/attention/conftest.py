import pytest
from jax._src import lib
from jax._src.cudnn import fused_attention_stablehlo


@pytest.fixture
def pretend_cudnn(monkeypatch):
    """Makes JAX lower for CUDA without a GPU."""
    monkeypatch.setattr(lib, "cuda_versions", object())
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
