"""Adapters in PEFT's format, written: what was learned beside a base becomes a directory that `peft` loads."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from dlm_jax.errors import CheckpointError
from dlm_jax.hf import keys
from dlm_jax.hf.adapter import CONFIG, MAGNITUDE, PREFIX, TENSORS
from dlm_jax.hf.config import record_of
from dlm_jax.hf.folder import NOTES, appearing_whole, write_json
from dlm_jax.hf.tensors import write_safetensors
from dlm_jax.models import Transformer, kernel_norms
from dlm_jax.models.quantised import whole_kernel
from dlm_jax.parallel import to_host

if TYPE_CHECKING:
    from dlm_jax.hf.load import Pretrained

_CARD = """\
---
library_name: dlm_jax
base_model: {base}
tags: ["lora", "peft"]
---

# LoRA beside {base}

```python
from dlm_jax import DiffusionLM
lm = DiffusionLM.from_pretrained("THIS_DIRECTORY")
```

`peft.PeftModel.from_pretrained(base, "THIS_DIRECTORY")` loads it beside the base in PyTorch{resize}.
"""


def save_adapter(directory: epath.PathLike, pretrained: "Pretrained", *, dtype: str = "float32") -> None:
    """Writes the factors and whole tables of a model with LoRA beside its base; with several processes all call this.

    The directory appears whole or not at all, as in `save_pretrained`.

    Raises:
      CheckpointError: the model has no LoRA beside it, or the directory holds something else.
    """
    if pretrained.model.lora is None or pretrained.base is None:
        raise CheckpointError(f"{pretrained.source} has no adapter beside a base, which the layout peft is for; name "
                              "the workdir of a run with LoRA (from Python with merge=False), or choose the layout hf")
    tensors = adapter_tensors(pretrained.model)
    if dtype == "float16" and max(np.abs(value).max() for value in tensors.values()) > np.finfo(np.float16).max:
        raise CheckpointError("the adapter exceeds the range of float16; export as bfloat16 or float32")
    if jax.process_index() > 0:
        return
    with appearing_whole(directory, last=CONFIG) as folder:
        shapes = {name: value.shape for name, value in tensors.items()}
        write_safetensors(folder / f"{TENSORS}.safetensors", shapes, shapes, lambda name: tensors[name].astype(
            jnp.dtype(dtype)), jnp.dtype(dtype))
        write_json(folder / CONFIG, adapter_config(pretrained.model, pretrained.base))
        write_json(folder / NOTES, _notes(pretrained))
        if pretrained.tokenizer is not None:
            pretrained.tokenizer.save_pretrained(folder)
        vocabulary = pretrained.model.config.vocab_size
        grown = pretrained.hf_config.get("vocab_size", vocabulary) != vocabulary
        resize = f", after `base.resize_token_embeddings({vocabulary})`" if grown else ""
        (folder / "README.md").write_text(_CARD.format(base=Path(pretrained.base).name, resize=resize))


def adapter_tensors(model: Transformer) -> dict[str, np.ndarray]:
    """What PEFT stores, by its names, float32 on the host.

    GPT-2 has one module for queries, keys and values, and we have factors for each of them. Side by side, the parts of
    A below each other and those of B on the diagonal, they are factors of that module, of the sum of their ranks.
    """
    family, flat = model.config.family, dict(nnx.to_flat_state(nnx.state(model)))
    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, list[tuple[keys.Key, np.ndarray, np.ndarray]]] = {}
    for name, key in keys.projections(model.config).items():
        path = next((path for path in flat if path[-3:] == (name, "factors", "a")), None)
        if path is not None:
            a, b = (to_host(flat[*path[:-1], side][...]).astype(np.float32) for side in "ab")
            modules.setdefault(key.name, []).append((key, a, b))
    for template, parts in modules.items():
        for layer in range(model.config.num_layers):
            a, b = _fused([(key, *_matrices(key, a[layer], b[layer])) for key, a, b in parts])
            module = PREFIX + template.format(i=layer).removesuffix(".weight")
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    if model.lora.dora:
        tensors |= _magnitudes(model, flat, modules)
    if model.lora.embedding:
        table = to_host(flat["embed", "embedding"][...]).astype(np.float32)
        tensors[PREFIX + keys.embedding_name(family)] = table
        if model.config.tie_embeddings:  # PEFT trains a copy, and would leave the head as it was
            tensors[PREFIX + keys.HEAD] = table
    if model.lora.head:
        tensors[PREFIX + keys.HEAD] = to_host(flat["head", "kernel"][...]).astype(np.float32).T
    return tensors


def _magnitudes(model: Transformer, flat: Mapping[tuple, nnx.Variable],
                modules: Collection[str]) -> dict[str, np.ndarray]:
    """DoRA's magnitudes; a part of a fused module that has none has the norms of its kernel, which they begin as."""
    parts: dict[str, list[np.ndarray]] = {}
    for name, key in keys.projections(model.config).items():  # in the order of the thirds
        if key.name in modules:
            linear = next(path for path in flat if path[-2:] == (name, "kernel"))[:-1]
            found = flat.get((*linear, "factors", "magnitude"))
            if found is None:
                kernel = whole_kernel(flat[*linear, "kernel"], flat.get((*linear, "kernel_scale")))
                norms = kernel_norms(kernel, kernel.ndim - 1)
            value = to_host(norms if found is None else found[...]).astype(np.float32)
            parts.setdefault(key.name, []).append(value.reshape(len(value), -1))
    return {f"{PREFIX}{template.format(i=layer).removesuffix('.weight')}.lora_{MAGNITUDE}": row
            for template, values in parts.items() for layer, row in enumerate(np.concatenate(values, axis=1))}


def _matrices(key: keys.Key, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[rank, inputs] and [outputs, rank] of one layer."""
    rank = a.shape[-1]
    return a.reshape(-1, rank).T, b.reshape(rank, -1).T


def _fused(parts: list[tuple[keys.Key, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a module; see `adapter_tensors`."""
    if parts[0][0].third is None:
        (_, a, b), = parts
        return a, b
    rank, outputs = parts[0][1].shape[0], parts[0][2].shape[0]
    whole = np.zeros((3 * outputs, rank * len(parts)), np.float32)
    for i, (key, _, b) in enumerate(parts):
        whole[key.third * outputs : (key.third + 1) * outputs, i * rank : (i + 1) * rank] = b
    return np.concatenate([a for _, a, _ in parts]), whole


def adapter_config(model: Transformer, base: str) -> dict[str, Any]:
    """adapter_config.json."""
    lora, known = model.lora, keys.projections(model.config)
    modules: dict[str, int] = {}
    for name in lora.targets:
        module = keys.module_name(known[name])
        modules[module] = modules.get(module, 0) + 1
    fused = {module: count for module, count in modules.items() if count > 1}
    embedding, head = (name.removesuffix(".weight").split(".")[-1]
                       for name in (keys.embedding_name(model.config.family), keys.HEAD))
    saved = [embedding] * lora.embedding + [head] * (lora.head or (lora.embedding and model.config.tie_embeddings))
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": sorted(modules), "modules_to_save": saved or None, "bias": "none",
        "fan_in_fan_out": model.config.family == "gpt2",
        "rank_pattern": {module: lora.rank * count for module, count in fused.items()},
        # so that alpha / rank, or alpha / sqrt(rank), is what it is for each part
        "alpha_pattern": {module: lora.alpha * (math.sqrt(count) if lora.rslora else count)
                          for module, count in fused.items()},
    }  # fmt: skip


def _notes(pretrained: "Pretrained") -> dict[str, Any]:
    token = None
    if pretrained.mask_token_id is not None and pretrained.tokenizer is not None:
        token = pretrained.tokenizer.convert_ids_to_tokens(pretrained.mask_token_id)
    written = {"block_size": None} if pretrained.blocks is None else record_of(pretrained.blocks)
    return {"mask_token_id": pretrained.mask_token_id, "mask_token": token, "shift": pretrained.shift,
            **written, "recipe": pretrained.recipe}
