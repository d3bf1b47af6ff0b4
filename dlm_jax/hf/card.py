"""The model card that goes with an export."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from flax import nnx

if TYPE_CHECKING:
    from dlm_jax.hf.load import Pretrained

_USE = {
    "hf": """\
`AutoModelForCausalLM.from_pretrained` loads these weights, but attends causally and so treats them as an
autoregressive model. To sample them as a diffusion model with nothing but PyTorch and transformers:

```bash
python sample_torch.py --prompt "Once upon a time" --length 64
```
""",
    "diffugpt": """\
The tensors have the names of the DiffuGPT release, whose `inf_diffugpt.py` samples this directory:

```bash
python inf_diffugpt.py --model_name THIS_DIRECTORY --base_model_name THIS_DIRECTORY
```
""",
}


_USE_OF_BLOCKS = """\
`AutoModelForCausalLM.from_pretrained` loads these weights and treats them as an autoregressive model. Writing block by
block takes dlm_jax.
"""


def model_card(pretrained: "Pretrained", layout: str, dtype: str) -> str:
    """README.md of an export: what the model is, how to use it, and the recipe it was made by."""
    config = pretrained.model.config
    is_diffusion = pretrained.mask_token_id is not None
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(pretrained.model)))
    name, recipe = Path(pretrained.source).resolve().name, pretrained.recipe or {}
    facts = {
        "kind": "masked diffusion language model" if is_diffusion else "autoregressive language model",
        "base": recipe.get("model.source", name),
        "architecture": f"{config.family}, {config.num_layers} layers of width {config.hidden_size}, "
                        f"{config.num_heads} heads",
        "parameters": f"{size:,} ({dtype})",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "longest input": f"{config.max_length:,} tokens",
    }
    if is_diffusion:
        facts["mask token id"] = pretrained.mask_token_id
        facts["output at position n predicts"] = "token n + 1" if pretrained.shift else "token n"
        if pretrained.blocks is not None:
            facts["written"] = f"one block of {pretrained.blocks.size} tokens after another"
            facts["attention inside a block that is written"] = pretrained.blocks.clean
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    tags = ["diffusion", "masked-diffusion"] if is_diffusion else ["causal-lm"]
    sections = [
        f"---\nlibrary_name: dlm_jax\npipeline_tag: text-generation\ntags: {json.dumps(tags)}\n---",
        f"# {name}: {facts['kind']}",
        f"| | |\n| --- | --- |\n{table}",
    ]
    if is_diffusion:
        asked = recipe.get("data.examples.format", "none") != "none"
        commands = "`dlm sample --model=THIS_DIRECTORY`" + " or `dlm chat --model=THIS_DIRECTORY`" * asked
        use = _USE[layout] if pretrained.blocks is None else _USE_OF_BLOCKS
        sections.append(f"## Use\n\n{use}\nWith dlm_jax: {commands}.")
    if recipe:
        sections.append(f"## Recipe\n\n```json\n{json.dumps(recipe, indent=2, default=str)}\n```")
    return "\n\n".join(sections) + "\n"
