"""Signals, lost workdirs and full disks: one sentence, and the run resumes where it was."""

import os
import shutil
import signal
import subprocess

import pytest

from dlm_jax.checkpoints.orbax import saved_steps
from tests.faults.runs import arrays, ended, last_step, records, wait_for


def test_sigterm_saves_and_resumes(runs, full_run, tmp_path):
    process = runs.start(tmp_path / "run", checkpoint__every=1000)
    wait_for(lambda: records(tmp_path / "run")[1:], process)
    process.send_signal(signal.SIGTERM)
    code, out, _ = ended(process)
    assert code == 75 and "stopped by SIGTERM after step" in out
    stopped = last_step(tmp_path / "run")
    assert 4 <= stopped < 20
    code, out, _ = runs.run(tmp_path / "run")
    assert code == 0 and f"resumed    from step {stopped}" in out
    assert arrays(tmp_path / "run", 20) == arrays(full_run, 20)


def test_workdir_that_cannot_be_created(runs, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = runs.run(tmp_path / "file" / "run")
    assert code == 1 and err.startswith("dlm train: ") and err.count("\n") == 1 and str(tmp_path / "file") in err


def test_workdir_that_vanishes(runs, tmp_path):
    process = runs.start(tmp_path / "run", num_steps=100_000)
    wait_for(lambda: last_step(tmp_path / "run"), process)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    code, _, err = ended(process)
    assert code == 1 and "cannot be written" in err and err.count("\n") == 1


@pytest.mark.slow
def test_full_disk_costs_no_checkpoint(runs, full_run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=False,
                                      capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        process = runs.start(disk / "run", checkpoint__every=2, num_steps=100_000)
        wait_for(lambda: last_step(disk / "run") >= 4, process)
        with pytest.raises(OSError, match="No space left"):
            (disk / "ballast").write_bytes(bytes(8 << 20))
        code, _, err = ended(process)
        said = [line for line in err.splitlines() if line.startswith("dlm train: ")]  # tensorstore may say more
        assert code == 1 and len(said) == 1 and "cannot be written" in said[0] and "make room" in said[0]
        steps = saved_steps(disk / "run")
        assert steps
        (disk / "ballast").unlink()
        code, out, err = runs.run(disk / "run", num_steps=steps[-1] + 4)
        assert code == 0 and f"resumed    from step {steps[-1]}" in out, err
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("coordinator", ["auto", "127.0.0.1:1"])
def test_processes_without_coordinator(runs, tmp_path, coordinator):
    code, _, err = runs.run(tmp_path / "run", f"--coordinator={coordinator}")
    assert code == 1 and err.startswith("dlm train: ") and err.count("\n") == 1 and not (tmp_path / "run").exists()
