"""Checkpoints: written by Orbax in the background, readable without optimizer or mesh.

A step's directory holds separate items: `params`, `optimizer`, `ema` where there is one, and `progress`
(JSON). Arrays are stored by plain dotted names, so that no class of this library is part of the format.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from dlm_jax.errors import CheckpointError
from dlm_jax.training.state import TrainState


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

    def __init__(self, workdir: Path, *, keep: int, keep_best: bool):
        policies = [checkpoint_managers.LatestN(keep)]
        if keep_best:
            policies.append(checkpoint_managers.BestN(get_metric_fn=_validation, reverse=True, n=1))
        self._manager = ocp.CheckpointManager(directory_of(workdir), options=ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies), best_fn=_validation,
            best_mode="min", enable_async_checkpointing=True))

    def save(self, step: int, state: TrainState, progress: dict, validation: float | None) -> None:
        """Starts saving; returns once the state has been copied and may be donated."""
        items = {"params": ocp.args.StandardSave(named(state.params)),
                 "optimizer": ocp.args.StandardSave(named(state.opt_state)),
                 "progress": ocp.args.JsonSave(progress)}
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(named(state.ema))
        # A checkpoint without validation counts as the worst, so that it is never kept for being the best.
        metrics = {"validation": math.inf if validation is None else validation}
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def wait(self) -> None:
        """Returns when everything started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def directory_of(workdir: Path) -> Path:
    return Path(workdir).absolute() / "checkpoints"


def saved_steps(workdir: Path) -> list[int]:
    """The steps with a complete checkpoint, ascending."""
    directory = directory_of(workdir)
    if not directory.is_dir():
        return []
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(directory))


def best_step(workdir: Path) -> int | None:
    """The step with the lowest validation loss among those saved."""
    scores = {}
    for step in saved_steps(workdir):
        path = directory_of(workdir) / str(step) / "metrics" / "metrics"
        scores[step] = _validation(json.loads(path.read_text())) if path.is_file() else math.inf
    scores = {step: score for step, score in scores.items() if math.isfinite(score)}
    return min(scores, key=scores.get, default=None)


def restore_state(workdir: Path, step: int, layout: TrainState) -> tuple[TrainState, dict]:
    """The state of a step in the shardings of `layout` (shapes with shardings), and its progress."""
    ema = None if layout.ema is None else _restore(workdir, step, "ema", layout.ema)
    state = TrainState(step=jax.device_put(jnp.int32(step), layout.step.sharding),
                       params=_restore(workdir, step, "params", layout.params),
                       opt_state=_restore(workdir, step, "optimizer", layout.opt_state), ema=ema)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return state, reader.restore(directory_of(workdir) / str(step) / "progress")


def restore_params(workdir: Path, step: int, layout: object) -> object:
    """The parameters for inference: the moving average where the run kept one."""
    item = "ema" if (directory_of(workdir) / str(step) / "ema").exists() else "params"
    return _restore(workdir, step, item, layout)


def _restore(workdir: Path, step: int, item: str, layout: object) -> object:
    steps = saved_steps(workdir)
    if step not in steps:
        raise CheckpointError(f"{workdir} has no checkpoint of step {step}; it has "
                              f"{', '.join(map(str, steps)) or 'none'}")
    path = directory_of(workdir) / str(step) / item
    try:
        with ocp.StandardCheckpointer() as reader:
            return from_named(layout, reader.restore(path, named(layout)))
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(f"{path} cannot be read into this model: {reason[0] if reason else error!r}") from error


def _validation(metrics: dict[str, float]) -> float:
    return metrics["validation"]
