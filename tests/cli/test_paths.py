"""A wrong path is refused in one sentence, before JAX or another heavy package is imported."""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dlm_jax.cli.main import COMMANDS, Parser
from dlm_jax.cli.paths import CHECKS, check_new_file, check_new_folder, check_output
from dlm_jax.errors import ConfigError

# Runs the commands of its input in one process, and prints each one's exit status, output and heavy modules.
PROGRAM = """import contextlib, io, json, sys
from dlm_jax.cli.main import main
for argv in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(argv)
    heavy = {"jax", "flax", "optax", "orbax", "transformers", "pyarrow"} & set(sys.modules)
    print(json.dumps([status, out.getvalue(), sorted(heavy)]))
"""
# {model}: a model; {text}: a text; {file}: any file; {missing}: nothing.
COMMAND_LINES = """
sample --model={missing}
sample --model={model} --base={missing}
sample --model={model} --prompts={missing} --out={missing}.jsonl
sample --model={model} --json={missing}/samples.json
sample --model={model} --trace={missing}/trace.html
chat --model={missing}
chat --model={model} --chat_template={missing}
evaluate --model={missing} --data {text}
evaluate --model={model} --data {missing}
evaluate --model={model} --examples {missing}
evaluate --model={model} --tasks=piqa --data_dir={missing}
evaluate --model={model} --tasks=piqa --data_files piqa={missing}
evaluate --model={model} --tasks=piqa --parent={missing}
evaluate --model={model} --tasks=piqa --out={missing}/results.json
export --model={missing} --output=export
export --model={model} --output={file}/export
export --model={model} --output={parent}
export --model={model} --output=export --layout=peft
export --drafter={missing} --output=export
export --output=export
prepare --data {missing} --tokenizer={model} --output=rows
prepare --data {text} --tokenizer={missing} --output=rows
prepare --config=quickstart --config.data.train={missing} --output=rows
train --config={missing}.py --workdir=run
train --config=quickstart --workdir=run --config.model.source={missing}
train --config=quickstart --workdir=run --config.model.sauce={missing}
train --config=quickstart --workdir=run --config.data.train={missing}
train --config=quickstart --workdir=run --config.data.validation={missing}
train --config=quickstart --workdir={file}/run
plan --config=quickstart --gpu=h100:8 --config.model.source={missing}
quickstart --base={missing} --data {text}
quickstart --base={model} --data {missing}
quickstart --base={model} --data {text} --workdir={file}
""".strip().splitlines()


def test_refused_without_jax(model, text, tmp_path):
    places = {"model": model, "text": text, "file": model / "config.json", "parent": text.parent,
              "missing": tmp_path / "missing"}
    lines = [line.format(**places) for line in COMMAND_LINES]
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=json.dumps([line.split() for line in lines]),
                          capture_output=True, text=True, check=True, cwd=tmp_path)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(lines)
    for line, (status, output, heavy) in zip(lines, results, strict=True):
        assert status == 1 and output.count("\n") == 1 and "Errno" not in output, (line, output)
        assert not heavy, (line, heavy)
    assert list(tmp_path.iterdir()) == []


def test_every_path_is_checked():
    """Every argument whose value is a file, a folder or a model has a check, and every check an argument."""
    paths = set()
    for command in COMMANDS:
        parser = Parser()
        importlib.import_module(f"dlm_jax.cli.{command}").add_arguments(parser)
        paths |= {action.dest for action in parser._actions if is_path(action)}
    assert paths | {"model", "base", "validation", "data"} == set(CHECKS)


def is_path(action: argparse.Action) -> bool:
    return str(action.metavar) in ("FILE", "DIR", "MODEL", "FILE.json", "NAME=FILE", "SOURCE")


def test_new_places(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path, tmp_path / "a" / "b"):
        check_new_folder(str(path))
    for path in (file, file / "a"):
        with pytest.raises(ConfigError, match="file"):
            check_new_folder(str(path))
    for path in ("-", file, tmp_path / "new.json"):
        check_new_file(str(path))
    for path in (tmp_path, tmp_path / "a" / "new.json"):
        with pytest.raises(ConfigError):
            check_new_file(str(path))
    with pytest.raises(ConfigError):
        check_output(str(file))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    for check in (check_new_folder, check_new_file):
        with pytest.raises(ConfigError):
            check(str(pathlib.Path(tmp_path) / "new"))
