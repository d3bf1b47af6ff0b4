"""The step with LoRA: it changes trained parameters only, and is the same on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.models import Compute, LoRAConfig, ModelConfig, Transformer, abstract_model, add_lora, split_trainable
from dlm_jax.parallel import MeshConfig, make_mesh
from dlm_jax.training.flops import count_params
from dlm_jax.training.optimizer import OptimizerConfig, make_optimizer
from dlm_jax.training.state import Frozen, TrainState
from tests.models.test_lora import CODES
from tests.training.steps import assert_same_curve, one_device, take_steps
from tests.training.test_step import ANNEALED

MODEL = ModelConfig("llama", vocab_size=24, hidden_size=16, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4,
                    mlp_size=32, max_length=16, tie_embeddings=False, residual_dropout=0.1)
LORA = LoRAConfig(rank=3, alpha=6.0, dropout=0.1, targets=("q", "out", "up", "down"), embedding=True)


@functools.cache
def split_model(lora, compute=Compute()):
    """The graph, and the trained and frozen parameters on the host."""
    model = add_lora(Transformer(MODEL, rngs=nnx.Rngs(0), compute=compute), lora, 0, "float32")
    graphdef, params, frozen = split_trainable(model)
    return graphdef, jax.device_get(params), jax.device_get(frozen)


def run(mesh, steps, compute=Compute(), lora=LORA, **settings):
    """Metrics of each step, and the last state on the host."""
    split = split_model(lora, compute)
    metrics, state = take_steps(split, mesh, steps, ANNEALED, **{"weight_decay": 0.1} | settings)
    state = jax.device_get(state)
    for before, after in zip(jax.tree.leaves(split[2]), jax.tree.leaves(state.frozen.base), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)
    return metrics, state


@pytest.fixture(scope="module")
def reference():
    return run(one_device(), 5)


def test_every_trained_parameter_moves(reference):
    params = split_model(LORA)[1]
    for (path, before), (_, after) in zip(nnx.to_flat_state(params), nnx.to_flat_state(reference[1].params),
                                          strict=True):
        assert not np.array_equal(before[...], after[...]), path


@pytest.mark.parametrize("mesh, accumulate", [
    (MeshConfig(data=2, fsdp=2, tensor=2), 2), (MeshConfig(fsdp=2, tensor=2, context=2), 1)])
def test_loss_curve_is_the_same_on_every_mesh(reference, mesh, accumulate, capfd):
    metrics, _ = run(make_mesh(mesh), 5, accumulate_steps=accumulate)
    assert_same_curve(metrics, reference[0])
    assert "rematerialization" not in capfd.readouterr().err


def test_offload_and_skipping_are_exact(reference):
    metrics, _ = run(make_mesh(MeshConfig(fsdp=4, data=2)), 3, compute=Compute(remat="offload"), offload=True,
                     on_nonfinite="skip", ema_decay=0.9)
    assert_same_curve(metrics, reference[0], names=["loss"])


@pytest.mark.parametrize("kind, dora, mesh", [  # blocks of one value, and of eight
    ("nf4", False, MeshConfig(fsdp=8)), ("int8", True, MeshConfig(data=2, fsdp=2, tensor=2))])
def test_quantized_base_on_every_mesh(reference, kind, dora, mesh, capfd):
    lora = dataclasses.replace(LORA, frozen_dtype=kind, dora=dora)
    expected, _ = run(one_device(), 3, lora=lora)
    metrics, state = run(make_mesh(mesh), 3, lora=lora, compute=Compute(remat="full"))
    for found, one, exact in zip(metrics, expected, reference[0], strict=False):
        np.testing.assert_allclose(found["loss"], one["loss"], rtol=1e-5)
        np.testing.assert_allclose(found["grad_norm"], one["grad_norm"], rtol=1e-4)
        assert 1e-7 < abs(one["loss"] - exact["loss"]) < 0.02
    assert {leaf.dtype for leaf in jax.tree.leaves(state.frozen.base["blocks"]["mlp"])} >= {jnp.dtype(CODES[kind])}
    assert "rematerialization" not in capfd.readouterr().err
    for name in ("q", "out") if dora else ():
        before, after = (np.asarray(params["blocks"]["attention"][name]["factors"]["magnitude"][...])
                         for params in (split_model(lora)[1], state.params))
        assert 1e-4 < np.abs(before - after).max() < 0.1


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_optimizers_with_states_of_other_shapes(name):
    lora = dataclasses.replace(LORA, targets=("q", "down"))
    metrics, _ = run(make_mesh(MeshConfig(fsdp=4, tensor=2)), 3, lora=lora, name=name, learning_rate=1e-3)
    assert all(np.isfinite(m["loss"]) for m in metrics) and metrics[2]["loss"] != metrics[0]["loss"]


def test_optimizer_state_size():
    """Two moments per trained parameter, at the shape of Llama-2-7B with rank 16 on every projection, as shapes."""
    llama = ModelConfig("llama", vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32,
                        head_dim=128, mlp_size=11008, max_length=4096, tie_embeddings=False)
    lora = LoRAConfig(rank=16, alpha=32.0)
    rule = make_optimizer(OptimizerConfig(), 10)

    def size(model):
        _, params, frozen = split_trainable(model)
        state = jax.eval_shape(lambda p, f: TrainState.create(p, rule, False, f), params, Frozen(frozen))
        return (sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state)),
                sum(leaf.size for leaf in jax.tree.leaves(state.params)))

    per_layer = 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    with_lora, trained = size(abstract_model(llama, lora=lora))
    assert trained == 32 * per_layer == 39_976_960
    counters = 2 * 4  # of Adam and of the schedule, int32
    assert with_lora == 2 * 4 * 32 * per_layer + counters
    full, _ = size(abstract_model(llama))
    assert full == 2 * 4 * count_params(llama) + counters and with_lora < 0.01 * full
    tables = 32000 * 4096
    assert size(abstract_model(llama, lora=dataclasses.replace(lora, embedding=True)))[1] == trained + tables
