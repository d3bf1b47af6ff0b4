"""The program to plan: the very step that `dlm train` runs, for devices that need not be here."""


import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from dlm_jax.checkpoints import resolve_lora
from dlm_jax.diffusion import Batch
from dlm_jax.models import Compute, Transformer, abstract_model, split_trainable
from dlm_jax.parallel import ATTENTION_PARTITION, array_sharding
from dlm_jax.plan.base import Base
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.optimizer import make_optimizer
from dlm_jax.training.setup import check_fit
from dlm_jax.training.step import TrainState, make_train_step, state_layout


def trace_step(config: TrainConfig, base: Base, mesh: Mesh, attention: str) -> list[jax.stages.Traced]:
    """The programs of the training step, traced for the devices of `mesh`: one, or two where the optimizer's state is
    offloaded."""
    model = planned_model(config, base, attention)
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    step = make_train_step(nnx.graphdef(model), optimizer, mesh, objective=config.objective, config=config.optimizer,
                           num_steps=config.num_steps, seed=config.seed, mask_token_id=base.mask_token_id)
    state, batch = planned_state(config, base, mesh), planned_batch(config, mesh)
    with jax.set_mesh(mesh):
        if not config.optimizer.offload:
            return [step.trace(state, batch)]
        first, second = step.programs
        gradient = first.trace(state.params, state.frozen, batch, state.step)
        grads = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), state.params)
        return [gradient, second.trace(state, grads, gradient.out_info[1])]


def planned_model(config: TrainConfig, base: Base, attention: str) -> Transformer:
    """The model with shapes in place of arrays."""
    compute = Compute(config.model.dtype, config.model.remat, attention, ATTENTION_PARTITION)
    lora = resolve_lora(config.lora, base.config, base.new_mask_token)
    return abstract_model(base.config, compute, config.model.param_dtype, lora)


def planned_state(config: TrainConfig, base: Base, mesh: Mesh | AbstractMesh) -> TrainState:
    """The state with shapes, and where they are placed, in place of arrays.

    Raises:
      ConfigError: the mesh does not divide a parameter.
    """
    _, params, frozen = split_trainable(planned_model(config, base, "xla"))
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    return state_layout(params, optimizer, config.optimizer.ema_decay > 0, mesh, config.optimizer.offload, frozen)


def planned_batch(config: TrainConfig, mesh: Mesh) -> Batch:
    """What the loader gives a step, as shapes with their shardings."""
    rows, data = config.data.batch_size, config.data

    def of(dtype: jnp.dtype, *axes: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, data.length)[:len(axes)], dtype, sharding=array_sharding(mesh, *axes))

    # Rows that hold several documents, or one that ends early, say where each begins.
    padded = data.examples.format != "none" and data.examples.train_on_padding is False
    starts = data.packing == "document_mask" or data.random_length > 0 or padded
    ids = of(jnp.int32, "batch", "length") if starts else None
    return Batch(of(jnp.int32, "batch", "length"), of(jnp.bool_, "batch", "length"), of(jnp.uint32, "batch"), ids, ids)


def check_plan(config: TrainConfig, base: Base, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError where config, base model and mesh contradict each other, as training would."""
    check_fit(config, base.config, base.mask_token_id, mesh)
    planned_state(config, base, mesh)
