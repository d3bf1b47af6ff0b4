"""A cloud of stand-ins for what the launch scripts call, in a temporary folder."""

import atexit
import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
STANDINS = pathlib.Path(__file__).parent / "standins"
TRAINING = ("--", "--config=diffugpt_s", "--workdir=gs://bucket/run")


@functools.cache
def checkout() -> pathlib.Path:
    """A small checkout with the launch scripts, all committed, to be copied."""
    folder = pathlib.Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    shutil.copytree(ROOT / "launch", folder / "launch")
    for name in ("requirements.txt", "setup.py", "pyproject.toml"):
        (folder / name).write_text(f"# {name}\n")
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=all"]):
        subprocess.run(["git", "-c", "user.name=me", "-c", "user.email=me@here", *arguments], cwd=folder, check=True)
    shutil.rmtree(folder / ".git/hooks", ignore_errors=True)
    return folder


class Cloud:
    """A checkout of one commit, a cloud with one TPU at most, and what its workers saw."""

    def __init__(self, folder: pathlib.Path, **scenario):
        self.folder = folder
        self.standin = folder / "standin"
        self.checkout = folder / "checkout"
        for name in ("bin", "worker-bin"):
            (self.standin / name).mkdir(parents=True)
        for name in ("gcloud", "xpk", "srun", "scontrol", "squeue", "nvidia-smi"):
            if (STANDINS / name).exists():
                (self.standin / "bin" / name).symlink_to(STANDINS / name)
        for name in ("python3", "curl"):
            (self.standin / "worker-bin" / name).symlink_to(STANDINS / name)
        self.plan_for(**scenario)
        shutil.copytree(checkout(), self.checkout)

    def plan_for(self, **scenario) -> None:
        (self.standin / "scenario.json").write_text(json.dumps({"workers": 1, "slices": 1, **scenario}))

    def plan(self, worker: str, *lines: str) -> None:
        (self.standin / f"plan-{worker.replace('/', '-')}").write_text("".join(f"{line}\n" for line in lines))

    def environment(self, **more) -> dict:
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        return {**kept, "PATH": f"{self.standin}/bin:{os.environ['PATH']}", "STANDIN": str(self.standin),
                "DLM_LAUNCH_POLL": "0.2", **more}

    def background(self, *arguments: str) -> subprocess.Popen:
        """Starts tpu_run.sh in the background."""
        script = str(self.checkout / "launch/tpu_run.sh")
        return subprocess.Popen(["bash", script, "--name=my-tpu", "--zone=here-a", *arguments], text=True,
                                env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def run(self, script: str, *arguments: str, code: int = 0, environment=None) -> subprocess.CompletedProcess:
        done = subprocess.run(["bash", str(self.checkout / "launch" / script), *arguments], text=True,
                              capture_output=True, env=self.environment(**(environment or {})), timeout=60)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr and "unbound variable" not in done.stderr, done.stderr
        return done

    def tpu(self, *arguments: str, **kept) -> subprocess.CompletedProcess:
        return self.run("tpu_run.sh", "--name=my-tpu", "--zone=here-a", *arguments, **kept)

    def calls(self, *words: str) -> list[list[str]]:
        """The calls of gcloud that start with these words after `compute tpus`."""
        file = self.standin / "calls"
        calls = [json.loads(line)[2:] for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in calls if call[:len(words)] == list(words)]

    def world(self) -> dict:
        return json.loads((self.standin / "world.json").read_text())

    def arguments(self, worker: str = "0/0", start: int = 1) -> list[str]:
        text = (self.standin / f"arguments-{worker.replace('/', '-')}-{start}").read_text()
        return text.split("\0")[:-1]

    def starts(self, worker: str = "0/0") -> int:
        file = self.standin / f"starts-{worker.replace('/', '-')}"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def home(self, worker: str = "0/0") -> pathlib.Path:
        return self.standin / "workers" / worker.replace("/", "-")

    def close(self) -> None:
        for group in self.standin.glob("workers/*/dlm_run/group"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.killpg(int(group.read_text()), signal.SIGKILL)
