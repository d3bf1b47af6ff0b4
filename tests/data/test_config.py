import dataclasses

import pytest

from dlm_jax.data.config import DataConfig
from dlm_jax.errors import ConfigError


@pytest.mark.parametrize("wrong", [{"pack": "padded"}, {"length": 1}, {"batch_size": 0}, {"validation_fraction": 1.0}])
def test_an_impossible_setting_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=f"data.{next(iter(wrong))}"):
        DataConfig(**wrong)


def test_every_field_says_what_it_means():
    assert all(field.metadata.get("help") for field in dataclasses.fields(DataConfig))
