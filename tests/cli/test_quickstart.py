"""The quickstart: what it plans for a machine, and all of it on a tiny GGUF file."""

import dataclasses
import json
import re

import pytest
import transformers

from dlm_jax import DiffusionLM
from dlm_jax.cli.config import build_config, load_recipe
from dlm_jax.cli.main import main
from dlm_jax.cli.quickstart_plan import (
    MINUTES,
    Plan,
    choose_plan,
    describe,
    estimate_seconds,
    scale_learning_rate,
    whole_recipe,
)
from dlm_jax.errors import ConfigError
from dlm_jax.models import ModelConfig
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.probe import Probe
from tests.checkpoints import gguf_files


@pytest.fixture(scope="module")
def recipe():
    return build_config(TrainConfig, load_recipe("quickstart"))


def probe(step_seconds):
    model = ModelConfig(family="gpt2", vocab_size=10, hidden_size=4, num_layers=1, num_heads=1, num_kv_heads=1,
                        head_dim=4, mlp_size=8, max_length=8, norm="layer", norm_eps=1e-5, activation="gelu",
                        gated_mlp=False, positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True,
                        tie_embeddings=True)
    return Probe(model, setup_seconds=3.0, compile_seconds=8.0, step_seconds=step_seconds)


def test_fast_machine_runs_the_recipe(recipe):
    plan = choose_plan(recipe, probe(0.1), None)
    assert plan == whole_recipe(recipe) and plan.compares
    assert plan.apply(recipe) == recipe
    assert 2 * 800 * 0.1 < estimate_seconds(plan, recipe, probe(0.1)) < 60 * MINUTES


@pytest.mark.parametrize("step_seconds", [0.8, 2.0, 5.0])
def test_slow_machine_runs_what_fits(step_seconds, recipe):
    plan = choose_plan(recipe, probe(step_seconds), None)
    seconds = estimate_seconds(plan, recipe, probe(step_seconds))
    assert 0.9 * 60 * MINUTES < seconds <= 60 * MINUTES
    assert 20 <= plan.num_steps < recipe.num_steps and plan.compares == (step_seconds < 3)
    config = plan.apply(recipe)
    assert config.objective.anneal_steps == round(plan.num_steps * 250 / 800)
    assert config.optimizer.warmup_steps < config.num_steps == plan.num_steps
    text = describe(plan, recipe, probe(step_seconds), "big", 10**8)
    assert f"{plan.num_steps} steps" in text and "15 minutes" in text and "100.0 million" in text
    assert "whole recipe" in text and ("leaves out" in text) != plan.compares


def test_minutes_decide(recipe):
    short, long = (choose_plan(recipe, probe(2.0), minutes) for minutes in (10, 60))
    assert short.num_steps < long.num_steps and (short.compares, long.compares) == (False, True)
    assert estimate_seconds(long, recipe, probe(2.0)) <= 3600
    least = choose_plan(recipe, probe(100.0), 1)  # cannot fit; the estimate says so
    assert least.num_steps == 20 and estimate_seconds(least, recipe, probe(100.0)) > 60
    assert "hours" in describe(least, recipe, probe(300.0), "big", 10**9)
    for minutes in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="--minutes"):
            choose_plan(recipe, probe(1.0), minutes)


def test_larger_models_learn_more_slowly():
    rates = [scale_learning_rate(1.5e-3, params) for params in (10**5, 2_600_000, 124_000_000, 6_700_000_000)]
    assert rates == [1.5e-3, 1.5e-3, 2.2e-4, 3.0e-5]


@pytest.fixture(scope="module")
def tiny(base, tmp_path_factory):
    """A GGUF file with the tokenizer of the tiny base."""
    state = json.loads((base / "tokenizer.json").read_text())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(tokens), n_positions=64, n_embd=16, n_layer=2, n_head=2, n_inner=64, bos_token_id=0,
        eos_token_id=0))
    gguf_files.write(model, path := tmp_path_factory.mktemp("gguf") / "tiny.gguf", metadata={
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in state["merges"]],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0})
    return path


def test_gguf_file_from_end_to_end(tiny, tmp_path, capsys):
    for index in range(12):
        (tmp_path / f"{index}.txt").write_text(f"The cat sat on the mat {index} times and saw Tom. " * 4)
    command = ["quickstart", f"--base={tiny}", f"--data={tmp_path}/*.txt", f"--workdir={tmp_path / 'out'}",
               "--config.num_steps=4", "--config.optimizer.warmup_steps=1", "--config.data.length=16",
               "--config.validation.num_rows=8", "--config.objective.anneal_steps=2"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.index("plan: adapts") < out.index("== training") and "(gpt2, 0.0 million parameters) in 4 steps" in out
    for name in ("the AR parent, exact", "before adaptation", "adapted", "random weights"):
        assert re.search(rf"{name} +\d+\.\d+", out)
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert plan.num_steps == 4 and (tmp_path / "out" / "quickstart.png").is_file()
    assert json.loads((tmp_path / "out" / "adapted" / "config.json").read_text())["data.validation_fraction"] > 0.01
    assert DiffusionLM.from_pretrained(tmp_path / "out" / "export").pretrained.diffusion.mask_token_id is not None

    assert main(command) == 0  # shows the results again, without timing or training
    out = capsys.readouterr().out
    assert "plan: as before" in out and "timing" not in out and "step       1" not in out


def test_plan_leaves_out_the_comparison(tiny, tmp_path, capsys, monkeypatch):
    from dlm_jax.cli import quickstart

    monkeypatch.setattr(quickstart, "choose_plan", lambda config, probe, minutes: dataclasses.replace(
        whole_recipe(config), num_steps=20, num_rows=4, num_masks=2, compares=False))
    (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 100)
    (tmp_path / "held_out.txt").write_text("The dog sat on the mat. " * 50)
    assert main(["quickstart", f"--base={tiny}", f"--data={tmp_path}/text.txt", "--config.data.length=16",
                 f"--validation={tmp_path}/held_out.txt", f"--workdir={tmp_path / 'out'}", "--minutes=1"]) == 0
    out = capsys.readouterr().out
    assert "in 20 steps" in out and "leaves out" in out and "random weights  " not in out
    assert not (tmp_path / "out" / "random_weights").exists()
