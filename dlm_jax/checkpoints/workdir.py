"""A run's directory, without its checkpoints' contents.

    config.json       the settings of the run, by dotted keys
    model/            HF config.json and tokenizer, from which the model can be described without its base
    adapter.json      for a run with LoRA, whose checkpoints hold only what is trained: see `LoRABase`
    drafter.json      for a run that trains a drafter, the same: see `DrafterRecord`
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
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
from etils import epath

from dlm_jax.checkpoints.hf_config import config_to_hf
from dlm_jax.checkpoints.source import DRAFTER_FILE, LORA_FILE, PARENT_FILE
from dlm_jax.errors import CheckpointError
from dlm_jax.models import DrafterConfig, LoRAConfig
from dlm_jax.storage import is_remote, read_json, upload, write_json

if TYPE_CHECKING:
    from dlm_jax.checkpoints.pretrained import Pretrained


@dataclasses.dataclass(frozen=True)
class ModelRecord:
    """The record of a model that a run needs and that its checkpoints do not hold; each kind is a file in the workdir.

    Attributes:
      source: a directory, a GGUF file, a hub id, or a workdir@step.
      mask_token: the argument with which the model was loaded.
      fingerprint: of its weights; see `pretrained.weights_fingerprint`.
    """

    FILE: ClassVar[str]
    ROLE: ClassVar[str]
    SOURCE_KEY: ClassVar[str] = "source"  # in the file
    source: str
    mask_token: int | str | None
    fingerprint: str

    def write(self, workdir: epath.Path) -> None:
        """Writes the record into a workdir."""
        content = dataclasses.asdict(self)
        content[self.SOURCE_KEY] = content.pop("source")
        write_json(workdir / self.FILE, content)

    @classmethod
    def read(cls, workdir: epath.Path) -> Self | None:
        """Reads the record of a run; None for a run without one.

        Raises:
          CheckpointError: the file is damaged.
        """
        path = workdir / cls.FILE
        if not path.exists():
            return None
        content = read_json(path)
        try:
            content["source"] = content.pop(cls.SOURCE_KEY)
            return _from_json(cls, content)
        except (TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error!r}; restore it from a copy") from error

    def check(self, found: str, workdir: epath.PathLike) -> None:
        """Raises CheckpointError if `found`, the model's fingerprint, is not what it was when the run started."""
        if found != self.fingerprint:
            raise CheckpointError(f"the {self.ROLE} at {self.source} has other weights than when the run in {workdir} "
                                  f"started; restore them, or correct the {self.SOURCE_KEY} in "
                                  f"{epath.Path(workdir) / self.FILE}")


@dataclasses.dataclass(frozen=True)
class LoRABase(ModelRecord):
    """The base of a run with LoRA, and its LoRA."""

    FILE, ROLE = LORA_FILE, "base"
    lora: LoRAConfig


@dataclasses.dataclass(frozen=True)
class ParentRecord(ModelRecord):
    """The parent of a run that trains all parameters beside a copy of it."""

    FILE, ROLE = PARENT_FILE, "parent"


@dataclasses.dataclass(frozen=True)
class DrafterRecord(ModelRecord):
    """The target of a run that trains a drafter, and the drafter's architecture."""

    FILE, ROLE, SOURCE_KEY = DRAFTER_FILE, "target", "target"
    config: DrafterConfig


def _from_json(kind: Any, value: Any) -> Any:
    """Inverts `dataclasses.asdict` for a dataclass, or a type that has one among its arguments; lists become tuples."""
    found = next((item for item in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(item)), None)
    if found is not None and value is not None:
        kinds = typing.get_type_hints(found)
        return found(**{name: _from_json(kinds[name], item) for name, item in value.items()})
    return tuple(value) if isinstance(value, list) else value


def write_run_metadata(workdir: epath.Path, settings: dict[str, object], pretrained: "Pretrained",
                       record: ModelRecord | None) -> None:
    """Writes everything but checkpoints and metrics, from process 0; records of other kinds are removed."""
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
    for kind in (LoRABase, ParentRecord, DrafterRecord):
        if not isinstance(record, kind):  # of an earlier run
            (workdir / kind.FILE).unlink(missing_ok=True)
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
