import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.models import Compute, ModelConfig

SIZES = dict(family="llama", vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12,
             mlp_size=48, max_length=24)


@pytest.mark.parametrize("changes, mentions", [
    ({"num_kv_heads": 3}, "num_kv_heads"), ({"activation": "swish"}, "activation.*gelu_tanh.*'swish'"),
    ({"norm": "batch"}, "norm"), ({"positions": "alibi"}, "positions")])
def test_refused_architectures(changes, mentions):
    with pytest.raises(ConfigError, match=mentions):
        ModelConfig(**SIZES | changes)


@pytest.mark.parametrize("changes", [{"dtype": "float16"}, {"remat": "some"}])
def test_refused_compute(changes):
    with pytest.raises(ConfigError, match=f"model.{next(iter(changes))}"):
        Compute(**changes)
