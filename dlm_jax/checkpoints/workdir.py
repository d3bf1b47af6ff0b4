"""A run's directory, without its checkpoints' contents.

    config.json       the settings of the run, by dotted keys
    model/            HF config.json and tokenizer, from which the model can be described without its base
    adapter.json      for a run with LoRA: see `LoRABase`
    drafter.json      for a run that trains a drafter: see `drafter.DrafterRecord`
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
from typing import TYPE_CHECKING, Any, Self

import jax
from etils import epath

from dlm_jax.checkpoints.hf_config import config_to_hf
from dlm_jax.checkpoints.source import DRAFTER_FILE, LORA_FILE, PARENT_FILE, SourceRecord
from dlm_jax.errors import CheckpointError
from dlm_jax.models import LoRAConfig
from dlm_jax.storage import is_remote, read_json, upload, write_json

if TYPE_CHECKING:
    from dlm_jax.checkpoints.pretrained import Pretrained


@dataclasses.dataclass(frozen=True)
class LoRABase(SourceRecord):
    """The base of a run with LoRA, whose checkpoints hold only what is trained, and its LoRA."""

    FILE, ROLE = LORA_FILE, "base"
    lora: LoRAConfig

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        lora = content.pop("lora")
        return cls(**content, lora=LoRAConfig(**lora | {"targets": tuple(lora["targets"])}))


class ParentRecord(SourceRecord):
    """The parent of a run that trains all parameters beside a copy of it, its teacher."""

    FILE, ROLE = PARENT_FILE, "parent"


def write_run_metadata(workdir: epath.Path, settings: dict[str, object], pretrained: "Pretrained",
                       record: SourceRecord | None) -> None:
    """Writes everything but checkpoints and metrics, from process 0.

    Args:
      record: of weights that the run's checkpoints do not hold; None: they hold all.
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
    for file in (LORA_FILE, DRAFTER_FILE, PARENT_FILE):
        if record is None or file != record.FILE:  # of an earlier run
            (workdir / file).unlink(missing_ok=True)
    if record is not None:
        record.write(workdir)
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
