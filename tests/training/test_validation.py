import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from dlm_jax.data.rows import Rows
from dlm_jax.diffusion import ObjectiveConfig
from dlm_jax.models import ModelConfig, Transformer
from dlm_jax.parallel import make_mesh
from dlm_jax.training.step import make_eval_step, metrics_from_sums
from dlm_jax.training.validation import Validation

LENGTH, MASK = 16, 23
MODEL = ModelConfig("gpt2", vocab_size=24, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
                    mlp_size=32, max_length=16, norm="layer", positions="learned", gated_mlp=False, tie_embeddings=True,
                    qkv_bias=True)


@pytest.mark.parametrize("name, expected", [("diffusion", 6), ("block_diffusion", 6), ("autoregressive", 1)])
def test_num_samples(name, expected):
    """Every objective with noise takes all of its draws; its value is the mean over them."""
    mesh, model = make_mesh(devices=jax.devices()[:1]), Transformer(MODEL, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    settings = {"objective": ObjectiveConfig(name=name, block_size=4), "seed": 0, "mask_token_id": MASK}
    rows = Rows(np.random.default_rng(0).integers(0, 23, (8, LENGTH)).astype(np.int32))
    validate = Validation(graphdef, rows, mesh, num_rows=8, num_samples=6, batch_size=8, **settings)
    step = make_eval_step(graphdef, mesh, num_rows=8, num_samples=expected, **settings)
    draws = [metrics_from_sums(step(params, validate._batches[0], np.int32(draw)))["bound"] for draw in range(expected)]
    assert len(set(map(float, draws))) == expected
    assert validate(params)["bound"] == pytest.approx(np.mean(draws), rel=1e-5)


def test_objective():
    """Validation scores by the objective of the run; only what shapes training alone is reset."""
    trained = ObjectiveConfig(
        name="block_diffusion", shift=False, min_time=0.1, loss_normalization="masked_tokens", weight="uniform",
        time_curriculum=((0, 0.0, 0.5),), block_size=4, block_size_schedule=((0, 2), (5, 4)), clean_attention="block_bidirectional", complementary=True)
    validated = trained.for_validation()
    changed = {field.name for field in dataclasses.fields(trained)
               if getattr(trained, field.name) != getattr(validated, field.name)}
    assert changed == {"time_curriculum", "block_size_schedule", "complementary"}
    assert ObjectiveConfig(anneal_steps=9, share_annealed_mask=True).for_validation() == ObjectiveConfig()
