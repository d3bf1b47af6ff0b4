"""Diffusion models of other projects: read as what they are, with their own code's logits and texts."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from scipy.special import log_softmax

from dlm_jax import DiffusionLM
from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.checkpoints.hf_config import read_config
from dlm_jax.diffusion import BlockSpec, DiffusionSpec
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.sampling import stream
from dlm_jax.sampling.config import resolve_settings
from dlm_jax.sampling.sampler import SamplingSpec
from tests.checkpoints import diffusion_files as files
from tests.checkpoints import families
from tests.sampling.tiny_models import make_keys, run_sampler

GOLDENS = np.load(Path(__file__).with_name("diffusion_goldens.npz"))
BLOCKS = BlockSpec(4, "block_bidirectional")
SPECS = {"dream": DiffusionSpec(files.MASK, True), "llada": DiffusionSpec(files.MASK, False),
         "sdar": DiffusionSpec(files.MASK, False, BLOCKS), "llada_moe": DiffusionSpec(files.MASK, False),
         "rnd1": DiffusionSpec(files.MASK, True), "sdar_moe": DiffusionSpec(files.MASK, False, BLOCKS)}
# The settings that give the text of each golden.
TEXTS = {
    "dream/entropy": dict(policy="entropy", num_steps=10, step_schedule="dream"),
    "dream/entropy_many": dict(policy="entropy", num_steps=64, step_schedule="dream"),
    "dream/maskgit_plus": dict(policy="confidence", num_steps=7, step_schedule="dream"),
    "dream/topk_margin": dict(policy="margin", num_steps=24, step_schedule="dream"),
    "dream/origin": dict(policy="random", num_steps=16, step_schedule="dream"),
    "llada/blocks": dict(policy="confidence", num_steps=24, block_length=8),
    "llada/uneven": dict(policy="confidence", num_steps=9, block_length=8),
    "llada/entire": dict(policy="confidence", num_steps=5),
    "sdar/static": dict(policy="confidence", num_steps=999),
    "sdar/dynamic": dict(policy="threshold", threshold=0.2),
    "llada_moe/blocks": dict(policy="confidence", num_steps=24, block_length=8),
    "rnd1/even": dict(policy="entropy", num_steps=8),
    "rnd1/many": dict(policy="entropy", num_steps=64),
    "sdar_moe/static": dict(policy="confidence", num_steps=999),
    "sdar_moe/dynamic": dict(policy="threshold", threshold=0.2),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for family in SPECS:
        files.write(family, folder / family)
    return {family: load_pretrained(folder / family) for family in SPECS}


@pytest.mark.parametrize("family", SPECS)
def test_logits_are_those_of_its_own_code(loaded, family):
    pretrained = loaded[family]
    assert pretrained.diffusion == SPECS[family] and pretrained.recorded_mask_token == files.MASK
    attention = AttentionMask.bidirectional() if pretrained.diffusion.blocks is None else BLOCKS.prefill_mask()
    found = families.logits(pretrained.model, files.noisy_tokens(), attention)
    np.testing.assert_allclose(found, GOLDENS[f"{family}/logits"], atol=1e-4)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_that_of_its_own_sampler(loaded, text):
    pretrained, expected = loaded[text.partition("/")[0]], GOLDENS[text]
    tokens = np.zeros_like(expected)
    tokens[0, : files.PROMPT] = files.prompt()
    fixed = np.arange(tokens.shape[1])[None] < files.PROMPT
    diffusion = pretrained.diffusion
    found = run_sampler(pretrained.model, tokens, fixed, mask=files.MASK, shift=diffusion.shift,
                        blocks=diffusion.blocks, temperature=0.0, **TEXTS[text])
    np.testing.assert_array_equal(found.tokens, expected)
    assert found.steps[0] <= files.NEW + 2  # steps that reveal nothing take no pass


@pytest.mark.parametrize("case", ["a2d-qwen3", "a2d-qwen2", "a2d-llama"])
def test_tiny_a2d(case, tmp_path):
    """The classes of Tiny-A2D are those of transformers without the causal mask."""
    files.write(case, tmp_path / "mdlm")
    files.write(case, tmp_path / "bd3lm-v0.1")
    files.write(case, tmp_path / "unnamed", block_size=16)
    entire, blocks, named = (load_pretrained(tmp_path / name, mask_token=files.MASK)
                             for name in ("mdlm", "bd3lm-v0.1", "unnamed"))
    assert entire.diffusion == DiffusionSpec(files.MASK, False) and entire.sampling["block_length"] == 32
    assert blocks.diffusion.blocks == BlockSpec(32, "block_bidirectional") and "block_length" not in blocks.sampling
    assert named.diffusion.blocks.size == 16
    config = json.loads((tmp_path / "mdlm" / "config.json").read_text())
    families.set_config(tmp_path / "mdlm", model_type=case.removeprefix("a2d-"), architectures=None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mdlm", attn_implementation="sdpa").eval()
    tokens = files.noisy_tokens()
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens), attention_mask=torch.zeros(2, 1, 24, 24)).logits.numpy()
    found = families.logits(entire.model, tokens, AttentionMask.bidirectional())
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found, GOLDENS[f"{case}/logits"], atol=1e-4)
    mask = BlockSpec(8, "block_bidirectional").prefill_mask()
    np.testing.assert_allclose(families.logits(blocks.model, tokens, mask), GOLDENS[f"{case}/block_logits"], atol=1e-4)
    files.write(case, tmp_path / "other")
    with pytest.raises(CheckpointError, match="block_size"):
        load_pretrained(tmp_path / "other")
    assert config["model_type"] == case


def block_logits(model, tokens, size):
    """Logits of a model of transformers whose tokens see all of their block and of earlier ones."""
    at = torch.arange(tokens.shape[1])
    bias = torch.where(at // size <= at[:, None] // size, 0.0, -torch.inf)[None, None]
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), attention_mask=bias).logits.numpy()


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """A Fast-dLLM v2, its directory, and the model of transformers that has its network."""
    folder = tmp_path_factory.mktemp("fast")
    model = families.save("qwen2", folder)
    families.set_config(folder, model_type="Fast_dLLM_Qwen", architectures=["Fast_dLLM_QwenForCausalLM"], bd_size=8,
                        mask_token_id=files.MASK)
    return load_pretrained(folder), folder, model


def test_fast_dllm(fast, tmp_path):
    pretrained, folder, model = fast
    assert pretrained.diffusion == DiffusionSpec(files.MASK, True, BlockSpec(8, "block_bidirectional"))
    tokens, mask = families.tokens(length=20), pretrained.diffusion.blocks.prefill_mask()
    found = families.logits(pretrained.model, tokens, mask)
    np.testing.assert_allclose(found, block_logits(model, tokens, 8), atol=1e-4)
    save_pretrained(tmp_path / "out", pretrained)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "qwen2" and not {"bd_size", "auto_map"} & config.keys()
    again = load_pretrained(tmp_path / "out")
    assert again.diffusion == pretrained.diffusion
    np.testing.assert_array_equal(families.logits(again.model, tokens, mask), found)
    config = json.loads((folder / "config.json").read_text())  # its defaults
    shutil.copytree(folder, tmp_path / "plain")
    (tmp_path / "plain" / "config.json").write_text(json.dumps(
        {name: value for name, value in config.items() if name not in ("bd_size", "mask_token_id")}))
    with pytest.raises(CheckpointError, match="151665"):
        load_pretrained(tmp_path / "plain")
    assert load_pretrained(tmp_path / "plain", mask_token=files.MASK).diffusion.blocks.size == 32


def test_samples_of_fast_dllm(fast):
    """Greedy by confidence, one token per step, against the torch model without a cache."""
    pretrained, _, model = fast
    size, given, length = 8, 6, 20
    tokens, fixed = families.tokens(batch=1, length=length), np.arange(length)[None] < given
    found = run_sampler(pretrained.model, tokens, fixed, mask=files.MASK, shift=True, temperature=0.0,
                        blocks=pretrained.diffusion.blocks, policy="confidence", num_steps=999).tokens
    seen = np.where(fixed, tokens, files.MASK)
    for begin in range(given // size * size, length, size):
        end = min(begin + size, length)
        while (seen[0, begin:end] == files.MASK).any():
            logits = np.roll(block_logits(model, seen[:, :end], size)[0], 1, axis=0)
            logits[:, files.MASK] = -np.inf
            logp = log_softmax(logits, axis=-1)
            best = np.where(seen[0, :end] == files.MASK, logp.max(axis=-1), -np.inf)
            at = int(best[begin:].argmax()) + begin
            seen[0, at] = logp[at].argmax()
    np.testing.assert_array_equal(found, seen)


def test_default_settings_of_dream_and_llada(loaded, tmp_path):
    assert loaded["dream"].sampling == dict(policy="random", num_steps=512, step_schedule="dream", temperature=0.0)
    assert loaded["llada"].sampling == dict(policy="confidence", num_steps=128, block_length=32, temperature=0.0)
    assert loaded["sdar"].sampling == {}
    files.write("dream", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(
        dict(alg="entropy", steps=256, temperature=0.2, top_p=0.95, top_k=None, eps=1e-3, alg_temp=0.0)))
    lm = DiffusionLM.from_pretrained(tmp_path)
    own = dict(policy="entropy", num_steps=256, step_schedule="dream", temperature=0.2, top_p=0.95)
    assert lm.default_sampling == own and lm.default_policy == "entropy"
    # They survive an export, unless the model has become another kind.
    save_pretrained(tmp_path / "out", lm.pretrained)
    assert load_pretrained(tmp_path / "out").sampling == own
    in_blocks = dataclasses.replace(lm.pretrained, diffusion=DiffusionSpec(files.MASK, True, BLOCKS))
    assert in_blocks.sampling == {} and DiffusionLM(in_blocks).default_sampling == {"policy": "threshold"}
    save_pretrained(tmp_path / "blocks", in_blocks)
    assert load_pretrained(tmp_path / "blocks").sampling == {}


def test_given_settings_override_those_of_the_model():
    own = dict(policy="confidence", num_steps=128, block_length=32, temperature=0.0)
    assert dataclasses.asdict(resolve_settings({"temperature": None}, own)).items() >= own.items()
    changed = resolve_settings({"temperature": 0.5, "block_length": 8}, own)
    assert (changed.temperature, changed.block_length, changed.num_steps) == (0.5, 8, 128)
    causal = resolve_settings({"policy": "autoregressive"}, own)
    assert (causal.temperature, causal.num_steps, causal.block_length) == (0.0, None, None)
    assert resolve_settings({"drafter": "ngram"}, own).policy == "autoregressive"
    quick = resolve_settings({"threshold": 0.8}, own)
    assert (quick.policy, quick.block_length, quick.threshold) == ("threshold", 32, 0.8)
    assert resolve_settings({"policy": "random"}, dict(policy="threshold", threshold=0.8)).threshold is None
    assert resolve_settings({"policy": "first_hitting"}, own).num_steps is None
    with pytest.raises(ConfigError, match="tempo"):
        resolve_settings({"tempo": None}, own)


def test_exports_keep_what_they_are(loaded, tmp_path):
    for family, pretrained in loaded.items():
        save_pretrained(tmp_path / family, pretrained)
        again = load_pretrained(tmp_path / family)
        assert (again.model.config, again.diffusion) == (pretrained.model.config, pretrained.diffusion)
        content = json.loads((tmp_path / family / "config.json").read_text())
        assert not {"d_model", "n_heads", "auto_map", "attn_implementation"} & content.keys()
        assert content["model_type"] in ("qwen2", "llama", "qwen3", "qwen3_moe")


def test_dream_reveals_nothing_in_its_first_steps(loaded):
    """Of 512 steps for 8 tokens all but 8 are omitted: they would compute the same logits again."""
    tokens = np.zeros((1, 14), int)
    tokens[0, : files.PROMPT] = files.prompt()
    fixed = np.arange(14)[None] < files.PROMPT
    config = resolve_settings({"policy": "entropy"}, loaded["dream"].sampling)
    spec = SamplingSpec(config, loaded["dream"].diffusion)
    states = list(stream(loaded["dream"].model, tokens, fixed, np.array([14]), make_keys(1), spec))
    assert len(states) <= 9 and not states[-1].masked.any()


@pytest.mark.parametrize(("family", "settings", "named"), [
    ("dream", dict(architectures=["DreamForCausalLM"]), "DreamForCausalLM"),
    ("sdar", dict(architectures=["IDLMForCausalLM"]), "IDLMForCausalLM"),
    ("sdar", dict(num_experts=128), "num_experts"),
    ("llada", dict(architectures=["LLaDAMoEModelLM"], num_experts=64), "moe_intermediate_size"),
    ("llada", dict(block_type="sequential"), "block_type"), ("llada", dict(alibi=True), "alibi"),
    ("llada", dict(attention_layer_norm=True), "attention_layer_norm"), ("llada", dict(rope=False), "rope"),
    ("llada", dict(include_bias=True), "include_bias"), ("llada", dict(scale_logits=True), "scale_logits"),
    ("llada", dict(block_group_size=2), "block_group_size"), ("llada", dict(d_model="32"), "hidden_size"),
    ("dream", dict(use_sliding_window=True, sliding_window=4), "use_sliding_window"),
    ("dream", dict(model_type="qwen3", architectures=["EfficientDLM"], dlm_paradigm="block_diff"), "dlm_paradigm"),
    ("dream", dict(model_type="qwen3", architectures=["EfficientDLM"]), "DreamModel|EfficientDLM"),
    ("a2d-llama", dict(model_type="llama", architectures=["StableDiffcoderForCausalLM"]), "StableDiffcoder"),
    ("a2d-llama", dict(model_type="llama", architectures=["LlamaForCausalLM"],
                       auto_map={"AutoModelForCausalLM": "modeling.Mine"}), "modeling.Mine"),
])  # fmt: skip
def test_what_only_looks_like_it_is_refused(family, settings, named, tmp_path):
    files.write(family, tmp_path, **settings)
    with pytest.raises(CheckpointError, match=named) as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("settings", "named"), [
    (dict(alg="p2"), "p2"), (dict(steps="many"), "steps"), (dict(eps=0.1), "eps"), (dict(alg_temp=0.5), "alg_temp")])
def test_generation_config_of_dream_is_checked(settings, named, tmp_path):
    files.write("dream", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=named):
        read_config(tmp_path)


def test_invalid_block_size_is_refused(tmp_path):
    files.write("sdar", tmp_path, block_size=0)
    with pytest.raises(ConfigError, match="block"):
        load_pretrained(tmp_path)


def test_unknown_tensors_of_llada_are_named(tmp_path):
    files.write("llada", tmp_path)
    families.rewrite(tmp_path, lambda state: state.update({"model.transformer.wpe.weight": torch.zeros(4, 4)}))
    with pytest.raises(CheckpointError, match=re.escape("model.transformer.wpe.weight")):
        load_pretrained(tmp_path)
