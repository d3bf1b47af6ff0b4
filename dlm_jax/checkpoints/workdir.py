"""A run's directory, without its checkpoints' contents.

    config.json       the settings of the run, by dotted keys
    model/            HF config.json and tokenizer, from which the model can be described without its base
    adapter.json      for a run with LoRA, whose checkpoints hold only what is trained: see `LoRABase`
    drafter.json      for a run that trains a drafter, the same: see `drafter.DrafterRecord`
    parent.json       for a run that keeps a copy of its parent as teacher: see `ParentRecord`
    checkpoints/      see `orbax`
    metrics.jsonl     see `training.metrics`
    .lock             names the process that trains in it: see `hold_workdir`
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import platform
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

import jax
from etils import epath
from flax import nnx

from dlm_jax.checkpoints.drafter import DrafterRecord
from dlm_jax.checkpoints.hf_config import config_to_hf
from dlm_jax.checkpoints.source import DRAFTER_FILE, LORA_FILE, PARENT_FILE
from dlm_jax.errors import CheckpointError
from dlm_jax.models import LoRAConfig, combine_fingerprints, fingerprint
from dlm_jax.storage import is_remote, read_json, upload, write_json

if TYPE_CHECKING:
    from dlm_jax.checkpoints.pretrained import Pretrained


@dataclasses.dataclass(frozen=True)
class LoRABase:
    """The record of a run with LoRA: its LoRA and the base for its checkpoints, which hold only what is trained.

    Attributes:
      source: of the base: a directory, a GGUF file, a hub id, or a workdir@step.
      mask_token: the argument with which the base was loaded.
      fingerprint: `base_fingerprint` of the base.
    """

    lora: LoRAConfig
    source: str
    mask_token: int | str | None
    fingerprint: str

    def check(self, frozen: nnx.State, provenance: tuple[str, ...], workdir: epath.PathLike) -> None:
        """Raises CheckpointError if the base has other weights than when the run started."""
        if base_fingerprint(frozen, provenance) != self.fingerprint:
            raise CheckpointError(f"the base at {self.source} has other weights than when the LoRA run in {workdir} "
                                  "started; restore them, or correct the source in "
                                  f"{epath.Path(workdir) / LORA_FILE}")


@dataclasses.dataclass(frozen=True)
class ParentRecord:
    """The record of a run that trains all parameters beside a copy of its parent, which no checkpoint holds.

    Attributes:
      source, mask_token: with which the parent was loaded, as in `LoRABase`.
      fingerprint: `base_fingerprint` of all its parameters.
    """

    source: str
    mask_token: int | str | None
    fingerprint: str

    @classmethod
    def read(cls, workdir: epath.Path) -> Self:
        """Reads the record; raises CheckpointError where it is missing or damaged."""
        path = workdir / PARENT_FILE
        if not path.exists():
            raise CheckpointError(f"{workdir} does not record its parent, which objective.teacher needs; set the "
                                  "weights of objective.teacher to 0, or start in a new workdir")
        try:
            return cls(**read_json(path))
        except TypeError as error:
            raise CheckpointError(f"{path} cannot be read: {error}; restore it from a copy") from error

    def check(self, params: nnx.State, provenance: tuple[str, ...], workdir: epath.PathLike) -> None:
        """Raises CheckpointError if the parent has other weights than when the run started."""
        if base_fingerprint(params, provenance) != self.fingerprint:
            raise CheckpointError(f"the parent at {self.source} has other weights than when the run in {workdir} "
                                  "started; restore them, or correct the source in "
                                  f"{epath.Path(workdir) / PARENT_FILE}")


def base_fingerprint(frozen: nnx.State, provenance: tuple[str, ...]) -> str:
    """Returns the fingerprint of a LoRA run's base, independent of devices.

    Merging and quantizing round differently from device to device; so the fingerprint of a base that was merged or
    quantized is that of its `Pretrained.provenance`, and otherwise that of the parameters that are not trained.
    """
    return combine_fingerprints(*provenance) if provenance else fingerprint(frozen)


def read_lora_base(workdir: epath.Path) -> LoRABase | None:
    """Reads the record of a run with LoRA; None for a run without.

    Raises:
      CheckpointError: the file is damaged.
    """
    path = workdir / LORA_FILE
    if not path.exists():
        return None
    content = read_json(path)
    try:
        lora = content.pop("lora")
        return LoRABase(LoRAConfig(**lora | {"targets": tuple(lora["targets"])}), **content)
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}; restore it from a copy") from error


def write_run_metadata(workdir: epath.Path, settings: dict[str, object], pretrained: "Pretrained",
                       lora_base: LoRABase | None, drafter: DrafterRecord | None = None,
                       parent: ParentRecord | None = None) -> None:
    """Writes everything but checkpoints and metrics, from process 0.

    Args:
      lora_base: None for a run without LoRA.
      drafter: None for a run that trains no drafter.
      parent: None for a run that keeps no copy of its parent.
    """
    if jax.process_index() != 0:
        return
    model = workdir / "model"
    model.mkdir(parents=True, exist_ok=True)
    if pretrained.tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            pretrained.tokenizer.save_pretrained(folder)
            upload(pathlib.Path(folder), model)
    write_json(model / "config.json", config_to_hf(pretrained.model.config, pretrained.hf_config, pretrained.diffusion,
                                                   settings["model.param_dtype"]))
    if lora_base is None:  # of an earlier run
        (workdir / LORA_FILE).unlink(missing_ok=True)
    else:
        write_json(workdir / LORA_FILE, dataclasses.asdict(lora_base))
    if drafter is None:
        (workdir / DRAFTER_FILE).unlink(missing_ok=True)
    else:
        drafter.write(workdir)
    if parent is None:
        (workdir / PARENT_FILE).unlink(missing_ok=True)
    else:
        write_json(workdir / PARENT_FILE, dataclasses.asdict(parent))
    write_json(workdir / "config.json", settings)


@contextlib.contextmanager
def hold_workdir(workdir: epath.Path) -> Iterator[None]:
    """Keeps other runs out of a directory as long as the context lasts, or the process.

    An object store, and a file system without locks, keep nobody out.

    Raises:
      CheckpointError: another process trains in it.
    """
    if jax.process_index() != 0 or is_remote(workdir):
        yield
        return
    with open(workdir / ".lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: a child has none
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise CheckpointError(f"another run trains in {workdir} ({file.read().strip() or 'a process'}); wait for "
                                  "its end, or name another workdir") from error
        except OSError:
            pass  # no locks here
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        yield


def read_run_config(workdir: epath.Path) -> dict[str, object]:
    """Reads the settings of a run by dotted keys; raises CheckpointError where they cannot be read."""
    return read_json(workdir / "config.json")
