"""Runs that learn to write block after block: growing blocks, resumption, the record, and what is refused."""

import dataclasses

import numpy as np
import pytest

from dlm_jax import DiffusionLM
from dlm_jax.diffusion import BlockSpec, ObjectiveConfig
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.parallel import MeshConfig
from dlm_jax.training.config import LoRASettings, ModelSource
from dlm_jax.training.loop import train
from dlm_jax.training.metrics import read_records
from tests.training.conftest import changed

STAGES = ((0, 1), (6, 4))


def growing(config):
    """Twelve steps through two sizes of blocks."""
    objective = ObjectiveConfig(name="block_diffusion", block_size=4, block_size_schedule=STAGES)
    return dataclasses.replace(config, num_steps=12, objective=objective)


@pytest.fixture
def blocks(config):
    return growing(config)


def losses(workdir):
    return [record["loss"] for record in read_records(workdir, "train")]


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The run, uninterrupted."""
    folder = tmp_path_factory.mktemp("blocks") / "whole"
    summary = train(growing(config), folder)
    assert np.isfinite(losses(folder)).all() and summary["validation"]["bound"] < 3
    return folder


def test_a_run_of_growing_blocks_resumes_bit_for_bit(blocks, whole, tmp_path):
    train(changed(blocks, "num_steps", 5), tmp_path / "parts")
    train(blocks, tmp_path / "parts")
    assert losses(tmp_path / "parts")[-1] == losses(whole)[-1]


def test_a_run_of_blocks_is_the_same_on_every_mesh(blocks, whole, tmp_path):
    train(dataclasses.replace(blocks, mesh=MeshConfig(context=2, fsdp=2, data=2)), tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=1e-5)


def test_the_model_of_a_run_knows_its_blocks(whole, tmp_path):
    lm = DiffusionLM.from_pretrained(whole)
    assert lm.pretrained.blocks == BlockSpec(4)
    text, = lm.generate("abc", max_new_tokens=12, num_steps=6)
    assert text.startswith("abc")
    score, = lm.score("abcdefgh", num_samples=8)
    assert 1 < score.nats_per_token < 4
    lm.save_pretrained(tmp_path / "export")
    again = DiffusionLM.from_pretrained(tmp_path / "export")
    assert again.pretrained.blocks == BlockSpec(4) and again.generate("abc", max_new_tokens=12, num_steps=6) == [text]
    assert not (tmp_path / "export" / "sample_torch.py").exists()
    with pytest.raises(CheckpointError, match="writes in blocks"):
        lm.save_pretrained(tmp_path / "release", layout="diffugpt")
    with pytest.raises(ConfigError, match="does not see what stands behind a gap"):
        lm.infill("ab<mask:2>cd")


def with_lora(config, pretrained):
    return dataclasses.replace(config, model=ModelSource(source=str(pretrained), mask_token=10),
                               lora=LoRASettings(rank=2, alpha=4.0))


@pytest.mark.parametrize("size, objective", [(1, "autoregressive"), (16, "diffusion")])
@pytest.mark.parametrize("kind", ["all parameters", "documents apart", "LoRA"])
def test_blocks_of_one_are_the_parents_training_and_one_block_is_full_diffusion(blocks, pretrained, kind, size,
                                                                                objective, tmp_path):
    if kind == "LoRA":
        blocks = with_lora(blocks, pretrained)
    elif kind == "documents apart":
        blocks = changed(blocks, "data.packing", "document_mask")

    def trained(folder, **settings):
        run = dataclasses.replace(blocks, num_steps=4, objective=ObjectiveConfig(**settings))
        train(run, tmp_path / folder)
        return losses(tmp_path / folder)

    assert trained("blocks", name="block_diffusion", block_size=size) == trained("plain", name=objective)


def test_factors_learn_blocks_and_how_clean_ones_are_read_goes_with_them(blocks, pretrained, tmp_path):
    objective = ObjectiveConfig(name="block_diffusion", block_size=4, clean_attention="block_bidirectional")
    run = changed(with_lora(blocks, pretrained), "optimizer.learning_rate", 0.03)
    train(dataclasses.replace(run, objective=objective), tmp_path / "run")
    first, *_, last = [record["bound"] for record in read_records(tmp_path / "run", "validation")]
    assert last < first - 0.02
    beside = DiffusionLM.from_pretrained(tmp_path / "run", merge=False)
    beside.save_pretrained(tmp_path / "merged")
    beside.save_pretrained(tmp_path / "adapter", layout="peft")
    text = "abc", "abcdefgh"
    expected = pytest.approx([x.nats for x in beside.score(text, num_samples=4)], rel=1e-4)
    for folder in ("run", "merged", "adapter"):
        lm = DiffusionLM.from_pretrained(tmp_path / folder)
        assert lm.pretrained.blocks == BlockSpec(4, "block_bidirectional")
        assert [x.nats for x in lm.score(text, num_samples=4)] == expected


def test_complementary_views_train(blocks, tmp_path):
    objective = ObjectiveConfig(name="block_diffusion", block_size=4, complementary=True, weight="uniform")
    train(dataclasses.replace(blocks, num_steps=4, objective=objective), tmp_path)
    record, = read_records(tmp_path, "train")
    noisable_mask = 16 * 15
    assert record["masked_tokens"] == noisable_mask  # each token once, whatever the times


def test_a_step_knows_its_blocks():
    objective = ObjectiveConfig(name="block_diffusion", block_size=4, block_size_schedule=((0, 1), (4, 2), (8, 4)))
    assert [objective.at_step(step).block_size for step in (0, 3, 4, 7, 8, 100)] == [1, 1, 2, 2, 4, 4]
    assert objective.at_step(0).canonicalize(16).name == "autoregressive" and objective.at_step(4).canonicalize(16) == objective.at_step(4)
    assert objective.at_step(8).canonicalize(4) == ObjectiveConfig(block_size=1)


@pytest.mark.parametrize("settings, message", [
    ({"block_size": 0}, "at least 1 token"), ({"anneal_steps": 5}, "grows by objective.block_size_schedule"),
    ({"block_size_schedule": ((1, 1), (4, 32))}, "must start at step 0"),
    ({"block_size_schedule": ((0, 1), (4, 8))}, "end with block_size 32"),
    ({"complementary": True, "schedule": "cosine"}, "needs the linear schedule"),
    ({"name": "diffusion", "complementary": True}, "belong to the objective block_diffusion"),
    ({"name": "diffusion", "clean_attention": "block_bidirectional"}, "belong to the objective block_diffusion"),
    ({"name": "diffusion", "block_size_schedule": ((0, 32),)}, "belong to the objective block_diffusion")])
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**{"name": "block_diffusion"} | settings)

