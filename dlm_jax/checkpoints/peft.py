"""Adapters in PEFT's format, read: a directory with adapter_config.json becomes its base with what it adds merged in.

What changes the result and is not computed here is refused by name. Factors are stored as [rank, inputs] and
[outputs, rank] whatever they stand beside, so that `fan_in_fan_out`, which says how that stores its kernel, changes
nothing.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from dlm_jax.checkpoints import hf_names
from dlm_jax.checkpoints.hf_config import record_of
from dlm_jax.checkpoints.hf_tensors import read_tensors, write_safetensors
from dlm_jax.errors import CheckpointError
from dlm_jax.models import ModelConfig, Transformer, abstract_model, kernel_norms, merge_kernel
from dlm_jax.models.lora import full_kernel
from dlm_jax.parallel import to_host
from dlm_jax.storage import METADATA_FILE, atomic_directory, read_json, read_metadata, write_json

if TYPE_CHECKING:
    from dlm_jax.checkpoints.pretrained import Pretrained


CONFIG, TENSORS = "adapter_config.json", "adapter_model"
PREFIX, MAGNITUDE = "base_model.model.", "magnitude_vector"

# Features of PEFT beyond LoRA itself, with the values under which they change nothing. Initialisations that change the
# base (PiSSA and its like) are among them: their adapters belong to another base than the one that is named.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "lora_bias": (False,), "use_qalora": (False,), "use_bdlora": (None, False),
    "layer_replication": (None,), "trainable_token_indices": (None,), "target_parameters": (None, []),
    "alora_invocation_tokens": (None,), "arrow_config": (None,), "kasa_config": (None,), "monteclora_config": (None,),
    "velora_config": (None,), "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What an adapter's directory holds.

    Attributes:
      config: its adapter_config.json.
      tensors: by stored name, without the prefix that all share.
      notes: what dlm_jax wrote beside, of the mask token and the shift; empty where it did not.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    notes: dict[str, Any]

    @property
    def base(self) -> str:
        """The base as it is named."""
        return self.config.get("base_model_name_or_path") or ""

    @property
    def sides(self) -> tuple[str, ...]:
        """What each module has, after `lora_`."""
        return ("A", "B", MAGNITUDE) if self.config.get("use_dora") else ("A", "B")

    def digest(self) -> str:
        """Of what it adds: its settings and the bytes of its tensors."""
        parts = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.tensors):
            parts.update(name.encode() + np.ascontiguousarray(self.tensors[name]).view(np.uint8).data)
        return parts.hexdigest()[:16]

    def scale(self, module: str) -> tuple[int, float]:
        """The rank of the factors beside a module, and by what their product is multiplied."""
        rank = _of_pattern(self.config.get("rank_pattern"), module, self.config.get("r", 8))
        alpha = _of_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8))
        return rank, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def targets(self, module: str) -> bool:
        """Whether a module is to have factors; a regular expression is not asked, as it may be for other names."""
        wanted, without = self.config.get("target_modules"), self.config.get("exclude_modules") or []
        layers = self.config.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        layer = re.search(r"\.(\d+)\.", module)
        if isinstance(wanted, str) or isinstance(without, str) or (layers and int(layer[1]) not in layers):
            return wanted == "all-linear" and not without and not layers
        return any(f".{module}".endswith(f".{name}") for name in wanted or []) and not any(
            f".{module}".endswith(f".{name}") for name in without)


def is_adapter(directory: Path) -> bool:
    """Whether the directory holds an adapter and no model of its own."""
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def read_adapter(directory: Path) -> Adapter:
    """What the directory holds, its tensors on disk until they are used.

    Raises:
      CheckpointError: it is damaged, or not LoRA as it is computed here.
    """
    config = read_json(directory / CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{directory / CONFIG} has peft_type {config.get('peft_type')!r}; supported is LORA")
    for name, allowed in _NEUTRAL.items():
        if name in config and config[name] not in allowed:
            raise CheckpointError(f"{directory / CONFIG} sets {name} to {config[name]!r}, which this library does not "
                                  "compute; merge the adapter with PEFT, and load the merged model")
    stored = read_tensors(directory, (f"{TENSORS}.safetensors", f"{TENSORS}.bin"))
    tensors = {re.sub(r"\.(modules_to_save|default)(?=\.)", "", name.removeprefix(PREFIX)): tensor
               for name, tensor in stored.items()}
    return Adapter(directory, config, tensors, read_metadata(directory))


def merge_adapter(adapter: Adapter, base: "Pretrained", param_dtype: str) -> "Pretrained":
    """`base` with the adapter's products added to its kernels, in float32, and its whole tables in place of the base's.

    Raises:
      CheckpointError: the adapter is for another base, or holds something that cannot be merged.
    """
    factors: dict[str, dict[str, np.ndarray]] = {}
    tables: dict[str, np.ndarray] = {}
    stored_as = hf_names.canonical(adapter.tensors, base.model.config.family)
    for name, stored in stored_as.items():
        module, found, side = name.partition(".lora_")
        side = side.removesuffix(".weight")
        if found and side in adapter.sides:
            factors.setdefault(module, {})[side] = adapter.tensors[stored]
        elif name in (hf_names.embedding_name(base.model.config.family), hf_names.HEAD):
            tables[name] = adapter.tensors[stored]
        else:
            raise CheckpointError(f"the adapter {adapter.directory} holds {stored}, which cannot be merged; supported "
                                  "are LoRA's factors beside projections, and the whole embedding or head")
    model = _with_tables(adapter, base, tables, param_dtype)
    return dataclasses.replace(base, model=_with_products(adapter, base.source, model, factors, stored_as, param_dtype))


def _with_products(adapter: Adapter, source: str, model: Transformer, factors: dict[str, dict[str, np.ndarray]],
                   stored_as: Mapping[str, str], param_dtype: str) -> Transformer:
    graphdef, state = nnx.split(model)
    flat, unused = dict(nnx.to_flat_state(state)), set(factors)
    for name, key in hf_names.projections(model.config).items():
        path = next(path for path in flat if path[0] == "blocks" and path[-2:] == (name, "kernel"))
        shape, num_inputs = flat[path].shape, getattr(getattr(model.blocks, path[1]), name).num_inputs
        inputs, outputs = shape[1 : 1 + num_inputs], shape[1 + num_inputs :]
        pairs = []
        for layer in range(model.config.num_layers):
            module = key.name.format(i=layer).removesuffix(".weight")
            found = factors.get(module)
            unused.discard(module)
            if found is None and adapter.targets(module):
                raise CheckpointError(f"the adapter {adapter.directory} targets {module} and has no factors for it; it "
                                      f"is damaged, or for another base than {source}")
            pairs.append(None if found is None else _pair(
                adapter, source, module, found, key, math.prod(inputs), math.prod(outputs), stored_as))
        if any(pairs):
            a, b = _stacked(pairs, math.prod(inputs), math.prod(outputs))
            a, b = a.reshape(*shape[: 1 + num_inputs], -1), b.reshape(shape[0], -1, *outputs)
            kernel, magnitude = flat[path][...], None
            if MAGNITUDE in adapter.sides:  # layers that have none keep the norms they have
                magnitude = kernel_norms(kernel, 1 + len(outputs))
                for layer, pair in enumerate(pairs):
                    if pair:
                        magnitude = magnitude.at[layer].set(pair[2].reshape(outputs))
            flat[path] = flat[path].replace(merge_kernel(kernel, a, b, 1.0, param_dtype, magnitude))
    if unused:
        raise _for_another(adapter, source, f"it has factors for {min(unused)}, which this base does not have")
    return nnx.merge(graphdef, nnx.from_flat_state(list(flat.items())))


def _pair(adapter: Adapter, source: str, module: str, found: dict[str, np.ndarray], key: hf_names.Key, inputs: int,
          outputs: int, stored_as: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Float32 [inputs, rank] and, with the scale, [rank, outputs] of one module, of a fused one our third of it; and
    DoRA's magnitudes [outputs]."""
    stored = next(stored for name, stored in stored_as.items() if name.startswith(f"{module}.lora_"))
    rank, scale = adapter.scale(stored.partition(".lora_")[0])
    all_outputs = outputs * (1 if key.third is None else 3)
    for side, expected in zip(adapter.sides, ((rank, inputs), (all_outputs, rank), (all_outputs,)), strict=False):
        if side not in found:
            raise CheckpointError(f"the adapter {adapter.directory} is damaged: {module} has no lora_{side}")
        if found[side].shape != expected:
            raise _for_another(adapter, source, f"{module}.lora_{side} has the shape {list(found[side].shape)}, where "
                                                f"its rank {rank} and this base need {list(expected)}")
    ours = slice(None) if key.third is None else slice(key.third * outputs, (key.third + 1) * outputs)
    return (found["A"].astype(np.float32).T, scale * found["B"][ours].astype(np.float32).T,
            found[MAGNITUDE][ours].astype(np.float32) if MAGNITUDE in found else None)


def _stacked(pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray | None] | None], inputs: int,
             outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """[layers, inputs, rank] and [layers, rank, outputs] of the largest rank; what is less is filled up with zeros."""
    rank = max(pair[0].shape[1] for pair in pairs if pair)
    a = np.zeros((len(pairs), inputs, rank), np.float32)
    b = np.zeros((len(pairs), rank, outputs), np.float32)
    for layer, pair in enumerate(pairs):
        if pair:
            a[layer, :, : pair[0].shape[1]], b[layer, : pair[0].shape[1]] = pair[:2]
    return a, b


def _with_tables(adapter: Adapter, base: "Pretrained", tables: dict[str, np.ndarray], param_dtype: str) -> Transformer:
    """The model with whole tables of the adapter. An embedding that comes without its tied head leaves that as it was,
    as in PEFT, and the two are one no longer, unless the adapter says that they stay tied."""
    model, config = base.model, base.model.config
    names = {hf_names.embedding_name(config.family): (config.vocab_size, config.hidden_size),
             hf_names.HEAD: (config.vocab_size, config.hidden_size)}
    for name, table in tables.items():
        if table.shape != names[name]:
            raise _for_another(adapter, base.source, f"its {name} has the shape {list(table.shape)}, where this base "
                                                     f"needs {list(names[name])}")
    embedding, head = (tables.get(name) for name in names)
    if embedding is None and head is None:
        return model
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    table = flat["embed", "embedding"]
    tied = config.tie_embeddings and (bool(adapter.config.get("ensure_weight_tying")) or (
        embedding is not None and head is not None and np.array_equal(embedding, head)))
    if config.tie_embeddings and tied and embedding is None:
        embedding = head
    values = {("embed", "embedding"): table[...] if embedding is None else _placed(embedding, table[...], param_dtype)}
    if not tied:
        old = table[...].T if config.tie_embeddings else flat["head", "kernel"][...]
        values["head", "kernel"] = old if head is None else _placed(head.T, old, param_dtype)
        config = dataclasses.replace(config, tie_embeddings=False)
    return _rebuilt(model, config, values, param_dtype)


def _rebuilt(model: Transformer, config: ModelConfig, values: Mapping[tuple, jax.Array],
             param_dtype: str) -> Transformer:
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    graphdef, shapes = nnx.split(abstract_model(config, model.compute, param_dtype))
    return nnx.merge(graphdef, nnx.from_flat_state([
        (path, shape.replace(values[path] if path in values else flat[path][...]))
        for path, shape in nnx.to_flat_state(shapes)]))


def _placed(value: np.ndarray, like: jax.Array, dtype: str) -> jax.Array:
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index].astype(dtype))


def _for_another(adapter: Adapter, source: str, why: str) -> CheckpointError:
    return CheckpointError(f"the adapter {adapter.directory} is for another base than {source}: {why}")


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first key, a regular expression for the end of a module's name, that matches."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


# ---- Adapters in PEFT's format, written: what was learned beside a base becomes a directory that `peft` loads.


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
    with atomic_directory(directory, last=CONFIG) as folder:
        shapes = {name: value.shape for name, value in tensors.items()}
        write_safetensors(folder / f"{TENSORS}.safetensors", shapes, shapes, lambda name: tensors[name].astype(
            jnp.dtype(dtype)), jnp.dtype(dtype))
        write_json(folder / CONFIG, adapter_config(pretrained.model, pretrained.base))
        write_json(folder / METADATA_FILE, _notes(pretrained))
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
    modules: dict[str, list[tuple[hf_names.Key, np.ndarray, np.ndarray]]] = {}
    for name, key in hf_names.projections(model.config).items():
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
        tensors[PREFIX + hf_names.embedding_name(family)] = table
        if model.config.tie_embeddings:  # PEFT trains a copy, and would leave the head as it was
            tensors[PREFIX + hf_names.HEAD] = table
    if model.lora.head:
        tensors[PREFIX + hf_names.HEAD] = to_host(flat["head", "kernel"][...]).astype(np.float32).T
    return tensors


def _magnitudes(model: Transformer, flat: Mapping[tuple, nnx.Variable],
                modules: Collection[str]) -> dict[str, np.ndarray]:
    """DoRA's magnitudes; a part of a fused module that has none has the norms of its kernel, which they begin as."""
    parts: dict[str, list[np.ndarray]] = {}
    for name, key in hf_names.projections(model.config).items():  # in the order of the thirds
        if key.name in modules:
            linear = next(path for path in flat if path[-2:] == (name, "kernel"))[:-1]
            found = flat.get((*linear, "factors", "magnitude"))
            if found is None:
                kernel = full_kernel(flat[*linear, "kernel"], flat.get((*linear, "kernel_scale")))
                norms = kernel_norms(kernel, kernel.ndim - 1)
            value = to_host(norms if found is None else found[...]).astype(np.float32)
            parts.setdefault(key.name, []).append(value.reshape(len(value), -1))
    return {f"{PREFIX}{template.format(i=layer).removesuffix('.weight')}.lora_{MAGNITUDE}": row
            for template, values in parts.items() for layer, row in enumerate(np.concatenate(values, axis=1))}


def _matrices(key: hf_names.Key, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[rank, inputs] and [outputs, rank] of one layer."""
    rank = a.shape[-1]
    return a.reshape(-1, rank).T, b.reshape(rank, -1).T


def _fused(parts: list[tuple[hf_names.Key, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
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
    lora, known = model.lora, hf_names.projections(model.config)
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
