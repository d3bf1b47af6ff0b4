"""`model.dropout` in place of what the base's config.json says."""

import dataclasses
import json
import shutil

import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.training.config import ModelSource
from dlm_jax.training.loop import train
from dlm_jax.training.metrics import read_records
from tests.training.conftest import changed


def test_a_rate_given_is_that_of_a_base_with_this_rate(config, base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict.fromkeys(
        ("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)))
    quick = dataclasses.replace(config, num_steps=2, log=dataclasses.replace(config.log, every=2))
    runs = {"given": changed(quick, "model.dropout", 0.0), "stored": changed(quick, "model.source", str(path.parent)),
            "neither": quick}
    losses = {}
    for name, run in runs.items():
        train(run, tmp_path / name)
        losses[name] = read_records(tmp_path / name, "train")[-1]["loss"]
    assert losses["given"] == losses["stored"] != losses["neither"]
    assert json.loads((tmp_path / "given" / "model" / "config.json").read_text())["attn_pdrop"] == 0.0


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_cannot_be_is_refused(rate):
    with pytest.raises(ConfigError, match="model.dropout must lie in"):
        ModelSource(dropout=rate)
