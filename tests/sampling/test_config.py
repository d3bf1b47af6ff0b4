import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.sampling import SamplerConfig


@pytest.mark.parametrize(("setting", "word"), [
    ({"policy": "best"}, "random, confidence"), ({"num_steps": 0}, "num_steps"), ({"temperature": -0.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"), ({"top_p": 0.0}, r"\(0, 1\]"), ({"top_p": 1.5}, r"\(0, 1\]"),
    ({"top_k": 0}, "top_k"),
])
def test_impossible_settings_are_refused(setting, word):
    with pytest.raises(ConfigError, match=word):
        SamplerConfig(**setting)
