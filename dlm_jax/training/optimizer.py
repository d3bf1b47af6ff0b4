"""Optimizers from optax by name, with the decisions that depend on the parameter.

Those follow from a parameter's logical axes, never from its rank: layers are stacked, so that a bias of a block has two
dimensions and a matrix three or four. Every rule here treats a stack as its layers one by one.
"""

import math
from collections.abc import Callable

import jax
import optax
from flax import nnx

from dlm_jax.errors import ConfigError
from dlm_jax.parallel import is_param
from dlm_jax.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of steps taken.

    Raises:
      ConfigError: the schedule does not fit into `num_steps`.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "wsd" and warmup + config.decay_steps > num_steps:
        raise ConfigError(f"optimizer.warmup_steps {warmup} and decay_steps {config.decay_steps} do not fit into "
                          f"num_steps {num_steps}")
    if config.schedule != "constant" and warmup >= num_steps:
        raise ConfigError(f"optimizer.warmup_steps {warmup} must be less than num_steps {num_steps}")
    match config.schedule:
        case "constant":
            phases, boundaries = [optax.constant_schedule(peak)], []
        case "cosine":
            phases, boundaries = [optax.cosine_decay_schedule(peak, num_steps - warmup, config.final_fraction)], []
        case "wsd":
            decay = optax.linear_schedule(peak, peak * config.final_fraction, config.decay_steps)
            phases, boundaries = [optax.constant_schedule(peak), decay], [num_steps - config.decay_steps]
    if warmup:
        # The first step already moves: step s of the warm-up takes (s + 1) / warmup of the peak.
        rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
        phases, boundaries = [rise, *phases], [warmup, *boundaries]
    return optax.join_schedules(phases, boundaries)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns the chain of clipping, the optimizer's own rule, weight decay of the matrices, and the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _base_transform(config),
        optax.add_decayed_weights(config.weight_decay, mask=decays) if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate(config, num_steps)),
    )


def _base_transform(config: OptimizerConfig) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    match config.name:
        case "adamw":
            return adam
        case "lion":
            return optax.scale_by_lion(config.b1, config.b2)
        case "adafactor":  # without momentum and with an absolute learning rate: a lean AdamW
            return per_layer(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)))
        case "muon":
            # Learning rate -1 gives the direction; the learning rate comes later. `consistent_rms` scales orthogonal
            # updates to AdamW's usual size, so that one learning rate serves both (arXiv 2502.16982).
            muon = optax.contrib.muon(-1.0, beta=config.b1, muon_weight_dimension_numbers=muon_dimensions,
                                      consistent_rms=0.2)
            labels = lambda params: map_params(lambda p: "muon" if takes_muon(p.axes) else "adam", params)  # noqa: E731
            return optax.partition({"muon": muon, "adam": adam}, labels)


def map_params(function: Callable, params: object) -> object:
    """Returns the tree with `function(param)` in place of each parameter."""
    return jax.tree.map(function, params, is_leaf=is_param)


def decays(params: object) -> object:
    """Returns True for matrices: parameters with the `embed` axis and another named axis, and the factors of LoRA."""
    return map_params(lambda p: _is_matrix(p.axes), params)


def _is_matrix(axes: tuple[str | None, ...]) -> bool:
    return "rank" in axes or ("embed" in axes and any(axis not in ("embed", "layers", None) for axis in axes))


def takes_muon(axes: tuple[str | None, ...]) -> bool:
    """Returns True for matrices inside blocks; embeddings, head, norms and biases take Adam (Jordan et al., 2024)."""
    return _is_matrix(axes) and "layers" in axes


def matrix_dimensions(axes: tuple[str | None, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the input and output dimensions of a matrix.

    `embed`, or `rank` of a factor of LoRA, is one side; the other named axes are the other.
    """
    narrow = "rank" if "rank" in axes else "embed"
    side = (axes.index(narrow),)
    other = tuple(i for i, axis in enumerate(axes) if axis not in (narrow, "layers"))
    return (side, other) if side < other else (other, side)


def muon_dimensions(params: object) -> object:
    """Returns optax's description of each Muon parameter as a stack of matrices."""
    return map_params(lambda p: p.replace(optax.contrib.MuonDimensionNumbers(*matrix_dimensions(p.axes))), params)


def per_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `transform` to each layer of stacked parameters, and to their matrices as [in, out].

    For rules with statistics of an array, such as Adafactor's rows and columns.
    """

    def as_matrix(p: nnx.Variable) -> jax.Array:
        value = p.get_value()
        if not _is_matrix(p.axes):
            return value
        stack = value.shape[: p.axes.count("layers")]
        inputs, _ = matrix_dimensions(p.axes)
        return value.reshape(*stack, math.prod(value.shape[i] for i in inputs), -1)

    def split(params: object) -> tuple[list, list]:
        boxes = jax.tree.leaves(params, is_leaf=is_param)
        stacked = [as_matrix(p) for p in boxes if "layers" in p.axes]
        return stacked, [as_matrix(p) for p in boxes if "layers" not in p.axes]

    def init(params: object) -> tuple:
        stacked, single = split(params)
        return jax.vmap(transform.init)(stacked), transform.init(single)

    def update(updates: object, state: tuple, params: object) -> tuple:
        stacked, single = split(updates)
        stacked_params, single_params = split(params)
        stacked, stacked_state = jax.vmap(transform.update)(stacked, state[0], stacked_params)
        single, single_state = transform.update(single, state[1], single_params)
        stacked, single = iter(stacked), iter(single)
        restore = lambda p: p.replace(  # noqa: E731
            next(stacked if "layers" in p.axes else single).reshape(p.get_value().shape))
        return map_params(restore, updates), (stacked_state, single_state)

    return optax.GradientTransformation(init, update)
