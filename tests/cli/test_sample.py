"""`dlm sample`: its settings, files of prompts that can be stopped, and what it shows of how texts form."""

import dataclasses
import json
import re

import numpy as np
import pytest

from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.cli import sample
from dlm_jax.cli.live import MASK, Live, partial_text, wrap
from dlm_jax.cli.main import Parser, main
from dlm_jax.errors import ConfigError
from dlm_jax.pipeline import DiffusionLM
from dlm_jax.sampling import POLICIES, SamplerConfig, Snapshot
from dlm_jax.sampling.config import CACHES, STEP_SCHEDULES

PROMPTS = ["The cat", "", "A dog sat on", "The bird", "Tom and"]
SHORT = ("--max_new_tokens=6", "--num_steps=3")


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    """The tiny base with random weights and a mask token."""
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(folder, load_pretrained(base, mask_token="<|mask|>", init="random"))
    return folder


@pytest.fixture(scope="module")
def lm(model):
    return DiffusionLM.from_pretrained(model)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": text, "note": "é\u2028"}, ensure_ascii=i % 2 == 0) + "\n"
                            for i, text in enumerate(PROMPTS)), encoding="utf-8")
    return path


def run(*argv: object) -> int:
    return main(["sample", *map(str, argv)])


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


def test_every_setting_is_a_flag_with_its_default_and_in_a_group():
    parser = Parser()
    sample.add_arguments(parser)
    help_text = parser.format_help()
    groups = {group.title: {action.dest for action in group._group_actions} for group in parser._action_groups}
    settings = {field.name for field in dataclasses.fields(SamplerConfig)}
    assert groups["steps"] | groups["tokens"] | groups["cache"] == settings
    for field in dataclasses.fields(SamplerConfig):
        assert parser.get_default(field.name) == (None if field.name == "policy" else field.default)
    words = set(re.findall(r"\w+", help_text))
    assert {*POLICIES, *STEP_SCHEDULES, *CACHES} <= words


def test_settings_reach_the_sampler(capsys, model, lm):
    settings = dict(policy="threshold", threshold=0.4, block_length=4, remask=0.1, temperature=0.7, top_p=0.9, top_k=20,
                    repetition_penalty=1.3, eos_penalty=5.0, cfg_scale=0.5, cache="dual", cache_refresh_interval=2, num_steps=6,
                    step_schedule="cosine", seed=3)
    assert run(f"--model={model}", "--prompt", *PROMPTS, "--max_new_tokens=8", "--json=-",
               *(f"--{name}={value}" for name, value in settings.items())) == 0
    result = json.loads(capsys.readouterr().out)
    assert [line["text"] for line in result["samples"]] == lm.generate(PROMPTS, max_new_tokens=8, **settings)
    assert settings.items() <= result.items()


@pytest.mark.parametrize(("arguments", "says"), [
    (("--policy=best",), "best"),
    (("--policy=autoregressive", "--num_steps=4"), "has no num_steps"),
    (("--cache=dual",), "block_length"),
    (("--temperature=nan",), "temperature"),
    (("--num_samples=0",), "--num_samples"),
    (("--batch_size=0",), "--batch_size"),
    (("--seed=-1",), "--seed"),
    (("--infill", "no gap"), "no gap"),
    (("--trace=x.gif",), ".html or .png"),
    (("--trace=no/folder/x.png",), "there is no folder no/folder"),
    (("--prompts={prompts}",), "--out"),
    (("--out=x.jsonl",), "--prompts"),
    (("--prompts={prompts}", "--out={prompts}"), "is there already"),
    (("--prompts={prompts}", "--out=no/folder/x.jsonl"), "there is no folder no/folder"),
    (("--prompts={prompts}", "--out=x.jsonl", "--stream"), "--stream"),
    (("--prompts=none.jsonl", "--out=x.jsonl"), "no file none.jsonl"),
    (("--prompts=none.csv", "--out=x.jsonl"), ".jsonl"),
])
def test_what_is_wrong_is_said_before_a_model_is_loaded(capsys, monkeypatch, prompts, arguments, says):
    monkeypatch.setattr(sample, "load_model", lambda arguments: pytest.fail("the model was loaded"))
    assert run("--model=x", *(argument.format(prompts=prompts) for argument in arguments)) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize(("content", "says"), [
    (b'{"prompt": "a"}\n\n{"infill": "a <mask> b"}\n', "line 3: an infill and a prompt"),
    (b'{"prompt": "a"}\n{prompt: 3}\n', "line 2: it is not JSON"),
    (b'{"prompt": 3}\n', "line 1: its prompt is no text"),
    (b"[3]\n", "line 1: it is neither an object nor a text"),
    (b'{"id": 3}\n', "line 1: it has neither"),
    (b'{"prompt": "a", "infill": "<mask>"}\n', "line 1: it has both"),
    (b'{"infill": "a"}\n', "line 1: no gap"),
    (b'{"prompt": "a", "text": "b"}\n', "line 1: the key 'text'"),
    (b'"a"\n"\xff"\n', "line 2: it is not UTF-8"),
    (b'"\\ud800"\n', "line 1: it holds half a character"),
    (b"\n \n", "is empty"),
])
def test_a_bad_line_is_named(capsys, monkeypatch, tmp_path, content, says):
    monkeypatch.setattr(sample, "load_model", lambda arguments: pytest.fail("the model was loaded"))
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    assert run("--model=x", f"--prompts={path}", f"--out={tmp_path / 'out.jsonl'}") == 1
    error = capsys.readouterr().err
    assert says in error and str(path) in error and error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_line_too_long_for_the_model_is_named_before_any_is_written(capsys, model, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("The\n" + "The cat sat " * 20 + "\n")
    assert run(f"--model={model}", f"--prompts={path}", f"--out={tmp_path / 'out.jsonl'}", *SHORT) == 1
    error = capsys.readouterr().err
    assert "line 2" in error and "at most 32" in error and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("each", [1, 2])
def test_a_file_of_prompts_becomes_a_file_of_texts(capsys, model, lm, prompts, tmp_path, each):
    contents = []
    for batch_size in (3, 64):
        out = tmp_path / f"{batch_size}.jsonl"
        assert run(f"--model={model}", f"--prompts={prompts}", f"--out={out}", *SHORT, f"--batch_size={batch_size}",
                   f"--num_samples={each}", f"--json={tmp_path / 'result.json'}") == 0
        contents.append(out.read_bytes())
    assert contents[0] == contents[1]
    assert not list(tmp_path.glob("*.partial*"))
    lines = lines_of(out)
    given = [text for text in PROMPTS for _ in range(each)]
    assert [line["text"] for line in lines] == lm.generate(given, max_new_tokens=6, num_steps=3)
    assert [line["id"] for line in lines] == [i for i in range(len(PROMPTS)) for _ in range(each)]
    assert [line.get("sample") for line in lines] == ([None] if each == 1 else [0, 1]) * len(PROMPTS)
    assert all(line["note"] == "é\u2028" for line in lines)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["texts"] == len(lines) and 0 < result["tokens_now"] <= 6 * len(lines)


def test_files_of_gaps_and_of_plain_lines(model, lm, tmp_path):
    gaps, plain = tmp_path / "gaps.jsonl", tmp_path / "plain.txt"
    texts = ["The <mask:3> sat.", "A <mask> dog"]
    gaps.write_text("".join(json.dumps({"infill": text}) + "\n" for text in texts))
    plain.write_bytes(b"\xef\xbb\xbfThe cat\r\n\nA dog")
    out = tmp_path / "out.jsonl"
    assert run(f"--model={model}", f"--prompts={gaps}", f"--out={out}", "--gap_length=2", "--num_steps=3") == 0
    assert lines_of(out) == [{"infill": text, "text": filled} for text, filled in
                             zip(texts, lm.infill(texts, gap_length=2, num_steps=3), strict=True)]
    out.unlink()
    assert run(f"--model={model}", f"--prompts={plain}", f"--out={out}", *SHORT) == 0
    assert [line["prompt"] for line in lines_of(out)] == ["The cat", "A dog"]


def test_what_was_stopped_goes_on_to_the_same_bytes(capsys, monkeypatch, model, prompts, tmp_path):
    arguments = (f"--model={model}", f"--prompts={prompts}", *SHORT, "--num_samples=2", "--batch_size=3")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run(*arguments, f"--out={whole}") == 0
    generate, calls = DiffusionLM.generate, []

    def stopped(lm, given, **settings):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(list(settings["example_index"]))
        return generate(lm, given, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionLM, "generate", stopped)
        assert run(*arguments, f"--out={out}") == 130
    assert "6 lines" in capsys.readouterr().err and not out.exists()
    partial = tmp_path / "out.jsonl.partial"
    assert len(lines_of(partial)) == 6
    first = whole.read_bytes().split(b"\n")
    partial.write_bytes(b"\n".join(first[:7]) + b"\n" + first[7][:10])  # as if killed within the eighth line
    calls.clear()

    for other, says in (("--temperature=0.5", "temperature: 1.0 -> 0.5"), ("--seed=1", "seed: 0 -> 1"),
                        ("--num_samples=1", "num_samples: 2 -> 1"), ("--max_new_tokens=7", "max_new_tokens: 6 -> 7")):
        assert run(*arguments, f"--out={out}", other) == 1
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    content = prompts.read_bytes()
    prompts.write_bytes(content.replace(b"dog", b"cow"))
    assert run(*arguments, f"--out={out}") == 1
    assert "input_sha256" in capsys.readouterr().err
    prompts.write_bytes(content)

    monkeypatch.setattr(DiffusionLM, "generate", lambda lm, given, **settings: (
        calls.append(list(settings["example_index"])), generate(lm, given, **settings))[1])
    assert run(*arguments, f"--out={out}") == 0
    assert out.read_bytes() == whole.read_bytes() and not list(tmp_path.glob("*.partial*"))
    assert calls == [[6, 7, 8], [7, 8, 9]]
    assert run(*arguments, f"--out={out}") == 1
    assert "is there already" in capsys.readouterr().err


def test_lines_of_unknown_origin_are_not_gone_on_with(capsys, model, prompts, tmp_path):
    (tmp_path / "out.jsonl.partial").write_text('{"text": "mine"}\n')
    assert run(f"--model={model}", f"--prompts={prompts}", f"--out={tmp_path / 'out.jsonl'}", *SHORT) == 1
    assert "out.jsonl.partial.json" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl.partial").read_text() == '{"text": "mine"}\n'


def test_a_run_that_learnt_left_to_right_is_sampled_so(capsys, base, text, tmp_path):
    workdir = tmp_path / "run"
    settings = {"model.source": base, "model.init": "random", "model.mask_token": "none", "num_steps": 1,
                "objective.name": "autoregressive", "objective.anneal_steps": 0, "optimizer.warmup_steps": 0,
                "data.train": text, "data.length": 16, "data.batch_size": 8, "log.tensorboard": "false"}
    assert main(["train", "--config=quickstart", f"--workdir={workdir}",
                 *(f"--config.{key}={value}" for key, value in settings.items())]) == 0
    capsys.readouterr()
    written = []
    for more in ((), ("--policy=autoregressive",)):
        assert run(f"--model={workdir}", "--prompt=The", "--max_new_tokens=6", "--json=-", *more) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["policy"] == "autoregressive"
        written.append(result["samples"])
    assert written[0] == written[1]


def test_other_models_are_sampled_by_confidence_and_need_a_mask_token(lm):
    config = SamplerConfig()
    assert sample.resolve_policy(config, None, lm) == config
    bare = DiffusionLM(dataclasses.replace(lm.pretrained, diffusion=dataclasses.replace(lm.pretrained.diffusion, mask_token_id=None)))
    with pytest.raises(ConfigError, match="--policy=autoregressive"):
        sample.resolve_policy(config, None, bare)
    assert sample.resolve_policy(config, "confidence", bare) == config


def test_what_is_watched_is_what_is_written(capsys, model, tmp_path):
    arguments = (f"--model={model}", "--prompt", *PROMPTS, *SHORT, "--batch_size=2")
    assert run(*arguments) == 0
    plain = capsys.readouterr().out
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    assert run(*arguments, "--stream", f"--trace={page}") == 0
    assert capsys.readouterr().out == plain  # no terminal here, so nothing is drawn
    content = json.loads(re.search(r'id="trace">(.*?)</script>', page.read_text())[1])
    assert len(content["samples"]) == len(PROMPTS) and "confidence, 3 steps" in content["caption"]
    assert run(*arguments, f"--trace={picture}") == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_terminal_shows_each_step_over_the_last(capsys, monkeypatch, lm):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "8")
    with Live(lm.tokenizer) as live:
        lm.generate(["The cat", "Tom"], max_new_tokens=8, num_steps=4, on_step=live)
    frames = re.split(r"(\r|\x1b\[\d+F)\x1b\[J", capsys.readouterr().out)[1:]
    moves, shown = frames[::2], frames[1::2]
    assert shown[0].startswith("step 0\nThe cat" + MASK * 8) and "Tom" + MASK * 8 in shown[0]
    assert shown[-2].startswith("step 4\nThe cat") and MASK not in shown[-2] and shown[-1] == ""
    for frame, move in zip(shown, moves[1:], strict=False):  # the cursor goes up as far as lines were drawn
        assert move == f"\x1b[{frame.count(chr(10))}F" and frame.count("\n") < 8


def test_a_text_that_is_partly_there(lm):
    tokens = np.array(lm.tokenizer("The cat sat", add_special_tokens=False)["input_ids"])
    masked = np.zeros(len(tokens), bool)
    assert partial_text(lm.tokenizer, tokens, masked, len(tokens)) == "The cat sat"
    masked[1:-1] = True
    text = partial_text(lm.tokenizer, tokens, masked, len(tokens))
    assert text == lm.tokenizer.decode(tokens[:1]) + MASK * (len(tokens) - 2) + lm.tokenizer.decode(tokens[-1:])
    assert partial_text(lm.tokenizer, tokens, ~masked | True, 2) == MASK * 2
    assert wrap("abcde\n日本語\x1b[2J", 4) == ["abcd", "e", "日本", "語 [", "2J"]
    Live(lm.tokenizer)(Snapshot(0, np.zeros(1, int), np.array([1]), tokens[None], masked[None], masked[None]))
