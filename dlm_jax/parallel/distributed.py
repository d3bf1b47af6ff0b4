"""Several processes as one program: how they meet, how they agree, and when they are asked to stop."""

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
    """Makes this process one of several; to be called before anything touches a device.

    Args:
      coordinator: "auto" finds the others by what the surroundings tell (Cloud TPU, GKE, Slurm, Open MPI);
        HOST:PORT, the same in all of them, is where the first process listens.
      num_processes, process_id: how many there are and which this is, from 0; not for "auto".
      heartbeat_seconds: after this time without a sign of life from one process the runtime aborts all others;
        None: JAX's own default, 100.

    Raises:
      ConfigError: the arguments contradict each other, or the others were not found.
    """
    explicit = {} if coordinator == "auto" else {
        "coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    if coordinator == "auto" and (num_processes, process_id) != (None, None):
        raise ConfigError("the coordinator auto finds number and place of this process by itself; leave them out, or "
                          "name the coordinator as HOST:PORT")
    if None in explicit.values():
        raise ConfigError(f"the coordinator {coordinator} needs the number of processes and which of them this is")
    if explicit and not 0 <= process_id < num_processes:
        raise ConfigError(f"process {process_id} is none of {num_processes}; they are counted from 0")
    # On CPUs every collective of every device blocks a thread of XLA's, which has no more of them than there are cores
    # or devices: with few, processes wait for each other for ever. One program at a time, and threads to spare.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    os.environ.setdefault("NPROC", str(max(64, os.cpu_count() or 1)))
    if heartbeat_seconds is not None:
        explicit["heartbeat_timeout_seconds"] = heartbeat_seconds
    try:
        jax.distributed.initialize(**explicit)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if coordinator == "auto":
            reason = f"nothing here tells of a Cloud TPU, GKE, Slurm or Open MPI job ({reason})"
        raise ConfigError(f"this process cannot join the others at the coordinator {coordinator}: {reason}") from error


def broadcast_from_process_zero(compute: Callable[[], Any]) -> Any:
    """What `compute` gives in the first process, in all of them; something that JSON can carry.

    An error of this library is raised in all processes too, so that none waits for another.
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
    """Whether any process has received SIGTERM, all giving the same answer at the same step.

    JAX's runtime watches for the signal, as long as no handler of Python's has been set since the processes met.
    """
    return multihost_utils.reached_preemption_sync_point(step)
