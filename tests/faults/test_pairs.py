"""Two processes of four devices, over the loopback: the same run as one process, and the loss of one of them."""

import itertools
import json
import os
import signal
import time
from pathlib import Path

import pytest

from dlm_jax.training.metrics import read_records
from tests.faults.runs import ended, last_step, records, wait_for

pytestmark = pytest.mark.slow


def test_two_processes_are_the_run_of_one(runs, tmp_path):
    code, _, err = runs.run(tmp_path / "one", devices=8, log__sample_every=20, log__sample_steps=4)
    assert code == 0, err
    results = [ended(process) for process in runs.pair(tmp_path / "two", log__sample_every=20, log__sample_steps=4)]
    assert [code for code, *_ in results] == [0, 0], results
    assert "step      20" in results[0][1] and not printed(results[1][1])  # only the first reports
    expected, found = records(tmp_path / "one"), records(tmp_path / "two")
    assert len(expected) == len(found) > 5
    for one, two in zip(expected, found, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), (name, one, two)
    code, out, err = runs.run(tmp_path / "two", num_steps=24)  # resumed by one process of one device
    assert code == 0 and "resumed    from step 20" in out, err


def test_two_processes_generate_answers_and_learn_blocks(runs, tmp_path):
    """Held-out examples are sampled over all devices, and each process has all answers."""
    lines = [{"prompt": f"{a}{b}{c}", "response": "cafe"} for a, b, c in itertools.product("abcdef", repeat=3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = {"data__train": tmp_path / "pairs.jsonl", "data__document_separator": "", "objective__anneal_steps": 0,
                "data__examples__format": "prompt_response", "data__examples__separator": "h", "num_steps": 8,
                "validation__num_generations": 8, "objective__name": "block_diffusion", "objective__block_size": 4}
    code, _, err = runs.run(tmp_path / "one", devices=8, **settings)
    assert code == 0, err
    results = [ended(process) for process in runs.pair(tmp_path / "two", **settings)]
    assert [code for code, *_ in results] == [0, 0], results
    one, two = (read_records(tmp_path / name, "generation") for name in ("one", "two"))
    assert one == two and [record["step"] for record in one] == [0, 8]


def test_slurm(runs, tmp_path):
    results = [ended(process) for process in runs.pair(tmp_path / "run", slurm=True, num_steps=4)]
    assert [code for code, *_ in results] == [0, 0], results
    assert "devices    8 x cpu" in results[0][1] and not printed(results[1][1])


def test_signal_to_one_stops_both_at_the_same_step(runs, tmp_path):
    first, second = runs.pair(tmp_path / "run", num_steps=100_000, checkpoint__every=100_000)
    wait_for(lambda: read_records(tmp_path / "run", "train"), first)
    for _ in range(2):  # a batch system may send it to parent and child
        second.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    (code, out, _), (other, _, _) = ended(first), ended(second)
    assert (code, other) == (75, 75)
    assert f"stopped by SIGTERM after step {last_step(tmp_path / 'run')};" in out


@pytest.mark.parametrize("lost", [0, 1])
def test_losing_one_process_ends_the_other(runs, tmp_path, lost):
    pair = runs.pair(tmp_path / "run", num_steps=100_000)
    wait_for(lambda: last_step(tmp_path / "run"), pair[0])
    saved = last_step(tmp_path / "run")
    pair[lost].send_signal(signal.SIGKILL)  # the parent; its child notices
    code, *_ = ended(pair[1 - lost])
    assert code in (75, 76)
    ended(pair[lost])
    assert last_step(tmp_path / "run") >= saved


@pytest.mark.parametrize("lost", [0, 1])
def test_dying_process_ends_the_other(runs, tmp_path, lost):
    pair = runs.pair(tmp_path / "run", num_steps=100_000)
    wait_for(lambda: last_step(tmp_path / "run"), pair[0])
    child, = (int(pid) for pid in children(pair[lost].pid))
    os.kill(child, signal.SIGKILL)
    code, _, err = ended(pair[lost])
    assert code == 128 + signal.SIGKILL and "SIGKILL" in err
    code, _, err = ended(pair[1 - lost])
    assert code == 76 and "start all processes again" in err
    results = [ended(process) for process in runs.pair(tmp_path / "run", num_steps=last_step(tmp_path / "run") + 4)]
    assert [code for code, *_ in results] == [0, 0]


def printed(out: str) -> list[str]:
    """The lines without those of the library for collectives on CPUs."""
    return [line for line in out.splitlines() if not line.startswith("[Gloo]")]


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
