import dataclasses
import json

import pytest
from transformers import GPT2Config, LlamaConfig

from dlm_jax.checkpoints import config_from_hf
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.plan.base import KNOWN, describe_base
from dlm_jax.training.config import ModelSource
from dlm_jax.training.metrics import count_params


@pytest.mark.parametrize(("source", "params"), [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080),
    ("meta-llama/Llama-2-7b-hf", 6_738_415_616), ("meta-llama/Llama-3.2-1B", 1_235_814_400),
    ("Qwen/Qwen3-0.6B", 596_049_920)])
def test_known_models_have_as_many_parameters_as_their_checkpoints(source, params):
    base = describe_base(ModelSource(source=source, mask_token=7))
    assert count_params(base.config) == params and base.mask_token_id == 7
    assert "table" in base.origin and set(KNOWN) >= {source}


def test_known_models_are_those_whose_defaults_transformers_has():
    defaults = GPT2Config().to_dict()
    assert config_from_hf(KNOWN["gpt2"]) == config_from_hf(defaults)
    llama = LlamaConfig().to_dict()  # Llama-1's, which has half the positions of Llama-2 and another epsilon
    changed = llama | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    assert config_from_hf(KNOWN["meta-llama/Llama-2-7b-hf"]) == config_from_hf(changed)


def test_a_new_mask_token_adds_a_row_and_an_id_does_not(tiny):
    for source, size in (("gpt2", 50257), (str(tiny), 300)):
        new = describe_base(ModelSource(source=source, mask_token="<|mask|>"))
        assert (new.config.vocab_size, new.mask_token_id) == (size + 1, size)
        old = describe_base(ModelSource(source=source, mask_token=11))
        assert (old.config.vocab_size, old.mask_token_id) == (size, 11)
    with pytest.raises(CheckpointError, match="outside the vocabulary"):
        describe_base(ModelSource(source="gpt2", mask_token=50257))


def test_a_directory_goes_before_the_table_and_records_its_mask_token(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    content = json.loads((tiny / "config.json").read_text()) | {"mask_token_id": 5}
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(content))
    base = describe_base(ModelSource(source="gpt2"))
    assert (base.config.hidden_size, base.mask_token_id, base.origin) == (128, 5, "config.json of gpt2")


def test_what_is_not_there_is_said():
    with pytest.raises(ConfigError, match=r"model\.source names no base model"):
        describe_base(ModelSource())
    with pytest.raises(CheckpointError, match="no/such/folder"):
        describe_base(ModelSource(source="no/such/folder"))


def test_random_weights_need_no_more(tiny):
    source = ModelSource(source=str(tiny), init="random", mask_token=3)
    assert describe_base(source) == dataclasses.replace(describe_base(dataclasses.replace(source, init="pretrained")))


def test_a_workdir_is_what_its_run_made(tmp_path, tiny):
    content = json.loads((tiny / "config.json").read_text()) | {"mask_token_id": 5}
    for folder in ("model", "checkpoints"):
        (tmp_path / folder).mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"model.param_dtype": "float32"}))
    (tmp_path / "model" / "config.json").write_text(json.dumps(content))
    base = describe_base(ModelSource(source=f"{tmp_path}@500"))
    assert (base.config.hidden_size, base.mask_token_id) == (128, 5)
