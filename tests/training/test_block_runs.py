"""Runs of block diffusion: growing blocks, LoRA, and the blocks that a model records."""

import dataclasses

import numpy as np
import pytest

from dlm_jax import AttentionMask, DiffusionLM
from dlm_jax.diffusion import BlockSpec, ObjectiveConfig
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.sampling import SamplingStats
from dlm_jax.training.config import LoRASettings, ModelSource
from dlm_jax.training.loop import train
from dlm_jax.training.metrics import read_records
from tests.training.conftest import changed


@pytest.fixture(scope="module")
def full(config, tmp_path_factory):
    """The workdir of a run through two block sizes."""
    folder = tmp_path_factory.mktemp("blocks") / "full"
    objective = ObjectiveConfig(name="block_diffusion", block_size=4, block_size_schedule=((0, 1), (3, 4)))
    summary = train(dataclasses.replace(config, num_steps=6, objective=objective), folder)
    assert np.isfinite(summary["train"]["loss"]) and summary["validation"]["bound"] < 3
    return folder


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


def test_lora_learns_blocks_from_complementary_views(config, pretrained, tmp_path):
    objective = ObjectiveConfig(name="block_diffusion", block_size=4, clean_attention="block_bidirectional",
                                complementary=True)
    run = dataclasses.replace(changed(config, "optimizer.learning_rate", 0.03), objective=objective,
                              model=ModelSource(source=str(pretrained), mask_token=10),
                              lora=LoRASettings(rank=2, alpha=4.0), num_steps=12)
    summary = train(run, tmp_path / "run")
    assert summary["train"]["masked_tokens"] == 16 * 15  # each token once, whatever the times
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


def test_gated_lora_drafts_for_its_base(config, pretrained, tmp_path):
    """What it learns changes its drafts alone: its text, its scores and its logits are the base's."""
    run = dataclasses.replace(
        changed(config, "optimizer.learning_rate", 0.03), num_steps=12,
        objective=ObjectiveConfig(name="self_drafting", block_size=4),
        model=ModelSource(source=str(pretrained), mask_token=10),
        lora=LoRASettings(rank=2, alpha=4.0, where="noised", draft_head=True, frozen_dtype="float32"))
    train(run, tmp_path / "run")
    first, *_, last = read_records(tmp_path / "run", "validation")
    assert last["loss"] < first["loss"] - 0.02 and 0 < first["acceptance_1"] < 1 <= first["tokens_per_pass"]
    lm, base = DiffusionLM.from_pretrained(tmp_path / "run"), DiffusionLM.from_pretrained(pretrained)
    tokens = np.arange(24).reshape(2, 12) % 10
    np.testing.assert_array_equal(*(model.logits(tokens, AttentionMask.causal()) for model in (lm, base)))
    stats, settings = SamplingStats(), dict(max_new_tokens=12, policy="autoregressive", temperature=0.0)
    assert lm.generate(["abc", "ba"], drafter="self", stats=stats, **settings) == base.generate(["abc", "ba"],
                                                                                                **settings)
    assert len(stats.accepted) == 3 and stats.tokens == 24
    assert np.isfinite(lm.score("abcdefgh", num_samples=4)[0].nats)
    assert lm.default_policy == "autoregressive"
    assert lm.generate("abc", max_new_tokens=8, policy="threshold")[0].startswith("abc")  # by blocks, with the LoRA
    for layout, merge in (("hf", True), ("diffugpt", True), ("peft", False)):
        with pytest.raises(CheckpointError, match="noised"):
            DiffusionLM.from_pretrained(tmp_path / "run", merge=merge).save_pretrained(tmp_path / "out", layout=layout)
