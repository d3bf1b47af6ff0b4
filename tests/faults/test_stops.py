"""Signals, lost workdirs and full disks: one sentence, and the run resumes where it was."""

import os
import shutil
import signal
import subprocess

import pytest

from dlm_jax.checkpoints.orbax import saved_steps
from dlm_jax.cli.main import main
from tests.faults.runs import ended, last_step, records, wait_for


def reports(err: str) -> list[str]:
    """Returns what the command itself says; tensorstore may say more."""
    return [line for line in err.splitlines() if line.startswith("dlm train: ")]


def test_sigterm_saves_and_a_lost_workdir_ends_the_resumed_run(runs, tmp_path):
    workdir, endless = tmp_path / "run", {"num_steps": 100_000}
    process = runs.start(workdir, checkpoint__every=1000, **endless)
    wait_for(lambda: records(workdir)[1:], process)
    process.send_signal(signal.SIGTERM)
    code, out, _ = ended(process)
    stopped = last_step(workdir)
    assert code == 75 and f"stopped by SIGTERM after step {stopped};" in out and stopped >= 4

    process = runs.start(workdir, **endless)
    wait_for(lambda: last_step(workdir) > stopped, process)
    shutil.rmtree(workdir, ignore_errors=True)
    code, out, err = ended(process)
    assert f"resumed    from step {stopped}" in out
    said, = reports(err)
    assert code == 1 and "cannot be written" in said


def test_workdir_that_cannot_be_created(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", f"--config={runs.recipe}", f"--workdir={tmp_path}/file/run"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("dlm train: ") and err.count("\n") == 1 and f"{tmp_path}/file" in err


@pytest.mark.slow
def test_full_disk_costs_no_checkpoint(runs, tmp_path):
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
        said, = reports(err)
        assert code == 1 and f"{disk}/run" in said
        steps = saved_steps(disk / "run")
        assert steps
        (disk / "ballast").unlink()
        code, out, err = runs.run(disk / "run", num_steps=steps[-1] + 4)
        assert code == 0 and f"resumed    from step {steps[-1]}" in out, err
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_no_job_for_processes_to_join(runs, tmp_path):
    code, _, err = runs.run(tmp_path / "run", "--coordinator=auto")
    assert code == 1 and err.startswith("dlm train: ") and err.count("\n") == 1 and not (tmp_path / "run").exists()
