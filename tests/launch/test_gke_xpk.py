"""`launch/gke_xpk.sh` against a stand-in of xpk that knows its flags and runs a pod's command."""

import shlex

import pytest

from tests.launch.stand_in_cloud import TRAINING

ODD = "--config.name=it's  a $HOME `name`\n{brace}"
WHERE = ("--cluster=my-cluster", "--name=run-1")


@pytest.fixture
def cluster(cloud):
    here = cloud()
    pod = here.standin / "pod-bin"
    pod.mkdir()
    (pod / "dlm").write_text(f'#!/bin/bash\nexec {here.standin}/worker-bin/python3 -m dlm_jax.cli.main "$@"\n')
    (pod / "pip").write_text('#!/bin/bash\necho "$@" > "$STANDIN/pip"\n')
    for program in pod.iterdir():
        program.chmod(0o755)
    here.xpk = lambda: (here.standin / "xpk-call").read_text().split("\0")[:-1]
    return here


def test_pod_installs_this_commit_and_trains(cluster):
    cluster.run("gke_xpk.sh", *WHERE, "--type=v6e-256", "--slices=2", "--spot", "--zone=z", *TRAINING, ODD)
    assert cluster.arguments() == ["--coordinator=auto", *TRAINING[1:], ODD, "--config.mesh.dcn_data=2"]
    assert (cluster.standin / "pip").read_text() == "install --quiet --editable .[tpu,gcs]\n"
    assert "launch" in (cluster.standin / "xpk-files").read_text().split()
    expected = {"--tpu-type=v6e-256", "--num-slices=2", "--spot", "--restart-on-exit-codes=75,76", "--max-restarts=10",
              "--zone=z", "--workload=run-1", "--cluster=my-cluster", "--base-docker-image=python:3.12"}
    assert expected <= set(cluster.xpk())


def test_image_is_used_unchanged(cluster):
    cluster.run("gke_xpk.sh", *WHERE, "--type=v5p-8", "--image=gcr.io/p/dlm", *TRAINING)
    assert "--docker-image=gcr.io/p/dlm" in cluster.xpk() and not (cluster.standin / "pip").exists()
    assert cluster.arguments() == ["--coordinator=auto", *TRAINING[1:]]


@pytest.mark.parametrize(("action", "words"), [
    ("--status", ["list", "--filter-by-job=run-1"]), ("--follow", ["list", "--wait-for-job-completion=run-1"]),
    ("--delete", ["delete", "--workload=run-1", "--force"])])
def test_actions(cluster, action, words):
    cluster.run("gke_xpk.sh", *WHERE, action)
    assert cluster.xpk() == ["workload", *words, "--cluster=my-cluster"]


def test_dry_run_and_wrong_arguments(cluster):
    done = cluster.run("gke_xpk.sh", *WHERE, "--type=v6e-16", "--dry-run", *TRAINING, ODD)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["mkdir", "git", "tar", "xpk"] and not (cluster.standin / "xpk-call").exists()
    for arguments, mentions in [
            ((), "--cluster=CLUSTER"), (("--cluster=c",), "--name=NAME"), ((*WHERE, *TRAINING), "--type=TYPE"),
            ((*WHERE, "--type=t"), "nothing to train"),
            ((*WHERE, "--type=t", "--", "--config=c", "--workdir=runs"), "--workdir=runs")]:
        assert mentions in cluster.run("gke_xpk.sh", *arguments, code=2).stderr
