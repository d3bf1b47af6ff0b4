import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.data.batch import Batch
from dlm_jax.models import Compute, ModelConfig, Transformer
from dlm_jax.parallel import MeshConfig, make_mesh, place_rows
from dlm_jax.training.objective import ObjectiveConfig
from dlm_jax.training.optimizer import OptimizerConfig, make_optimizer
from dlm_jax.training.state import create_state
from dlm_jax.training.step import make_eval_step, make_train_step, micro_batches

MODEL = ModelConfig("gpt2", vocab_size=24, hidden_size=16, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4, mlp_size=32,
                    max_length=16, norm="layer", positions="learned", gated_mlp=False, tie_embeddings=True,
                    qkv_bias=True, residual_dropout=0.1, embed_dropout=0.1, attention_dropout=0.1)
ROWS, LENGTH, MASK = 16, 16, 23


def batch_of(step, mesh, maskable=True):
    def read(part):
        tokens = np.random.default_rng(step).integers(0, 23, (ROWS, LENGTH)).astype(np.int32)
        may = np.full((ROWS, LENGTH), maskable) & (np.arange(LENGTH) > 0)
        return Batch(tokens[part], may[part], (np.arange(ROWS, dtype=np.uint32) + ROWS * step)[part])

    return place_rows(read, ROWS, mesh)


def train(mesh, steps=5, maskable=True, compute=Compute(), objective=ObjectiveConfig(anneal_steps=8), **optimizer):
    """Metrics of each step, and the last state."""
    graphdef, params = nnx.split(Transformer(MODEL, rngs=nnx.Rngs(0), compute=compute))
    config = OptimizerConfig(**{"learning_rate": 1e-2, "schedule": "constant", "weight_decay": 0.1} | optimizer)
    rule = make_optimizer(config, 10)
    state = create_state(params, rule, config.ema_decay > 0, mesh)
    step = make_train_step(graphdef, rule, mesh, objective=objective, config=config, num_steps=10, seed=1,
                           mask_token_id=MASK)
    metrics = []
    for i in range(steps):
        state, last = step(state, batch_of(i, mesh, maskable))
        metrics.append(jax.device_get(last))
    return metrics, state


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def reference():
    return train(one_device())


@pytest.mark.parametrize("mesh, accumulate", [
    (None, 4), (MeshConfig(fsdp=8), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 2), (MeshConfig(fsdp=1, tensor=8), 1),
    (MeshConfig(data=4, fsdp=2), 2), (MeshConfig(fsdp=2, tensor=2, context=2), 1)])
def test_the_loss_curve_does_not_depend_on_mesh_or_accumulation(reference, mesh, accumulate, capfd):
    mesh = make_mesh(mesh) if mesh else one_device()
    metrics, _ = train(mesh, accumulate_steps=accumulate)
    for found, expected in zip(metrics, reference[0], strict=True):
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)
    assert "rematerialization" not in capfd.readouterr().err  # XLA's word for moving an array whole


def test_state_is_donated_and_stays_where_it_was(reference):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    _, before = train(mesh, steps=0)
    _, after = train(mesh, steps=1)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert old.sharding.is_equivalent_to(new.sharding, old.ndim)
    kernel = after.opt_state[1].mu["blocks"]["mlp"]["up"]["kernel"][...]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 4, 16)}


def test_nothing_to_mask_gives_no_loss_and_no_gradient():
    metrics, state = train(one_device(), steps=1, maskable=False, weight_decay=0.0)
    assert metrics[0]["loss"] == 0 and metrics[0]["grad_norm"] == 0 and metrics[0]["masked_tokens"] == 0
    untouched = nnx.state(Transformer(MODEL, rngs=nnx.Rngs(0)))
    for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(untouched), strict=True):
        np.testing.assert_array_equal(new, old)


def test_computing_in_bfloat16_keeps_float32_parameters(reference):
    metrics, state = train(one_device(), compute=Compute(dtype="bfloat16", remat="full"), accumulate_steps=2)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state))} <= {jnp.dtype("float32"),
                                                                                         jnp.dtype("int32")}
    np.testing.assert_allclose(metrics[-1]["loss"], reference[0][-1]["loss"], rtol=0.02)


def test_the_average_trails_the_parameters():
    _, start = train(one_device(), steps=0)
    _, state = train(one_device(), steps=1, ema_decay=0.75)
    old, new, average = (s["embed"]["embedding"][...] for s in (start.params, state.params, state.ema))
    np.testing.assert_allclose(average, 0.75 * old + 0.25 * new, rtol=1e-5, atol=1e-7)


def test_normalisers_and_weights_by_name():
    """The same sums, divided as asked."""
    by = {(normaliser, weight): train(one_device(), steps=1, objective=ObjectiveConfig(
        normaliser=normaliser, weight=weight))[0][0] for normaliser in ("maskable", "masked")
        for weight in ("elbo", "uniform")}
    one = by["maskable", "elbo"]
    maskable, masked = ROWS * (LENGTH - 1), one["masked_tokens"]
    assert one["loss"] == one["bound"]
    np.testing.assert_allclose(by["masked", "elbo"]["loss"], one["bound"] * maskable / masked, rtol=1e-6)
    np.testing.assert_allclose(by["masked", "uniform"]["loss"], one["masked_nll"], rtol=1e-6)
    np.testing.assert_allclose(by["maskable", "uniform"]["loss"], one["masked_nll"] * masked / maskable, rtol=1e-6)


def test_gradients_are_those_of_the_loss():
    """One plain step, against the derivative of the reported loss along the gradient."""
    kwargs = dict(clip_norm=0.0, weight_decay=0.0, name="lion", learning_rate=1e-4)
    metrics, state = train(one_device(), steps=1, **kwargs)
    start = jax.tree.leaves(train(one_device(), steps=0)[1].params)
    # Lion moves every weight by the learning rate against the sign of its gradient.
    moves = [np.asarray(new - old) for new, old in zip(jax.tree.leaves(state.params), start, strict=True)]
    assert max(abs(move).max() for move in moves) == pytest.approx(1e-4, rel=1e-2)
    assert metrics[0]["grad_norm"] > 0


def test_micro_batches_are_strided():
    batch = Batch(jnp.arange(8)[:, None], jnp.ones((8, 1), bool), jnp.arange(8, dtype=jnp.uint32))
    np.testing.assert_array_equal(micro_batches(batch, 2).example_index, [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_validation_is_fixed_and_bidirectional():
    """Its value changes with the parameters only: not with annealing, dropout or the training objective's stages."""
    mesh, graphdef = one_device(), nnx.graphdef(Transformer(MODEL, rngs=nnx.Rngs(0)))
    params = nnx.state(Transformer(MODEL, rngs=nnx.Rngs(0)))
    values = []
    for objective in (ObjectiveConfig(), ObjectiveConfig(anneal_steps=100, stages=((0, 0.0, 0.5),), weight="uniform")):
        evaluate = make_eval_step(graphdef, mesh, objective=objective, seed=0, num_rows=ROWS, num_samples=2,
                                  mask_token_id=MASK)
        values.append([evaluate(params, batch_of(0, mesh), jnp.int32(draw)) for draw in range(2)])
    assert jax.tree.all(jax.tree.map(np.array_equal, *values))
    first, second = values[0]
    assert first.scored < 0.75 * ROWS * (LENGTH - 1) / 2 < 1.25 * ROWS * (LENGTH - 1) / 2 < second.scored + first.scored
    causal = dataclasses.replace(ObjectiveConfig(), name="autoregressive")
    evaluate = make_eval_step(graphdef, mesh, objective=causal, seed=0, num_rows=ROWS, num_samples=1,
                              mask_token_id=None)
    assert evaluate(params, batch_of(0, mesh), jnp.int32(0)).scored == ROWS * (LENGTH - 1)
