"""Exports a model as a directory that `transformers`, an inference engine, or the DiffuGPT reference implementation
loads."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from dlm_jax.checkpoints import hf_names
from dlm_jax.checkpoints.card import model_card
from dlm_jax.checkpoints.engine_layouts import ENGINE_LAYOUTS, engine_config, sglang_config
from dlm_jax.checkpoints.hf_config import config_to_hf
from dlm_jax.checkpoints.hf_config_diffusion import dream_generation
from dlm_jax.checkpoints.hf_tensors import fetch, write_tensors
from dlm_jax.checkpoints.peft_export import check_expressible, save_peft_adapter
from dlm_jax.checkpoints.pretrained import Pretrained
from dlm_jax.checkpoints.tokenizer import save_tokenizer
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.models import merge_lora
from dlm_jax.storage import METADATA_FILE, atomic_directory, write_json

LAYOUTS = ("hf", "diffugpt", "peft", *ENGINE_LAYOUTS)
DTYPES = ("float32", "bfloat16", "float16")


def save_pretrained(directory: epath.PathLike, pretrained: Pretrained, *, layout: str = "hf", dtype: str = "float32",
                    max_shard_bytes: float = 5e9) -> None:
    """Writes a model, its tokenizer, its configuration and a model card.

    The directory appears complete or not at all (on an object store config.json, without which it is no model, comes
    last), and replaces an earlier export. With several processes all call this, and the first writes.

    Args:
      layout: "hf" loads with `AutoModelForCausalLM`, and contains `sample_torch.py`, which samples it as a diffusion
        model; "diffugpt" has the tensor names of the DiffuGPT reference implementation; "peft" is the LoRA beside a
        base as an adapter, which the other layouts merge; "sdar" is what SGLang, LMDeploy and JetEngine serve, "dream"
        what llama.cpp converts.
      dtype: of the stored weights, "float32", "bfloat16" or "float16".
      max_shard_bytes: larger weights are split into several files with an index.

    Raises:
      CheckpointError: the model does not fit the layout or the dtype, or the directory holds something else.
      ConfigError: an unknown layout or dtype.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose {', '.join(DTYPES)}")
    if layout == "peft":
        save_peft_adapter(directory, pretrained, dtype=dtype)
        return
    if pretrained.model.lora is not None:
        check_expressible(pretrained.model.lora, layout)
        pretrained = dataclasses.replace(pretrained, model=merge_lora(pretrained.model, "float32"), base=None)
    config, tokenizer = pretrained.model.config, pretrained.tokenizer
    hf_config = config_to_hf(config, pretrained.hf_config, pretrained.diffusion, dtype)
    for name in ("bos_token_id", "eos_token_id"):  # without them, transformers uses its own defaults
        if hf_config.get(name) is None:
            hf_config[name] = getattr(pretrained, name)
    if tokenizer is not None and "dlm_jax" in hf_config:
        hf_config["dlm_jax"]["start_token_id"] = pretrained.start_token_id
    tensors = hf_names.named_tensors(hf_names.KEYS[config.family], nnx.state(pretrained.model))
    generation = {name: hf_config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")
                  if hf_config.get(name) is not None}
    if layout in ENGINE_LAYOUTS:
        hf_config = engine_config(pretrained, hf_config, layout)
    if layout == "dream":
        generation |= {"mask_token_id": pretrained.diffusion.mask_token_id, **dream_generation(pretrained.sampling)}
    if layout == "diffugpt":
        _check_diffugpt(pretrained)
        hf_config["task_specific_params"] = {"text-generation": {"do_sample": True, "max_length": config.max_length}}
    if layout != "hf":
        tokenizer = _with_mask_token(pretrained)
        tensors.setdefault(hf_names.HEAD, tensors[hf_names.embedding_name(config.family)])  # stored although tied
    if layout == "diffugpt":
        tensors = {hf_names.diffugpt_name(name, config.family): tensor for name, tensor in tensors.items()}
    if jax.process_index() > 0:  # gathering a tensor takes every process
        for name, tensor in tensors.items():
            fetch(name, tensor, jnp.dtype(dtype))
        return
    with atomic_directory(directory) as folder:
        write_tensors(folder, tensors, jnp.dtype(dtype), max_shard_bytes)
        write_json(folder / "config.json", hf_config)
        write_json(folder / "generation_config.json", generation)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        if layout == "diffugpt":
            _join_merges(folder / "tokenizer.json")
        if pretrained.recipe is not None:
            write_json(folder / METADATA_FILE, {"recipe": pretrained.recipe})
        (folder / "README.md").write_text(model_card(pretrained, layout, dtype))
        if layout == "hf" and pretrained.diffusion.blocks is None:
            shutil.copy(Path(__file__).with_name("sample_torch.py"), folder)
        if layout == "sdar":
            shutil.copy(Path(__file__).with_name("configuration_sdar.py"), folder)
            (folder / "sglang.yaml").write_text(sglang_config(pretrained))


def _check_diffugpt(pretrained: Pretrained) -> None:
    """Raises CheckpointError for a model that the layout diffugpt cannot hold."""
    if pretrained.diffusion.blocks is not None:
        raise CheckpointError(f"{pretrained.source} samples block by block, which the layout diffugpt lacks; "
                              "choose the layout hf")
    if pretrained.model.config.family != "gpt2":
        raise CheckpointError(f"the layout diffugpt is for GPT-2 models; the reference implementation stores a "
                              f"{pretrained.model.config.family} as plain HF, so use the layout hf")
    if pretrained.diffusion.mask_token_id is None or pretrained.tokenizer is None:
        raise CheckpointError("the layout diffugpt needs a tokenizer and a mask token; this model does not have both")


def _with_mask_token(pretrained: Pretrained) -> Any:
    """Returns a copy of the tokenizer that names the mask token, which others read from it."""
    tokenizer = copy.deepcopy(pretrained.tokenizer)
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(pretrained.diffusion.mask_token_id)
    return tokenizer


def _join_merges(path: Path) -> None:
    """Writes the merges of a tokenizer.json as text, as transformers 4.44, the reference's version, reads them."""
    content = json.loads(path.read_text())
    if merges := content["model"].get("merges"):
        content["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    path.write_text(json.dumps(content, ensure_ascii=False))
