"""Runs from end to end: outputs, resuming bit for bit, other meshes, signals, goodput."""

import json
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from dlm_jax.checkpoints import load_pretrained
from dlm_jax.checkpoints.orbax import saved_steps
from dlm_jax.diffusion import ObjectiveConfig
from dlm_jax.errors import TrainingError
from dlm_jax.parallel import MeshConfig
from dlm_jax.training import read_records, setup, train
from dlm_jax.training.step import make_train_step
from tests.training.conftest import changed, checkpoint_arrays

TIMING = ("tokens_per_second", "seconds_per_step", "slowest_step_seconds", "data_stall", "peak_memory_gib")


def records(workdir, last_step=20):
    """All records without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in TIMING} for r in read_records(workdir) if r["step"] <= last_step]


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


def test_resumed_run_is_the_uninterrupted_run_bit_for_bit(full_run, config, tmp_path):
    train(changed(config, "num_steps", 10), tmp_path)
    summary = train(config, tmp_path)
    assert summary["changes"] == ["num_steps: 10 -> 20"]
    expected, found = checkpoint_arrays(full_run[0], 20), checkpoint_arrays(tmp_path, 20)
    assert len(expected) > 60
    assert {name for name in expected if not np.array_equal(expected[name], found[name])} == set()
    found = [record for record in records(tmp_path) if record["step"] != 10 or record["kind"] != "train"]
    assert found == records(full_run[0])


def test_resuming_drops_records_after_the_checkpoint(full_run, config, tmp_path):
    train(changed(config, "num_steps", 10), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 12, "kind": "train", "loss": 1.0}) + '\n{"step": 13, "ki')
    train(changed(config, "num_steps", 11), tmp_path)
    assert [r["step"] for r in read_records(tmp_path, "train")] == [4, 8, 10, 11]


def test_signal_saves_and_stops(full_run, config, tmp_path):
    def interrupt():
        while not (tmp_path / "metrics.jsonl").exists() or not read_records(tmp_path, "train"):
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    summary = train(changed(config, "num_steps", 10_000), tmp_path)
    assert summary["interrupted"] and 4 <= summary["step"] < 10_000
    assert saved_steps(tmp_path)[-1] == summary["step"]


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


def test_autoregressive_run(config, tmp_path):
    run = changed(changed(config, "objective", ObjectiveConfig(name="autoregressive")), "num_steps", 12)
    run = changed(run, "model.mask_token", None)
    summary = train(run, tmp_path)
    assert summary["train"]["masked_tokens"] == 16 * 15  # every token but the first of each row
    assert summary["train"]["bound"] == pytest.approx(summary["train"]["masked_nll"])
    assert summary["validation"]["bound"] < read_records(tmp_path, "validation")[0]["bound"]
    assert load_pretrained(tmp_path).diffusion.mask_token_id is None


def test_goodput_over_all_starts(config, tmp_path, capsys):
    summary = train(changed(config, "num_steps", 10), tmp_path)
    assert 0 < summary["goodput"] < 1
    assert sum(summary["seconds_by_category"].values()) == pytest.approx(summary["seconds"], rel=0.5, abs=10)
    assert "time       " in capsys.readouterr().out
    with (tmp_path / "metrics.jsonl").open("a") as file:  # it went further before it died
        file.write(json.dumps({"step": 16, "kind": "train", "seconds_per_step": 5}) + "\n")
    again = train(changed(config, "num_steps", 12), tmp_path)
    assert again["seconds_by_category"]["lost_steps"] == 30
    assert again["seconds_by_category"]["compilation"] > summary["seconds_by_category"]["compilation"]


def test_compilation_cache(config, tmp_path):
    before, programs = jax.config.jax_compilation_cache_dir, tmp_path / "programs"
    try:
        reset_cache()
        jax.clear_caches()
        train(changed(changed(config, "num_steps", 1), "compilation_cache", str(programs)), tmp_path / "run")
        assert list(programs.iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        reset_cache()
