"""What a step needs of a device's memory, added up without compiling: exact for the state, an estimate for the rest."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn
from jax.sharding import AbstractMesh, Mesh

from dlm_jax.checkpoints import resolve_lora
from dlm_jax.diffusion import HeadPlan
from dlm_jax.parallel import MeshConfig, make_mesh, num_batch_shards
from dlm_jax.parallel.chips import GIB
from dlm_jax.plan.base import Base
from dlm_jax.plan.program import planned_state, trace_step
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.metrics import count_params
from dlm_jax.training.step import HOST

_TRACED_ROWS = 1009  # a prime that no other axis of a model has: by it the axis of rows is recognised


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """GiB of a device.

    Attributes:
      state: parameters, the optimizer's moments and the average, as they are placed.
      gradients: in float32, placed as the parameters; once more in their own type where micro-batches are summed.
      activations: what the backward pass of a micro-batch keeps of the forward pass.
      working: one layer's weights and the tables, gathered, or its weights as they are made of codes or with LoRA's
        products; what that layer's backward pass makes again; the scores of dense attention; the logits of one chunk
        with their gradient; the head's gradient before it is scattered.
    """

    state: float
    gradients: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        return self.state + self.gradients + self.activations + self.working


def has_analytic_estimate(config: TrainConfig, sizes: Mapping[str, int]) -> bool:
    """Whether `add_up` foresees it: a mesh of these sizes that splits only the batch, nothing in the host's memory."""
    offloads = config.optimizer.offload or config.model.remat == "offload"
    return sizes["tensor"] * sizes["context"] == 1 and not offloads


def add_up(config: TrainConfig, base: Base, mesh: Mesh | AbstractMesh, attention: str) -> StepMemory:
    """What a step needs on each device of a mesh that splits only the batch."""
    architecture, state = base.config, planned_state(config, base, mesh)
    params = placed_bytes(state.params)
    gradients = 4 * params // jnp.dtype(config.model.param_dtype).itemsize
    if config.optimizer.accumulate_steps > 1:
        gradients += params

    rows = config.data.batch_size / config.optimizer.accumulate_steps / num_batch_shards(mesh)
    kept, everything = (rows * kept_bytes(config, base, attention, remat) for remat in (config.model.remat, "none"))
    width, gathers = jnp.dtype(config.model.dtype).itemsize, mesh.shape["fsdp"] > 1
    lora = resolve_lora(config.lora, architecture, base.new_mask_token)
    layer = count_params(architecture, "blocks") / architecture.num_layers
    table = architecture.vocab_size * architecture.hidden_size
    working = 8 * HeadPlan.chunk_size * architecture.vocab_size
    working += min(4 * table, HeadPlan.max_gradient_bytes) if gathers else 4 * table
    if gathers:
        working += width * (layer + table * (1 if architecture.tie_embeddings else 2))
    elif lora is not None and (lora.quantized or lora.dora):
        working += width * layer
    if config.model.remat != "none":
        working += everything / architecture.num_layers
    if attention == "xla":  # the scores and their gradient, float32
        working += 8 * rows * architecture.num_heads * config.data.length**2
    return StepMemory(*(size / GIB for size in (placed_bytes(state), gradients, kept, working)))


def placed_bytes(tree: object) -> int:
    """Bytes of a device that a tree of shapes with shardings takes; what lies in the host's memory takes none."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * jax.dtypes.itemsize_bits(leaf.dtype) // 8
               for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != HOST)


def kept_bytes(config: TrainConfig, base: Base, attention: str, remat: str) -> float:
    """Bytes that the layers' backward pass keeps of the forward pass, a row.

    The step is traced, and what its scan over layers stacks up for each row is counted; parameters in the type of the
    activations, which it stacks too, are not. Where cuDNN attends, what the TPU's kernel keeps is what it keeps too:
    query, key, value, result and logsumexp.
    """
    attention = "tpu" if attention == "cudnn" else attention
    return _kept_bytes(dataclasses.replace(
        config, model=dataclasses.replace(config.model, remat=remat),
        data=dataclasses.replace(config.data, batch_size=_TRACED_ROWS),
        optimizer=dataclasses.replace(config.optimizer, accumulate_steps=1)), base, attention)


@functools.cache  # batches of all sizes have the same rows
def _kept_bytes(config: TrainConfig, base: Base, attention: str) -> float:
    traced, = trace_step(config, base, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]), attention)
    layers = base.config.num_layers
    forward = next(scan for scan in _scans(traced.jaxpr.jaxpr) if scan.params["length"] == layers)
    stacked = [out.aval for out in forward.outvars if out.aval.shape[:1] == (layers,)]  # the rest is carried along
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in stacked if _TRACED_ROWS in a.shape) / _TRACED_ROWS


def _scans(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All scans, in the order of the program, those within others after them."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _scans(inner)
