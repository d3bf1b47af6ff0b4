"""README.md of an export: what the model is, how to use it, and the recipe that made it."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from flax import nnx

from dlm_jax.checkpoints.engine_layouts import SDAR_THRESHOLD

if TYPE_CHECKING:
    from dlm_jax.checkpoints.pretrained import Pretrained
    from dlm_jax.models import DrafterConfig

_USE = {
    "hf": """\
`AutoModelForCausalLM.from_pretrained` loads these weights, but attends causally and so treats them as an
autoregressive model. To sample them as a diffusion model with PyTorch and transformers alone:

```bash
python sample_torch.py --prompt "Once upon a time" --length 64
```
""",
    "diffugpt": """\
The tensors have the names of the DiffuGPT reference implementation, whose `inf_diffugpt.py` samples this directory:

```bash
python inf_diffugpt.py --model_name THIS_DIRECTORY --base_model_name THIS_DIRECTORY
```
""",
}
_USE_ENGINES = {
    "sdar": """\
SGLang, LMDeploy and JetEngine serve this directory as an SDAR model, with {dtype} weights:

```bash
python -m sglang.launch_server --model-path THIS_DIRECTORY --trust-remote-code --dllm-algorithm LowConfidence \\
    --dllm-algorithm-config THIS_DIRECTORY/sglang.yaml
```

```python
from lmdeploy import PytorchEngineConfig, pipeline
engine = PytorchEngineConfig(dllm_block_length={size}, dllm_denoising_steps={size},
                             dllm_unmasking_strategy="low_confidence_dynamic", dllm_confidence_threshold={threshold})
print(pipeline("THIS_DIRECTORY", backend_config=engine)(["Once upon a time"]))

from jetengine import LLM, SamplingParams
model = LLM("THIS_DIRECTORY", mask_token_id={mask}, block_length={size})
print(model.generate_streaming(["Once upon a time"], SamplingParams(
    temperature=1.0, topk=0, topp=1.0, max_tokens=64, remasking_strategy="low_confidence_dynamic",
    block_length={size}, denoising_steps={size}, dynamic_threshold={threshold})))
```
""",
    "dream": """\
llama.cpp converts this directory as a Dream model, and samples it:

```bash
python convert_hf_to_gguf.py THIS_DIRECTORY --outfile model.gguf
llama-diffusion-cli -m model.gguf -p "Once upon a time" -ub 512 --diffusion-algorithm 4 --diffusion-eps 0.001 \\
    --diffusion-steps 64 --temp 0.2
```

It puts the prompt into the tokenizer's chat template, or into ChatML where there is none, and `-ub` is the length of
prompt and answer. With `--temp 0` it samples at temperature 1.
""",
}
_USE_BLOCKS = """\
`AutoModelForCausalLM.from_pretrained` loads these weights and treats them as an autoregressive model. Sampling block by
block needs dlm_jax.
"""
_USE_ADAPTER = """\
```python
from dlm_jax import DiffusionLM
lm = DiffusionLM.from_pretrained("THIS_DIRECTORY")
```

`peft.PeftModel.from_pretrained(base, "THIS_DIRECTORY")` loads it beside the base in PyTorch"""


def model_card(pretrained: "Pretrained", layout: str, dtype: str) -> str:
    """Returns the card of an export with all weights, in any layout but "peft"."""
    config, diffusion = pretrained.model.config, pretrained.diffusion
    is_diffusion = diffusion.mask_token_id is not None
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(pretrained.model)))
    name, recipe = Path(pretrained.source).resolve().name, pretrained.recipe or {}
    kind = "masked diffusion language model" if is_diffusion else "autoregressive language model"
    facts = {
        "kind": kind,
        "base": recipe.get("model.source", name),
        "architecture": f"{config.family}, {config.num_layers} layers of width {config.hidden_size}, "
                        f"{config.num_heads} heads",
        "parameters": f"{size:,} ({dtype})",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "longest input": f"{config.max_length:,} tokens",
    }
    if is_diffusion:
        facts["mask token id"] = diffusion.mask_token_id
        facts["output at position n predicts"] = "token n + 1" if diffusion.shift else "token n"
    if is_diffusion and diffusion.blocks is not None:
        facts["tokens per block"] = diffusion.blocks.size
        facts["attention inside a clean block"] = diffusion.blocks.clean_attention
        facts["noise"] = {"mask": "the mask token", "random_tokens": "random tokens"}[diffusion.blocks.noise]
    sections = [f"# {name}: {kind}", _table(facts)]
    if is_diffusion:
        is_chat = recipe.get("data.examples.format", "none") != "none"
        commands = "`dlm sample --model=THIS_DIRECTORY`" + " or `dlm chat --model=THIS_DIRECTORY`" * is_chat
        if layout in _USE_ENGINES:
            use = _USE_ENGINES[layout].format(
                dtype=dtype, mask=diffusion.mask_token_id, threshold=SDAR_THRESHOLD,
                size=None if diffusion.blocks is None else diffusion.blocks.size)
        else:
            use = _USE[layout] if diffusion.blocks is None else _USE_BLOCKS
        sections.append(f"## Use\n\n{use}\nWith dlm_jax: {commands}.")
    if recipe:
        sections.append(f"## Recipe\n\n```json\n{json.dumps(recipe, indent=2, default=str)}\n```")
    tags = ["diffusion", "masked-diffusion"] if is_diffusion else ["causal-lm"]
    return _card(sections, pipeline_tag="text-generation", tags=tags)


def adapter_card(base: str, vocab_size: int, base_vocab_size: int) -> str:
    """Returns the card of an adapter in PEFT's format."""
    resize = f", after `base.resize_token_embeddings({vocab_size})`" if vocab_size != base_vocab_size else ""
    name = Path(base).name
    return _card([f"# LoRA beside {name}", f"{_USE_ADAPTER}{resize}."], base_model=name, tags=["lora", "peft"])


def drafter_card(config: "DrafterConfig", layout: str, target: str, size: int, dtype: str) -> str:
    """Returns the card of a drafter; `target` is the source of the model that it guesses for, `size` its parameters."""
    layers, name = config.layers, Path(target).resolve().name
    facts = {
        "guesses for": name,
        "layout": layout,
        "architecture": f"{layers.num_layers} layers of width {layers.hidden_size}, {layers.num_heads} heads",
        "parameters": f"{size:,} ({dtype}), without the target's embedding and head",
        "block": f"{config.block_size} slots, of which {config.num_drafts} guess a token",
        "features": f"outputs of the target's layers {', '.join(map(str, config.target_layer_ids))}",
        "mask token id": config.mask_token_id,
    }
    use = (f"With dlm_jax: `dlm sample --model=TARGET --drafter=THIS_DIRECTORY`. The text is {name}'s own; it takes "
           f"fewer passes.\n\n```bash\n" + "\n".join(engine_commands(config, layout)) + "\n```")
    return _card([f"# Drafter of {name}", _table(facts), f"## Use\n\n{use}"],
                 pipeline_tag="text-generation", tags=["speculative-decoding", layout])


def engine_commands(config: "DrafterConfig", layout: str, directory: str = "THIS_DIRECTORY") -> list[str]:
    """Returns the commands with which engines serve a target with a drafter in this layout, and their widths.

    vLLM counts the guesses; SGLang the tokens that the target checks at a time, the last one of the text included.
    """
    method = "dspark" if layout == "dspark" else "dflash"
    settings = {"method": method, "model": directory, "num_speculative_tokens": config.num_drafts}
    is_mixed = 0 < len(config.sliding_layers) < config.layers.num_layers
    runner = "VLLM_USE_V2_MODEL_RUNNER=1 " if layout != "dflash" or is_mixed else ""
    commands = [f"{runner}vllm serve TARGET --speculative-config {shlex.quote(json.dumps(settings))}"]
    if layout != "dspark" or config.markov_rank:
        commands.append(f"python -m sglang.launch_server --model-path TARGET --speculative-algorithm {method.upper()} "
                        f"--speculative-draft-model-path {directory} --speculative-num-draft-tokens "
                        f"{config.num_drafts + 1}")
    return commands


def _table(facts: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in facts.items())])


def _card(sections: list[str], **metadata: object) -> str:
    from huggingface_hub import ModelCardData

    header = ModelCardData(library_name="dlm_jax", **metadata).to_yaml()
    return "\n\n".join([f"---\n{header}\n---", *sections]) + "\n"
