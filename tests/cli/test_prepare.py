"""`dlm prepare`, and training and evaluation on what it wrote, through the command line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dlm_jax.cli.main import main
from dlm_jax.training import read_records
from tests.cli.conftest import RECIPE


@pytest.fixture
def recipe(base, tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE +
                    f"    config.model.source = '{base}'\n"
                    "    config.num_steps = 2\n"
                    "    config.data.validation_fraction = 0.2\n"
                    "    config.validation.num_rows = 8\n"
                    "    return config\n")
    return path


def run(*argv: object) -> int:
    return main([str(argument) for argument in argv])


def test_prepared_rows_train_like_raw_text(capsys, recipe, text, tmp_path):
    rows = tmp_path / "rows"
    command = ("prepare", f"--config={recipe}", "--data", text, f"--output={rows}/", "--note=ours", "--json=-")
    assert run(*command, "--workers=1") == 0
    first = json.loads(capsys.readouterr().out)
    assert first["splits"]["train"]["rows"] > 8 and first["splits"]["validation"]["rows"] > 0
    assert json.loads((rows / "manifest.json").read_text())["note"] == "ours"
    assert run(*command) == 0  # finished: nothing to do
    assert json.loads(capsys.readouterr().out)["splits"] == first["splits"]
    losses = []
    for name, source in (("raw", text), ("prepared", rows)):
        assert run("train", f"--config={recipe}", f"--config.data.train={source}", f"--workdir={tmp_path / name}") == 0
        losses.append([record["loss"] for record in read_records(tmp_path / name, "train")]
                      + [record["bound"] for record in read_records(tmp_path / name, "validation")])
    assert losses[0] == losses[1] and len(losses[0]) >= 2
    capsys.readouterr()
    evaluate = ("evaluate", f"--model={tmp_path / 'raw'}", "--length=16", "--num_masks=2", "--json=-", "--data")
    assert run(*evaluate, rows) == 0
    assert json.loads(capsys.readouterr().out)["num_rows"] == first["splits"]["validation"]["rows"]


def test_mixture_with_document_masks_and_random_lengths(recipe, text, tfds_folder, tmp_path):
    options = ("--config.data.packing=document_mask", "--config.data.random_length=0.3")
    sources = (str(text), f"tfds:toy/small?data_dir={tfds_folder}")
    for name, source in zip(("one", "two"), sources, strict=True):
        assert run("prepare", f"--config={recipe}", options[0], "--data", source, f"--output={tmp_path / name}",
                   "--workers=0") == 0
        assert json.loads((tmp_path / name / "manifest.json").read_text())["sources"] == [source]
    assert run("train", f"--config={recipe}", f"--config.data.train={tmp_path / 'one'},{tmp_path / 'two'}", *options,
               "--config.data.weights=0.7,0.3", f"--workdir={tmp_path / 'run'}") == 0
    assert read_records(tmp_path / "run", "train")[-1]["step"] == 2 and "tensorflow" not in sys.modules


@pytest.mark.parametrize(("arguments", "mentions"), [
    ((), "--data"),
    (("--data", "{text}", "--config.model.source="), "--tokenizer"),
    (("--data", "nowhere/*.jsonl"), "nowhere/*.jsonl"),
    (("--data", "{text}", "--tokenizer=nowhere/at all"), "nowhere/at all"),
    (("--data", "{text}", "--workers=-1"), "--workers"),
    (("--data", "{text}", "--config.data.length=1"), "data.length"),
    (("--data", "{text}", "--config.data.pak=x"), "config.data.packing"),
    (("--data", "{text}", "--config.data.text_key=body"), "body"),
    (("--data", "{text}", "--config.data.examples.format=messages"), "chat template"),
])
def test_bad_arguments(capsys, recipe, text, tmp_path, arguments, mentions):
    arguments = [argument.format(text=text) for argument in arguments]
    assert run("prepare", f"--config={recipe}", f"--output={tmp_path / 'rows'}", "--workers=0", *arguments) == 1
    error = capsys.readouterr().err
    assert mentions in error and error.count("\n") == 1


def test_interrupt_and_resume(base, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text((json.dumps({"text": "The cat sat on the mat. " * 40}) + "\n") * 7_000)
    command = ["prepare", f"--tokenizer={base}", "--data", path, f"--output={tmp_path / 'rows'}", "--workers=1",
               "--shard_size=1", "--config.data.length=16"]
    # Where the tests run in the background, Ctrl-C may be ignored, and that is inherited.
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); " \
              "from dlm_jax.cli.main import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, command)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    deadline = time.monotonic() + 60
    while not (tmp_path / "rows" / "progress.npz").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert not (tmp_path / "rows" / "manifest.json").exists()
    written = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "rows").glob("train*")}
    assert written
    assert run(*command, "--workers=0") == 0
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "rows").glob("train*")}
    assert len(after) > len(written) and written.items() <= after.items()
