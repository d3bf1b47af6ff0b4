"""The state of training: what changes from step to step, what does not, and where its arrays are."""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.diffusion import ObjectiveConfig
from dlm_jax.models import LoRAFactor
from dlm_jax.parallel import param_shardings, state_shardings

DEVICE, HOST = "device", "pinned_host"  # JAX's names for kinds of memory
Metrics = dict[str, jax.Array]


class Frozen(NamedTuple):
    """Parameters that no step changes and no checkpoint holds.

    Attributes:
      base: of the model that is trained: with LoRA those of the base, of a drafter those of its target, else none.
      parent: the values that trained parameters had at first, for `objective.teacher`; else none.
    """

    base: nnx.State = nnx.State({})
    parent: nnx.State = nnx.State({})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step.

    Attributes:
      step: int32 scalar, steps taken.
      params: the trained parameters, as `split_trainable` returns them.
      opt_state: optax's state; its moments carry the logical axes of their parameters.
      ema: moving average of `params` in float32, or None.
    """

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState
    ema: nnx.State | None
    frozen: Frozen = Frozen()

    @classmethod
    def create(cls, params: nnx.State, optimizer: optax.GradientTransformation, ema: bool, frozen: Frozen) -> Self:
        """Returns the state before the first step."""
        average = jax.tree.map(lambda p: p.astype(jnp.float32), params) if ema else None
        return cls(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), ema=average, frozen=frozen)

    @property
    def inference_params(self) -> nnx.State:
        """All parameters, as they are validated and exported: of the trained ones the average, if there is one."""
        return nnx.merge_state(self.params if self.ema is None else self.ema, self.frozen.base)


def state_layout(params: nnx.State, optimizer: optax.GradientTransformation, ema: bool, mesh: Mesh,
                 offload: bool = False, frozen: Frozen = Frozen()) -> TrainState:
    """Returns the state as shapes with shardings, for compiling, creating and restoring it.

    Args:
      offload: the optimizer state is in host memory.
    """
    shapes = jax.eval_shape(lambda p, f: TrainState.create(p, optimizer, ema, f), params, frozen)
    trained = param_shardings(params, mesh)
    shardings = dataclasses.replace(state_shardings(shapes, mesh), params=trained, ema=trained if ema else None,
                                    frozen=param_shardings(frozen, mesh))
    if offload:
        shardings = dataclasses.replace(shardings, opt_state=in_memory(shardings.opt_state, HOST))
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
                        shapes, shardings)


def create_state(params: nnx.State, optimizer: optax.GradientTransformation, ema: bool, mesh: Mesh,
                 offload: bool = False, frozen: Frozen = Frozen()) -> TrainState:
    """Creates the first state in its shardings. Donates `params` and `frozen`: do not use them afterwards."""
    layout = state_layout(params, optimizer, ema, mesh, offload, frozen)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    create = jax.jit(lambda p, f: TrainState.create(p, optimizer, ema, f), out_shardings=shardings,
                     donate_argnums=(0, 1))
    return create(*jax.device_put((params, frozen), (shardings.params, shardings.frozen)))


def in_memory(shardings: object, kind: str) -> object:
    """Returns the same shardings in another kind of memory."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(kind), shardings)


def parent_params(objective: ObjectiveConfig, params: nnx.State, dtype: str) -> nnx.State:
    """Returns the copy of trained parameters that a run keeps of the parent, none where no term needs it.

    LoRA's factors are not in it, as the parent does without them. Matrices have `dtype`, in which they are used.
    """
    if not objective.teacher.is_needed:
        return nnx.State({})

    def copy(path: tuple, param: nnx.Param) -> nnx.Param:
        is_matrix = path[-1] in ("kernel", "embedding")
        return param.replace(jnp.array(param[...], jnp.dtype(dtype) if is_matrix else param.dtype, copy=True))

    flat = [(path, copy(path, param)) for path, param in nnx.to_flat_state(params)
            if not isinstance(param, LoRAFactor)]
    return nnx.from_flat_state(flat)
