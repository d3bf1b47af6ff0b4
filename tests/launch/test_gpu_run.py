"""`launch/gpu_run.sh` against stand-ins of nvidia-smi and Python."""

import shlex
import signal
import subprocess

import pytest

LOCAL = ("--", "--config=diffugpt_s", "--workdir=any://run")


@pytest.fixture
def host(cloud):
    """A host with two GPUs, both seen by JAX."""
    here = cloud()
    (here.standin / "bin/python3").symlink_to(here.standin / "worker-bin/python3")
    here.gpus = {"STANDIN_GPUS": "2", "STANDIN_DEVICES": "2"}
    return here


def test_trains_on_all_gpus(host):
    odd = "--config.name=it's  a \"name\" $HOME"
    done = host.run("gpu_run.sh", *LOCAL, odd, environment=host.gpus)
    assert "H100" in done.stdout and "step 10" in done.stdout
    assert host.arguments() == [*LOCAL[1:], odd]
    environment = (host.standin / "environment-0-0-1").read_text()
    assert "XLA_CLIENT_MEM_FRACTION=0.92" in environment and "latency_hiding_scheduler=true" in environment
    assert "deterministic" not in environment
    assert ".[cuda]" in (host.standin / "pip").read_text()


def test_settings_of_the_user_win(host):
    chosen = {**host.gpus, "XLA_FLAGS": "--xla_mine=1", "XLA_CLIENT_MEM_FRACTION": "0.5", "STANDIN_DEVICES": "1",
              "CUDA_VISIBLE_DEVICES": "1"}
    host.run("gpu_run.sh", "--deterministic", *LOCAL, environment=chosen)
    environment = (host.standin / "environment-0-0-1").read_text()
    assert "XLA_CLIENT_MEM_FRACTION=0.5\n" in environment
    assert "--xla_gpu_deterministic_ops=true --xla_mine=1\n" in environment


@pytest.mark.parametrize(("codes", "starts", "code"), [
    ((75, 76, 137), 4, 0), ((1,), 1, 1), ((2,), 1, 2), ((137, 137, 139), 3, 139)], ids=str)
def test_restarts_by_exit_code(host, codes, starts, code):
    host.plan("0/0", *[f"exit {each} 1 no text" for each in codes])
    done = host.run("gpu_run.sh", "--max_restarts=3" if code == 0 else "--max_restarts=2", *LOCAL, code=code,
                    environment=host.gpus)
    assert host.starts() == starts
    assert "dlm train: no text" in done.stderr


@pytest.fixture
def sigint():
    """A shell cannot trap a signal that was ignored when it started, as SIGINT is where tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signal_reaches_the_training_and_does_not_restart_it(host, number, code):
    command = ["bash", str(host.checkout / "launch/gpu_run.sh"), *LOCAL, "--config.num_steps=200"]
    with subprocess.Popen(command, env=host.environment(**host.gpus), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as running:
        while "step 3" not in running.stdout.readline():
            pass
        running.send_signal(number)
        output, errors = running.communicate(timeout=20)
    assert running.returncode == code, errors
    assert host.starts() == 1 and ("saved" in output) == (code == 75)


def test_gpus_that_jax_does_not_see_are_reported(host):
    assert "nvidia-smi" in host.run("gpu_run.sh", *LOCAL, code=1).stderr
    blind = host.run("gpu_run.sh", *LOCAL, code=1, environment={**host.gpus, "STANDIN_DEVICES": "0"})
    assert "JAX sees 0 of 2 GPUs" in blind.stderr
    assert not host.starts()


def test_dry_run_and_wrong_arguments(host):
    done = host.run("gpu_run.sh", "--dry-run", *LOCAL)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["nvidia-smi", "bash", "export", "dlm"] and not host.starts()
    assert lines[-1] == ["dlm", "train", *LOCAL[1:]]
    for arguments, mentions in [((), "nothing to train"), (("--config=c",), "--config"),
                                (("--max_restarts=x", *LOCAL), "--max_restarts"), (("--", "--config=c"), "--workdir=")]:
        assert mentions in host.run("gpu_run.sh", *arguments, code=2).stderr
