"""Adapters against `peft` itself, in both directions, and refusals."""

import dataclasses
import re
import shutil

import huggingface_hub
import jax
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from flax import nnx

from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.checkpoints.peft_export import adapter_config
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import CheckpointError, ConfigError, DLMError
from dlm_jax.models import LoRAConfig, LoRAParam
from tests.checkpoints import families

# Warnings of transformers and peft.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in (
    "`is_gradient_checkpointing` is deprecated", "fan_in_fan_out is set to False",
    "Model has `tie_word_embeddings=True`")]
TOKENS, TENSORS = families.tokens(), "adapter_model.safetensors"
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "gpt2": dict(r=5, lora_alpha=7, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    "gpt2-embedding": dict(r=2, lora_alpha=8, target_modules=["attn.c_proj"], modules_to_save=["wte"]),
    "gpt2-untied-relu": dict(r=2, target_modules=["c_fc"], modules_to_save=["wte", "lm_head"]),
    "llama1": dict(r=4, lora_alpha=16, target_modules="all-linear", lora_dropout=0.3),
    "llama2-grouped-tied": dict(r=3, use_rslora=True, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]),
    "llama-biases": dict(r=4, target_modules=LLAMA_TARGETS, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
                         alpha_pattern={"layers.0.self_attn.q_proj": 20}, modules_to_save=["embed_tokens"]),
    "gpt2-dora": dict(r=3, lora_alpha=5, target_modules=["c_attn", "c_proj"], use_dora=True),
    "llama-biases-dora": dict(r=4, use_rslora=True, target_modules="all-linear", rank_pattern={"q_proj": 2},
                              use_dora=True),
    "llama2-grouped-tied-dora": dict(r=3, target_modules=["q_proj", "down_proj"], layers_to_transform=[1],
                                     use_dora=True, lora_dropout=0.2),
    "gpt2-tables": dict(r=3, lora_alpha=5, target_modules=["c_attn", "wte", "lm_head"]),
    "llama1-tables": dict(r=3, target_modules=["lm_head"], use_dora=True),
    "llama-biases-tables": dict(r=4, target_modules=["embed_tokens", "q_proj"], rank_pattern={"embed_tokens": 2}),
    "qwen3": dict(r=2, target_modules=r".*\.(k_proj|down_proj)", exclude_modules=None),
}


def logits(pretrained):
    return families.logits(pretrained.model, TOKENS)


def save_with_peft(case, directory, **settings):
    """Saves a base and an adapter with random factors by `peft`; returns its logits."""
    model = families.save(re.sub("-(embedding|dora|tables)$", "", case), directory / "base")
    model.name_or_path = str(directory / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0.0, 0.2)
    adapted.save_pretrained(directory / "adapter")
    return families.torch_logits(adapted, TOKENS)


@pytest.mark.parametrize("case", SETTINGS)
def test_import_from_peft(case, tmp_path):
    expected = save_with_peft(case, tmp_path, **SETTINGS[case])
    found = load_pretrained(tmp_path / "adapter")
    assert np.abs(expected - logits(load_pretrained(tmp_path / "base"))).max() > 0.05
    np.testing.assert_allclose(logits(found), expected, atol=1e-4)
    assert found.model.lora is None and found.source == str(tmp_path / "adapter")
    assert found.model.config.tie_embeddings == (case.removesuffix("-dora") in (
        "gpt2", "llama2-grouped-tied", "qwen3"))


def make_lora(case, directory, **settings):
    """Returns a base by transformers, and the same with random LoRA beside it."""
    reference = families.save(case, directory / "base")
    lora = LoRAConfig(**{"rank": 3, "alpha": 5.0, "frozen_dtype": "float32"} | settings)
    pretrained = load_pretrained(directory / "base", lora=lora)
    graphdef, trained, rest = nnx.split(pretrained.model, LoRAParam, ...)
    rng = np.random.default_rng(1)
    trained = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), trained)
    return reference, dataclasses.replace(pretrained, model=nnx.merge(graphdef, trained, rest),
                                          base=str(directory / "base"))


@pytest.mark.parametrize("case, settings", [
    ("gpt2", dict(targets=("q", "v"), rslora=True)), ("gpt2", dict(targets=("k", "up"), embedding=True)),
    ("gpt2-untied-relu", dict(targets=("out",), embedding=True, head=True)),
    ("llama2-grouped-tied", dict(rslora=True)), ("llama-biases", dict(targets=("q", "down"), embedding=True)),
    ("gpt2", dict(targets=("q", "k", "v", "out", "up", "down"), dora=True)),
    ("gpt2", dict(targets=("v", "up"), dora=True, rslora=True)),
    ("llama-biases", dict(dora=True)), ("qwen2", dict(targets=("gate",), head=True))])
def test_export_to_peft(case, settings, tmp_path):
    reference, pretrained = make_lora(case, tmp_path, **settings)
    assert np.abs(logits(pretrained) - families.torch_logits(reference, TOKENS)).max() > 0.05
    save_pretrained(tmp_path / "adapter", pretrained, layout="peft")
    adapted = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    np.testing.assert_allclose(families.torch_logits(adapted, TOKENS), logits(pretrained), atol=1e-4)
    again = load_pretrained(tmp_path / "adapter")
    np.testing.assert_allclose(logits(again), logits(pretrained), atol=1e-4)
    assert again.model.config == pretrained.model.config
    save_pretrained(tmp_path / "merged", pretrained)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(families.torch_logits(merged, TOKENS), logits(pretrained), atol=1e-4)


def test_mask_token_of_an_adapter_is_recorded(tmp_path):
    _, pretrained = make_lora("gpt2", tmp_path, targets=("q",), embedding=True)
    pretrained = dataclasses.replace(pretrained, diffusion=DiffusionSpec(7, shift=False))
    save_pretrained(tmp_path / "adapter", pretrained, layout="peft")
    loaded = load_pretrained(tmp_path / "adapter")
    assert (loaded.recorded_mask_token, loaded.diffusion.mask_token_id, loaded.diffusion.shift) == (7, 7, False)
    with pytest.raises(ConfigError, match=r"7.* 9"):
        load_pretrained(tmp_path / "adapter", mask_token=9)


def test_diffullama_adapter_layout(tmp_path):
    """As diffusionfamily/diffullama-gsm: layers under `denoise_model`, the embedding outside."""
    expected = save_with_peft("llama1", tmp_path, r=4, lora_alpha=8, target_modules=LLAMA_TARGETS,
                      modules_to_save=["embed_tokens"])

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("base_model.model.model.embed_tokens", "base_model.model.embed_tokens").replace(
                "base_model.model.model.", "base_model.model.denoise_model.")] = tensors.pop(name)
        assert {"base_model.model.embed_tokens.weight",
                "base_model.model.denoise_model.layers.1.mlp.gate_proj.lora_B.weight"} < set(tensors)

    families.rewrite(tmp_path / "adapter", rename, TENSORS)
    np.testing.assert_allclose(logits(load_pretrained(tmp_path / "adapter")), expected, atol=1e-4)


def test_base_is_found(tmp_path, monkeypatch):
    expected = save_with_peft("llama1", tmp_path / "a", **SETTINGS["llama1"])
    adapter = tmp_path / "a" / "adapter"

    def rename(base):
        families.set_config(adapter, "adapter_config.json", base_model_name_or_path=base)

    rename("base")
    np.testing.assert_allclose(logits(load_pretrained(adapter)), expected, atol=1e-4)
    shutil.move(tmp_path / "a" / "base", tmp_path / "other")
    with pytest.raises(CheckpointError, match="'base'"):
        load_pretrained(adapter)
    np.testing.assert_allclose(logits(load_pretrained(adapter, base=str(tmp_path / "other"))), expected, atol=1e-4)
    monkeypatch.chdir(tmp_path)
    rename("other")
    np.testing.assert_allclose(logits(load_pretrained(adapter)), expected, atol=1e-4)
    rename("someone/other")
    hub = {"someone/other": tmp_path / "other", "someone/adapter": adapter}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: hub[name])
    np.testing.assert_allclose(logits(load_pretrained("someone/adapter")), expected, atol=1e-4)
    with pytest.raises(ConfigError, match="other"):
        load_pretrained(tmp_path / "other", base="x")


def test_adapter_in_the_folder_of_its_base(tmp_path):
    """As transformers reads it: the weights beside an adapter are its base, and config.json alone changes nothing."""
    expected = save_with_peft("llama1", tmp_path, **SETTINGS["llama1"])
    shutil.copytree(tmp_path / "base", tmp_path / "both")
    shutil.copytree(tmp_path / "adapter", tmp_path / "both", dirs_exist_ok=True)
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "adapter")
    np.testing.assert_allclose(logits(load_pretrained(tmp_path / "adapter")), expected, atol=1e-4)
    shutil.move(tmp_path / "base", tmp_path / "away")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both").eval()
    np.testing.assert_allclose(families.torch_logits(reference, TOKENS), expected, atol=1e-4)
    np.testing.assert_allclose(logits(load_pretrained(tmp_path / "both")), expected, atol=1e-4)
    with pytest.raises(CheckpointError, match="both"):
        load_pretrained(tmp_path)


def test_adapters_stack(tmp_path):
    save_with_peft("gpt2", tmp_path, **SETTINGS["gpt2"])
    below = load_pretrained(tmp_path / "adapter")
    lora = LoRAConfig(rank=2, alpha=4.0, targets=("q", "down"), frozen_dtype="float32")
    above = load_pretrained(tmp_path / "adapter", lora=lora)
    np.testing.assert_allclose(logits(above), logits(below), atol=1e-6)
    again = load_pretrained(tmp_path / "adapter", lora=lora)
    assert len(above.provenance) == 2 and above.provenance == again.provenance
    q = above.model.blocks.attention.q.factors.b
    q[...] = q[...] + 0.1
    save_pretrained(tmp_path / "second", dataclasses.replace(above, base=str(tmp_path / "adapter")), layout="peft")
    second = load_pretrained(tmp_path / "second")
    np.testing.assert_allclose(logits(second), logits(above), atol=1e-4)
    assert np.abs(logits(second) - logits(below)).max() > 0.05


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    save_with_peft("llama1", directory, r=4, target_modules=["q_proj", "up_proj"])
    return directory / "adapter"


def add(name, *shape):
    return lambda tensors: tensors.update({f"base_model.model.{name}": torch.ones(*shape)})


def remove(name):
    return lambda tensors: tensors.pop(f"base_model.model.{name}")


def spoil(name, value):
    return lambda tensors: tensors[f"base_model.model.{name}"][1, 2].fill_(value)


@pytest.mark.parametrize("change, message", [
    ({"use_dora": True}, "q_proj.*lora_magnitude_vector"), ({"bias": "all"}, "bias"), ({"peft_type": "IA3"}, "IA3"),
    ({"init_lora_weights": "pissa"}, "pissa"), ({"r": 8}, "rank 8"), ({"lora_bias": True}, "lora_bias"),
    ({"target_modules": ["q_proj", "v_proj"]}, "layers.0.self_attn.v_proj"),
    (add("model.norm.weight", 32), "norm.weight"),
    (add("model.layers.0.self_attn.q_proj.lora_magnitude_vector", 32), "lora_magnitude_vector"),
    (add("lm_head.lora_A.weight", 4, 32), "lm_head has no lora_B"), ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ({"target_modules": ["q_proj", "up_proj", "embed_tokens"]}, "embed_tokens"),
    ({"base_model_name_or_path": None}, "base_model_name_or_path"),
    ({"base_model_name_or_path": "adapter"}, "base_model_name_or_path"),
    (remove("model.layers.1.mlp.up_proj.lora_B.weight"), "lora_B"),
    (add("model.layers.7.mlp.up_proj.lora_A.weight", 4, 32), "layers.7"),
    (add("lm_head.weight", 5, 32), "lm_head.weight"),
    (spoil("model.layers.1.mlp.up_proj.lora_A.weight", np.nan), "layers.1.mlp.up_proj"),
    (spoil("model.layers.0.self_attn.q_proj.lora_B.weight", -np.inf), "layers.0.self_attn.q_proj"),
    ({"lora_alpha": None}, "lora_alpha"), ({"r": "4"}, "must give r"), ({"use_rslora": "false"}, "use_rslora")])
def test_unfit_settings_and_tensors_are_refused_by_name(adapter, change, message, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    if isinstance(change, dict):
        families.set_config(tmp_path / "adapter", "adapter_config.json", **change)
    else:
        families.rewrite(tmp_path / "adapter", change, TENSORS)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_other_base_is_refused(adapter, tmp_path):
    for case in ("gpt2", "llama-biases", "llama2-grouped-tied"):
        families.save(case, tmp_path / case)
    wide = transformers.LlamaConfig(**families.CASES["llama1"][1] | dict(hidden_size=40, head_dim=8))
    transformers.AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "wide")
    for case, message in (("gpt2", "gpt2"), ("llama-biases", r"q_proj.lora_B .*\[32, 4\]"),
                          ("wide", r"wide: .*lora_A .*\[4, 32\]")):
        with pytest.raises(CheckpointError, match=message) as caught:
            load_pretrained(adapter, base=str(tmp_path / case))
        assert "\n" not in str(caught.value)


def test_export_without_lora_is_refused(adapter, tmp_path):
    with pytest.raises(DLMError, match="LoRA"):
        save_pretrained(tmp_path / "out", load_pretrained(adapter), layout="peft")
    assert not (tmp_path / "out").exists()


def test_only_an_earlier_export_is_replaced(tmp_path):
    _, pretrained = make_lora("llama1", tmp_path)
    for _ in range(2):
        save_pretrained(tmp_path / "adapter", pretrained, layout="peft", dtype="bfloat16")
    tensors = safetensors.torch.load_file(tmp_path / "adapter" / TENSORS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16} and len(tensors) == 2 * 2 * 7
    with pytest.raises(CheckpointError, match="base"):
        save_pretrained(tmp_path / "base", pretrained, layout="peft")
    assert adapter_config(pretrained.model, "x")["rank_pattern"] == {}
