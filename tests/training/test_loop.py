"""Runs from end to end: outputs, resuming bit for bit, other meshes, signals, goodput."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from dlm_jax import matmul
from dlm_jax.checkpoints import load_pretrained
from dlm_jax.checkpoints.orbax import named, restore_state, saved_steps
from dlm_jax.diffusion import ObjectiveConfig
from dlm_jax.errors import ConfigError, DataError, TrainingError
from dlm_jax.parallel import MeshConfig, make_mesh
from dlm_jax.training import read_records, setup, train
from dlm_jax.training.hooks import PeriodicEval
from dlm_jax.training.optimizer import make_optimizer
from dlm_jax.training.state import state_layout
from dlm_jax.training.step import make_train_step
from tests.training.conftest import changed, checkpoint_arrays

TIMING = ("tokens_per_second", "seconds_per_step", "slowest_step_seconds", "data_stall", "peak_memory_gib")


def records(workdir):
    """All records without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in TIMING} for r in read_records(workdir)]


def test_outputs_of_a_run(full_run, config):
    workdir, summary = full_run
    assert summary["step"] == 20 and summary["tokens"] == 20 * 16 * 16 and not summary["interrupted"]
    assert [r["step"] for r in read_records(workdir, "train")] == [4, 8, 12, 16, 20]
    validation = read_records(workdir, "validation")
    assert [r["step"] for r in validation] == [0, 5, 10, 15, 20]  # with every checkpoint, so that the best is known
    best = min((r for r in validation if r["step"]), key=lambda r: r["bound"])["step"]
    assert summary["best_step"] == best
    assert set(saved_steps(workdir)) == {15, 20, best}
    assert list((workdir / "tensorboard").iterdir())
    record = read_records(workdir, "train")[0]
    assert {"loss", "bound", "masked_nll", "accuracy", "grad_norm", "learning_rate", "anneal_ratio"} < set(record)
    assert record["anneal_ratio"] == 0.5  # (step + 1) / anneal_steps at the fourth step
    assert json.loads((workdir / "summary.json").read_text()) == json.loads(json.dumps(summary))


@pytest.fixture(scope="module")
def resumed(config, tmp_path_factory):
    """A run that SIGTERM stops after step 7, with records of later steps as a crash leaves them, started again."""
    def interrupt(run):
        return PeriodicEval("signal", "sampling", lambda params: (os.kill(os.getpid(), signal.SIGTERM), ({}, ""))[1],
                            (6,), at_ends=False)

    workdir = tmp_path_factory.mktemp("runs") / "resumed"
    stopped = train(changed(config, "num_steps", 30), workdir, [interrupt])
    steps = saved_steps(workdir)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "kind": "train", "seconds_per_step": 5}\n{"step": 13, "ki')
    return workdir, stopped, steps, train(config, workdir)


def test_signal_saves_and_stops(resumed):
    _, stopped, steps, _ = resumed
    assert stopped["interrupted"] == "SIGTERM" and stopped["step"] == steps[-1] == 7


def test_resuming_is_exact(full_run, resumed):
    workdir, _, _, summary = resumed
    assert summary["changes"] == ["num_steps: 30 -> 20"]
    expected, found = checkpoint_arrays(full_run[0], 20), checkpoint_arrays(workdir, 20)
    assert len(expected) > 60
    assert {name for name in expected if not np.array_equal(expected[name], found[name])} == set()
    assert [record for record in records(workdir) if record["kind"] != "signal"] == records(full_run[0])


def test_resuming_is_exact_in_bfloat16(config, tmp_path, monkeypatch, capsys):
    """On one device, with the products that processors with bfloat16 units take."""
    monkeypatch.setattr(matmul, "has_bfloat16_units", lambda: True)
    monkeypatch.setattr(setup, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
    run = changed(changed(config, "mesh", MeshConfig()), "model.dtype", "bfloat16")
    run = changed(changed(run, "optimizer.accumulate_steps", 1), "validation.every", 0)
    kinds, make_step = [], setup.make_train_step
    monkeypatch.setattr(setup, "make_train_step", lambda *args, **kwargs: (
        kinds.append(kwargs["matmul"]), make_step(*args, **kwargs))[1])
    for name, numbers in {"full": [10], "resumed": [5, 10]}.items():
        for number in numbers:
            train(changed(run, "num_steps", number), tmp_path / name)
    assert kinds == [matmul.FAST] * 3 and capsys.readouterr().out.count("resumed    from step 5") == 1
    expected, found = (checkpoint_arrays(tmp_path / name, 10) for name in ("full", "resumed"))
    assert len(expected) > 60
    assert {name for name in expected if not np.array_equal(expected[name], found[name])} == set()


def test_goodput_over_all_starts(resumed):
    _, first, _, second = resumed
    assert 0 < first["goodput"] < 1
    assert sum(first["seconds_by_category"].values()) == pytest.approx(first["seconds"], rel=0.5, abs=10)
    assert second["seconds_by_category"]["lost_steps"] == 5 * (12 - 7)
    assert second["seconds_by_category"]["compilation"] > first["seconds_by_category"]["compilation"]


def test_nan_raises_and_keeps_checkpoints(config, tmp_path, monkeypatch):
    def make_poisoned(*args, **kwargs):
        step = make_train_step(*args, **kwargs)

        def poisoned(state, batch):
            taken = int(state.step)
            state, metrics = step(state, batch)
            return state, metrics | ({"loss": metrics["loss"] * jax.numpy.nan} if taken == 7 else {})

        return poisoned

    monkeypatch.setattr(setup, "make_train_step", make_poisoned)
    with pytest.raises(TrainingError, match="loss .* step 8"):
        train(config, tmp_path)
    assert saved_steps(tmp_path) == [5]
    assert [r["step"] for r in read_records(tmp_path, "train")] == [4]


def test_finished_run(full_run, config, capsys):
    summary = train(config, full_run[0])
    assert summary["step"] == 20 and summary["train"] == full_run[1]["train"]
    assert "has taken its 20 steps" in capsys.readouterr().out


def test_change_that_makes_another_run_is_refused(full_run, config):
    with pytest.raises(ConfigError, match="seed"):
        train(dataclasses.replace(config, seed=4, num_steps=25), full_run[0])


def test_other_text_is_refused(full_run, config, corpus, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(corpus.read_text().replace("a", "b"))
    shutil.copytree(full_run[0], tmp_path / "run")
    with pytest.raises(DataError, match="training text"):
        train(dataclasses.replace(changed(config, "data.train", (str(text),)), num_steps=25), tmp_path / "run")


@pytest.mark.parametrize("devices", [2, 1])
def test_state_is_restored_on_any_number_of_devices(full_run, config, devices):
    mesh = make_mesh(devices=jax.devices()[:devices])
    params = nnx.state(load_pretrained(full_run[0]).model)
    layout = state_layout(params, make_optimizer(config.optimizer, 20), True, mesh)
    state, progress = restore_state(full_run[0], 20, layout)
    assert int(state.step) == 20 and progress["metrics"]["steps"] == 0
    found = {f"{item}/{name}": value for item, tree in (
        ("params", state.params), ("optimizer", state.opt_state), ("ema", state.ema)) for name, value in
        named(tree).items()}
    stored = checkpoint_arrays(full_run[0], 20)
    assert found.keys() == stored.keys() and all(len(value.devices()) == devices for value in found.values())
    for name, value in stored.items():
        np.testing.assert_array_equal(found[name], value)


def test_workdir_loads_without_optimizer_or_mesh(full_run, config):
    workdir, summary = full_run
    loaded = load_pretrained(workdir)
    assert loaded.diffusion.mask_token_id == 11 and loaded.model.config.vocab_size == 12
    assert loaded.tokenizer.decode([1, 2, 11]) == "ab<mask>"
    assert loaded.diffusion.shift and loaded.source.endswith("@20")
    leaves = jax.tree.leaves(nnx.state(loaded.model))
    assert all(len(leaf.devices()) == 1 for leaf in leaves)
    stored = checkpoint_arrays(workdir, 20)
    assert np.array_equal(loaded.model.embed.embedding[...], stored["ema/embed.embedding"])
    assert load_pretrained(f"{workdir}@best").source.endswith(f"@{summary['best_step']}")
    assert load_pretrained(f"{workdir}@15").source.endswith("@15")


def test_resuming_on_another_mesh(full_run, config, tmp_path):
    """The loss is the same up to rounding."""
    shutil.copytree(full_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("20"))
    assert saved_steps(tmp_path / "run")[-1] == 15
    train(changed(config, "mesh", MeshConfig(data=2, fsdp=2, tensor=2)), tmp_path / "run")
    for kind in ("train", "validation"):
        expected, found = read_records(full_run[0], kind)[-1], read_records(tmp_path / "run", kind)[-1]
        assert found["bound"] == pytest.approx(expected["bound"], rel=1e-5)


def test_autoregressive_run_with_compilation_cache(config, tmp_path):
    run = changed(changed(config, "objective", ObjectiveConfig(name="autoregressive")), "num_steps", 12)
    run = changed(changed(run, "model.mask_token", None), "compilation_cache", str(tmp_path / "programs"))
    before = jax.config.jax_compilation_cache_dir
    try:
        reset_cache()
        summary = train(run, tmp_path / "run")
        assert list((tmp_path / "programs").iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        reset_cache()
    assert summary["train"]["masked_tokens"] == 16 * 15  # every token but the first of each row
    assert summary["train"]["bound"] == pytest.approx(summary["train"]["masked_nll"])
    assert summary["validation"]["bound"] < read_records(tmp_path / "run", "validation")[0]["bound"]
    assert load_pretrained(tmp_path / "run").diffusion.mask_token_id is None
