"""The training step of a recipe, traced from shapes alone and compiled for devices that are not attached."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from dlm_jax.checkpoints import config_from_hf, load_pretrained, resolve_lora
from dlm_jax.checkpoints.drafter import resolve_drafter
from dlm_jax.checkpoints.tokenizer import choose_mask_token
from dlm_jax.diffusion import Batch
from dlm_jax.errors import ConfigError, DLMError
from dlm_jax.models import (
    Compute,
    DraftedModel,
    ModelConfig,
    Transformer,
    abstract_drafter,
    abstract_model,
    split_trainable,
)
from dlm_jax.parallel import ATTENTION_PARTITION, array_sharding
from dlm_jax.parallel.chips import GIB
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.optimizer import make_optimizer
from dlm_jax.training.recorded import default_mask_token, settle_resumed, settle_run
from dlm_jax.training.setup import check_fit, with_dropout
from dlm_jax.training.state import HOST, Frozen, TrainState, parent_params, state_layout
from dlm_jax.training.step import make_train_step

# The architecture in config.json of models on the hub, to plan without a network and before accepting their terms.
KNOWN = json.loads(Path(__file__).with_name("known_models.json").read_text())

# The two ways in which libtpu reports an exhausted HBM, and its size.
_EXHAUSTED = re.compile(r"(?:Used |\()([\d.]+)([KMGT]?)(?: of |\) exceeds available HBM \()([\d.]+)([KMGT]?)"
                        r"(?: hbm|\))")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class CompileError(DLMError):
    """A program cannot be compiled, for another reason than its memory."""


@dataclasses.dataclass(frozen=True)
class Base:
    """The model to start from, without weights; `new_mask_token` says whether the mask token adds a vocabulary row."""

    config: ModelConfig
    mask_token_id: int | None
    new_mask_token: bool = False


@dataclasses.dataclass(frozen=True)
class Memory:
    """GiB of a device.

    Attributes:
      needed: the peak, arguments included; for a program that the compiler refuses, its own figure.
      limit: what a program may use.
      fits: whether the compiler accepts the program; for GPUs, whether the estimate is below the limit.
      breakdown: compiled: "arguments", "temporary" (the sum of what exists during a step, which exceeds its peak) and
        "host", in the memory of the device's host; estimated: see `estimate_memory`. Empty for a refused program.
    """

    needed: float
    limit: float
    fits: bool
    breakdown: dict[str, float] = dataclasses.field(default_factory=dict)


def describe_base(config: TrainConfig) -> tuple[Base, TrainConfig]:
    """Reads what `model.source` is: a known id by the table, everything else by its config.json.

    A mask token given as text is new if there is no tokenizer to look it up. Also returns the config with what the
    source records of how it was trained in place of what is open.

    Raises:
      ConfigError: no source is given, or the config says otherwise than the source records.
      CheckpointError: it cannot be found or read, or the mask token is outside its vocabulary.
    """
    model, default = config.model, default_mask_token(config)
    if not model.source:
        raise ConfigError("model.source names no base model; give a directory, a GGUF file, a hub id, or a "
                          "workdir[@step]")
    if model.source in KNOWN and not Path(model.source).is_dir():
        architecture = config_from_hf(KNOWN[model.source])
        mask_token = default if model.mask_token is None else model.mask_token
        mask_token_id, is_new = architecture.vocab_size, isinstance(mask_token, str)
        if not is_new:
            mask_token_id, _ = choose_mask_token(mask_token, None, architecture.vocab_size, None)
        architecture = dataclasses.replace(architecture, vocab_size=architecture.vocab_size + is_new)
        config = settle_resumed(config, {})
    else:
        base = load_pretrained(model.source, init="abstract", mask_token=model.mask_token, default_mask_token=default)
        architecture, mask_token_id, is_new = base.model.config, base.diffusion.mask_token_id, base.new_mask_token
        config = settle_run(config, base)
    return Base(with_dropout(architecture, model.dropout), mask_token_id, is_new), config


def check_plan(config: TrainConfig, base: Base, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError where config, base model and mesh contradict each other, as training would."""
    check_fit(config, base.config, base.mask_token_id, mesh)
    abstract_state(config, base, mesh)


def trace_step(config: TrainConfig, base: Base, mesh: Mesh, attention: str) -> list[jax.stages.Traced]:
    """Traces the step that `dlm train` runs for the devices of `mesh`: one program, or two if the optimizer's state is
    offloaded."""
    step = make_train_step(nnx.graphdef(_model(config, base, attention)),
                           make_optimizer(config.optimizer, config.num_steps), mesh, objective=config.objective,
                           config=config.optimizer, num_steps=config.num_steps, seed=config.seed,
                           mask_token_id=base.mask_token_id)
    state, batch = abstract_state(config, base, mesh), _abstract_batch(config, mesh)
    with jax.set_mesh(mesh):
        if not config.optimizer.offload:
            return [step.trace(state, batch)]
        compute_gradients, apply_gradients = step.programs
        gradient = compute_gradients.trace(state.params, state.frozen, batch, state.step)
        grads = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), state.params)
        return [gradient, apply_gradients.trace(state, grads, gradient.out_info[1])]


def compile_step(programs: list[jax.stages.Traced], limit: float, extra: float = 0.0) -> tuple[Memory, list[str]]:
    """Compiles the programs of a step, which run one after another: the step fits if each of them does.

    Args:
      limit: GiB of the device.
      extra: GiB of the device that are occupied while the first program runs, besides its arguments.

    Returns:
      (the memory needed, the optimized HLO text of each program), without texts if one of them does not fit.

    Raises:
      CompileError: the compiler fails, for another reason than memory.
    """
    needed, breakdown, texts = 0.0, {"arguments": 0.0, "temporary": 0.0, "host": 0.0}, []
    for program in programs:
        try:
            compiled = program.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if memory := exhausted(str(error)):
                return dataclasses.replace(memory, needed=memory.needed + extra * (not texts)), []
            raise CompileError(f"the step cannot be compiled: {' '.join(str(error).split())[:600]}") from error
        analysis = compiled.memory_analysis()
        host = analysis.host_argument_size_in_bytes + analysis.host_temp_size_in_bytes  # the peak includes it
        peak = (analysis.peak_memory_in_bytes - host) / GIB + extra * (not texts)
        if not texts and extra and peak > limit:  # the compiler does not know of `extra`
            return Memory(peak, limit, False), []
        sizes = (analysis.argument_size_in_bytes, analysis.temp_size_in_bytes, host)
        needed = max(needed, peak)
        breakdown = {name: max(breakdown[name], size / GIB) for name, size in zip(breakdown, sizes, strict=True)}
        texts.append(compiled.as_text())
    return Memory(needed, limit, True, breakdown), texts


def exhausted(message: str) -> Memory | None:
    """Returns the memory that a compiler's error reports as exceeded; None for any other error."""
    match = _EXHAUSTED.search(message)
    if "RESOURCE_EXHAUSTED" not in message or not match:
        return None
    used, used_unit, limit, limit_unit = match.groups()
    return Memory(float(used) * _UNITS[used_unit] / GIB, float(limit) * _UNITS[limit_unit] / GIB, False)


@functools.cache
def abstract_state(config: TrainConfig, base: Base, mesh: Mesh | AbstractMesh) -> TrainState:
    """Returns the training state as shapes with shardings.

    Raises:
      ConfigError: the mesh does not divide a parameter.
    """
    _, params, frozen = split_trainable(_model(config, base, "xla"))
    frozen = Frozen(frozen, jax.eval_shape(lambda p: parent_params(config.objective, p, config.model.dtype), params))
    optimizer = config.optimizer
    return state_layout(params, make_optimizer(optimizer, config.num_steps), optimizer.ema_decay > 0, mesh,
                        optimizer.offload, frozen)


def device_bytes(tree: object) -> int:
    """Returns the bytes per device of a tree of shapes with shardings; arrays in host memory count as none."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * jax.dtypes.itemsize_bits(leaf.dtype) // 8
               for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != HOST)


def _abstract_batch(config: TrainConfig, mesh: Mesh) -> Batch:
    """Returns what the loader gives a step, as shapes with shardings."""
    data = config.data

    def array(dtype: jnp.dtype, *axes: str) -> jax.ShapeDtypeStruct:
        shape = (data.batch_size, data.length)[:len(axes)]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=array_sharding(mesh, *axes))

    # Rows with several documents, or with padding that is not trained on, have document ids.
    padded = data.examples.format != "none" and not data.examples.train_on_padding
    has_documents = data.packing == "document_mask" or data.random_length > 0 or padded
    ids = array(jnp.int32, "batch", "length") if has_documents else None
    return Batch(array(jnp.int32, "batch", "length"), array(jnp.bool_, "batch", "length"), array(jnp.uint32, "batch"),
                 ids, ids)


def _model(config: TrainConfig, base: Base, attention: str) -> Transformer | DraftedModel:
    compute = Compute(config.model.dtype, config.model.remat, attention, ATTENTION_PARTITION)
    if config.objective.name == "drafter":
        drafter = resolve_drafter(config.drafter, base.config, base.mask_token_id)
        return DraftedModel(abstract_model(base.config, compute, config.drafter.target_dtype),
                            abstract_drafter(drafter, compute, config.model.param_dtype))
    return abstract_model(base.config, compute, config.model.param_dtype,
                          resolve_lora(config.lora, base.config, base.new_mask_token))
