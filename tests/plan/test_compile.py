import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from transformers import GPT2Config, LlamaConfig

from dlm_jax.checkpoints import config_from_hf
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.parallel.chips import CHIPS
from dlm_jax.plan.compile import KNOWN, Base, CompileError, compile_step, describe_base, exhausted
from dlm_jax.plan.topology import read_topology, tpu_devices
from dlm_jax.training.config import ModelSource, TrainConfig
from dlm_jax.training.flops import count_params
from tests.plan.conftest import needs_libtpu


def describe(model: ModelSource) -> Base:
    return describe_base(TrainConfig(model=model))[0]


@pytest.mark.parametrize(("source", "params"), [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080),
    ("meta-llama/Llama-2-7b-hf", 6_738_415_616), ("meta-llama/Llama-3.2-1B", 1_235_814_400),
    ("Qwen/Qwen3-0.6B", 596_049_920), ("Qwen/Qwen3-30B-A3B-Base", 30_532_122_624)])
def test_known_models_count_parameters(source, params):
    base = describe(ModelSource(source=source, mask_token=7))
    assert count_params(base.config) == params and base.mask_token_id == 7


def test_known_models_match_transformers():
    defaults = GPT2Config().to_dict()
    assert config_from_hf(KNOWN["gpt2"]) == config_from_hf(defaults)
    llama = LlamaConfig().to_dict()  # of Llama 1: half of Llama 2's positions, another epsilon
    changed = llama | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    assert config_from_hf(KNOWN["meta-llama/Llama-2-7b-hf"]) == config_from_hf(changed)


def test_new_mask_token_adds_a_row(tiny):
    for source, size in (("gpt2", 50257), (str(tiny), 300)):
        new = describe(ModelSource(source=source, mask_token="<|mask|>"))
        assert (new.config.vocab_size, new.mask_token_id) == (size + 1, size)
        old = describe(ModelSource(source=source, mask_token=11))
        assert (old.config.vocab_size, old.mask_token_id) == (size, 11)
    with pytest.raises(CheckpointError, match="50257"):
        describe(ModelSource(source="gpt2", mask_token=50257))


def test_directory_before_known_id(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    content = json.loads((tiny / "config.json").read_text()) | {"mask_token_id": 5}
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(content))
    base = describe(ModelSource(source="gpt2"))
    assert (base.config.hidden_size, base.mask_token_id) == (128, 5)


def test_missing_sources():
    with pytest.raises(ConfigError, match=r"model\.source"):
        describe(ModelSource())
    with pytest.raises(CheckpointError, match="no/such/folder"):
        describe(ModelSource(source="no/such/folder"))


def test_random_weights(tiny):
    source = ModelSource(source=str(tiny), init="random", mask_token=3)
    assert describe(source) == dataclasses.replace(describe(dataclasses.replace(source, init="pretrained")))


def test_workdir(tmp_path, tiny):
    content = json.loads((tiny / "config.json").read_text()) | {"mask_token_id": 5}
    for folder in ("model", "checkpoints"):
        (tmp_path / folder).mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"model.param_dtype": "float32"}))
    (tmp_path / "model" / "config.json").write_text(json.dumps(content))
    base = describe(ModelSource(source=f"{tmp_path}@500"))
    assert (base.config.hidden_size, base.mask_token_id) == (128, 5)


@pytest.mark.parametrize(("message", "needed", "limit"), [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (352.22G) exceeds "
     "available HBM (15.75G).", 352.22, 15.75),
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (2.00T) exceeds "
     "available HBM (15.75G).", 2048, 15.75),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.30G of "
     "15.75G hbm. Exceeded hbm capacity by 2.55G.\n\nTotal hbm usage >= 18.55G:", 18.30, 15.75),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.5M of 256.0M hbm.", 512.5 / 1024, 0.25),
])
def test_exhausted_memory_is_read_from_the_error(message, needed, limit):
    memory = exhausted(message)
    assert (memory.needed, memory.limit, memory.fits) == (pytest.approx(needed), pytest.approx(limit), False)


@pytest.mark.parametrize("message", [
    "INTERNAL: Mosaic failed to compile TPU kernel", "INVALID_ARGUMENT: Used 18.30G of 15.75G hbm",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 18.30M of 16.00M vmem."])
def test_other_errors_are_not_exhausted_memory(message):
    assert exhausted(message) is None


def traced(device: jax.Device, gib: int, function=jnp.sin) -> list[jax.stages.Traced]:
    shape = jax.ShapeDtypeStruct((gib, 1024, 1024, 256), jnp.float32, sharding=SingleDeviceSharding(device))
    return [jax.jit(function).trace(shape)]


@needs_libtpu
@pytest.mark.parametrize("name", ["v2:2x2", "v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_chip_memory_is_what_the_compiler_grants(name):
    chip = next(chip for chip in CHIPS if name.startswith(chip.name))
    memory, texts = compile_step(traced(tpu_devices(read_topology(name))[0], 200), chip.memory)
    assert not memory.fits and memory.limit == pytest.approx(chip.memory, abs=0.05) and not texts  # by libtpu version


@needs_libtpu
def test_memory_of_programs():
    device = tpu_devices(read_topology("v5e:2x2"))[0]
    memory, texts = compile_step(traced(device, 2), 15.75)
    assert memory.fits and memory.needed == pytest.approx(4, rel=0.01) and "ENTRY" in texts[0]
    assert memory.breakdown["arguments"] == pytest.approx(2)
    both, texts = compile_step([*traced(device, 1), *traced(device, 2)], 15.75)
    assert both == memory and len(texts) == 2
    crowded, _ = compile_step(traced(device, 1), 15.75, extra=14.75)
    assert not crowded.fits and crowded.needed == pytest.approx(16.75, rel=0.01)


@needs_libtpu
def test_host_memory_is_counted_apart():
    device = tpu_devices(read_topology("v5e:2x2"))[0]
    here, there = (SingleDeviceSharding(device, memory_kind=kind) for kind in ("device", "pinned_host"))
    small, large = (jax.ShapeDtypeStruct((gib, 1024, 1024, 256), jnp.float32, sharding=place)
                    for gib, place in ((1, here), (20, there)))
    step = jax.jit(lambda x, y: (jnp.sin(x), y), donate_argnums=(0, 1), out_shardings=(here, there))
    memory, _ = compile_step([step.trace(small, large)], 15.75)
    assert memory.fits and memory.needed == pytest.approx(1, rel=0.01) and memory.breakdown["host"] == 20


def test_compile_error(monkeypatch):
    def fail(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed\nto compile")

    monkeypatch.setattr(jax.stages.Traced, "lower", fail)
    with pytest.raises(CompileError, match="Mosaic failed to compile$"):
        compile_step(traced(jax.devices()[0], 1), 16)
