"""A trace of given steps, for TensorBoard or Perfetto, and how much memory the devices have used."""

import pathlib
import shutil
import tempfile
from collections.abc import Sequence

import jax
from etils import epath

from dlm_jax.storage import is_remote, upload


class Profile:
    """Writes what happens from the first to the last of `steps` into `workdir/profile`; of () nothing."""

    def __init__(self, workdir: epath.Path, steps: Sequence[int]):
        self._folder, self._steps, self._running = workdir / "profile", steps, False

    def before(self, step: int) -> None:
        """To be called before a step is dispatched."""
        if self._steps and step == self._steps[0]:
            self._local = pathlib.Path(tempfile.mkdtemp() if is_remote(self._folder) else self._folder)
            jax.profiler.start_trace(str(self._local))
            self._running = True

    def after(self, step: int, state: object) -> bool:
        """To be called when it has been, with what it gives; whether a trace has just been written."""
        if not self._running or step < self._steps[1]:
            return False
        jax.block_until_ready(state)
        self.close()
        return True

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            if is_remote(self._folder):
                upload(self._local, self._folder)
                shutil.rmtree(self._local)


def peak_memory_gib() -> float | None:
    """The most memory that any device of this process has used so far, in GiB; None where none tells (CPUs)."""
    peaks = [stats["peak_bytes_in_use"] for device in jax.local_devices()
             if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats]
    return max(peaks) / (1 << 30) if peaks else None
