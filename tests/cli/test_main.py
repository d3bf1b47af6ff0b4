"""Commands, arguments, exit statuses, and sentences instead of traces."""

import argparse
import importlib
import inspect
import platform
import subprocess
import sys

import jax
import pytest

import dlm_jax
from dlm_jax.cli import sample
from dlm_jax.cli.main import COMMANDS, OLD_FLAGS, Parser, in_flags, main, split_overrides
from dlm_jax.errors import DataError


def run(capsys: pytest.CaptureFixture, *argv: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    try:
        status = main(argv)
    except SystemExit as end:
        status = end.code or 0
    out, err = capsys.readouterr()
    return status, out, err


def test_help(capsys):
    for argv in ((), ("--help",), ("-h",), ("help",)):
        status, out, err = run(capsys, *argv)
        assert status == 0 and not err and all(command in out for command in COMMANDS)


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"dlm_jax {dlm_jax.__version__}, Python {platform.python_version()}\n", "")


def test_help_without_jax():
    code = ("import sys; from dlm_jax.cli.main import main\n"
            f"for command in {list(COMMANDS)}:\n"
            "    try: main([command, '--help'])\n"
            "    except SystemExit as end: assert not end.code\n"
            "assert not {'jax', 'flax', 'transformers', 'numpy', 'rich'} & set(sys.modules), sorted(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert all(f"dlm {command}" in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(("argv", "mentions"), [
    (("smaple",), "did you mean sample?"),
    (("sample",), "--model"),
    (("sample", "--modle=x"), "did you mean --model?"),
    (("sample", "--model=x", "--num_steps=many"), "num_steps"),
    (("sample", "--model=x", "--prompt", "a", "--infill", "b"), "--infill"),
    (("sample", "--model=x", "--config.seed=3"), "--config.seed"),
    (("export", "--model=x", "--output=y", "--layout=z"), "layout"),
    (("sample", "--model=x", "--guidance=2"), "--cfg_scale"),
    (("plan", "--config=quickstart", "--advise"), "--suggest"),
])
def test_usage_errors(capsys, argv, mentions):
    status, out, err = run(capsys, *argv)
    assert status == 2 and not out and mentions in err and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(("argv", "mentions"), [
    (("train", "--config=nope"), "'nope'"),
    (("train", "--config=nope.py"), "nope.py"),
    (("train", "--config=quickstart", "--config.nmu_steps=3"), "did you mean config.num_steps?"),
    (("train", "--config=quickstart", "--config.num_steps=x"), "config.num_steps"),
    (("train", "--config=quickstart"), "--workdir"),
    (("train", "--config=diffugpt_s", "--workdir=x"), "--config.data.train"),
    (("sample", "--model=no/such/folder"), "no/such/folder"),
])
def test_errors(capsys, argv, mentions):
    status, out, err = run(capsys, *argv)
    assert status == 1 and not out and mentions in err and err.count("\n") == 1 and "Traceback" not in err


def test_errors_in_flags():
    flags = {"data.length": "--length", "mask_token=": "--mask_token"}
    assert in_flags("a smaller data.length. See data.lengths, config.data.length", flags) == (
        "a smaller --length. See data.lengths, config.data.length")
    assert in_flags("name one with mask_token=", flags) == "name one with --mask_token"


def test_old_flags():
    renamed = set()
    for command in COMMANDS:
        parser = Parser()
        importlib.import_module(f"dlm_jax.cli.{command}").add_arguments(parser)
        known = {option for action in parser._actions for option in action.option_strings}
        renamed |= known & set(OLD_FLAGS.values())
        assert not [old for old, new in OLD_FLAGS.items() if new in known and old in known]
    assert renamed == set(OLD_FLAGS.values())


def test_exit_statuses(capsys, monkeypatch, tmp_path):
    (tmp_path / "config.json").touch()
    for error, status, says in ((DataError("the file is empty"), 1, "dlm export: the file is empty\n"),
                                (KeyboardInterrupt(), 130, "dlm export: interrupted\n")):
        def fail(arguments: argparse.Namespace, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("dlm_jax.cli.export.run", fail)
        assert run(capsys, "export", f"--model={tmp_path}", "--output=y") == (status, "", says)


def test_no_memory_left(capsys, monkeypatch):
    """What JAX raises where an array does not fit is one sentence; its other errors are not ours to hide."""
    argv = ["sample", "--model=stories", "--prompt=Once"]
    for message in ("RESOURCE_EXHAUSTED: Out of memory allocating 29056413856 bytes.", "INTERNAL: a bug"):
        def fail(arguments: object, message: str = message) -> None:
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(sample, "run", fail)
        if message.startswith("INTERNAL"):
            with pytest.raises(jax.errors.JaxRuntimeError):
                main(argv)
        else:
            assert main(argv) == 1
            error = capsys.readouterr().err
            assert "27.1 GiB" in error and "--batch_size" in error and error.count("\n") == 1


def test_override_spellings(capsys):
    assert split_overrides(["--config.a=1=2", "--x", "--config.b.c", "-3", "--config.d", "--y=1", "--config.e"]) == (
        [("a", "1=2"), ("b.c", "-3"), ("d", "true"), ("e", "true")], ["--x", "--y=1"])
    spellings = ("--config.num_steps=7 --config=quickstart --print_config --config.log.tensorboard=false",
                 "--config.log.tensorboard false --print_config --config quickstart --config.num_steps 7")
    printed = [run(capsys, "train", *spelling.split()) for spelling in spellings]
    assert printed[0] == printed[1]
    status, out, _ = printed[0]
    assert status == 0 and "--config.num_steps=7 " in out and "--config.log.tensorboard=false " in out


def test_closed_pipe():
    command = f"{sys.executable} -m dlm_jax.cli.main train --config=quickstart --print_config"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | true"], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0 and not done.stderr


def test_sample_defaults():
    from dlm_jax.pipeline import DiffusionLM

    parser = Parser()
    sample.add_arguments(parser)
    for method in (DiffusionLM.generate, DiffusionLM.infill):
        for name, parameter in inspect.signature(method).parameters.items():
            if parser.get_default(name) is not None and name != "prompts":
                assert parser.get_default(name) == parameter.default, name
