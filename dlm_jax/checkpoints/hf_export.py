"""The model card that goes with an export."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from tqdm import tqdm

from dlm_jax.checkpoints import hf_names
from dlm_jax.checkpoints.hf_config import config_to_hf
from dlm_jax.checkpoints.hf_tensors import write_tensors
from dlm_jax.checkpoints.peft import save_adapter
from dlm_jax.checkpoints.pretrained import Pretrained
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.models import Transformer, merge_lora
from dlm_jax.parallel import to_host
from dlm_jax.storage import METADATA_FILE, atomic_directory, write_json

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


def model_card(pretrained: Pretrained, layout: str, dtype: str) -> str:
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
            facts["attention inside a block that is written"] = pretrained.blocks.clean_attention
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


# ---- Export: a Transformer becomes a directory that `transformers`, or the DiffuGPT release's own code, loads.


LAYOUTS = ("hf", "diffugpt", "peft")
DTYPES = ("float32", "bfloat16", "float16")


def save_pretrained(directory: epath.PathLike, pretrained: Pretrained, *, layout: str = "hf", dtype: str = "float32",
                    max_shard_bytes: float = 5e9) -> None:
    """Writes a model, its tokenizer, its configuration and a model card.

    The directory appears whole or not at all (on an object store its config.json, without which it is no model, comes
    last); one that holds an earlier export is replaced. With several
    processes all of them call this, and the first writes.

    Args:
      layout: "hf" loads with `AutoModelForCausalLM` and carries `sample_torch.py`, which samples it as a
        diffusion model; "diffugpt" has the tensor names of the DiffuGPT release and runs under its code; "peft" is what
        a model with LoRA has learned beside its base, which the others merge.
      dtype: type of the stored weights, "float32", "bfloat16" or "float16".
      max_shard_bytes: weights beyond this are split over several files with an index.

    Raises:
      CheckpointError: the model does not fit the layout or the type, or the directory holds something else.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose {', '.join(DTYPES)}")
    if layout == "peft":
        save_adapter(directory, pretrained, dtype=dtype)
        return
    if pretrained.model.lora is not None:
        pretrained = dataclasses.replace(pretrained, model=merge_lora(pretrained.model, "float32"), base=None)
    config, tokenizer = pretrained.model.config, pretrained.tokenizer
    hf_config = config_to_hf(config, pretrained.hf_config, mask_token_id=pretrained.mask_token_id,
                             shift=pretrained.shift, dtype=dtype, blocks=pretrained.blocks)
    for name in ("bos_token_id", "eos_token_id"):  # left out, transformers would put its own
        if hf_config.get(name) is None:
            hf_config[name] = getattr(pretrained, name)
    tensors = hf_tensors(pretrained.model)
    if layout == "diffugpt" and pretrained.blocks is not None:
        raise CheckpointError(f"{pretrained.source} writes in blocks, which the DiffuGPT release's code does not; "
                              "choose the layout hf")
    if layout == "diffugpt":
        tokenizer = _release_tokenizer(pretrained)
        hf_config["task_specific_params"] = {"text-generation": {"do_sample": True, "max_length": config.max_length}}
        tensors.setdefault(hf_names.HEAD, tensors[hf_names.embedding_name(config.family)])  # it stores tied weights twice
        tensors = {hf_names.release_name(name, config.family): tensor for name, tensor in tensors.items()}
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    progress = tqdm(desc="exporting", total=len(shapes), leave=False, disable=None, delay=3)

    def fetch(name: str) -> np.ndarray:
        progress.update()
        value = tensors[name][1]()
        if dtype == "float16" and np.abs(value).max() > np.finfo(np.float16).max:
            raise CheckpointError(f"{name} exceeds the range of float16; export as bfloat16 or float32")
        return value.astype(jnp.dtype(dtype))

    if jax.process_index() > 0:  # gathering a tensor takes every process
        for name in shapes:
            fetch(name)
        return
    with progress, atomic_directory(directory) as folder:
        write_tensors(folder, shapes, fetch, jnp.dtype(dtype), max_shard_bytes)
        write_json(folder / "config.json", hf_config)
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_json(folder / "generation_config.json", {name: hf_config[name] for name in special
                                                        if hf_config.get(name) is not None})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if layout == "diffugpt":
            _spell_tokenizer_as_before(folder)
        if pretrained.recipe is not None:
            write_json(folder / METADATA_FILE, {"recipe": pretrained.recipe})
        (folder / "README.md").write_text(model_card(pretrained, layout, dtype))
        if layout == "hf" and pretrained.blocks is None:
            shutil.copy(Path(__file__).with_name("sample_torch.py"), folder)


def hf_tensors(model: Transformer) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
    """Shape of every HF tensor by name, and a function that brings it to the host."""
    parts: dict[str, list[tuple[hf_names.Key, tuple[int, ...], jax.Array, int | None]]] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        key = hf_names.KEYS[model.config.family][".".join(path)]
        for layer, (name, shape) in enumerate(hf_names.layer_tensors(key, leaf.shape)):
            part = key, shape, leaf[...], layer if leaf.axes[0] == "layers" else None
            parts.setdefault(name, []).append(part)

    def gather(name: str) -> np.ndarray:
        thirds = sorted(parts[name], key=lambda part: part[0].third or 0)
        arrays = [hf_names.to_hf(to_host(array if layer is None else array[layer]), key)
                  for key, _, array, layer in thirds]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)

    return {name: (hf_names.hf_shape(*parts[name][0][:2]), lambda name=name: gather(name)) for name in parts}


def _release_tokenizer(pretrained: Pretrained) -> Any:
    """A copy of the tokenizer that names the mask token, as the release's code asks it to."""
    if pretrained.model.config.family != "gpt2":
        raise CheckpointError(f"the layout diffugpt is for GPT-2 models; the release stores a "
                              f"{pretrained.model.config.family} as plain HF, so use the layout hf")
    if pretrained.mask_token_id is None or pretrained.tokenizer is None:
        raise CheckpointError("the layout diffugpt needs a tokenizer and a mask token; this model lacks one of them")
    tokenizer = copy.deepcopy(pretrained.tokenizer)
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(pretrained.mask_token_id)
    return tokenizer


def _spell_tokenizer_as_before(folder: Path) -> None:
    """Rewrites two things that transformers 5 spells in a way which 4.44, the release's version, cannot read."""
    content = json.loads((folder / "tokenizer.json").read_text())
    if merges := content["model"].get("merges"):
        content["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if settings["tokenizer_class"] == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", settings)
