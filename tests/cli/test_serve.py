"""`dlm serve`: a start, a request, a graceful stop, and refusals."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from dlm_jax.cli import serve
from dlm_jax.cli.main import Parser, main
from dlm_jax.errors import ConfigError


def arguments_of(*argv: str):
    parser = Parser()
    serve.add_arguments(parser)
    return parser.parse(["--model=runs/small", *argv])


def test_serves_until_a_signal_and_finishes_what_runs(model):
    """A stream that has begun when SIGTERM comes is complete, and the exit status is 0."""
    with subprocess.Popen([sys.executable, "-m", "dlm_jax.cli.main", "serve", f"--model={model}", "--name=tiny",
                           "--port=0", "--max_batch=1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {serve.KEY_VARIABLE: "secret"}) as child:
        line = child.stdout.readline()
        assert "tiny" in line and "http://127.0.0.1:" in line, (line, child.poll())
        where = next(word for word in line.split() if word.startswith("http://"))
        with httpx.Client(base_url=where, headers={"Authorization": "Bearer secret"}, timeout=60) as http:
            assert http.get("/v1/models").json()["data"][0]["id"] == "tiny"
            body = {"model": "tiny", "prompt": "The cat", "max_tokens": 12, "n": 8, "stream": True, "seed": 0}
            with http.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                received = [next(lines)]
                child.send_signal(signal.SIGTERM)
                received += [line for line in lines if line]
        assert received[-1] == "data: [DONE]" and sum('"finish_reason":"' in line for line in received) == 8
        assert child.wait(60) == 0 and "Traceback" not in child.stderr.read()


@pytest.mark.parametrize(("argv", "mentions"), [
    (("--port=70000",), "--port"), (("--port=-1",), "--port"), (("--max_batch=0",), "--max_batch"),
    (("--time_limit=0",), "--time_limit"), (("--time_limit=nan",), "--time_limit"), (("--api_key=",), "API key"),
    (("--api_key=s\u00e9cret",), "API key"), (("--host=no.such.host.invalid",), "no.such.host.invalid"),
    (("--host=192.0.2.1",), "192.0.2.1"), (("--name= ",), "--name"), (("--parent=no/such",), "no/such")])
def test_refusals(model, capsys, argv, mentions):
    assert main(["serve", f"--model={model}", *argv]) == 1
    out, err = capsys.readouterr()
    assert not out and mentions in err and err.count("\n") == 1 and "Traceback" not in err


def test_port_in_use(model, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", f"--model={model}", f"--port={port}"]) == 1
    assert str(port) in capsys.readouterr().err


def test_missing_packages(model, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    assert main(["serve", f"--model={model}"]) == 1
    assert "uvicorn" in (err := capsys.readouterr().err) and "pip install 'dlm-jax[serve]'" in err


def test_several_processes(model, capsys, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    assert main(["serve", f"--model={model}", "--port=0"]) == 1
    assert "one process" in capsys.readouterr().err


def test_api_key(monkeypatch):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    assert serve.api_key(arguments_of()) is None
    monkeypatch.setenv(serve.KEY_VARIABLE, "from the environment")
    assert serve.api_key(arguments_of()) == "from the environment"
    assert serve.api_key(arguments_of("--api_key=flag")) == "flag"
    monkeypatch.setenv(serve.KEY_VARIABLE, "")
    with pytest.raises(ConfigError):
        serve.api_key(arguments_of())


def test_names():
    assert serve.model_names(arguments_of()) == ["small"]
    assert serve.model_names(arguments_of("--name=mine", "--parent=a/gpt2.gguf")) == ["mine", "gpt2"]
    assert serve.model_names(arguments_of("--parent=other/small")) == ["small", "small-parent"]


def test_defaults_are_safe():
    arguments = arguments_of()
    assert arguments.host == "127.0.0.1" and arguments.dtype == "float32" and arguments.time_limit < 3600
