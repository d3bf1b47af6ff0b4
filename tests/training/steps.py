"""Training steps of tiny models on random tokens, for comparing meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dlm_jax.diffusion import Batch
from dlm_jax.parallel import make_global_batch, make_mesh
from dlm_jax.training.config import OptimizerConfig
from dlm_jax.training.optimizer import make_optimizer
from dlm_jax.training.state import Frozen, create_state, parent_params
from dlm_jax.training.step import make_train_step

ROWS, LENGTH, MASK = 16, 16, 23


@functools.cache
def one_device():
    return make_mesh(devices=jax.devices()[:1])


def batch_of(step=0, mesh=None, noisable_mask=True, start=None):
    """The global batch of a step: random tokens, position 0 is context; a second document of each row at `start`."""
    def read(rows):
        tokens = np.random.default_rng(step).integers(0, MASK, (ROWS, LENGTH)).astype(np.int32)
        noisable = np.full((ROWS, LENGTH), noisable_mask) & (np.arange(LENGTH) > 0)
        fields = [tokens, noisable, np.arange(ROWS, dtype=np.uint32) + ROWS * step]
        if start is not None:
            index = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
            fields += [(index >= start).astype(np.int32), np.where(index < start, index, index - start)]
        return Batch(*(x[rows] for x in fields))

    return make_global_batch(read, ROWS, mesh or one_device())


@functools.cache
def compiled_step(graphdef, mesh, objective, settings):
    """The settings of the optimizer, its rule, and the step."""
    config = OptimizerConfig(**{"learning_rate": 1e-2, "schedule": "constant"} | dict(settings))
    rule = make_optimizer(config, 10)
    return config, rule, make_train_step(graphdef, rule, mesh, objective=objective, config=config, num_steps=10, seed=1,
                                         mask_token_id=MASK)


def take_steps(split, mesh, steps, objective, batches=batch_of, **settings):
    """Metrics of each step, and the last state.

    Args:
      split: the graph, trained and frozen parameters; they are not donated.
      batches: from (step, mesh) to a batch.
      settings: of the optimizer.
    """
    graphdef, *parameters = split
    config, rule, step = compiled_step(graphdef, mesh, objective, tuple(settings.items()))
    metrics = []
    with jax.set_mesh(mesh):
        params, base = jax.tree.map(lambda x: jnp.array(x, copy=True), tuple(parameters))
        frozen = Frozen(base, parent_params(objective, params, "float32"))
        state = create_state(params, rule, config.ema_decay > 0, mesh, config.offload, frozen)
        for number in range(steps):
            state, last = step(state, batches(number, mesh))
            metrics.append(jax.device_get(last))
    return metrics, state


def split_alone(model):
    """A model's graph, its parameters on the host, and no frozen ones."""
    graphdef, params = nnx.split(model)
    return graphdef, jax.device_get(params), nnx.State({})


def assert_same_curve(found, expected, rtol=1e-5, atol=0.0, names=()):
    """Each step has the same metrics; the curve that is `found` may be shorter."""
    assert 0 < len(found) <= len(expected) and found[0].keys() == expected[0].keys()
    for record, reference in zip(found, expected, strict=False):
        for name in names or reference:
            np.testing.assert_allclose(record[name], reference[name], rtol=rtol, atol=atol, err_msg=name)
