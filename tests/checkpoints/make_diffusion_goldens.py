"""Runs the published code of diffusion models on the files of `diffusion_files`, and keeps what it computes.

    pip install --target=OLD --no-deps transformers==4.52.4 tokenizers==0.21.4 huggingface_hub==0.34.4
    pip install --target=NEW --no-deps transformers==4.57.3 tokenizers==0.22.1 huggingface_hub==0.36.0
    PYTHONPATH=OLD:. python -m tests.checkpoints.make_diffusion_goldens --code=CODE --families dream llada llada_moe \
        sdar sdar_moe
    PYTHONPATH=NEW:. python -m tests.checkpoints.make_diffusion_goldens --code=CODE --families rnd1 a2d-qwen3 \
        a2d-qwen2 a2d-llama

CODE is a folder with checkouts of github.com/ZHZisZZ/dllm (which has the modeling code of Dream, LLaDA and LLaDA-MoE as
they publish it, and that of Tiny-A2D), github.com/ML-GSAI/LLaDA, github.com/JetAstra/SDAR and
github.com/RadicalNumerics/RND1 under the names dllm, LLaDA, SDAR and RND1; and with modeling_sdar_moe.py and
configuration_sdar_moe.py of the hub's JetLM/SDAR-30B-A3B-Chat in a folder SDAR-30B-A3B-Chat. The file
modeling_sdar_moe_mark.py of github.com/PKU-SEC-Lab/TEAM-MoE-dLLM, which adds arguments to the former that change
nothing where they are not given, does in its place; where there is no configuration_sdar_moe.py, that of Qwen3-MoE
does. Adds to `diffusion_goldens.npz`, or writes --output:

    FAMILY/logits        float32 [2, 24, vocab], of `noisy_tokens`; SDAR's under its block mask
    FAMILY/block_logits  the same under blocks of `A2D_BLOCK`, of Tiny-A2D
    FAMILY/RULE          int [1, length], the text after `prompt()` by its own sampler, at temperature 0
    dream/origin_steps   int [1, length], the step that reveals each token, which Dream's rule `origin` has at random

At temperature 0 Dream's rule `origin` is random in the order alone: it gets the numbers that make it the order in
which the library's own sampler reveals the tokens. SDAR's sampler has no temperature 0: `torch.multinomial` takes the
most probable token. What the modeling code of SDAR and SDAR-MoE imports of flash-attn is replaced by the same
computations in PyTorch. RND1's class of config.json sets the sizes of the published model whatever the file says; what
the file says is set again.
"""

import argparse
import importlib
import importlib.util
import json
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import numpy as np
import torch
import transformers

from tests.checkpoints import diffusion_files as files

GOLDENS = Path(__file__).with_name("diffusion_goldens.npz")
A2D_BLOCK = 8
# The samplers' own settings for each text.
DREAM = {"entropy": dict(alg="entropy", steps=10), "entropy_many": dict(alg="entropy", steps=64),
         "maskgit_plus": dict(alg="maskgit_plus", steps=7), "topk_margin": dict(alg="topk_margin", steps=24),
         "origin": dict(alg="origin", steps=16)}
LLADA = {"blocks": dict(steps=24, block_length=8), "uneven": dict(steps=9, block_length=8),
         "entire": dict(steps=5, block_length=24)}
SDAR = {"static": dict(remasking_strategy="low_confidence_static", denoising_steps=4),
        "dynamic": dict(remasking_strategy="low_confidence_dynamic", denoising_steps=4, confidence_threshold=0.2)}
RND1 = {"even": 8, "many": 64}  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--families", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--output", type=Path, default=GOLDENS)
    arguments = parser.parse_args()
    goldens = dict(np.load(arguments.output)) if arguments.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for family in arguments.families:
            run, *code = RUNS[family]
            files.write(family, Path(folder) / family)
            results = run(Path(folder) / family, *(arguments.code / path for path in code))
            goldens |= {f"{family}/{name}": value for name, value in results.items()}
    for name, value in goldens.items():
        assert name.endswith("logits") or files.MASK not in value, name
    np.savez_compressed(arguments.output, **goldens)
    print(f"{arguments.output.stat().st_size} bytes: {', '.join(goldens)}")


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
    return llada_results(model, generate, LLADA)


def llada_results(model: torch.nn.Module, generate: Path, texts: Mapping[str, dict]) -> dict[str, np.ndarray]:
    sampler = load_file("llada_generate", generate)
    tokens = torch.from_numpy(files.prompt())[None]
    return {"logits": model(torch.from_numpy(files.noisy_tokens())).logits.numpy()} | {
        name: sampler.generate(model, tokens, torch.ones_like(tokens), gen_length=files.NEW, mask_id=files.MASK,
                               **settings).numpy() for name, settings in texts.items()}


def run_llada_moe(folder: Path, code: Path, generate: Path) -> dict[str, np.ndarray]:
    package("llada_moe_code", code)
    model = load(importlib.import_module("llada_moe_code.modeling_lladamoe").LLaDAMoEModelLM, folder)
    return llada_results(model, generate, {"blocks": LLADA["blocks"]})


def run_rnd1(folder: Path, code: Path) -> dict[str, np.ndarray]:
    package("rnd1_code", code)
    settings = json.loads((folder / "config.json").read_text())
    model = load(importlib.import_module("rnd1_code.modeling_rnd").RND1LM, folder, {
        name: value for name, value in settings.items() if name not in ("model_type", "architectures", "auto_map")})
    sampler = importlib.import_module("rnd1_code.sampling")
    return {"logits": model(torch.from_numpy(files.noisy_tokens())).logits.numpy()} | {
        name: sampler.diffusion_sample(model, files.PROMPT + files.NEW, steps, greedy=True, mask_token_id=files.MASK,
                                       prefix_ids=torch.from_numpy(files.prompt()), eos_token_id=None).numpy()
        for name, steps in RND1.items()}


def run_a2d(folder: Path, code: Path) -> dict[str, np.ndarray]:
    found = vars(load_file("a2d_code", code))
    model = load(next(kind for name, kind in found.items() if name.endswith("LMHeadModel")), folder)
    tokens = torch.from_numpy(files.noisy_tokens())
    bias = torch.where(block_mask(tokens, A2D_BLOCK), 0.0, -torch.inf)[:, None]
    return {"logits": model(tokens).logits.numpy(), "block_logits": model(tokens, attention_mask=bias).logits.numpy()}


def block_mask(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """Returns what each position sees, bool [1, length, length]: its own block and those before it."""
    at = torch.arange(tokens.shape[1]) // size
    return (at[None, :] <= at[:, None])[None]


def run_sdar_moe(folder: Path, code: Path, generate: Path) -> dict[str, np.ndarray]:
    return sdar_results(load_sdar_moe(folder, code), generate, files.noisy_tokens(), files.prompt(), files.MASK)


def load_sdar_moe(folder: Path, code: Path) -> torch.nn.Module:
    """Loads an SDAR-MoE by its own modeling code, without flash-attn."""
    replace_flash_attention("sdar_moe_code", code)
    if not (code / "configuration_sdar_moe.py").exists():
        stand_in = types.ModuleType("sdar_moe_code.configuration_sdar_moe")
        stand_in.SDARMoeConfig = transformers.Qwen3MoeConfig
        sys.modules[stand_in.__name__] = stand_in
    model = load(importlib.import_module("sdar_moe_code.modeling_sdar_moe").SDARMoeForCausalLM, folder)
    forward = model.forward

    def first(*args: object, **options: object) -> object:
        """Returns the first result: TEAM's copy has more of them."""
        found = forward(*args, **options)
        return found[0] if isinstance(found, tuple) else found

    model.forward = first
    return model


def run_sdar(folder: Path, code: Path, generate: Path) -> dict[str, np.ndarray]:
    return sdar_results(load_sdar(folder, code), generate, files.noisy_tokens(), files.prompt(), files.MASK)


def sdar_results(model: torch.nn.Module, generate: Path, tokens: np.ndarray, prompt: np.ndarray,
                 mask: int) -> dict[str, np.ndarray]:
    """Returns the logits of `tokens` under the block mask, and the text after `prompt` by each of SDAR's rules."""
    sampler, tokens = load_file("sdar_generate", generate), torch.from_numpy(tokens)
    results = {"logits": model(tokens, attention_mask=block_mask(tokens, 4), use_cache=False).logits.numpy()}
    with mock.patch.object(torch, "multinomial", lambda probs, num_samples: probs.argmax(-1, keepdim=True)):
        return results | {name: sampler.block_diffusion_generate(
            model, {"input_ids": torch.from_numpy(prompt)[None]}, mask, gen_length=files.NEW + 2, block_length=4,
            temperature=1.0, top_k=0, top_p=1.0, **settings).numpy() for name, settings in SDAR.items()}


def load_sdar(folder: Path, code: Path) -> torch.nn.Module:
    """Loads an SDAR model by its own modeling code, without flash-attn."""
    replace_flash_attention("sdar_code", code)
    return load(importlib.import_module("sdar_code.modeling_sdar").SDARForCausalLM, folder)


def replace_flash_attention(name: str, code: Path) -> None:
    """Makes SDAR's modeling code importable as a package, with the same computations in PyTorch for flash-attn's."""
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
             "flash_attn.bert_padding", f"{name}.fused_linear_diffusion_cross_entropy")
    stand_in = types.SimpleNamespace(
        rms_norm_fn=rms_norm, flash_attn_func=attention, flash_attn_varlen_func=None, index_first_axis=None,
        pad_input=None, unpad_input=None, FusedLinearDiffusionCrossEntropyLoss=None)
    package(name, code)
    for replaced in names:
        module = types.ModuleType(replaced)
        module.__path__, module.__spec__ = [], importlib.util.spec_from_loader(replaced, None)
        module.__dict__.update(vars(stand_in))
        sys.modules[replaced] = module


def load(kind: type, folder: Path, settings: Mapping[str, object] = MappingProxyType({})) -> torch.nn.Module:
    config = kind.config_class.from_pretrained(folder)
    for name, value in settings.items():
        setattr(config, name, value)
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


_DLLM = "dllm/dllm/pipelines"
RUNS = {  # what runs each family, and the files of its code
    "dream": (run_dream, f"{_DLLM}/dream/models"),
    "llada": (run_llada, f"{_DLLM}/llada/models", "LLaDA/generate.py"),
    "llada_moe": (run_llada_moe, f"{_DLLM}/llada/models", "LLaDA/generate.py"),
    "sdar": (run_sdar, "SDAR/training/model/SDAR-4B-Chat", "SDAR/generate.py"),
    "sdar_moe": (run_sdar_moe, "SDAR-30B-A3B-Chat", "SDAR/generate.py"),
    "rnd1": (run_rnd1, "RND1/rnd"),
    **{f"a2d-{name}": (run_a2d, f"{_DLLM}/a2d/models/{name}/modeling_{name}.py")
       for name in ("qwen3", "qwen2", "llama")},
}


if __name__ == "__main__":
    main()
