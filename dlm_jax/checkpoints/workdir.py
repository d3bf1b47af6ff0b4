"""A run's directory: its config, what its model is in HF terms, its checkpoints, its metrics.

    config.json       the settings of the run, as dotted keys
    model/            HF config.json and tokenizer, so that parameters can be read without the base they came from
    adapter.json      of a run with LoRA, whose checkpoints hold what it trains: see `adapter`
    checkpoints/      see `checkpoint`
    metrics.jsonl     see `metrics`
"""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Callable

import jax
from etils import epath
from flax import nnx

from dlm_jax.checkpoints.hf_config import (
    config_from_hf,
    config_to_hf,
    read_config,
    recorded_blocks,
    recorded_mask_token_id,
    recorded_shift,
)
from dlm_jax.checkpoints.hf_import import LoraFactory, load_pretrained, whole
from dlm_jax.checkpoints.hub import find_base
from dlm_jax.checkpoints.orbax import best_step, restore_params, saved_steps
from dlm_jax.checkpoints.pretrained import Pretrained
from dlm_jax.checkpoints.tokenizer import choose_mask_token, load_tokenizer
from dlm_jax.diffusion.spec import DiffusionSpec
from dlm_jax.errors import CheckpointError, ConfigError
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
from dlm_jax.storage import ensure_accessible, is_remote, local_copy, upload, write_json

ADAPTER_FILE = "adapter.json"


def is_workdir(path: epath.PathLike) -> bool:
    """True for a directory, with or without `@step`, in which a run has saved a checkpoint."""
    directory, _ = split_step(path)
    directory = ensure_accessible(directory)
    return (directory / "config.json").is_file() and (directory / "checkpoints").is_dir()


def split_step(path: epath.PathLike) -> tuple[epath.Path, str | None]:
    """`runs/a@500` to (`runs/a`, "500"); without `@`, or for a directory so named, no step."""
    head, at, step = str(path).rpartition("@")
    if not at or epath.Path(path).is_dir() or not (step.isdecimal() or step == "best"):
        return epath.Path(path), None
    return epath.Path(head), step


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a workdir keeps of a run with LoRA beside its checkpoints, which hold only what is trained.

    Attributes:
      base: where the base is: a directory, a hub id, or a workdir@step.
      mask_token: as it was given when the base was loaded.
      fingerprint: of the base, see `base_fingerprint`.
    """

    lora: LoRAConfig
    base: str
    mask_token: int | str | None
    fingerprint: str

    def check(self, frozen: nnx.State, merged_adapters: tuple[str, ...], workdir: epath.PathLike) -> None:
        """Raises CheckpointError where the base, as `base_fingerprint` takes it, is not what the run began with."""
        if base_fingerprint(frozen, merged_adapters) != self.fingerprint:
            raise CheckpointError(f"the base at {self.base} is not the one that the adapter in {workdir} was trained "
                                  f"beside: its weights are others; restore them, or name the right base in "
                                  f"{epath.Path(workdir) / ADAPTER_FILE}")


def base_fingerprint(frozen: nnx.State, merged_adapters: tuple[str, ...]) -> str:
    """Of what is not trained; where adapters were merged into that, or it was quantized, of what it was made from, as
    that rounds.

    Args:
      merged: see `Pretrained`.
    """
    return combine_fingerprints(*merged_adapters) if merged_adapters else fingerprint(frozen)


def write_adapter(workdir: epath.Path, adapter: Adapter | None) -> None:
    """Writes what `read_adapter` reads; None removes what another run may have left."""
    if adapter is None:
        (workdir / ADAPTER_FILE).unlink(missing_ok=True)
    else:
        write_json(workdir / ADAPTER_FILE, dataclasses.asdict(adapter))


def read_adapter(workdir: epath.Path) -> Adapter | None:
    """What `write_adapter` wrote; None for a run without LoRA."""
    path = workdir / ADAPTER_FILE
    try:
        content = json.loads(path.read_text())
        lora = content.pop("lora")
        return Adapter(LoRAConfig(**lora | {"targets": tuple(lora["targets"])}), **content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}; restore it from a copy") from error


Shardings = Callable[[ModelConfig], object]


def load_source(source: epath.PathLike, *, mask_token: int | str | None = None, compute: Compute = Compute(),
                param_dtype: str = "float32", shardings: Shardings | None = None, init: str = "pretrained",
                seed: int = 0, lora: LoraFactory | None = None, base: str | None = None) -> Pretrained:
    """The model that a user names: `load_workdir` for a workdir, `load_pretrained` for everything else.

    Args: as in `load_pretrained`.

    Raises:
      ConfigError: `mask_token` is new to a workdir.
    """
    if not is_workdir(source) or init != "pretrained":
        return load_pretrained(source, mask_token=mask_token, compute=compute, param_dtype=param_dtype,
                               shardings=shardings, init=init, seed=seed, lora=lora, base=base, open_base=load_source)
    if base is not None:
        raise ConfigError(f"{source} is a training workdir, which knows its base; leave the base out")
    found = load_workdir(source, compute=compute, param_dtype=param_dtype, shardings=shardings, lora=lora, seed=seed)
    mask_token_id, is_new = choose_mask_token(mask_token, found.mask_token_id, found.model.config.vocab_size,
                                              found.tokenizer)
    if is_new:
        raise ConfigError(f"model.mask_token {mask_token!r} is new to {source}, and a workdir's vocabulary is fixed; "
                          "export it first, and start from the export")
    return dataclasses.replace(found, diffusion=dataclasses.replace(found.diffusion, mask_token_id=mask_token_id))


def load_workdir(path: epath.PathLike, *, step: int | str | None = None, compute: Compute = Compute(),
                 param_dtype: str | None = None, shardings: Shardings | None = None, lora: LoraFactory | None = None,
                 seed: int = 0, merge: bool = True) -> Pretrained:
    """The model of a run, at a checkpoint, without its optimizer and on whatever devices there are.

    What a run with LoRA has learned is merged into its base, which is loaded from where it was.

    Args:
      path: the workdir, or `workdir@step`.
      step: a step, "best" for the lowest validation loss, or None for the latest; `@step` in the path counts first.
      param_dtype: type of the parameters; None for the type the run has.
      shardings: gives the shardings of the parameters; None puts them on the default device.
      lora: gives the LoRA to put beside the model, as in `load_pretrained`, with new factors from `seed`.
      merge: False leaves what a run with LoRA has learned beside its base, both in the types that the run has.

    Raises:
      CheckpointError: there is no such checkpoint, or the base of a run with LoRA is not what it was.
    """
    directory, named_step = split_step(path)
    base = abstract_pretrained(directory, compute, param_dtype)
    at = named_step if named_step is not None else step
    if at == "best":
        at = best_step(directory)
    elif at is None:
        at = max(saved_steps(directory), default=None)
    if at is None:
        raise CheckpointError(f"{directory} holds no checkpoint yet, or none with a validation loss where the best is "
                              "asked for")
    config, dtype = base.model.config, param_dtype or base.recipe["model.param_dtype"]
    beside = None if lora is None else lora(config, False)
    if adapter := read_adapter(directory):
        adapted = load_adapted(directory, adapter, compute, shardings)
        graphdef, trained, frozen = split_trainable(adapted.model)
        adapter.check(frozen, adapted.merged_adapters, directory)
        learned = restore_params(directory, int(at), jax.tree.map(_described, trained))
        model = nnx.merge(graphdef, learned, frozen)
        base = dataclasses.replace(base, base=adapter.base)
        if merge or beside is not None:
            model, merged_adapters = merge_lora(model, dtype), (adapter.fingerprint, fingerprint(learned))
            base = dataclasses.replace(base, base=None, merged_adapters=merged_adapters)
        if beside is not None:
            model = add_lora(model, beside, seed, dtype, _factor_sharding(model))
    else:
        model, merged_adapters = _restored(directory, int(at), config, compute, dtype, shardings, beside, seed)
        base = dataclasses.replace(base, merged_adapters=merged_adapters)
    return dataclasses.replace(base, model=model, source=f"{directory}@{at}")


def _restored(directory: epath.Path, step: int, config: ModelConfig, compute: Compute, dtype: str,
              shardings: Shardings | None, lora: LoRAConfig | None,
              seed: int) -> tuple[Transformer, tuple[str, ...]]:
    """The parameters of a checkpoint that holds all of them, and new factors beside them if wanted; what `freeze_base` says
    of where they come from."""
    graphdef, params = base_shapes(config, compute, dtype, lora)
    if shardings is None:
        places = [jax.sharding.SingleDeviceSharding(jax.local_devices()[0])] * len(jax.tree.leaves(params))
    else:
        places = jax.tree.leaves(shardings(config))
    layout = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                          params, jax.tree.unflatten(jax.tree.structure(params), places))
    factors = nnx.State({}) if lora is None else init_lora_factors(config, lora, seed, dtype, whole(places[0]))
    frozen, merged_adapters = freeze_base(nnx.to_flat_state(restore_params(directory, step, layout)), lora)
    return add_dora_magnitudes(nnx.merge(graphdef, frozen, factors)), merged_adapters


def load_adapted(directory: epath.Path, adapter: Adapter, compute: Compute, shardings: Shardings | None) -> Pretrained:
    """The base of a run with LoRA, stored as the run stores it, with new factors beside it."""
    dtype = read_run_config(directory)["model.param_dtype"]
    source = find_base(adapter.base, directory)
    mask_token = None if is_workdir(source) else adapter.mask_token
    return load_source(source, mask_token=mask_token, compute=compute, param_dtype=dtype, shardings=shardings,
                       lora=lambda *_: adapter.lora)


def absolute_source(source: str) -> str:
    """A source that a run can find again from any folder: a directory's absolute path, with its step if it has one."""
    directory, step = split_step(source)
    if is_remote(source) or not directory.expanduser().is_dir():
        return source
    return str(directory.expanduser().resolve()) + ("" if step is None else f"@{step}")


def _described(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _factor_sharding(model: Transformer) -> jax.sharding.Sharding:
    return whole(model.embed.embedding[...].sharding)


def abstract_pretrained(directory: epath.Path, compute: Compute, param_dtype: str | None = None) -> Pretrained:
    """A run's model with shapes in place of arrays."""
    if not (directory / "model" / "config.json").is_file():
        raise CheckpointError(f"{directory} is not a workdir: it has no model/config.json")
    model = local_copy(directory / "model")
    hf_config = read_config(model)
    recipe = read_run_config(directory)
    return Pretrained(
        model=abstract_model(config_from_hf(hf_config), compute, param_dtype or recipe["model.param_dtype"]),
        tokenizer=load_tokenizer(model), diffusion=DiffusionSpec(
            recorded_mask_token_id(hf_config), recorded_shift(hf_config), recorded_blocks(hf_config)),
        hf_config=hf_config, source=str(directory), recipe=recipe)


def write_run_metadata(directory: epath.Path, settings: dict[str, object], base: Pretrained, adapter: Adapter | None) -> None:
    """Writes what `abstract_pretrained`, `read_adapter` and `read_run_config` read. Only the first process does."""
    if jax.process_index() != 0:
        return
    (directory / "model").mkdir(parents=True, exist_ok=True)
    hf_config = config_to_hf(base.model.config, base.hf_config, mask_token_id=base.mask_token_id, shift=base.shift,
                             dtype=settings["model.param_dtype"], blocks=base.blocks)
    if base.tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            base.tokenizer.save_pretrained(folder)
            upload(pathlib.Path(folder), directory / "model")
    write_json(directory / "model" / "config.json", hf_config)
    write_adapter(directory, adapter)
    write_json(directory / "config.json", settings)


def read_run_config(directory: epath.Path) -> dict[str, object]:
    """The settings of the run by dotted keys."""
    try:
        return json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / 'config.json'} cannot be read: {error}") from error
