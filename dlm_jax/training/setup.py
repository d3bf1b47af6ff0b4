"""Sets a run up: the base model on its mesh, the data, the state, and checks of how they fit together."""

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from dlm_jax.attention import AttentionSpec, BackendChoice, choose_backend
from dlm_jax.checkpoints import Pretrained, load_pretrained
from dlm_jax.checkpoints.orbax import restore_latest, restore_state
from dlm_jax.checkpoints.pretrained import load_recorded, weights_fingerprint
from dlm_jax.checkpoints.source import absolute_source
from dlm_jax.checkpoints.workdir import (
    DrafterRecord,
    LoRABase,
    ModelRecord,
    ParentRecord,
    hold_workdir,
    read_run_config,
    write_run_metadata,
)
from dlm_jax.data.chat_template import ChatTemplate
from dlm_jax.data.corpus import load_rows
from dlm_jax.data.loader import Loader
from dlm_jax.data.rows import RowSource
from dlm_jax.diffusion import Batch, block_spec, check_mask_token
from dlm_jax.errors import CheckpointError, ConfigError, DataError
from dlm_jax.matmul import choose_matmul, resolve_dtype
from dlm_jax.models import Compute, ModelConfig, abstract_model, split_trainable
from dlm_jax.parallel import (
    ATTENTION_PARTITION,
    make_global_batch,
    make_mesh,
    num_batch_shards,
    param_shardings,
)
from dlm_jax.storage import cache_folder, is_remote
from dlm_jax.training.config import TrainConfig, config_changes, flat_dict
from dlm_jax.training.drafter_setup import add_drafter
from dlm_jax.training.metrics import Console, GoodputClock, MetricAccumulator, MetricsLog, read_records
from dlm_jax.training.optimizer import make_optimizer
from dlm_jax.training.recorded import default_mask_token, settle_resumed, settle_run
from dlm_jax.training.state import HOST, Frozen, TrainState, create_state, parent_params, state_layout
from dlm_jax.training.step import make_train_step
from dlm_jax.training.summary import summary_lines, token_lines


@dataclasses.dataclass
class Run:
    """One start of a run: what stays the same, and how far it has come.

    Attributes:
      base: the model with shapes in place of arrays; the parameters are in `state`.
      held_out: the validation rows; None if nothing is held out.
      batches: the batches from `first_step` on, as global arrays.
      make_step: from an objective to its compiled step; it remembers the steps it has made.
      first_step: the step of the checkpoint that this start resumed from; 0 for a new run.
      data_fingerprint: of the training rows, see `dataset_fingerprint`.
      summary_lines: what the run is, for people.
      changes: of settings, against the run that was resumed.
      accumulator: the metrics of the steps since the last record.
      latest: the latest record of each kind.
      exit_stack: closes what the run has opened.
      stop_signal: the name of the signal that stops the run after the present step.
    """

    config: TrainConfig
    workdir: epath.Path
    mesh: Mesh
    base: Pretrained
    held_out: RowSource | None
    batches: Iterator[Batch]
    make_step: Callable[..., Callable]
    state: TrainState
    first_step: int
    data_fingerprint: list[int]
    summary_lines: list[str]
    changes: list[str]
    clock: GoodputClock
    accumulator: MetricAccumulator
    log: MetricsLog
    console: Console
    latest: dict[str, dict]
    exit_stack: contextlib.ExitStack
    stop_signal: str | None = None

    def record(self, step: int, kind: str, values: Mapping[str, float | str], line: str) -> None:
        """Writes a record to the log, and a line to the console."""
        self.latest[kind] = {"step": step, **values}
        self.log.write(step, kind, values)
        self.console.line(f"step {step:>7}  {line}")


def open_run(config: TrainConfig, workdir: epath.Path, stack: contextlib.ExitStack) -> Run:
    """Sets up a run, from the latest valid checkpoint in `workdir` if there is one.

    Raises:
      ConfigError, CheckpointError, DataError: the run cannot be set up.
    """
    clock = GoodputClock()
    workdir.mkdir(parents=True, exist_ok=True)
    stack.enter_context(hold_workdir(workdir))
    mesh = make_mesh(config.mesh)
    dtype = resolve_dtype(config.model.dtype, mesh.devices.flat[0].platform, mesh.size)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    stack.enter_context(jax.set_mesh(mesh))  # for `shard_map` inside the model
    first_step, damaged = restore_latest(workdir)
    changes = []
    if first_step:
        config = settle_resumed(config, saved := read_run_config(workdir))
        changes = config_changes(saved, config)
    base, config = load_base(config, workdir, mesh, resumed=bool(first_step))
    record = read_record(config, workdir) if first_step else new_record(config, base)
    graphdef, params, frozen = split_trainable(base.model)
    frozen = Frozen(frozen, parent_params(config.objective, params, config.model.dtype))
    # From here on the parameters are in the state; of the model only the shapes are kept.
    base = dataclasses.replace(base, model=nnx.eval_shape(lambda: base.model))

    data = config.data
    sources, held_out = load_rows(data, base.tokenizer, vocab_size=base.model.config.vocab_size,
                                  cache_dir=rows_folder(workdir))
    loader = Loader(sources, data.batch_size, weights=data.weights, seed=config.seed, random_length=data.random_length)
    batches = loader.batches(first_step, lambda read: make_global_batch(read, data.batch_size, mesh))
    stack.callback(batches.close)

    optimizer, ema = make_optimizer(config.optimizer, config.num_steps), config.optimizer.ema_decay > 0
    make_step = functools.cache(functools.partial(
        make_train_step, graphdef, optimizer, mesh, config=config.optimizer, num_steps=config.num_steps,
        seed=config.seed, mask_token_id=base.diffusion.mask_token_id, matmul=base.model.compute.matmul))
    fingerprint, progress = dataset_fingerprint(sources), {}
    if first_step:
        layout = state_layout(params, optimizer, ema, mesh, config.optimizer.offload, frozen)
        state, progress = restore_state(workdir, first_step, layout, frozen)
        check_data(workdir, progress["data"], fingerprint)
    else:
        state = create_state(params, optimizer, ema, mesh, config.optimizer.offload, frozen)
    write_run_metadata(workdir, flat_dict(config), base, record)

    clock.add(progress.get("seconds", {}))
    clock.add({"lost_steps": lost_seconds(workdir, first_step)})
    log = MetricsLog(workdir, config.log, flat_dict(config), first_step)
    stack.callback(log.close)
    console = Console(config.num_steps, first_step)
    stack.callback(console.close)
    return Run(config=config, workdir=workdir, mesh=mesh, base=base, held_out=held_out, batches=batches,
               make_step=make_step, state=state, first_step=first_step, data_fingerprint=fingerprint,
               summary_lines=[*summary_lines(config, base, mesh, choose_attention(config, base.model.config, mesh),
                                             first_step, changes, damaged), *token_lines(data, base, sources[0])],
               changes=changes, clock=clock, log=log, console=console, latest=latest_records(workdir), exit_stack=stack,
               accumulator=MetricAccumulator(config.optimizer.on_nonfinite == "skip", **progress.get("metrics", {})))


def load_base(config: TrainConfig, workdir: epath.Path, mesh: Mesh, *, resumed: bool) -> tuple[Pretrained, TrainConfig]:
    """Returns the model that training starts from, its parameters on the mesh, and the config with nothing left open.

    For a resumed run only shapes, as its checkpoint has the parameters; with LoRA the base, which it does not have, and
    with a teacher the parent.

    Raises:
      ConfigError: the objective, the data or the mesh do not fit the model, or what it records.
      CheckpointError: the source cannot be read.
    """
    model, drafts = config.model, config.objective.name == "drafter"
    record = read_record(config, workdir) if resumed else None
    param_dtype = config.drafter.target_dtype if drafts else model.param_dtype
    compute = Compute(model.dtype, model.remat, model.attention, ATTENTION_PARTITION)

    def shardings(model_config: ModelConfig) -> object:
        # An attention backend that cannot run is refused before any weights are read.
        choose_attention(config, with_dropout(model_config, model.dropout), mesh)
        return param_shardings(abstract_model(model_config, compute, param_dtype), mesh)

    if resumed:
        base = load_pretrained(workdir, init="abstract", compute=compute)
        if record is not None:
            loaded = load_recorded(record, workdir, compute, param_dtype, shardings)
            base = dataclasses.replace(base, model=loaded.model, provenance=loaded.provenance)
    elif not model.source:
        raise ConfigError("model.source names no base model; give a directory, a GGUF file, a hub id, or a "
                          "workdir[@step]")
    else:
        base = load_pretrained(model.source, mask_token=model.mask_token, init=model.init, lora=config.lora,
                               seed=config.seed, compute=compute, param_dtype=param_dtype, shardings=shardings,
                               default_mask_token=default_mask_token(config))
        config = settle_run(config, base)
    if base.tokenizer is None:
        raise ConfigError(f"the model {base.source} has no tokenizer; put its tokenizer files next to its config.json")
    examples = config.data.examples
    if not resumed and examples.format == "messages" and examples.chat_template is not None:
        # The template is saved with the tokenizer, as the file may be gone when the model is used.
        base.tokenizer.chat_template = ChatTemplate(base.tokenizer, examples.chat_template).template
    architecture = with_dropout(base.model.config, model.dropout)
    check_fit(config, architecture, base.diffusion.mask_token_id, mesh)
    compute = dataclasses.replace(compute, attention=choose_attention(config, architecture, mesh).backend,
                                  matmul=choose_matmul(model.dtype, mesh.devices.flat[0].platform, mesh.size))
    graphdef = nnx.graphdef(abstract_model(architecture, compute, param_dtype, base.model.lora))
    base = dataclasses.replace(base, model=nnx.merge(graphdef, nnx.state(base.model)), diffusion=dataclasses.replace(
        base.diffusion, shift=config.objective.shift, blocks=block_spec(config.objective)))
    return (add_drafter(base, config, mesh, record) if drafts else base), config


def with_dropout(architecture: ModelConfig, rate: float | None) -> ModelConfig:
    """Returns the architecture with one dropout rate everywhere; None keeps its own."""
    if rate is None:
        return architecture
    return dataclasses.replace(architecture, embed_dropout=rate, attention_dropout=rate, residual_dropout=rate)


def choose_attention(config: TrainConfig, architecture: ModelConfig, mesh: Mesh) -> BackendChoice:
    """Returns the attention backend of the run, for training and validation alike."""
    return choose_backend(config.model.attention, attention_spec(config, architecture), mesh.devices.flat[0].platform)


def attention_spec(config: TrainConfig, architecture: ModelConfig) -> AttentionSpec:
    """Returns what the run needs of attention."""
    return AttentionSpec(config.model.dtype, architecture.head_dim, dropout=architecture.attention_dropout > 0,
                         softcap=architecture.attention_softcap is not None)


def check_fit(config: TrainConfig, architecture: ModelConfig, mask_token_id: int | None,
              mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError where config, base model and mesh contradict each other."""
    data = config.data
    check_mask_token(config.objective, mask_token_id, architecture.vocab_size)
    shards, micro_batches = num_batch_shards(mesh), config.optimizer.accumulate_steps
    if data.batch_size % (shards * micro_batches):
        raise ConfigError(f"data.batch_size {data.batch_size} is not divisible by {micro_batches} micro-batches x "
                          f"{shards} shards of the mesh axes dcn_data, data, fsdp and expert")
    if data.length % mesh.shape["context"]:
        raise ConfigError(f"data.length {data.length} is not divisible by mesh.context {mesh.shape['context']}")
    if data.length > architecture.max_length:
        raise ConfigError(f"data.length {data.length} is longer than the {architecture.max_length} positions of "
                          f"the model {config.model.source}")
    check_noised_lora(config)
    if (last := max(config.objective.teacher.hidden_layers, default=0)) >= architecture.num_layers:
        raise ConfigError(f"objective.teacher.hidden_layers has layer {last}, and the {architecture.num_layers} layers "
                          "of the model are counted from 0")
    offloads = config.optimizer.offload or config.model.remat == "offload"
    if offloads and not has_host_memory(device := mesh.devices.flat[0]):
        raise ConfigError(f"{device.device_kind} cannot use {HOST} memory; set optimizer.offload to false and "
                          "model.remat to full")


def check_noised_lora(config: TrainConfig) -> None:
    """Raises ConfigError where LoRA at noised positions has no noised copy beside the base's own text."""
    lora, objective, length = config.lora, config.objective, config.data.length
    gated, drafts = lora.rank > 0 and lora.where == "noised", objective.name == "self_drafting"
    if drafts and not gated:
        raise ConfigError("objective.name self_drafting needs a base that stays as it is, with LoRA at masks alone; "
                          "set lora.rank, and lora.where to noised")
    if gated and not drafts and (objective.name != "block_diffusion" or objective.clean_attention != "causal"):
        raise ConfigError("lora.where=noised keeps the base's own text beside noised blocks; set objective.name to "
                          "self_drafting, or to block_diffusion with objective.clean_attention causal")
    starts = (0, *(start for start, _ in objective.block_size_schedule))
    if gated and any(objective.at_step(start).canonicalize(length).name != objective.name for start in starts):
        raise ConfigError("lora.where=noised learns nothing from blocks of one token under objective.shift, or from "
                          f"one block of data.length {length}, which have no clean copy beside the noised one; set "
                          "objective.block_size and objective.block_size_schedule to sizes between these")
    if drafts and objective.block_size > length:
        raise ConfigError(f"objective.block_size {objective.block_size} is more than data.length {length}, so that no "
                          "row has a full block to draft; set it to at most that")
    if lora.rank and lora.draft_head and not drafts:
        raise ConfigError("lora.draft_head is trained by the objective self_drafting alone; set objective.name to it, "
                          "or lora.draft_head to false")


def has_host_memory(device: jax.Device) -> bool:
    """Returns whether programs for the device can keep arrays in the memory of its host."""
    return any(memory.kind == HOST for memory in device.addressable_memories())


def new_record(config: TrainConfig, base: Pretrained) -> ModelRecord | None:
    """Returns what a new run records of weights that its checkpoints will not hold; None if they hold all."""
    def source_of(loaded: Pretrained) -> tuple[str, int | str | None, str]:
        return absolute_source(base.source), config.model.mask_token, weights_fingerprint(loaded)

    if config.objective.name == "drafter":
        target, drafter = base.model.target, base.model.drafter
        return DrafterRecord(*source_of(dataclasses.replace(base, model=target)), drafter.config)
    if base.model.lora is not None:
        return LoRABase(*source_of(base), base.model.lora)
    return ParentRecord(*source_of(base)) if config.objective.teacher.is_needed else None


def read_record(config: TrainConfig, workdir: epath.Path) -> ModelRecord | None:
    """Returns what a run has recorded of weights that its checkpoints do not hold; None if they hold all.

    Raises:
      CheckpointError: the record is damaged, or there is none of the parent.
    """
    record = LoRABase.read(workdir) or DrafterRecord.read(workdir)
    if record is None and config.objective.teacher.is_needed and (record := ParentRecord.read(workdir)) is None:
        raise CheckpointError(f"{workdir} does not record its parent, which objective.teacher needs; set the weights "
                              "of objective.teacher to 0, or start in a new workdir")
    return record


def rows_folder(workdir: epath.Path) -> epath.Path:
    """Returns where raw text becomes rows by default: in the workdir, or if that is remote, on this machine."""
    return cache_folder() / "rows" if is_remote(workdir) else workdir / "data"


def dataset_fingerprint(sources: Sequence[RowSource]) -> list[int]:
    """Returns for each source its number of rows, and a checksum of up to 64 of them."""
    fingerprint = []
    for rows in sources:
        some = rows[np.linspace(0, len(rows) - 1, min(len(rows), 64)).astype(int)]
        fingerprint += [len(rows), zlib.crc32(np.ascontiguousarray(some.tokens, np.int32))]
    return fingerprint


def check_data(workdir: epath.Path, saved: list[int], found: list[int]) -> None:
    """Raises DataError if the rows of a resumed run are not those it was started with."""
    if saved != found:
        raise DataError(f"the training text is not the one that the run in {workdir} was started with "
                        f"({sum(saved[::2])} rows then, {sum(found[::2])} rows now); restore the files, or choose a "
                        "new workdir")


def lost_seconds(workdir: epath.Path, first_step: int) -> float:
    """Returns the seconds of the steps recorded after the checkpoint that a run resumes from."""
    lost = [record for record in read_records(workdir, "train") if record["step"] > first_step]
    return (lost[-1]["step"] - first_step) * lost[-1].get("seconds_per_step", 0.0) if lost else 0.0


def latest_records(workdir: epath.Path) -> dict[str, dict]:
    """Returns the latest record of each kind."""
    return {record.pop("kind"): record for record in read_records(workdir)}
