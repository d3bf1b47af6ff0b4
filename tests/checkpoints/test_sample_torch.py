"""The PyTorch sampler that goes with an export, against this library's own."""

import dataclasses
import itertools
import json
import runpy
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints import load_pretrained, sample_torch, save_pretrained
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.sampling import GAP, SamplerConfig, SamplingSpec, sample
from dlm_jax.sampling.text import encode
from tests.checkpoints import families

MASK = 5


def export(case, directory):
    families.save(case, directory / "base")
    pretrained = load_pretrained(directory / "base", mask_token=MASK)
    save_pretrained(directory / "out", pretrained)
    return pretrained, sample_torch.load_model(directory / "out")


@pytest.mark.parametrize("case", ["gpt2", "llama1", "mistral-window", "gemma2", "gemma3"])
def test_logits_and_greedy_samples_agree(case, tmp_path):
    pretrained, model = export(case, tmp_path)
    tokens = families.tokens(length=20)
    expected = families.logits(pretrained.model, tokens, AttentionMask.bidirectional())
    with torch.no_grad():
        logits = sample_torch.bidirectional_logits(model, torch.from_numpy(tokens).long())
    np.testing.assert_allclose(logits, expected, atol=1e-4)

    fixed = np.zeros(tokens.shape, bool)
    fixed[:, :3] = fixed[:, 17:] = True
    fixed[1, 8:12] = True
    found = sample_torch.sample(model, torch.from_numpy(tokens).long(), torch.from_numpy(fixed), num_steps=6,
                                temperature=0)
    spec = SamplingSpec(SamplerConfig("confidence", num_steps=6, temperature=0.0), DiffusionSpec(MASK))
    expected = sample(pretrained.model, tokens, fixed, jnp.array([20, 20]), jax.random.split(jax.random.key(0), 2),
                      spec).tokens
    np.testing.assert_array_equal(found, expected)


def with_real_tokenizer(name, folder, test_data):
    """Makes a tiny model of the family with a real tokenizer, whose embedding is padded to a multiple of 64."""
    if name == "stories260K_hf":
        return test_data / name
    family, files, size = {
        "gpt2_bpe": ("gpt2", {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}, 50304),
        "llama2_tokenizer": ("llama1", {"tokenizer.model": "tokenizer.model"}, 32064)}[name]
    model = families.make(family)
    model.resize_token_embeddings(size)
    model.save_pretrained(folder)
    for stored, needed in files.items():
        shutil.copy(test_data / name / stored, folder / needed)
    return folder


@pytest.mark.parametrize("name", ["gpt2_bpe", "llama2_tokenizer", "stories260K_hf"])
def test_rows_and_candidates_are_the_librarys(name, tmp_path, test_data):
    base = load_pretrained(with_real_tokenizer(name, tmp_path / "base", test_data), mask_token="<|mask|>")
    save_pretrained(tmp_path / "out", base)
    ours, model = load_pretrained(tmp_path / "out"), sample_torch.load_model(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    bos = tokenizer.bos_token
    prompts = ("", "Once  upon a time ", " a", f"a {bos} b</s>", f"{bos}[INST] Tom? [/INST]", "<|mask|> x", "\n", "1 2")
    for add_bos in (None, True, False):
        ours = dataclasses.replace(ours, recipe={"data.add_bos": add_bos, "data.packing": "concat"})
        save_pretrained(tmp_path / "recipe", ours)
        start = json.loads((tmp_path / "recipe" / "config.json").read_text())["dlm_jax"]["start_token_id"]
        for prompt, suffix in itertools.product(prompts, ("", " the end.", "\nx", "</s>")):
            row, fixed = sample_torch.encode(tokenizer, prompt, 3, suffix, start)
            expected, _ = encode(ours.tokenizer, [prompt, 3, suffix], ours.start_token_id)
            found = [token if keep else GAP for token, keep in zip(row, fixed, strict=True)]
            assert found == expected, (prompt, suffix)
    assert sample_torch.missing_ids(model, tokenizer) == [token for ids in ours.diffusion.missing_ids for token in ids]
    tokens = np.array([expected])
    tokens[tokens == GAP] = ours.diffusion.mask_token_id
    with torch.no_grad():
        logits = sample_torch.bidirectional_logits(model, torch.from_numpy(tokens))
    np.testing.assert_allclose(
        logits, families.logits(ours.model, tokens, AttentionMask.bidirectional()), atol=1e-4)


def test_missing_ids_are_never_sampled(tmp_path):
    _, model = export("gpt2", tmp_path)
    tokens = torch.from_numpy(families.tokens(length=20)).long()
    fixed = torch.zeros(tokens.shape, dtype=torch.bool)
    allowed = [7, 11]
    missing = sorted(set(range(model.config.vocab_size)) - set(allowed))
    found = sample_torch.sample(model, tokens, fixed, num_steps=4, missing=missing)
    assert set(found[:, 1:].flatten().tolist()) <= set(allowed)


def test_random_policy_fills_all_gaps_by_seed(tmp_path):
    _, model = export("gpt2", tmp_path)
    tokens = torch.from_numpy(families.tokens(length=40)).long()
    fixed = torch.zeros(tokens.shape, dtype=torch.bool)
    fixed[:, :10] = True
    a, b, c = (sample_torch.sample(model, tokens, fixed, policy="random", num_steps=8, top_p=0.9, seed=seed)
               for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(a[:, :10], tokens[:, :10]) and not (a[:, 10:] == MASK).any()


def test_top_p_includes_the_crossing_token():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(4000, 4)
    drawn = sample_torch.choose(logits, 1.0, 0.6, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(share, [0.625, 0.375, 0, 0], atol=0.03)


def test_exported_script_runs_without_this_library(tmp_path, test_data, monkeypatch, capsys):
    save_pretrained(tmp_path / "out", load_pretrained(test_data / "stories260K_hf", mask_token="<|mask|>"))
    script = str(tmp_path / "out" / "sample_torch.py")
    monkeypatch.setattr(sys, "argv", [script, "--prompt", "Once upon a time", "--suffix", "the end.", "--length", "12",
                                      "--num_steps", "4", "--num_samples", "2"])
    for name in ("dlm_jax", "jax", "flax"):
        monkeypatch.setitem(sys.modules, name, None)
    runpy.run_path(script, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2 and lines[0].startswith("Once upon a time")
