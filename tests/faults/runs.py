"""Starts runs of the command line in processes of their own, for faults to be injected."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

from dlm_jax.checkpoints.orbax import saved_steps
from dlm_jax.training import read_records
from tests.training.conftest import checkpoint_arrays

TIMING = ("tokens_per_second", "seconds_per_step", "slowest_step_seconds", "data_stall", "peak_memory_gib")
_SETTINGS = {
    "seed": 3, "num_steps": 20, "model.init": "random", "model.mask_token": "<mask>", "data.length": 16,
    "data.batch_size": 16, "data.validation_fraction": 0.2, "data.document_separator": "\n\n",
    "objective.anneal_steps": 8, "optimizer.learning_rate": 3e-3, "optimizer.warmup_steps": 2,
    "optimizer.schedule": "constant", "optimizer.ema_decay": 0.9, "optimizer.accumulate_steps": 2,
    "checkpoint.every": 4, "checkpoint.keep_best": False, "validation.every": 8, "validation.num_rows": 20,
    "validation.num_samples": 2, "log.every": 4, "log.tensorboard": False,
}


class Runs:
    """Starts `dlm train` on a tiny model and a tiny corpus."""

    def __init__(self, base: pathlib.Path, corpus: pathlib.Path, folder: pathlib.Path):
        self.base, self.corpus, self.folder = base, corpus, folder
        self.recipe = folder / "recipe.py"
        settings = _SETTINGS | {"model.source": str(base), "data.train": (str(corpus),),
                                "data.cache_dir": str(folder / "rows")}
        lines = [f"    config.{key} = {value!r}" for key, value in settings.items()]
        self.recipe.write_text("from dlm_jax.cli.config import train_defaults\n\n\ndef get_config():\n"
                               "    config = train_defaults()\n" + "\n".join(lines) + "\n    return config\n")

    def start(self, workdir: pathlib.Path, *arguments: str, devices: int = 1, environment: dict[str, str] | None = None,
              **settings: object) -> subprocess.Popen:
        environment = os.environ | (environment or {}) | {
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        overrides = [f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items()]
        return subprocess.Popen(
            [sys.executable, "-m", "dlm_jax.cli.main", "train", f"--config={self.recipe}", f"--workdir={workdir}",
             *arguments, *overrides], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def run(self, workdir: pathlib.Path, *arguments: str, **settings: object) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        return ended(self.start(workdir, *arguments, **settings))

    def pair(self, workdir: pathlib.Path, *, slurm: bool = False, **settings: object) -> list[subprocess.Popen]:
        """Starts two processes of four devices as one run; with `slurm` they find each other by its variables."""
        if slurm:
            job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
            return [self.start(workdir, "--coordinator=auto", devices=4, environment=job | {
                "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}, **settings) for i in range(2)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [self.start(workdir, f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}",
                           "--heartbeat_seconds=10", devices=4, **settings) for i in range(2)]


def ended(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str, str]:
    """Waits for the end; returns exit status, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"still running after {seconds} s:\n{out}\n{err}") from None
    return process.returncode, out, err


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)


def records(workdir: pathlib.Path) -> list[dict]:
    """All records without what depends on the clock."""
    return [{k: v for k, v in record.items() if k not in TIMING} for record in read_records(workdir)]


def arrays(workdir: pathlib.Path, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint by name."""
    return {name: value.tobytes() for name, value in checkpoint_arrays(workdir, step).items()}


def last_step(workdir: pathlib.Path) -> int:
    return max(saved_steps(workdir), default=0)
