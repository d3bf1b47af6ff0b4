"""Block diffusion models of other projects: imported, sampled and exported."""

import json

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from dlm_jax import DiffusionLM
from dlm_jax.checkpoints import load_pretrained
from dlm_jax.diffusion import BlockSpec, DiffusionSpec
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.sampling import SamplerConfig, SamplingSpec, sample
from tests.checkpoints import families
from tests.sampling.tiny_models import make_keys

MASK = 96
SDAR = {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "block_size": 4, "mask_token_id": MASK,
        "attn_implementation": "flex_attention", "fuse_cross_entropy": True}
FAST = {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": 8,
        "mask_token_id": MASK}
ARCHS = {"sdar": ("qwen3", SDAR, BlockSpec(4, "block_bidirectional"), False),
         "fast": ("qwen2", FAST, BlockSpec(8, "block_bidirectional"), True)}


def block_logits(model, tokens, size):
    """Returns logits of an HF model whose tokens see all of their block and of earlier ones, as in both projects."""
    at = torch.arange(tokens.shape[1])
    bias = torch.where(at // size <= at[:, None] // size, 0.0, -torch.inf)[None, None]
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), attention_mask=bias).logits.numpy()


@pytest.fixture(params=ARCHS)
def external(request, tmp_path):
    case, settings, blocks, shift = ARCHS[request.param]
    model = families.save(case, tmp_path / "source")
    families.set_config(tmp_path / "source", **settings)
    return tmp_path / "source", model, blocks, shift


def test_import_of_external_archs(external):
    folder, model, blocks, shift = external
    pretrained = load_pretrained(folder)
    assert pretrained.diffusion == DiffusionSpec(MASK, shift, blocks)
    tokens = families.tokens(length=20)
    found = families.logits(pretrained.model, tokens, blocks.prefill_mask())
    np.testing.assert_allclose(found, block_logits(model, tokens, blocks.size), atol=1e-4)


def test_samples_of_external_archs(external):
    """Greedy by confidence, one token per step, against the torch model without a cache."""
    folder, model, blocks, shift = external
    pretrained, size = load_pretrained(folder), blocks.size
    tokens, given, length = families.tokens(batch=1, length=20), 6, 20
    fixed = np.arange(length)[None] < given
    spec = SamplingSpec(SamplerConfig("confidence", temperature=0.0, num_steps=999), DiffusionSpec(MASK, shift, blocks))
    found = sample(pretrained.model, tokens, fixed, np.array([length]), make_keys(1), spec).tokens
    seen = np.where(fixed, tokens, MASK)
    for begin in range(given // size * size, length, size):
        end = min(begin + size, length)
        while (seen[0, begin:end] == MASK).any():
            logits = block_logits(model, seen[:, :end], size)[0]
            if shift:
                logits = np.roll(logits, 1, axis=0)
            logits[:, MASK] = -np.inf
            logp = log_softmax(logits, axis=-1)
            best = np.where(seen[0, :end] == MASK, logp.max(axis=-1), -np.inf)
            at = int(best[begin:].argmax()) + begin
            seen[0, at] = logp[at].argmax()
    np.testing.assert_array_equal(found, seen)


def test_export_of_external_archs(external, tmp_path):
    folder, _, blocks, _ = external
    lm = DiffusionLM.from_pretrained(folder)
    lm.save_pretrained(tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["model_type"] in ("qwen2", "qwen3")
    assert not {"block_size", "bd_size", "attn_implementation"} & config.keys()
    again = DiffusionLM.from_pretrained(tmp_path / "exported")
    assert again.diffusion == lm.diffusion
    tokens = families.tokens(length=20)
    np.testing.assert_array_equal(again.logits(tokens, blocks.prefill_mask()), lm.logits(tokens, blocks.prefill_mask()))


def test_external_defaults(tmp_path):
    families.save("qwen2", tmp_path)
    families.set_config(tmp_path, model_type="Fast_dLLM_Qwen", architectures=FAST["architectures"])
    with pytest.raises(CheckpointError, match="151665"):
        load_pretrained(tmp_path)
    assert load_pretrained(tmp_path, mask_token=MASK).diffusion.blocks == BlockSpec(32, "block_bidirectional")


def test_invalid_block_size_is_refused(tmp_path):
    families.save("qwen3", tmp_path)
    families.set_config(tmp_path, **SDAR | {"block_size": 0})
    with pytest.raises(ConfigError, match="block"):
        load_pretrained(tmp_path)
