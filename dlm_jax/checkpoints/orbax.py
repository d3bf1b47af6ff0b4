"""Digests of a checkpoint's files: Orbax restores a flipped bit without a word, these tell.

They are written into the checkpoint before it is committed, so that whatever is committed has them.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from orbax.checkpoint import checkpoint_managers

from dlm_jax.errors import CheckpointError
from dlm_jax.parallel import broadcast_from_process_zero
from dlm_jax.storage import files_below, is_remote, move

FILE = "digests.json"
_THREADS = 8  # hashing and reading give up the interpreter's lock
# Orbax writes into these once more when it commits; no array depends on them.
_NOT_DATA = (FILE, "_CHECKPOINT_METADATA", "commit_success.txt")

if TYPE_CHECKING:
    from dlm_jax.training.step import TrainState


def write_checksums(directory: epath.Path) -> None:
    """Writes the SHA-256 of every file below `directory` into its `digests.json`."""
    names = [name for name in files_below(directory) if name not in _NOT_DATA]
    (directory / FILE).write_text(json.dumps(_digests(directory, names), indent=0) + "\n")


def verify_checksums(directory: epath.Path, items: Iterable[str] | None = None) -> str | None:
    """What is wrong with a checkpoint, in a few words, or None; of `items` (its folders) only where they are given."""
    try:
        wanted = json.loads((directory / FILE).read_text())
        if not all(isinstance(digest, str) for digest in wanted.values()):
            return f"{FILE} is damaged"
    except FileNotFoundError:
        return f"{FILE} is missing"
    except (ValueError, AttributeError):
        return f"{FILE} is damaged"
    if items is not None:
        wanted = {name: digest for name, digest in wanted.items() if name.split("/")[0] in tuple(items)}
    missing = [name for name in wanted if not (directory / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    found = _digests(directory, list(wanted))
    return next((f"{name} is not what was written" for name in wanted if found[name] != wanted[name]), None)


def _digests(directory: epath.Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with (directory / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


# ---- Checkpoints: written by Orbax in the background, readable without optimizer or mesh.
#
# A step's directory holds separate items: `params`, `optimizer`, `ema` where there is one, and `progress`
# (JSON), and the digests of all their files. Arrays are stored by plain dotted names, so that no class of this library
# is part of the format. A directory gets its final name (on an object store its marker) when all of it is written.


_FAILURES = (OSError, ValueError, RuntimeError)  # what Orbax raises where something cannot be written


def named(tree: object) -> dict[str, object]:
    """The leaves of a tree by dotted names, such as `blocks.attention.q.kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
            for path, leaf in leaves}


def from_named(like: object, leaves: dict[str, object]) -> object:
    """The inverse of `named`, for a tree of the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in named(like)])


class CheckpointWriter:
    """Saves into a workdir, keeping the last `keep` checkpoints, and the best by validation if asked."""

    def __init__(self, workdir: epath.Path, *, keep: int, keep_best: bool):
        policies = [checkpoint_managers.LatestN(keep)]
        if keep_best:
            policies.append(checkpoint_managers.BestN(get_metric_fn=_validation, reverse=True, n=1))
        self._workdir, self._step = workdir, 0
        self._manager = ocp.CheckpointManager(directory_of(workdir), options=ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies), best_fn=_validation,
            best_mode="min", enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums)))

    def save(self, step: int, state: "TrainState", progress: dict, validation: float | None) -> None:
        """Starts saving; returns once the state has been copied and may be donated.

        Raises:
          CheckpointError: this checkpoint, or the one before, cannot be written.
        """
        items = {"params": ocp.args.StandardSave(named(state.params)),
                 "optimizer": ocp.args.StandardSave(named(state.opt_state)),
                 "progress": ocp.args.JsonSave(progress)}
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(named(state.ema))
        # A checkpoint without validation counts as the worst, so that it is never kept for being the best.
        metrics = {"validation": math.inf if validation is None else validation}
        self.wait()
        self._step = step
        if not (self._workdir / "config.json").exists():  # Orbax would make the folder anew, with no run around it
            raise CheckpointError(f"the checkpoint of step {step} cannot be written: {self._workdir} is gone or "
                                  "damaged (no config.json), and the run with it")
        self._attempt(lambda: self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics))

    def wait(self) -> None:
        """Returns when everything started is on disk.

        Raises:
          CheckpointError: it cannot be written.
        """
        self._attempt(self._manager.wait_until_finished)

    def close(self) -> None:
        """To be called after `wait`, which tells of failures; where it was not, something else has failed already."""
        with contextlib.suppress(*_FAILURES):
            self._manager.close()

    def _attempt(self, write: Callable[[], object]) -> None:
        try:
            write()
        except _FAILURES as error:
            last = max(saved_steps(self._workdir), default=None)
            rest = "nothing has been saved yet" if last is None else f"the checkpoint of step {last} is whole"
            raise CheckpointError(
                f"the checkpoint of step {self._step} cannot be written into {directory_of(self._workdir)} "
                f"({_first_line(error)}); {rest}; make room there, and the same command goes on from it") from error

    def _write_checksums(self) -> None:
        """Called in the background when all files of the step are there, before they are committed."""
        step = str(self._step)
        for path in directory_of(self._workdir).iterdir():
            if path.name == step or path.name.startswith(f"{step}.orbax-checkpoint-tmp"):
                write_checksums(path)


def directory_of(workdir: epath.PathLike) -> epath.Path:
    workdir = epath.Path(workdir)
    return (workdir if is_remote(workdir) else workdir.absolute()) / "checkpoints"


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """The steps with a complete checkpoint, ascending."""
    directory = directory_of(workdir)
    if not directory.is_dir():
        return []
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(directory))


def latest_valid_step(workdir: epath.PathLike) -> tuple[int, list[str]]:
    """The newest step whose files are as they were written, 0 where there is none, and what is wrong with newer ones.

    Raises:
      CheckpointError: there are checkpoints, and none is sound.
    """
    remarks: list[str] = []
    for step in reversed(saved_steps(workdir)):
        found = verify_checksums(directory_of(workdir) / str(step))
        if found is None:
            return step, remarks
        remarks.append(f"the checkpoint of step {step} is damaged ({found})")
    if remarks:
        raise CheckpointError(f"no checkpoint in {directory_of(workdir)} can be trusted: {'; '.join(remarks)}; restore "
                              "one from a copy, or choose a new workdir")
    return 0, []


def restore_latest(workdir: epath.PathLike) -> tuple[int, list[str]]:
    """As `latest_valid_step`, alike in all processes; moves newer, damaged ones out of the way, into `damaged/`."""

    def settle() -> tuple[int, list[str]]:
        first, remarks = latest_valid_step(workdir)
        for step in saved_steps(workdir):
            if step > first:
                names = (epath.Path(workdir) / "damaged" / f"{step}-{number}" for number in itertools.count(1))
                move(directory_of(workdir) / str(step), next(name for name in names if not name.exists()))
        return first, remarks

    first, remarks = broadcast_from_process_zero(settle)
    return first, remarks


def best_step(workdir: epath.PathLike) -> int | None:
    """The step with the lowest validation loss among those saved."""
    scores = {}
    for step in saved_steps(workdir):
        path = directory_of(workdir) / str(step) / "metrics" / "metrics"
        try:
            scores[step] = _validation(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError):  # of a damaged checkpoint nothing can be said
            scores[step] = math.inf
    scores = {step: score for step, score in scores.items() if math.isfinite(score)}
    return min(scores, key=scores.get, default=None)


def restore_state(workdir: epath.PathLike, step: int, layout: "TrainState",
                  frozen: nnx.State | None = None) -> tuple["TrainState", dict]:
    """The state of a step in the shardings of `layout` (shapes with shardings), and its progress.

    `frozen` is what no checkpoint holds; None where there is nothing of the kind.
    The files are taken to be sound, as `restore_latest` has found them.
    """
    ema = None if layout.ema is None else _restore(workdir, step, "ema", layout.ema)
    state = dataclasses.replace(
        layout, step=jax.device_put(jnp.int32(step), layout.step.sharding),
                       params=_restore(workdir, step, "params", layout.params),
                       opt_state=_restore(workdir, step, "optimizer", layout.opt_state), ema=ema,
                       frozen=jax.device_put(nnx.State({}) if frozen is None else frozen,
                                             jax.tree.map(lambda leaf: leaf.sharding, layout.frozen)))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return state, reader.restore(directory_of(workdir) / str(step) / "progress")


def restore_params(workdir: epath.PathLike, step: int, layout: object) -> object:
    """The parameters for inference, where their files are sound: the moving average where the run kept one."""
    directory = _existing(workdir, step)
    item = "ema" if (directory / "ema").exists() else "params"
    if found := verify_checksums(directory, [item]):
        raise CheckpointError(f"the checkpoint {directory} is damaged: {found}; name another of its steps as "
                              f"{workdir}@STEP, or restore it from a copy")
    return _restore(workdir, step, item, layout)


def _restore(workdir: epath.PathLike, step: int, item: str, layout: object) -> object:
    path = _existing(workdir, step) / item
    try:
        with ocp.StandardCheckpointer() as reader:
            return from_named(layout, reader.restore(path, named(layout)))
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read into this model: {_first_line(error)}") from error


def _existing(workdir: epath.PathLike, step: int) -> epath.Path:
    steps = saved_steps(workdir)
    if step not in steps:
        raise CheckpointError(f"{workdir} has no checkpoint of step {step}; it has "
                              f"{', '.join(map(str, steps)) or 'none'}")
    return directory_of(workdir) / str(step)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


def _validation(metrics: dict[str, float]) -> float:
    return metrics["validation"]
