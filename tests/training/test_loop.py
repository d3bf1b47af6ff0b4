import dataclasses
import json
import os
import signal
import threading

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.checkpoints.orbax import named, restore_state, saved_steps
from dlm_jax.errors import ConfigError, DataError, TrainingError
from dlm_jax.training import read_records, setup, train
from dlm_jax.training.config import LogConfig, ModelSource, TrainConfig
from dlm_jax.training.step import make_train_step
from tests.training.conftest import changed

TIMING = ("tokens_per_second", "seconds_per_step", "slowest_step_seconds", "data_stall", "peak_memory_gib")


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The workdir of an uninterrupted run, and its summary."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, train(config, workdir)


def records(workdir, last_step=20):
    """All that does not depend on the clock."""
    return [{k: v for k, v in r.items() if k not in TIMING} for r in read_records(workdir) if r["step"] <= last_step]


def items(workdir, step):
    """Every array of a checkpoint by name."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        return {f"{item}/{name}": np.asarray(value) for item in ("params", "optimizer", "ema")
                for name, value in reader.restore(workdir / "checkpoints" / str(step) / item).items()}


def test_what_a_run_leaves(whole, config):
    workdir, summary = whole
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


def test_resumed_run_is_the_uninterrupted_run_bit_for_bit(whole, config, tmp_path):
    train(changed(config, "num_steps", 10), tmp_path)
    summary = train(config, tmp_path)
    assert summary["changes"] == ["num_steps: 10 -> 20"]
    expected, found = items(whole[0], 20), items(tmp_path, 20)
    assert len(expected) > 60
    assert {name for name in expected if not np.array_equal(expected[name], found[name])} == set()
    wanted = records(whole[0])
    assert [r for r in records(tmp_path) if r["step"] != 10 or r["kind"] != "train"] == wanted


def test_resuming_forgets_what_was_recorded_after_the_checkpoint(whole, config, tmp_path):
    train(changed(config, "num_steps", 10), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 12, "kind": "train", "loss": 1.0}) + '\n{"step": 13, "ki')
    train(changed(config, "num_steps", 11), tmp_path)
    assert [r["step"] for r in read_records(tmp_path, "train")] == [4, 8, 10, 11]


def test_a_signal_saves_and_ends(whole, config, tmp_path):
    def interrupt():
        while not (tmp_path / "metrics.jsonl").exists() or not read_records(tmp_path, "train"):
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    summary = train(changed(config, "num_steps", 10_000), tmp_path)
    assert summary["interrupted"] and 4 <= summary["step"] < 10_000
    assert saved_steps(tmp_path)[-1] == summary["step"]


def test_nan_names_the_step_and_keeps_earlier_checkpoints(config, tmp_path, monkeypatch):
    def make_poisoned(*args, **kwargs):
        step = make_train_step(*args, **kwargs)

        def poisoned(state, batch):
            taken = int(state.step)
            state, metrics = step(state, batch)
            return state, metrics | ({"loss": metrics["loss"] * jax.numpy.nan} if taken == 7 else {})

        return poisoned

    monkeypatch.setattr(setup, "make_train_step", make_poisoned)
    with pytest.raises(TrainingError, match="loss is nan at step 8; .*earlier steps"):
        train(config, tmp_path)
    assert saved_steps(tmp_path) == [5]
    assert [r["step"] for r in read_records(tmp_path, "train")] == [4]


def test_a_finished_run_has_nothing_to_do(whole, config, capsys):
    summary = train(config, whole[0])
    assert summary["step"] == 20 and summary["train"] == whole[1]["train"]
    assert "has taken its 20 steps" in capsys.readouterr().out


@pytest.mark.parametrize("key, value", [("seed", 4), ("data.length", 8), ("optimizer.name", "lion"),
                                        ("model.mask_token", 3), ("objective.shift", False),
                                        ("optimizer.ema_decay", 0.0)])
def test_changes_that_would_make_another_run_are_refused(whole, config, key, value):
    with pytest.raises(ConfigError, match=key):
        train(changed(changed(config, key, value), "num_steps", 25), whole[0])


def test_other_text_under_the_same_name_is_refused(config, corpus, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(corpus.read_text())
    run = changed(changed(config, "data.train", (str(text),)), "num_steps", 1)
    train(run, tmp_path / "run")
    text.write_text(corpus.read_text().replace("a", "b"))
    with pytest.raises(DataError, match="began with"):
        train(changed(run, "num_steps", 2), tmp_path / "run")


def test_a_workdir_gives_its_model_without_optimizer_or_mesh(whole, config):
    workdir, summary = whole
    loaded = load_pretrained(workdir)
    assert loaded.mask_token_id == 11 and loaded.model.config.vocab_size == 12
    assert loaded.tokenizer.decode([1, 2, 11]) == "ab<mask>" and loaded.shift and loaded.source.endswith("@20")
    leaves = jax.tree.leaves(nnx.state(loaded.model))
    assert all(len(leaf.devices()) == 1 for leaf in leaves)
    stored = items(workdir, 20)
    assert np.array_equal(loaded.model.embed.embedding[...], stored["ema/embed.embedding"])
    assert load_pretrained(f"{workdir}@best").source.endswith(f"@{summary['best_step']}")
    assert load_pretrained(f"{workdir}@15").source.endswith("@15")


def test_a_state_moves_to_another_mesh(whole, config, tmp_path):
    """Fewer devices take over, and go on with the same loss to rounding."""
    import shutil

    from dlm_jax.parallel import MeshConfig

    shutil.copytree(whole[0], tmp_path / "run", ignore=shutil.ignore_patterns("20"))
    assert saved_steps(tmp_path / "run")[-1] == 15
    train(changed(config, "mesh", MeshConfig(data=2, fsdp=2, tensor=2)), tmp_path / "run")
    for kind in ("train", "validation"):
        expected, found = read_records(whole[0], kind)[-1], read_records(tmp_path / "run", kind)[-1]
        assert found["bound"] == pytest.approx(expected["bound"], rel=1e-5)


def test_sampled_text_is_logged(config, tmp_path):
    run = changed(changed(config, "num_steps", 2), "log.sample_every", 2)
    train(changed(run, "log.sample_steps", 4), tmp_path)
    (record,) = read_records(tmp_path, "sample")
    assert record["step"] == 2 and set(record["text"]) <= set("abcdefgh <unk>")


def test_autoregressive_training_on_the_same_machine(config, tmp_path):
    from dlm_jax.training.config import ObjectiveConfig

    run = changed(changed(config, "objective", ObjectiveConfig(name="autoregressive")), "num_steps", 12)
    run = changed(run, "model.mask_token", None)
    summary = train(run, tmp_path)
    assert summary["train"]["masked_tokens"] == 16 * 15  # every token but the first of each row
    assert summary["train"]["bound"] == pytest.approx(summary["train"]["masked_nll"])
    assert summary["validation"]["bound"] < read_records(tmp_path, "validation")[0]["bound"]
    assert load_pretrained(tmp_path).mask_token_id is None


def test_what_has_been_learnt_without_the_shift_goes_on_without_it(config, pretrained, tmp_path):
    theirs = load_pretrained(pretrained, mask_token=10)
    save_pretrained(tmp_path / "base", dataclasses.replace(theirs, diffusion=dataclasses.replace(theirs.diffusion, shift=False)))
    run = dataclasses.replace(config, num_steps=1, model=ModelSource(source=str(tmp_path / "base")))
    with pytest.raises(ConfigError, match="objective.shift is true; set it to false to go on"):
        train(run, tmp_path / "run")
    train(changed(run, "objective.shift", False), tmp_path / "run")
    assert not load_pretrained(tmp_path / "run").shift


@pytest.mark.parametrize("key, value, message", [
    ("model.mask_token", None, "mask token"), ("data.length", 64, "32 positions"), ("data.batch_size", 24, "divide"),
    ("model.source", "", "model.source"), ("mesh.context", 3, "devices"), ("mesh.tensor", 3, "devices"),
    ("log.wandb", "project", "wandb")])
def test_what_cannot_work_is_refused_at_start(config, tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=message):
        train(changed(config, key, value), tmp_path)


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_a_state_is_restored_on_any_number_of_devices(whole, config, devices):
    from dlm_jax.parallel import make_mesh
    from dlm_jax.training.optimizer import make_optimizer
    from dlm_jax.training.step import state_layout

    mesh = make_mesh(devices=jax.devices()[:devices])
    model = load_pretrained(whole[0]).model
    layout = state_layout(nnx.state(model), make_optimizer(config.optimizer, 20), True, mesh)
    state, progress = restore_state(whole[0], 20, layout)
    assert int(state.step) == 20 and progress["metrics"]["steps"] == 0
    found = {f"{item}/{name}": value for item, tree in (
        ("params", state.params), ("optimizer", state.opt_state), ("ema", state.ema)) for name, value in
        named(tree).items()}
    stored = items(whole[0], 20)
    assert found.keys() == stored.keys() and all(len(value.devices()) == devices for value in found.values())
    for name, value in stored.items():
        np.testing.assert_array_equal(found[name], value)



def test_a_trace_of_given_steps(config, tmp_path, capsys):
    train(changed(changed(config, "num_steps", 4), "log.profile", (2, 3)), tmp_path)
    assert "step       3  trace written to" in capsys.readouterr().out
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_time_is_accounted_for_over_all_starts(config, tmp_path, capsys):
    summary = train(changed(config, "num_steps", 10), tmp_path)
    assert 0 < summary["goodput"] < 1
    assert sum(summary["seconds_by_category"].values()) == pytest.approx(summary["seconds"], rel=0.5, abs=10)
    assert "time       " in capsys.readouterr().out
    with (tmp_path / "metrics.jsonl").open("a") as file:  # it went further before it died
        file.write(json.dumps({"step": 16, "kind": "train", "seconds_per_step": 5}) + "\n")
    again = train(changed(config, "num_steps", 12), tmp_path)
    assert again["seconds_by_category"]["lost_steps"] == 30
    assert again["seconds_by_category"]["compilation"] > summary["seconds_by_category"]["compilation"]


def test_programs_are_kept_where_they_are_wanted(config, tmp_path):
    before, programs = jax.config.jax_compilation_cache_dir, tmp_path / "programs"
    try:
        reset_cache()
        jax.clear_caches()
        train(changed(changed(config, "num_steps", 1), "compilation_cache", str(programs)), tmp_path / "run")
        assert list(programs.iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        reset_cache()


@pytest.mark.parametrize("steps", [(5,), (6, 5), (0, 3)])
def test_a_trace_of_senseless_steps_is_refused(steps):
    with pytest.raises(ConfigError, match="first and the last step"):
        TrainConfig(log=LogConfig(profile=steps))
