"""`launch/tpu_run.sh` from create to delete, against a stand-in of gcloud that runs its commands in sandboxes."""

import os
import re
import shlex
import shutil
import subprocess
import time

import pytest

from tests.launch.stand_in_cloud import ROOT, TRAINING

SCRIPT = ROOT / "launch/tpu_run.sh"
POD, HOST = "--type=v5litepod-16", "--type=v6e-8"
HANG = "hang until 3"
LONG = ("--config.num_steps=1000",)  # does not end while the test looks
ODD = ["--config.data.train=a file with  spaces, and 'quotes' \"both\"", "--config.name=$HOME `date` \\ * ?\n!", "--e="]


def wait_for(step: int, running: subprocess.Popen) -> None:
    while f"step {step}\n" != running.stdout.readline():
        assert running.poll() is None


def test_new_tpu_is_created_and_reused(cloud):
    here = cloud(workers=2, states=["CREATING", "CREATING"])
    done = here.tpu(POD, "--project=p", "--spot", *TRAINING)
    assert done.stdout.splitlines() == [f"step {step}" for step in range(1, 11)]  # the log of worker 0, once
    assert "CREATING" in done.stderr and "--delete" in done.stderr
    again = here.tpu(POD, *TRAINING, "--config.num_steps=12", "--coordinator=host:1234", *ODD)
    assert "resumed at step 10" in again.stdout and "step 12" in again.stdout
    (create,) = here.calls("tpu-vm", "create")
    assert {"--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot", "--project=p"} <= set(create)
    for worker in ("0/0", "0/1"):
        assert here.arguments(worker) == ["--coordinator=auto", *TRAINING[1:]]
        assert here.arguments(worker, 2) == [*TRAINING[1:], "--config.num_steps=12", "--coordinator=host:1234", *ODD]
        assert (here.home(worker) / "dlm_jax/launch/tpu_run.sh").exists()
    installed = (here.standin / "pip").read_text()
    assert ".[tpu,gcs]" in installed and len(installed.splitlines()) == 4  # once per worker: --version, install


def test_preempted_tpu_is_created_again_and_training_resumes(cloud):
    here = cloud(workers=2, preempt_at=[3])
    here.plan("0/0", HANG)
    here.plan("0/1", HANG)
    done = here.tpu(POD, "--spot", *TRAINING)
    assert len(here.calls("tpu-vm", "create")) == 2 and len(here.calls("tpu-vm", "delete")) == 1
    assert here.starts() == here.starts("0/1") == 2 and here.arguments(start=1) == here.arguments(start=2)
    assert "resumed at step" in done.stdout and "step 10" in done.stdout and "PREEMPTED" in done.stderr


def test_creation_waits_for_capacity_and_reports_other_errors(cloud):
    here = cloud(create=["There is no more capacity in the zone here-a", ""])
    assert "v5litepod-16" in here.tpu(POD, *TRAINING).stderr
    here.tpu("--delete")
    here.plan_for(create=["", "", "Quota limit 'TPUV5sPodPerProject' has been exceeded"])
    refused = here.tpu(POD, *TRAINING, code=1)
    assert "Quota limit" in refused.stderr and "could not create my-tpu" in refused.stderr


def test_queued_resource(cloud):
    here = cloud(states=["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"], preempt_at=[3], gone="SUSPENDED")
    here.plan("0/0", HANG)
    done = here.tpu(HOST, "--queued", "--spot", "--delete_after", *TRAINING)
    create = here.calls("queued-resources", "create")
    assert len(create) == 2 and {"--node-id=my-tpu", "--runtime-version=v2-alpha-tpuv6e", "--spot"} <= set(create[0])
    assert all(state in done.stderr for state in ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "SUSPENDED"))
    assert "resumed at step" in done.stdout and here.world()["name"] is None
    here.plan_for(states=["ACCEPTED", "FAILED"])
    assert "describe my-tpu" in here.tpu(HOST, "--queued", *TRAINING, code=1).stderr
    assert len(here.calls("queued-resources", "create")) == 3


def test_slices_train_as_one(cloud):
    here = cloud(slices=2, workers=2)
    here.tpu("--type=v5p-16", "--slices=2", *TRAINING)
    (create,) = here.calls("queued-resources", "create")
    assert {"--node-count=2", "--node-prefix=my-tpu"} <= set(create)
    for worker in ("0/0", "0/1", "1/0", "1/1"):
        assert here.arguments(worker)[-1] == "--config.mesh.dcn_data=2"
    here.plan("1/1", "", "exit 137 2")
    killed = here.tpu("--type=v5p-16", "--slices=2", "--max_restarts=0", *TRAINING, *LONG, code=137)
    assert "worker 1/1 ended with 137 (killed by SIGKILL)" in killed.stderr


def test_restarts_by_exit_code(cloud):
    here = cloud(workers=2)
    here.plan("0/0", "exit 75 2", "exit 76 2", "exit 139 2")
    here.plan("0/1", HANG, HANG, HANG)
    done = here.tpu(POD, *TRAINING)
    assert here.starts() == here.starts("0/1") == 4
    assert "worker 0/0 ended with 75" in done.stderr and "worker 0/0 ended with 139 (killed by SIGSEGV)" in done.stderr
    assert "restart 3 of 10" in done.stderr and "step 10" in done.stdout
    assert "saved at step" in (here.home("0/1") / "dlm_run/log").read_text()  # the others were stopped by SIGTERM


def test_failures_and_the_limit_of_restarts_end_it(cloud):
    here = cloud(workers=2)
    here.plan("0/0", "exit 76 3", *["exit 137 2"] * 3)
    here.plan("0/1", "exit 1 2 --config.data.train=nowhere: there is no such file", *[HANG] * 3)
    done = here.tpu(POD, *TRAINING, code=1)
    assert "worker 0/1 ended with 1 " in done.stderr
    assert "0/1: dlm train: --config.data.train=nowhere: there is no such file" in done.stderr
    assert here.starts() == here.starts("0/1") == 1
    done = here.tpu(POD, "--max_restarts=1", "--delete_after", *TRAINING, code=137)
    assert here.starts() == 3 and "after 1 restarts" in done.stderr and here.world()["name"] is None


def test_unreachable_worker_stops_the_others_and_is_named(cloud):
    here = cloud(workers=3, unreachable={"0/2": [9, 99]})
    done = here.tpu(POD, *TRAINING, *LONG, code=1)
    assert "worker 0/2 cannot be reached" in done.stderr
    for worker in ("0/0", "0/1"):
        assert (here.home(worker) / "dlm_run/exit").read_text() == "75\n"


@pytest.mark.parametrize(("until", "code"), [(2, 0), (99, 1)])
def test_ssh_that_fails_at_first_is_tried_again(cloud, until, code):
    here = cloud(workers=2, unreachable={"0/1": [1, until]})
    done = here.tpu(POD, *TRAINING, code=code)
    assert here.starts("0/1") == 1 - code and ("failed on my-tpu with 255" in done.stderr) == (code == 1)


def test_failed_installation_is_reported_at_once(cloud):
    here = cloud()
    (here.standin / "pip-fails").touch()
    done = here.tpu(HOST, *TRAINING, code=1)
    assert "no matching distribution found" in done.stderr
    assert len([call for call in here.calls("tpu-vm", "ssh") if " install " in " ".join(call)]) == 1


def test_replaced_machine_is_set_up_again(cloud):
    here = cloud(workers=2)
    here.plan("0/0", HANG)
    here.plan("0/1", HANG)
    running = here.background(POD, *TRAINING)
    wait_for(3, running)
    here.close()
    shutil.rmtree(here.home("0/1"))
    here.home("0/1").mkdir()
    output, _ = running.communicate(timeout=30)
    assert running.returncode == 0 and "resumed at step" in output and "step 10" in output
    assert here.starts("0/1") >= 2 and len(here.calls("tpu-vm", "create")) == 1


def test_lost_connection_leaves_the_training_to_be_followed(cloud):
    here = cloud()
    here.plan("0/0", "exit 1 100 out of words")
    first = here.background(HOST, *TRAINING, *LONG)
    wait_for(1, first)
    first.kill()
    first.communicate()
    assert "dlm-worker 0/0 running" in here.tpu("--status").stdout
    assert "another training" in here.tpu(HOST, *TRAINING, "--config.seed=2", code=1).stderr
    assert here.starts() == 1
    assert "out of words" in here.tpu("--follow", code=1).stderr


def test_stop_saves_and_delete_deletes(cloud):
    here = cloud(workers=2)
    running = here.background(POD, *TRAINING, *LONG)
    wait_for(3, running)
    assert "--delete" in here.tpu("--stop").stderr
    running.communicate(timeout=20)
    assert running.returncode == 130 and here.starts() == 1  # who follows does not start it again
    status = here.tpu("--status").stdout
    assert all(each in status for each in ("0/0 exited 130", "0/1 exited 130", "saved at step"))
    here.tpu("--delete")
    assert here.world()["name"] is None and "no TPU my-tpu" in here.tpu("--delete").stderr
    assert "ABSENT" in here.tpu("--status", code=1).stderr


def test_repository_is_cloned_and_secrets_reach_the_training_alone(cloud, tmp_path):
    here = cloud()
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@here", "-C", str(here.checkout)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], text=True, capture_output=True, check=True).stdout.strip()
    (here.checkout / "later").touch()
    subprocess.run([*git, "add", "later"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message=later"], check=True)
    (tmp_path / "secrets").write_text("HF_TOKEN=hf_secret\n")
    done = here.tpu(HOST, f"--repo={here.checkout}", f"--commit={commit}", "--extras=tpu",
                    f"--env_file={tmp_path / 'secrets'}", *TRAINING)
    assert (here.home() / "dlm_jax/launch/lib.sh").exists() and not (here.home() / "dlm_jax/later").exists()
    assert "HF_TOKEN=hf_secret" in (here.standin / "environment-0-0-1").read_text()
    assert "hf_secret" not in done.stdout + done.stderr + (here.standin / "calls").read_text()
    assert (here.home() / "dlm_env_file").stat().st_mode & 0o077 == 0


def test_dry_run_prints_commands_that_can_be_pasted(cloud, tmp_path):
    here = cloud()
    done = here.tpu(POD, "--project=p", "--queued", "--delete_after", "--dry-run", *TRAINING, *ODD,
                    environment={"TMPDIR": str(tmp_path)})
    assert not here.calls() and not here.starts()
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    verbs = [" ".join(line[3:5]) for line in lines if line[:3] == ["gcloud", "compute", "tpus"]]
    assert verbs == ["queued-resources describe", "queued-resources create", "tpu-vm scp", *["tpu-vm ssh"] * 4,
                     "queued-resources describe", "queued-resources delete", "tpu-vm describe", "tpu-vm delete"]
    assert all(line[0] in ("gcloud", "git", "mkdir", "cp") for line in lines)
    # Pasted up to the start, without the description of a TPU that does not exist, they do what the script does.
    pasted = "\n".join(line for line in done.stdout.splitlines()[:8] if "describe" not in line)
    subprocess.run(["bash", "-e"], input=pasted, text=True, check=True, env=here.environment())
    while "step 10\n" not in (here.home() / "dlm_run/log").read_text():
        time.sleep(0.05)
    assert here.arguments() == ["--coordinator=auto", *TRAINING[1:], *ODD]
    count = len(here.calls())
    assert all("gcloud" in here.tpu(action, "--dry-run").stdout for action in ("--status", "--follow", "--stop"))
    assert len(here.calls()) == count


@pytest.mark.parametrize(("arguments", "mentions"), [
    (["--name=", POD, *TRAINING], "--name"),
    (TRAINING, "--type=''"),
    (["--type=h100-8", *TRAINING], "--type='h100-8'"),
    (["--name=My_TPU", POD, *TRAINING], "--name=My_TPU"),
    ([POD, "--sopt", *TRAINING], "--sopt"),
    ([POD, "--config=diffugpt_s"], "--config"),
    ([POD, "diffugpt_s"], "'diffugpt_s'"),
    ([POD, "--slices=two", *TRAINING], "--slices"),
    ([POD], "nothing to train"),
    ([POD, "--", "--workdir=gs://b/r"], "--config=RECIPE"),
    ([POD, "--", "--config=c"], "--workdir=DIR"),
    ([POD, "--", "--config=c", "--workdir=runs/a"], "--workdir=runs/a"),
    ([HOST, "--spot", "--", "--config=c", "--workdir", "runs/a"], "gs://"),
    ([POD, "--repo=https://me:token@host/x", "--commit=1", *TRAINING], "--repo"),
    ([POD, "--repo=https://host/x", *TRAINING], "--commit"),
    ([POD, "--env_file=nowhere", *TRAINING], "--env_file=nowhere"),
    (["--stop", *TRAINING], "--stop"),
    (["--type"], "--type"),
])
def test_wrong_arguments_are_one_sentence(arguments, mentions):
    done = subprocess.run(["bash", str(SCRIPT), "--name", "n", "--zone=z", *arguments], text=True, capture_output=True)
    assert done.returncode == 2 and done.stdout == ""
    assert mentions in done.stderr and len(done.stderr.splitlines()) == 1 and "me:token" not in done.stderr


def test_missing_name_and_zone():
    for arguments, mentions in (([], "--name=NAME"), (["--name=n"], "--zone=ZONE")):
        done = subprocess.run(["bash", str(SCRIPT), *arguments, POD, *TRAINING], text=True, capture_output=True)
        assert done.returncode == 2 and mentions in done.stderr


def test_help_lists_every_flag():
    done = subprocess.run(["bash", str(SCRIPT), "--help"], text=True, capture_output=True, check=True)
    parsed = re.search(r'parse_flags "(.*?)" \\\n *"(.*?)" "(.*?)"', SCRIPT.read_text()).groups()
    for flag in " ".join(parsed).split():
        assert f"--{flag}" in done.stdout.replace("--dry-run", "--dry_run")
    assert "set -euo" not in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="there is no gcloud here")
@pytest.mark.parametrize("kind", ["--internal_ip", "--queued", "--slices=2"])
def test_gcloud_itself_accepts_every_flag(cloud, kind):
    """Without an account: it parses the command line, then refuses."""
    here = cloud()
    done = here.tpu(POD, "--project=nobody", "--spot", "--delete_after", kind, "--dry-run", *TRAINING)
    environment = {"PATH": os.environ["PATH"], "CLOUDSDK_CONFIG": str(here.folder / "empty"), "HOME": str(here.folder),
                   "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false", "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true"}
    for line in [line for line in done.stdout.splitlines() if line.startswith("gcloud ")]:
        refused = subprocess.run(shlex.split(line), env=environment, text=True, capture_output=True)
        assert "active account" in refused.stderr, f"{line}\n{refused.stderr}"
