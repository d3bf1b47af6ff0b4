"""`launch/slurm.sbatch` against stand-ins of srun, squeue and scontrol."""

import re

import pytest

from tests.launch.stand_in_cloud import ROOT

TRAIN = ("--config=diffugpt_s", "--workdir=any://run", "--config.name=a 'b'  c")


@pytest.fixture
def job(cloud):
    """Job 17 on one node with two GPUs, submitted from the checkout."""
    here = cloud()
    (here.standin / "bin/python3").symlink_to(here.standin / "worker-bin/python3")
    settings = {"SLURM_SUBMIT_DIR": str(here.checkout), "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "dlm",
                "SLURM_GPUS_ON_NODE": "2", "SLURM_NTASKS_PER_NODE": "2", "STANDIN_TASKS": "2"}

    def submit(*arguments, code=0, **more):
        return here.run("slurm.sbatch", *arguments, code=code, environment={**settings, **more})

    here.submit = submit
    here.requeued = lambda: (here.standin / "scontrol").exists()
    return here


def test_one_process_per_gpu(job):
    job.submit(*TRAIN)
    for worker in ("0/0", "0/1"):
        assert job.arguments(worker) == ["--coordinator=auto", *TRAIN]
    assert not job.requeued() and not list(job.checkout.glob("*.codes"))


def test_stopped_or_killed_job_is_requeued(job):
    job.plan("0/0", "exit 75 1", "exit 137 1", "exit 76 1", "exit 75 1")
    assert "restart 1 of 10" in job.submit(*TRAIN).stderr
    assert (job.standin / "scontrol").read_text() == "requeue 17\n"
    job.submit(*TRAIN, SLURM_RESTART_COUNT="9")
    (job.standin / "scontrol").unlink()
    job.submit(*TRAIN, SLURM_RESTART_COUNT="10", code=76)
    job.submit(*TRAIN, STANDIN_JOB_STATE="COMPLETING", code=75)  # scancel
    assert not job.requeued()


def test_failed_training_is_not_requeued(job):
    job.plan("0/1", "exit 1 1 there is no such file")
    job.plan("0/0", "exit 76 2")
    assert "ended with 1 " in job.submit(*TRAIN, code=1).stderr
    assert not job.requeued()


def test_wrong_arguments_are_reported(job):
    assert "--ntasks-per-node=1" in job.submit(*TRAIN, SLURM_NTASKS_PER_NODE="1", code=2).stderr
    assert "--config=RECIPE" in job.submit("--workdir=x", code=2).stderr
    assert str(job.standin) in job.submit(*TRAIN, SLURM_SUBMIT_DIR=str(job.standin), code=2).stderr
    assert not job.starts()


def test_slurm_options():
    options = re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", (ROOT / "launch/slurm.sbatch").read_text(), re.MULTILINE)
    expected = {"signal": "TERM@300", "requeue": "", "open-mode": "append", "output": "%x-%j.log"}
    assert expected.items() <= dict(options).items()
