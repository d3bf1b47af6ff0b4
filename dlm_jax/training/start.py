"""How a run begins: the base model on its mesh, checks of what only base and config together can show, a summary."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from dlm_jax.attention import AttentionSpec, Choice, choose_backend
from dlm_jax.checkpoints import Pretrained
from dlm_jax.checkpoints.workdir import (
    Adapter,
    absolute_source,
    abstract_pretrained,
    base_fingerprint,
    load_adapted,
    load_source,
    read_adapter,
)
from dlm_jax.data.prompts import ChatTemplate
from dlm_jax.data.rows import RowSource
from dlm_jax.diffusion.objective import check_mask_token
from dlm_jax.diffusion.spec import DiffusionSpec
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.models import Compute, ModelConfig, abstract_model, split_trainable
from dlm_jax.parallel import ATTENTION_PARTITION, num_batch_shards, describe_mesh, param_shardings
from dlm_jax.storage import cache_folder, is_remote
from dlm_jax.training.config import TrainConfig, lora_of
from dlm_jax.training.metrics import count_params
from dlm_jax.training.step import HOST


def load_base(config: TrainConfig, workdir: epath.Path, mesh: Mesh, *, resumed: bool) -> Pretrained:
    """The model that training starts from, its parameters on the mesh; where a run is resumed, only their shapes, or
    with LoRA the base, which its checkpoints do not hold.

    Raises:
      ConfigError: the objective, the data or the mesh do not fit the model.
      CheckpointError: the source cannot be read.
    """
    model = config.model
    compute = Compute(model.dtype, model.remat, model.attention, ATTENTION_PARTITION)

    def shardings(model_config: ModelConfig) -> object:
        # What it refuses, it refuses before any weights are read.
        choose_attention(config, with_dropout(model_config, model.dropout), mesh)
        return param_shardings(abstract_model(model_config, compute, model.param_dtype), mesh)

    if resumed:
        base = abstract_pretrained(workdir, compute)
        if adapter := read_adapter(workdir):
            adapted = load_adapted(workdir, adapter, compute, shardings)
            base = dataclasses.replace(base, model=adapted.model, merged_adapters=adapted.merged_adapters)
    elif not model.source:
        raise ConfigError("model.source names no base model; give a directory, a hub id, or a workdir[@step]")
    else:
        base = load_source(model.source, mask_token=model.mask_token, compute=compute, param_dtype=model.param_dtype,
                           shardings=shardings, init=model.init, seed=config.seed,
                           lora=functools.partial(lora_of, config.lora))
        if config.objective.shift and not base.shift and model.init == "pretrained":
            raise ConfigError(f"{base.source} has learnt to predict each token at its own position, and "
                              "objective.shift is true; set it to false to go on from what the model has learnt")
    if base.tokenizer is None:
        raise ConfigError(f"the model {base.source} has no tokenizer; put its tokenizer files beside its config.json")
    examples = config.data.examples
    if not resumed and examples.format == "messages" and examples.chat_template is not None:
        # The model is asked as it learnt, long after the file is gone: its tokenizer keeps what the file says.
        base.tokenizer.chat_template = ChatTemplate(base.tokenizer, examples.chat_template).template
    architecture = with_dropout(base.model.config, model.dropout)
    check_fit(config, architecture, base.mask_token_id, mesh)
    compute = dataclasses.replace(compute, attention=choose_attention(config, architecture, mesh).backend)
    graphdef = nnx.graphdef(abstract_model(architecture, compute, model.param_dtype, base.model.lora))
    return dataclasses.replace(base, model=nnx.merge(graphdef, nnx.state(base.model)), diffusion=DiffusionSpec(
        base.mask_token_id, config.objective.shift, config.objective.blocks))


def with_dropout(architecture: ModelConfig, rate: float | None) -> ModelConfig:
    """The architecture with one rate of dropout everywhere; None leaves its own."""
    if rate is None:
        return architecture
    return dataclasses.replace(architecture, embed_dropout=rate, attention_dropout=rate, residual_dropout=rate)


def resolve_adapter(config: TrainConfig, workdir: epath.Path, base: Pretrained, frozen: nnx.State,
                   resumed: bool) -> Adapter | None:
    """What the workdir of a run with LoRA keeps of its base; of a resumed one, what it has kept, if that still holds.

    Raises:
      CheckpointError: the base is not what it was.
    """
    if base.model.lora is None:
        return None
    if not resumed:
        return Adapter(base.model.lora, absolute_source(base.source), config.model.mask_token,
                       base_fingerprint(frozen, base.merged_adapters))
    adapter = read_adapter(workdir)
    adapter.check(frozen, base.merged_adapters, workdir)
    return adapter


def choose_attention(config: TrainConfig, architecture: ModelConfig, mesh: Mesh) -> Choice:
    """The attention backend of the whole run, of its training and its validations alike."""
    return choose_backend(config.model.attention, attention_spec(config, architecture), mesh.devices.flat[0].platform)


def attention_spec(config: TrainConfig, architecture: ModelConfig) -> AttentionSpec:
    """What the run asks of attention."""
    return AttentionSpec(config.model.dtype, architecture.head_dim, dropout=architecture.attention_dropout > 0)


def check_fit(config: TrainConfig, architecture: ModelConfig, mask_token_id: int | None,
              mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError where config, base model and mesh contradict each other."""
    data = config.data
    check_mask_token(config.objective, mask_token_id, architecture.vocab_size)
    parts, micro_batches = num_batch_shards(mesh), config.optimizer.accumulate_steps
    if data.batch_size % (parts * micro_batches):
        raise ConfigError(f"data.batch_size {data.batch_size} does not divide into {micro_batches} micro-batches over "
                          f"the {parts} parts of the mesh axes dcn_data, data and fsdp")
    if data.length % mesh.shape["context"]:
        raise ConfigError(f"data.length {data.length} does not divide over mesh.context {mesh.shape['context']}")
    if data.length > architecture.max_length:
        raise ConfigError(f"data.length {data.length} is longer than the {architecture.max_length} positions of "
                          f"the model {config.model.source}")
    offloads = config.optimizer.offload or config.model.remat == "offload"
    if offloads and not has_host_memory(device := mesh.devices.flat[0]):
        raise ConfigError(f"{device.device_kind} has no {HOST} memory beside its own to keep anything in; set "
                          "optimizer.offload to false and model.remat to full")


def has_host_memory(device: jax.Device) -> bool:
    """Whether programs for the device can keep arrays in the memory of its host."""
    return any(memory.kind == HOST for memory in device.addressable_memories())


def rows_folder(workdir: epath.Path) -> epath.Path:
    """Where raw text becomes rows by default: in the workdir, or where that is on an object store, on this machine."""
    return cache_folder() / "rows" if is_remote(workdir) else workdir / "data"


def dataset_fingerprint(sources: Sequence[RowSource]) -> list[int]:
    """Tells one set of rows from another: of each source their number, and a checksum of up to 64 of them."""
    marks = []
    for rows in sources:
        some = rows[np.linspace(0, len(rows) - 1, min(len(rows), 64)).astype(int)]
        marks += [len(rows), zlib.crc32(np.ascontiguousarray(some.tokens, np.int32))]
    return marks


def check_data(workdir: epath.Path, saved: list[int], found: list[int]) -> None:
    """Raises DataError where a resumed run would meet other rows than it began with."""
    if saved != found:
        raise DataError(f"the training text is not the one that the run in {workdir} began with "
                        f"({sum(saved[::2])} rows then, {sum(found[::2])} rows now); restore the files, or choose a "
                        "new workdir")


def summary_lines(config: TrainConfig, base: Pretrained, mesh: Mesh, first: int, changes: Sequence[str],
                  damaged: Sequence[str]) -> list[str]:
    """What the run is, for people; `damaged` says why it does not go on from a later checkpoint."""
    architecture, data = base.model.config, config.data
    per_step = data.batch_size * data.length
    objective, attention = config.objective.name, choose_attention(config, architecture, mesh)
    if objective == "diffusion":
        opening = f"annealed over {config.objective.anneal_steps} steps" if config.objective.anneal_steps else \
            "bidirectional from the start"
        objective += f", mask token {base.mask_token_id}, attention {opening}"
    elif objective == "block_diffusion":
        sizes = [size for _, size in config.objective.block_size_schedule] or [config.objective.block_size]
        objective += f", mask token {base.mask_token_id}, blocks of {' -> '.join(map(str, sizes))} tokens" \
                     + ", read whole when clean" * (config.objective.clean_attention == "block_bidirectional")
    lines = [
        f"model      {config.model.source} ({architecture.family}), {count_params(architecture) / 1e6:,.1f}M parameters"
        f", {config.model.init} weights",
        f"objective  {objective}",
        f"batch      {data.batch_size} x {data.length} = {per_step:,} tokens a step"
        + (f", in {config.optimizer.accumulate_steps} micro-batches" if config.optimizer.accumulate_steps > 1 else ""),
        f"run        {config.num_steps:,} steps, {config.num_steps * per_step:,} tokens",
        f"devices    {describe_mesh(mesh)}, {config.model.dtype}, "
        f"{attention.backend} attention" + (f" ({attention.reason})" if attention.reason else ""),
    ]
    if lora := base.model.lora:
        trained = sum(leaf.size for leaf in jax.tree.leaves(split_trainable(base.model)[1]))
        tables = "".join(f", the whole {name}" for name in ("embedding", "head") if getattr(lora, name))
        lines.insert(1, f"lora       rank {lora.rank} beside {', '.join(lora.targets)}{tables}: {trained / 1e6:,.2f}M "
                        f"parameters are trained, the other matrices stored in {lora.frozen_dtype}")
    lines += [f"damaged    {remark}, and has been moved to damaged/" for remark in damaged]
    if first:
        lines.append(f"resumed    from step {first:,}")
    return lines + [f"changed    {change}" for change in changes]
