"""Checkpoints of a run, written by Orbax in the background and readable without optimizer or mesh.

A step's directory holds the items `params`, `optimizer`, `ema` if there is one, and `progress` (JSON), and the SHA-256
of all their files, which are written before Orbax commits the step: Orbax restores a flipped bit without an error.
Arrays are stored by dotted names, so no class of this library belongs to the format. A directory gets its final name
(on an object store its commit file) when it is complete.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from orbax.checkpoint import checkpoint_managers

from dlm_jax.errors import CheckpointError
from dlm_jax.parallel import broadcast_from_process_zero
from dlm_jax.storage import files_below, is_remote, move

CHECKSUMS = "checksums.json"
_THREADS = 8  # hashing and reading release the GIL
# Orbax writes these once more when it commits; no array depends on them.
_NOT_DATA = (CHECKSUMS, "_CHECKPOINT_METADATA", "commit_success.txt")
_WRITE_ERRORS = (OSError, ValueError, RuntimeError)  # of Orbax, if something cannot be written


class SavedState(Protocol):
    """The state of a run: a dataclass of arrays, of which `frozen` is not saved, and `ema` may be None."""

    step: jax.Array
    params: nnx.State
    opt_state: object
    ema: nnx.State | None
    frozen: object


def named(tree: object) -> dict[str, object]:
    """Returns the leaves of a tree by dotted names, such as `blocks.attention.q.kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
            for path, leaf in leaves}


def from_named(like: object, leaves: dict[str, object]) -> object:
    """Inverts `named`, for a tree of the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in named(like)])


class CheckpointWriter:
    """Saves into a workdir; keeps the last `keep` checkpoints, and with `keep_best` that of lowest validation loss."""

    def __init__(self, workdir: epath.Path, *, keep: int, keep_best: bool):
        policies = [checkpoint_managers.LatestN(keep)]
        if keep_best:
            policies.append(checkpoint_managers.BestN(get_metric_fn=_validation, reverse=True, n=1))
        self._workdir, self._step = workdir, 0
        self._manager = ocp.CheckpointManager(checkpoint_directory(workdir), options=ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies), best_fn=_validation,
            best_mode="min", enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums)))

    def save(self, step: int, state: SavedState, progress: dict, validation: float | None) -> None:
        """Starts saving; returns once the state has been copied and may be donated.

        Raises:
          CheckpointError: this checkpoint, or the one before, cannot be written.
        """
        items = {"params": ocp.args.StandardSave(named(state.params)),
                 "optimizer": ocp.args.StandardSave(named(state.opt_state)),
                 "progress": ocp.args.JsonSave(progress)}
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(named(state.ema))
        # A checkpoint without validation counts as the worst.
        metrics = {"validation": math.inf if validation is None else validation}
        self.wait()
        self._step = step
        if not (self._workdir / "config.json").exists():  # Orbax would create the folder again, without the run
            raise CheckpointError(f"the checkpoint of step {step} cannot be written: {self._workdir} was removed or "
                                  "damaged (no config.json)")
        self._attempt(lambda: self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics))

    def wait(self) -> None:
        """Waits until everything is written; raises CheckpointError where it cannot be."""
        self._attempt(self._manager.wait_until_finished)

    def close(self) -> None:
        """Closes without an error: `wait` reports failures, and without it something else has failed already."""
        with contextlib.suppress(*_WRITE_ERRORS):
            self._manager.close()

    def _attempt(self, write: Callable[[], object]) -> None:
        try:
            write()
        except _WRITE_ERRORS as error:
            last = max(saved_steps(self._workdir), default=None)
            rest = "nothing has been saved yet" if last is None else f"the checkpoint of step {last} is complete"
            raise CheckpointError(
                f"the checkpoint of step {self._step} cannot be written into {checkpoint_directory(self._workdir)} "
                f"({_first_line(error)}); {rest}; free some space there; the same command continues from it") from error

    def _write_checksums(self) -> None:
        """Writes the checksums of a step in the background: its files are written, and Orbax has not committed it."""
        step = str(self._step)
        for path in checkpoint_directory(self._workdir).iterdir():
            if path.name == step or path.name.startswith(f"{step}.orbax-checkpoint-tmp"):
                write_checksums(path)


def checkpoint_directory(workdir: epath.PathLike) -> epath.Path:
    """Returns the absolute directory of a run's checkpoints."""
    workdir = epath.Path(workdir)
    return (workdir if is_remote(workdir) else workdir.absolute()) / "checkpoints"


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """Returns the steps with a complete checkpoint, ascending."""
    directory = checkpoint_directory(workdir)
    if not directory.is_dir():
        return []
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(directory))


def restore_latest(workdir: epath.PathLike) -> tuple[int, list[str]]:
    """Returns the latest step with valid checksums, 0 without checkpoints, and the damage of later ones.

    It is the same in all processes. Later checkpoints are moved into `damaged/`.

    Raises:
      CheckpointError: all checkpoints are damaged.
    """
    def move_damaged() -> tuple[int, list[str]]:
        steps, directory = saved_steps(workdir), checkpoint_directory(workdir)
        damage: dict[int, str] = {}
        for step in reversed(steps):
            if (found := verify_checksums(directory / str(step))) is None:
                break
            damage[step] = f"the checkpoint of step {step} is damaged ({found})"
        if damage and len(damage) == len(steps):
            raise CheckpointError(f"every checkpoint in {directory} is damaged: {'; '.join(damage.values())}; restore "
                                  "one from a copy, or choose a new workdir")
        for step in damage:
            names = (epath.Path(workdir) / "damaged" / f"{step}-{number}" for number in itertools.count(1))
            move(directory / str(step), next(name for name in names if not name.exists()))
        return max(set(steps) - damage.keys(), default=0), list(damage.values())

    first, remarks = broadcast_from_process_zero(move_damaged)
    return first, remarks


def best_step(workdir: epath.PathLike) -> int | None:
    """Returns the saved step with the lowest validation loss, None if no saved step has one."""
    scores = {}
    for step in saved_steps(workdir):
        path = checkpoint_directory(workdir) / str(step) / "metrics" / "metrics"
        try:
            scores[step] = _validation(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError):  # damaged
            scores[step] = math.inf
    scores = {step: score for step, score in scores.items() if math.isfinite(score)}
    return min(scores, key=scores.get, default=None)


def resolve_step(workdir: epath.PathLike, step: str | None) -> int:
    """Returns the step that "500", "best" (the lowest validation loss) or None (the latest) means.

    Raises:
      CheckpointError: there is no such checkpoint.
    """
    found = best_step(workdir) if step == "best" else max(saved_steps(workdir), default=None) if step is None else step
    if found is None:
        raise CheckpointError(f"{workdir} has no checkpoint" + " with a validation loss" * (step == "best"))
    return int(found)


def restore_state(workdir: epath.PathLike, step: int, layout: SavedState,
                  frozen: object = None) -> tuple[SavedState, dict]:
    """Restores the state of a step, whose checksums `restore_latest` has verified, and its progress.

    Args:
      layout: shapes and shardings of the state.
      frozen: the parameters that no checkpoint holds, in a tree as in `layout`; None without any.
    """
    ema = None if layout.ema is None else _restore(workdir, step, "ema", layout.ema)
    frozen = layout.frozen if frozen is None else jax.device_put(
        frozen, jax.tree.map(lambda leaf: leaf.sharding, layout.frozen))
    state = dataclasses.replace(
        layout, step=jax.device_put(jnp.int32(step), layout.step.sharding), ema=ema, frozen=frozen,
        params=_restore(workdir, step, "params", layout.params),
        opt_state=_restore(workdir, step, "optimizer", layout.opt_state))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return state, reader.restore(checkpoint_directory(workdir) / str(step) / "progress")


def restore_params(workdir: epath.PathLike, step: int, layout: object) -> object:
    """Restores the parameters for inference, the moving average if the run kept one; `layout` has shapes and shardings.

    Raises:
      CheckpointError: the checkpoint is missing or damaged, or does not fit `layout`.
    """
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
    return checkpoint_directory(workdir) / str(step)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


def _validation(metrics: dict[str, float]) -> float:
    return metrics["validation"]


def write_checksums(directory: epath.Path) -> None:
    """Writes the SHA-256 of every file below a checkpoint's directory into its `checksums.json`."""
    names = [name for name in files_below(directory) if name not in _NOT_DATA]
    (directory / CHECKSUMS).write_text(json.dumps(_sha256(directory, names), indent=0) + "\n")


def verify_checksums(directory: epath.Path, items: Iterable[str] | None = None) -> str | None:
    """Returns the damage of a checkpoint in a few words, or None; `items` limits the check to some of its folders."""
    try:
        recorded = json.loads((directory / CHECKSUMS).read_text())
        if not all(isinstance(checksum, str) for checksum in recorded.values()):
            return f"{CHECKSUMS} is damaged"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (ValueError, AttributeError):
        return f"{CHECKSUMS} is damaged"
    if items is not None:
        recorded = {name: checksum for name, checksum in recorded.items() if name.split("/")[0] in tuple(items)}
    for name in recorded:
        if not (directory / name).is_file():
            return f"{name} is missing"
    found = _sha256(directory, list(recorded))
    return next((f"{name} is not what was written" for name in recorded if found[name] != recorded[name]), None)


def _sha256(directory: epath.Path, names: list[str]) -> dict[str, str]:
    def checksum(name: str) -> str:
        with (directory / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(checksum, names), strict=True))
