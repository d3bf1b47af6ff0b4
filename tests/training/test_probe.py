"""The timed step is the run's own, and needs no weights."""

import dataclasses

import jax
import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.training.probe import probe_step


def test_probe_reads_no_weights(config, base):
    """`base` has none."""
    probe = probe_step(dataclasses.replace(config, model=dataclasses.replace(config.model, source=str(base))))
    assert probe.model.hidden_size == 16
    assert min(probe.setup_seconds, probe.step_seconds) > 0


def test_wrong_settings_are_refused_before_steps(config, monkeypatch):
    monkeypatch.setattr(jax, "block_until_ready", lambda _: pytest.fail("a step was taken"))
    with pytest.raises(ConfigError, match="length"):
        probe_step(dataclasses.replace(config, data=dataclasses.replace(config.data, length=64)))
