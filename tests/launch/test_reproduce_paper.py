"""`launch/reproduce_paper.sh` on local stand-ins: a small model in the reference's layout, and the reference's code."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.launch.stand_in_cloud import ROOT

SCRIPT = str(ROOT / "launch/reproduce_paper.sh")
BASE = ROOT / "assets/stories-gpt2"
REFERENCE = '''
import pathlib

import safetensors.torch
import torch
import transformers


class DiscreteDiffusionModel(torch.nn.Module):
    @classmethod
    def from_pretrained(cls, directory, *, model, config, tokenizer, device):
        made = cls()
        stored = safetensors.torch.load_file(pathlib.Path(directory) / "model.safetensors")
        words = stored.get("embed_tokens.weight", stored.get("lm_head.weight"))
        config.vocab_size = len(words)
        made.net = transformers.GPT2LMHeadModel(config)
        names = {name.replace("denoise_model.", "transformer."): tensor for name, tensor in stored.items()}
        missing, _ = made.net.load_state_dict({**names, "transformer.wte.weight": words, "lm_head.weight": words},
                                              strict=False)
        assert not missing
        return made

    def forward(self, tokens, attention_mask):
        return self.net(tokens, attention_mask=attention_mask).logits


def get_anneal_attn_mask(length, batch, dtype, device, attn_mask_ratio):
    assert attn_mask_ratio == 1.0
    return torch.zeros(batch, 1, length, length, dtype=dtype)
'''


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", SCRIPT, *arguments], text=True, capture_output=True, env=os.environ | environment)


def test_dry_run_lists_the_measurements():
    done = script("--data=some text.txt", "--models=diffugpt-m", "--num_rows=8", "--num_masks=4", "--dry-run")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    parent, own, reference, default = [line for line in lines if "evaluate" in line]
    assert {"--model=gpt2-medium", "--objective=autoregressive"} <= set(parent) and "--num_masks=4" not in parent
    assert {"--model=diffusionfamily/diffugpt-m", "--num_masks=4", "--num_rows=8", "some text.txt"} <= set(own)
    names = "hellaswag,winogrande,social_iqa,piqa,lambada,triviaqa".split(",")
    for line, tasks in ((reference, ",".join(f"diffullama_{name}" for name in names)),
                        (default, ",".join(names).replace("lambada", "lambada_openai"))):
        assert {"--model=diffusionfamily/diffugpt-m", "--parent=gpt2-medium", f"--tasks={tasks}"} <= set(line)
        assert not {"--num_rows=8", "--num_masks=4", "--data"} & set(line)


def test_without_a_text_only_tasks_are_measured():
    asked = ["--limit=3", "--data_dir=my tasks", "--batch_size=4"]
    done = script("--models=diffugpt-s", "--tasks=piqa", *asked, "--dry-run")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [set(asked) <= set(line) for line in lines if "evaluate" in line] == [True, True]


@pytest.mark.parametrize(("arguments", "code", "mentions"), [
    (["--num_rows=3"], 2, "--num_rows"),
    (["--data=x", "--models=diffugpt-xl"], 2, "'diffugpt-xl'"),
    (["--data=x", "--reference=nowhere"], 2, "model.py"),
    (["--data=x", "--checkpoints=nowhere"], 1, "--checkpoints=nowhere"),
])
def test_wrong_arguments_are_one_sentence(arguments, code, mentions):
    done = script(*arguments, "--dry-run")
    assert done.returncode == code and mentions in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_measures_a_published_checkpoint_and_its_parent(tmp_path):
    from dlm_jax import DiffusionLM

    checkpoints = tmp_path / "checkpoints"
    lm = DiffusionLM.from_pretrained(BASE, mask_token="<|mask|>")
    lm.save_pretrained(checkpoints / "diffugpt-s", layout="diffugpt")
    shutil.copytree(BASE, checkpoints / "gpt2")
    rows = {"piqa": {"goal": "eat", "sol1": "with a spoon", "sol2": "with a tree", "label": 0},
            "lambada": {"text": "Once upon a time"}, "rocstories": {
                **{f"InputSentence{n}": "Tom ran." for n in range(1, 5)}, "RandomFifthSentenceQuiz1": "He won.",
                "RandomFifthSentenceQuiz2": "No.", "AnswerRightEnding": 1}}
    (tmp_path / "tasks").mkdir()
    for task, row in rows.items():
        (tmp_path / f"tasks/{task}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference/model.py").write_text(REFERENCE)
    output = tmp_path / "out"
    done = script(f"--data={ROOT / 'assets/stories-text/heldout.jsonl'}", "--models=diffugpt-s",
                  f"--checkpoints={checkpoints}", f"--reference={tmp_path / 'reference'}",
                  f"--reference_python={sys.executable}", f"--output={output}",
                  f"--data_dir={tmp_path / 'tasks'}", "--tasks=piqa,lambada_openai,rocstories", "--limit=2",
                  "--num_rows=4", "--num_masks=2", "--length=64", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "diffugpt-s.parity.json").read_text())["max_difference"] < 1e-3
    own, parent = (json.loads((output / f"diffugpt-s.text{suffix}.json").read_text()) for suffix in ("", ".parent"))
    assert own["objective"] == "diffusion" and own["nats_per_token"] > parent["nats_per_token"] > 0.5
    table = (output / "table.md").read_text()
    assert f"| diffugpt-s | {own['nats_per_token']:.4f} ± " in table
    found = {protocol: json.loads((output / f"diffugpt-s.{protocol}.json").read_text())
             for protocol in ("reference", "default")}
    assert found["reference"]["settings"]["num_masks"] == 32
    rows = {tuple(line.split(" | ")[:2]): line.split(" | ") for line in table.splitlines()}
    for which, column in ((0, 4), (1, 7)):
        for place, (protocol, task, metric) in enumerate((("reference", "diffullama_lambada", "stripped_match"),
                                                          ("default", "lambada_openai", "acc"))):
            model = found[protocol]["models"][which]
            mean = found[protocol]["tasks"][task]["metrics"][metric]["models"][model]["mean"]
            assert rows["| lambada_openai", "last word"][column + place].startswith(f"{100 * mean:.1f} ± ")
    assert rows["| piqa", "acc"][2:4] == ["2", "57.7"] and rows["| piqa", "acc"][6] == "62.1"
    assert ("| rocstories", "rougeL") in rows and "hellaswag" not in table
