"""A drafter's GGUF file: the tensors and metadata that llama.cpp asks for (`benchmarks/drafter_gguf.py` runs it)."""

import dataclasses

import gguf
import numpy as np
import pytest
from flax import nnx

from dlm_jax.checkpoints import load_pretrained
from dlm_jax.checkpoints.drafter_gguf import save_drafter_gguf
from dlm_jax.checkpoints.drafter_layouts import named_tensors
from dlm_jax.cli.main import main
from dlm_jax.errors import CheckpointError
from dlm_jax.models import Drafter, DrafterConfig
from tests.checkpoints import families, gguf_files
from tests.random_models import random_model

DFLASH = dict(sample_from_anchor=False)
DSPARK = dict(sample_from_anchor=True, markov_rank=8, confidence_head=True)
DFLASH2 = DFLASH | dict(conv_kernel_size=2, selector_rank=8, selector_top_k=5, sliding_layers=(1,),
                        sliding_causal=False)
TOKENS = [f"token{index}" for index in range(97)]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A LLaMA of four layers in a GGUF file, with a vocabulary."""
    path, model = tmp_path_factory.mktemp("target") / "target.gguf", gguf_files.make("llama")
    gguf_files.write(model, path, metadata={
        "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.mask_token_id": 3})
    pretrained = load_pretrained(path)
    config = dataclasses.replace(pretrained.model.config, num_layers=4)
    model = nnx.eval_shape(lambda: type(pretrained.model)(config, rngs=nnx.Rngs(0)))
    return dataclasses.replace(pretrained, model=model)


def config_of(target, layer_changes=None, **changes):
    layers = dataclasses.replace(target.model.config, family="qwen3", num_layers=2, qk_norm=True, head_dim=48,
                                 sliding_window=6, **layer_changes or {})
    return DrafterConfig(layers, **dict(target_layer_ids=(0, 2), block_size=4, mask_token_id=96) | changes)


def drafter_of(config):
    return random_model(lambda: Drafter(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("changes", [DFLASH, DSPARK, DFLASH2], ids=["dflash", "dspark", "dflash2"])
def test_tensors_and_metadata(target, tmp_path, changes):
    drafter, path = drafter_of(config_of(target, **changes)), tmp_path / "drafter.gguf"
    for dtype in ("float32", "bfloat16"):
        save_drafter_gguf(path, drafter, target, dtype=dtype)
    save_drafter_gguf(path, drafter, target)
    assert [file.name for file in tmp_path.iterdir()] == ["drafter.gguf"]
    reader = gguf.GGUFReader(path)
    read = {name: field.contents() for name, field in reader.fields.items()}
    assert read["general.architecture"] == "dflash" and read["dflash.block_size"] == 4
    assert read["dflash.target_layers"] == [1, 3] and read["dflash.attention.key_length"] == 48
    assert read["dflash.sample_from_anchor"] == changes["sample_from_anchor"] and not read["dflash.attention.causal"]
    assert read["tokenizer.ggml.tokens"] == TOKENS and read["tokenizer.ggml.mask_token_id"] == 96
    assert read["tokenizer.ggml.eos_token_id"] == 2 and read["tokenizer.ggml.add_bos_token"] is True
    assert ("dflash.selector_top_k" in read) == (changes is DFLASH2)
    assert read.get("dflash.attention.sliding_window_pattern") == ([False, True] if changes is DFLASH2 else None)

    stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    published = named_tensors(drafter)
    assert len(stored) == len(published)
    for ours, theirs in {"fc.weight": "fc.weight", "hidden_norm.weight": "enc.output_norm.weight",
                         "norm.weight": "output_norm.weight",
                         "layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
                         "layers.0.self_attn.q_norm.weight": "blk.0.attn_q_norm.weight",
                         "layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
                         "layers.1.attention_conv.base_kernel": "blk.1.attn_conv_base",
                         "layers.1.mlp_conv.kernel_projection.weight": "blk.1.ffn_conv_proj.weight",
                         "candidate_selector.successor_codebook": "selector_successor.weight",
                         "markov_head.markov_w2.weight": "markov_w2.weight",
                         "confidence_head.proj.bias": "conf_proj.bias"}.items():
        assert (ours in published) == (theirs in stored)
        if ours in published:
            np.testing.assert_array_equal(stored[theirs], published[ours][1]())


def test_what_llama_cpp_does_not_compute_is_refused(target, tmp_path):
    for layers, changes, name in (
            ({}, DFLASH2 | dict(sliding_causal=True), "later"), ({}, DFLASH | dict(causal=True), "later"),
            ({}, DSPARK | dict(markov_head="rnn"), "rnn"), ({}, dict(sample_from_anchor=True), "Markov"),
            ({}, DFLASH2 | dict(selector_top_k=16), "candidates"), (dict(activation="gelu"), DFLASH, "qwen3")):
        with pytest.raises(CheckpointError, match=name):
            save_drafter_gguf(tmp_path / "x.gguf", drafter_of(config_of(target, layers, **changes)), target)
    drafter = drafter_of(config_of(target, **DFLASH))
    (tmp_path / "thesis.tex").write_text("x")
    for place in ("thesis.tex", "missing/x.gguf", ""):
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            save_drafter_gguf(tmp_path / place, drafter, target)
    families.save("llama1", tmp_path / "hf")
    with pytest.raises(CheckpointError, match=str(tmp_path / "hf")):
        save_drafter_gguf(tmp_path / "x.gguf", drafter, dataclasses.replace(target, source=str(tmp_path / "hf")))
    assert not (tmp_path / "x.gguf").exists()


def test_layouts_of_models_and_drafters_do_not_mix(capsys, tmp_path):
    assert main(["export", "--model=stories", f"--output={tmp_path / 'x.gguf'}", "--layout=gguf"]) == 1
    assert "--layout=gguf" in capsys.readouterr().err
