"""A run's directory: its config, what its model is in HF terms, its checkpoints, its metrics.

    config.json       the settings of the run, as dotted keys
    model/            HF config.json and tokenizer, so that parameters can be read without the base they came from
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

from dlm_jax.errors import CheckpointError
from dlm_jax.hf import Pretrained
from dlm_jax.hf.config import config_from_hf, config_to_hf, read_config, recorded_mask_token_id, recorded_shift
from dlm_jax.hf.tokenizer import load_tokenizer
from dlm_jax.models import Compute, ModelConfig, abstract_model
from dlm_jax.storage import local_copy, reached, upload, write_json
from dlm_jax.training.checkpoint import best_step, restore_params, saved_steps
from dlm_jax.training.config import TrainConfig, flat_dict


def is_workdir(path: epath.PathLike) -> bool:
    """True for a directory, with or without `@step`, in which a run has saved a checkpoint."""
    directory, _ = split_step(path)
    directory = reached(directory)
    return (directory / "config.json").is_file() and (directory / "checkpoints").is_dir()


def split_step(path: epath.PathLike) -> tuple[epath.Path, str | None]:
    """`runs/a@500` to (`runs/a`, "500"); without `@`, or for a directory so named, no step."""
    head, at, step = str(path).rpartition("@")
    if not at or epath.Path(path).is_dir() or not (step.isdecimal() or step == "best"):
        return epath.Path(path), None
    return epath.Path(head), step


def load_workdir(path: epath.PathLike, *, step: int | str | None = None, compute: Compute = Compute(),
                 param_dtype: str | None = None,
                 shardings: Callable[[ModelConfig], object] | None = None) -> Pretrained:
    """The model of a run, at a checkpoint, without its optimizer and on whatever devices there are.

    Args:
      path: the workdir, or `workdir@step`.
      step: a step, "best" for the lowest validation loss, or None for the latest; `@step` in the path counts first.
      param_dtype: type of the parameters; None for the type the run has.
      shardings: gives the shardings of the parameters; None puts them on the default device.
    """
    directory, named_step = split_step(path)
    base = described_model(directory, compute, param_dtype)
    at = named_step if named_step is not None else step
    if at == "best":
        at = best_step(directory)
    elif at is None:
        at = max(saved_steps(directory), default=None)
    if at is None:
        raise CheckpointError(f"{directory} holds no checkpoint yet, or none with a validation loss where the best is "
                              "asked for")
    graphdef, params = nnx.split(base.model)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = jax.tree.map(lambda _: device, params)
    else:
        placed = shardings(base.model.config)
    layout = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                          params, placed)
    model = nnx.merge(graphdef, restore_params(directory, int(at), layout))
    return dataclasses.replace(base, model=model, source=f"{directory}@{at}")


def described_model(directory: epath.Path, compute: Compute, param_dtype: str | None = None) -> Pretrained:
    """A run's model with shapes in place of arrays."""
    if not (directory / "model" / "config.json").is_file():
        raise CheckpointError(f"{directory} is not a workdir: it has no model/config.json")
    model = local_copy(directory / "model")
    hf_config = read_config(model)
    recipe = read_run_config(directory)
    return Pretrained(
        model=abstract_model(config_from_hf(hf_config), compute, param_dtype or recipe["model.param_dtype"]),
        tokenizer=load_tokenizer(model), mask_token_id=recorded_mask_token_id(hf_config),
        shift=recorded_shift(hf_config), hf_config=hf_config, source=str(directory), recipe=recipe)


def describe_run(directory: epath.Path, config: TrainConfig, base: Pretrained) -> None:
    """Writes what `described_model` and `read_run_config` read. Only the first process does."""
    if jax.process_index() != 0:
        return
    (directory / "model").mkdir(parents=True, exist_ok=True)
    hf_config = config_to_hf(base.model.config, base.hf_config, mask_token_id=base.mask_token_id, shift=base.shift,
                             dtype=config.model.param_dtype)
    if base.tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            base.tokenizer.save_pretrained(folder)
            upload(pathlib.Path(folder), directory / "model")
    write_json(directory / "model" / "config.json", hf_config)
    write_json(directory / "config.json", flat_dict(config))


def read_run_config(directory: epath.Path) -> dict[str, object]:
    """The settings of the run by dotted keys."""
    try:
        return json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / 'config.json'} cannot be read: {error}") from error
