"""Runs of block diffusion: growing blocks, resuming, meshes, LoRA, and the blocks that a model records."""

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
    """Twelve steps through two block sizes."""
    objective = ObjectiveConfig(name="block_diffusion", block_size=4, block_size_schedule=STAGES)
    return dataclasses.replace(config, num_steps=12, objective=objective)


@pytest.fixture
def blocks(config):
    return growing(config)


def losses(workdir):
    return [record["loss"] for record in read_records(workdir, "train")]


@pytest.fixture(scope="module")
def full(config, tmp_path_factory):
    """The workdir of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("blocks") / "full"
    summary = train(growing(config), folder)
    assert np.isfinite(losses(folder)).all() and summary["validation"]["bound"] < 3
    return folder


def test_resuming_bit_for_bit(blocks, full, tmp_path):
    train(changed(blocks, "num_steps", 5), tmp_path / "resumed")
    train(blocks, tmp_path / "resumed")
    assert losses(tmp_path / "resumed")[-1] == losses(full)[-1]


def test_another_mesh(blocks, full, tmp_path):
    train(dataclasses.replace(blocks, mesh=MeshConfig(context=2, fsdp=2, data=2)), tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(full), rtol=1e-5)


def test_model_records_its_blocks(full, tmp_path):
    lm = DiffusionLM.from_pretrained(full)
    assert lm.pretrained.diffusion.blocks == BlockSpec(4)
    text, = lm.generate("abc", max_new_tokens=12, num_steps=6)
    assert text.startswith("abc")
    score, = lm.score("abcdefgh", num_samples=8)
    assert 1 < score.nats_per_token < 4
    lm.save_pretrained(tmp_path / "export")
    again = DiffusionLM.from_pretrained(tmp_path / "export")
    assert again.pretrained.diffusion.blocks == BlockSpec(4)
    assert again.generate("abc", max_new_tokens=12, num_steps=6) == [text]
    assert not (tmp_path / "export" / "sample_torch.py").exists()
    with pytest.raises(CheckpointError, match="block"):
        lm.save_pretrained(tmp_path / "release", layout="diffugpt")
    with pytest.raises(ConfigError, match="block"):
        lm.infill("ab<mask:2>cd")


def with_lora(config, pretrained):
    return dataclasses.replace(config, model=ModelSource(source=str(pretrained), mask_token=10),
                               lora=LoRASettings(rank=2, alpha=4.0))


@pytest.mark.parametrize("size, objective", [(1, "autoregressive"), (16, "diffusion")])
@pytest.mark.parametrize("kind", ["all parameters", "document_mask", "lora"])
def test_simplest_names(blocks, pretrained, kind, size,
                                                                                objective, tmp_path):
    if kind == "lora":
        blocks = with_lora(blocks, pretrained)
    elif kind == "document_mask":
        blocks = changed(blocks, "data.packing", "document_mask")

    def trained(folder, **settings):
        run = dataclasses.replace(blocks, num_steps=4, objective=ObjectiveConfig(**settings))
        train(run, tmp_path / folder)
        return losses(tmp_path / folder)

    assert trained("blocks", name="block_diffusion", block_size=size) == trained("plain", name=objective)


def test_lora_learns_blocks(blocks, pretrained, tmp_path):
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
        assert lm.pretrained.diffusion.blocks == BlockSpec(4, "block_bidirectional")
        assert [x.nats for x in lm.score(text, num_samples=4)] == expected


def test_complementary_views(blocks, tmp_path):
    objective = ObjectiveConfig(name="block_diffusion", block_size=4, complementary=True, weight="uniform")
    train(dataclasses.replace(blocks, num_steps=4, objective=objective), tmp_path)
    record, = read_records(tmp_path, "train")
    assert record["masked_tokens"] == 16 * 15  # each token once, whatever the times
