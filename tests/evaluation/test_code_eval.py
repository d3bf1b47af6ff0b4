"""Programs under bubblewrap: what passes, what is prevented, and machines that cannot isolate them."""

import math
import pathlib
import shutil
import socket
import time

import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.evaluation import code_eval
from dlm_jax.evaluation.code_eval import Program, Sandbox, pass_at_k, used_as_code_eval


@pytest.fixture(scope="module")
def sandbox():
    try:
        return Sandbox(seconds=2.0)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("source", "tests", "reason"), [
    ("def f(): return 1", "assert f() == 1", "passed"),
    ("def f(): return 2", "assert f() == 1", "AssertionError"),
    ("import sys\nsys.exit(0)", "assert False", "SystemExit"),
    ("syntax error(", "", "SyntaxError"),
    ("print('x' * 10**6)", "", "passed"),
    ("x = 'a' * 10**10", "", "MemoryError"),
    ("open('/tmp/x', 'wb').write(bytes(10**8))", "", "OSError"),
    ("open('/usr/x', 'w')", "", "OSError"),
    ("import os\nassert not os.listdir('/tmp')", "open('/tmp/x', 'w').write('mine')", "passed"),
    ("import os\nassert set(os.environ) <= {'PATH', 'PWD', 'LC_CTYPE'}, os.environ", "", "passed"),
    ("import os\nassert os.getpid() < 50 and len([x for x in os.listdir('/proc') if x.isdigit()]) < 10", "", "passed"),
    ("import dataclasses, typing, heapq, json, math, re, collections", "", "passed"),
])
def test_outcomes(sandbox, source, tests, reason):
    outcome, = sandbox([Program(source, tests)])
    assert outcome == (reason == "passed", reason)


@pytest.mark.parametrize("source", ["import os\nos._exit(0)", "while True: pass", "import time\ntime.sleep(1000)",
                                    "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"])
def test_programs_that_do_not_reach_their_end(sandbox, source):
    started = time.monotonic()
    outcome, = sandbox([Program(source, "")])
    assert not outcome.passed and time.monotonic() - started < 20


def test_files_and_network_are_out_of_reach(sandbox, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = sandbox([
            Program(f"import os\nos.stat({str(secret)!r})", ""),
            Program(f"import os\nos.listdir({str(pathlib.Path(code_eval.__file__).parent)!r})", ""),
            Program(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)", "")])
    assert [outcome.passed for outcome in found] == [False] * 3


def test_children_end_with_their_program(sandbox):
    outcome, = sandbox([Program("import os, time\nif os.fork() == 0:\n    time.sleep(1234.5)", "")])
    assert outcome.passed
    time.sleep(0.2)
    commands = [path.read_bytes() for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"1234.5" in command for command in commands)


def test_compute(sandbox):
    found, outcomes = sandbox.compute(["assert f() == 1", "assert f() == 2"],
                                      [["def f(): return 1", "def f(): return 3"]] * 2, k=[1, 2, 3])
    assert found == {"pass@1": 0.25, "pass@2": 0.5} and outcomes[0][0].passed
    import evaluate

    load = evaluate.load
    with used_as_code_eval(sandbox):
        assert evaluate.load("code_eval") is sandbox
    assert evaluate.load is load


def test_pass_at_k_is_the_share_of_subsets():
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - math.comb(3, 2) / math.comb(5, 2))
    assert pass_at_k(5, 0, 3) == 0 and pass_at_k(3, 2, 2) == 1


def test_machines_that_cannot_isolate(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="bubblewrap"):
        Sandbox()
    monkeypatch.undo()
    if shutil.which("bwrap"):
        monkeypatch.setattr(code_eval, "_command", lambda *_: ["env"])  # nothing is isolated
        with pytest.raises(ConfigError):
            Sandbox()
    with pytest.raises(ConfigError, match="limits"):
        Sandbox(seconds=0)
