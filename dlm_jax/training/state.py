"""Everything that changes from step to step."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.parallel import param_shardings, state_shardings

DEVICE, HOST = "device", "pinned_host"  # JAX's names for kinds of memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a step takes and gives back.

    Attributes:
      step: int32 scalar, steps taken.
      params: the model's parameters that are trained, as `split_trained` gives them.
      opt_state: optax's state; its moments carry the logical axes of their parameters.
      ema: moving average of `params` in float32, or None.
      frozen: parameters that no step changes and no checkpoint holds: with LoRA those of the base, else none.
    """

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState
    ema: nnx.State | None
    frozen: nnx.State = dataclasses.field(default_factory=lambda: nnx.State({}))

    @classmethod
    def create(cls, params: nnx.State, optimizer: optax.GradientTransformation, ema: bool,
               frozen: nnx.State) -> Self:
        """The state before the first step."""
        average = jax.tree.map(lambda p: p.astype(jnp.float32), params) if ema else None
        return cls(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), ema=average, frozen=frozen)

    @property
    def inference_params(self) -> nnx.State:
        """All parameters, as they are validated and exported: of what is trained the average, where there is one."""
        return nnx.merge_state(self.params if self.ema is None else self.ema, self.frozen)


def state_layout(params: nnx.State, optimizer: optax.GradientTransformation, ema: bool, mesh: Mesh,
                 offload: bool = False, frozen: nnx.State | None = None) -> TrainState:
    """The state as shapes with shardings, for compiling, for creating it in place and for restoring it.

    Args:
      offload: the optimizer's state lies in the host's memory.
      frozen: parameters that are not trained; None: there are none.
    """
    frozen = nnx.State({}) if frozen is None else frozen
    shapes = jax.eval_shape(lambda p, f: TrainState.create(p, optimizer, ema, f), params, frozen)
    placed = param_shardings(params, mesh)
    shardings = dataclasses.replace(state_shardings(shapes, mesh), params=placed, ema=placed if ema else None,
                                    frozen=param_shardings(frozen, mesh))
    if offload:
        shardings = dataclasses.replace(shardings, opt_state=in_memory(shardings.opt_state, HOST))
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
                        shapes, shardings)


def in_memory(shardings: object, kind: str) -> object:
    """The same shardings, in memory of another kind."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(kind), shardings)


def shardings_of(layout: object) -> object:
    """The shardings of a tree of shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, layout)


def create_state(params: nnx.State, optimizer: optax.GradientTransformation, ema: bool, mesh: Mesh,
                 offload: bool = False, frozen: nnx.State | None = None) -> TrainState:
    """The first state, made where it will live. Takes over `params` and `frozen`, not to be used afterwards."""
    layout = state_layout(params, optimizer, ema, mesh, offload, frozen)
    frozen = jax.device_put(nnx.State({}) if frozen is None else frozen, shardings_of(layout.frozen))
    params = jax.device_put(params, shardings_of(layout.params))
    create = jax.jit(lambda p, f: TrainState.create(p, optimizer, ema, f), out_shardings=shardings_of(layout),
                     donate_argnums=(0, 1))
    return create(params, frozen)
