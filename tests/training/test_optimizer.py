"""Optimizer rules on stacked layers, and learning-rate schedules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.checkpoints.orbax import named
from dlm_jax.errors import ConfigError
from dlm_jax.models import ModelConfig, abstract_model
from dlm_jax.training.optimizer import OptimizerConfig, decays, learning_rate, make_optimizer, map_params, takes_muon

SHAPES = {  # name -> axes, shape; large enough for Adafactor to factor the matrices
    "q": (("layers", "embed", "heads", "head_dim"), (3, 128, 2, 64)),
    "out": (("layers", "heads", "head_dim", "embed"), (3, 2, 96, 128)),
    "bias": (("layers", "heads", "head_dim"), (3, 2, 64)),
    "scale": (("layers", None), (3, 128)),
    "table": (("vocab", "embed"), (130, 128)),
    "final": ((None,), (128,)),
}


def parameters(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return nnx.State({name: nnx.Param(jax.random.normal(key, shape), axes=axes)
                      for key, (name, (axes, shape)) in zip(keys, SHAPES.items(), strict=True)})


def layer(params, i):
    """The parameters of one layer, and those outside of layers."""
    return map_params(lambda p: p.replace(p[i : i + 1]) if "layers" in p.axes else p, params)


@functools.cache
def updater(config):
    """A compiled function from (params, gradients of each step) to the last update."""
    optimizer = make_optimizer(config, 10)

    def run(params, grads):
        state = optimizer.init(params)
        for grad in grads:
            updates, state = optimizer.update(grad, state, params)
        return updates

    return jax.jit(run)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_stacked_update_is_the_update_of_each_layer(name):
    config = OptimizerConfig(name=name, clip_norm=0.0, weight_decay=0.1, schedule="constant", learning_rate=1.0)
    params, grads = parameters(0), [parameters(1), parameters(2)]
    stacked = updater(config)(params, grads)
    for i in range(3):
        alone = updater(config)(layer(params, i), [layer(g, i) for g in grads])
        for key, value in named(layer(stacked, i)).items():
            np.testing.assert_allclose(value, named(alone)[key], rtol=2e-4, atol=2e-5, err_msg=key)


def test_muon_is_orthogonal_per_layer_beside_adam():
    config = OptimizerConfig(name="muon", clip_norm=0.0, schedule="constant", learning_rate=1.0)
    params, grads = parameters(0), [parameters(1)]
    update = updater(config)(params, grads)
    adam = updater(dataclasses.replace(config, name="adamw"))(params, grads)
    for key in ("bias", "scale", "table", "final"):
        np.testing.assert_array_equal(update[key][...], adam[key][...])
    matrices = np.asarray(update["q"][...]).reshape(3, 128, 128) / (0.2 * np.sqrt(128))
    singular = np.linalg.svd(matrices, compute_uv=False)
    assert singular.min() > 0.05 and singular.max() < 1.3  # what five Newton-Schulz steps reach
    gradient = np.asarray(grads[0]["q"][...]).reshape(3, 128, 128)
    u, _, vt = np.linalg.svd(gradient)
    assert -np.trace(matrices @ (u @ vt).mT, axis1=1, axis2=2).max() > 0.8 * 128 * singular.mean()
    tall = np.asarray(update["out"][...]).reshape(3, 192, 128) / (0.2 * np.sqrt(192))  # [heads x head_dim, embed]
    assert np.linalg.svd(tall, compute_uv=False).min() > 0.3


def test_parameters_with_decay_and_with_muon():
    config = ModelConfig("qwen3", 64, 16, 2, 4, 2, 4, 32, 8, qkv_bias=True, mlp_bias=True, out_bias=True, norm="layer",
                         qk_norm=True, positions="learned")
    params = nnx.state(abstract_model(config))
    decay = {name for name, value in named(decays(params)).items() if value}
    muon = {name for name, value in named(map_params(lambda p: takes_muon(p.axes), params)).items() if value}
    kernels = {name for name in named(params) if name.startswith("blocks") and name.endswith("kernel")}
    assert len(kernels) == 7
    assert muon == kernels
    assert decay == kernels | {"embed.embedding", "head.kernel"}


def test_adafactor_state_is_factored():
    state = make_optimizer(OptimizerConfig(name="adafactor"), 10).init(parameters(0))
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state))
    assert max(sizes) < 1000  # SHAPES hold up to 73,728


@pytest.mark.parametrize("schedule, expected", [
    ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ("wsd", [0.5, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325]),
])
def test_schedules(schedule, expected):
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=2, decay_steps=4, final_fraction=0.1)
    rate = learning_rate(config, 10)
    np.testing.assert_allclose([rate(step) for step in range(10)], expected, rtol=1e-6)


def test_cosine_schedule():
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_fraction=0.1), 104)
    np.testing.assert_allclose([rate(0), rate(3), rate(4), rate(54), rate(104)], [0.25, 1, 1, 0.55, 0.1], rtol=1e-6)


@pytest.mark.parametrize("config", [OptimizerConfig(warmup_steps=10), OptimizerConfig(schedule="wsd", decay_steps=11)])
def test_schedule_longer_than_the_run_is_refused(config):
    with pytest.raises(ConfigError, match="num_steps"):
        make_optimizer(config, 10)


def test_clipping_by_global_norm():
    optimizer, grads = make_optimizer(OptimizerConfig(clip_norm=1.0, b1=0.0), 10), parameters(1)
    _, state = jax.jit(lambda g: optimizer.update(g, optimizer.init(g), g))(grads)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(state[1].mu)))
    assert norm == pytest.approx(1.0, rel=1e-5)
