"""Times the step of a run before the run: the real program, on random weights and random tokens.

It needs the source's configuration and tokenizer alone, so that nothing large is downloaded before it is known how long
the run will take.
"""

import dataclasses
import pathlib
import statistics
import time

import jax
import numpy as np

from dlm_jax.data.loader import Loader
from dlm_jax.data.rows import Rows
from dlm_jax.matmul import resolve_dtype
from dlm_jax.models import ModelConfig, split_trainable
from dlm_jax.parallel import make_global_batch, make_mesh
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.optimizer import make_optimizer
from dlm_jax.training.setup import load_base
from dlm_jax.training.state import Frozen, create_state, parent_params
from dlm_jax.training.step import make_train_step

_STEPS, _SECONDS = 5, 15.0  # timed: as many steps, or for slow ones as many as start within as many seconds


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a few steps showed.

    Attributes:
      model: the architecture.
      setup_seconds: for making the model and the optimizer's state.
      compile_seconds: for compiling the step, or finding it compiled.
      step_seconds: the median of the timed steps.
    """

    model: ModelConfig
    setup_seconds: float
    compile_seconds: float
    step_seconds: float


def probe_step(config: TrainConfig) -> Probe:
    """Takes one step of a run to compile it, and times the next ones.

    Raises:
      ConfigError, CheckpointError: the run cannot be set up.
    """
    start, data, mesh = time.perf_counter(), config.data, make_mesh(config.mesh)
    dtype = resolve_dtype(config.model.dtype, mesh.devices.flat[0].platform, mesh.size)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype, init="random"))
    with jax.set_mesh(mesh):
        base, config = load_base(config, pathlib.Path(), mesh, resumed=False)
        graphdef, params, frozen = split_trainable(base.model)
        optimizer = make_optimizer(config.optimizer, config.num_steps)
        architecture, compute = base.model.config, base.model.compute
        step = make_train_step(graphdef, optimizer, mesh, objective=config.objective.at_step(0),
                               config=config.optimizer, num_steps=config.num_steps, seed=config.seed,
                               mask_token_id=base.diffusion.mask_token_id, matmul=compute.matmul)
        frozen = Frozen(frozen, parent_params(config.objective, params, config.model.dtype))
        state = create_state(params, optimizer, config.optimizer.ema_decay > 0, mesh, config.optimizer.offload, frozen)
        del base, params, frozen
        rows = np.random.default_rng(0).integers(0, architecture.vocab_size, (data.batch_size, data.length), np.int32)
        loader = Loader([Rows(rows)], data.batch_size)
        batch = make_global_batch(lambda part: loader.batch(0, part), data.batch_size, mesh)
        times, made = [], time.perf_counter()
        while len(times) <= _STEPS and sum(times[1:]) < _SECONDS:
            begin = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - begin)
    seconds = statistics.median(times[1:])
    return Probe(architecture, made - start, times[0] - seconds, seconds)
