"""`Pretrained`, a model with all that is needed to use and save it, and `load_pretrained`, which loads every kind."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding

from dlm_jax.checkpoints.hf_config import (
    blocks_from_record,
    config_from_hf,
    recorded_diffusion,
    recorded_sampling,
)
from dlm_jax.checkpoints.hf_import import open_tensors, stream_parameters
from dlm_jax.checkpoints.hf_names import KEYS
from dlm_jax.checkpoints.hf_tensors import has_model_tensors
from dlm_jax.checkpoints.lora import LoRASettings, resolve_lora
from dlm_jax.checkpoints.peft import is_peft_adapter, merge_peft_adapter, read_peft_adapter
from dlm_jax.checkpoints.source import DRAFTER_FILE, find_base, is_workdir, locate, split_step
from dlm_jax.checkpoints.stored import open_stored
from dlm_jax.checkpoints.tokenizer import choose_mask_token, load_tokenizer
from dlm_jax.checkpoints.workdir import LoRABase, ModelRecord, read_run_config
from dlm_jax.data.tokenization import missing_ids, special_tokens_of, start_token
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import CheckpointError, ConfigError, DataError
from dlm_jax.models import (
    Compute,
    LoRAConfig,
    ModelConfig,
    Transformer,
    abstract_model,
    add_dora_magnitudes,
    add_lora,
    base_shapes,
    combine_fingerprints,
    fingerprint,
    freeze_base,
    init_lora_factors,
    merge_lora,
    split_trainable,
)
from dlm_jax.storage import local_copy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INITS = ("pretrained", "random", "abstract")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model, its tokenizer, and what a checkpoint records of it.

    Attributes:
      tokenizer: None where the checkpoint has none.
      hf_config: the config.json that the model was read from.
      source: the directory, workdir@step or hub id that the model was read from.
      recipe: the settings of the run that trained the model, by dotted keys; None where unknown.
      base: the source of the base of a model with unmerged LoRA; None for a model without LoRA.
      provenance: fingerprints of what the parameters were computed from: a base and the adapters merged into it, in
        order, or a base before quantization. Empty if the parameters are as stored.
      recorded_mask_token: the mask token that the checkpoint records, which the model was trained with; None if it has
        none or the record is of its tokenizer alone.
      new_mask_token: whether the checkpoint has no row for the mask token, which then is the mean of all others.
    """

    model: Transformer
    tokenizer: "PreTrainedTokenizerBase | None"
    diffusion: DiffusionSpec
    hf_config: dict[str, Any]
    source: str
    recipe: dict[str, Any] | None = None
    base: str | None = None
    provenance: tuple[str, ...] = ()
    new_mask_token: bool = False
    recorded_mask_token: int | None = None

    @property
    def bos_token_id(self) -> int | None:
        """The token before a text; None without one."""
        return self._special("bos_token_id")

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a document."""
        return self._special("eos_token_id")

    @property
    def start_token_id(self) -> int:
        """The token at position 0, from which generation starts: see `data.tokenization.start_token`.

        Without a tokenizer it is the BOS of config.json, or else its EOS.

        Raises:
          ConfigError: there is no such token, or the model has no embedding for it.
        """
        recipe = self.recipe or {}
        try:
            if self.tokenizer is None:
                token = self.eos_token_id if self.bos_token_id is None else self.bos_token_id
            else:
                token = start_token(self.tokenizer, recipe.get("data.add_bos"), recipe.get("data.packing", "concat"))
        except DataError:
            token = None
        if token is None:
            raise ConfigError(f"{self.source} has no BOS or EOS token for position 0; set bos_token in its "
                              "tokenizer_config.json")
        if token >= self.model.config.vocab_size:
            raise ConfigError(f"{self.source} has no embedding for token {token} of its tokenizer, which is at "
                              "position 0; use the tokenizer that belongs to the model")
        return token

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of `sampling.SamplerConfig` that its authors sample with, where the checkpoint records them."""
        return recorded_sampling(self.hf_config, self.diffusion)

    @property
    def is_autoregressive(self) -> bool:
        """Whether the run that trained the model is on record as autoregressive."""
        return (self.recipe or {}).get("objective.name") == "autoregressive"

    @property
    def drafts_for_itself(self) -> bool:
        """Whether the model has learned to draft, and no other way to fill a block."""
        blocks = self.diffusion.blocks
        return (self.recipe or {}).get("objective.name") == "self_drafting" or (
            blocks is not None and blocks.noise == "random_tokens")

    def _special(self, name: str) -> int | None:
        """Returns the tokenizer's id of a special token, or that of config.json, which may be its class's default.

        The latter counts only if the tokenizer has a special token of this id.
        """
        if (value := getattr(self.tokenizer, name, None)) is not None:
            return value
        value = self.hf_config.get(name)
        value = value[0] if isinstance(value, list) else value  # LLaMA 3 lists several EOS tokens
        return value if self.tokenizer is None or value in self.tokenizer.all_special_ids else None


Shardings = Callable[[ModelConfig], Any]


@dataclasses.dataclass(frozen=True)
class _Options:
    """The arguments of `load_pretrained` that hold for every kind of checkpoint."""

    mask_token: str | int | None
    default_mask_token: str | int | None
    init: str
    lora: LoRASettings | LoRAConfig | None
    seed: int
    compute: Compute
    param_dtype: str
    shardings: Shardings | None

    def param_shardings(self, config: ModelConfig, shapes: nnx.State) -> list[Sharding]:
        """Returns one sharding per parameter of the base."""
        if self.shardings is not None:
            return jax.tree.leaves(self.shardings(config))
        return [SingleDeviceSharding(jax.local_devices()[0])] * len(jax.tree.leaves(shapes))


def load_pretrained(source: epath.PathLike, *, mask_token: str | int | None = None, base: str | None = None,
                    merge: bool = True, init: str = "pretrained", lora: LoRASettings | LoRAConfig | None = None,
                    seed: int = 0, compute: Compute = Compute(), param_dtype: str | None = None,
                    shardings: Shardings | None = None, default_mask_token: str | int | None = None) -> Pretrained:
    """Loads a model and its tokenizer from any kind of checkpoint, onto whatever devices there are.

    Args:
      source: a Hugging Face directory or a GGUF file (on an object store too), a hub id, a training workdir,
        `workdir@step` or `workdir@best`, or an adapter in PEFT's format. A workdir alone means its latest checkpoint.
        LoRA is merged into its base, which is loaded by this function too: the weights beside an adapter, or else
        what it names.
      mask_token: the id or text of an existing token, or a new token, whose rows in embedding and head are the mean of
        all others; None: the token that the checkpoint records.
      base: the base of an adapter, in place of the one that the adapter names.
      merge: False keeps the LoRA of a run beside its base; both keep the run's dtypes.
      init: "pretrained"; "random": the architecture and tokenizer alone, with weights from `seed`; "abstract": shapes
        in place of arrays.
      lora: LoRA to put beside the model, with new factors from `seed`; the model's parameters get its `frozen_dtype`.
      param_dtype: "float32" or "bfloat16"; None: the run's dtype for a workdir, float32 for everything else.
      shardings: maps an architecture to a pytree of shardings like the parameters; None: the first device.
      default_mask_token: the token for a checkpoint that records none; it may be new.

    Raises:
      CheckpointError: the checkpoint is missing, damaged or unsupported, or the base of LoRA has changed.
      ConfigError: the arguments do not fit this kind of checkpoint.
    """
    if init not in INITS:
        raise ConfigError(f"init {init!r} is unknown; choose {', '.join(INITS)}")
    options = _Options(mask_token, default_mask_token, init, lora, seed, compute, param_dtype or "float32", shardings)
    if is_workdir(source):
        if base is not None:
            raise ConfigError(f"{source} is a training workdir, which records its base; omit the base")
        directory, step = split_step(source)
        recipe = read_run_config(directory)
        options = dataclasses.replace(options, param_dtype=param_dtype or recipe["model.param_dtype"])
        return _with_fitting_tokenizer(_load_workdir(directory, step, recipe, merge, options))
    if not merge:
        raise ConfigError(f"{source} is not the workdir of a run with LoRA, so there is no LoRA to keep unmerged; "
                          "omit merge")
    directory = locate(source, weights=init == "pretrained")
    if is_peft_adapter(directory):
        if init != "pretrained":
            raise ConfigError(f"{source} is an adapter, and init={init} is for an architecture alone; name its base "
                              "instead")
        return _with_fitting_tokenizer(_load_peft(directory, str(source), base, options))
    if base is not None:
        raise ConfigError(f"{source} is not an adapter, so it has no base; omit the base")
    return _with_fitting_tokenizer(_load_stored(directory, str(source), options))


def load_recorded(record: ModelRecord, workdir: epath.Path, compute: Compute, param_dtype: str,
                  shardings: Shardings | None) -> Pretrained:
    """Loads the weights that a run records; a base of LoRA with new LoRA parameters beside it.

    Raises:
      CheckpointError: they are gone, or are not those with which the run started.
    """
    lora = record.lora if isinstance(record, LoRABase) else None
    loaded = load_pretrained(find_base(record.source, workdir), mask_token=record.mask_token, lora=lora,
                             compute=compute, param_dtype=param_dtype, shardings=shardings)
    record.check(weights_fingerprint(loaded), workdir)
    return loaded


def weights_fingerprint(loaded: Pretrained) -> str:
    """Returns the fingerprint of a model, of one with LoRA that of what is frozen, independent of devices.

    Merging and quantizing round differently from device to device; so the fingerprint of a model that was merged or
    quantized is that of its `Pretrained.provenance`.
    """
    if loaded.provenance:
        return combine_fingerprints(*loaded.provenance)
    _, params, frozen = split_trainable(loaded.model)
    return fingerprint(params if loaded.model.lora is None else frozen)


def _load_stored(path: Path, source: str, options: _Options) -> Pretrained:
    stored, init, mask_token = open_stored(path), options.init, options.mask_token
    hf_config, config, tokenizer = stored.config, config_from_hf(stored.config), stored.tokenizer
    diffusion = recorded_diffusion(hf_config)
    recorded_id = diffusion.mask_token_id
    if init == "pretrained":
        tensors, config, recorded_id = open_tensors(stored.tensors(), config, recorded_id, tokenizer, path)
    if recorded_id is None and mask_token is None and tokenizer is None:
        mask_token = options.default_mask_token
    if init == "abstract" and tokenizer is None and isinstance(mask_token, str):
        mask_token_id, is_new = config.vocab_size, True  # planning needs no tokenizer to look the token up
    else:
        mask_token_id, is_new = choose_mask_token(mask_token, recorded_id, config.vocab_size, tokenizer,
                                                  options.default_mask_token)
    if is_new:
        config = dataclasses.replace(config, vocab_size=max(config.vocab_size, mask_token_id + 1))
    lora = resolve_lora(options.lora, config, is_new)

    def read(shapes: nnx.State, shardings: list[Sharding]) -> Iterable[tuple[tuple, nnx.Param]]:
        if init == "pretrained":
            return stream_parameters(tensors, KEYS[config.family], shapes, shardings,
                                     mask_token_id if is_new else None)
        initialize = jax.jit(_initialize, static_argnums=(1, 2, 3), out_shardings=shardings)
        values = initialize(options.seed, config, options.compute, options.param_dtype)
        return nnx.to_flat_state(jax.tree.unflatten(jax.tree.structure(shapes), values))

    if init == "random" and lora is not None:
        raise ConfigError("LoRA needs pretrained weights, and model.init is random; set lora.rank to 0, or model.init "
                          "to pretrained")
    if init == "abstract":
        model, provenance = abstract_model(config, options.compute, options.param_dtype, lora), ()
    else:
        model, provenance = _build_model(config, lora, options, read)
    diffusion = dataclasses.replace(diffusion, mask_token_id=mask_token_id,
                                    missing_ids=missing_ids(tokenizer, config.vocab_size))
    return Pretrained(model, tokenizer, diffusion, hf_config, source, stored.recipe,
                      provenance=provenance, new_mask_token=is_new, recorded_mask_token=recorded_id)


def _load_workdir(directory: epath.Path, step: str | None, recipe: dict[str, Any], merge: bool,
                  options: _Options) -> Pretrained:
    from dlm_jax.checkpoints.orbax import resolve_step, restore_params  # Orbax is slow to import: for workdirs alone

    init = "random" if options.init == "random" else "abstract"
    loaded = _load_stored(local_copy(directory / "model"), str(directory), dataclasses.replace(options, init=init))
    loaded = dataclasses.replace(loaded, recipe=recipe)
    if options.init != "pretrained":
        return loaded
    if (directory / DRAFTER_FILE).exists():
        raise CheckpointError(f"{directory} is the run of a drafter, which writes no text without its target; give the "
                              "target as the model, and this run as its drafter")
    if loaded.new_mask_token:
        raise ConfigError(f"the mask token {loaded.tokenizer.mask_token!r} is new to {directory}, and its vocabulary "
                          "is fixed; export it first, and start from the export")
    step = resolve_step(directory, step)
    loaded = dataclasses.replace(loaded, source=f"{directory}@{step}")

    def restore(shapes: nnx.State, shardings: list[Sharding]) -> nnx.State:
        layout = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                              shapes, jax.tree.unflatten(jax.tree.structure(shapes), shardings))
        return _check_finite(restore_params(directory, step, layout), loaded.source)

    if (record := LoRABase.read(directory)) is not None:
        return _load_lora_run(loaded, directory, record, restore, merge, options)
    model, provenance = _build_model(loaded.model.config, loaded.model.lora, options,
                                     lambda *layout: nnx.to_flat_state(restore(*layout)))
    return dataclasses.replace(loaded, model=model, provenance=provenance)


def _load_lora_run(loaded: Pretrained, directory: epath.Path, record: LoRABase,
                   restore: Callable[[nnx.State, list[Sharding]], nnx.State], merge: bool,
                   options: _Options) -> Pretrained:
    """Loads a run with LoRA, of which `loaded` has all but the parameters: merges LoRA, or puts it beside its base."""
    lora, param_dtype = loaded.model.lora, loaded.recipe["model.param_dtype"]
    base = load_recorded(record, directory, options.compute, param_dtype, options.shardings)
    graphdef, trained, frozen = split_trainable(base.model)
    learned = restore(trained, [leaf.sharding for leaf in jax.tree.leaves(trained)])
    model = nnx.merge(graphdef, learned, frozen)
    gated = model.lora.where == "noised"  # such products are no part of any kernel
    if gated and lora is not None:
        raise ConfigError(f"{loaded.source} has LoRA at noised positions only, beside which no other LoRA can be "
                          "trained; start from its base")
    if (gated or not merge) and lora is None:
        if merge:
            model = _cast(model, options.param_dtype)
        return dataclasses.replace(loaded, model=model, base=record.source)
    model = merge_lora(model, options.param_dtype)
    if lora is not None:
        model = add_lora(model, lora, options.seed, options.param_dtype)
    return dataclasses.replace(loaded, model=model, provenance=(record.fingerprint, fingerprint(learned)))


def _with_fitting_tokenizer(loaded: Pretrained) -> Pretrained:
    """Returns what was loaded; raises CheckpointError if the embedding lacks a row for a token that text can have.

    Many checkpoints lack the row of a special token for padding, which they do not need.
    """
    if loaded.tokenizer is not None:
        special = special_tokens_of(loaded.tokenizer).values()
        largest = max(set(loaded.tokenizer.get_vocab().values()).difference(special), default=0)
        if largest >= (rows := loaded.model.config.vocab_size):
            raise CheckpointError(f"the tokenizer of {loaded.source} has ids up to {largest}, more than the {rows} "
                                  "rows of the embedding; the two do not belong together")
    return loaded


def _cast(model: Transformer, dtype: str) -> Transformer:
    """Returns the model with its floating-point parameters in another dtype; codes of quantized kernels stay."""
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params))


def _load_peft(directory: Path, source: str, base: str | None, options: _Options) -> Pretrained:
    adapter = read_peft_adapter(directory)
    metadata, mask_token = adapter.metadata, options.mask_token
    recorded = metadata.get("mask_token") or metadata.get("mask_token_id")  # by text: it may be new to the base
    if mask_token is None:
        mask_token = recorded
    elif adapter.has_embedding and recorded and mask_token not in (recorded, metadata.get("mask_token_id")):
        raise ConfigError(f"{source} has the embedding of the mask token {recorded!r}, with which it was trained, but "
                          f"the mask token is to be {mask_token!r}; omit it")
    if base is None and (directory / "config.json").is_file() and has_model_tensors(directory):
        loaded = _load_stored(directory, source, dataclasses.replace(options, mask_token=mask_token, lora=None))
    else:
        loaded = _load_named_base(directory, base or adapter.base, mask_token, options)
    diffusion = dataclasses.replace(
        loaded.diffusion, shift=metadata.get("shift", loaded.diffusion.shift),
        blocks=blocks_from_record(metadata) if "block_size" in metadata else loaded.diffusion.blocks)
    model = merge_peft_adapter(adapter, loaded.model, loaded.source, options.param_dtype)
    tokenizer = load_tokenizer(directory) or loaded.tokenizer
    diffusion = dataclasses.replace(diffusion, missing_ids=missing_ids(tokenizer, model.config.vocab_size))
    is_new, provenance = loaded.new_mask_token and not adapter.has_embedding, loaded.provenance
    lora = resolve_lora(options.lora, model.config, is_new)
    if lora is not None:
        provenance = (*(provenance or (fingerprint(nnx.state(loaded.model)),)), adapter.digest())
        model = add_lora(model, lora, options.seed, options.param_dtype)
    recorded_id = metadata.get("mask_token_id")
    if recorded_id is not None and options.mask_token is None:
        recorded_id = diffusion.mask_token_id
    return dataclasses.replace(
        loaded, model=model, tokenizer=tokenizer, diffusion=diffusion,
        source=source, recipe=metadata.get("recipe", loaded.recipe), provenance=provenance, new_mask_token=is_new,
        recorded_mask_token=loaded.recorded_mask_token if recorded_id is None else recorded_id)


def _check_finite(params: nnx.State, source: str) -> nnx.State:
    """Returns the parameters; raises CheckpointError that names one with NaN or infinity."""
    finite = jax.jit(lambda state: jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), state))(params)
    for path, leaf in nnx.to_flat_state(finite):
        if not leaf[...]:
            raise CheckpointError(f"{'.'.join(path)} in {source} has numbers that are not finite (NaN or infinity); "
                                  "use an earlier checkpoint, as workdir@step")
    return params


def _load_named_base(adapter: Path, base: str, mask_token: str | int | None, options: _Options) -> Pretrained:
    found = find_base(base, adapter) if base else ""
    if not found or (Path(found).is_dir() and Path(found).samefile(adapter)):
        raise CheckpointError(f"the adapter {adapter} has no weights of a base beside it, and names "
                              f"{'itself as its' if found else 'no'} base (base_model_name_or_path in "
                              "adapter_config.json); say where its base is (--base, or base=)")
    try:
        return load_pretrained(found, mask_token=mask_token, default_mask_token=options.default_mask_token,
                               compute=options.compute, param_dtype=options.param_dtype, shardings=options.shardings)
    except CheckpointError as error:
        raise CheckpointError(f"the base {base!r} of the adapter {adapter} cannot be loaded: {error}; put it there "
                              "or beside the adapter, or name another (--base, or base=)") from error


def _build_model(config: ModelConfig, lora: LoRAConfig | None, options: _Options,
                 read: Callable[[nnx.State, list[Sharding]], Iterable[tuple[tuple, nnx.Param]]]
                 ) -> tuple[Transformer, tuple[str, ...]]:
    """Builds a model of the parameters that `read` gives, with new LoRA parameters; also returns its `provenance`."""
    graphdef, shapes = base_shapes(config, options.compute, options.param_dtype, lora)
    shardings = options.param_shardings(config, shapes)
    params, provenance = freeze_base(read(shapes, shardings), lora)
    factors = nnx.State({}) if lora is None else init_lora_factors(
        config, lora, options.seed, options.param_dtype, shardings[0])
    return add_dora_magnitudes(nnx.merge(graphdef, params, factors)), provenance


def _initialize(seed: jax.Array, config: ModelConfig, compute: Compute, param_dtype: str) -> list[jax.Array]:
    rngs, dtype = nnx.Rngs(jax.random.key(seed)), jnp.dtype(param_dtype)
    return jax.tree.leaves(nnx.state(Transformer(config, compute=compute, rngs=rngs, param_dtype=dtype)))
