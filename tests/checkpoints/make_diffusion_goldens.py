"""Runs the published code of Dream, LLaDA and SDAR on the files of `diffusion_files`, and keeps what it computes.

    python -m tests.checkpoints.make_diffusion_goldens --dllm=DLLM --llada=LLADA --sdar=SDAR

Checkouts of github.com/ZHZisZZ/dllm (which has the modeling code of Dream and LLaDA as they publish it),
github.com/ML-GSAI/LLaDA and github.com/JetAstra/SDAR. Needs transformers 4.52. Writes `diffusion_goldens.npz`:

    FAMILY/logits        float32 [2, 24, vocab], of `noisy_tokens`; SDAR's under its block mask
    FAMILY/RULE          int [1, length], the text after `prompt()` by its own sampler, at temperature 0
    dream/origin_steps   int [1, length], the step that reveals each token, which Dream's rule `origin` has at random

At temperature 0 Dream's rule `origin` is random in the order alone: it gets the numbers that make it the order in
which the library's own sampler reveals the tokens. SDAR's sampler has no temperature 0: `torch.multinomial` takes the
most probable token. What its modeling code imports of flash-attn is replaced by the same computations in PyTorch.
"""

import argparse
import importlib
import importlib.util
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from tests.checkpoints import diffusion_files as files

GOLDENS = Path(__file__).with_name("diffusion_goldens.npz")
# The samplers' own settings for each text.
DREAM = {"entropy": dict(alg="entropy", steps=10), "entropy_many": dict(alg="entropy", steps=64),
         "maskgit_plus": dict(alg="maskgit_plus", steps=7), "topk_margin": dict(alg="topk_margin", steps=24),
         "origin": dict(alg="origin", steps=16)}
LLADA = {"blocks": dict(steps=24, block_length=8), "uneven": dict(steps=9, block_length=8),
         "entire": dict(steps=5, block_length=24)}
SDAR = {"static": dict(remasking_strategy="low_confidence_static", denoising_steps=4),
        "dynamic": dict(remasking_strategy="low_confidence_dynamic", denoising_steps=4, confidence_threshold=0.2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dllm", "llada", "sdar"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    goldens = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for family, run, code in (("dream", run_dream, [arguments.dllm / "dllm/pipelines/dream/models"]),
                                  ("llada", run_llada, [arguments.dllm / "dllm/pipelines/llada/models",
                                                        arguments.llada / "generate.py"]),
                                  ("sdar", run_sdar, [arguments.sdar / "training/model/SDAR-4B-Chat",
                                                      arguments.sdar / "generate.py"])):
            files.write(family, Path(folder) / family)
            goldens |= {f"{family}/{name}": value for name, value in run(Path(folder) / family, *code).items()}
    for name, value in goldens.items():
        assert name.endswith("logits") or files.MASK not in value, name
    np.savez_compressed(GOLDENS, **goldens)
    print(f"{GOLDENS.stat().st_size} bytes: {', '.join(goldens)}")


def run_dream(folder: Path, code: Path) -> dict[str, np.ndarray]:
    package("dream_code", code)
    model = load(importlib.import_module("dream_code.modeling_dream").DreamModel, folder)
    settings_class = importlib.import_module("dream_code.generation_utils").DreamGenerationConfig
    results = {"logits": model(torch.from_numpy(files.noisy_tokens()), "full").logits.numpy()}
    tokens = torch.from_numpy(files.prompt())[None]
    order = origin_steps(folder, DREAM["origin"]["steps"])
    calls = iter(range(DREAM["origin"]["steps"]))
    left = order[0, files.PROMPT :]

    def rand(size: int, **_: object) -> torch.Tensor:
        """Returns 0, which reveals, where the order has the present step, and 1 elsewhere."""
        step = next(calls)
        chosen = left[left >= step] == step
        assert len(chosen) == size
        return torch.from_numpy(np.where(chosen, 0.0, 1.0))

    for name, settings in DREAM.items():
        with mock.patch.object(torch, "rand", rand if name == "origin" else torch.rand):
            config = settings_class(max_new_tokens=files.NEW, mask_token_id=files.MASK, pad_token_id=0, bos_token_id=1,
                                    eos_token_id=2, **settings)
            results[name] = model.diffusion_generate(tokens, generation_config=config).numpy()
    return results | {"origin_steps": order}


def origin_steps(folder: Path, steps: int) -> np.ndarray:
    """Returns the step in which the library's own sampler reveals each token, int [1, length]."""
    import jax.numpy as jnp

    from dlm_jax.random import fold_keys
    from dlm_jax.sampling import SamplerConfig
    from dlm_jax.sampling.spec import planned_step
    from dlm_jax.sampling.steppers import _uniform
    from tests.sampling.tiny_models import make_keys

    positions = jnp.arange(files.PROMPT + files.NEW)[None]
    config = SamplerConfig("random", steps, step_schedule="dream")
    return np.asarray(planned_step(config, _uniform(fold_keys(make_keys(1), 0), positions), jnp.array([[steps]])))


def run_llada(folder: Path, code: Path, generate: Path) -> dict[str, np.ndarray]:
    package("llada_code", code)
    modeling = importlib.import_module("llada_code.modeling_llada")
    config = modeling.LLaDAConfig.from_pretrained(folder)
    inner = modeling.create_model_config_from_pretrained_config(config)
    inner.init_device = "cpu"
    model = modeling.LLaDAModelLM(config, model=modeling.LLaDAModel(inner, init_params=False)).eval()
    fill(model, folder)
    sampler = load_file("llada_generate", generate)
    tokens = torch.from_numpy(files.prompt())[None]
    return {"logits": model(torch.from_numpy(files.noisy_tokens())).logits.numpy()} | {
        name: sampler.generate(model, tokens, torch.ones_like(tokens), gen_length=files.NEW, mask_id=files.MASK,
                               **settings).numpy() for name, settings in LLADA.items()}


def run_sdar(folder: Path, code: Path, generate: Path) -> dict[str, np.ndarray]:
    model, sampler = load_sdar(folder, code), load_file("sdar_generate", generate)
    tokens = torch.from_numpy(files.noisy_tokens())
    at = torch.arange(tokens.shape[1]) // 4
    allowed = (at[None, :] <= at[:, None])[None]
    results = {"logits": model(tokens, attention_mask=allowed, use_cache=False).logits.numpy()}
    with mock.patch.object(torch, "multinomial", lambda probs, num_samples: probs.argmax(-1, keepdim=True)):
        return results | {name: sampler.block_diffusion_generate(
            model, {"input_ids": torch.from_numpy(files.prompt())[None]}, files.MASK, gen_length=files.NEW + 2,
            block_length=4, temperature=1.0, top_k=0, top_p=1.0, **settings).numpy()
            for name, settings in SDAR.items()}


def load_sdar(folder: Path, code: Path) -> torch.nn.Module:
    """Loads an SDAR model by its own modeling code, without flash-attn."""
    def rms_norm(x: torch.Tensor, weight: torch.Tensor, bias: None, eps: float, **_: object) -> torch.Tensor:
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool,
                  softmax_scale: float) -> torch.Tensor:
        assert not causal
        heads = query.shape[2] // key.shape[2]
        key, value = (x.repeat_interleave(heads, dim=2) for x in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (query, key, value)), scale=softmax_scale).transpose(1, 2)

    names = ("flash_attn", "flash_attn.ops", "flash_attn.ops.triton", "flash_attn.ops.triton.layer_norm",
             "flash_attn.bert_padding", "sdar_code.fused_linear_diffusion_cross_entropy")
    stand_in = types.SimpleNamespace(
        rms_norm_fn=rms_norm, flash_attn_func=attention, flash_attn_varlen_func=None, index_first_axis=None,
        pad_input=None, unpad_input=None, FusedLinearDiffusionCrossEntropyLoss=None)
    package("sdar_code", code)
    for name in names:
        module = types.ModuleType(name)
        module.__path__, module.__spec__ = [], importlib.util.spec_from_loader(name, None)
        module.__dict__.update(vars(stand_in))
        sys.modules[name] = module
    return load(importlib.import_module("sdar_code.modeling_sdar").SDARForCausalLM, folder)


def load(kind: type, folder: Path) -> torch.nn.Module:
    config = kind.config_class.from_pretrained(folder)
    config._attn_implementation = "sdpa"
    model = kind(config).eval()
    fill(model, folder)
    return model


def fill(model: torch.nn.Module, folder: Path) -> None:
    from safetensors.torch import load_file as load_tensors

    model.load_state_dict(load_tensors(folder / "model.safetensors"), strict=True)


def package(name: str, folder: Path) -> None:
    """Makes a folder's files importable as modules of a package."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def load_file(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
