"""The shell: commands, arguments, exit statuses, sentences instead of traces."""

import argparse
import inspect
import subprocess
import sys

import pytest

from dlm_jax.cli import main as shell
from dlm_jax.cli import sample
from dlm_jax.cli.main import COMMANDS, main, split_overrides
from dlm_jax.errors import DataError


def run(capsys: pytest.CaptureFixture, *argv: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    try:
        status = main(argv)
    except SystemExit as end:
        status = end.code or 0
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",), ("help",)])
def test_the_list_of_commands(capsys, argv):
    status, out, err = run(capsys, *argv)
    assert status == 0 and not err and all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(capsys, command):
    status, out, err = run(capsys, command, "--help")
    assert status == 0 and not err and f"dlm {command}" in out


def test_help_does_not_wait_for_jax():
    code = ("import sys; from dlm_jax.cli.main import main\n"
            f"for command in {list(COMMANDS)}:\n"
            "    try: main([command, '--help'])\n"
            "    except SystemExit as end: assert not end.code\n"
            "assert not {'jax', 'flax', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.parametrize(("argv", "says"), [
    (("smaple",), "no command 'smaple' (did you mean sample?)"),
    (("sample",), "--model"),
    (("sample", "--modle=x"), "no argument --modle (did you mean --model?)"),
    (("sample", "--model=x", "--num_steps=many"), "num_steps"),
    (("sample", "--model=x", "--prompt", "a", "--infill", "b"), "not allowed with"),
    (("sample", "--model=x", "--config.seed=3"), "no argument --config.seed"),
    (("export", "--model=x", "--output=y", "--layout=z"), "layout"),
])
def test_misuse_is_one_sentence(capsys, argv, says):
    status, out, err = run(capsys, *argv)
    assert status == 2 and not out and says in err and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(("argv", "says"), [
    (("train", "--config=nope"), "no recipe 'nope'"),
    (("train", "--config=nope.py"), "no recipe file nope.py"),
    (("train", "--config=quickstart", "--config.nmu_steps=3"), "did you mean config.num_steps?"),
    (("train", "--config=quickstart", "--config.num_steps=x"), "takes an integer, not 'x'"),
    (("train", "--config=quickstart"), "--workdir is missing"),
    (("train", "--config=diffugpt_s", "--workdir=x"), "--config.data.train=FILES"),
    (("sample", "--model=no/such/folder"), "no/such/folder"),
    (("sample", "--model=x", "--policy=best"), "best"),
    (("sample", "--model=x", "--num_samples=0"), "--num_samples"),
])
def test_refusals_are_one_sentence(capsys, argv, says):
    status, out, err = run(capsys, *argv)
    assert status == 1 and not out and says in err and err.count("\n") == 1 and "Traceback" not in err


def test_errors_and_interrupts_end_without_a_trace(capsys, monkeypatch):
    for error, status, says in ((DataError("the file is empty"), 1, "dlm export: the file is empty\n"),
                                (KeyboardInterrupt(), 130, "dlm export: interrupted\n")):
        def fail(arguments: argparse.Namespace, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("dlm_jax.cli.export.run", fail)
        assert run(capsys, "export", "--model=x", "--output=y") == (status, "", says)


def test_overrides_stand_anywhere_and_in_three_forms(capsys):
    assert split_overrides(["--config.a=1=2", "--x", "--config.b.c", "-3", "--config.d", "--y=1", "--config.e"]) == (
        [("a", "1=2"), ("b.c", "-3"), ("d", "true"), ("e", "true")], ["--x", "--y=1"])
    forms = ("--config.num_steps=7 --config=quickstart --print_config --config.log.tensorboard=false",
             "--config.log.tensorboard false --print_config --config quickstart --config.num_steps 7")
    printed = [run(capsys, "train", *form.split()) for form in forms]
    assert printed[0] == printed[1]
    status, out, _ = printed[0]
    assert status == 0 and "--config.num_steps=7 " in out and "--config.log.tensorboard=false " in out


def test_a_pipe_that_closes_early_is_no_error():
    command = f"{sys.executable} -m dlm_jax.cli.main train --config=quickstart --print_config"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | true"], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0 and not done.stderr


def test_sampling_has_the_defaults_of_the_public_face():
    from dlm_jax.pipeline import DiffusionLM

    parser = shell.Parser()
    sample.add_arguments(parser)
    for method in (DiffusionLM.generate, DiffusionLM.infill):
        for name, parameter in inspect.signature(method).parameters.items():
            if parser.get_default(name) is not None and name != "prompts":
                assert parser.get_default(name) == parameter.default, name
