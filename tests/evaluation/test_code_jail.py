"""Real programs that misbehave: none passes, none reaches the machine, none outlives its time."""

import os
import pathlib
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.evaluation import code_execution, code_jail
from dlm_jax.evaluation.code_execution import Outcome, Program, Sandbox

GOOD = Program("def double(x):\n    return 2 * x\n", "assert double(4) == 8\n")


@pytest.fixture(scope="module")
def run():
    try:
        execute = Sandbox(seconds=1, workers=4)
    except ConfigError as error:
        pytest.skip(f"this machine cannot isolate programs: {error}")
    return lambda source, tests="": execute([Program(source, tests)])[0]


@pytest.fixture
def left_over(tmp_path, monkeypatch):
    """Returns the command lines of this test's sandboxes that still run."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return lambda: [line for line in command_lines() if "code_jail.py" in line and str(tmp_path) in line]


def command_lines():
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(process.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it is gone by now
    return found


def test_outcomes(run):
    assert run(*GOOD) == Outcome(True, "passed")
    assert run(GOOD.source, "assert double(4) == 9\n") == Outcome(False, "AssertionError")
    assert run("def double(x)\n", GOOD.tests) == Outcome(False, "SyntaxError")
    assert run("import dataclasses, hashlib\n@dataclasses.dataclass\nclass A:\n    x: int = 3\n",
               "assert A().x == 3 and hashlib.sha256(b'').hexdigest()") == Outcome(True, "passed")


def test_order_of_many(run):
    del run
    execute = Sandbox(workers=3)
    programs = [Program(f"x = {number}", f"assert x % 2 == {0}") for number in range(9)]
    assert [outcome.passed for outcome in execute(programs)] == [number % 2 == 0 for number in range(9)]
    assert execute([]) == []


@pytest.mark.parametrize(("source", "reason"), [
    ("import sys; sys.exit(0)", "SystemExit"),
    ("raise SystemExit", "SystemExit"),
    ("exit(0)", "NameError"),  # `site` would define it
    ("import os; os._exit(0)", "ended before its tests did"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL"),
    ("import threading, os; threading.Thread(target=lambda: os._exit(0)).start()\nwhile True: pass",
     "ended before its tests did"),
    ("def f(): return f()\nf()", "RecursionError"),
    ("import ctypes; ctypes.string_at(0)", "ended by SIGSEGV"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("x = '''", "SyntaxError"),  # it would swallow the tests if they were one text
    ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "E"),
    ("import os\nif os.fork(): os._exit(0)", "ended before its tests did"),  # its child goes on to the tests
    ("x = bytearray(10**10)", "MemoryError"),
    ("input()", "EOFError"),
    ("import numpy", "ModuleNotFoundError"),
])
def test_early_end_is_no_pass(run, source, reason):
    assert run(source) == Outcome(False, reason)


def test_caught_exit_passes(run):
    assert run("import sys\ntry:\n    sys.exit(1)\nexcept SystemExit:\n    x = 1\n", "assert x").passed


def test_forged_report_is_no_pass(run):
    assert not run("import os\nfor n in range(3, 64):\n    try:\n        os.write(n, b'passed')\n"
                   "    except OSError:\n        pass\nos._exit(0)").passed
    # Not even a flood through it, nor output without end.
    assert not run("import os\nwhile True:\n    for n in range(3, 64):\n        try:\n            os.write(n, b'x')\n"
                   "        except OSError:\n            pass\n").passed
    assert not run("while True: print('x' * 999)").passed


def test_running_processes_are_found(run, left_over):
    """Shows that `left_over` finds what is there."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(run, "import os, time\nos.fork(); time.sleep(60)")
        deadline = time.monotonic() + 30
        while len(left_over()) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(left_over()) == 4  # the script, the first process inside, the program and its child
        assert not pending.result().passed
    assert not left_over()


def test_time_limits(run, left_over):
    start = time.monotonic()
    # On a busy machine, the clock may run out before the processor time does.
    assert run("while True: pass").reason in ("ended by SIGXCPU", "not done after 3 s")
    assert run("import time; time.sleep(60)") == Outcome(False, "not done after 3 s")
    stubborn = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run(stubborn).reason in ("ended by SIGKILL", "not done after 3 s")
    assert time.monotonic() - start < 20
    assert not left_over()


def test_fork_bomb(run, left_over):
    bomb = """
import os, time
forked = 0
while forked < 60:
    try:
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
    except OSError:
        break
    forked += 1
"""
    assert run(bomb, "assert 0 < forked < 30").passed
    assert not left_over()
    every = "import os, time\nfor _ in range(6):\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    assert not run(every + "time.sleep(60)").passed
    assert not left_over()


def test_no_network(run):
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryDirectory() as folder:
        port = server.getsockname()[1]
        with socket.socket(socket.AF_UNIX) as local, socket.socket(socket.AF_UNIX) as abstract:
            local.bind(f"{folder}/socket")
            abstract.bind(f"\0{folder}")
            for listening in (local, abstract):
                listening.listen()
            source = f"""
import socket
reached = []
for family, address in ((socket.AF_INET, ("127.0.0.1", {port})), (socket.AF_INET, ("8.8.8.8", 53)),
                        (socket.AF_UNIX, {folder + "/socket"!r}), (socket.AF_UNIX, {chr(0) + folder!r})):
    with socket.socket(family) as client:
        client.settimeout(1)
        try:
            client.connect(address)
            reached.append(address)
        except OSError:
            pass
"""
            assert run(source, "assert reached == []") == Outcome(True, "passed")
            here = {}
            exec(source.replace('(socket.AF_INET, ("8.8.8.8", 53)),', ""), here)
            assert len(here["reached"]) == 3  # the same lines do reach them from outside


def test_no_files_rights_or_environment(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    (tmp_path / "mine.txt").write_text("mine")
    source = f"""
import ctypes, os, subprocess, sys
seen = sorted(os.listdir("/"))
work = os.listdir("."), os.getcwd()
open("scratch.txt", "w").write("ok")
failed = []
for path in (sys.base_prefix + "/x", "/usr/x", "/etc/passwd", "/proc/self/environ", {str(tmp_path)!r}):
    try:
        open(path, "w" if path.endswith("x") else "r")
        failed.append(path)
    except OSError:
        pass
for path in (sys.executable, "/usr/bin/env"):
    try:
        os.chmod(path, 0o777)
        failed.append(path)
    except OSError:
        pass
rights = ctypes.CDLL(None).unshare(0x10000000), os.getuid(), "SECRET" in os.environ
"""
    tests = """
assert not set(seen) & {"etc", "proc", "sys", "run", "var", "mnt", "srv"}, seen
assert work == ([], "/tmp"), work
assert failed == [], failed
assert rights == (-1, 65534, False), rights
"""
    assert run(source, tests) == Outcome(True, "passed")
    assert run(source, tests) == Outcome(True, "passed")  # the first run left nothing
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_disk_limit(run):
    one = "f = open('x', 'wb', buffering=0)\nfor _ in range(40): f.write(bytes(1 << 20))"
    assert run(one) == Outcome(False, "OSError")
    many = "for n in range(40): open(str(n), 'wb').write(bytes(1 << 20))"
    assert run(many) == Outcome(False, "OSError")


def test_folders_are_removed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run("open('x', 'w').write('x')")
    run("while True: pass")
    assert list(tmp_path.iterdir()) == []


def test_other_platforms_are_refused(monkeypatch):
    monkeypatch.setattr(code_execution.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="darwin"):
        Sandbox()


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_failed_start_is_an_error(tmp_path, monkeypatch):
    broken = tmp_path / "code_jail.py"
    broken.write_text("import os, sys\nos.write(int(sys.argv[2]), b'unshare: Operation not permitted')\n")
    monkeypatch.setattr(code_jail, "__file__", str(broken))
    with pytest.raises(ConfigError, match="unshare"):
        Sandbox()
    broken.write_text("")
    with pytest.raises(ConfigError):
        Sandbox()


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_open_jail_is_refused(tmp_path, monkeypatch):
    """Without namespaces the trial reaches the server, and no program of the model runs."""
    real = pathlib.Path(code_jail.__file__).read_text()
    broken = tmp_path / "code_jail.py"
    broken.write_text(real.replace("        root = _leave_namespaces()\n        _build(folder, job)\n",
                                   "        root = False\n"))
    assert broken.read_text() != real
    monkeypatch.setattr(code_jail, "__file__", str(broken))
    with pytest.raises(ConfigError):
        Sandbox()


@pytest.mark.parametrize("limit", [{"seconds": 0}, {"memory": -1}, {"processes": 0}])
def test_limits_are_positive(limit):
    with pytest.raises(ConfigError):
        Sandbox(**limit)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become someone else")
def test_unprivileged_user():
    """A user namespace isolates them, where everyone can read Python."""
    import subprocess

    python = "/usr/bin/python3"
    if subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], check=False).returncode:
        pytest.skip(f"{python} is not of version 3.11 or later")
    package = pathlib.Path(code_execution.__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("errors.py", "evaluation/code_jail.py", "evaluation/code_execution.py"):
            copy = pathlib.Path(folder, "dlm_jax", name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text((package / name).read_text())
            (copy.parent / "__init__.py").touch()
        for path in (pathlib.Path(folder), *pathlib.Path(folder).rglob("*")):
            path.chmod(0o755)
        script = ("from dlm_jax.evaluation.code_execution import *\n"
                  f"execute = Sandbox(seconds=1)\nprint(execute([Program(*{tuple(GOOD)!r}), "
                  "Program('import os\\nn = 0\\nwhile n < 60:\\n    try:\\n        if os.fork() == 0: os.read(0, 1) or "
                  "__import__(\"time\").sleep(60)\\n    except OSError: break\\n    n += 1', 'assert 0 < n < 30'), "
                  "Program('', 'import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == -1')]))")
        found = subprocess.run([python, "-B", "-c", script], cwd=folder, env={"PYTHONPATH": folder}, user=12345,
                               group=12345, extra_groups=[], capture_output=True, text=True, check=False)
    if "cannot be isolated here" in found.stderr:
        pytest.skip("this machine gives user namespaces to root only")
    assert found.stdout.count("passed=True") == 3, found
