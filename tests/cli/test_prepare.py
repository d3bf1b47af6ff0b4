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


@pytest.fixture
def recipe(base, tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from dlm_jax.cli.config import train_defaults\n"
        "def get_config():\n"
        "    config = train_defaults()\n"
        f"    config.model.source = '{base}'\n"
        "    config.model.init = 'random'\n"
        "    config.model.mask_token = '<|mask|>'\n"
        "    config.num_steps = 2\n"
        "    config.data.length = 16\n"
        "    config.data.batch_size = 8\n"
        "    config.data.validation_fraction = 0.2\n"
        "    config.log.tensorboard = False\n"
        "    config.validation.num_rows = 8\n"
        "    return config\n")
    return path


def run(*argv: object) -> int:
    return main([str(argument) for argument in argv])


def test_prepared_rows_train_as_the_raw_text_does(capsys, recipe, text, tmp_path):
    rows = tmp_path / "rows"
    command = ("prepare", f"--config={recipe}", "--data", text, f"--output={rows}/", "--note=ours", "--json=-")
    assert run(*command) == 0
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
    evaluate = ("evaluate", f"--model={tmp_path / 'raw'}", "--length=16", "--num_samples=2", "--json=-", "--data")
    assert run(*evaluate, rows) == 0
    assert json.loads(capsys.readouterr().out)["num_rows"] == first["splits"]["validation"]["rows"]


def test_a_mixture_with_segments_and_random_lengths_trains(capsys, recipe, text, tmp_path):
    options = ("--config.data.packing=document_mask", "--config.data.random_length=0.3")
    for name in ("one", "two"):
        assert run("prepare", f"--config={recipe}", options[0], "--data", text, f"--output={tmp_path / name}") == 0
    assert run("train", f"--config={recipe}", f"--config.data.train={tmp_path / 'one'},{tmp_path / 'two'}", *options,
               "--config.data.weights=0.7,0.3", f"--workdir={tmp_path / 'run'}") == 0
    assert read_records(tmp_path / "run", "train")[-1]["step"] == 2


def test_examples_train(capsys, recipe, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"The cat {i}", "response": "sat."}) + "\n" for i in range(80)))
    assert run("train", f"--config={recipe}", f"--config.data.train={pairs}", f"--workdir={tmp_path / 'run'}",
               "--config.data.examples.format=prompt_response") == 0
    assert read_records(tmp_path / "run", "train")[-1]["masked_tokens"] < 8 * 6  # of 8 x 16 tokens only the responses


def test_a_dataset_of_tfds_trains(recipe, tfds_folder, tmp_path):
    source, rows = f"tfds:toy/small?data_dir={tfds_folder}", tmp_path / "rows"
    assert run("prepare", f"--config={recipe}", "--data", source, f"--output={rows}") == 0
    assert json.loads((rows / "manifest.json").read_text())["sources"] == [source]
    losses = []
    for name, data in (("direct", source), ("prepared", rows)):
        assert run("train", f"--config={recipe}", f"--config.data.train={data}", f"--workdir={tmp_path / name}") == 0
        losses.append([record["loss"] for record in read_records(tmp_path / name, "train")])
    assert losses[0] == losses[1]
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(("arguments", "sentence"), [
    ((), "--data is missing"),
    (("--data", "{text}", "--config.model.source="), "--tokenizer is missing"),
    (("--data", "nowhere/*.jsonl"), "no file matches 'nowhere/*.jsonl'"),
    (("--data", "{text}", "--tokenizer=nowhere/at all"), "there is no directory nowhere/at all"),
    (("--data", "{text}", "--workers=-1"), "--workers must not be negative"),
    (("--data", "{text}", "--config.data.length=1"), "data.length is 1"),
    (("--data", "{text}", "--config.data.pak=x"), "did you mean config.data.packing"),
    (("--data", "{text}", "--config.data.text_key=body"), "no key 'body' (it has text)"),
    (("--data", "{text}", "--config.data.examples.format=messages"), "no chat template"),
])
def test_what_is_wrong_is_said_in_a_sentence(capsys, recipe, text, tmp_path, arguments, sentence):
    arguments = [argument.format(text=text) for argument in arguments]
    assert run("prepare", f"--config={recipe}", f"--output={tmp_path / 'rows'}", *arguments) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_ctrl_c_stops_and_the_same_command_goes_on(base, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text((json.dumps({"text": "The cat sat on the mat. " * 40}) + "\n") * 30_000)
    command = ["prepare", f"--tokenizer={base}", "--data", path, f"--output={tmp_path / 'rows'}", "--workers=1",
               "--shard_size=1", "--config.data.length=16"]
    # Where the tests run in the background, Ctrl-C may be ignored, and that is inherited.
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); " \
              "from dlm_jax.cli.main import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, command)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    deadline = time.monotonic() + 60
    while not (tmp_path / "rows" / "progress.npz").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert not (tmp_path / "rows" / "manifest.json").exists()
    written = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "rows").glob("train*")}
    assert written
    assert run(*command) == 0
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "rows").glob("train*")}
    assert len(after) > len(written) and written.items() <= after.items()
