"""Block diffusion models of other projects: read as the architecture they have, written as they write."""

import json

import jax.numpy as jnp
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
EXTERNAL_ARCHS = {"sdar": ("qwen3", SDAR, BlockSpec(4, "block_bidirectional"), False), "fast": ("qwen2", FAST, BlockSpec(8, "block_bidirectional"), True)}


def block_logits(model, tokens, size):
    """Logits of an HF model whose tokens see their own block whole and all before it, which is what both projects' code
    computes of clean text and of a block that is written."""
    at = torch.arange(tokens.shape[1])
    bias = torch.where(at // size <= at[:, None] // size, 0.0, -torch.inf)[None, None]
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), attention_mask=bias).logits.numpy()


@pytest.fixture(params=EXTERNAL_ARCHS)
def relative(inputs, tmp_path):
    case, settings, blocks, shift = EXTERNAL_ARCHS[inputs.param]
    model = families.save(case, tmp_path / "theirs")
    families.set_config(tmp_path / "theirs", **settings)
    return tmp_path / "theirs", model, blocks, shift


def test_it_is_known_how_they_write(relative):
    folder, model, blocks, shift = relative
    pretrained = load_pretrained(folder)
    assert (pretrained.mask_token_id, pretrained.shift, pretrained.blocks) == (MASK, shift, blocks)
    tokens = families.tokens(length=20)
    found = pretrained.model(jnp.asarray(tokens), blocks.prefill_mask())
    np.testing.assert_allclose(found, block_logits(model, tokens, blocks.size), atol=1e-4)


def test_they_write_what_their_own_rule_says(relative):
    """The likeliest token of the surest position at each step, by the torch model on the whole text, with no cache."""
    folder, model, blocks, shift = relative
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


def test_an_export_of_theirs_is_one_of_ours(relative, tmp_path):
    folder, _, blocks, _ = relative
    lm = DiffusionLM.from_pretrained(folder)
    lm.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["model_type"] in ("qwen2", "qwen3")
    assert not {"block_size", "bd_size", "attn_implementation"} & config.keys()
    again = DiffusionLM.from_pretrained(tmp_path / "ours")
    assert (again.pretrained.blocks, again.pretrained.shift) == (blocks, lm.pretrained.shift)
    tokens = families.tokens(length=20)
    np.testing.assert_array_equal(again.logits(tokens, blocks.prefill_mask()), lm.logits(tokens, blocks.prefill_mask()))


def test_what_config_json_leaves_out_is_what_their_code_takes(tmp_path):
    families.save("qwen2", tmp_path)
    families.set_config(tmp_path, model_type="Fast_dLLM_Qwen")
    with pytest.raises(CheckpointError, match="mask token id 151665 is outside the vocabulary of 97"):
        load_pretrained(tmp_path)
    assert load_pretrained(tmp_path, mask_token=MASK).blocks == BlockSpec(32, "block_bidirectional")


def test_a_block_size_that_is_none_is_refused(tmp_path):
    families.save("qwen3", tmp_path)
    families.set_config(tmp_path, **SDAR | {"block_size": 0})
    with pytest.raises(ConfigError, match="at least 1 token, got a block size of 0"):
        load_pretrained(tmp_path)
