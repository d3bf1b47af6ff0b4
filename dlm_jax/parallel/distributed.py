"""Several processes as one program: connecting, agreeing on values, and noticing preemption."""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dlm_jax.errors import ConfigError, DLMError


def initialize_distributed(coordinator: str, num_processes: int | None = None, process_id: int | None = None,
                           heartbeat_seconds: int | None = None) -> None:
    """Connects this process to the others; call it before anything uses a device.

    Args:
      coordinator: "auto" finds the others through Cloud TPU, GKE, Slurm or Open MPI; HOST:PORT, the same in all
        processes, is where the first one listens.
      num_processes, process_id: their number, and this one's index from 0; not for "auto".
      heartbeat_seconds: after this time without a heartbeat from one process the runtime aborts all others; None:
        JAX's default, 100.

    Raises:
      ConfigError: the arguments contradict each other, or the others were not found.
    """
    explicit = {} if coordinator == "auto" else {
        "coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    if coordinator == "auto" and (num_processes, process_id) != (None, None):
        raise ConfigError("the coordinator auto finds num_processes and process_id by itself; omit them, or give the "
                          "coordinator as HOST:PORT")
    if None in explicit.values():
        raise ConfigError(f"the coordinator {coordinator} needs num_processes and process_id")
    if explicit and not 0 <= process_id < num_processes:
        raise ConfigError(f"process_id must be in 0 .. {num_processes - 1}, got {process_id}")
    # On CPUs every collective of every device blocks a thread of XLA's pool, which is as large as the number of cores
    # or devices: with few threads processes deadlock. So: one program at a time, and spare threads.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    os.environ.setdefault("NPROC", str(max(64, os.cpu_count() or 1)))
    if heartbeat_seconds is not None:
        explicit["heartbeat_timeout_seconds"] = heartbeat_seconds
    try:
        jax.distributed.initialize(**explicit)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if coordinator == "auto":
            reason = f"found no Cloud TPU, GKE, Slurm or Open MPI job ({reason})"
        raise ConfigError(f"this process cannot connect to the coordinator {coordinator}: {reason}") from error


def broadcast_from_process_zero(compute: Callable[[], Any]) -> Any:
    """Runs `compute` in the first process and returns its result, which must be JSON, in all of them.

    An error of this library is raised in all processes, so that none waits for another.
    """
    if jax.process_count() == 1:
        return compute()
    message, failure = {}, None
    if jax.process_index() == 0:
        try:
            message = {"value": compute()}
        except DLMError as error:
            message, failure = {"error": str(error)}, error
    content = np.frombuffer(json.dumps(message).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    sent = content if jax.process_index() == 0 else np.zeros(size, np.uint8)
    message = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8)))
    if "error" in message:
        raise failure or DLMError(message["error"])
    return message["value"]


def preemption_requested(step: int) -> bool:
    """Returns whether any process has received SIGTERM, the same in all processes at the same step.

    JAX's runtime catches the signal, unless a Python handler has been set since `initialize_distributed`.
    """
    return multihost_utils.reached_preemption_sync_point(step)
