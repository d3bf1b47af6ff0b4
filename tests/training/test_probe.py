"""The timed step is the run's own, and needs no weights."""

import dataclasses

import jax
import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.training.probe import probe_step


def test_probe_reads_no_weights(config, base):
    """`base` has none; a larger batch takes longer."""
    def probed(size):
        return probe_step(dataclasses.replace(
            config, model=dataclasses.replace(config.model, source=str(base)),
            data=dataclasses.replace(config.data, batch_size=size)))

    small, large = probed(16), probed(1024)
    assert small.model.hidden_size == 16 and small.setup_seconds > 0
    assert 0 < small.step_seconds < large.step_seconds


def test_wrong_settings_are_refused_before_steps(config, monkeypatch):
    monkeypatch.setattr(jax, "block_until_ready", lambda _: pytest.fail("a step was taken"))
    with pytest.raises(ConfigError, match="length"):
        probe_step(dataclasses.replace(config, data=dataclasses.replace(config.data, length=64)))
