import pytest

from dlm_jax.data.config import DataConfig, ExampleConfig, RowsConfig
from dlm_jax.errors import ConfigError


@pytest.mark.parametrize("wrong", [
    {"packing": "padded"}, {"length": 1}, {"batch_size": 0}, {"validation_fraction": 1.0}, {"random_length": 1.1},
    {"weights": (1.0,)}, {"train": ("a",), "weights": (0.0,)}])
def test_invalid_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"data.{list(wrong)[-1]}"):
        DataConfig(**wrong)


@pytest.mark.parametrize("settings, key", [({"overlong": "keep"}, "overlong"),
                                           ({"format": "messages", "split_digits": True}, "split_digits")])
def test_invalid_examples_are_refused(settings, key):
    with pytest.raises(ConfigError, match=f"data.examples.{key}"):
        ExampleConfig(**settings)


def test_rows_config_holds_nothing_out_beside_validation_text():
    assert DataConfig(length=8).rows_config() == RowsConfig(length=8)
    assert DataConfig(validation=("a.txt",)).rows_config().validation_fraction == 0.0
    assert DataConfig().rows_config(0.5).validation_fraction == 0.5
