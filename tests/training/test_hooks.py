"""What a run does besides its steps: when hooks are due, validation, samples, the profile."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from flax import nnx

from dlm_jax.data.rows import Rows
from dlm_jax.diffusion import ObjectiveConfig
from dlm_jax.errors import ConfigError
from dlm_jax.models import ModelConfig, Transformer
from dlm_jax.parallel import make_mesh
from dlm_jax.training import read_records, train
from dlm_jax.training.hooks import PeriodicEval, Validation, make_hooks

LENGTH, MASK = 16, 23
MODEL = ModelConfig("gpt2", vocab_size=24, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
                    mlp_size=32, max_length=16, norm="layer", positions="learned", gated_mlp=False, tie_embeddings=True,
                    qkv_bias=True)


@pytest.mark.parametrize("first_step, every, at_ends, expected", [
    (0, (4,), True, [0, 4, 8, 10]), (0, (4,), False, [4, 8]), (4, (4,), True, [8, 10]), (0, (4, 3), True,
                                                                                         [0, 3, 4, 6, 8, 9, 10])])
def test_periodic_eval_is_due(first_step, every, at_ends, expected):
    run = types.SimpleNamespace(first_step=first_step, config=types.SimpleNamespace(num_steps=10))
    hook = PeriodicEval("kind", "sampling", lambda params: ({}, ""), every, at_ends)
    assert [step for step in range(first_step, 11) if hook.is_due(run, step)] == expected


def test_records_of_hooks(config, tmp_path, capsys):
    """A caller's hook sees the parameters, and its records are in the log and in the summary; texts; a trace."""
    def evaluate(params):
        return {"norm": float(sum(abs(leaf).sum() for leaf in jax.tree.leaves(jax.device_get(params))))}, "a line"

    log = dataclasses.replace(config.log, sample_every=2, sample_steps=4, profile=(2, 3))
    summary = train(dataclasses.replace(config, num_steps=4, log=log), tmp_path,
                    [lambda run: PeriodicEval("norms", "sampling", evaluate, (2,))])
    records = read_records(tmp_path, "norms")
    assert [record["step"] for record in records] == [0, 2, 4] and len({record["norm"] for record in records}) == 3
    assert summary["norms"] == records[-1]
    texts = read_records(tmp_path, "sample")
    assert [record["step"] for record in texts] == [2, 4] and set(texts[0]["text"]) <= set("abcdefgh <unk>")
    assert "step       3  trace written" in capsys.readouterr().out
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_generated_answers_need_a_hook():
    config = types.SimpleNamespace(validation=types.SimpleNamespace(every=0, num_generations=4))
    with pytest.raises(ConfigError, match="validation.num_generations"):
        make_hooks(types.SimpleNamespace(config=config, held_out=None))


@pytest.mark.parametrize("name, expected", [("diffusion", 6), ("block_diffusion", 6), ("autoregressive", 1)])
def test_validation_num_samples(name, expected):
    """Every objective with noise takes all of its noise samples; its value is the mean over them."""
    mesh, model = make_mesh(devices=jax.devices()[:1]), Transformer(MODEL, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    rows = Rows(np.random.default_rng(0).integers(0, 23, (8, LENGTH)).astype(np.int32))
    validate = Validation(graphdef, rows, mesh, num_rows=8, num_samples=6, batch_size=8, seed=0, mask_token_id=MASK,
                          objective=ObjectiveConfig(name=name, block_size=4))
    sums = jax.device_get([validate._eval_step(params, *validate._batches, np.int32(n)) for n in range(expected)])
    bounds = [float(one.weighted_nll / one.num_noisable) for one in sums]
    assert len(set(bounds)) == expected and sums[0].num_noisable == 8 * (LENGTH - 1)
    assert validate(params)["bound"] == pytest.approx(np.mean(bounds), rel=1e-5)
