"""GGUF files as models, beside what transformers reads of them and the models that they were written from."""

import contextlib
import shutil
import subprocess
import sys

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from dlm_jax import DiffusionLM
from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.checkpoints.gguf_file import GGUFTensor, read_gguf
from dlm_jax.checkpoints.source import absolute_source, check_source, find_base, is_hub_id, locate
from dlm_jax.checkpoints.stored import open_stored
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import CheckpointError
from dlm_jax.parallel import MeshConfig, make_mesh
from tests.checkpoints import families, gguf_files
from tests.checkpoints.gguf_files import KINDS
from tests.checkpoints.test_hf_import import assert_same_parameters, split_over


def read_by_transformers(path):
    torch.set_default_dtype(torch.float32)
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                                             dtype=torch.float32).eval()


def assert_same_logits(path, reference):
    inputs = families.tokens()
    model = load_pretrained(path).model
    np.testing.assert_allclose(families.logits(model, inputs), families.torch_logits(reference, inputs),
                               atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("case", gguf_files.CASES)
def test_logits_are_those_of_the_original(case, tmp_path):
    """Of settings that transformers does not read too: biases, and what RoPE is scaled by."""
    model = gguf_files.make(case)
    gguf_files.write(model, path := tmp_path / "x.gguf")
    assert_same_logits(path, model)
    assert load_pretrained(path).model.config.family == ("llama" if case == "mistral" else model.config.model_type)


@pytest.mark.parametrize(("case", "changes", "architecture", "shift"), [
    ("qwen2", {}, "dream", None), ("llama", {}, "llada", False), ("qwen3-moe", {}, "rnd1", None),
    ("qwen3-moe", {"norm_topk_prob": False}, "llada-moe", False)])
def test_diffusion_models(case, changes, architecture, shift, tmp_path):
    """Files of llama.cpp's diffusion models: their networks, mask token and shift, and their authors' settings."""
    model = gguf_files.make(case, **changes)
    expected = families.torch_logits(model, families.tokens())
    model.config.model_type = architecture
    gguf_files.write(model, path := tmp_path / "x.gguf", metadata={
        f"{architecture}.attention.causal": False, "tokenizer.ggml.mask_token_id": 96, "diffusion.shift_logits": shift})
    loaded = load_pretrained(path)
    assert loaded.diffusion == DiffusionSpec(96, shift is None)
    assert loaded.model.config.family == case.replace("-", "_")
    assert loaded.sampling["temperature"] == 0 and loaded.sampling["num_steps"] in (128, 256, 512)
    np.testing.assert_allclose(families.logits(loaded.model, families.tokens()), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "case"), [
    *((kind, "llama") for kind in (KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_0, KINDS.Q4_1, KINDS.Q5_0, KINDS.Q6_K)),
    *((KINDS.Q4_K, case) for case in ("llama", "llama-tied", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3"))],
    ids=lambda value: getattr(value, "name", value))
def test_types_as_transformers_reads_them(kind, case, tmp_path):
    tokens = [f"token{index}" for index in range(97)]  # from which transformers takes the vocabulary of a GPT-2
    gguf_files.write(gguf_files.make(case), path := tmp_path / "x.gguf", kind,
                     metadata={"tokenizer.ggml.tokens": tokens})
    stored = read_gguf(path).tensors["blk.0.ffn_up.weight"]
    assert stored.kind == kind
    assert_same_logits(path, read_by_transformers(path))


def test_quantized_experts(tmp_path):
    """transformers does not read how wide they are."""
    gguf_files.write(model := gguf_files.make("qwen3-moe"), path := tmp_path / "x.gguf", KINDS.Q8_0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            codes = gguf.quantize(parameter.detach().numpy(), KINDS.Q8_0)
            parameter.data = torch.from_numpy(gguf.dequantize(codes, KINDS.Q8_0))
    assert_same_logits(path, model)


def test_head_with_the_bytes_of_the_embedding_is_tied(tmp_path):
    model = gguf_files.make("gpt2")
    embedding = model.get_input_embeddings().weight.detach().numpy()
    gguf_files.write(model, path := tmp_path / "x.gguf", tensors={"output.weight": embedding})
    assert load_pretrained(path).model.config.tie_embeddings
    assert_same_logits(path, model)
    gguf_files.write(model, path, tensors={"output.weight": embedding + 1})
    assert not load_pretrained(path).model.config.tie_embeddings


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=2, data=2)])
def test_each_tensor_is_dequantized_once(mesh, tmp_path, monkeypatch):
    gguf_files.write(gguf_files.make("llama"), path := tmp_path / "x.gguf", KINDS.Q8_0)
    plain, read, original = load_pretrained(path), [], GGUFTensor.__array__
    monkeypatch.setattr(GGUFTensor, "__array__", lambda self, *rest, **named: (
        read.append(self.name), original(self, *rest, **named))[1])
    sharded = load_pretrained(path, shardings=split_over(make_mesh(mesh)))
    assert sorted(read) == sorted(read_gguf(path).tensors)
    assert_same_parameters(plain, sharded)


def test_shape_alone_reads_no_tensor(tmp_path, monkeypatch):
    gguf_files.write(gguf_files.make("llama"), path := tmp_path / "x.gguf", KINDS.Q8_0)
    monkeypatch.setattr(GGUFTensor, "__array__", None)
    for init in ("abstract", "random"):
        assert load_pretrained(path, init=init).model.config.hidden_size == 256


def test_model_in_several_files(tmp_path):
    model = gguf_files.make("llama")
    gguf_files.write(model, tmp_path / "one.gguf")
    names = list(read_gguf(tmp_path / "one.gguf").tensors)
    for part, dropped in enumerate((names[:9], names[9:])):
        gguf_files.write(model, tmp_path / f"x-{part + 1:05d}-of-00002.gguf", metadata={"split.count": 2},
                         tensors=dict.fromkeys(dropped))
    first = tmp_path / "x-00001-of-00002.gguf"
    assert_same_logits(first, model)
    shutil.copy(first, tmp_path / "renamed.gguf")
    (tmp_path / "x-00002-of-00002.gguf").unlink()
    for path in (first, tmp_path / "renamed.gguf"):
        with pytest.raises(CheckpointError, match="-of-00002.gguf"):
            load_pretrained(path)


def test_export_is_the_same_model(tmp_path):
    gguf_files.write(gguf_files.make("llama-biases"), path := tmp_path / "x.gguf", KINDS.Q4_1)
    loaded = load_pretrained(path, mask_token=5)
    save_pretrained(tmp_path / "out", loaded)
    assert_same_parameters(loaded, load_pretrained(tmp_path / "out"))
    assert load_pretrained(tmp_path / "out").hf_config["rms_norm_eps"] == 1e-6  # not 9.99999997e-07
    inputs = families.tokens()
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(families.logits(loaded.model, inputs), families.torch_logits(reference, inputs),
                               atol=2e-4, rtol=1e-4)


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gguf_files.write(gguf_files.make("llama"), path := tmp_path / "x.gguf")
    assert locate("x.gguf").samefile(path) and absolute_source("x.gguf") == str(path)
    check_source("x.gguf")
    shutil.copy(path, tmp_path / "blob")  # as in the hub's cache
    assert_same_parameters(load_pretrained("x.gguf"), load_pretrained("blob"))
    assert not is_hub_id("none.gguf")
    for name, mentioned in (("y.gguf", "x.gguf"), ("none/none.gguf", "none/none.gguf")):
        with pytest.raises(CheckpointError, match=mentioned):
            check_source(name)
    with pytest.raises(CheckpointError, match="x.gguf"):
        check_source(str(tmp_path))  # the folder in which it is
    with pytest.raises(CheckpointError, match="x.gguf"):
        load_pretrained(tmp_path)
    (tmp_path / "runs").mkdir()
    assert find_base("/moved/x.gguf", tmp_path / "runs") == str(path)
    assert DiffusionLM.from_pretrained("x.gguf").config.hidden_size == 256


def test_import_without_torch(tmp_path, test_data):
    """Of a GGUF file and of a directory with a tokenizer."""
    gguf_files.write(gguf_files.make("llama"), path := tmp_path / "x.gguf", KINDS.Q4_0)
    program = ("import sys; sys.modules['torch'] = None\n"
               "from dlm_jax.checkpoints import load_pretrained\n"
               f"print(load_pretrained({str(path)!r}).model.config.family)\n"
               f"print(load_pretrained({str(test_data / 'stories260K_hf')!r}).tokenizer.encode('Once'))")
    run = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", program], capture_output=True, text=True)
    assert run.stdout == "llama\n[1, 403]\n" and run.stderr == ""


# ---- Wrong files.


@pytest.mark.parametrize(("metadata", "tensors", "mentions"), [
    ({"llama.expert_count": 8}, {}, r"llama\.expert_count"),
    ({"llama.attention.sliding_window": 4096}, {}, "sliding_window"),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, {}, "yarn"),
    ({"llama.rope.dimension_count": 32}, {}, "partial_rotary_factor"),
    ({"llama.attention.value_length": 32}, {}, "values of 32"),
    ({"llama.attention.head_count_kv": [2, 4]}, {}, r"llama\.attention\.head_count_kv"),
    ({"llama.embedding_length": None}, {}, "hidden_size"),
    ({}, {"rope_freqs.weight": np.linspace(1, 7, 32)}, r"rope_freqs\.weight"),
    ({}, {"blk.1.ffn_up.weight": None}, r"model\.layers\.1\.mlp\.up_proj\.weight"),
    ({}, {"blk.1.attn_sinks.weight": np.ones(4)}, r"blk\.1\.attn_sinks\.weight"),
    ({}, {"blk.0.attn_q.weight": np.ones((96, 256))}, r"self_attn\.q_proj\.weight \(96, 256\)"),
    ({}, {"token_embd.weight": None}, r"token_embd\.weight"),
])
def test_what_is_not_computed_is_refused(metadata, tensors, mentions, tmp_path):
    gguf_files.write(gguf_files.make("llama"), path := tmp_path / "x.gguf", metadata=metadata, tensors=tensors)
    with pytest.raises(CheckpointError, match=mentions) as error:
        load_pretrained(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("metadata", "tensors", "mentions"), [
    ({"qwen3moe.expert_shared_count": 1}, {}, r"expert_shared_count"),
    ({"qwen3moe.expert_gating_func": 2}, {}, r"expert_gating_func"),
    ({"qwen3moe.expert_used_count": 7}, {}, "7 of 6 experts"),
    ({"qwen3moe.expert_count": 5}, {}, r"mlp\.experts\.5"),
    ({}, {"blk.1.ffn_up_exps.weight": None}, r"model\.layers\.1\.mlp\.experts\.0\.up_proj\.weight"),
    ({}, {"blk.1.ffn_up_exps.weight": np.ones((64, 256))}, r"blk\.1\.ffn_up_exps\.weight"),
    ({}, {"blk.0.ffn_up_exps.bias": np.ones((6, 64))}, r"blk\.0\.ffn_up_exps\.bias"),
])
def test_experts_that_are_not_computed_are_refused(metadata, tensors, mentions, tmp_path):
    gguf_files.write(gguf_files.make("qwen3-moe"), path := tmp_path / "x.gguf", metadata=metadata, tensors=tensors)
    with pytest.raises(CheckpointError, match=mentions) as error:
        load_pretrained(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_unknown_architecture(tmp_path):
    writer = gguf.GGUFWriter(path := tmp_path / "x.gguf", "starcoder")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"starcoder.*qwen3"):
        load_pretrained(path)


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A good file's bytes."""
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    gguf_files.write(gguf_files.make("llama"), path, KINDS.Q4_0, metadata={"tokenizer.ggml.tokens": ["a"] * 97})
    return path.read_bytes()


@pytest.mark.parametrize("size", [0, 3, 4, 6, 20, 100, 700, 1500, 3000, 10_000, -64])
def test_truncated_file(size, content, tmp_path):
    (path := tmp_path / "x.gguf").write_bytes(content[:size])
    with pytest.raises(CheckpointError, match=f"{path.name} is (incomplete|damaged|not a GGUF)"):
        check_source(str(path))


def test_flipped_bytes_of_the_header_end_in_a_sentence(content, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x.gguf"
    for at in rng.integers(4, 2500, 300):
        changed = bytearray(content)
        changed[at] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        with contextlib.suppress(CheckpointError):  # some are another good file
            open_stored(path).tensors()


def test_other_files(content, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04" + content[4:])
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        load_pretrained(path)
    path.write_bytes(content[:4] + b"\x01\x00\x00\x00" + content[8:])
    with pytest.raises(CheckpointError, match="version 1"):
        load_pretrained(path)


@pytest.mark.parametrize(("kind", "mentions"), [(99, "99"), (int(KINDS.I32), "I32"), (int(KINDS.IQ1_M), "IQ1_M")])
def test_type_that_cannot_be_read(kind, mentions, content, tmp_path, monkeypatch):
    if kind == int(KINDS.IQ1_M):  # the package may learn any: as if it did not know this one
        known = gguf.dequantize
        monkeypatch.setattr(gguf, "dequantize", lambda data, asked: known(data, asked) if asked != kind else (
            _ for _ in ()).throw(NotImplementedError()))
    at = content.index(b"output.weight") + len(b"output.weight") + 4 + 16
    (path := tmp_path / "x.gguf").write_bytes(content[:at] + kind.to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(CheckpointError, match=mentions) as error:
        load_pretrained(path)
    assert "output.weight" in str(error.value) or "incomplete" in str(error.value)


def test_without_the_package(content, tmp_path, monkeypatch):
    (path := tmp_path / "x.gguf").write_bytes(content)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        load_pretrained(path)


def test_not_finite(tmp_path):
    gguf_files.write(gguf_files.make("llama"), path := tmp_path / "x.gguf",
                     tensors={"output_norm.weight": np.full(256, np.nan)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load_pretrained(path)


def test_changed_file_is_read_again(tmp_path):
    gguf_files.write(gguf_files.make("llama"), path := tmp_path / "x.gguf")
    before = load_pretrained(path)
    gguf_files.write(gguf_files.make("llama-tied"), path)
    assert not before.model.config.tie_embeddings and load_pretrained(path).model.config.tie_embeddings
    assert jax.tree.leaves(nnx.state(before.model))[0].shape
