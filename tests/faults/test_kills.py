"""A run killed again and again, at random moments and while it saves, ends as the one that nobody disturbed."""

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
def test_a_killed_run_goes_on_exactly(runs, tmp_path):
    begin, process = time.monotonic(), runs.start(tmp_path / "whole", **SETTINGS)
    wait_for(lambda: last_step(tmp_path / "whole") > 0, process)
    starting = time.monotonic() - begin  # as long as this machine takes, with its first five steps
    code, _, err = ended(process, 400)
    assert code == 0, err
    ten_steps = (time.monotonic() - begin - starting) / (STEPS / 10)
    workdir, dice, caught_saving, lives = tmp_path / "run", random.Random(0), 0, []
    for kill in range(KILLS):
        before = last_step(workdir)
        process = runs.start(workdir, **SETTINGS)
        if kill % 3 == 0:  # while it saves
            wait_for(lambda: is_saving(workdir), process)
            time.sleep(dice.uniform(0, 0.03))
        elif kill % 3 == 1:  # some time after it has gone on
            wait_for(lambda before=before: last_step(workdir) > before, process)
            time.sleep(dice.uniform(0, ten_steps))
        else:  # at any time, before the first step too
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(dice.uniform(0, starting + ten_steps))
        caught_saving += is_saving(workdir)
        process.send_signal(signal.SIGKILL)
        out, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
        assert last_step(workdir) >= before
        lives.append((before, out))
    for before, out in lives:
        if "objective" in out:
            assert ("resumed" in out) == (before > 0) and (not before or f"resumed    from step {before}\n" in out)
    code, _, err = ended(runs.start(workdir, **SETTINGS), 400)
    assert code == 0, err
    assert caught_saving >= KILLS // 4
    assert records(workdir) == records(tmp_path / "whole")
    assert arrays(workdir, STEPS) == arrays(tmp_path / "whole", STEPS)
    assert not is_saving(workdir)


def is_saving(workdir) -> bool:
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(".orbax-checkpoint-tmp" in name for name in os.listdir(folder))
