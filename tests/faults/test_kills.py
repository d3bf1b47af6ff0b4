"""A run that is killed again and again, at random moments and while it saves, ends as the uninterrupted run."""

import os
import random
import signal
import subprocess
import time

import pytest

from tests.faults.runs import arrays, ended, last_step, records, wait_for

KILLS, STEPS = 24, 500
SETTINGS = {"num_steps": STEPS, "checkpoint__every": 5, "validation__every": 200}


@pytest.mark.slow
def test_killed_run_resumes_exactly(runs, tmp_path):
    start, process = time.monotonic(), runs.start(tmp_path / "full", **SETTINGS)
    wait_for(lambda: last_step(tmp_path / "full") > 0, process)
    startup = time.monotonic() - start  # on this machine, first five steps included
    code, _, err = ended(process, 400)
    assert code == 0, err
    ten_steps = (time.monotonic() - start - startup) / (STEPS / 10)
    workdir, rng, caught_saving, lives = tmp_path / "run", random.Random(0), 0, []
    for kill in range(KILLS):
        before = last_step(workdir)
        process = runs.start(workdir, **SETTINGS)
        if kill % 3 == 0:  # while it saves
            wait_for(lambda: is_saving(workdir), process)
            time.sleep(rng.uniform(0, 0.03))
        elif kill % 3 == 1:  # some time after it has resumed
            wait_for(lambda before=before: last_step(workdir) > before, process)
            time.sleep(rng.uniform(0, ten_steps))
        else:  # at any time, before the first step too
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, startup + ten_steps))
        caught_saving += is_saving(workdir)
        process.send_signal(signal.SIGKILL)
        out, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, "it finished before it could be killed"
        assert last_step(workdir) >= before
        lives.append((before, out))
    for before, out in lives:
        if "objective" in out:
            assert ("resumed" in out) == (before > 0) and (not before or f"resumed    from step {before}\n" in out)
    code, _, err = ended(runs.start(workdir, **SETTINGS), 400)
    assert code == 0, err
    assert caught_saving >= KILLS // 4
    assert records(workdir) == records(tmp_path / "full")
    assert arrays(workdir, STEPS) == arrays(tmp_path / "full", STEPS)
    assert not is_saving(workdir)


def is_saving(workdir) -> bool:
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(".orbax-checkpoint-tmp" in name for name in os.listdir(folder))
