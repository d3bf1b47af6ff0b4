"""Adapters in PEFT's format: reads one and merges it into its base; writes LoRA beside a base as one.

A setting that changes the result and is not implemented here is refused by name. PEFT stores factors as [rank, inputs]
and [outputs, rank] whatever the layout of the kernel, so `fan_in_fan_out` has no effect.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from dlm_jax.checkpoints import hf_names
from dlm_jax.checkpoints.card import adapter_card
from dlm_jax.checkpoints.hf_config_diffusion import blocks_to_record
from dlm_jax.checkpoints.hf_tensors import read_tensors, write_safetensors
from dlm_jax.checkpoints.tokenizer import save_tokenizer
from dlm_jax.errors import CheckpointError
from dlm_jax.models import Transformer, abstract_model, kernel_norms, merge_kernel
from dlm_jax.models.lora import LoRAConfig, full_kernel
from dlm_jax.parallel import to_host
from dlm_jax.storage import METADATA_FILE, atomic_directory, read_json, read_metadata, write_json

if TYPE_CHECKING:
    from dlm_jax.checkpoints.pretrained import Pretrained

CONFIG, TENSORS = "adapter_config.json", "adapter_model"
PREFIX, MAGNITUDE = "base_model.model.", "magnitude_vector"
_EMBEDDING_SIDES = ("embedding_A", "embedding_B")

# Features of PEFT beyond LoRA itself, with the values that have no effect. Initializations that change the base (PiSSA
# and similar) are among them: their adapters belong to another base than the one that is named.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "lora_bias": (False,), "use_qalora": (False,), "use_bdlora": (None, False),
    "layer_replication": (None,), "trainable_token_indices": (None,), "target_parameters": (None, []),
    "alora_invocation_tokens": (None,), "arrow_config": (None,), "kasa_config": (None,), "monteclora_config": (None,),
    "velora_config": (None,), "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip

_NUMBERS, _FLAGS = ("r", "lora_alpha"), ("use_rslora", "use_dora", "ensure_weight_tying")


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """The contents of an adapter's directory.

    Attributes:
      config: its adapter_config.json.
      tensors: by stored name, without the prefix that all share.
      metadata: what an export of this library records beside them of the mask token, shift and blocks; else empty.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    metadata: dict[str, Any]

    @property
    def base(self) -> str:
        """The source of the base, as the adapter names it."""
        return self.config.get("base_model_name_or_path") or ""

    @property
    def sides(self) -> tuple[str, ...]:
        """The suffixes of each module's tensors, after `lora_`."""
        return ("A", "B", MAGNITUDE) if self.config.get("use_dora") else ("A", "B")

    @property
    def has_embedding(self) -> bool:
        """Whether the adapter holds a full embedding."""
        return any(name.endswith(("embed_tokens.weight", "wte.weight")) for name in self.tensors)

    def digest(self) -> str:
        """Returns a hash of the settings and of the bytes of all tensors."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.tensors):
            digest.update(name.encode() + np.ascontiguousarray(self.tensors[name]).view(np.uint8).data)
        return digest.hexdigest()[:16]

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Returns the rank of a module's factors, and the scale of their product."""
        rank = _match_pattern(self.config.get("rank_pattern"), module, self.config.get("r", 8))
        alpha = _match_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8))
        return rank, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def targets(self, module: str) -> bool:
        """Returns whether a module must have factors; False for regular expressions, which may use other names."""
        included, excluded = self.config.get("target_modules"), self.config.get("exclude_modules") or []
        layers = self.config.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        layer = re.search(r"\.(\d+)\.", module)
        if layers and (layer is None or int(layer[1]) not in layers):
            return False
        if isinstance(included, str) or isinstance(excluded, str):
            return included == "all-linear" and not excluded and not layers and layer is not None
        matches = lambda names: any(f".{module}".endswith(f".{name}") for name in names)  # noqa: E731
        return matches(included or []) and not matches(excluded)


class _WrongBase(Exception):
    """The adapter does not fit the base, for the reason given."""


def is_peft_adapter(directory: Path) -> bool:
    """Returns whether the directory holds an adapter, perhaps beside its base or the base's config.json."""
    return (directory / CONFIG).is_file()


def read_peft_adapter(directory: Path) -> PeftAdapter:
    """Reads an adapter, whose tensors stay on disk until they are used.

    Raises:
      CheckpointError: it is damaged, or not LoRA as implemented here.
    """
    config = read_json(directory / CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{directory / CONFIG} has peft_type {config.get('peft_type')!r}; supported is LORA")
    for name, allowed in _NEUTRAL.items():
        if name in config and config[name] not in allowed:
            raise CheckpointError(f"{directory / CONFIG} sets {name} to {config[name]!r}, which this library does not "
                                  "implement; merge the adapter with PEFT, and load the merged model")
    for name in _NUMBERS:
        if isinstance(value := config.get(name, 8), bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{directory / CONFIG} must give {name} as a number, not {value!r}")
    for name in _FLAGS:
        if not isinstance(value := config.get(name), bool | None):
            raise CheckpointError(f"{directory / CONFIG} must give {name} as true or false, not {value!r}")
    stored = read_tensors(directory, (f"{TENSORS}.safetensors", f"{TENSORS}.bin"))
    tensors = {re.sub(r"\.(modules_to_save|default|base_layer)(?=\.)", "", name.removeprefix(PREFIX)): tensor
               for name, tensor in stored.items()}
    return PeftAdapter(directory, config, tensors, read_metadata(directory))


def merge_peft_adapter(adapter: PeftAdapter, model: Transformer, source: str, param_dtype: str) -> Transformer:
    """Returns a base with an adapter's products added to its kernels and tables, in float32, and full tables replaced.

    Args:
      source: of the base, for messages.

    Raises:
      CheckpointError: the adapter is for another base, or holds something that cannot be merged.
    """
    family = model.config.family
    factors: dict[str, dict[str, np.ndarray]] = {}
    scales: dict[str, tuple[int, float]] = {}
    tables: dict[str, np.ndarray] = {}
    for name, stored in hf_names.canonical(adapter.tensors, family).items():
        if not np.isfinite(adapter.tensors[stored]).all():
            raise CheckpointError(f"{stored} of the adapter {adapter.directory} has numbers that are not finite (NaN "
                                  "or infinity); use an earlier checkpoint of it")
        module, found, side = name.partition(".lora_")
        side = side.removesuffix(".weight")
        if found and side in (*adapter.sides, *_EMBEDDING_SIDES):
            factors.setdefault(module, {})[side] = adapter.tensors[stored]
            scales[module] = adapter.rank_and_scale(stored.partition(".lora_")[0])
        elif name in (hf_names.embedding_name(family), hf_names.HEAD):
            tables[name] = adapter.tensors[stored]
        else:
            raise CheckpointError(f"the adapter {adapter.directory} holds {stored}, which cannot be merged; supported "
                                  "are LoRA's factors beside projections, the embedding and the head, and a full "
                                  "embedding or head")
    try:
        tables |= _adapted_tables(adapter, model, factors, scales, tables)
        if missing := [name for name in map(str, adapter.config.get("modules_to_save") or ())
                       for table in (hf_names.embedding_name(family), hf_names.HEAD)
                       if f".{table}".endswith(f".{name}.weight") and table not in tables]:
            raise _WrongBase(f"it lacks {missing[0]}, which modules_to_save names")
        model = _replace_tables(adapter, model, tables, param_dtype)
        return _add_products(adapter, model, factors, scales, param_dtype)
    except _WrongBase as error:
        raise CheckpointError(f"the adapter {adapter.directory} is damaged, or for another base than {source}: "
                              f"{error}") from error


def _adapted_tables(adapter: PeftAdapter, model: Transformer, factors: dict[str, dict[str, np.ndarray]],
                    scales: dict[str, tuple[int, float]], stored_tables: Mapping[str, np.ndarray]
                    ) -> dict[str, np.ndarray]:
    """Returns the embedding and head that have LoRA, with its product, float32 [vocab, embed] on the host.

    Their factors are removed from `factors`. As in PEFT, LoRA beside one of two tied tables leaves the other unchanged.
    """
    config, flat, tables = model.config, dict(nnx.to_flat_state(nnx.state(model))), {}
    embedding = hf_names.embedding_name(config.family)
    for name, sides in ((embedding, _EMBEDDING_SIDES), (hf_names.HEAD, adapter.sides)):
        module = name.removesuffix(".weight")
        if module not in factors:
            if adapter.targets(module):
                raise _WrongBase(f"it targets {module} and has no factors for it")
            continue
        if adapter.config.get("ensure_weight_tying") or (name == embedding and MAGNITUDE in adapter.sides):
            setting = "ensure_weight_tying" if adapter.config.get("ensure_weight_tying") else "use_dora"
            raise CheckpointError(f"{adapter.directory / CONFIG} sets {setting} with LoRA beside {module}, which this "
                                  "library does not implement; merge the adapter with PEFT, and load the merged model")
        stored, (rank, scale) = factors.pop(module), scales[module]
        own = name == embedding or config.tie_embeddings
        table = _host_float32(flat["embed", "embedding"][...] if own else flat["head", "kernel"][...].T)
        if name in stored_tables:  # PEFT may store a copy of the table that the factors are beside
            _check_table(name, stored_tables[name], table.shape)
            table = stored_tables[name].astype(np.float32)
        size, width = table.shape
        a, b, *magnitude = _checked_factors(stored, module, sides, (
            ((rank, size), (width, rank)) if name == embedding else ((rank, width), (size, rank), (size,))), rank)
        table += scale * ((b @ a).T if name == embedding else b @ a)
        for norms in magnitude:
            table *= (norms / np.linalg.norm(table, axis=1))[:, None]
        tables[name] = table
    return tables


def _checked_factors(found: dict[str, np.ndarray], module: str, sides: tuple[str, ...],
                     shapes: tuple[tuple[int, ...], ...], rank: int) -> list[np.ndarray]:
    """Returns a module's tensors, float32, in the order of `sides` and of these shapes."""
    for side, expected in zip(sides, shapes, strict=False):
        if side not in found:
            raise _WrongBase(f"{module} has no lora_{side}")
        if found[side].shape != expected:
            raise _WrongBase(f"{module}.lora_{side} has the shape {list(found[side].shape)}, where its rank {rank} and "
                             f"this base need {list(expected)}")
    return [found[side].astype(np.float32) for side in sides]


def _add_products(adapter: PeftAdapter, model: Transformer, factors: dict[str, dict[str, np.ndarray]],
                  scales: dict[str, tuple[int, float]], param_dtype: str) -> Transformer:
    graphdef, state = nnx.split(model)
    flat, unused = dict(nnx.to_flat_state(state)), set(factors)
    for linear, key in hf_names.projections(model.config).items():
        path, num_inputs = (*linear, "kernel"), functools.reduce(getattr, linear, model).num_inputs
        shape = flat[path].shape
        inputs, outputs = shape[1 : 1 + num_inputs], shape[1 + num_inputs :]
        layers: list[tuple[np.ndarray, ...] | None] = []
        for layer in range(model.config.num_layers):
            module = key.name.format(i=layer).removesuffix(".weight")
            if module in factors:
                layers.append(_module_factors(adapter, module, factors[module], *scales[module], key,
                                              math.prod(inputs), math.prod(outputs)))
            elif adapter.targets(module):
                raise _WrongBase(f"it targets {module} and has no factors for it")
            else:
                layers.append(None)
            unused.discard(module)
        if not any(layers):
            continue
        rank = max(found[0].shape[1] for found in layers if found)  # smaller ranks are padded with zeros
        a = np.zeros((len(layers), math.prod(inputs), rank), np.float32)
        b = np.zeros((len(layers), rank, math.prod(outputs)), np.float32)
        kernel, magnitude = flat[path][...], None
        if MAGNITUDE in adapter.sides:  # layers without magnitudes keep their norms
            magnitude = kernel_norms(kernel, 1 + len(outputs))
        for layer, found in enumerate(layers):
            if found:
                a[layer, :, : found[0].shape[1]], b[layer, : found[1].shape[0]] = found[:2]
                if magnitude is not None:
                    magnitude = magnitude.at[layer].set(found[2].reshape(outputs))
        flat[path] = flat[path].replace(merge_kernel(kernel, a.reshape(*shape[: 1 + num_inputs], rank), b.reshape(
            shape[0], rank, *outputs), 1.0, param_dtype, magnitude))
    if unused:
        raise _WrongBase(f"it has factors for {min(unused)}, which this base does not have")
    return nnx.merge(graphdef, nnx.from_flat_state(list(flat.items())))


def _module_factors(adapter: PeftAdapter, module: str, found: dict[str, np.ndarray], rank: int, scale: float,
                    key: hf_names.Key, inputs: int, outputs: int) -> tuple[np.ndarray, ...]:
    """Returns one projection's float32 [inputs, rank], scaled [rank, outputs] and, for DoRA, magnitudes [outputs]; its
    third of a fused module."""
    stored_outputs = outputs * (1 if key.third is None else 3)
    a, b, *magnitude = _checked_factors(found, module, adapter.sides,
                                        ((rank, inputs), (stored_outputs, rank), (stored_outputs,)), rank)
    third = slice(None) if key.third is None else slice(key.third * outputs, (key.third + 1) * outputs)
    return a.T, scale * b[third].T, *(values[third] for values in magnitude)


def _replace_tables(adapter: PeftAdapter, model: Transformer, tables: dict[str, np.ndarray],
                    param_dtype: str) -> Transformer:
    """Returns the model with an adapter's full tables.

    As in PEFT, an embedding without its tied head leaves the head unchanged and so unties the two, unless the adapter
    says that they stay tied.
    """
    config = model.config
    names = (hf_names.embedding_name(config.family), hf_names.HEAD)
    expected = (config.vocab_size, config.hidden_size)
    for name, table in tables.items():
        _check_table(name, table, expected)
    embedding, head = (tables.get(name) for name in names)
    if embedding is None and head is None:
        return model
    flat = {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    table = flat["embed", "embedding"]
    tied = config.tie_embeddings and (bool(adapter.config.get("ensure_weight_tying")) or (
        embedding is not None and head is not None and np.array_equal(embedding, head)))
    if tied and embedding is None:
        embedding = head
    if not tied:
        old = table.T if config.tie_embeddings else flat["head", "kernel"]
        flat["head", "kernel"] = old if head is None else _place_like(head.T, old, param_dtype)
    if embedding is not None:
        flat["embed", "embedding"] = _place_like(embedding, table, param_dtype)
    config = dataclasses.replace(config, tie_embeddings=tied)
    graphdef, shapes = nnx.split(abstract_model(config, model.compute, param_dtype))
    return nnx.merge(graphdef, nnx.from_flat_state(
        [(path, shape.replace(flat[path])) for path, shape in nnx.to_flat_state(shapes)]))


def _check_table(name: str, table: np.ndarray, expected: tuple[int, ...]) -> None:
    if table.shape != expected:
        raise _WrongBase(f"its {name} has the shape {list(table.shape)}, where this base needs {list(expected)}")


def _place_like(value: np.ndarray, like: jax.Array, dtype: str) -> jax.Array:
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index].astype(dtype))


def _match_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Returns the value of the first key, a regular expression, that matches the end of a module's name."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


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
    if dtype == "float16" and max(np.abs(value).max() for value in tensors.values()) > np.finfo(np.float16).max:
        raise CheckpointError("the adapter exceeds the range of float16; export as bfloat16 or float32")
    if jax.process_index() > 0:
        return
    token = None
    if diffusion.mask_token_id is not None and pretrained.tokenizer is not None:
        token = pretrained.tokenizer.convert_ids_to_tokens(diffusion.mask_token_id)
    blocks = {"block_size": None} if diffusion.blocks is None else blocks_to_record(diffusion.blocks)
    with atomic_directory(directory, last=CONFIG) as folder:
        shapes = {name: value.shape for name, value in tensors.items()}
        write_safetensors(folder / f"{TENSORS}.safetensors", shapes, shapes, lambda name: tensors[name].astype(
            jnp.dtype(dtype)), jnp.dtype(dtype))
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
        table = _host_float32(flat["embed", "embedding"][...])
        tensors[PREFIX + hf_names.embedding_name(config.family)] = table
        if config.tie_embeddings:  # PEFT trains a copy and leaves the head unchanged
            tensors[PREFIX + hf_names.HEAD] = table
    if lora.head:
        tensors[PREFIX + hf_names.HEAD] = _host_float32(flat["head", "kernel"][...]).T
    return tensors


def _module_tensors(flat: Mapping[tuple, nnx.Variable], projections: dict[tuple, hf_names.Key],
                    dora: bool) -> dict[str, np.ndarray]:
    """Returns the LoRA tensors of one HF module by side, stacked over layers; none if it has no factors.

    GPT-2 has one module for queries, keys and values, which have separate factors here. They become factors of that
    module, with the sum of their ranks: each A below the other, and each B on a block diagonal. A projection without
    magnitudes has the norms of its kernel.
    """
    factors = [(key, *(_host_float32(flat[*path, "factors", side][...]) for side in "ab"))
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
            magnitudes.append(_host_float32(magnitude[...]).reshape(layers, -1))
        tensors[MAGNITUDE] = np.concatenate(magnitudes, axis=1)
    return tensors


def _host_float32(array: jax.Array) -> np.ndarray:
    return to_host(array).astype(np.float32)


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
