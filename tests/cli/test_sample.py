"""`dlm sample`: its settings, files of prompts, resumed files, and the view of the steps."""

import dataclasses
import io
import json
import re

import numpy as np
import pytest
import rich.console

from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.cli import sample
from dlm_jax.cli.main import Parser, main
from dlm_jax.cli.sample import MASK, LiveText, partial_text
from dlm_jax.errors import ConfigError
from dlm_jax.pipeline import DiffusionLM
from dlm_jax.sampling import POLICIES, SamplerConfig
from tests.cli.conftest import without_mask_token

PROMPTS = ["The cat", "", "A dog sat on", "The bird", "Tom and"]
SHORT = ("--max_new_tokens=6", "--num_steps=3")


@pytest.fixture(scope="module")
def lm(model):
    return DiffusionLM.from_pretrained(model)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": text, "note": "é\u2028"}, ensure_ascii=i % 2 == 0) + "\n"
                            for i, text in enumerate(PROMPTS)), encoding="utf-8")
    return path


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test if a model is loaded."""
    monkeypatch.setattr(sample, "load_model", lambda arguments: pytest.fail("the model was loaded"))


def run(*argv: object) -> int:
    return main(["sample", *map(str, argv)])


def refused(capsys, *argv: object) -> str:
    """Returns the sentence of a command that is refused."""
    assert run(*argv) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


def test_flags_and_defaults():
    parser = Parser()
    sample.add_arguments(parser)
    groups = {group.title: {action.dest for action in group._group_actions} for group in parser._action_groups}
    settings = {field.name for field in dataclasses.fields(SamplerConfig)}
    assert set.union(*(groups[title] for title in ("steps", "tokens", "cache", "drafts"))) == settings
    for field in dataclasses.fields(SamplerConfig):
        assert parser.get_default(field.name) is None  # the model may have a default of its own
    assert {*POLICIES, "linear", "cosine", "none", "prefix", "dual"} <= set(re.findall(r"\w+", parser.format_help()))


def test_settings_reach_the_sampler(capsys, model, lm):
    settings = dict(policy="threshold", threshold=0.4, block_length=4, remask=0.1, temperature=0.7, top_p=0.9, top_k=20,
                    repetition_penalty=1.3, eos_penalty=5.0, cfg_scale=0.5, cache="dual", cache_refresh_interval=2,
                    num_steps=6, step_schedule="cosine", seed=3)
    assert run(f"--model={model}", "--prompt", *PROMPTS, "--max_new_tokens=8", "--json=-",
               *(f"--{name}={value}" for name, value in settings.items())) == 0
    result = json.loads(capsys.readouterr().out)
    assert [line["text"] for line in result["samples"]] == lm.generate(PROMPTS, max_new_tokens=8, **settings)
    assert settings.items() <= result.items()


def test_a_threshold_names_its_policy(capsys, model):
    results = []
    for flags in (("--threshold=0.4",), ("--threshold=0.4", "--policy=threshold")):
        assert run(f"--model={model}", "--prompt", PROMPTS[0], "--max_new_tokens=8", "--json=-", *flags) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["samples"] == results[1]["samples"] and results[0]["policy"] == "threshold"


@pytest.mark.parametrize(("arguments", "mentions"), [
    (("--policy=best",), "best"),
    (("--policy=autoregressive", "--num_steps=4"), "num_steps"),
    (("--num_samples=0",), "--num_samples"),
    (("--batch_size=0",), "--batch_size"),
    (("--seed=-1",), "--seed"),
    (("--infill", "no gap"), "no gap"),
    (("--trace=x.gif",), ".html"),
    (("--trace=no/folder/x.png",), "no/folder"),
    (("--prompts={prompts}",), "--out"),
    (("--out=x.jsonl",), "--prompts"),
    (("--prompts={prompts}", "--out={prompts}"), "prompts.jsonl"),
    (("--prompts={prompts}", "--out=no/folder/x.jsonl"), "no/folder"),
    (("--prompts={prompts}", "--out=x.jsonl", "--stream"), "--stream"),
    (("--prompts=none.jsonl", "--out=x.jsonl"), "none.jsonl"),
    (("--prompts={csv}", "--out=x.jsonl"), ".jsonl"),
])
def test_bad_settings(capsys, no_model, model, prompts, arguments, mentions):
    csv = prompts.with_suffix(".csv")
    csv.touch()
    arguments = (argument.format(prompts=prompts, csv=csv) for argument in arguments)
    assert mentions in refused(capsys, f"--model={model}", *arguments)


@pytest.mark.parametrize(("content", "mentions"), [
    (b'{"prompt": "a"}\n\n{"infill": "a <mask> b"}\n', "line 3"),
    (b'{"prompt": "a"}\n{prompt: 3}\n', "line 2"),
    (b'{"prompt": 3}\n', "line 1: its prompt"),
    (b"[3]\n", "line 1"),
    (b'{"id": 3}\n', "line 1: it has neither"),
    (b'{"prompt": "a", "infill": "<mask>"}\n', "line 1: it has both"),
    (b'{"infill": "a"}\n', "line 1"),
    (b'{"prompt": "a", "text": "b"}\n', "'text'"),
    (b'"a"\n"\xff"\n', "line 2"),
    (b'"\\ud800"\n', "line 1"),
    (b"\n \n", "empty"),
])
def test_malformed_line(capsys, no_model, model, tmp_path, content, mentions):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    error = refused(capsys, f"--model={model}", f"--prompts={path}", f"--out={tmp_path / 'out.jsonl'}")
    assert mentions in error and str(path) in error
    assert [file.name for file in tmp_path.iterdir()] == ["bad.jsonl"]


def test_too_long_line(capsys, model, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("The\n" + "The cat sat " * 20 + "\n")
    error = refused(capsys, f"--model={model}", f"--prompts={path}", f"--out={tmp_path / 'out.jsonl'}", *SHORT)
    assert "line 2" in error and "32" in error and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("each, batch_sizes", [(1, (3,)), (2, (3, 64))])
def test_file_of_prompts(model, lm, prompts, tmp_path, each, batch_sizes):
    contents = []
    for batch_size in batch_sizes:
        out = tmp_path / f"{batch_size}.jsonl"
        assert run(f"--model={model}", f"--prompts={prompts}", f"--out={out}", *SHORT, f"--batch_size={batch_size}",
                   f"--num_samples={each}", f"--json={tmp_path / 'result.json'}") == 0
        contents.append(out.read_bytes())
    assert len(set(contents)) == 1
    assert not list(tmp_path.glob("*.partial*"))
    lines = lines_of(out)
    given = [text for text in PROMPTS for _ in range(each)]
    assert [line["text"] for line in lines] == lm.generate(given, max_new_tokens=6, num_steps=3)
    assert [line["id"] for line in lines] == [i for i in range(len(PROMPTS)) for _ in range(each)]
    assert [line.get("sample") for line in lines] == ([None] if each == 1 else [0, 1]) * len(PROMPTS)
    assert all(line["note"] == "é\u2028" for line in lines)
    result = json.loads((tmp_path / "result.json").read_text())
    computed = -(-len(lines) // min(batch_sizes[-1], len(lines))) * min(batch_sizes[-1], len(lines))
    assert result["texts"] == len(lines) and 0 < result["tokens_now"] <= 6 * computed
    assert result["tokens_per_pass"] == result["tokens"] / result["forward_passes"]


def test_gaps_and_plain_lines(model, lm, tmp_path):
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


def test_resume_gives_the_same_bytes(capsys, monkeypatch, model, prompts, tmp_path):
    arguments = (f"--model={model}", f"--prompts={prompts}", *SHORT, "--num_samples=2", "--batch_size=3")
    complete, out, partial = (tmp_path / name for name in ("complete.jsonl", "out.jsonl", "out.jsonl.partial"))
    assert run(*arguments, f"--out={complete}") == 0
    generate, calls = DiffusionLM.generate, []

    def generate_until(limit: int | None):
        def patched(lm, given, **settings):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(list(settings["example_index"]))
            return generate(lm, given, **settings)

        calls.clear()
        monkeypatch.setattr(DiffusionLM, "generate", patched)

    generate_until(2)
    assert run(*arguments, f"--out={out}") == 130
    assert "6 lines" in capsys.readouterr().err and not out.exists() and len(lines_of(partial)) == 6
    first = complete.read_bytes().split(b"\n")
    partial.write_bytes(b"\n".join(first[:7]) + b"\n" + first[7][:10])  # as if killed within the eighth line

    for other, mentions in (("--temperature=0.5", "temperature: 1.0 -> 0.5"), ("--seed=1", "seed: 0 -> 1"),
                            ("--num_samples=1", "num_samples: 2 -> 1"), ("--max_new_tokens=7", "max_new_tokens: 6 ->")):
        assert mentions in refused(capsys, *arguments, f"--out={out}", other)
    content = prompts.read_bytes()
    prompts.write_bytes(content.replace(b"dog", b"cow"))
    assert "input_sha256" in refused(capsys, *arguments, f"--out={out}")
    prompts.write_bytes(content)

    generate_until(None)
    assert run(*arguments, f"--out={out}") == 0
    assert out.read_bytes() == complete.read_bytes() and not list(tmp_path.glob("*.partial*"))
    assert calls == [[6, 7, 8], [7, 8, 9]]


def test_unknown_partial_file(capsys, model, prompts, tmp_path):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text('{"text": "mine"}\n')
    error = refused(capsys, f"--model={model}", f"--prompts={prompts}", f"--out={tmp_path / 'out.jsonl'}", *SHORT)
    assert "out.jsonl.partial.json" in error and partial.read_text() == '{"text": "mine"}\n'


def test_autoregressive_run(capsys, base, tmp_path):
    save_pretrained(tmp_path / "run", dataclasses.replace(load_pretrained(base, init="random"),
                                                          recipe={"objective.name": "autoregressive"}))
    results = []
    for more in ((), ("--policy=autoregressive",)):
        assert run(f"--model={tmp_path / 'run'}", "--prompt=The", "--max_new_tokens=6", "--json=-", *more) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["policy"] == "autoregressive" and results[0]["samples"] == results[1]["samples"]


def test_missing_mask_token(lm):
    assert sample.complete_settings({}, lm) == SamplerConfig()
    bare = without_mask_token(lm)
    with pytest.raises(ConfigError, match="--mask_token"):
        sample.complete_settings({}, bare)
    assert sample.complete_settings({"policy": "confidence"}, bare) == SamplerConfig()


def test_trace_and_stream(capsys, model, tmp_path):
    arguments = (f"--model={model}", "--prompt", *PROMPTS, *SHORT, "--batch_size=2")
    assert run(*arguments) == 0
    plain = capsys.readouterr().out
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    assert run(*arguments, "--stream", f"--trace={page}") == 0
    assert capsys.readouterr().out == plain  # no terminal here, so nothing is shown
    content = json.loads(re.search(r'id="trace">(.*?)</script>', page.read_text())[1])
    assert len(content["samples"]) == len(PROMPTS) and "confidence, 3 steps" in content["caption"]
    assert run(*arguments, f"--trace={picture}") == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_live_text(monkeypatch, lm):
    screen = io.StringIO()
    console = rich.console.Console(file=screen, force_terminal=True, width=40, height=8)
    monkeypatch.setattr("rich.live.get_console", lambda: console)
    with LiveText(lm.tokenizer) as live:
        lm.generate(["The cat", "Tom"], max_new_tokens=8, num_steps=4, on_step=live)
        live.show(5, ["a\x1b[2Jb"])
    frames = re.split(r"(?=step \d)", screen.getvalue())[1:7]
    assert [frame[:6] for frame in frames] == [f"step {step}" for step in range(6)]
    assert "The cat" + MASK * 8 in frames[0] and "Tom" + MASK * 8 in frames[0]
    assert "The cat" in frames[4] and MASK not in frames[4]
    assert all("\x1b[1A" in frame and frame.count("\n") < 8 for frame in frames)  # the cursor goes back up
    assert "a [2Jb" in frames[5]


def test_partial_text(lm):
    tokens = np.array(lm.tokenizer("The cat sat", add_special_tokens=False)["input_ids"])
    masked = np.zeros(len(tokens), bool)
    assert partial_text(lm.tokenizer, tokens, masked, len(tokens)) == "The cat sat"
    masked[1:-1] = True
    text = partial_text(lm.tokenizer, tokens, masked, len(tokens))
    assert text == lm.tokenizer.decode(tokens[:1]) + MASK * (len(tokens) - 2) + lm.tokenizer.decode(tokens[-1:])
    assert partial_text(lm.tokenizer, tokens, ~masked | True, 2) == MASK * 2
