"""Writes LoRA beside a base as an adapter in PEFT's format, which `peft` reads."""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from dlm_jax.checkpoints import hf_names
from dlm_jax.checkpoints.card import adapter_card
from dlm_jax.checkpoints.hf_config_diffusion import blocks_to_record
from dlm_jax.checkpoints.hf_tensors import LazyTensor, write_safetensors
from dlm_jax.checkpoints.peft import CONFIG, MAGNITUDE, PREFIX, TENSORS, host_float32
from dlm_jax.checkpoints.tokenizer import save_tokenizer
from dlm_jax.errors import CheckpointError
from dlm_jax.models import Transformer, kernel_norms
from dlm_jax.models.lora import LoRAConfig, full_kernel
from dlm_jax.storage import METADATA_FILE, atomic_directory, write_json

if TYPE_CHECKING:
    from dlm_jax.checkpoints.pretrained import Pretrained


def check_expressible(lora: LoRAConfig, layout: str) -> None:
    """Raises CheckpointError for LoRA that acts at some positions only, which no layout of others knows."""
    if lora.where != "all":
        raise CheckpointError(f"the layout {layout} has no LoRA that acts at noised positions only (lora.where="
                              f"{lora.where}); export the base instead, or keep the workdir, which dlm_jax reads")


def save_peft_adapter(directory: epath.PathLike, pretrained: "Pretrained", *, dtype: str = "float32") -> None:
    """Writes the LoRA factors and full tables beside a base, atomically; with several processes all call this.

    Raises:
      CheckpointError: the model has no LoRA beside it, or the directory holds something else.
    """
    model, diffusion = pretrained.model, pretrained.diffusion
    if model.lora is None or pretrained.base is None:
        raise CheckpointError(f"{pretrained.source} has no LoRA beside a base, which the layout peft needs; name the "
                              "workdir of a run with LoRA (from Python with merge=False), or choose the layout hf")
    check_expressible(model.lora, "peft")
    tensors = adapter_tensors(model)
    if jax.process_index() > 0:
        return
    token = None
    if diffusion.mask_token_id is not None and pretrained.tokenizer is not None:
        token = pretrained.tokenizer.convert_ids_to_tokens(diffusion.mask_token_id)
    blocks = {"block_size": None} if diffusion.blocks is None else blocks_to_record(diffusion.blocks)
    with atomic_directory(directory, last=CONFIG) as folder:
        write_safetensors(folder / f"{TENSORS}.safetensors", {
            name: LazyTensor(value.shape, functools.partial(np.asarray, value)) for name, value in tensors.items()},
            jnp.dtype(dtype))
        write_json(folder / CONFIG, adapter_config(model, pretrained.base))
        write_json(folder / METADATA_FILE, {"mask_token_id": diffusion.mask_token_id, "mask_token": token,
                                            "shift": diffusion.shift, **blocks, "recipe": pretrained.recipe})
        if pretrained.tokenizer is not None:
            save_tokenizer(pretrained.tokenizer, folder)
        size = model.config.vocab_size
        (folder / "README.md").write_text(
            adapter_card(pretrained.base, size, pretrained.hf_config.get("vocab_size", size)))


def adapter_tensors(model: Transformer) -> dict[str, np.ndarray]:
    """Returns the tensors that PEFT stores, by its names, float32 on the host."""
    config, lora, flat = model.config, model.lora, dict(nnx.to_flat_state(nnx.state(model)))
    tensors: dict[str, np.ndarray] = {}
    keys = hf_names.projections(config).items()
    for template, projections in itertools.groupby(keys, lambda item: item[1].name.removesuffix(".weight")):
        for side, stacked in _module_tensors(flat, dict(projections), lora.dora).items():
            tensors |= {f"{PREFIX}{template.format(i=layer)}.lora_{side}": value
                        for layer, value in enumerate(stacked)}
    if lora.embedding:
        table = host_float32(flat["embed", "embedding"][...])
        tensors[PREFIX + hf_names.embedding_name(config.family)] = table
        if config.tie_embeddings:  # PEFT trains a copy and leaves the head unchanged
            tensors[PREFIX + hf_names.HEAD] = table
    if lora.head:
        tensors[PREFIX + hf_names.HEAD] = host_float32(flat["head", "kernel"][...]).T
    return tensors


def _module_tensors(flat: Mapping[tuple, nnx.Variable], projections: dict[tuple, hf_names.Key],
                    dora: bool) -> dict[str, np.ndarray]:
    """Returns the LoRA tensors of one HF module by side, stacked over layers; none if it has no factors.

    GPT-2 has one module for queries, keys and values, which have separate factors here. They become factors of that
    module, with the sum of their ranks: each A below the other, and each B on a block diagonal. A projection without
    magnitudes has the norms of its kernel.
    """
    factors = [(key, *(host_float32(flat[*path, "factors", side][...]) for side in "ab"))
               for path, key in projections.items() if (*path, "factors", "a") in flat]
    if not factors:
        return {}
    key, _, b = factors[0]
    (layers, rank), outputs = b.shape[:2], math.prod(b.shape[2:])
    fused = np.zeros((layers, outputs * (1 if key.third is None else 3), rank * len(factors)), np.float32)
    for i, (key, _, b) in enumerate(factors):
        first = outputs * (key.third or 0)
        fused[:, first : first + outputs, i * rank : (i + 1) * rank] = b.reshape(layers, rank, outputs).swapaxes(1, 2)
    stacked = np.concatenate([a.reshape(layers, -1, rank).swapaxes(1, 2) for _, a, _ in factors], axis=1)
    tensors = {"A.weight": stacked, "B.weight": fused}
    if dora:
        magnitudes = []
        for path in projections:
            magnitude = flat.get((*path, "factors", "magnitude"))
            if magnitude is None:
                kernel = full_kernel(flat[*path, "kernel"], flat.get((*path, "kernel_scale")))
                magnitude = kernel_norms(kernel, kernel.ndim - 1)
            magnitudes.append(host_float32(magnitude[...]).reshape(layers, -1))
        tensors[MAGNITUDE] = np.concatenate(magnitudes, axis=1)
    return tensors


def adapter_config(model: Transformer, base: str) -> dict[str, Any]:
    """Returns the contents of adapter_config.json."""
    lora, known = model.lora, {path[-1]: key for path, key in hf_names.projections(model.config).items()}
    modules: dict[str, int] = {}
    for name in lora.targets:
        module = hf_names.module_name(known[name])
        modules[module] = modules.get(module, 0) + 1
    fused = {module: count for module, count in modules.items() if count > 1}
    embedding, head = (name.removesuffix(".weight").split(".")[-1]
                       for name in (hf_names.embedding_name(model.config.family), hf_names.HEAD))
    saved = [embedding] * lora.embedding + [head] * (lora.head or (lora.embedding and model.config.tie_embeddings))
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": sorted(modules), "modules_to_save": saved or None, "bias": "none",
        "fan_in_fan_out": model.config.family == "gpt2",
        "rank_pattern": {module: lora.rank * count for module, count in fused.items()},
        # keeps alpha / rank, or alpha / sqrt(rank), of each projection
        "alpha_pattern": {module: lora.alpha * (math.sqrt(count) if lora.rslora else count)
                          for module, count in fused.items()},
    }  # fmt: skip
